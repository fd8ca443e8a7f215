"""Small JSON objects, read with bounds: a damaged file is one line of advice, never a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from puna.errors import ModelError

SIZE_LIMIT = 64 << 20  # bytes; the index of a model of a hundred thousand tensors takes 10 MB


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: it cannot be read, is too large, is no JSON, or no object.
    """
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ModelError(f"{path}: larger than {SIZE_LIMIT >> 20} MiB, which no such file is")
        value = json.loads(path.read_bytes(), parse_constant=_refuse, parse_float=_finite)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ModelError(f"{path}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write an object for people to read, keys in the order given.

    Raises:
        OSError: as it comes.
    """
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
