"""Variational diffusion unlearning: make a trained diffusion model forget, from the unwanted pictures alone.

    from vdu_fast import GaussianPosterior, UnlearnConfig, unlearn

Names are imported when they are first used, so that `import vdu_fast` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdu_fast import ops as ops
    from vdu_fast import reference as reference
    from vdu_fast._native import backends as backends
    from vdu_fast._native import use_backend as use_backend
    from vdu_fast.config import UnlearnConfig as UnlearnConfig
    from vdu_fast.data import ImageSet as ImageSet
    from vdu_fast.data import load_images as load_images
    from vdu_fast.errors import InputError as InputError
    from vdu_fast.evaluation import EvaluationConfig as EvaluationConfig
    from vdu_fast.evaluation import evaluate as evaluate
    from vdu_fast.optim import VariationalOptimizer as VariationalOptimizer
    from vdu_fast.pipelines import Denoiser as Denoiser
    from vdu_fast.pipelines import load_pipeline as load_pipeline
    from vdu_fast.posterior import GaussianPosterior as GaussianPosterior
    from vdu_fast.posterior import PosteriorRecorder as PosteriorRecorder
    from vdu_fast.profiling import Profile as Profile
    from vdu_fast.profiling import profile as profile
    from vdu_fast.replay import ReplayBank as ReplayBank
    from vdu_fast.schedule import NoiseSchedule as NoiseSchedule
    from vdu_fast.sweeping import SweepConfig as SweepConfig
    from vdu_fast.sweeping import sweep as sweep
    from vdu_fast.unlearner import UnlearnResult as UnlearnResult
    from vdu_fast.unlearner import unlearn as unlearn

_HOME = {
    "Denoiser": "pipelines",
    "EvaluationConfig": "evaluation",
    "GaussianPosterior": "posterior",
    "ImageSet": "data",
    "InputError": "errors",
    "NoiseSchedule": "schedule",
    "PosteriorRecorder": "posterior",
    "Profile": "profiling",
    "ReplayBank": "replay",
    "SweepConfig": "sweeping",
    "UnlearnConfig": "config",
    "UnlearnResult": "unlearner",
    "VariationalOptimizer": "optim",
    "backends": "_native",
    "evaluate": "evaluation",
    "load_images": "data",
    "load_pipeline": "pipelines",
    "profile": "profiling",
    "sweep": "sweeping",
    "unlearn": "unlearner",
    "use_backend": "_native",
}
_MODULES = ("ops", "reference")

__all__ = [*_HOME, *_MODULES, "__version__"]

# In a checkout that was never installed, vdu_fast.kernels lies beside the package.
_CHECKOUT = Path(__file__).parents[1]
if (_CHECKOUT / "kernels" / "variational_step.py").is_file() and (_CHECKOUT / "setup.py").is_file():
    __path__.append(str(_CHECKOUT))

try:
    __version__ = version("vdu_fast")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"vdu_fast.{name}")
    if name in _HOME:
        return getattr(import_module(f"vdu_fast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vdu_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
