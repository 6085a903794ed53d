"""The CUDA kernels compile for every GPU generation they name; where there is no nvcc nothing can be said."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc") or (HOME and shutil.which("nvcc", path=f"{HOME}/bin"))


@pytest.mark.skipif(not NVCC, reason="no nvcc: neither CUDA_HOME nor PATH has a CUDA toolkit")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_spills(tmp_path, capability):
    code = f"arch=compute_{capability},code=sm_{capability}"
    command = [NVCC, "-std=c++17", "-O3", "-c", "-gencode", code, "-Xptxas", "-v", ROOT / "csrc/cuda/kv_move.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "kv_move.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert (
        said.count("0 bytes spill stores, 0 bytes spill loads") == 16
    )  # two kernels, four widths of access, two of the index
    assert "warning" not in said
