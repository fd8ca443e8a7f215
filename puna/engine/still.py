"""A model at work that neither learns nor drops anything out, and is afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module


@contextmanager
def still(modules: Iterable[Module]) -> Iterator[None]:
    """No gradients, no dropout in these modules; training mode as before afterwards.

    Not `inference_mode`: tensors made in it, such as kept rotary frequencies, could not serve training later.
    """
    training = [module for module in modules if module.training]
    try:
        with torch.no_grad():
            for module in training:
                module.training = False
            yield
    finally:
        for module in training:
            module.training = True
