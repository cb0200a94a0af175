"""These tests run the Triton kernels on the CPU, which Triton decides on when it is imported: in a process of its own.

tests/test_triton_interpreter.py starts it; by hand: TRITON_INTERPRET=1 python -m pytest tests/interpret
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
