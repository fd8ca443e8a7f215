"""GPTQ as its paper writes it (arXiv 2210.17323, algorithm 1), in NumPy and float64, one column at a time.

The inverse of H is taken and factored, and every column's error goes at once to all columns after it.
"""

from __future__ import annotations

import numpy as np


def gptq(weight, inputs, scales, group, damping, order):
    """Whole numbers (O, I) from -8 to 7 of a weight (O, I), for inputs (n, I) and scales (O, I / group)."""
    hessian = 2 * inputs.T @ inputs
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    hessian, left = hessian[order][:, order], weight[:, order].astype(np.float64)
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    numbers = np.zeros_like(left)
    for k, column in enumerate(order):
        scale = scales[:, column // group]
        numbers[:, k] = np.clip(np.rint(left[:, k] / scale), -8, 7)
        error = (left[:, k] - numbers[:, k] * scale) / inverse[k, k]
        left[:, k:] -= np.outer(error, inverse[k, k:])
    found = np.zeros_like(numbers)
    found[:, order] = numbers
    return found
