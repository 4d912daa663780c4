"""Loading the model a command asked for, and saying what it is and how it will be run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dllm_sparse.cli.output import Output

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.models.loading import EngineChoice
    from dllm_sparse.sparsity.config import Backend


def open_model(
    output: Output, model: str, device: str, dtype: str, revision: str | None, engine: EngineChoice
) -> LanguageModel:
    """The model; narrates its kind, size and own blocks, files without a checksum, and where hooks found its FFNs."""
    from dllm_sparse.models.hooked import HookedTransformer
    from dllm_sparse.models.loading import load

    lm = load(model, device=device, dtype=dtype, revision=revision, engine=engine, report=output.say)
    kind = {"mask": "masked diffusion", "uniform": "uniform-noise diffusion", None: "autoregressive"}[lm.noise]
    precision = str(lm.dtype).removeprefix("torch.")
    output.say(f"{model}: {kind}, {lm.config.parameters / 1e6:,.1f}M parameters, {precision} on {lm.device}")
    if lm.config.block_length is not None:
        output.say(f"it decodes in its own blocks of {lm.config.block_length} tokens (block_size in its config.json)")
    if isinstance(lm.transformer, HookedTransformer):
        for sentence in lm.transformer.found.sentences:
            output.say(f"through transformers: {sentence}")
    return lm


def say_fallback(output: Output, backend: Backend, *models: LanguageModel, ran: Sequence[str] = ()) -> None:
    """Says, once a command, what `auto` falls back to for these models, and what `ran` where that is known by now."""
    from dllm_sparse.sparsity.backends import fallback

    here = f"; here: {', '.join(ran)}" if ran else ""
    for sentence in dict.fromkeys(fallback(backend, lm) for lm in models):
        if sentence is not None:
            output.say(f"backend auto falls back to {sentence}{here}")


def has_chat_template(lm: LanguageModel) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return bool(getattr(lm.tokenizer, "chat_template", None))
