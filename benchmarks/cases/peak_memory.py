"""Memory that a step needs beyond parameters and gradients: the state it keeps and what it allocates on the way.

Each implementation takes three steps in a process of its own; the figure is the growth of its peak.
"""

from __future__ import annotations

import subprocess
import sys

from vdu_fast.benchmarks.case import Line, Setting, question

NUMEL = 16 * 2**20
# The high-water mark is Linux's: no other count sees what every allocator takes.
COMMON = f"""
import re, torch
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.randn({NUMEL}) * 0.05)
p.grad = torch.randn({NUMEL}) * 1e-3
open("/proc/self/clear_refs", "w").write("5")  # from here on
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
"""
TAIL = f"""
step()
print((peak() - peak_before) / {NUMEL})
"""
OURS = """
from vdu_fast import VariationalOptimizer
import vdu_fast.ops
peak_before = peak()
optimizer = VariationalOptimizer([p], 1e-3, lr=1e-3, kl_weight=1e-6, rule={rule!r}, noise_scale={noise})
def step():
    for _ in range(3):
        with optimizer.sampled_weights():
            pass
        optimizer.step()
"""
IMPLEMENTATIONS = {
    "vdu_fast, mean-only, natural": OURS.format(rule="natural", noise=0.0),
    "vdu_fast, mean-field, natural": OURS.format(rule="natural", noise=1.0),
    "vdu_fast, mean-field, natural_adam": OURS.format(rule="natural_adam", noise=1.0),
    "ivon-opt": """
import ivon
peak_before = peak()
optimizer = ivon.IVON([p], lr=1e-3, ess=1e6)
def step():
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()
""",
    "torch Adam, penalty and draw by torch": """
peak_before = peak()
center, precision, rho = p.detach().clone(), torch.ones_like(p), torch.full_like(p, -5.0)
optimizer = torch.optim.Adam([p], lr=1e-5, fused=True)
@torch.no_grad()
def step():
    for _ in range(3):
        p.grad.add_((p - center) * precision, alpha=1e-6)
        optimizer.step()
        mean = p.clone()
        p.add_(rho.exp() * torch.randn_like(p))
        p.copy_(mean)
""",
}


@question("bytes per parameter beyond weight and gradient", group="machine", devices=("cpu",))
def peak_memory(setting: Setting) -> list[Line]:
    lines: list[Line] = []
    for name, code in IMPLEMENTATIONS.items():
        done = subprocess.run([sys.executable, "-c", COMMON + code + TAIL], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            lines.append({"implementation": name, "note": f"left out: {reason}"})
        else:
            lines.append({"implementation": name, "bytes_per_parameter": round(float(done.stdout), 1)})
    return lines
