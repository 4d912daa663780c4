"""The vocabulary shared by every layer: steps, sites, token classes, observers, and the errors a user can meet.

Shape legend used across the package: B batch rows, L canvas positions, T tokens fed to one forward,
D model width, F FFN width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

SiteName = Literal["attention_input", "attention_output", "input", "gate", "up", "intermediate"]
"""Where a mask is taken, in the order of the computation.

In the FFN (arXiv 2509.00454): input x, gate = sigma(W_g x), up = W_u x, intermediate = gate * up. Beyond the paper:
attention_input is what the query, key and value projections share, attention_output what the output projection reads.
"""
ATTENTION_SITES: tuple[SiteName, ...] = ("attention_input", "attention_output")

Kind = Literal["diffusion", "autoregressive"]


ROUTED = -2
"""In place of an expert: all routed experts of a layer as one FFN, whose channels are (expert, channel) pairs."""


class Site(NamedTuple):
    """One place in the model where a mask is formed. `expert` is -1 in a dense FFN (and in a shared expert)."""

    layer: int
    name: SiteName
    expert: int = -1


def in_order(names: Iterable[SiteName]) -> list[SiteName]:
    """Site names in the order of the computation, each once."""
    return sorted(set(names), key=get_args(SiteName).index)


class TokenClass(IntEnum):
    """What a canvas position holds when a forward starts; statistics never mix classes silently."""

    PADDING = 0
    PROMPT = 1
    MASKED = 2
    COMMITTED = 3  # decoded by the step just before this one
    DECODED = 4


@dataclass(frozen=True, slots=True)
class Step:
    """Position in the denoising (or decoding) loop. `total` is the planned number of steps."""

    index: int
    total: int
    block: int = 0
    index_in_block: int = 0

    @property
    def fraction(self) -> float:
        """Progress in [0, 1]: 0 at the first step, 1 at the last planned one and at any beyond it."""
        return min(self.index / max(self.total - 1, 1), 1.0)


@dataclass(frozen=True, slots=True)
class StepContext:
    """Everything a forward's masks depend on besides the activations; travels as an argument, never a global.

    `token_class` is [B, T] int8 for the tokens of this forward; `start` is the canvas position of the first of
    them, so token t sits at absolute position `start + t`. Under classifier-free guidance rows B/2.. are the
    unconditional copies (`guided` is True) and have the same canvas positions as rows ..B/2. `block` is where the block
    being decoded begins and ends on the canvas; None where there is none, or where this forward does not feed it.
    """

    step: Step
    token_class: Tensor
    start: int = 0
    guided: bool = False
    part: Part | None = None
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What an expert sees of a forward: the tokens [N] int64 routed to it, flat rows of the whole's B * T.

    `pairs` (token, expert) there are in the whole layer, and `experts`.
    """

    whole: StepContext
    tokens: Tensor
    pairs: int
    experts: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step decided: ids and committed are [B, L] over the whole canvas, confidence is [B, L].

    None instead: transformers' own loop does not tell, or the forward was for its keys and values alone.
    """

    ids: Tensor
    committed: Tensor
    confidence: Tensor | None = None


class Observer:
    """Watches a generation. Every method is optional; an observer never changes what is decided."""

    @property
    def needs_every_row(self) -> bool:
        """Whether every forward must hold every row; if nobody needs that, rows with nothing left to decide leave."""
        return True

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        """The canvas [B, L] and the class of each position before the first step."""

    def on_mask(self, site: Site, values: Tensor, keep: Tensor, context: StepContext) -> None:
        """The values [B, T, n] at one site and the mask [B, T, n] bool that was applied to them."""

    def on_step(self, step: Step, result: StepResult) -> None:
        """After a step committed its tokens."""


Observers = Sequence[Observer]


class DllmSparseError(Exception):
    """Base of the errors shown to a user without a traceback. Exit code 1 on the command line."""

    exit_code = 1


class UsageError(DllmSparseError, ValueError):
    """An argument outside what is allowed. Exit code 2 on the command line."""

    exit_code = 2


class ModelNotFound(DllmSparseError):
    """No such alias, folder or hub repository."""


class CheckpointError(DllmSparseError):
    """Missing, extra, misshapen, truncated or refused weights; an unreadable config."""


class UnsupportedArchitecture(DllmSparseError):
    """The checkpoint is of a family this package does not know."""


class NonFiniteActivations(DllmSparseError):
    """NaN or Inf in activations or logits, with layer, site and step."""


class BackendUnavailable(DllmSparseError):
    """An explicitly requested backend cannot run here."""


class OutOfMemory(DllmSparseError):
    """Memory ran out; says what was being allocated."""


def out_of_memory(error: Exception) -> str | None:
    """What was being allocated when memory ran out, in words; None for any other error.

    torch raises RuntimeErrors on a CPU and in cuBLAS, an error of its own on a GPU; numpy and Python MemoryErrors.
    """
    if isinstance(error, OutOfMemory):
        return str(error)
    words = str(error).strip()
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")
    if not (known or (isinstance(error, RuntimeError | OSError) and any(sign in words for sign in signs))):
        return None
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)|Unable to allocate ([\d.]+ \w+)", words, re.IGNORECASE)
    if wanted is None:
        return f"out of memory ({words.splitlines()[0]})" if words else "out of memory"
    amount = wanted[1] or wanted[2]
    if amount.endswith(" bytes"):
        amount = f"{int(amount.split()[0]) / 2**30:.2f} GiB"
    return f"out of memory: {amount} could not be allocated {'on the GPU' if 'CUDA' in words else 'on the CPU'}"


class FileNotWritten(DllmSparseError):
    """A file the system refused to write: a full disk, a read-only folder. What was there before is as it was."""

    def __init__(self, path: Path, reason: OSError) -> None:
        super().__init__(
            f"{path} cannot be written ({reason.strerror or reason}); files finished before are whole: make room or "
            "choose another folder, and run again"
        )


class DamagedFile(DllmSparseError):
    """A file this package wrote and cannot take up again. Nothing is silently computed twice, or from half a file."""

    def __init__(self, path: Path, what: str, reason: object) -> None:
        said = str(reason) if isinstance(reason, str | OSError) else repr(reason)
        super().__init__(f"{path} is not {what} ({said[:200]}); remove it and run again")


class StdoutNotWritten(DllmSparseError):
    """The answer has nowhere to go: stdout leads to a full disk."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(f"the answer cannot be written to stdout ({reason.strerror or reason})")


class PromptFileError(UsageError):
    """A prompts file with a bad line; carries file and line number."""


class SelfTestFailed(DllmSparseError):
    """A check of `dllm-sparse doctor` failed; the message names it."""
