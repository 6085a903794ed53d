"""Which backend of the fused ops runs where: decided once, when this module is imported."""

import importlib.util
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("trsp_fast", "FRAGMENT")

# Read once: Triton itself reads the variable when a kernel is decorated, later changes have no effect there either.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load_cpu() -> bool:
    """Import the C++ extension, which registers its kernels; say once why it is not there."""
    if importlib.util.find_spec("trsp_fast._C") is None:
        warnings.warn(
            "trsp_fast was installed without its C++ extension: CPU tensors use the slower reference backend; "
            "install a C++ compiler and reinstall to build it.",
            stacklevel=2,
        )
        return False
    try:
        importlib.import_module("trsp_fast._C")
    except ImportError as error:
        warnings.warn(
            f"trsp_fast's C++ extension does not load with torch {torch.__version__} ({error}): CPU tensors use the "
            "slower reference backend; reinstall trsp_fast to rebuild it.",
            stacklevel=2,
        )
        return False
    return True


HAS_CPU = _load_cpu()
HAS_TRITON = importlib.util.find_spec("triton") is not None


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """Names of the backends that can run on `device`, the default one first."""
    kind = torch.device(device).type
    names: list[str] = []
    if kind == "cpu" and HAS_CPU:
        names.append("cpu")
    if kind == "cuda" and HAS_TRITON:
        names.append("triton")
    names.append("reference")
    if kind == "cpu" and HAS_TRITON and INTERPRETED:
        names.append("triton")
    return tuple(names)


_DEFAULT = {kind: available_backends(kind)[0] for kind in ("cpu", "cuda")}


def choose(backend: str | None, x: Tensor) -> str:
    """The backend for `x`: the one asked for, or the device's default; fp64 has only the reference."""
    kind = x.device.type
    if backend is None:
        return "reference" if x.dtype == torch.float64 else _DEFAULT.get(kind, "reference")
    if backend not in NAMES:
        raise ValueError(
            f"backend must be one of {', '.join(NAMES)} or None, got {backend!r}; leave it out to have one chosen."
        )
    if backend not in available_backends(kind):
        raise ValueError(f"backend {backend!r} is not available for {kind} tensors ({_remedy(backend, kind)}).")
    if backend != "reference" and x.dtype == torch.float64:
        raise ValueError(
            f"backend {backend!r} has no float64 kernels; use backend='reference' or cast x and out to float32."
        )
    return backend


def _remedy(backend: str, kind: str) -> str:
    if backend == "cpu":
        return "reinstall with a C++ compiler to build it" if kind == "cpu" else "move the tensors to the CPU"
    if not HAS_TRITON:
        return "install triton"
    return "move the tensors to a CUDA device, or set TRITON_INTERPRET=1 before Python starts"


def check_pair(x: Tensor, out: Tensor) -> None:
    """Raise ValueError unless x and out are a layer's input and output that the ops can take."""
    if x.dim() < 2:
        raise ValueError(f"x must have shape (G, ..., H), got {tuple(x.shape)}; add a leading sequence dimension.")
    if x.shape != out.shape:
        raise ValueError(
            f"x and out must have the same shape, got {tuple(x.shape)} and {tuple(out.shape)}; pass one layer's."
        )
    if x.dtype != out.dtype:
        raise ValueError(f"x and out must have the same dtype, got {x.dtype} and {out.dtype}; cast one of them.")
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"x and out must be float32, bfloat16, float16 or float64, got {x.dtype}; cast them.")
    if x.device != out.device:
        raise ValueError(f"x and out must be on the same device, got {x.device} and {out.device}; move one of them.")


def check_mask(token_mask: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless token_mask can select tokens of x."""
    if token_mask is None:
        return
    if token_mask.dtype != torch.bool:
        raise ValueError(
            f"token_mask must be bool (True keeps a token), got {token_mask.dtype}; pass token_mask.bool()."
        )
    if token_mask.device != x.device:
        raise ValueError(f"token_mask must be on x's device {x.device}, got {token_mask.device}; move it there.")
    tokens = x.shape[:-1]
    sizes = tuple(token_mask.shape)
    fits = len(sizes) <= len(tokens) and all(
        m in (1, t) for m, t in zip(reversed(sizes), reversed(tokens), strict=False)
    )
    if not fits:
        raise ValueError(
            f"token_mask must broadcast to x.shape[:-1] = {tuple(tokens)}, got {sizes}; add or drop dimensions."
        )


def register(op: str, schema: str, fake: Callable, triton_kernel: Callable, *, backward: bool = False) -> None:
    """Define `op` for each compiled backend: one schema and one fake; C++ brings the `cpu` kernels itself."""
    for backend in ("cpu", "triton"):
        name = _operator_name(op, backend, backward)
        LIBRARY.define(name + schema)
        torch.library.register_fake(f"trsp_fast::{name}", fake, lib=LIBRARY)
    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        LIBRARY.impl(name, triton_kernel, key)


def operator(op: str, backend: str, *, backward: bool = False) -> Callable:
    """The dispatcher op that runs `op` on `backend`."""
    return getattr(torch.ops.trsp_fast, _operator_name(op, backend, backward))


def _operator_name(op: str, backend: str, backward: bool) -> str:
    return f"{op}_{backend}_backward" if backward else f"{op}_{backend}"


def states_if(needed: bool, like: Tensor) -> Tensor:
    """An op's result slot: contiguous hidden states of `like`'s shape, or the [0] that stands for an absent result."""
    return like.new_empty(like.shape if needed else 0)


def mask_bytes(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask of every token as Triton reads it: one byte each, contiguous."""
    return None if token_mask is None else token_mask.expand(x.shape[:-1]).contiguous().view(torch.uint8)
