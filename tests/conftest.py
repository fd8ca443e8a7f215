"""What every test shares: the real material, where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same cases every time: what a change broke must not hide behind what chance found.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The directory of real weights, tokenizers and texts named by $PUNA_ASSETS."""
    name = os.environ.get("PUNA_ASSETS")
    if not name:
        pytest.skip("PUNA_ASSETS is not set: it names a directory of real weights, tokenizers and texts")
    path = Path(name)
    if not path.is_dir():
        pytest.skip(f"PUNA_ASSETS names {path}, which is not a directory")
    return path
