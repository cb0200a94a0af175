"""The ops in Triton: for every GPU that Triton supports, without a compiler for CUDA on the user's machine.

Each function here has the signature of its op in vdu_fast/_schema.py and can be called directly, without autograd, on
tensors of a GPU, or of the CPU when TRITON_INTERPRET=1 was set before Triton was imported. All compute in float32;
calls in float64 go to the torch reference. `register` puts them behind torch's dispatcher.

Importing this package needs neither a GPU nor Triton; without Triton its functions are absent.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

# op: module
LAUNCHERS = {
    "standard_normal_": "standard_normal",
    "sample_weights": "sample_weights",
    "sample_weights_": "sample_weights",
    "sample_weights_backward": "sample_weights",
    "sample_whitened_weights": "sample_weights",
    "sample_whitened_weights_": "sample_weights",
    "mix_noise": "add_noise",
    "noise_prediction_error": "noise_prediction_loss",
    "noise_prediction_error_backward": "noise_prediction_loss",
    "gaussian_kl": "gaussian_kl",
    "gaussian_kl_backward": "gaussian_kl",
    "quadratic_penalty": "gaussian_kl",
    "quadratic_penalty_backward": "gaussian_kl",
    "variational_gradients": "gaussian_kl",
    "variational_gradients_": "gaussian_kl",
    "variational_step_": "variational_step",
    "variational_gradient_norm": "variational_step",
    "add_noise_gradient_": "variational_step",
    "welford_update_": "welford_update",
}

ABSENCE = None if find_spec("triton") else "triton is not installed; pip install 'vdu_fast[triton]'"
INTERPRETED = False  # whether the kernels run on the CPU

if ABSENCE is None:
    # Some modules have the name of their op: the functions go over them.
    _found: dict[str, Any] = {
        op: getattr(import_module(f"{__name__}.{module}"), op) for op, module in LAUNCHERS.items()
    }
    globals().update(_found)
    INTERPRETED = import_module(f"{__name__}.launch").INTERPRETED

__all__ = [*LAUNCHERS]


def register(key: str) -> torch.library.Library:
    """Serve the ops under a dispatch key, over what served it before, for as long as the result lives.

    Args:
        key: "CUDA" (which is also AMD's), "XPU", or "CPU" for the interpreter.
    """
    library = torch.library.Library("vdu_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*verriding a previously registered kernel")
        for op in LAUNCHERS:
            library.impl(op, globals()[op], key)
    return library
