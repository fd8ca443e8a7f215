"""A path, or an id on the Hugging Face hub, to a path."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from puna.errors import ModelError, ResourceError, SettingsError
from puna.files import FULL

_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<inside>(/[\w.-]+)*)")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_BESIDE = ("*.json", "*.jinja", "tok*.model", "tok*.bin")
_DIRECTORIES = (  # what marks a directory of one format, and its weights, the best form first
    ("config.json", "*.safetensors"),
    ("config.json", "pytorch_model*.bin"),
    ("params.json", "consolidated.*.pth"),
)
_SINGLE = (".gguf", ".bin", ".pt")


class Hub(Protocol):
    """What is asked of the hub; `huggingface_hub` unless a test stands in."""

    def files(self, repository: str, revision: str | None) -> list[str]:
        """Every file of a repository."""

    def download(
        self,
        repository: str,
        wanted: Sequence[str],
        *,
        revision: str | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
    ) -> str:
        """The directory that holds the files wanted, fetched if need be; names may hold wildcards."""


@dataclass(frozen=True)
class Request:
    """A model on the hub: a repository, perhaps a file or folder in it, a revision, a cache of one's own."""

    repository: str
    inside: str = ""
    revision: str | None = None
    cache_dir: str | Path | None = None

    def __str__(self) -> str:
        name = f"{self.repository}/{self.inside}" if self.inside else self.repository
        return f"{name} at revision {self.revision}" if self.revision else name


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    hub: Hub | None = None,
) -> Path:
    """The path itself where it exists; otherwise the local copy of a model on the hub, downloaded if need be.

    Args:
        name: a path, or an id such as "TinyLlama/TinyLlama_v1.1". Of a repository with several models, one is
            named by its file or folder: "owner/name/model.q8_0.gguf", "owner/name/original".
        revision: a branch, tag or commit of the repository.
        cache_dir: where downloads are kept; the hub's usual place unless given.
        hub: stands in for the hub. Where it cannot be reached, its cache is asked.

    Raises:
        ModelError: neither; or the hub refuses, holds no model or several, or cannot be reached and has
            nothing in its cache.
        SettingsError: a revision of a path.
        ResourceError: the disk is full.
    """
    path, text = Path(name), str(name)
    found = None if isinstance(name, Path) else _ID.fullmatch(text)
    if _exists(path):
        if revision is not None:
            raise SettingsError(f"{text} is a path here, which has no revision {revision!r}; leave it out")
        return path
    # runs/demo has the form of an id too: where runs/ is a directory here, a path was meant.
    if found is None or Path(path.parts[0]).is_dir():
        raise ModelError(f"{text}: no such file or directory, and not a hub id (owner/name)")
    request = Request(found["repository"], found["inside"].strip("/"), revision, cache_dir)
    return _fetch(request, _HuggingFaceHub() if hub is None else hub)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name that is too long, or a directory that may not be read
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def choose(files: Sequence[str], request: Request) -> tuple[list[str], str]:
    """Which files of a repository make the model, and what to open of them.

    One form of the model is taken where there are several, safetensors first.

    Raises:
        ModelError: there is no model, or several to choose from.
    """
    if request.inside in files:
        folder, _, file = request.inside.rpartition("/")
    else:
        folder, file = request.inside, ""
    inside = {PurePosixPath(name).name: name for name in files if _folder(name) == folder}
    patterns = [_SPLIT.sub("-*", file)] if file else _patterns(sorted(inside), request)
    weights = sorted(name for name in inside if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    beside = [name for name in inside if any(fnmatch.fnmatch(name, pattern) for pattern in _BESIDE)]
    is_directory = not file and any(mark in inside for mark, _ in _DIRECTORIES)
    target = folder if is_directory else inside[file or weights[0]]
    return [inside[name] for name in dict.fromkeys((*beside, *weights))], target


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _patterns(names: Sequence[str], request: Request) -> list[str]:
    """The weights of the model among the files of a folder, as patterns."""
    for mark, weights in _DIRECTORIES:
        if mark in names and fnmatch.filter(names, weights):
            return [weights]
    single = [name for name in names if name.endswith(_SINGLE) and not fnmatch.fnmatch(name, "tok*")]
    models = sorted({_SPLIT.sub("-*", name) for name in single})
    if len(models) > 1:
        shown = ", ".join(models[:12])
        raise ModelError(f"{request} holds several models; name one of {shown} as {request.repository}/FILE")
    if not models:
        shown = ", ".join(names[:6]) or "no files"
        raise ModelError(f"{request} holds no model that Puna opens; found {shown}")
    return models


def _fetch(request: Request, hub: Hub) -> Path:
    from huggingface_hub import errors

    try:
        wanted, target = choose(hub.files(request.repository, request.revision), request)
        return Path(_download(hub, request, wanted, local=False), target)
    except (ModelError, KeyboardInterrupt):
        raise
    except errors.GatedRepoError:
        raise ModelError(
            f"{request}: its owner grants access on request; ask at "
            f"https://huggingface.co/{request.repository}, then log in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{request}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{request}: no such path here and no such model on the hub; check the name, or log in with: "
            "hf auth login, if it is private"
        ) from None
    except Exception as error:  # of whichever HTTP library the hub's package uses
        if isinstance(error, OSError) and error.errno in FULL:
            raise ResourceError(f"{request}: the disk is full; free some space and load it again") from None
        return _cached(request, error, hub)


def _cached(request: Request, reason: Exception, hub: Hub) -> Path:
    """The copy in the cache, when the hub cannot be reached."""
    try:
        directory = Path(_download(hub, request, None, local=True))
    except (OSError, ValueError):
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise ModelError(
            f"{request}: no such path here, and the hub could not be reached for it ({first}); connect to "
            "the network once, or give the path of a model"
        ) from None
    files = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    return Path(directory, choose(sorted(files), request)[1])


def _download(hub: Hub, request: Request, wanted: list[str] | None, *, local: bool) -> str:
    return hub.download(
        request.repository,
        wanted or ["*"],
        revision=request.revision,
        cache_dir=request.cache_dir,
        local_files_only=local,
    )


class _HuggingFaceHub:
    def files(self, repository: str, revision: str | None) -> list[str]:
        from huggingface_hub import HfApi

        # Unlike the listing of files, this asks once: without a network it says so at once.
        found = HfApi().model_info(repository, revision=revision, timeout=20)
        return [entry.rfilename for entry in found.siblings or []]

    def download(
        self,
        repository: str,
        wanted: Sequence[str],
        *,
        revision: str | None,
        cache_dir: str | Path | None,
        local_files_only: bool,
    ) -> str:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=list(wanted),
                local_files_only=local_files_only,
            )
        )
