"""Runs the tests of the triton backend under Triton's interpreter, which has to be chosen before Python starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trsp_fast.ops import backends


@pytest.mark.skipif(not backends.HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these tests itself")
@pytest.mark.skipif(backends.INTERPRETED, reason="this is that process")
def test_triton_backend_in_the_interpreter():
    tests = Path(__file__).parent
    # -P: not the repository root on sys.path, where the folder kernels/ would hide Hugging Face's package.
    pytest_command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_command, "-k", "triton", "-m", "not slow", str(tests)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=tests.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
