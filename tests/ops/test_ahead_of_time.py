"""Every Triton kernel variant compiles for sm_80, sm_90 and sm_100 without a GPU, moves bf16 in 16-byte pieces, spills
nothing.

Run as a script, without the interpreter, this file prints what it compiled as a table, or as JSON with --json.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from trsp_fast.ops import backends

CAPABILITIES = (80, 90, 100)
# Kernel -> variants: the pointers that are given, whether the mode is residual, the tensors loaded and stored.
FORWARD = {
    "output, norms": ("x out y partials", False, (2, 1)),
    "output, norms, masked": ("x out y partials mask", False, (2, 1)),
    "residual, norms": ("x out y partials", True, (2, 1)),
    "residual, norms, masked": ("x out y partials mask", True, (2, 1)),
    "output": ("out y", False, (1, 1)),
    "residual": ("x out y", True, (2, 1)),
}
BACKWARD = {
    "output": ("dy out dout partials", False, (2, 1)),
    "output, frozen gate": ("dy dout", False, (1, 1)),
    "residual": ("dy x out dx dout partials", True, (3, 2)),
    "residual, frozen gate": ("dy dx dout", True, (1, 2)),
    "output, penalty": ("dy x out c1 c2 dx dout partials", False, (3, 2)),
    "output, penalty, masked": ("dy x out c1 c2 mask dx dout partials", False, (3, 2)),
    "residual, penalty": ("dy x out c1 c2 dx dout partials", True, (3, 2)),
    "residual, penalty, masked": ("dy x out c1 c2 mask dx dout partials", True, (3, 2)),
    "residual, l2 penalty, frozen gate": ("dy x out c2 dx dout", True, (3, 2)),
}
NORMS = {"all": ("x out partials", None, (2, 0)), "masked": ("x out partials mask", None, (2, 0))}
NORMS_BACKWARD = {
    "all": ("x out c1 c2 dx dout", None, (2, 2)),
    "masked": ("x out c2 mask dx dout", None, (2, 2)),
    "dout only": ("x out c1 dout", None, (2, 1)),
}
KERNELS = {
    "gated_residual.forward_kernel": FORWARD,
    "gated_residual.backward_kernel": BACKWARD,
    "residual_norms.forward_kernel": NORMS,
    "residual_norms.backward_kernel": NORMS_BACKWARD,
}
SCALARS = dict.fromkeys(("gate", "c1", "c2", "partials"), "*fp32") | {"mask": "*u8"}
CONTROL = "control: the size is not specialised"


def compile_variant(kernel, given, residual, capability, *, specialised=True):
    """One bf16 variant as the launcher asks for it at hidden size 4096: PTX and cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trsp_fast.kernels import residual_norms

    sums = "partials" in given
    tile = residual_norms.TILE if sums else residual_norms.TILE_WITHOUT_SUMS
    constants = {"BLOCK_T": 1, "BLOCK_H": tile, "EVICTION": residual_norms.EVICTION}
    constants |= {"RESIDUAL": residual} | ({} if "mask" in given else {"tokens": 1})
    signature, chosen, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.removesuffix("_ptr")
        absent = name.endswith("_ptr") and pointer not in (*given, "gate")
        if absent or name in constants:
            signature[name], chosen[(i,)] = "constexpr", None if absent else constants[name]
        else:
            signature[name] = SCALARS.get(pointer, "*bf16") if name.endswith("_ptr") else "i32"
        if signature[name].startswith("*") or (name == "hidden" and specialised):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, chosen, attributes)
    target = GPUTarget("cuda", capability, 32)
    warps = residual_norms.WARPS if sums else residual_norms.WARPS_WITHOUT_SUMS
    return triton.compile(source, target=target, options={"num_warps": warps}).asm, warps


def compile_second_stage(capability, block, warps):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trsp_fast.kernels.residual_norms import sum_tiles_kernel

    signature = dict.fromkeys(("partials_ptr", "first_ptr", "second_ptr"), "*fp32")
    signature |= {"tiles": "i32", "BLOCK": "constexpr"}
    source = ASTSource(sum_tiles_kernel, signature, {(4,): block}, {})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm


def accesses(ptx):
    """Bytes per instruction of the loads and stores of hidden states; the mask is read by single bytes, sums by b32."""
    found = {"ld": [], "st": []}
    for kind, lanes, width in re.findall(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.b(16|32|64)\b", ptx):
        found[kind].append(int(lanes or 1) * int(width) // 8)
    return found


def resources(cubin):
    """Registers per thread and bytes of local memory (spills) as NVIDIA's own tool reads them from the machine code."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local}


def audit():
    """Variant -> capability -> accesses, registers and spills."""
    from trsp_fast.kernels import gated_residual, residual_norms

    modules = {"gated_residual": gated_residual, "residual_norms": residual_norms}
    report = {CONTROL: {}}
    for capability in CAPABILITIES:
        for path, variants in KERNELS.items():
            module, name = path.split(".")
            for variant, (given, residual, _) in variants.items():
                asm, warps = compile_variant(getattr(modules[module], name), given.split(), residual, capability)
                row = report.setdefault(f"{path}: {variant}", {})
                row[capability] = accesses(asm["ptx"]) | resources(asm["cubin"]) | {"threads": 32 * warps}
        for block, warps in residual_norms.SECOND_STAGES:
            row = report.setdefault(f"second stage, {block} at once", {})
            row[capability] = resources(compile_second_stage(capability, block, warps)["cubin"])
        loose, _ = compile_variant(gated_residual.forward_kernel, ["out", "y"], False, capability, specialised=False)
        report[CONTROL][capability] = accesses(loose["ptx"])
    return report


def table(report):
    """Registers per thread of every variant, one column per capability."""
    width = max(map(len, report))
    print("registers per thread".ljust(width), *(f"sm_{c}".rjust(6) for c in CAPABILITIES))
    for name, row in report.items():
        if name != CONTROL:
            print(name.ljust(width), *(str(row[c]["registers"]).rjust(6) for c in CAPABILITIES))


@pytest.fixture(scope="module")
def report():
    if not backends.HAS_TRITON:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def is_wide(row, loads, stores):
    """Whether hidden states move in 16 bytes or more, and as often as one pass over so many tensors needs."""
    # 4096 elements by 256 threads: two accesses of 8 bf16, or one of 16 where the machine has it, for each tensor.
    for kind, tensors in (("ld", loads), ("st", stores)):
        wide = [size for size in row[kind] if size >= 16]
        if sum(wide) != 32 * tensors or 2 in row[kind] or 8 in row[kind]:
            return False
    return True


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_hidden_states_move_16_bytes_at_a_time(report, capability):
    for path, variants in KERNELS.items():
        for variant, (_, _, tensors) in variants.items():
            row = report[f"{path}: {variant}"][str(capability)]
            assert is_wide(row, *tensors), (path, variant, row)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills(report, capability):
    for name, row in report.items():
        if name == CONTROL:
            continue
        found = row[str(capability)]
        assert found["spilled"] == 0, (name, found)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_enough_loads_are_in_flight(report, capability):
    """Little's law: a share of 4.8 TB/s over 132 multiprocessors, 0.8 us away, is 29 KB under way on each."""
    for name, row in report.items():
        found = row[str(capability)]
        if "ld" not in found or "registers" not in found:
            continue
        programs = min(2048 // found["threads"], 65536 // (found["threads"] * found["registers"]))
        in_flight = programs * found["threads"] * sum(size for size in found["ld"] if size >= 16)
        assert in_flight >= 40 * 1024, (name, found)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_audit_sees_an_unspecialised_size(report, capability):
    assert not is_wide(report[CONTROL][str(capability)], 1, 1)


if __name__ == "__main__":
    found = audit()
    print(json.dumps(found)) if "--json" in sys.argv else table(found)
