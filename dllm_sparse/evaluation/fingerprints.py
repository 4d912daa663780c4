"""What a stored point depends on, as hashes: the weights as loaded, the tokenizer, and the code that scores."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dllm_sparse
from dllm_sparse.models.language_model import LanguageModel

# These cannot change a score. A change anywhere else makes every stored point stale, which is the safe side.
_NO_SCORES = ("bench", "cli", "doctor", "figures.py", "report", "training")
_CHUNK = 1 << 24
_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "numpy")


def model_fingerprint(lm: LanguageModel) -> dict[str, Any]:
    """Configuration, precision, device and a checksum of every weight, so that no two models share points by name."""
    digest = hashlib.sha256()
    for name, parameter in lm.transformer.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {_checksum(parameter.data)}\n".encode())
    tokenizer = hashlib.sha256()
    if lm.tokenizer is not None:
        tokenizer.update(json.dumps(lm.tokenizer.get_vocab(), sort_keys=True).encode())
        for probe in ("Two probes: 1,234.5 tokens", "ünï  code\n\n\tX"):
            tokenizer.update(str(lm.tokenizer(probe)["input_ids"]).encode())
    return {
        "kind": lm.kind,
        "engine": lm.engine,
        "config": lm.config.to_dict(),
        "weights_sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer.hexdigest(),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": _device_name(lm.device),
    }


def _checksum(values: torch.Tensor) -> int:
    """Sum of the bit patterns, each times its place (modulo 2^64): any changed, moved or swapped weight shows."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    flat = values.contiguous().view(integer).flatten()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + part.numel(), device=flat.device)
        total = total + (part * (places * 2 + 1)).sum()
    return int(total)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


@cache
def code_fingerprint() -> str:
    """Hash of the package version and of the source files a score may depend on."""
    root = Path(dllm_sparse.__file__).parent
    digest = hashlib.sha256(dllm_sparse.__version__.encode())
    for file in sorted(root.rglob("*.py")):
        place = file.relative_to(root)
        if place.parts[0] not in _NO_SCORES:
            digest.update(place.as_posix().encode() + b"\n" + file.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and what computes."""
    own = {"dllm_sparse": dllm_sparse.__version__, "python": platform.python_version()}
    return {**own, **{package: installed_version(package) for package in _PACKAGES}}


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with `+` where it was changed; None outside a checkout."""
    root = Path(dllm_sparse.__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def key_of(parts: dict[str, Any]) -> str:
    """Hash of JSON-ready values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()
