"""Every Triton kernel variant compiles for sm_90 on a machine without a GPU, and moves bf16 in 16-byte pieces.

Run as a script, without the interpreter, this file prints what it compiled as JSON; the test runs it so.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from trsp_fast.ops import backends

# Kernel -> variants: the pointers that are given, whether the mode is residual, the wide accesses to expect.
FORWARD = {
    "output with norms": ("x out y partials", False, (2, 1)),
    "residual with norms": ("x out y partials", True, (2, 1)),
    "masked": ("x out y partials mask", True, (2, 1)),
    "output without norms": ("out y", False, (1, 1)),
    "residual without norms": ("x out y", True, (2, 1)),
}
BACKWARD = {
    "output, no penalty": ("dy out dout partials", False, (2, 1)),
    "output, no penalty, frozen gate": ("dy dout", False, (1, 1)),
    "residual, no penalty": ("dy x out dx dout partials", True, (3, 2)),
    "residual, no penalty, frozen gate": ("dy dx dout", True, (1, 2)),
    "output, penalty": ("dy x out c1 c2 dx dout partials", False, (3, 2)),
    "residual, penalty, masked": ("dy x out c1 c2 mask dx dout partials", True, (3, 2)),
    "residual, penalty, frozen gate": ("dy x out c2 dx dout", True, (3, 2)),
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


def compile_variant(kernel, given, residual, *, specialised=True):
    """PTX of one variant for hidden size 4096, as the launcher would ask for it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("gate", "c1", "c2", "partials"), "*fp32") | {"mask": "*u8"}
    masked = "mask" in given
    constants = {"BLOCK_T": 1, "BLOCK_H": 4096, "RESIDUAL": residual} | ({} if masked else {"tokens": 1})
    signature, chosen, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = name.removesuffix("_ptr")
        absent = name.endswith("_ptr") and pointer not in (*given, "gate")
        if absent or name in constants:
            signature[name], chosen[(i,)] = "constexpr", None if absent else constants[name]
        else:
            signature[name] = types.get(pointer, "*bf16") if name.endswith("_ptr") else "i32"
        if signature[name].startswith("*") or (name == "hidden" and specialised):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, chosen, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


def accesses(ptx):
    """Bytes per instruction -> how many there are, for loads and stores of 2-byte elements."""
    found = {"ld": [], "st": []}
    for kind, lanes, width in re.findall(r"\b(ld|st)\.global(?:\.L\S+?)?(?:\.v(\d))?\.b(16|32|64)\b", ptx):
        found[kind].append(int(lanes or 1) * int(width) // 8)
    return found


def main():
    from trsp_fast.kernels import gated_residual, residual_norms

    modules = {"gated_residual": gated_residual, "residual_norms": residual_norms}
    report = {}
    for path, variants in KERNELS.items():
        module, name = path.split(".")
        for variant, (given, residual, _) in variants.items():
            ptx = compile_variant(getattr(modules[module], name), given.split(), residual)
            report[f"{path}: {variant}"] = accesses(ptx)
    unspecialised = compile_variant(gated_residual.forward_kernel, ["out", "y"], False, specialised=False)
    report["control"] = accesses(unspecialised)
    print(json.dumps(report))


@pytest.mark.skipif(not backends.HAS_TRITON, reason="triton is not installed")
def test_every_variant_compiles_with_16_byte_accesses():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for path, variants in KERNELS.items():
        for variant, (_, _, (loads, stores)) in variants.items():
            found = report[f"{path}: {variant}"]
            # 4096 elements by 256 threads: two accesses of 8 bf16 per thread and tensor.
            for kind, tensors in (("ld", loads), ("st", stores)):
                assert found[kind].count(16) == 2 * tensors, (path, variant, found)
                assert 2 not in found[kind], (path, variant, found)
    assert 16 not in report["control"]["ld"], "the audit does not see that an unspecialised size costs the wide loads"


if __name__ == "__main__":
    main()
