"""The fused ops: one public function per op, each with the same signature on every backend."""

from trsp_fast.ops.backends import available_backends
from trsp_fast.ops.gated_residual import gated_residual
from trsp_fast.ops.residual_norms import residual_norms

__all__ = ["available_backends", "gated_residual", "residual_norms"]
