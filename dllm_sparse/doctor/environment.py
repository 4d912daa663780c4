"""What is here: versions, processors, backends and why not, folders, variables. No host name; home is written `~`."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dllm_sparse
from dllm_sparse.bench.machine import device_name
from dllm_sparse.evaluation.fingerprints import git_revision, installed_version, versions
from dllm_sparse.kernels.dispatch import resolve_backend
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.kernels.tuning import SHIPPED, file_name, user_file
from dllm_sparse.types import BackendUnavailable

_ALSO = ("triton", "safetensors", "accelerate", "datasets", "huggingface_hub", "scipy", "matplotlib")
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DLLM_SPARSE_DEBUG",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
)
_SECRET = ("HF_TOKEN",)


def environment() -> dict[str, Any]:
    """Everything a bug report needs about this machine, JSON-ready; memory in bytes."""
    from huggingface_hub import constants

    return {
        "versions": {**versions(), **{name: installed_version(name) for name in _ALSO}},
        "git_revision": git_revision(),
        "system": platform.platform(),
        "cpu": {
            "name": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": _memory(),
        },
        "cuda": torch.version.cuda,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": backends(),
        "folders": _folders(Path(constants.HF_HUB_CACHE)),
        "offline": bool(constants.HF_HUB_OFFLINE),
        "variables": {
            name: "set" if name in _SECRET else shortened(os.environ[name]) for name in _VARIABLES if name in os.environ
        },
    }


def backends() -> list[dict[str, Any]]:
    """What can compute here: name, available, and the reason where it is not (else what it serves)."""
    gpu = why_no_gpu()
    triton = gpu or _refusal(lambda: resolve_backend("triton", torch.device("cuda"), torch.bfloat16))
    interpreter = None if triton_installed() else "the package triton is not installed"
    rows = (
        ("reference", None, "dense products of masked values, on every device"),
        ("cpu", None, "skips zeros of one to four tokens, float32 and bfloat16"),
        ("triton", triton, "GPU kernels, bfloat16 and float16"),
        ("interpreter", interpreter, "the GPU kernels interpreted on a CPU, for tests"),
        ("CUDA graphs", gpu, "steps of greedy decoding as captured graphs"),
    )
    return [{"name": name, "available": reason is None, "reason": reason or what} for name, reason, what in rows]


def why_no_gpu() -> str | None:
    """Why torch sees no CUDA GPU; None where it does."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden!r})"
    return f"torch is built for CUDA {torch.version.cuda}, but sees no GPU{given}; is its driver installed?"


def shortened(text: str) -> str:
    """The text with the home folder as `~`."""
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")


def _refusal(resolve: Callable[[], object]) -> str | None:
    try:
        resolve()
    except BackendUnavailable as error:
        return str(error)
    return None


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    name = file_name(facts.name)
    tuned = user_file(facts.name).exists(), (SHIPPED / f"{name}.json").exists()
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "tiles": "measured here" if tuned[0] else "measured, shipped" if tuned[1] else "by rule (see `bench tune`)",
    }


def _folders(hub: Path) -> list[dict[str, Any]]:
    """Where caches, tuned tiles and the package itself are, and whether they exist yet."""
    places = {
        "package": Path(dllm_sparse.__file__).parent,
        "hub cache": hub,
        "tuned tiles": user_file("").parent,
        "triton cache": Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")),
    }
    return [{"name": name, "path": shortened(str(path)), "exists": path.exists()} for name, path in places.items()]


def _memory() -> int | None:
    """Physical memory in bytes, where the system says it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
