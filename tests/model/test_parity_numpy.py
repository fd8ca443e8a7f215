"""Logits and the gradient of every parameter, in float64, against the reference: within 1e-10."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from puna.model.weights import weights_of
from tests.model.shapes import CONFIGS, ids_of, model_of, summed_loss
from tests.reference import numpy_llama

LENGTH = 24
DOCUMENTS = torch.tensor([[0] * 24, [3] * 5 + [4] + [5] * 18, [1] * 20 + [0] * 4])
RESTARTING = torch.stack(
    [
        torch.cat([torch.arange(int(n)) for n in row.unique_consecutive(return_counts=True)[1]])
        for row in DOCUMENTS
    ]
)
FAR = torch.arange(LENGTH)[None] + torch.tensor([[0], [50], [7001]])
CASES = {
    "whole rows": (None, None),
    "packed": (RESTARTING, DOCUMENTS),
    "packed, one count": (None, DOCUMENTS),
    "far out": (FAR, None),
}


def gap(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """The largest difference as a share of the largest value."""
    return float(np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kernel", ["fused", "reference"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_the_reference(name, case, kernel):
    check_against_the_reference(model_of(CONFIGS[name], torch.float64, kernel), *CASES[case])


def check_against_the_reference(model, positions, documents):
    """Logits and gradients of a model in float64, within 1e-10."""
    config = model.config
    ids, targets = ids_of(config, 3, LENGTH), ids_of(config, 3, LENGTH, seed=1)

    logits = model(ids, positions, documents)
    summed_loss(logits, targets).backward()

    plain = config.model_dump()
    weights = {name: tensor.numpy() for name, tensor in weights_of(model)}
    expected, tape = numpy_llama.forward(
        plain,
        weights,
        ids.numpy(),
        None if positions is None else positions.numpy(),
        None if documents is None else documents.numpy(),
    )
    _, d_logits = numpy_llama.cross_entropy(expected, targets.numpy())
    gradients = numpy_llama.backward(plain, weights, tape, d_logits)

    assert gap(logits, expected) < 1e-10
    parameters = dict(model.named_parameters())
    assert parameters.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert gap(parameters[parameter].grad, gradient) < 1e-10, parameter
