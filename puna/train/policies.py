"""What layers keep for the backward pass: the choice among policies, put into a built model from outside.

| policy | kept of each layer | computed again |
|---|---|---|
| `none` | the input of every operation: torch's autograd over model/llama.py | nothing |
| `paper` | its input and the outputs of its matrix products | norms, rotary embedding, SiLU · gate |
| `block` | its input | the layer, but for its last product |
| `offload` | as `paper`, in main memory while other layers run | as `paper` |

All but `none` run the layer of layer.py, whose backward pass is written out. Results are the same but for
rounding; those of `paper`, `block` and `offload` are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from puna.devices import product_type
from puna.errors import SettingsError
from puna.kernels import float8, gemm
from puna.kernels.causal import Heads
from puna.kernels.library import load
from puna.model.llama import Attend, Block, Llama, RMSNorm
from puna.settings import Settings, layout
from puna.train import layer as layers
from puna.train.layer import Angles, Form, Kept, Memory, Parameters, Plan, Products, run
from puna.train.tied import lookup

Policy = Literal["none", "paper", "block", "offload"]


class MemorySettings(Settings):
    """What each layer keeps for its backward pass: none, paper, block or offload; auto: what is fastest."""

    policy: Literal["auto", "none", "paper", "block", "offload"] = layout("auto")


def _everything(kept: Kept) -> Sequence[Tensor]:
    return kept


def _as_kept(held: Sequence[Tensor], again: Callable[[Tensor], Kept]) -> Kept:
    return Kept(*held)


def _input(kept: Kept) -> Sequence[Tensor]:
    return (kept.x,)


def _from_input(held: Sequence[Tensor], again: Callable[[Tensor], Kept]) -> Kept:
    return again(*held)


def _in_main_memory(kept: Kept) -> Sequence[Tensor]:
    """Copies in main memory. The device makes them in the order of its work, and nobody waits: it is also the
    device that writes over the originals, and that reads the copies, both only after that.
    """
    copies = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) for x in kept]
    for copy, x in zip(copies, kept, strict=True):
        copy.copy_(x, non_blocking=True)
    # Where to, for the way back: a tensor of no numbers tells the device.
    return [*copies, kept.x.new_empty(0)]


def _from_main_memory(held: Sequence[Tensor], again: Callable[[Tensor], Kept]) -> Kept:
    *copies, where = held
    return Kept(*(copy.to(where.device, non_blocking=True) for copy in copies))


MEMORIES: dict[str, Memory] = {
    "paper": Memory(_everything, _as_kept),
    "block": Memory(_input, _from_input),
    "offload": Memory(_in_main_memory, _from_main_memory),
}

PRODUCTS = {
    False: Products(gemm.linear, gemm.input_gradient, gemm.weight_gradient),
    True: Products(float8.linear, float8.input_gradient, float8.weight_gradient),
}
"""Those of the layers, by whether they are of 8 bits."""


@dataclass(frozen=True)
class Circumstances:
    """What a policy depends on besides the model: the device, the type of what products give, whether they
    are of 8 bits within the layers, and whether torch.compile is asked for in so many words.
    """

    device: torch.device
    compute: torch.dtype
    float8: bool = False
    compiling: bool = False

    @property
    def compiled_here(self) -> bool:
        """Whether this package has compiled code for the layer's own passes."""
        return self.device.type == "cpu" and self.compute in COMPILED_FOR and not self.float8


def choose_policy(settings: MemorySettings, model: Llama, at: Circumstances) -> Policy:
    """The policy of a run.

    `auto` is `paper` where this machine has compiled code for the layer's own passes, unless torch.compile
    is asked for, and with products of 8 bits, which only these passes know; elsewhere `none`.

    Raises:
        SettingsError: the policy does not suit the model, the device, compiling, or products of 8 bits.
    """
    policy, fault = settings.policy, _unsuited(model)
    if at.float8 and (unfit := _unfit_for_float8(model, at.device) or fault):
        raise SettingsError(f"precision.float8 = true: {unfit}; leave it out")
    if policy == "auto" and not at.float8:
        wanted = at.compiled_here and not fault and not at.compiling and _has_kernels(at.compute)
        return "paper" if wanted else "none"
    if policy == "none" and at.float8:
        raise SettingsError('precision.float8 = true needs the layer\'s own passes: memory.policy = "paper"')
    if policy == "none":
        return "none"
    if fault:
        raise SettingsError(f'memory.policy = "{policy}": {fault}; use "none"')
    if policy == "offload" and at.device.type != "cuda":
        raise SettingsError(
            f'memory.policy = "offload" moves what is kept to main memory, where {at.device.type} has it '
            'already; use "paper" or "block"'
        )
    if at.compiling and at.compiled_here:
        raise SettingsError(
            f'memory.policy = "{policy}" runs compiled code of its own on a CPU, where compile.mode = "on" '
            'has nothing to do; leave compile.mode at "auto", or use memory.policy = "none"'
        )
    return "paper" if policy == "auto" else policy


COMPILED_FOR = (torch.bfloat16, torch.float32)
"""Types of products that the layer's own passes have compiled code for."""


def _has_kernels(compute: torch.dtype) -> bool:
    """Whether they can be compiled here; products in float32 are torch's in any case."""
    compiled = all(load(name).functions is not None for name in ("causal", "norms", "gates"))
    return compiled and (compute != torch.bfloat16 or gemm.available())


def _unfit_for_float8(model: Llama, device: torch.device) -> str:
    if not float8.multiplies_float8(device):
        return f"{device} does not multiply in float8 (CUDA from Ada on does)"
    config = model.config
    sizes = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    if any(size % float8.MULTIPLE for size in sizes):
        return f"it wants widths that {float8.MULTIPLE} divides, got {sizes}"
    return ""


def _unsuited(model: Llama) -> str:
    """Why the layers cannot run the passes written out; "" if they can."""
    for block in model.model.layers:
        if not isinstance(block, Block):
            return f"expected layers as model/llama.py has them, got {type(block).__name__}"
        attention, mlp = block.self_attn, block.mlp
        if block.dropout or attention.dropout:
            return "the layer's own passes know no dropout, and the model has some"
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = [block.input_layernorm, block.post_attention_layernorm]
        for module, plain in [*((x, nn.Linear) for x in linears), *((x, RMSNorm) for x in norms)]:
            if type(module) is not plain:
                return f"expected plain layers, got {type(module).__name__}"
    return ""


def written_out(
    model: Llama,
    policy: Policy,
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    float8: bool = False,
) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Each of the model's layers, and its forward with the backward pass written out; so the embedding, if
    it is the output layer's matrix too, or in half precision.

    Args:
        policy: not `none`.
        compiler: what the passes go through, one for all layers: torch.compile, or nothing.
        float8: whether products within the layers are of 8 bits.
    """
    passes = [compiler(each) for each in (layers.forward, layers.up_to_gates, layers.backward)]
    blocks = cast("Iterable[Block]", model.model.layers)
    found: list[tuple[nn.Module, Callable[..., Tensor]]] = [
        (block, WrittenOut(block, MEMORIES[policy], PRODUCTS[float8], tuple(passes))) for block in blocks
    ]
    embedding = model.model.embed_tokens
    # In bfloat16 torch's own adds up the rows of a frequent word in bfloat16, and loses most of them.
    if embedding.weight is model.lm_head.weight or embedding.weight.dtype.itemsize < 4:
        found.append((embedding, Lookup(embedding)))
    return found


@dataclass(frozen=True)
class WrittenOut:
    """A block's forward whose backward pass is written out. An object, so that a copied model has its own."""

    block: Block
    memory: Memory
    products: Products
    passes: tuple[Callable[..., Any], ...]

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        block = self.block
        if attend is not None:  # a cache attends: nothing is learned
            return Block.forward(block, x, cos, sin, starts, attend)
        attention, H = block.self_attn, block.self_attn.head_dim
        heads = Heads(attention.q_proj.out_features // H, attention.k_proj.out_features // H, H)
        eps = block.input_layernorm.eps, block.post_attention_layernorm.eps
        plan = Plan(Form(heads, *eps, product_type(x), self.products), self.memory, *self.passes)
        return run(plan, x, Angles(cos, sin, starts), _parameters(block))


@dataclass(frozen=True)
class Lookup:
    """An embedding's forward whose gradient is added to the table's, in its type."""

    embedding: nn.Embedding

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, T) → (B, T, D)."""
        return lookup(ids, self.embedding.weight)


def _parameters(block: Block) -> Parameters:
    """Read anew at every call: what shards or moves a model puts others in their place."""
    attention, mlp = block.self_attn, block.mlp
    linears = (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip
    q, k, v, o, gate, up, down = (linear.weight for linear in linears)
    norms = block.input_layernorm.weight, block.post_attention_layernorm.weight
    return Parameters(norms[0], q, k, v, o, norms[1], gate, up, down, *(linear.bias for linear in linears))
