"""Fused kernels: the checks of kernel_checks.py, on a GPU or through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    from kernel_checks import *  # noqa: F403
else:

    @pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
    def test_through_the_interpreter() -> None:
        """In a process of its own: Triton reads its variable once, and may have been imported here before."""
        checks = Path(__file__).with_name("kernel_checks.py")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
        assert done.returncode == 0, done.stdout.decode()[-5000:]
