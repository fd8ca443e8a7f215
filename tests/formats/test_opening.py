"""What a path holds, and what stands for a model: a run, a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from puna import formats
from puna.errors import ModelError


@pytest.mark.parametrize("name", ["missing", "empty", "file", "texts", "run", "no weights"])
def test_what_is_not_a_model_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("four")
    (tmp_path / "texts").mkdir()
    for letter in "abcdef":
        (tmp_path / "texts" / f"{letter}.txt").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text("")
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights" / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, '
        '"num_hidden_layers": 1, "num_attention_heads": 2}'
    )
    expected = {
        "missing": "is not a model: found nothing there, expected a directory with config.json",
        "empty": "found an empty directory",
        "file": "found a file of 4 bytes",
        "texts": "found a directory with a.txt, b.txt, c.txt, d.txt and 2 more",
        "run": "is a run without a model so far",
        "no weights": "holds config.json but no weights; expected model.safetensors",
    }
    with pytest.raises(ModelError, match=expected[name]) as caught:
        formats.open_model(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_run_stands_for_its_export(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text("")
    saved.rename(run / ".model.replaced")  # killed between the two renames of a replacement
    assert formats.open_model(run).path == run / ".model.replaced"
    (run / ".model.replaced").rename(run / "model")
    source = formats.open_model(str(run))
    assert (source.path, source.format) == (run / "model", "hf")


class Hub:
    """Stands in for the hub's download: raises online, and answers or raises from its cache."""

    def __init__(self, online: Exception | str, cached: Exception | str = "") -> None:
        self.online, self.cached, self.asked = online, cached, []

    def __call__(self, repository: str, *, local_files_only: bool = False, **wanted: Any) -> str:
        self.asked.append((repository, local_files_only))
        answer = self.cached if local_files_only else self.online
        if isinstance(answer, Exception):
            raise answer
        return answer


def refused(kind: type[errors.HfHubHTTPError]) -> Exception:
    """An error of the hub without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error\nlong advice",)
    return error


def test_a_path_that_exists_is_itself(tmp_path: Path) -> None:
    hub = Hub("never")
    assert formats.resolve(tmp_path, hub) == tmp_path
    assert formats.resolve(str(tmp_path), hub) == tmp_path
    assert not hub.asked


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "./x", "a b/c", "/nowhere/none", "owner/", Path("owner/name")]
)
def test_what_is_no_id_is_not_asked_for(name: str | Path) -> None:
    hub = Hub("never")
    with pytest.raises(ModelError, match="no such file or directory, and not a hub id"):
        formats.resolve(name, hub)
    assert not hub.asked


def test_a_missing_path_in_a_directory_here_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="no such file or directory"):
        formats.resolve("runs/demo", Hub("never"))


def test_an_id_is_downloaded(tmp_path: Path) -> None:
    hub = Hub(str(tmp_path))
    assert formats.resolve("owner/name-1.1", hub) == tmp_path
    assert hub.asked == [("owner/name-1.1", False)]


def test_offline_the_cached_copy_serves(tmp_path: Path) -> None:
    for failure in (
        errors.LocalEntryNotFoundError("offline"),
        OSError("no route"),
        errors.OfflineModeIsEnabled("x"),
    ):
        assert formats.resolve("owner/name", Hub(failure, str(tmp_path))) == tmp_path


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (
            Hub(OSError("no route\nto host"), errors.LocalEntryNotFoundError("x")),
            "no route.*connect to the network",
        ),
        (Hub(refused(errors.RepositoryNotFoundError)), "no such model on the hub"),
        (Hub(refused(errors.GatedRepoError)), "grants access on request"),
        (Hub(OSError(28, "No space left")), "disk is full"),
    ],
)
def test_a_hub_that_does_not_give_is_one_line(hub: Hub, message: str) -> None:
    from puna.errors import InputError

    with pytest.raises(InputError, match=message) as caught:
        formats.resolve("owner/name", hub)
    assert "\n" not in str(caught.value)
