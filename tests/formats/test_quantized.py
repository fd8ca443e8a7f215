"""Quantized directories: what other programs open and write, every bit there and back, and refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna import formats
from puna.errors import InputError, ModelError
from puna.formats import provenance
from puna.formats.convert import convert
from puna.formats.huggingface.directory import CONFIG, HuggingFaceSettings
from puna.formats.huggingface.safetensors_reader import INDEX, SINGLE
from puna.formats.packed import canonical, in_blocks, pack, plain
from puna.formats.proof.verify import VerifySettings, compare
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import Packed, Weights, load_weights, weights_of
from puna.quantize.codes import expand, from_whole_numbers
from puna.quantize.schemes import Format, quantized
from tests.formats import gguf_files
from tests.formats.conftest import edit
from tests.model.shapes import ids_of, model_of

UNTIED = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TIED = UNTIED.model_copy(update={"tie_word_embeddings": True})
FORMATS = {
    "int8": Format("int8", None, torch.float32),
    "int8 bfloat16": Format("int8", None, torch.bfloat16),
    "int8 by groups": Format("int8", 32, torch.float16),
    "int4": Format("int4", 32, torch.float16),
    "int4 bfloat16": Format("int4", 64, torch.bfloat16),
    "nf4": Format("nf4", 64, torch.float32),
}
QUICK = VerifySettings(tokens=64, greedy_tokens=4, low_memory=False)
UP = "model.layers.0.mlp.up_proj"
Named = dict[str, Tensor | Packed]
Choose = Callable[[str], str | None]


def layers(kind: str) -> Choose:
    """Every matrix but embedding and output projection in one format."""
    return lambda name: kind if ".layers." in name else None


def everything(kind: str) -> Choose:
    return lambda name: kind


def mixed(name: str) -> str | None:
    """A recipe of several formats."""
    kinds = {"down_proj": "int8", "q_proj": "int4 bfloat16", "o_proj": None, "lm_head": "int8 by groups"}
    return next(
        (kind for part, kind in kinds.items() if part in name), "int4" if ".layers." in name else None
    )


def named(config: ModelConfig, choose: Choose, dtype: torch.dtype = torch.float32) -> Named:
    """A random model's tensors, its matrices in the formats chosen."""
    found: Named = {}
    for name, value in weights_of(model_of(config)):
        assert isinstance(value, Tensor)
        kind = choose(name) if value.dim() == 2 else None
        found[name] = value.to(dtype) if kind is None else quantized(value, FORMATS[kind])
    return found


def saved(path: Path, config: ModelConfig, tensors: Named, **settings: Any) -> Path:
    formats.save(path, Weights(config, list(tensors.items())), settings=HuggingFaceSettings(**settings))
    return path


def read(path: Path) -> Named:
    return dict(formats.open_model(path).weights)


def same(a: Tensor | Packed, b: Tensor | Packed) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    if isinstance(a, Packed) and isinstance(b, Packed) and a.scales is not None and b.scales is not None:
        return (
            (a.scheme, a.shape) == (b.scheme, b.shape) and same(a.data, b.data) and same(a.scales, b.scales)
        )
    if isinstance(a, Packed) or isinstance(b, Packed):
        return isinstance(a, Packed) and isinstance(b, Packed) and torch.equal(a.data, b.data)
    return a.dtype == b.dtype and torch.equal(a, b)


def all_same(a: Named, b: Named) -> bool:
    return list(a) == list(b) and all(same(a[name], b[name]) for name in a)


def expanded_model(config: ModelConfig, tensors: Named) -> Llama:
    model = Llama(config)
    load_weights(model, formats.expanded(Weights(config, list(tensors.items()))))
    return model.eval()


# ---- other programs


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "choose"),
    [
        (UNTIED, layers("int4")),
        (UNTIED, everything("int8 by groups")),
        (UNTIED, mixed),
        (TIED, layers("int4 bfloat16")),
        (TIED, everything("int4")),
    ],
    ids=["int4", "int8 groups, all", "mixed", "tied", "tied, all"],
)
def test_transformers_opens_them_and_gives_the_same_logits(
    config: ModelConfig, choose: Choose, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    tensors = named(config, choose)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        saved(tmp_path / "m", config, tensors), output_loading_info=True
    )
    assert not any(report.values())
    ours, ids = expanded_model(config, tensors), ids_of(config, 1, 12)
    logits = theirs(ids).logits
    if choose is not mixed:  # whose int8 layers round their inputs as well
        assert ((ours(ids) - logits).abs().max() / logits.abs().max()).item() < 1e-5
    weights = dict(theirs.named_parameters())
    for name, value in tensors.items():
        assert torch.equal(weights[name], plain(value)), name


@torch.no_grad()
def test_transformers_rounds_the_inputs_of_int8_row_by_row(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    tensors = named(UNTIED, everything("int8"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(tmp_path / "m", UNTIED, tensors))
    ours, ids = expanded_model(UNTIED, tensors), ids_of(UNTIED, 1, 12)

    def rounded(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5  # of 255 steps; ours has 254
        return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)

    def torchs(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2)

    logits, exact = theirs(ids).logits, ours(ids)
    for layer in ours.model.layers:  # a last bit that differs may round to another whole number
        layer.self_attn.kernel = torchs
    for module in ours.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    far, near = (exact - logits).abs().max(), (ours(ids) - logits).abs().max()
    assert near < 0.01 * far


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_in_the_config_loses_no_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    tensors = named(UNTIED, layers("int4"), dtype)  # scales are float16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(tmp_path / "m", UNTIED, tensors))
    theirs(ids_of(UNTIED, 1, 2))  # they are expanded then
    expected = torch.float32 if dtype == torch.bfloat16 else torch.float16
    assert theirs.dtype == expected
    weights = dict(theirs.named_parameters())
    assert all(torch.equal(weights[name], plain(value).to(expected)) for name, value in tensors.items())


@pytest.mark.parametrize("kind", ["int8 by groups", "int4"])
def test_codes_are_packed_as_compressed_tensors_packs_them(kind: str, tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    tensors = named(UNTIED, layers(kind))
    stored = load_file(saved(tmp_path / "m", UNTIED, tensors) / SINGLE)
    packed = tensors[f"{UP}.weight"]
    assert isinstance(packed, Packed) and packed.scales is not None
    bits = 8 if kind.startswith("int8") else 4
    codes = (expand(packed).unflatten(1, (-1, 32)) / packed.scales.float()[..., None]).round().flatten(1)
    assert torch.equal(stored[f"{UP}.weight_packed"], helpers.pack_to_int32(codes.to(torch.int8), bits))
    assert torch.equal(
        helpers.unpack_from_int32(stored[f"{UP}.weight_packed"], bits, torch.Size(packed.shape)),
        codes.to(torch.int8),
    )
    assert stored[f"{UP}.weight_shape"].tolist() == list(packed.shape)


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_compressed_tensors_writes_is_read(symmetric: bool, bits: int, tmp_path: Path) -> None:
    ct = pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    saved(tmp_path / "plain", UNTIED, named(UNTIED, lambda name: None))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            groups = module.weight.unflatten(1, (-1, 32))
            low, high = groups.amin(-1), groups.amax(-1)
            step = (
                (torch.maximum(high, -low) / 2 ** (bits - 1) * 1.02)
                if symmetric
                else (high - low) / (2**bits - 1)
            )
            module.weight_scale.data = step
            if not symmetric:
                module.weight_zero_point.data = (-(2 ** (bits - 1)) - low / step).round().to(torch.int8)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(str(tmp_path / "theirs"))
    source = formats.open_model(tmp_path / "theirs")
    compressor.decompress_model(model)
    expected = dict(model.named_parameters())
    assert ct and any("zero points" in note for note in source.notes) != symmetric
    for name, value in source.weights:
        assert isinstance(value, Packed) == (symmetric and ".layers." in name and "norm" not in name)
        assert torch.equal(plain(value), expected[name]), name


@torch.no_grad()
def test_bitsandbytes_opens_nf4_with_the_same_weights(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    tensors = named(UNTIED, layers("nf4"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(tmp_path / "m", UNTIED, tensors))
    for name, value in tensors.items():
        module = theirs.get_submodule(name.removesuffix(".weight"))
        if isinstance(value, Packed):
            found = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(found, expand(value)), name
    assert all_same(read(tmp_path / "m"), tensors)


def test_double_quantized_scales_of_bitsandbytes_are_expanded(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    tensors = named(UNTIED, layers("nf4"))
    path = saved(tmp_path / "m", UNTIED, tensors)
    stored = load_file(path / SINGLE)
    matrix = dict(weights_of(model_of(UNTIED)))[f"{UP}.weight"]
    codes, state = bnb.functional.quantize_4bit(
        matrix, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    kept = {name: value for name, value in stored.items() if not name.startswith(f"{UP}.weight.")}
    parts = {f"{UP}.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    save_file({**kept, f"{UP}.weight": codes, **parts}, path / SINGLE)
    found = read(path)[f"{UP}.weight"]
    expected = bnb.functional.dequantize_4bit(codes, state)
    assert isinstance(found, Packed)
    assert ((expand(found) - expected).abs().max() / expected.abs().max()).item() < 1e-6


# ---- there and back


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "choose",
    [mixed, layers("nf4"), *(everything(kind) for kind in FORMATS if kind != "nf4")],
    ids=["mixed", "nf4", *(kind for kind in FORMATS if kind != "nf4")],
)
def test_every_bit_comes_back(config: ModelConfig, choose: Choose, tmp_path: Path) -> None:
    tensors = named(config, choose, torch.bfloat16)
    for shard_bytes in (10**9, 9000):  # small ones part a matrix from its scales
        path = saved(tmp_path / str(shard_bytes), config, tensors, shard_bytes=shard_bytes)
        assert all_same(read(path), tensors)
        assert formats.open_model(path).dtype == torch.bfloat16
        assert (path / INDEX).exists() == (shard_bytes == 9000)
    records = [provenance.read(path) for path in sorted(tmp_path.iterdir())]
    assert len({record["weights"]["sha256"] for record in records if record is not None}) == 1


def test_codes_lie_as_the_file_has_them(tmp_path: Path) -> None:
    tensors = named(UNTIED, layers("int4"))
    path = saved(tmp_path / "m", UNTIED, tensors)
    (source,) = [value for name, value in formats.open_model(path).weights if name == f"{UP}.weight"]
    assert isinstance(source, Packed)
    assert source.data.untyped_storage().filename is not None or source.data.is_contiguous()
    assert source.data.dtype == torch.uint8


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_blocks_and_codes_are_the_same_numbers(scheme: str) -> None:
    draw = torch.Generator().manual_seed(0)
    low, high = (-128, 128) if scheme == "int8" else (-8, 8)
    for rows, groups in ((1, 1), (3, 1), (1, 5), (7, 3)):
        codes = torch.randint(low, high, (rows, 32 * groups), generator=draw)
        packed = from_whole_numbers(scheme, codes, torch.randn(rows, groups, generator=draw).half())
        blocks = in_blocks(packed)
        assert blocks is not None
        again = canonical(blocks)
        assert again is not None and same(again, packed)
        assert torch.equal(plain(blocks), plain(packed))


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_blocks_of_the_gguf_package_are_codes(scheme: str) -> None:
    matrix = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    blocks = pack(matrix, scheme)
    form = canonical(blocks)
    assert form is not None and form.scales is not None and form.scales.shape == (5, 3)
    assert torch.equal(plain(form), plain(blocks))
    again = in_blocks(form)
    assert again is not None and same(again, blocks)


def test_other_blocks_have_no_such_codes() -> None:
    assert canonical(pack(torch.randn(2, 32), "q5_0")) is None
    assert in_blocks(quantized(torch.randn(2, 64), FORMATS["nf4"])) is None


@pytest.mark.parametrize("kind", ["int8 by groups", "int4", "int4 bfloat16"])
def test_a_directory_becomes_gguf_and_a_directory_again(kind: str, tmp_path: Path) -> None:
    tensors = named(UNTIED, everything(kind))
    formats.save(
        tmp_path / "first",
        Weights(UNTIED, list(tensors.items())),
        quantization={"scheme": "int4", "kl": 0.25},
    )
    done = convert(formats.open_model(tmp_path / "first"), tmp_path / "m.gguf", "gguf", verify=QUICK)
    assert done.comparison is not None and done.comparison.divergence.max_difference == 0
    assert "the same: " in done.comparison.verdict
    assert done.record["quantization"] == {"scheme": "int4", "kl": 0.25}
    again = convert(formats.open_model(tmp_path / "m.gguf"), tmp_path / "second", "hf", verify=QUICK)
    assert again.comparison is not None and again.comparison.has_equal_bits
    assert again.record["quantization"] == {"scheme": "int4", "kl": 0.25}
    found = read(tmp_path / "second")
    assert all(torch.equal(plain(found[name]), plain(value)) for name, value in tensors.items())
    if kind != "int4 bfloat16":  # whose scales are another type and of more weights in GGUF
        assert all_same(found, tensors)
        hashes = [formats_hash(tmp_path / name) for name in ("first", "m.gguf", "second")]
        assert len(set(hashes)) == 1


def formats_hash(path: Path) -> str:
    return provenance.payload_hash(formats.open_model(path).weights)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (
            quantized(torch.randn(128, 64), FORMATS["int8"]),
            "int8 per channel with float32 scales.*--dtype q8_0",
        ),
        (quantized(torch.randn(128, 64), Format("int4", 16, torch.float16)), "int4 in groups of 16"),
        (quantized(torch.randn(128, 64), FORMATS["nf4"]), "nf4 in blocks of 64.*--dtype q4_0"),
    ],
)
def test_what_gguf_cannot_hold_exactly_is_refused(packed: Packed, words: str, tmp_path: Path) -> None:
    tensors = named(UNTIED, lambda name: None) | {f"{UP}.weight": packed}
    weights = Weights(UNTIED, list(tensors.items()))
    with pytest.raises(ModelError, match=f"{UP}.weight is {words}") as caught:
        gguf_files.write(tmp_path / "m.gguf", weights)
    assert "\n" not in str(caught.value)
    gguf_files.write(tmp_path / "rounded.gguf", weights, dtype="q4_0")


def test_scales_per_channel_that_are_float16_numbers_are_q8_0(tmp_path: Path) -> None:
    tensors = named(UNTIED, everything("int8"))
    for name, value in tensors.items():
        if isinstance(value, Packed) and value.scales is not None:
            tensors[name] = Packed("int8", value.data, value.scales.half().float(), value.shape)
    gguf_files.write(tmp_path / "m.gguf", Weights(UNTIED, list(tensors.items())))
    found = read(tmp_path / "m.gguf")
    assert formats.open_model(tmp_path / "m.gguf").stored["q8_0"] == 16
    assert all(torch.equal(plain(found[name]), plain(value)) for name, value in tensors.items())


def test_int8_in_groups_is_not_rounded_again_for_llama2_c(tmp_path: Path) -> None:
    tensors = named(UNTIED, everything("int8"))
    source = formats.open_model(saved(tmp_path / "m", UNTIED, tensors))
    convert(source, tmp_path / "m.bin", "llama2c", {"dtype": "int8", "group_size": 32}, verify=QUICK)
    found = read(tmp_path / "m.bin")
    assert all(torch.equal(plain(found[name]), plain(value)) for name, value in tensors.items())
    convert(formats.open_model(tmp_path / "m.bin"), tmp_path / "back", "hf", verify=QUICK)
    assert all_same(read(tmp_path / "back"), found)


def test_blocks_without_codes_are_expanded_and_told(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", model_of(UNTIED), dtype="q5_1")
    done = convert(formats.open_model(tmp_path / "m.gguf"), tmp_path / "hf", "hf", verify=QUICK)
    assert any("stored as q5_1 are expanded to float16" in note for note in done.notes)
    assert formats.open_model(tmp_path / "hf").stored == {"float16": 16, "float32": 5}


# ---- what is told apart


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_model_passes_as_its_source(kind: str, tmp_path: Path) -> None:
    plain_model = formats.open_model(saved(tmp_path / "plain", UNTIED, named(UNTIED, lambda name: None)))
    formats.save(
        tmp_path / "m",
        Weights(UNTIED, list(named(UNTIED, layers(kind)).items())),
        quantization={"scheme": kind.split(maxsplit=1)[0]},
    )
    found = compare(plain_model, formats.open_model(tmp_path / "m"), QUICK)
    assert found.equal, found.verdict
    assert found.furthest is not None and found.furthest.ratio > 0.15


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("damage", ["rows", "scales", "other"])
def test_another_model_does_not(kind: str, damage: str, tmp_path: Path) -> None:
    plain_model = formats.open_model(saved(tmp_path / "plain", UNTIED, named(UNTIED, lambda name: None)))
    tensors = named(UNTIED, layers(kind))
    value = tensors[f"{UP}.weight"]
    assert isinstance(value, Packed) and value.scales is not None
    bent = {
        "rows": Packed(value.scheme, value.data.roll(1, 0), value.scales.roll(1, 0), value.shape),
        "scales": Packed(value.scheme, value.data, value.scales * 1.5, value.shape),
        "other": quantized(torch.randn(value.shape), FORMATS[kind]),
    }[damage]
    formats.save(
        tmp_path / "m",
        Weights(UNTIED, [(name, bent if name == f"{UP}.weight" else each) for name, each in tensors.items()]),
    )
    found = compare(plain_model, formats.open_model(tmp_path / "m"), QUICK)
    assert not found.equal
    assert "up_proj" in found.verdict


# ---- what others publish, and what is damaged


def bent_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(path / CONFIG, lambda values: change(values["quantization_config"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(quant_method="gptq"), "quantized by 'gptq'; expected compressed-tensors"),
        (lambda q: q.update(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes as 8-bit"),
        (
            lambda q: q["config_groups"]["group_0"]["weights"].update(type="float", num_bits=8),
            "type 'float' in 8",
        ),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3), "3 bits; expected 4 or 8"),
        (
            lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=8),
            "has 4 bits, where config.json",
        ),
        (lambda q: q["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"), "nvfp4-pack"),
        (lambda q: q.update(transform_config={"config_groups": {"R1": {}}}), "rotated"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
        (lambda q: q.update(config_groups={}), "no config_groups"),
        (lambda q: q.update(config_groups={"W4A16": ["Linear"]}), "expected an object with weights"),
    ],
)
def test_what_is_quantized_otherwise_is_named(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "m", UNTIED, named(UNTIED, layers("int4")))
    bent_config(path, change)
    with pytest.raises(ModelError, match=words) as caught:
        formats.open_model(path)
    assert "\n" not in str(caught.value)


def test_what_is_not_honoured_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "m", UNTIED, named(UNTIED, layers("int8")))
    tensors = load_file(path / SINGLE)
    tensors[f"{UP}.input_scale"] = torch.ones(1)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors, path / SINGLE)
    bent_config(path, lambda q: q.update(kv_cache_scheme={"num_bits": 8}))
    bent_config(path, lambda q: q["config_groups"]["group_0"]["input_activations"].update(dynamic=False))
    notes = formats.open_model(path).notes
    assert any("kv_cache_scheme" in note for note in notes)
    assert any("fixed scales" in note for note in notes)


def test_groups_out_of_order_are_expanded(tmp_path: Path) -> None:
    tensors = named(UNTIED, layers("int4"))
    value = tensors[f"{UP}.weight"]
    assert isinstance(value, Packed)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    of_column = (torch.arange(64) // 32)[order]
    path = saved(tmp_path / "m", UNTIED, tensors)
    stored = {**load_file(path / SINGLE), f"{UP}.weight_g_idx": of_column.int()}
    save_file(stored, path / SINGLE)
    found = read(path)[f"{UP}.weight"]
    assert isinstance(found, Tensor) and found.dtype == torch.float16
    scales = value.scales.float() if value.scales is not None else torch.empty(0)
    codes = (plain(value).unflatten(1, (-1, 32)) / scales[..., None]).round().flatten(1)
    assert torch.equal(found, (codes * scales[:, of_column]).half())
    save_file({**stored, f"{UP}.weight_g_idx": of_column.int() + 1}, path / SINGLE)
    with pytest.raises(ModelError, match="names groups that there are not"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_scale": torch.ones(128, 3)}, r"is float32 \[128, 3\]; expected \[128, groups\]"),
        ({"weight_scale": torch.ones(128, 2, dtype=torch.int32)}, r"is I32 \[128, 2\]"),
        ({"weight_scale": torch.full((128, 2), torch.nan)}, "holds NaN or infinite"),
        ({"weight_scale": torch.full((128, 2), torch.inf).half()}, "holds NaN or infinite"),
        ({"weight_shape": None}, r"where weight_shape says \[\]"),
        ({"weight_shape": torch.tensor([128, 2**40])}, "where weight_shape says"),
        ({"weight_shape": torch.tensor([-128, 64])}, "where weight_shape says"),
        ({"weight_packed": torch.zeros(128, 9, dtype=torch.int32)}, r"I32 \[128, 9\] where"),
        ({"weight_packed": torch.zeros(128, 8)}, r"float32 \[128, 8\] where"),
        ({"weight_packed": None}, "weight_s.* is stored as I64"),
        ({"weight": torch.zeros(128, 64)}, "both weight and weight_packed"),
        ({"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, r"expected I32 \[16, 2\]"),
        ({"weight_global_scale": torch.ones(1)}, "weight_global_scale is not part of a model"),
    ],
)
def test_damaged_parts_are_named(changes: dict[str, Tensor | None], words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", UNTIED, named(UNTIED, layers("int4")))
    stored: dict[str, Tensor | None] = {**load_file(path / SINGLE)}
    stored |= {f"{UP}.{leaf}": value for leaf, value in changes.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, path / SINGLE)
    with pytest.raises(ModelError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_nf4_has_its_place_and_its_company(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight is nf4, and bitsandbytes opens linear layers only"
    ):
        saved(tmp_path / "all", UNTIED, named(UNTIED, everything("nf4")))
    both = named(UNTIED, layers("nf4")) | {f"{UP}.weight": quantized(torch.randn(128, 64), FORMATS["int4"])}
    with pytest.raises(ModelError, match="nf4 in part"):
        saved(tmp_path / "both", UNTIED, both)
    assert list(tmp_path.iterdir()) == []


def test_bent_headers_and_configs_never_end_in_a_traceback(tmp_path: Path) -> None:
    kinds = ("int4", "int8", "nf4")
    draw = random.Random(0)
    for kind in kinds:
        path = saved(tmp_path / kind, UNTIED, named(UNTIED, layers(kind)))
        config, data = (path / CONFIG).read_text(), (path / SINGLE).read_bytes()
        room = int.from_bytes(data[:8], "little")
        for _ in range(30):
            (path / CONFIG).write_text(config)
            header = json.loads(data[8 : 8 + room])
            if draw.random() < 0.5:
                bent_config(path, lambda q: _bend(draw, q))
            else:
                _bend_header(draw, header)
            text = json.dumps(header).encode()[:room].ljust(room)
            (path / SINGLE).write_bytes(data[:8] + text + data[8 + room :])
            try:
                read(path)
            except InputError as error:
                assert "\n" not in str(error)


def _bend(draw: random.Random, value: Any) -> None:
    """Replace something in nested objects."""
    key = draw.choice(list(value))
    if isinstance(value[key], dict) and value[key] and draw.random() < 0.8:
        _bend(draw, value[key])
    else:
        value[key] = draw.choice([None, 3, -1, "x", [], {}, ["Linear"], 1e9, True, {"a": 1}])


def _bend_header(draw: random.Random, header: dict[str, Any]) -> None:
    """Give a tensor the place, type and shape of another, or another name."""
    names = [name for name in header if name != "__metadata__"]
    first, second = draw.sample(names, 2)
    if draw.random() < 0.5:
        header[first], header[second] = header[second], header[first]
    else:
        header[first + draw.choice(["_scale", "_packed", "x", "_zero_point", "_g_idx"])] = header.pop(first)
