"""Settings that cannot work are refused when they are made, by name."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError


def test_the_defaults_are_valid_and_go_through_json():
    config = UnlearnConfig()
    assert UnlearnConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_a_window_read_from_json_is_a_tuple_again():
    assert UnlearnConfig(timestep_window=[200, 700]).timestep_window == (200, 700)


def test_a_lone_pattern_is_one_pattern():
    assert UnlearnConfig(trainable="mid_block.*").trainable == ["mid_block.*"]


@pytest.mark.parametrize("gamma", [-0.1, 1.0, 1.5, math.nan])
def test_gamma_outside_0_to_1_is_refused(gamma):
    with pytest.raises(InputError, match=rf"gamma must be in \[0, 1\), got {gamma}"):
        UnlearnConfig(gamma=gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.999])
def test_gamma_may_be_zero_and_almost_one(gamma):
    assert UnlearnConfig(gamma=gamma).gamma == gamma


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optimizer": "Adam"}, "optimizer must be one of natural, natural_sign, natural_adam, adam, got 'Adam'"),
        ({"saturation": "Hinge"}, "saturation must be one of none, hinge, npo"),
        ({"bank_filter": "pu"}, "bank_filter must be one of positive_unlabelled, classifier, none"),
        ({"precision": "bf16"}, "precision must be one of float32, bfloat16"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"inference_batch_size": 0}, "inference_batch_size must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate must be a positive number"),
        ({"hinge_ratio": math.inf}, "hinge_ratio must be a positive number"),
        ({"trust_region": -1.0}, "trust_region must be a positive number"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be a positive number"),
        ({"sharpen": 0.0}, "sharpen must be a positive number"),
        ({"target_ratio": 1.0}, "target_ratio must be above 1"),
        ({"replay_weight": -1.0}, "replay_weight must be 0 or a positive number"),
        ({"forget_share": 0.0}, "forget_share must be above 0 and at most 1"),
        ({"forget_share": 1.1}, "forget_share must be above 0 and at most 1"),
        ({"forget_share": math.nan}, "forget_share must be above 0 and at most 1"),
        ({"replay_guidance": -1.0}, r"replay_guidance must be 0 \(off\) or a positive number"),
        ({"replay_guidance": math.inf}, r"replay_guidance must be 0 \(off\) or a positive number"),
        ({"replay_guidance": 1.0, "bank_filter": "none"}, "replay_guidance needs a bank_filter that tells"),
        ({"replay_focus": -0.1}, r"replay_focus must be in \[0, 1\]"),
        ({"replay_focus": math.nan}, r"replay_focus must be in \[0, 1\]"),
        ({"replay_weight": math.nan}, "replay_weight must be 0 or a positive number"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"max_dropped": 1.0}, "max_dropped must be between 0 and 1"),
        ({"learn_std": True}, "learn_std needs family mean_field"),
        ({"samples_per_step": 2}, "samples_per_step above 1 needs family mean_field"),
        ({"timestep_window": (5, 5)}, r"timestep_window must be \[low, high\)"),
        ({"timestep_window": (-1, 5)}, r"timestep_window must be \[low, high\)"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_unusable_settings_are_refused_by_name(settings, says):
    with pytest.raises(InputError, match=says):
        UnlearnConfig(**settings)
