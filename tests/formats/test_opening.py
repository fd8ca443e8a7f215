"""What a path holds, and what stands for a model: a run, a hub id."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors

from puna import formats
from puna.errors import ModelError, SettingsError
from puna.formats.convert import convert
from puna.model.llama import Llama
from puna.model.weights import weights_of


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_part_stands_for_its_directory(name: str, saved: Path) -> None:
    assert formats.open_model(saved / name).path == saved


def test_a_run_stands_for_its_export(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text("")
    saved.rename(run / ".model.replaced")  # killed between the two renames of a replacement
    assert formats.open_model(run).path == run / ".model.replaced"
    (run / ".model.replaced").rename(run / "model")
    source = formats.open_model(str(run))
    assert (source.path, source.format) == (run / "model", "hf")


def test_a_directory_with_one_model_file_stands_for_it(model: Llama, tmp_path: Path) -> None:
    convert(source_of(model, tmp_path / "hf"), tmp_path / "one" / "m.gguf", "gguf", verify=None)
    assert formats.open_model(tmp_path / "one").path == tmp_path / "one" / "m.gguf"
    (tmp_path / "one" / "n.gguf").write_bytes((tmp_path / "one" / "m.gguf").read_bytes())
    with pytest.raises(ModelError, match=r"holds several models; name one of m.gguf, n.gguf"):
        formats.open_model(tmp_path / "one")


def source_of(model: Llama, directory: Path) -> formats.Source:
    formats.save(directory, weights_of(model))
    return formats.open_model(directory)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="neither file nor directory"):
        formats.open_model(tmp_path / "pipe")


def test_what_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)  # a directory above may not be searched
    with pytest.raises(ModelError, match="cannot be read: Permission denied"):
        formats.open_model(tmp_path / "m")


class Hub:
    """Stands in for the hub: raises online, and answers or raises from its cache."""

    def __init__(
        self, online: Exception | str, cached: Exception | str = "", files: Sequence[str] = ()
    ) -> None:
        self.online, self.cached, self.asked = online, cached, []
        self.held = list(files) or ["config.json", "model.safetensors"]

    def files(self, repository: str, revision: str | None) -> list[str]:
        if isinstance(self.online, Exception):
            raise self.online
        return self.held

    def download(
        self,
        repository: str,
        wanted: Sequence[str],
        *,
        revision: str | None,
        cache_dir: object,
        local_files_only: bool,
    ) -> str:
        self.asked.append((repository, revision, cache_dir, local_files_only))
        self.wanted = list(wanted)
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
    assert formats.resolve(tmp_path, hub=hub) == tmp_path
    assert formats.resolve(str(tmp_path), hub=hub) == tmp_path
    assert not hub.asked


@pytest.mark.parametrize(
    "name", ["nowhere", "./x", "a/../c", "a b/c", "/nowhere/none", "owner/", Path("owner/name")]
)
def test_what_is_no_id_is_not_asked_for(name: str | Path) -> None:
    hub = Hub("never")
    with pytest.raises(ModelError, match="no such file or directory, and not a hub id"):
        formats.resolve(name, hub=hub)
    assert not hub.asked


def test_a_missing_path_in_a_directory_here_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="no such file or directory"):
        formats.resolve("runs/demo", hub=Hub("never"))


def test_an_id_is_downloaded(tmp_path: Path) -> None:
    hub = Hub(str(tmp_path))
    assert formats.resolve("owner/name-1.1", revision="v2", cache_dir="there", hub=hub) == tmp_path
    assert hub.asked == [("owner/name-1.1", "v2", "there", False)]


def test_a_path_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is a path here, which has no revision 'v2'"):
        formats.resolve(str(tmp_path), revision="v2", hub=Hub("never"))


HF = ["config.json", "tokenizer.json"]
META = ["original/params.json", "original/consolidated.00.pth"]
SPLIT = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
GGUF = ["README.md", "m-q4_0.gguf", "m-q8_0.gguf"]


@pytest.mark.parametrize(
    ("name", "files", "opened", "taken", "left"),
    [
        ("o/n", [*HF, "m.safetensors", "pytorch_model.bin"], "", "m.safetensors", "pytorch_model.bin"),
        ("o/n", [*HF, "a.safetensors", META[0], "x/a.safetensors"], "", HF[1], "x/a.safetensors"),
        ("o/n", [*HF, "pytorch_model-1.bin", "x.msgpack"], "", "pytorch_model-1.bin", "x.msgpack"),
        ("o/n/original", [*HF, "model.safetensors", *META], "original", META[1], "model.safetensors"),
        ("o/n", ["params.json", "consolidated.00.pth", "x.md"], "", "consolidated.00.pth", "x.md"),
        ("o/n/m-q8_0.gguf", GGUF, "m-q8_0.gguf", "m-q8_0.gguf", "m-q4_0.gguf"),
        ("o/n", ["a.md", *SPLIT], SPLIT[0], SPLIT[1], "a.md"),
        ("o/n/sub/m.bin", ["sub/m.bin", "sub/o.bin", "sub/tok.bin"], "sub/m.bin", "sub/tok.bin", "sub/o.bin"),
        ("o/n", ["stories260K.bin", "tok512.bin", "x.md"], "stories260K.bin", "tok512.bin", "x.md"),
    ],
)  # fmt: skip
def test_one_form_of_the_model_is_taken(
    name: str, files: list[str], opened: str, taken: str, left: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    online = Hub(str(tmp_path), files=files)
    assert formats.resolve(name, hub=online) == tmp_path / opened
    assert taken in online.wanted
    assert left not in online.wanted
    assert formats.resolve(name, hub=Hub(OSError("offline"), str(tmp_path))) == tmp_path / opened


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (GGUF, "o/n holds several models; name one of m-q4_0.gguf, m-q8_0.gguf as o/n/FILE"),
        (["README.md", "x.onnx"], "o/n holds no model that Puna opens; found README.md, x.onnx"),
    ],
)
def test_a_repository_without_one_model_is_told(files: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        formats.resolve("o/n", hub=Hub("never", files=files))


def test_offline_the_cached_copy_serves(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    for failure in (
        errors.LocalEntryNotFoundError("offline"),
        OSError("no route"),
        errors.OfflineModeIsEnabled("x"),
        RuntimeError("an error of an HTTP library"),
    ):
        assert formats.resolve("owner/name", hub=Hub(failure, str(tmp_path))) == tmp_path


def test_without_a_network_the_real_hub_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(ModelError, match="could not be reached"):
        formats.resolve("puna-no-such-owner/no-such-model")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (
            Hub(OSError("no route\nto host"), errors.LocalEntryNotFoundError("x")),
            "no route.*connect to the network",
        ),
        (Hub(refused(errors.RepositoryNotFoundError)), "no such model on the hub"),
        (Hub(refused(errors.GatedRepoError)), "grants access on request"),
        (Hub(refused(errors.RevisionNotFoundError)), "no such revision"),
        (Hub(OSError(28, "No space left")), "disk is full"),
    ],
)
def test_a_hub_that_does_not_give_is_one_line(hub: Hub, message: str) -> None:
    from puna.errors import InputError

    with pytest.raises(InputError, match=message) as caught:
        formats.resolve("owner/name", hub=hub)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_file_that_becomes_shorter_while_it_is_read_is_told(kind: str, saved: Path, tmp_path: Path) -> None:
    """Whoever touches a mapped page beyond the end of its file is killed, so nobody may come to it."""
    target = tmp_path / {"llama2c": "m.bin", "gguf": "m.gguf"}.get(kind, "m")
    convert(formats.open_model(saved), target, kind, verify=None, weights_only=True)
    source = formats.open_model(target)
    names = [name for name, _ in source.weights]
    coming = iter(source.weights)
    assert next(coming)[0] == names[0]
    files = [target] if target.is_file() else [*target.glob("*.safetensors"), *target.glob("*.pth")]
    with files[0].open("r+b") as file:
        file.truncate(files[0].stat().st_size // 2)
    with pytest.raises(ModelError, match=r"became shorter .* of its \S+ bytes are left\); copy"):
        next(coming)


def test_a_file_that_is_replaced_while_it_is_read_stays_whole(model: Llama, saved: Path) -> None:
    source = formats.open_model(saved)
    coming = iter(source.weights)
    first = [next(coming)]
    shorter = saved / "new"
    shorter.write_bytes(b"less")
    shorter.replace(saved / "model.safetensors")
    found = dict(first + list(coming))
    assert all(torch.equal(found[name], value) for name, value in weights_of(model))
