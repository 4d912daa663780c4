"""Which machine this is and what it sustains; what the table of known rates lacks is measured on the spot."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

from dllm_sparse.bench.floors import KNOWN_RATES, Rates
from dllm_sparse.bench.timing import time_calls
from dllm_sparse.evaluation.fingerprints import git_revision, versions

_READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 28}  # well beyond the last-level cache of either
_SIDE = {"cuda": 8192, "cpu": 1024}
_REPEATS = 5
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def machine(device: torch.device) -> dict[str, Any]:
    """Names and versions that a timing depends on, JSON-ready."""
    facts: dict[str, Any] = {"device": device_name(device), "versions": versions(), "git_revision": git_revision()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"cuda": torch.version.cuda, "memory_bytes": properties.total_memory}
    else:
        facts |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The known rates of this device and type, else measured: the best of a read and a copy, and a square product."""
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    for (part, known_kind), known in KNOWN_RATES.items():
        if part in name and known_kind == kind:
            return known
    return measured_rates(device, dtype)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Bytes/s and FLOP/s as this device gives them now, best of five."""
    elements = _READ_BYTES[device.type] // 4
    if device.type == "cuda":
        elements = min(elements, torch.cuda.mem_get_info(device)[0] // 16)  # two buffers, half of what is free
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    side = _SIDE[device.type]
    left = torch.randn(side, side, device=device).to(dtype)
    runs = {"read": source.sum, "copy": lambda: target.copy_(source), "product": lambda: left @ left}
    best = {name: _best_seconds(run, device) for name, run in runs.items()}
    bandwidth = max(4 * elements / best["read"], 8 * elements / best["copy"])
    return Rates(bandwidth, 2 * side**3 / best["product"], "measured on the spot")


def _best_seconds(run: Any, device: torch.device) -> float:
    return min(time_calls({"run": run}, device, repeats=1)["run"].median for _ in range(_REPEATS)) / 1e3


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak anew: the allocator's on a GPU, the process's resident set on a CPU (Linux alone allows it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since the reset: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
