"""Freed memory is there for the next tensors without the system being asked again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from vdu_fast import freed_memory

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
STEPS, TENSORS, PAGES = 20, 4, 2048  # 8 MiB each
ALLOCATE = f"""
import resource, torch
from vdu_fast.freed_memory import keep_freed_memory
assert keep_freed_memory()
def step():
    tensors = [torch.zeros({PAGES} * 1024) + k for k in range({TENSORS})]
for _ in range({STEPS}):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_a_loop_over_the_same_tensors_asks_for_hardly_a_page():
    environment = {name: value for name, value in os.environ.items() if name not in freed_memory._SET_BY_USER}
    run = subprocess.run([sys.executable, "-c", ALLOCATE], env=environment, capture_output=True, text=True, check=True)
    # Without it they were 5% to 200% of the pages that are written.
    assert int(run.stdout) < 0.03 * STEPS * TENSORS * PAGES


def test_what_the_environment_says_of_malloc_stands(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not freed_memory.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    for name in freed_memory._SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: object())
    assert not freed_memory.keep_freed_memory()
