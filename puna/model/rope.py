"""Rotary position embedding (RoFormer, arXiv 2104.09864), and the ways to stretch it past its first length.

Pair i of a head of width H turns by `position · θ^(-2i/H)`. Every scaling below is one class with one method
that returns these frequencies; `SCALINGS` lists them by the name that `config.json` uses. The layout is
half-split: dimension i is paired with dimension i + H/2.

    B batch   T positions in the input   N query heads   K key/value heads   H head width
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from puna.settings import Settings


class NoScaling(Settings):
    """Frequencies as trained: θ^(-2i/H)."""

    by_length: ClassVar[bool] = False
    rope_type: Literal["default"] = "default"

    def frequencies(
        self, theta: float, head_dim: int, context: int, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """Frequencies (H/2,), and the factor on cosines and sines. All scalings take the same arguments.

        Args:
            theta: the base θ.
            head_dim: H, even.
            context: the model's `max_position_embeddings`.
            lengths: lengths of the sequences that tokens belong to, (B, 1) or (B, T); read only where
                `by_length` is true, and the frequencies are then (B, 1, H/2) or (B, T, H/2).
            dtype: the type to compute in. Published models were trained and are run with float32
                frequencies; at position 100,000 their rounding is visible, so it is kept.
        """
        return _plain(theta, head_dim, dtype), 1.0


class LinearScaling(Settings):
    """Positions divided by a factor (position interpolation, arXiv 2306.15595)."""

    by_length: ClassVar[bool] = False
    rope_type: Literal["linear"] = "linear"
    factor: float = Field(ge=1)

    def frequencies(
        self, theta: float, head_dim: int, context: int, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """θ^(-2i/H) / factor."""
        return _plain(theta, head_dim, dtype) / self.factor, 1.0


class DynamicScaling(Settings):
    """NTK-aware scaling of the base by the length of the sequence at hand; nothing changes up to `context`.

    For a sequence of L > context positions the base is θ · (factor · L / context - (factor - 1))^(H/(H-2)).
    """

    by_length: ClassVar[bool] = True
    rope_type: Literal["dynamic"] = "dynamic"
    factor: float = Field(ge=1)

    def frequencies(
        self, theta: float, head_dim: int, context: int, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """Frequencies for each length, (B, 1, H/2) or (B, T, H/2); (H/2,) where no lengths are given."""
        if lengths is None:
            return _plain(theta, head_dim, dtype), 1.0
        stretch = self.factor * lengths.to(dtype) / context - (self.factor - 1)
        base = torch.where(lengths > context, theta * stretch ** (head_dim / (head_dim - 2)), theta)
        return 1.0 / base[..., None] ** _exponents(head_dim, dtype).to(lengths.device), 1.0  # (B, 1|T, H/2)


class YarnScaling(Settings):
    """YaRN (arXiv 2309.00071): low frequencies are interpolated, high ones kept, those between blended.

    A pair that turns more than `beta_fast` times over the original length is kept, one that turns less than
    `beta_slow` times is divided by `factor`. Cosines and sines are multiplied by `attention_factor`, by
    default 0.1 · ln(factor) + 1, or the ratio of two such terms where both `mscale` fields are given.
    """

    by_length: ClassVar[bool] = False
    rope_type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0)
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must not be below beta_slow {self.beta_slow}")
        return self

    def frequencies(
        self, theta: float, head_dim: int, context: int, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """A blend of θ^(-2i/H) and θ^(-2i/H) / factor."""
        low, high = self._blended_pairs(theta, head_dim)
        pairs = torch.arange(head_dim // 2, dtype=dtype, device="cpu")
        kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
        wavelengths = theta ** _exponents(head_dim, dtype)
        return 1.0 / (self.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept, self._on_cosines()

    def _blended_pairs(self, theta: float, head_dim: int) -> tuple[float, float]:
        """The first and last pair of the blend, from the number of turns over the original length."""
        low, high = (
            head_dim
            * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high  # an empty blend would divide by zero

    def _on_cosines(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


class Llama3Scaling(Settings):
    """Llama 3.1's rule: wavelengths below original/high kept, above original/low divided, others blended."""

    by_length: ClassVar[bool] = False
    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above "
                f"low_freq_factor {self.low_freq_factor}"
            )
        return self

    def frequencies(
        self, theta: float, head_dim: int, context: int, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """θ^(-2i/H), divided by factor where the wavelength is long."""
        plain = _plain(theta, head_dim, dtype)
        original, low, high = (
            self.original_max_position_embeddings,
            self.low_freq_factor,
            self.high_freq_factor,
        )
        wavelengths = 2 * math.pi / plain
        kept = (original / wavelengths - low) / (high - low)
        blended = (1 - kept) * plain / self.factor + kept * plain
        scaled = torch.where(wavelengths > original / low, plain / self.factor, plain)
        between = (wavelengths >= original / high) & (wavelengths <= original / low)
        return torch.where(between, blended, scaled), 1.0


RopeScaling = Annotated[
    NoScaling | LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling, Field(discriminator="rope_type")
]
SCALINGS = {
    "default": NoScaling,
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
}


class Rope(nn.Module):
    """Positions to cosines and sines.

    It holds no parameter and no buffer: a buffer would be rounded by `.to(bfloat16)`, and left without values
    by a build on the meta device. Frequencies are computed once per device and type, on the CPU, so that
    every device turns by the same angles.
    """

    def __init__(self, theta: float, head_dim: int, context: int, scaling: RopeScaling) -> None:
        super().__init__()
        self.theta, self.head_dim, self.context, self.scaling = theta, head_dim, context, scaling
        self._known: dict[tuple[torch.device, torch.dtype], tuple[Tensor, float]] = {}

    def forward(
        self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, H) in `dtype`, float32 or float64, as `apply_rope` takes them.

        Both halves of a head turn by the same angles; the sines of the first half are negated.

        Args:
            positions: (B, T), integers; (1, T) where all rows have the same.
            dtype: the type of frequencies, angles and results.
            lengths: (B, 1) or (B, T): the length of the sequence each token belongs to, for dynamic NTK.
                None takes the last position of each row plus one.
        """
        frequencies, factor = self._frequencies(positions, dtype, lengths)
        angles = positions[..., None].to(dtype) * frequencies  # (B, T, H/2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (B, T, H)

    def _frequencies(
        self, positions: Tensor, dtype: torch.dtype, lengths: Tensor | None
    ) -> tuple[Tensor, float]:
        if self.scaling.by_length:
            lengths = positions.amax(dim=-1, keepdim=True) + 1 if lengths is None else lengths
            return self.scaling.frequencies(self.theta, self.head_dim, self.context, lengths, dtype)
        key = (positions.device, dtype)
        if key not in self._known:
            values, factor = self.scaling.frequencies(self.theta, self.head_dim, self.context, None, dtype)
            self._known[key] = values.to(positions.device), factor
        return self._known[key]


def document_lengths(positions: Tensor, documents: Tensor) -> Tensor:
    """How long the document of each token in a packed row is, its last position plus one: (B, T).

    A run of equal numbers in `documents` is one document.
    """
    T = documents.shape[1]
    ends = torch.arange(T, device=documents.device).expand_as(documents).clone()
    ends[:, :-1].masked_fill_(documents[:, 1:] == documents[:, :-1], T)
    ends = ends.flip(1).cummin(dim=1).values.flip(1)  # (B, T): where each token's document ends
    return positions.expand_as(documents).gather(1, ends) + 1


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries (B, T, N, H) and keys (B, T, K, H) by the angles of cos and sin (B, T, H).

    The products are formed in the type of cos and sin and rounded once, to the type of q and k.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]  # (B, T, 1, H)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # (a, b) · (c, c) + (b, a) · (-s, s); trains twice as fast on a CPU as the two halves put together by cat.
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def _exponents(head_dim: int, dtype: torch.dtype) -> Tensor:
    """2i/H for every pair i: (H/2,). On the CPU even inside `torch.device("meta")`."""
    return torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim


def _plain(theta: float, head_dim: int, dtype: torch.dtype) -> Tensor:
    """θ^(-2i/H): (H/2,)."""
    return 1.0 / theta ** _exponents(head_dim, dtype)
