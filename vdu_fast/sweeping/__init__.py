"""Settings that suit a model, found without retained data and without a classifier."""

from __future__ import annotations

from vdu_fast.sweeping.choice import choose as choose
from vdu_fast.sweeping.grid import Point as Point
from vdu_fast.sweeping.grid import Setting as Setting
from vdu_fast.sweeping.grid import SweepConfig as SweepConfig
from vdu_fast.sweeping.sweeper import Sweep as Sweep
from vdu_fast.sweeping.sweeper import SweepResult as SweepResult
from vdu_fast.sweeping.sweeper import sweep as sweep
