"""What shows whether a row's bits depend on its company: each part of a model, and rows that let it be seen.

A sum in another order differs in its last bits, and a result of 16 bits hides them nearly always. So products
are given rows whose terms cancel, one output each: what is left is the error of the sum, and nothing else.
What is computed in float32 inside a 16-bit model is asked for in float32.

    R rows   D width   F feed-forward width   N query heads   H head width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.kernels import panels
from puna.model.llama import Llama
from puna.quantize.packed import PackedLinear

SEED = 20
ROWS, CHEAP_ROWS = 32, 256  # that are tried at least: a small class several times over
SMALL = 16  # the largest class in which a whole layer is run; in larger ones only its parts are
CANCELLED = 3  # terms that take up what is left of a sum, each what the one before it was rounded by


@dataclass(frozen=True)
class Probe:
    """One part as a function of rows."""

    run: Callable[..., list[Tensor]]
    """Columns (R, …) to results (R, …): all that a row's bits could differ in."""
    inputs: Callable[[int], list[Tensor]]
    """So many rows of the columns, from random numbers of their own."""
    least: int = ROWS
    """How many rows should be tried."""
    largest: int | None = None
    """The largest class that is tried; None: every one."""


def body_probes(model: Llama) -> list[Probe]:
    """All between the embedding and the normalised hidden states."""
    layers = _one_of_each(model.model.layers)
    inner = [module for layer in layers for module in layer.modules()]
    products = _one_of_each([module for module in inner if "in_features" in vars(module)])
    return [
        _angles(model),
        _norm(model),
        _activation(model),
        *(_product(product, _dtype(model)) for product in products),
        *(_layer(model, layer) for layer in layers),
    ]


def head_probes(model: Llama) -> list[Probe]:
    """The output projection."""
    return [_product(model.lm_head, _dtype(model))]


def _one_of_each(modules: nn.ModuleList | list[nn.Module]) -> list[nn.Module]:
    return list({_kind(module): module for module in modules}.values())


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What decides how a module is computed: its modules, and its tensors' shapes, types and alignment."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (
        *((name, type(inner)) for name, inner in module.named_modules()),
        *((name, x.shape, x.dtype, x.stride(), x.data_ptr() % 64) for name, x in tensors),
    )


def _dtype(model: Llama) -> torch.dtype:
    return model.model.norm.weight.dtype


def _normal(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=_generator())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _positions(model: Llama, rows: int) -> Tensor:
    return torch.randint(model.config.max_position_embeddings, (rows,), generator=_generator())


def _rope(model: Llama, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, R, H) of positions (R,)."""
    wide = torch.promote_types(_dtype(model), torch.float32)
    lengths = positions[None] * 2 + 1 if model.model.rope.scaling.by_length else None
    cos, sin = model.model.rope(positions[None], wide, lengths)
    return cos, sin


def _angles(model: Llama) -> Probe:
    device = model.model.norm.weight.device
    return Probe(
        lambda positions: [x[0] for x in _rope(model, positions)],
        lambda rows: [_positions(model, rows).to(device)],
        CHEAP_ROWS,
    )


def _norm(model: Llama) -> Probe:
    norm, weight = model.model.norm, model.model.norm.weight
    wide, width = torch.promote_types(weight.dtype, torch.float32), model.config.hidden_size
    return Probe(
        lambda x: [norm(x[None])[0]],
        lambda rows: [_normal(rows, width).to(weight.device, wide)],
        CHEAP_ROWS,
    )


def _activation(model: Llama) -> Probe:
    """SiLU, at values where the vectors' exponential and the single number's differ, if there are any."""
    weight = model.model.norm.weight
    values = _telling(weight.dtype, weight.device)
    width = model.config.intermediate_size

    def inputs(rows: int) -> list[Tensor]:
        if values is None:
            return [_normal(rows, width).to(weight.device, weight.dtype)]
        return [values.repeat(-(-rows * width // len(values)))[: rows * width].view(rows, width)]

    return Probe(lambda x: [F.silu(x[None])[0]], inputs, CHEAP_ROWS)


def _telling(dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The numbers of a 16-bit type whose SiLU in a vector differs from that alone; None if none do."""
    if dtype.itemsize != 2:
        return None
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    apart = every.repeat_interleave(2)[::2]  # with gaps between them torch takes one at a time
    found = every[F.silu(every) != F.silu(apart)]
    return found if len(found) else None


def _product(module: nn.Module, dtype: torch.dtype) -> Probe:
    """A linear layer of torch's, or one of another kind that says by `in_features` what it takes."""
    device = next(iter((*module.parameters(), *module.buffers()))).device
    width = int(vars(module)["in_features"])

    def inputs(rows: int) -> list[Tensor]:
        if isinstance(module, nn.Linear | PackedLinear) and _adds_in_floating_point(module):
            return [_cancelling(module, rows)]
        return [_normal(rows, width).to(device, dtype)]

    return Probe(lambda x: [module(x[None])[0]], inputs)


def _adds_in_floating_point(linear: nn.Linear | PackedLinear) -> bool:
    """Whether its outputs are sums that could be rounded otherwise in another order."""
    if isinstance(linear, nn.Linear):
        return linear.weight.is_floating_point()
    return [matrix.scales for matrix in linear.matrices()] == [None]


def _cancelling(linear: nn.Linear | PackedLinear, rows: int) -> Tensor:
    """Rows (R, in) each of which makes one output nearly zero, by terms that are not."""
    outputs = torch.randint(linear.out_features, (rows,), generator=_generator())
    weight, bias = _terms(linear, outputs)  # (R, in), (R,)
    factors, rest = weight.double(), 0 if bias is None else bias.double()
    x = _normal(rows, linear.in_features).to(weight.device, weight.dtype)
    places = factors.abs().topk(min(CANCELLED, linear.in_features), dim=1).indices  # (R, CANCELLED)
    x.scatter_(1, places, 0)
    for place in places.split(1, dim=1):
        left = (x.double() * factors).sum(dim=1) + rest
        factor = factors.gather(1, place)
        x.scatter_(1, place, torch.where(factor == 0, 0, -left[:, None] / factor).to(x.dtype))
    return x


def _terms(linear: nn.Linear | PackedLinear, outputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weights (R, in) and biases (R,) of some outputs (R,)."""
    if isinstance(linear, PackedLinear):
        (matrix,) = linear.matrices()
        outputs = outputs.to(matrix.panels.device)
        return panels.outputs_of(matrix.panels, outputs), None if matrix.bias is None else matrix.bias[
            outputs
        ]
    outputs = outputs.to(linear.weight.device)
    return linear.weight[outputs], None if linear.bias is None else linear.bias[outputs]


def _layer(model: Llama, layer: nn.Module) -> Probe:
    """A layer as a whole, and the final norm; a cache that gives back the queries."""
    weight = model.model.norm.weight

    def run(hidden: Tensor, positions: Tensor) -> list[Tensor]:
        found: list[Tensor] = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found.extend((q[0], k[0], v[0]))
            return q

        out = layer(hidden[None], *_rope(model, positions), None, attend)
        return [*found, out[0], model.model.norm(out)[0]]

    def inputs(rows: int) -> list[Tensor]:
        hidden = _normal(rows, model.config.hidden_size).to(weight.device, weight.dtype)
        return [hidden, _positions(model, rows).to(weight.device)]

    return Probe(run, inputs, least=SMALL, largest=SMALL)
