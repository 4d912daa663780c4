"""The tokenizer of a checkpoint folder, read when it is asked for: importing transformers takes longer than a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.types import CheckpointError, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def tokenizer_reader(
    folder: Path, kind: Kind, known_class: str | None = None, mask_token_id: int | None = None
) -> Callable[[], PreTrainedTokenizerBase] | None:
    """What reads the folder's tokenizer when it is asked for, by a class of transformers if one is known; None where
    there is none. It raises CheckpointError for a broken tokenizer, and for one whose mask is not `mask_token_id`."""
    here = any((folder / name).exists() for name in _FILES)
    return partial(_tokenizer, folder, kind, known_class, mask_token_id) if here else None


def _tokenizer(folder: Path, kind: Kind, known_class: str | None, mask_token_id: int | None) -> Any:
    try:
        tokenizer = _read(folder, kind, known_class)
        tokenizer("A probe: what cannot encode fails here and is named.")
    except Exception as error:  # tokenizers raises a bare Exception on a corrupt file
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error})") from error
    own = tokenizer.mask_token_id  # None in many: LLaDA's tokenizer does not say which of its tokens is the mask
    if None not in (own, mask_token_id) and own != mask_token_id:
        raise CheckpointError(
            f"{folder}: the model's mask id is {mask_token_id}, but its tokenizer's mask token "
            f"{tokenizer.mask_token!r} is {own}; set mask_token_id in config.json or mask_token in "
            f"tokenizer_config.json to the one it was trained with"
        )
    return tokenizer


def _read(folder: Path, kind: Kind, known_class: str | None) -> Any:
    if _is_plain_fast(folder):
        # AutoTokenizer would load every model's configuration first, which takes two seconds.
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    if known_class is not None:
        import transformers

        return getattr(transformers, known_class).from_pretrained(str(folder))
    from transformers import AutoTokenizer, PreTrainedConfig

    # transformers knows no diffusion family: an empty config keeps it from guessing at the folder's.
    config = PreTrainedConfig() if kind == "diffusion" else None
    return AutoTokenizer.from_pretrained(str(folder), config=config, trust_remote_code=False)


def _is_plain_fast(folder: Path) -> bool:
    """True where tokenizer.json says everything: the folder names no class of its own."""
    described = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").exists() or not described.exists():
        return False
    named = json.loads(described.read_text(encoding="utf-8")).get("tokenizer_class")
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")
