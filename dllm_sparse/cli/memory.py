"""Out of memory, said in words: what was being allocated, and which options of this very command lower it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dllm_sparse.types import OutOfMemory, out_of_memory

_LOWER = ("batch_size", "batch", "batch_tokens", "mc_batch", "windows", "length", "prompt_length", "gen_length")
_NARROW = ("bfloat16", "float16")
_SMALLER = ("width", "layers", "ffn_width")  # of a model that is yet to be trained


def names_memory_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose memory errors end with advice made of its own options."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except Exception as error:  # torch has several types for it; what is not about memory goes on as it came
            if (found := out_of_memory(error)) is None:
                raise
            fits = not isinstance(error, OutOfMemory)  # the model does; what it was to work on does not
            raise OutOfMemory(f"{found}; {_advice(command, options, fits=fits)}") from error

    return guarded


def _advice(command: Callable[..., None], options: dict[str, Any], *, fits: bool) -> str:
    """What to change: options that are not at their end already."""
    known = inspect.signature(command).parameters
    lower = [name for name in _LOWER if fits and name in known and options.get(name) not in (1, [1])]
    if "recipe" in known:
        lower += [name for name in _SMALLER if name in known]
    parts = [f"lower {', '.join(_flag(name) for name in lower)}"] if lower else []
    parts += ["take fewer rows in the recipe's [[mix]]"] if "recipe" in known else []
    parts += ["use --dtype bfloat16"] if "dtype" in known and options.get("dtype") not in _NARROW else []
    return " or ".join(parts) or "choose a smaller model"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
