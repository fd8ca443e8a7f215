"""GGUF files of other writers: keys in their ways, shards, Llama 3's divisors, and what is no Llama."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Type

from puna import formats
from puna.errors import InputError, ModelError
from puna.formats.gguf.rope import OURS, decimal
from puna.formats.packed import plain
from puna.model.config import ModelConfig
from puna.model.rope import SCALINGS
from tests.formats import gguf_files, llama_cpp_program
from tests.formats.damage import read_whole
from tests.formats.test_gguf import LENGTH, k_config, reopened, same
from tests.model.shapes import CONFIGS, ids_of, model_of

Changes = Mapping[str, tuple[Any, ...] | None]


def rewritten(
    path: Path, changes: Changes, tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None, **how: Any
) -> Path:
    """A copy by the gguf package, with keys (value and type) and tensors changed, or left out where None."""
    reader = gguf.GGUFReader(path)
    target = path.with_name("other.gguf")
    writer = gguf.GGUFWriter(target, "llama", **how)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    for name, field in fields.items():
        if name not in changes and name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, change in changes.items():
        if change is not None:
            writer.add_key_value(name, *change)
    found = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    changed = tensors or {}
    for name, (data, kind) in found.items():
        if name not in changed:
            writer.add_tensor(name, np.array(data), raw_dtype=kind)
    for name, new in changed.items():
        if new is not None:
            writer.add_tensor(name, new)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small model."""
    gguf_files.write(tmp_path / "m.gguf", model_of(CONFIGS["grouped"]))
    return tmp_path / "m.gguf"


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ModelError) as caught:
        formats.open_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def number(value: float) -> tuple[float, Type]:
    """A float as metadata have it."""
    return value, Type.FLOAT32


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3", "all at once"])
def test_scalings_are_found_without_our_own_key(name: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", model_of(CONFIGS[name]))
    assert formats.open_model(rewritten(tmp_path / "m.gguf", {OURS: None})).config == CONFIGS[name]


def test_published_llama_3_divisors_as_llama_cpp_writes_them(tmp_path: Path) -> None:
    values = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {**values, "original_max_position_embeddings": 8192}
    shape = {"head_dim": 64, "max_position_embeddings": 131_072, "rope_theta": 500_000.0}
    config = ModelConfig(**{**CONFIGS["grouped"].model_dump(), **shape, "rope_scaling": scaling})
    gguf_files.write(tmp_path / "m.gguf", model_of(config))
    frequencies = 1.0 / (500_000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * torch.pi / frequency
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        blend = 1 / ((1 - smooth) / 32.0 + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else 32.0 if wavelength > 8192 else float(blend))
    found = {"rope_freqs.weight": np.array(divisors, np.float32)}
    assert formats.open_model(rewritten(tmp_path / "m.gguf", {OURS: None}, found)).config == config
    found["rope_freqs.weight"][20] *= 1.001
    assert "rope_freqs.weight are of no rotary scaling known" in refused(
        rewritten(tmp_path / "m.gguf", {}, found)
    )
    short = {"rope_freqs.weight": np.array(divisors[1:], np.float32)}
    assert "no rotary scaling known" in refused(rewritten(tmp_path / "m.gguf", {}, short))


def test_divisors_of_one_say_nothing(file: Path) -> None:
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert formats.open_model(rewritten(file, {}, ones)).config == CONFIGS["grouped"]


def test_our_key_is_believed_only_where_the_file_agrees(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", model_of(CONFIGS["linear"]))
    other = rewritten(tmp_path / "m.gguf", {"llama.rope.scaling.factor": number(2.0)})
    assert formats.open_model(other).config.rope_scaling == SCALINGS["linear"](factor=2.0)  # type: ignore[call-arg]
    other = rewritten(tmp_path / "m.gguf", {OURS: ("[" * 100_000, Type.STRING)})
    assert formats.open_model(other).config == CONFIGS["linear"]


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.0, 1.3])
def test_yarn_of_another_writer_turns_as_in_llama_cpp(ratio: float, file: Path) -> None:
    other = rewritten(
        file,
        {
            "llama.rope.scaling.type": ("yarn", Type.STRING),
            "llama.rope.scaling.factor": number(4.0),
            "llama.rope.scaling.original_context_length": (16, Type.UINT32),
            "llama.rope.scaling.attn_factor": number(ratio),
        },
    )
    model = reopened(other)
    ids = ids_of(model.config, 1, LENGTH)
    ours = model(ids)[0].log_softmax(dim=-1)
    assert (ours - llama_cpp_program.log_probabilities(other, ids[0])).abs().max() < 5e-5


@torch.no_grad()
def test_keys_left_out_have_llama_cpp_s_defaults(file: Path) -> None:
    keys = ("rope.freq_base", "rope.dimension_count", "vocab_size", "attention.value_length")
    optional = {f"llama.{key}": None for key in (*keys, "attention.key_length")}
    other = rewritten(file, {**optional, "llama.rope.scaling.type": ("none", Type.STRING)})
    assert formats.open_model(other).config == CONFIGS["grouped"]
    other = rewritten(file, {"llama.rope.scale_linear": number(4.0)})
    assert formats.open_model(other).config.rope_scaling == SCALINGS["linear"](factor=4.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": ("mistral", Type.STRING)}, "'mistral' is not supported; the nearest"),
        ({"general.architecture": ("qwen2", Type.STRING)}, "'qwen2'"),
        ({"llama.expert_count": (8, Type.UINT32)}, "mixture of experts"),
        ({"llama.logit_scale": number(0.5)}, "its logits are scaled"),
        ({"llama.attention.head_count": ([4, 4], Type.ARRAY)}, "a list of 2; a Llama has one number"),
        ({"llama.attention.head_count": None}, "head_count is missing"),
        ({"llama.attention.head_count": (0, Type.UINT32)}, "num_attention_heads"),
        ({"llama.attention.head_count_kv": (3, Type.UINT32)}, "not divisible by num_key_value_heads 3"),
        ({"llama.attention.head_count_kv": (4, Type.UINT32)}, "expected [32, 32] by the metadata"),
        ({"llama.rope.dimension_count": (4, Type.UINT32)}, "expected the head width 8"),
        ({"llama.attention.value_length": (16, Type.UINT32)}, "expected the head width 8"),
        ({"llama.block_count": (3, Type.UINT32)}, "expected 3 layers by its metadata, found tensors of 2"),
        ({"llama.block_count": (1 << 31, Type.UINT32)}, "found tensors of 2"),
        ({"llama.vocab_size": (97, Type.UINT32)}, "has 96 rows"),
        ({"llama.embedding_length": ("x", Type.STRING)}, "embedding_length is 'x'"),
        ({"llama.attention.layer_norm_rms_epsilon": number(float("nan"))}, "expected a number"),
        ({"llama.rope.freq_base": number(1e30)}, "expected a number"),
        ({"llama.rope.scaling.type": ("longrope", Type.STRING)}, "'longrope'; expected none, linear or yarn"),
        ({"llama.rope.scaling.yarn_log_multiplier": number(0.1)}, "only 0.0 is supported"),
        ({"llama.rope.scaling.attn_factor": number(1.5)}, "of no rotary scaling known"),
        ({"general.alignment": (24, Type.UINT32)}, "power of two"),
    ],
)
def test_what_is_no_llama(changes: Changes, message: str, file: Path) -> None:
    assert message in refused(rewritten(file, changes))


KEYS = [
    *("general.architecture", "general.alignment", "split.count", "split.no", "puna.rope_scaling"),
    *("llama.expert_count", "llama.vocab_size", "llama.context_length", "llama.block_count"),
    *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length"),
    *("llama.attention.value_length", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"),
    *("llama.rope.dimension_count", "llama.rope.scaling.type", "llama.rope.scaling.factor"),
    *("llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor"),
    *("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"),
    *("tokenizer.ggml.token_type", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"),
    *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"),
    *("tokenizer.chat_template", "puna.ordinary_tokens", "puna.end_token_ids"),
]
ODD: list[tuple[Any, ...]] = [
    (1, Type.UINT64),
    (-1, Type.INT64),
    (0, Type.UINT8),
    (1 << 63, Type.UINT64),
    (1.5, Type.FLOAT64),
    (float("nan"), Type.FLOAT32),
    (float("-inf"), Type.FLOAT32),
    (True, Type.BOOL),
    ("llama", Type.STRING),
    ("x\ny", Type.STRING),
    ([1, 2, 3], Type.ARRAY, Type.UINT32),
    ([1.0, 2.0], Type.ARRAY, Type.FLOAT32),
    ([True], Type.ARRAY, Type.BOOL),
    (["a", "b"], Type.ARRAY, Type.STRING),
]


@pytest.mark.parametrize("key", KEYS)
def test_values_of_other_types_are_refused_or_valid(key: str, tmp_path: Path) -> None:
    tokenizer = gguf_files.small_tokenizer()
    config = CONFIGS["yarn"].model_copy(update={"vocab_size": tokenizer.vocab_size})
    gguf_files.write(tmp_path / "m.gguf", model_of(config), tokenizer)
    for value in ODD:
        try:
            read_whole(rewritten(tmp_path / "m.gguf", {key: value}))
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"output_norm.weight": None}, "output_norm.weight is missing from the tensors"),
        ({"token_embd.weight": None}, "token_embd.weight is missing"),
        ({"blk.0.attn_q.bias": np.zeros(32, np.float32)}, "blk.0.attn_k.bias"),
        ({"blk.0.ffn_gate_exps.weight": np.zeros(32, np.float32)}, "not part of a Llama"),
        ({"blk.0.attn_q_norm.weight": np.zeros(8, np.float32)}, "blk.0.attn_q_norm.weight is not part"),
        ({"output_norm.weight": np.zeros(16, np.float32)}, "has shape [16], expected [32]"),
        ({"output_norm.weight": np.zeros(32, np.int32)}, "is stored as I32; supported: F32, F16"),
        ({"rope_freqs.weight": np.zeros((2, 2), np.float32)}, "expected float32 [H/2]"),
    ],
)
def test_tensors_that_are_not_the_models(tensors: Any, message: str, file: Path) -> None:
    assert message in refused(rewritten(file, {}, tensors))


def test_an_output_that_is_left_out_is_tied(file: Path) -> None:
    assert formats.open_model(rewritten(file, {}, {"output.weight": None})).config.tie_word_embeddings


def test_shards(tmp_path: Path) -> None:
    tokenizer, file = gguf_files.small_tokenizer(), tmp_path / "m.gguf"
    config = CONFIGS["grouped"].model_copy(update={"vocab_size": tokenizer.vocab_size})
    gguf_files.write(file, model_of(config), tokenizer)
    rewritten(file, {}, split_max_tensors=6)
    shards = sorted(file.parent.glob("other-*.gguf"))
    assert [path.name for path in shards] == [f"other-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    whole = formats.open_model(file)
    for path in (shards[0], shards[2]):
        source = formats.open_model(path)
        assert source.config == whole.config and source.tokenizer() is not None
        pairs = zip(source.weights, whole.weights, strict=True)
        assert all(one[0] == other[0] and same(one[1], other[1]) for one, other in pairs)
    shards[1].rename(file.parent / "away.gguf")
    assert "other-00002-of-00004.gguf is missing of 4 shards" in refused(shards[0])
    shards[2].rename(shards[1])
    assert "other-00003-of-00004.gguf is missing" in refused(shards[0])
    (file.parent / "away.gguf").rename(shards[2])
    assert "not shard 2 of 4" in refused(shards[0])
    shards[0].rename(file.parent / "alone.gguf")
    assert "expected a name such as model-00001-of-00004.gguf" in refused(file.parent / "alone.gguf")


def test_decimals_are_those_that_were_meant() -> None:
    for value in (1e-5, 1e-6, 0.1, 500_000.0, 10_000.0, 1.3862944):
        assert decimal(float(np.float32(value))) == value


@torch.no_grad()
@pytest.mark.parametrize(
    ("mix", "kinds"), [("Q4_K_M", {"q4_k", "q6_k"}), ("Q5_K_S", {"q5_k", "q6_k"}), ("Q8_0", {"q8_0"})]
)
def test_files_that_llama_cpp_has_quantized(mix: str, kinds: set[str], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = gguf_files.small_tokenizer()
    model = model_of(k_config().model_copy(update={"vocab_size": tokenizer.vocab_size})).eval()
    gguf_files.write(tmp_path / "m.gguf", model, tokenizer)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}"), 1
    target = tmp_path / "small.gguf"
    assert llama_cpp.llama_model_quantize(str(tmp_path / "m.gguf").encode(), str(target).encode(), how) == 0

    source = formats.open_model(target)
    assert source.config == model.config and source.dtype == torch.float16
    assert set(source.stored) == {*kinds, "float32"}
    again = source.tokenizer()
    assert again is not None and again.fingerprint == tokenizer.fingerprint
    for name, value in source.weights:
        original = model.get_parameter(name)
        assert (plain(value) - original).norm() < 0.1 * original.norm(), name
    ids = ids_of(source.config, 1, LENGTH)
    ours = reopened(target)(ids)[0].log_softmax(dim=-1)
    theirs = llama_cpp_program.log_probabilities(target, ids[0])
    assert (ours.exp() * (ours - theirs)).sum(dim=-1).mean() < 1e-2
