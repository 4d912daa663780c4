"""`load`: an alias, a local folder or a hub id becomes a LanguageModel. Safetensors only; no remote code, ever."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.overrides import TorchFunctionMode

from dllm_sparse.models.checkpoint_config import DTYPES, read_config
from dllm_sparse.models.checksums import check_files
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.resolve import checkpoint_folder
from dllm_sparse.models.shapes import shape_config
from dllm_sparse.models.tokenizers import tokenizer_reader
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.models.weights import check_layers, check_weights, fill_weights, stored_tensors
from dllm_sparse.types import (
    CheckpointError,
    DllmSparseError,
    Kind,
    OutOfMemory,
    UnsupportedArchitecture,
    UsageError,
    out_of_memory,
)

EngineChoice = Literal["auto", "native", "transformers"]


def load(
    name: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    engine: EngineChoice = "auto",
    report: Callable[[str], None] | None = None,
) -> LanguageModel:
    """Loads a model by alias, local folder or hub id.

    `device="auto"` is CUDA when there is one. `dtype="auto"` is the checkpoint's own type on CUDA and float32 on a
    CPU. `engine="auto"` runs native families natively and every other causal LM through transformers, where `device`
    may also be "balanced" or "sequential" (spread by accelerate). Every file whose checksum is known is compared with
    it (SHA256SUMS in the folder, the hub's cache, `hf download --local-dir`); `report` is told where none is, instead
    of a warning. Raises ModelNotFound, UnsupportedArchitecture or CheckpointError; pickle weights are refused.
    """
    if engine not in get_args(EngineChoice):
        raise UsageError(f"engine is {engine!r}; allowed: {', '.join(get_args(EngineChoice))}")
    folder = checkpoint_folder(name, revision)
    if note := check_files(folder, report).note(folder):
        if report is None:
            warnings.warn(note, stacklevel=2)
        else:
            report(note)
    if engine == "transformers":
        return _through_transformers(name, folder, device, dtype, revision)
    try:
        family, config, stored_dtype = read_config(folder)
    except UnsupportedArchitecture as error:
        if engine == "native":
            raise
        return _through_transformers(name, folder, device, dtype, revision, refusal=error)
    target = _device(device)
    precision = _dtype(dtype, stored_dtype, target)
    stored = stored_tensors(folder)
    check_layers(config.layers, stored, folder, config.experts)
    outline = _outline(config)
    check_weights(outline, folder, stored, family)
    transformer = _allocated(outline, target, precision)
    fill_weights(transformer, stored, family)
    reader = tokenizer_reader(folder, family.kind, family.tokenizer, config.mask_token_id)
    return LanguageModel(
        name, family.kind, config, transformer, family=family.name, revision=revision, read_tokenizer=reader
    )


def random_model(
    name: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", seed: int = 0
) -> LanguageModel:
    """A model of a public checkpoint's shape with random weights and no tokenizer: for speed, not for sense.

    Weights are normal with the usual standard deviation 0.02, norms are ones. Raises UsageError for an unknown shape.
    `dtype="auto"` is bfloat16 on CUDA and float32 on a CPU.
    """
    config = shape_config(name)
    target = _device(device)
    transformer = _allocated(_outline(config), target, _dtype(dtype, torch.bfloat16, target))
    generator = torch.Generator(target).manual_seed(seed)
    for key, parameter in transformer.named_parameters():
        if "norm" in key:
            parameter.fill_(1.0)
        elif key.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    kind: Kind = "autoregressive" if config.causal else "diffusion"
    return LanguageModel(f"{name} (random weights)", kind, config, transformer)


def _through_transformers(
    name: str,
    folder: Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    revision: str | None,
    refusal: UnsupportedArchitecture | None = None,
) -> LanguageModel:
    """The transformers engine; where it is only the fallback, `refusal` says why the native one declined."""
    from dllm_sparse.models import hf

    spread = device in hf.DEVICE_MAPS
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu") if spread else _device(device)
    stored = dtype == "auto" and target.type == "cuda"
    wanted = None if stored else _dtype(dtype, torch.float32, target)
    try:
        known = hf.known_config(folder)
        if known is None and refusal is not None:
            raise refusal
        if known is not None:
            layers = known.get_text_config(decoder=True).num_hidden_layers
            check_layers(layers, stored_tensors(folder), folder)
        return hf.load_with_transformers(name, folder, str(device) if spread else target, wanted, revision)
    except UnsupportedArchitecture as error:
        if error is refusal:
            raise
        raise UnsupportedArchitecture(f"{refusal}. Through transformers: {error}" if refusal else str(error)) from None
    except DllmSparseError:
        raise
    except Exception as error:  # transformers checks configs with a dozen unrelated types
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{folder}: transformers cannot read it ({type(error).__name__}: {error})") from error


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is {device!r}; use auto, cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} was asked for, but torch sees no CUDA GPU; use --device cpu")
    return target


def _dtype(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return stored if device.type == "cuda" else torch.float32
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


class NoInitialValues(TorchFunctionMode):
    """Skips torch.nn.init: every weight is read later, and `normal_` on the meta device imports torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _outline(config: TransformerConfig) -> Transformer:
    """The model without memory: shapes alone."""
    with torch.device("meta"), NoInitialValues():
        return Transformer(config)


def _allocated(transformer: Transformer, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The outline with memory for its weights, which hold nothing yet. Raises OutOfMemory."""
    try:
        transformer = transformer.to(dtype).to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error) is None:
            raise
        size = transformer.config.parameters * dtype.itemsize / 2**30
        name = str(dtype).removeprefix("torch.")
        raise OutOfMemory(f"out of memory: the weights take {size:.1f} GiB in {name}") from error
    if transformer.config.tied:
        transformer.head.weight = transformer.embedding.weight
    return transformer.requires_grad_(False).eval()
