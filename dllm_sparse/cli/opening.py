"""Loading the model a command asked for, and saying what it is and how it will be run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_sparse.cli.output import Output

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.models.loading import EngineChoice


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


def has_chat_template(lm: LanguageModel) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return bool(getattr(lm.tokenizer, "chat_template", None))
