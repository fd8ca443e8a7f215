"""Which number type a machine is given."""

from __future__ import annotations

import pytest
import torch

from puna.devices import choose_dtype


def test_a_torch_without_onednn_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, where the operator that asks oneDNN is not there either."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
