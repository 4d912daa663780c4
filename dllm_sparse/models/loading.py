"""`load`: an alias, a local folder or a hub id becomes a LanguageModel. Safetensors only; no remote code, ever."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dllm_sparse.models.checkpoint_config import read_config
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.families import Family
from dllm_sparse.models.resolve import checkpoint_folder
from dllm_sparse.models.shapes import shape_config
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import CheckpointError, Kind, Step, StepContext, TokenClass, UnsupportedArchitecture, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Engine = Literal["native", "transformers"]
EngineChoice = Literal["auto", "native", "transformers"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class LanguageModel:
    """A transformer with what a user needs around it. `kind` says which loop decodes it.

    `tokenizer` is one, None, or a function that reads it when it is first asked for: importing transformers takes
    longer than loading a small model.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        config: TransformerConfig,
        transformer: Transformer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        family: str = "",
        revision: str | None = None,
        *,
        read_tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
        engine: Engine = "native",
    ) -> None:
        self.name, self.kind, self.config, self.transformer = name, kind, config, transformer
        self.family, self.revision, self.engine = family, revision, engine
        self.graphs: tuple[tuple[object, ...], object] | None = None  # captured steps, kept for the next generation
        self._tokenizer, self._read_tokenizer = tokenizer, read_tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, read on first use; None where the folder has none. Raises CheckpointError if it is broken."""
        if self._read_tokenizer is not None:
            self._tokenizer, self._read_tokenizer = self._read_tokenizer(), None
        return self._tokenizer

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token; None for an autoregressive model."""
        return self.config.mask_token_id

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the logits."""
        return self.transformer.embedding.weight.dtype

    @torch.no_grad()  # not inference_mode: its tensors cannot be changed in place by the caller
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Raw logits [B, L, V] in the model's dtype, no shift, for ids [B, L] int64 and an optional 0/1 mask [B, L]."""
        ids = ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        context = StepContext(Step(0, 1), token_classes(ids, mask, self.mask_token_id))
        positions = None if mask is None or not self.config.causal else rotary_positions(mask)
        return self.transformer(ids, attention_mask=mask, positions=positions, context=context)  # type: ignore[no-any-return]


def token_classes(ids: Tensor, attention_mask: Tensor | None, mask_token_id: int | None) -> Tensor:
    """Classes [B, L] int8 of a sequence outside any loop: padding, masked, everything else prompt."""
    classes = torch.full_like(ids, TokenClass.PROMPT, dtype=torch.int8)
    if mask_token_id is not None:
        classes[ids == mask_token_id] = TokenClass.MASKED
    if attention_mask is not None:
        classes[attention_mask == 0] = TokenClass.PADDING
    return classes


def rotary_positions(attention_mask: Tensor) -> Tensor:
    """Positions [B, L] that count from the first real token of each row (left padding counts as 0)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def load(
    name: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    engine: EngineChoice = "auto",
) -> LanguageModel:
    """Loads a model by alias, local folder or hub id.

    `device="auto"` is CUDA when there is one. `dtype="auto"` is the checkpoint's own type on CUDA and float32 on a
    CPU. `engine="auto"` runs native families natively and every other causal LM through transformers, where `device`
    may also be "balanced" or "sequential" (spread by accelerate). Raises ModelNotFound, UnsupportedArchitecture or
    CheckpointError; pickle weights are refused.
    """
    if engine not in get_args(EngineChoice):
        raise UsageError(f"engine is {engine!r}; allowed: {', '.join(get_args(EngineChoice))}")
    folder = checkpoint_folder(name, revision)
    if engine == "transformers":
        return _through_transformers(name, folder, device, dtype, revision)
    try:
        family, config, stored_dtype = read_config(folder)
    except UnsupportedArchitecture as error:
        if engine == "native":
            raise
        return _through_transformers(name, folder, device, dtype, revision, refusal=error)
    target = _device(device)
    transformer = _empty_transformer(config, target, _dtype(dtype, stored_dtype, target))
    fill_weights(transformer, folder, family)
    reader = tokenizer_reader(folder, family.kind)
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
    transformer = _empty_transformer(config, target, _dtype(dtype, torch.bfloat16, target))
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

    if refusal is not None and hf.known_config(folder) is None:
        raise refusal
    spread = device in hf.DEVICE_MAPS
    target = torch.device("cuda" if torch.cuda.is_available() else "cpu") if spread else _device(device)
    stored = dtype == "auto" and target.type == "cuda"
    wanted = None if stored else _dtype(dtype, torch.float32, target)
    try:
        return hf.load_with_transformers(name, folder, str(device) if spread else target, wanted, revision)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{refusal}. Through transformers: {error}" if refusal else str(error)) from None


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device is {device!r}; use auto, cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} was asked for, but torch sees no CUDA GPU; use --device cpu")
    return target


def _dtype(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return stored if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


class _NoInitialValues(TorchFunctionMode):
    """Skips torch.nn.init: every weight is read later, and `normal_` on the meta device imports torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _empty_transformer(config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"), _NoInitialValues():
        transformer = Transformer(config)
    transformer = transformer.to(dtype).to_empty(device=device)
    if config.tied:
        transformer.head.weight = transformer.embedding.weight
    return transformer.requires_grad_(False).eval()


def fill_weights(transformer: Transformer, folder: Path, family: Family) -> None:
    """Copies every tensor of the folder's safetensors into place; each must be expected, present once and in shape."""
    slots = dict(expected_slots(transformer, family))
    shared = {_key_of(family, "embedding.weight"), _key_of(family, "head.weight")} if transformer.config.tied else set()
    read: set[str] = set()
    extra: list[str] = []
    for key, tensor in _stored_tensors(folder, transformer.embedding.weight.device):
        if key not in slots:
            if not key.endswith("rotary_emb.inv_freq"):  # a buffer some old Llama checkpoints carry; recomputed here
                extra.append(key)
            continue
        slot = slots[key]
        if tensor.shape != slot.shape:
            raise CheckpointError(f"{folder}: tensor {key} is {list(tensor.shape)}, expected {list(slot.shape)}")
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{folder}: tensor {key} is {tensor.dtype}; quantised weights are not supported")
        if key in shared and shared & read and not torch.equal(tensor.to(slot.dtype), slot):
            raise CheckpointError(f"{folder}: {' and '.join(sorted(shared))} differ, but the config ties them")
        slot.copy_(tensor)
        read.add(key)
    optional = shared - {_key_of(family, "embedding.weight")}
    missing = set(slots) - read - optional
    if missing or extra:
        raise CheckpointError(f"{folder}: {_difference(missing, extra)}")


def expected_slots(transformer: Transformer, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, view of the parameter or of its part) for every tensor this model must find."""
    config = transformer.config
    parameters = dict(transformer.named_parameters(remove_duplicate=False))
    for key, target in family.keys.items():
        for layer in range(config.layers) if "{i}" in key else (None,):
            name, _, part = target.replace("{i}", str(layer)).partition("#")
            if name not in parameters:
                continue
            value = parameters[name].data
            if part:
                widths = config.qkv_widths if "qkv_proj" in name else (config.ffn_width, config.ffn_width)
                value = torch.split(value, list(widths))[int(part)]
            yield key.replace("{i}", str(layer)), value


def _key_of(family: Family, parameter: str) -> str:
    return next(key for key, target in family.keys.items() if target == parameter)


def _stored_tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of every shard, one at a time, read straight to the device; a key may occur only once."""
    seen: set[str] = set()
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for key in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if key in seen:
                        raise CheckpointError(f"{file}: tensor {key} is stored twice")
                    seen.add(key)
                    yield key, shard.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error}); download it again") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(f"{folder}: only pickle weights ({pickles[0]}); refused, convert to safetensors")
        raise CheckpointError(f"{folder}: no .safetensors file")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a weight_map ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {name!r} is not a .safetensors file beside the index")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index}: shard {name} is missing from the folder")
    return [index.parent / name for name in names]


def _difference(missing: set[str], extra: list[str]) -> str:
    parts = []
    for title, keys in (("missing", sorted(missing)), ("unexpected", sorted(extra))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            parts.append(f"{title} tensors: {', '.join(keys[:3])}{more}")
    return "; ".join(parts)


def tokenizer_reader(folder: Path, kind: Kind) -> Callable[[], PreTrainedTokenizerBase] | None:
    """What reads the folder's tokenizer when it is asked for; None where there is none."""
    here = any((folder / name).exists() for name in _TOKENIZER_FILES)
    return partial(_tokenizer, folder, kind) if here else None


def _tokenizer(folder: Path, kind: Kind) -> Any:
    try:
        if _is_plain_fast(folder):
            # AutoTokenizer would load every model's configuration first, which takes two seconds.
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        from transformers import AutoTokenizer, PreTrainedConfig

        # transformers knows no diffusion family: an empty config keeps it from guessing at the folder's.
        config = PreTrainedConfig() if kind == "diffusion" else None
        return AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception on a corrupt file
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error})") from error


def _is_plain_fast(folder: Path) -> bool:
    """True where tokenizer.json says everything: the folder names no class of its own."""
    described = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").exists() or not described.exists():
        return False
    named = json.loads(described.read_text(encoding="utf-8")).get("tokenizer_class")
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")
