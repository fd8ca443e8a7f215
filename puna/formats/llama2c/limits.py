"""What of a model llama2.c's programs have no place for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from puna.errors import TokenizerError
from puna.formats.content import Content, Obstacle
from puna.formats.llama2c.layout import EPS, LARGEST, THETA
from puna.model.config import ModelConfig
from puna.model.rope import NoScaling
from puna.model.weights import Weights
from puna.tokenizer import llama2c_vocabulary, sentencepiece_writer
from puna.tokenizer.sentencepiece_reader import SentencePieceCodec
from puna.tokenizer.tokenizer import Tokenizer

BOS, EOS = 1, 2  # written into run.c, which begins a text with BOS and ends it there


def obstacles(content: Content) -> Iterator[Obstacle]:
    """Each thing that is lost, and the content without it."""
    config = content.config
    for what, found in _fixed(config).items():
        if found:
            yield Obstacle(what, None)
    if config.sliding_window is not None:
        changed = config.model_copy(update={"sliding_window": None})
        yield Obstacle(
            f"a sliding window of {config.sliding_window} (longer texts get other answers without it)",
            replace(content, weights=Weights(changed, content.weights.tensors)),
        )
    others = sorted({*content.end_ids} - {BOS, EOS})
    if others:
        kept = tuple(index for index in content.end_ids if index in (BOS, EOS))
        yield Obstacle(
            f"end tokens other than {BOS} and {EOS} ({', '.join(map(str, others))})",
            replace(content, end_ids=kept),
        )
    yield from _tokenizer(content)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> bytes:
    """The content of a tokenizer.bin for a model with this vocabulary.

    Raises:
        TokenizerError: it would give other ids.
    """
    codec = tokenizer.codec
    if codec.kind == "tokenizer.json":
        codec = SentencePieceCodec(sentencepiece_writer.from_json(codec.definition()))
    if not isinstance(codec, SentencePieceCodec):
        raise TokenizerError(f"it is of another kind ({codec.kind}), not SentencePiece BPE")
    if (tokenizer.bos_id, tokenizer.eos_id) != (BOS, EOS):
        ends = f"{tokenizer.bos_id} and {tokenizer.eos_id}"
        raise TokenizerError(f"BOS and EOS are {ends}, expected {BOS} and {EOS}")
    return llama2c_vocabulary.write(codec, vocab_size)


def _fixed(config: ModelConfig) -> dict[str, bool]:
    """What no model remains without."""
    rope = config.rope_scaling
    width = config.head_dim * config.num_attention_heads
    numbers = (config.vocab_size, width, config.intermediate_size, config.max_position_embeddings)
    return {
        "biases": config.attention_bias or config.mlp_bias,
        f"heads of {config.head_dim} that do not add up to hidden_size": width != config.hidden_size,
        f"rms_norm_eps {config.rms_norm_eps:g} (run.c has {EPS:g})": config.rms_norm_eps != EPS,
        f"rope_theta {config.rope_theta:g} (run.c has {THETA:g})": config.rope_theta != THETA,
        f"rope scaling {rope.rope_type}": not isinstance(rope, NoScaling),
        f"sizes beyond {LARGEST}": max(numbers) > LARGEST,
    }


def _tokenizer(content: Content) -> Iterator[Obstacle]:
    tokenizer = content.tokenizer
    if tokenizer is None:
        return
    try:
        vocabulary_of(tokenizer, content.config.vocab_size)
    except TokenizerError as error:
        yield Obstacle(f"its tokenizer: {error}", replace(content, tokenizer=None))
        return
    if tokenizer.chat_template is not None:
        plain = Tokenizer(tokenizer.codec, tokenizer.end_ids, extras=tokenizer.extras)
        yield Obstacle("a chat template", replace(content, tokenizer=plain))
