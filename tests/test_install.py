"""The installed package: its extensions load, and its folder kernels/ does not hide Hugging Face's package."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trsp_fast

ROOT = Path(__file__).resolve().parents[1]


def has_extension(name):
    return any(Path(trsp_fast.__file__).parent.glob(f"{name}.*.so"))


@pytest.mark.parametrize("name", ["_C", "_surgery"])
def test_extension_imports(name):
    if not has_extension(name):
        pytest.skip("trsp_fast was installed without its C++ extensions")
    importlib.import_module(f"trsp_fast.{name}")


def test_surgery_needs_no_torch():
    if not has_extension("_surgery"):
        pytest.skip("trsp_fast was installed without its C++ extensions")
    (path,) = Path(trsp_fast.__file__).parent.glob("_surgery.*.so")
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_surgery", {str(path)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.parse_header(b"{{}}", 0) == ({{}}, [])
maps = open("/proc/self/maps").read()
assert "libtorch" not in maps and "libc10" not in maps
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime():
    """Two of them mean two thread pools, of which torch.set_num_threads reaches one."""
    if not has_extension("_C"):
        pytest.skip("trsp_fast was installed without its C++ extensions")
    code = """
import torch, trsp_fast._C
lines = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in lines if "libgomp" in line}))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert int(result.stdout) <= 1


def test_parallel_for_is_parallel():
    """at::parallel_for is a header template that runs serially, silently, where OpenMP was off at compile time."""
    if not has_extension("_C"):
        pytest.skip("trsp_fast was installed without its C++ extensions")
    (path,) = Path(trsp_fast.__file__).parent.glob("_C.*.so")
    binary = path.read_bytes()
    assert b"GOMP_parallel" in binary or b"__kmpc_fork_call" in binary


def test_kernels_are_imported_from_their_folder():
    kernels = importlib.import_module("trsp_fast.kernels")
    assert Path(kernels.__file__).resolve().parent.name == "kernels"
    if (ROOT / "trsp_fast").samefile(Path(trsp_fast.__file__).parent):
        assert Path(kernels.__file__).resolve().parent == ROOT / "kernels"


def test_repository_root_is_not_on_the_path():
    """Neither pytest nor the editable installation may put it there: `import kernels` would find our folder."""
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


STAND_IN = """
class Anything(type):
    def __getattr__(cls, name):
        return cls()

class Base(metaclass=Anything):
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (Base,), {})
"""


def stand_in_kernels(folder, version):
    """A distribution `kernels` in which every name is a class whose instances are decorators that change nothing."""
    for module in ("__init__.py", "layer/__init__.py", "layer/mode.py"):
        path = folder / "kernels" / module
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(STAND_IN)
    metadata = folder / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")


def test_transformers_finds_hugging_face_kernels_from_the_repository_root(tmp_path):
    from transformers.utils import import_utils

    stand_in_kernels(tmp_path, import_utils.KERNELS_MIN_VERSION)
    script = tmp_path / "script.py"
    script.write_text(
        """
import trsp_fast.kernels, kernels
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available(), "the stand-in is not in range"
from transformers import LlamaForCausalLM
print(kernels.__file__, trsp_fast.kernels.__file__, sep="\\n")
"""
    )
    result = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    theirs, ours = map(Path, result.stdout.split())
    assert theirs.is_relative_to(tmp_path)
    assert not ours.is_relative_to(tmp_path)
