"""How many bytes can still be used, on the host and on a GPU."""

import os
from pathlib import Path

import torch


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process can still get: of a GPU those of torch's own cache too, of the host (default) by the
    kernel's estimate and within the limit of its control group.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    system = Path("/proc/meminfo")
    if system.exists():
        fields = dict(line.split(":", 1) for line in system.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:  # no Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int(limit) - int(used["anon"]))  # without cached files, which give way
    return free
