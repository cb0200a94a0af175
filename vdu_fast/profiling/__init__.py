"""Where the time and the memory of unlearning go: `profile` measures, `report` writes, `advice` says what helps."""

from vdu_fast.profiling.profiler import profile
from vdu_fast.profiling.record import Profile

__all__ = ["Profile", "profile"]
