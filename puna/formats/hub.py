"""A path, or an id on the Hugging Face hub, to a path."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from puna.errors import ModelError, ResourceError
from puna.files import FULL

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_UNWANTED = ["original/*", "*/*"]  # other formats of the same model


def resolve(name: str | Path, download: Callable[..., str] | None = None) -> Path:
    """The path itself where it exists; otherwise the local copy of a model on the hub, downloaded if need be.

    Args:
        name: a path, or an id such as "TinyLlama/TinyLlama_v1.1".
        download: what fetches a repository; `huggingface_hub.snapshot_download` unless given. Where the hub
            cannot be reached it is asked once more, for the copy in its cache.

    Raises:
        ModelError: neither; or the hub refuses, or cannot be reached and nothing is cached.
        ResourceError: the disk is full.
    """
    path, text = Path(name), str(name)
    if path.exists():
        return path
    # runs/demo has the form of an id too: where runs/ is a directory here, a path was meant.
    if isinstance(name, Path) or not _ID.fullmatch(text) or path.parent.is_dir():
        raise ModelError(f"{text}: no such file or directory, and not a hub id (owner/name)")
    return _fetch(text, _snapshot_download() if download is None else download)


def _snapshot_download() -> Callable[..., str]:
    from huggingface_hub import snapshot_download

    return snapshot_download


def _fetch(repository: str, download: Callable[..., str]) -> Path:
    from huggingface_hub import errors

    wanted = {"allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
    try:
        return Path(download(repository, **wanted))
    except errors.GatedRepoError:
        raise ModelError(
            f"{repository}: its owner grants access on request; ask at https://huggingface.co/{repository}, "
            "then log in with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{repository}: no such path here and no such model on the hub; check the name, or log in with: "
            "hf auth login, if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        return _cached(repository, wanted, error, download)
    except OSError as error:
        if error.errno in FULL:
            raise ResourceError(
                f"{repository}: the disk is full; free some space and load it again"
            ) from None
        return _cached(repository, wanted, error, download)


def _cached(
    repository: str, wanted: dict[str, list[str]], reason: Exception, download: Callable[..., str]
) -> Path:
    try:
        return Path(download(repository, local_files_only=True, **wanted))
    except (OSError, ValueError):
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise ModelError(
            f"{repository}: no such path here, and the hub could not be reached for it ({first}); connect to "
            "the network once, or give the path of a model"
        ) from None
