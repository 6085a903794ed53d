"""Triton kernels and their launchers; imported as trsp_fast.kernels, and only where a Triton backend runs."""
