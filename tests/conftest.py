"""Fixtures shared by the tests of the numerical core."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from tiny import TinyDenoiser, build_pipeline, build_tiny
from torch import Tensor

from vdu_fast.pipelines import Denoiser, denoiser_of

# The same examples every time, and no folder of remembered ones in the working tree.
settings.register_profile("vdu_fast", derandomize=True, database=None, deadline=None)
settings.load_profile("vdu_fast")


@pytest.fixture
def pipeline():
    return build_pipeline()


@pytest.fixture
def unet_denoiser(pipeline) -> Denoiser:
    return denoiser_of(pipeline)


@pytest.fixture
def tiny_module() -> TinyDenoiser:
    return build_tiny()


@pytest.fixture
def scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(50)


@pytest.fixture
def tiny_denoiser(tiny_module, scheduler) -> Denoiser:
    return Denoiser(tiny_module, scheduler, (1, 8, 8))


@pytest.fixture
def images() -> Tensor:
    """Twelve grey 8 x 8 images in [-1, 1]."""
    return torch.rand((12, 1, 8, 8), generator=torch.Generator().manual_seed(3)) * 2 - 1
