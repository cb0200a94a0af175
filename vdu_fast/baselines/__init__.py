"""The methods that vdu_fast is compared with, each from its paper's formula, and vdu_fast itself behind the same door.

    from vdu_fast.baselines import get_method
    from vdu_fast.baselines.method import MethodInputs, run_method

    record = run_method(get_method("salun"), denoiser, MethodInputs(forget, retained), budget=100_000, seed=0)

All train the same network on the same pictures with the same loop (`training`) and the same number of network
evaluations (`budget`). Where a paper is about conditional models, the head of the file says what stands for the
condition here. A method is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vdu_fast.errors import InputError

if TYPE_CHECKING:
    from vdu_fast.baselines.method import Method

_HOME = {
    "ours": "ours",
    "vdu": "vdu",
    "neg_grad": "neg_grad",
    "neg_grad_plus": "neg_grad",
    "fine_tune": "fine_tune",
    "salun": "salun",
    "selective_amnesia": "selective_amnesia",
    "erase_diff": "erase_diff",
    "siss": "siss",
    "retrain": "retrain",
}

METHOD_NAMES = tuple(_HOME)


def get_method(name: str) -> Method:
    """The method of that name; InputError with the names that there are."""
    if name not in _HOME:
        raise InputError(f"methods: there is no {name!r}; accepted are {', '.join(METHOD_NAMES)}. Name some of these.")
    return getattr(import_module(f"vdu_fast.baselines.{_HOME[name]}"), name.upper())
