"""A model that is only a shape, as one is before its weights are read."""

from __future__ import annotations

import subprocess
import sys

SHAPE_ONLY = """
import sys, torch
from puna.model.llama import Llama
from puna.model.presets import preset
with torch.device("meta"):
    model = Llama(preset("puna-1m"))
assert all(parameter.is_meta for parameter in model.parameters())
print("torch._dynamo" in sys.modules)
"""


def test_a_shape_alone_does_not_import_the_compiler() -> None:
    """It takes longer than reading a small model."""
    found = subprocess.run([sys.executable, "-c", SHAPE_ONLY], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
