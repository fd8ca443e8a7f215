"""The Llama (arXiv 2302.13971, 2307.09288, 2407.21783): constructors and forward methods, nothing else.

Modules are named so that `state_dict` has Hugging Face's names. What acts on a model (adapters, quantization,
sharding) rewrites a built model from its own room.

    B batch   T positions   D width   N query heads   K key/value heads
    H head width   F feed-forward width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from puna.errors import ModelError, nearest
from puna.model.attention import KERNELS, Cache, Kernel, first_keys
from puna.model.config import ModelConfig
from puna.model.rope import Rope, apply_rope, document_lengths

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q (B, T, N, H), k (B, T, K, H), v (B, T, K, H)) → (B, T, N, H)"""


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, computed in float32 at least (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x)); the gate takes the SiLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F_, bias=bias)
        self.up_proj = nn.Linear(D, F_, bias=bias)
        self.down_proj = nn.Linear(F_, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, kernel: Kernel) -> None:
        super().__init__()
        D, H, bias = config.hidden_size, config.head_dim, config.attention_bias
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.kernel, self.head_dim, self.dropout = kernel, H, config.attention_dropout
        self.q_proj = nn.Linear(D, N * H, bias=bias)
        self.k_proj = nn.Linear(D, K * H, bias=bias)
        self.v_proj = nn.Linear(D, K * H, bias=bias)
        self.o_proj = nn.Linear(N * H, D, bias=bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, attend: Attend | None
    ) -> Tensor:
        """(B, T, D) → (B, T, D). With `attend` a cache attends; else the kernel, from `starts` on."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads)  # (B, T, N, H)
        k = self.k_proj(x).view(heads)  # (B, T, K, H)
        v = self.v_proj(x).view(heads)  # (B, T, K, H)
        q, k = apply_rope(q, k, cos, sin)
        if attend is not None:
            out = attend(q, k, v)
        else:
            dropout = self.dropout if self.training else 0.0
            out = self.kernel(q, k, v, starts=starts, causal=True, dropout=dropout)
        return self.o_proj(out.flatten(2))  # (B, T, D)


class Block(nn.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream after.

    It does not know its index, so that all layers share one compiled graph.
    """

    def __init__(self, config: ModelConfig, kernel: Kernel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, kernel)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.residual_dropout

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self._dropped(self.self_attn(self.input_layernorm(x), cos, sin, starts, attend))
        return x + self._dropped(self.mlp(self.post_attention_layernorm(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Decoder(nn.Module):
    """Embedding, layers, final norm: ids to hidden states."""

    def __init__(self, config: ModelConfig, kernel: Kernel) -> None:
        super().__init__()
        self.window = config.sliding_window
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        if not table.is_meta:  # drawing numbers that are none makes torch import its compiler, for a second
            self.embed_tokens.reset_parameters()
        self.layers = nn.ModuleList(Block(config, kernel) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(
            config.rope_theta, config.head_dim, config.max_position_embeddings, config.rope_scaling
        )

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Ids (B, T) to normalised hidden states (B, T, D); the arguments are those of `Llama.forward`."""
        if cache is not None and (positions is None or documents is not None):
            raise ModelError(
                "a cache needs positions (B, T), and takes no documents: it holds one sequence per row"
            )
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        x = self.embed_tokens(ids)  # (B, T, D)
        starts = None  # a cache knows its window
        if cache is None:
            starts = first_keys(ids.shape[1], self.window, documents, ids.device)  # (B or 1, T)
        # Angles stay in float32 in a half-precision model: from 512 on bfloat16 has only every fourth number.
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.rope(positions, wide, self._lengths(positions, documents, cache))  # (B, T, H)
        for index, layer in enumerate(self.layers):
            attend = None if cache is None else partial(cache.attend, index, positions=positions)
            x = layer(x, cos, sin, starts, attend)
        return self.norm(x)

    def _lengths(self, positions: Tensor, documents: Tensor | None, cache: Cache | None) -> Tensor | None:
        """How long each token's sequence is, (B, 1) or (B, T); None where a row is one sequence."""
        if not self.rope.scaling.by_length:
            return None
        if cache is None:
            return None if documents is None else document_lengths(positions, documents)
        if cache.rope_lengths is None:
            # Keys already held were turned by the base of an earlier length: it must not move.
            raise ModelError(
                "dynamic NTK with a cache needs cache.rope_lengths (B, 1) or (B, T), fixed for each sequence"
            )
        return cache.rope_lengths


class Llama(nn.Module):
    """The whole model; its weights are arbitrary until `initialize` or `load_weights` sets them.

    Built under `torch.device("meta")` it costs no memory, and both then adopt tensors instead of copying.

    Raises:
        ModelError: the kernel is unknown.
    """

    def __init__(self, config: ModelConfig, kernel: str = "fused") -> None:
        super().__init__()
        if kernel not in KERNELS:
            raise ModelError(
                f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.{nearest(kernel, KERNELS)}"
            )
        self.config = config
        self.model = Decoder(config, KERNELS[kernel])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Ids (B, T) to logits (B, T, V).

        Args:
            ids: (B, T), int64.
            positions: (B, T), int64, rising by one within a sequence; None counts 0..T-1 in every row.
            documents: (B, T), integers; attention stays within each run of equal ids. None: one sequence.
            cache: holds earlier keys and values; needs positions.

        Raises:
            ModelError: a cache without positions, with documents, or without the lengths dynamic NTK needs.
        """
        return self.lm_head(self.model(ids, positions, documents, cache))  # (B, T, V)
