"""Runs CMake for the C++ extensions; everything else about the package is in pyproject.toml."""

import glob
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUILD_DIRECTORY = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
PURE_PYTHON_BECAUSE = None
if os.environ.get("TRSP_FAST_NO_EXTENSIONS", "0") not in ("", "0"):
    PURE_PYTHON_BECAUSE = "TRSP_FAST_NO_EXTENSIONS is set"
elif "CXX" not in os.environ and not any(map(shutil.which, ("c++", "g++", "clang++"))):
    PURE_PYTHON_BECAUSE = "no C++ compiler was found"


def build_tool(name: str) -> str:
    """Path of cmake or ninja, the one installed beside this Python first."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"{name} is needed to build trsp_fast: run `pip install cmake ninja pybind11` first.")
    return found


class CMakeBuild(build_ext):
    """All extensions in one CMake build, kept in build/ so that a second one compiles only what changed."""

    def build_extensions(self) -> None:
        cmake = build_tool("cmake")
        configure = [
            *(cmake, "-S", ROOT, "-B", BUILD_DIRECTORY, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTRSP_FAST_EDITABLE={'ON' if self.editable_mode else 'OFF'}",
        ]
        for command in (
            configure,
            [cmake, "--build", BUILD_DIRECTORY],
            [cmake, "--install", BUILD_DIRECTORY, "--prefix", Path(self.build_lib).absolute()],
        ):
            if subprocess.run(command, check=False).returncode != 0:
                sys.exit("Building the C++ extensions of trsp_fast failed; the compiler's messages are above.")


class PythonBuild(build_py):
    """Says once that the extensions are left out."""

    def run(self) -> None:
        if PURE_PYTHON_BECAUSE:
            print(f"trsp_fast is installed without C++ extensions because {PURE_PYTHON_BECAUSE}.", flush=True)
        super().run()


# The sources are named for sdist only: CMakeLists.txt says what is compiled.
SOURCES = ["CMakeLists.txt", *sorted(glob.glob("csrc/**/*.*", root_dir=ROOT, recursive=True))]

setup(
    packages=sorted({*find_packages(ROOT, include=["trsp_fast", "trsp_fast.*"]), "trsp_fast.kernels"}),
    # Not a top-level `kernels`: that name belongs to Hugging Face's package, which transformers imports.
    package_dir={"trsp_fast.kernels": "kernels"},
    ext_modules=[] if PURE_PYTHON_BECAUSE else [Extension(f"trsp_fast.{n}", SOURCES) for n in ("_C", "_surgery")],
    cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild},
)
