"""The CPU kernels give the same bits on every instruction set they are compiled for.

Which clone of a loop runs is decided by the processor, so this builds the extension once per instruction set, without
clones. Run as a script with the path of such a build, this file prints a digest of everything the kernels compute.
"""

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(ROOT.glob("build/cmake-*/compile_commands.json"))
# Flags by which a compiler is held to one of TRSP_LOOP's clones, and what the processor must have to run the result.
TARGETS = {"default": ([], None), "avx2": (["-mavx2"], "avx2"), "avx512f": (["-mavx512f"], "avx512f")}


def processor_flags():
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def build(flags, directory):
    """The extension with every loop compiled for one instruction set; the commands are those of the real build."""
    objects = []
    for entry in json.loads(COMMANDS[-1].read_text()):
        if "_C.dir" not in entry["output"] or "cuda" in Path(entry["file"]).parts:
            continue
        command = shlex.split(entry["command"])
        objects.append(directory / f"{Path(entry['file']).stem}.o")
        command[command.index("-o") + 1] = str(objects[-1])
        subprocess.run([*command, "-DTRSP_LOOP=__attribute__((noinline))", *flags], cwd=entry["directory"], check=True)
    library = directory / "_C.so"
    subprocess.run([command[0], "-shared", "-fopenmp", *map(str, objects), "-o", str(library)], check=True)
    return library


def digest(library):
    loader = importlib.machinery.ExtensionFileLoader("trsp_fast._C", library)
    spec = importlib.util.spec_from_loader("trsp_fast._C", loader)
    import torch

    for name in ("libc10.so", "libtorch_cpu.so"):  # the linker was not told about them
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    sys.modules["trsp_fast._C"] = importlib.util.module_from_spec(spec)
    from trsp_fast.ops import backends

    assert backends.HAS_CPU
    found = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    c = torch.tensor([0.3, -0.7])
    for dtype, residual, masked in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True)
    ):
        x, out, dy = (torch.randn(2, 70, 131, generator=generator).to(dtype) for _ in range(3))
        if dtype != torch.float32:
            every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # NaN, Inf and subnormals included
            x[0].view(-1)[:9000], x[1].view(-1)[:9000] = every[:9000], every[-9000:]
            out.view(-1)[: 2**14] = every[::4]
        mask = torch.rand(2, 70, generator=generator) > 0.3 if masked else None
        for gate in (torch.tensor(0.7), torch.tensor([1.0, 0.0])):
            y, l1, l2 = torch.ops.trsp_fast.gated_residual_cpu(x, out, gate, mask, residual, True)
            grads = torch.ops.trsp_fast.gated_residual_cpu_backward(
                dy, x, out, gate, mask, c, c, residual, True, True, True
            )
            norms = torch.ops.trsp_fast.residual_norms_cpu(x, out, mask)
            back = torch.ops.trsp_fast.residual_norms_cpu_backward(x, out, mask, c, None, True, True)
            for tensor in (y, l1, l2, *grads, *norms, *back):
                clean = tensor.nan_to_num(12345.0)  # which NaN it is may differ
                found.update(clean.reshape(-1).view(torch.uint8).numpy().tobytes())
                found.update(tensor.isnan().numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(not COMMANDS, reason="no build directory: the extension was not built from this source tree")
def test_every_instruction_set_gives_the_same_bits(tmp_path):
    seen = {}
    for name, (flags, needed) in TARGETS.items():
        if needed and needed not in processor_flags():
            continue
        (tmp_path / name).mkdir()
        library = build(flags, tmp_path / name)
        done = subprocess.run([sys.executable, "-P", __file__, library], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[name] = done.stdout.split()[-1]
    if len(seen) == 1:
        pytest.skip("this processor has only the default instruction set")
    assert len(set(seen.values())) == 1, seen


if __name__ == "__main__":
    print(digest(sys.argv[1]))
