"""The tokenizer beside a model file: found, preferred, or a choice left to the user."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from puna import formats
from puna.errors import TokenizerError
from puna.tokenizer.reading import load


@pytest.fixture
def stories(assets: Path) -> Path:
    return assets / "weights" / "stories260K"


def beside(tmp_path: Path, stories: Path, *names: str) -> Path:
    """The model, with its tokenizer under several names."""
    shutil.copy(stories / "stories260K.bin", tmp_path / "model.bin")
    for name in names:
        shutil.copy(stories / f"tok512{Path(name).suffix}", tmp_path / name)
    return tmp_path / "model.bin"


@pytest.mark.parametrize(
    "names",
    [
        ("tok512.model", "tok512.bin"),
        ("tok512.bin",),
        ("tokenizer.bin",),
        ("tokenizer.model", "tok512.bin"),
        ("tok512.model", "tok.model"),
        ("model.model",),
    ],
)
def test_the_tokenizer_beside_is_found(tmp_path: Path, stories: Path, names: tuple[str, ...]) -> None:
    found = formats.open_model(beside(tmp_path, stories, *names)).tokenizer()
    assert found is not None
    assert found.fingerprint == load(stories / "tok512.model").fingerprint


def test_without_a_tokenizer_the_model_opens(tmp_path: Path, stories: Path) -> None:
    path = beside(tmp_path, stories)
    shutil.copy(path, tmp_path / "tok-is-a-model.bin")
    assert formats.open_model(path).tokenizer() is None


def test_a_tokenizer_that_is_too_large_is_not_the_models(tmp_path: Path, stories: Path, assets: Path) -> None:
    path = beside(tmp_path, stories)
    shutil.copy(assets / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    assert formats.open_model(path).tokenizer() is None
    shutil.copy(stories / "tok512.bin", tmp_path)
    found = formats.open_model(path).tokenizer()
    assert found is not None and found.vocab_size == 512


def test_of_several_tokenizers_the_user_chooses(tmp_path: Path, stories: Path) -> None:
    path = beside(tmp_path, stories, "tok512.model")
    data = (stories / "tok512.model").read_bytes()
    (tmp_path / "tok-other.model").write_bytes(data.replace("▁the".encode(), "▁thx".encode()))
    with pytest.raises(TokenizerError, match=r"several.*tok-other\.model, tok512\.model.*--tokenizer"):
        formats.open_model(path).tokenizer()
    (tmp_path / "tok-other.model").rename(tmp_path / "model.model")
    found = formats.open_model(path).tokenizer()
    assert found is not None and "▁thx" in [found.piece(index) for index in range(512)]


def test_a_directory_of_the_models_name_is_not_a_tokenizer_of_its_name(tmp_path: Path, stories: Path) -> None:
    home = tmp_path / "model"
    home.mkdir()
    path = beside(home, stories, "model.model")
    data = (stories / "tok512.model").read_bytes()
    (home / "tokenizer.model").write_bytes(data.replace("▁the".encode(), "▁thx".encode()))
    found = formats.open_model(path).tokenizer()
    assert found is not None and found.fingerprint == load(stories / "tok512.model").fingerprint


def test_a_damaged_tokenizer_is_told_when_it_is_opened(tmp_path: Path, stories: Path) -> None:
    path = beside(tmp_path, stories, "tok512.bin")
    (tmp_path / "tok512.bin").write_bytes((tmp_path / "tok512.bin").read_bytes()[:-1])
    source = formats.open_model(path)
    assert len(list(source.weights)) == 47
    with pytest.raises(TokenizerError, match="token 511 is damaged"):
        source.tokenizer()
