"""How far a 16-bit result may be from float64."""

import torch


def assert_close(y, expected):
    """Root mean square of the error, relative to that of `expected`: 1e-3 in float16, 5e-3 in
    bfloat16.
    """
    assert y.shape == expected.shape
    error = (y.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= {torch.float16: 1e-3, torch.bfloat16: 5e-3}[y.dtype], float(error)
