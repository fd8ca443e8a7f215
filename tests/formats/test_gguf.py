"""GGUF files there and back bit for bit, and with llama.cpp's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from puna import formats
from puna.devices import DTYPES
from puna.errors import ModelError
from puna.formats.content import Content
from puna.formats.gguf.config import gguf_name
from puna.formats.gguf.file import GgufSettings, obstacles
from puna.formats.packed import BLOCKS, block_sizes, expanded, pack, plain
from puna.formats.rotary import interleaved
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, shapes, weights_of
from tests.formats import gguf_files, llama_cpp_program
from tests.model.shapes import CONFIGS, ids_of, model_of

HELD = [name for name in CONFIGS if name != "dynamic"]
LENGTH = 60  # nearly four times the configs' context
K_QUANTS = ("q4_k", "q5_k", "q6_k")


def reopened(path: Path) -> Llama:
    """A model in memory from a file."""
    source = formats.open_model(path)
    model = Llama(source.config).eval()
    load_weights(model, expanded(source.weights))
    return model


def same(one: Tensor | Packed, other: Tensor | Packed) -> bool:
    """Whether two tensors are stored alike, bit for bit."""
    if isinstance(one, Packed) and isinstance(other, Packed):
        return one.scheme == other.scheme and torch.equal(one.data, other.data) and one.shape == other.shape
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    return one.dtype == other.dtype and torch.equal(one, other)


@torch.no_grad()
def answer(model: Llama, prompt: list[int], count: int) -> list[int]:
    """The `count` most probable next ids."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", HELD)
def test_there_and_back_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name])
    recorded, _ = gguf_files.write(tmp_path / "m.gguf", model)
    source = formats.open_model(tmp_path / "m.gguf")
    expected = dict(weights_of(model))
    assert source.config == model.config
    assert (source.format, source.dtype, source.stored) == ("gguf", torch.float32, {"float32": len(expected)})
    for _ in range(2):
        found = dict(source.weights)
        assert list(found) == list(expected) == list(recorded)
        for key, value in expected.items():
            assert same(found[key], value) and same(recorded[key], value), key


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in HELD if name != "sliding window"])
def test_llama_cpp_gives_the_same_log_probabilities(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name]).eval()
    gguf_files.write(tmp_path / "m.gguf", model)
    ids = ids_of(model.config, 1, LENGTH)
    ours = model(ids)[0].log_softmax(dim=-1)
    assert (ours - llama_cpp_program.log_probabilities(tmp_path / "m.gguf", ids[0])).abs().max() < 5e-5


@pytest.mark.parametrize("name", ["grouped", "all at once", "yarn, untruncated"])
def test_llama_cpp_gives_the_same_greedy_answer(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name]).eval()
    gguf_files.write(tmp_path / "m.gguf", model)
    prompt = ids_of(model.config, 1, 8)[0].tolist()
    assert llama_cpp_program.greedy(tmp_path / "m.gguf", prompt, 40) == answer(model, prompt, 40)


@torch.no_grad()
def test_a_sliding_window_is_kept_though_llama_cpp_ignores_it(tmp_path: Path) -> None:
    model = model_of(CONFIGS["sliding window"]).eval()
    _, notes = gguf_files.write(tmp_path / "m.gguf", model)
    assert any("ignores the sliding window" in note for note in notes)
    everything = Llama(model.config.model_copy(update={"sliding_window": None})).eval()
    load_weights(everything, weights_of(model))
    ids = ids_of(model.config, 1, LENGTH)
    theirs = llama_cpp_program.log_probabilities(tmp_path / "m.gguf", ids[0])
    assert (everything(ids)[0].log_softmax(dim=-1) - theirs).abs().max() < 5e-5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_matrices_take_a_type_and_vectors_stay_float32(dtype: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS["all at once"])
    recorded, _ = gguf_files.write(tmp_path / "m.gguf", model, dtype=dtype)
    source = formats.open_model(tmp_path / "m.gguf")
    assert source.dtype == DTYPES[dtype]
    for name, tensor in model.named_parameters():
        expected = tensor.detach().to(DTYPES[dtype] if tensor.dim() > 1 else torch.float32)
        assert same(dict(source.weights)[name], expected) and same(recorded[name], expected)
    file_type = gguf.GGUFReader(tmp_path / "m.gguf").fields["general.file_type"].contents()
    assert file_type == {"float32": 0, "float16": 1, "bfloat16": 32}[dtype]


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_low_bit_files_hold_what_the_codecs_make(scheme: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"])
    _, notes = gguf_files.write(tmp_path / "m.gguf", model, dtype=scheme)
    source = formats.open_model(tmp_path / "m.gguf")
    assert source.dtype == torch.float16
    # Rows of 48 do not divide into blocks of 32.
    assert source.stored == {scheme: 14, "float16": 2, "float32": 5}
    assert any("mlp.down_proj.weight" in note and "stored as float16" in note for note in notes)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, value in source.weights:
        stored = theirs[gguf_name(name)]
        numbers = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        ours = interleaved(name, plain(value), source.config)
        assert isinstance(ours, Tensor) and torch.equal(ours.float(), numbers), name
        if isinstance(value, Packed):
            original = model.get_parameter(name).detach()
            assert same(value, pack(original, scheme)), name


@torch.no_grad()
def test_llama_cpp_reads_the_same_numbers_from_low_bits(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", model_of(CONFIGS["grouped"]), dtype="q8_0")
    again = reopened(tmp_path / "m.gguf")
    ids = ids_of(again.config, 1, LENGTH)
    ours = again(ids)[0].log_softmax(dim=-1)
    theirs = llama_cpp_program.log_probabilities(tmp_path / "m.gguf", ids[0])
    divergence = (ours.exp() * (ours - theirs)).sum(dim=-1)
    assert divergence.mean() < 2e-3  # its products round activations to eight bits as well


def test_packed_tensors_pass_through_as_they_are(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "first.gguf", model_of(CONFIGS["grouped"]), dtype="q4_1")
    source = formats.open_model(tmp_path / "first.gguf")
    gguf_files.write(tmp_path / "second.gguf", source.weights)
    again = formats.open_model(tmp_path / "second.gguf")
    assert again.stored == source.stored
    assert all(same(one, other) for (_, one), (_, other) in zip(source.weights, again.weights, strict=True))
    gguf_files.write(tmp_path / "wide.gguf", source.weights, dtype="float32")
    for (_, one), (_, other) in zip(
        source.weights, formats.open_model(tmp_path / "wide.gguf").weights, strict=True
    ):
        assert same(plain(one).float(), other)


def test_types_that_gguf_does_not_have_become_float32(tmp_path: Path) -> None:
    model = model_of(CONFIGS["grouped"], torch.float64)
    gguf_files.write(tmp_path / "m.gguf", model)
    found = dict(formats.open_model(tmp_path / "m.gguf").weights)
    assert all(same(found[name], plain(value).float()) for name, value in weights_of(model))


def blocks(scheme: str, rows: int, columns: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random blocks of a K-quant whose scales are those of weights of some ±0.1."""
    numbers, size = block_sizes(scheme)
    data = generator.integers(0, 256, (rows, columns // numbers, size), dtype=np.uint8)
    places = (208,) if scheme == "q6_k" else (0, 2)
    for at in places:
        scales = generator.uniform(1e-5, 1e-4, (rows, columns // numbers)).astype(np.float16)
        data[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def written_by_hand(path: Path, scheme: str) -> dict[str, np.ndarray[Any, Any]]:
    """A file of K-quants by the gguf package alone; its matrices, expanded by it, in GGUF's own layout."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(80)
    writer.add_tokenizer_model("no_vocab")
    expected: dict[str, np.ndarray[Any, Any]] = {}
    config = k_config()
    for name, shape in {gguf_name(n): s for n, s in shapes(config).items()}.items():
        if len(shape) == 1:
            expected[name] = generator.uniform(0.5, 1.5, shape).astype(np.float32)
            writer.add_tensor(name, expected[name])
            continue
        kind = "f16" if name == "output.weight" else scheme if "attn" in name else "q6_k"
        if kind == "f16":
            data = generator.normal(0, 0.1, shape).astype(np.float16)
            writer.add_tensor(name, data)
            expected[name] = data.astype(np.float32)
        else:
            data = blocks(kind, *shape, generator)
            writer.add_tensor(name, data, raw_dtype=BLOCKS[kind])
            expected[name] = gguf.quants.dequantize(data, BLOCKS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def k_config() -> ModelConfig:
    """What `written_by_hand` describes."""
    return ModelConfig(
        vocab_size=80,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@torch.no_grad()
@pytest.mark.parametrize("scheme", K_QUANTS)
def test_k_quants_of_another_writer_are_read(scheme: str, tmp_path: Path) -> None:
    expected = written_by_hand(tmp_path / "m.gguf", scheme)
    source = formats.open_model(tmp_path / "m.gguf")
    assert source.config == k_config()
    for name, value in source.weights:
        ours = interleaved(name, plain(value), source.config)
        assert isinstance(ours, Tensor)
        assert np.array_equal(ours.float().numpy(), expected[gguf_name(name)]), name
    ids = ids_of(source.config, 1, LENGTH)
    ours = reopened(tmp_path / "m.gguf")(ids)[0].log_softmax(dim=-1)
    theirs = llama_cpp_program.log_probabilities(tmp_path / "m.gguf", ids[0])
    divergence = (ours.exp() * (ours - theirs)).sum(dim=-1)
    assert divergence.mean() < 1e-2 and (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9


def test_obstacles() -> None:
    content = Content(weights_of(model_of(CONFIGS["dynamic"])))
    (found,) = obstacles(content, GgufSettings())
    assert "dynamic rotary scaling" in found.what and found.without is None
    content = Content(Weights(CONFIGS["grouped"].model_copy(update={"max_position_embeddings": 1 << 33}), []))
    (found,) = obstacles(content, GgufSettings())
    assert "a context of 8589934592 positions" in found.what


def test_nan_is_told(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", model_of(CONFIGS["grouped"]), dtype="q8_0")
    source = formats.open_model(tmp_path / "m.gguf")
    entries = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    data = (tmp_path / "m.gguf").read_bytes()
    for name, bad in (("output_norm.weight", b"\0\0\xc0\x7f"), ("blk.1.ffn_up.weight", b"\0\x7c")):
        at = int(entries[name].data_offset)
        (tmp_path / "m.gguf").write_bytes(data[:at] + bad + data[at + len(bad) :])
        with pytest.raises(ModelError, match="holds NaN or infinite"):
            list(source.weights)


@pytest.mark.parametrize("dtype", [None, "q8_0"])
def test_stories_in_llama_cpp_are_those_of_llama2_c(dtype: str | None, assets: Path, tmp_path: Path) -> None:
    directory = assets / "weights" / "stories260K"
    source = formats.open_model(directory / "stories260K.bin")
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    gguf_files.write(tmp_path / "m.gguf", source.weights, tokenizer, dtype=dtype)
    expected = (directory / "greedy_200_steps.txt").read_text().strip()
    ids = llama_cpp_program.greedy(tmp_path / "m.gguf", [1], 200 if dtype is None else 40)
    text = tokenizer.decode(ids)
    assert text.strip() and expected.startswith(text.strip())
    if dtype is None:
        assert text.strip() == expected
