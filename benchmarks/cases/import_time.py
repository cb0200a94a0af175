"""What `import vdu_fast` adds to `import torch`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys

from vdu_fast.benchmarks.case import Budget, Line, Setting, question
from vdu_fast.benchmarks.tables import timed_line

CODE = "import time, torch; a = time.perf_counter(); import vdu_fast; print(time.perf_counter() - a)"
BUDGET = Budget(seconds=0.1)


@question("import vdu_fast, after torch", group="machine", devices=("cpu",), quick=True)
def import_time(setting: Setting) -> list[Line]:
    rounds = 3 if setting.quick else 5
    runs = [
        subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(rounds)
    ]
    return [timed_line("vdu_fast", [float(run.stdout) for run in runs], budget=BUDGET)]
