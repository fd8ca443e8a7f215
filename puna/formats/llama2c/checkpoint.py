"""llama2.c's training checkpoint, ckpt.pt: a torch archive with the weights and the model's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.errors import ModelError, SettingsError
from puna.formats import rotary
from puna.formats.archives.torch_archive import TensorDictionary, read_archive
from puna.formats.archives.torch_writer import TorchWriter
from puna.formats.casting import stored
from puna.formats.content import Record
from puna.formats.llama2c.layout import EPS, THETA
from puna.formats.meta.names import DERIVED, from_meta, to_meta
from puna.formats.tensor_files import TensorFiles, shown
from puna.model.config import ModelConfig
from puna.model.weights import Packed, Weights
from puna.settings import parse

_COMPILED = "_orig_mod."  # what torch.compile puts before every name
_EMBEDDING, _HEAD, _GATE = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.0.mlp.gate_proj.weight",
)
_ARGUMENTS = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "norm_eps")
_CONTEXT = 2048  # of llama2.c's ModelArgs, where a file leaves it out
_TIES = "llama2.c's own model.py ties the output projection to the embedding, which this model does not"


class CheckpointTensors:
    """The tensors of a checkpoint, checked against its arguments, in the layout of `Weights`.

    Raises:
        ModelError: it is no such archive, or what it holds does not fit together.
    """

    def __init__(self, path: Path) -> None:
        config = _config(_Checkpoint(path), str(path))
        self._files = TensorFiles([path], config, path, _opened, by="model_args")

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._files.config

    @property
    def files(self) -> TensorFiles:
        """The tensors as they are stored."""
        return self._files

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        for name, tensor in self._files:
            yield name, rotary.half_split(name, tensor, self.config)


def write(target: Path, weights: Weights, record: Record) -> list[str]:
    """Write a checkpoint in float32 that llama2.c's export.py and train.py open; returns notes for the user.

    Raises:
        ModelError: the weights cannot be stored.
        OSError: as it comes; the file is then incomplete.
    """
    config = weights.config
    model: dict[str, Any] = {}
    with TorchWriter(target) as archive:
        for name, value in stored(weights, lambda name, shape: "float32"):
            assert isinstance(value, Tensor)
            record(name, value)
            moved = rotary.interleaved(name, value, config)
            assert isinstance(moved, Tensor)
            model[to_meta(name)] = archive.add(moved)
        if config.tie_word_embeddings:
            model[to_meta(_HEAD)] = model[to_meta(_EMBEDDING)]
        archive.finish({"model": model, "model_args": _arguments(config), "iter_num": 0, "config": {}})
    return [] if config.tie_word_embeddings else [_TIES]


class _Checkpoint:
    """An open archive, its tensors by the names of `Weights`."""

    def __init__(self, path: Path) -> None:
        value = read_archive(path)
        found = value.get("model") if isinstance(value, dict) else None
        arguments = value.get("model_args") if isinstance(value, dict) else None
        if not isinstance(found, dict) or not isinstance(arguments, dict):
            raise ModelError(
                f"{path}: expected 'model' and 'model_args', as in llama2.c's ckpt.pt; of other torch files, "
                "name the directory they lie in"
            )
        self.arguments: dict[Any, Any] = arguments
        self.tensors: dict[str, Tensor] = {}
        for key, tensor in found.items():
            name = str(key).removeprefix(_COMPILED)
            if name not in DERIVED:
                self._add(from_meta(name) or name, tensor, path)

    def _add(self, name: str, tensor: Any, path: Path) -> None:
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{path}: {shown(name)} in 'model' is no tensor but {type(tensor).__name__}")
        if name in self.tensors:
            raise ModelError(f"{path}: {shown(name)} is twice in 'model', as itself and compiled")
        self.tensors[name] = tensor


@contextmanager
def _opened(path: Path) -> Iterator[TensorDictionary]:
    yield TensorDictionary(_Checkpoint(path).tensors)


def _config(file: _Checkpoint, origin: str) -> ModelConfig:
    """The config by the arguments; by the tensors where older versions of llama2.c did not say."""
    given = {key: value for key, value in file.arguments.items() if value is not None}
    strange = next((k for k, v in given.items() if k in _ARGUMENTS and not isinstance(v, int | float)), None)
    if strange is not None:
        kind = type(given[strange]).__name__
        raise ModelError(f"{origin}: model_args: expected a number in {strange!r}, found {kind}")
    gate = file.tensors.get(_GATE)
    values = {
        "vocab_size": given.get("vocab_size"),
        "hidden_size": given.get("dim"),
        "intermediate_size": None if gate is None else gate.shape[0],
        "num_hidden_layers": given.get("n_layers"),
        "num_attention_heads": given.get("n_heads"),
        "num_key_value_heads": given.get("n_kv_heads"),
        "max_position_embeddings": given.get("max_seq_len", _CONTEXT),
        "rms_norm_eps": given.get("norm_eps", EPS),
        "rope_theta": THETA,
        # Where the archive holds an output projection that differs, the tensors win.
        "tie_word_embeddings": True,
    }
    missing = [name for name, value in values.items() if value is None and name != "num_key_value_heads"]
    if missing:
        raise ModelError(f"{origin}: {', '.join(missing)} cannot be told from 'model_args' and the tensors")
    try:
        return parse(ModelConfig, values, f"{origin}: model_args")
    except SettingsError as error:
        raise ModelError(str(error)) from None


def _arguments(config: ModelConfig) -> dict[str, Any]:
    """ModelArgs of llama2.c."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "hidden_dim": config.intermediate_size,
        "multiple_of": 1,
        "norm_eps": config.rms_norm_eps,
        "max_seq_len": config.max_position_embeddings,
        "dropout": 0.0,
    }
