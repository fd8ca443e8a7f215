"""A model over Meta's model-parallel ranks: which matrix is cut which way, put together and cut again.

    D width   V vocabulary   K key/value heads   H head width   R ranks

Every rank's file has every name. Matrices that project into heads, into the feed-forward layer or into the
vocabulary are cut by rows (dimension 0), those that project back by columns (dimension 1), and norms are the
same in all. The embedding (V, D) is cut by columns up to Llama 2, by rows since Llama 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from puna.errors import ModelError, nearest
from puna.formats.archives.torch_archive import read_tensors
from puna.formats.meta.names import DERIVED, from_meta, to_meta
from puna.formats.meta.params import Told
from puna.formats.rotary import half_split
from puna.formats.tensor_files import listed
from puna.model.config import ModelConfig

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
_COLUMNS = ("wo", "w2")
_USUAL = ("layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight")


def cut(name: str, embedding: int) -> int | None:
    """The dimension by which a tensor, by Meta's name, is cut; None where every rank holds the whole.

    `embedding` is the dimension for the embedding.
    """
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind == "tok_embeddings":
        return embedding
    return 0 if kind in _ROWS else 1 if kind in _COLUMNS else None


class Ranks:
    """The opened files of all ranks, in order, under Meta's names."""

    def __init__(self, files: Sequence[Path], width: int) -> None:
        """`width` is D, by which it is told how the embedding is cut.

        Raises:
            ModelError: a file is damaged, or the files are not the ranks of one model.
        """
        self.files = files
        self._ranks = [_tensors(file) for file in files]
        for file, rank in zip(files, self._ranks, strict=True):
            self._check(file, rank)
        self._embedding = 0 if self._ranks[0][EMBEDDING].shape[1] == width else 1

    @property
    def names(self) -> list[str]:
        """Every name."""
        return list(self._ranks[0])

    def pieces(self, name: str) -> list[Tensor]:
        """What the ranks hold of one tensor."""
        return [rank[name] for rank in self._ranks]

    def dimension(self, name: str) -> int | None:
        """The dimension by which one tensor is cut."""
        return cut(name, self._embedding)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor put together."""
        shape, dimension = list(self._ranks[0][name].shape), self.dimension(name)
        if dimension is not None and dimension < len(shape):
            shape[dimension] *= len(self._ranks)
        return tuple(shape)

    def told(self) -> Told:
        """What the config takes from the tensors."""
        return Told(
            vocabulary=self._size(EMBEDDING, 0),
            feed_forward=self._size("layers.0.feed_forward.w1.weight", 0),
            query_rows=self._size("layers.0.attention.wq.weight", 0),
            tied=HEAD not in self._ranks[0] or self._is_tied(),
        )

    def _size(self, name: str, dimension: int) -> int:
        if name not in self._ranks[0] or not self._ranks[0][name].dim():
            raise ModelError(f"{self.files[0]}: it has no matrix {name}, which every Llama has")
        return self.shape(name)[dimension]

    def _check(self, file: Path, rank: Mapping[str, Tensor]) -> None:
        first = self._ranks[0]
        if rank.keys() != first.keys():
            odd = sorted(rank.keys() ^ first.keys())
            raise ModelError(f"{file}: {listed(odd)} in only one of {self.files[0].name} and {file.name}")
        for name, tensor in rank.items():
            if tensor.shape != first[name].shape or tensor.dtype != first[name].dtype:
                raise ModelError(
                    f"{file}: {name} is {_described(tensor)}, but {_described(first[name])} in "
                    f"{self.files[0].name}; the files are of different models"
                )

    def _is_tied(self) -> bool:
        """Whether output projection and embedding are equal; compared where they overlap, without a copy."""
        if self.shape(HEAD) != self.shape(EMBEDDING):
            return False
        rows, columns = self._ranks[0][HEAD].shape[0], self._ranks[0][EMBEDDING].shape[1]
        if self._embedding == 0:
            return all(map(torch.equal, self.pieces(HEAD), self.pieces(EMBEDDING)))
        return all(
            torch.equal(head[:, j * columns : (j + 1) * columns], embedding[i * rows : (i + 1) * rows])
            for i, head in enumerate(self.pieces(HEAD))
            for j, embedding in enumerate(self.pieces(EMBEDDING))
        )


class WholeTensors:
    """The tensors of all ranks put together, under the names and in the layout of `Weights`."""

    def __init__(self, ranks: Ranks, config: ModelConfig) -> None:
        self._ranks, self._config = ranks, config

    def entries(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, type and shape of every tensor, but for an output projection that is the embedding."""
        for name in self._ranks.names:
            if name == HEAD and self._config.tie_word_embeddings:
                continue
            shape, copies = self._ranks.shape(name), self._copies(name)
            kind = str(self._ranks.pieces(name)[0].dtype).removeprefix("torch.")
            yield _ours(name), kind, (shape[0] // copies, *shape[1:]) if copies > 1 else shape

    def tensor(self, name: str) -> Tensor:
        """One tensor whole; a view of the mapped file where one rank holds all of it and no rows move."""
        meta = to_meta(name)
        pieces, copies = self._ranks.pieces(meta), self._copies(meta)
        dimension = self._ranks.dimension(meta)
        step = len(pieces) if dimension is None else copies
        for at in range(0, len(pieces), step):
            self._check_equal(meta, pieces[at : at + step])
        kept = pieces[::step]
        whole = kept[0] if len(kept) == 1 else torch.cat(kept, dim=dimension or 0)
        moved = half_split(name, whole, self._config)
        assert isinstance(moved, Tensor)
        return moved

    def _copies(self, name: str) -> int:
        """How many neighbouring ranks hold the same heads, where there are fewer heads than ranks."""
        kind = name.split(".")[-2]
        rows, wanted = self._ranks.shape(name)[:1], self._config.num_key_value_heads * self._config.head_dim
        ranks = len(self._ranks.files)
        if kind not in ("wk", "wv") or not rows or rows[0] % wanted or ranks % max(1, rows[0] // wanted):
            return 1
        return max(1, rows[0] // wanted)

    def _check_equal(self, name: str, pieces: Sequence[Tensor]) -> None:
        if not all(torch.equal(pieces[0], piece) for piece in pieces[1:]):
            raise ModelError(
                f"{self._ranks.files[0].parent}: {name} differs between files that must hold the same; "
                "a file is damaged or of another model"
            )


def _tensors(file: Path) -> dict[str, Tensor]:
    found = {name: t for name, t in read_tensors(file).tensors.items() if name not in DERIVED}
    unknown = [name for name in found if from_meta(name) is None]
    if unknown:
        hint = nearest(unknown[0][:200], (*_USUAL, EMBEDDING, HEAD))
        raise ModelError(f"{file}: {listed(unknown)} not part of Meta's Llama.{hint}")
    if EMBEDDING not in found or found[EMBEDDING].dim() != 2:
        raise ModelError(f"{file}: it has no matrix {EMBEDDING}, which every Llama has")
    return found


def _ours(name: str) -> str:
    found = from_meta(name)
    assert found is not None
    return found


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
