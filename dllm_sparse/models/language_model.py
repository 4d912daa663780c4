"""A transformer with what a user needs around it: a name, a kind, a tokenizer read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import CheckpointError, Kind, Step, StepContext, TokenClass, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Engine = Literal["native", "transformers"]
Noise = Literal["mask", "uniform"]


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
        self.graphs_lock = Lock()  # held while they decode: they share buffers, so another thread waits
        self._tokenizer, self._read_tokenizer = tokenizer, read_tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, read on first use; None where the folder has none. Raises CheckpointError if it is broken."""
        if self._read_tokenizer is not None:
            self._tokenizer, self._read_tokenizer = self._read_tokenizer(), None
        return self._tokenizer

    def token_ids(self, text: str, **options: Any) -> list[int]:
        """Ids of a text by the tokenizer (`options` are its own). Raises CheckpointError for ids the model has not."""
        assert self.tokenizer is not None
        ids = list(self.tokenizer(text, **options)["input_ids"])
        if ids and max(ids) >= self.config.vocab_size:
            raise CheckpointError(
                f"{self.name}: the tokenizer gives token {max(ids)}, but the model knows {self.config.vocab_size}; "
                "tokenizer and weights do not belong together"
            )
        return ids

    def check_ids(self, name: str, ids: Tensor) -> None:
        """Raises UsageError for ids [...] int64 that are none of the vocabulary: looking those up ends in a crash."""
        for one in torch.stack(ids.aminmax()).tolist() if ids.numel() else ():  # one wait, where they are on a GPU
            if not 0 <= one < self.config.vocab_size:
                raise UsageError(f"{name}: there is no token {one}; {self.name} has 0 to {self.config.vocab_size - 1}")

    def chat_text(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """A conversation as the tokenizer's chat template writes it. Raises CheckpointError for a broken template."""
        assert self.tokenizer is not None
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # templates are programs, and fail in as many ways
            raise CheckpointError(f"{self.name}: the chat template fails ({error}); use --no-chat") from error

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token; None for an autoregressive or a uniform-noise model."""
        return self.config.mask_token_id

    @property
    def noise(self) -> Noise | None:
        """What a diffusion model denoises: mask tokens, or tokens drawn uniformly; None for an autoregressive model."""
        if self.kind == "autoregressive":
            return None
        return "uniform" if self.mask_token_id is None else "mask"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the logits unless `config.float32_logits`."""
        return self.transformer.embedding.weight.dtype

    @torch.no_grad()  # not inference_mode: its tensors cannot be changed in place by the caller
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Raw logits [B, L, V] in the model's dtype, no shift, for ids [B, L] int64 and an optional 0/1 mask [B, L].

        In fp32 where `config.float32_logits`. Raises UsageError for ids outside the vocabulary; those on a GPU are
        not checked, as in torch: that would wait for it, which a CUDA graph under capture may not.
        """
        if ids.device.type == "cpu":
            self.check_ids("ids", ids)
        ids = ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        context = StepContext(Step(0, 1), token_classes(ids, mask, self.mask_token_id))
        options: dict[str, Any] = {"attention_mask": mask, "positions": self.positions(mask), "context": context}
        return self.transformer(ids, **options)  # type: ignore[no-any-return]

    def predictions(self, ids: Tensor, rows: slice | Tensor, **options: Any) -> Tensor:
        """Logits FOR the tokens at `rows` of ids [B, T]: [B, R, V] of a slice of each row, [N, V] of flat indices [N].

        Where position i predicts token i+1 (`logit_shift`), they come from the position before; the first one fed has
        none and answers for itself, as in Dream. `options` are those of `Transformer.forward`.
        """
        if not self.config.logit_shift:
            return self.transformer(ids, rows=rows, **options)  # type: ignore[no-any-return]
        batch, tokens = ids.shape
        if isinstance(rows, slice):
            places = torch.arange(batch * tokens, device=ids.device).view(batch, tokens)[:, rows]
            return self.predictions(ids, places.flatten(), **options).view(*places.shape, -1)
        before = rows - (rows % tokens > 0).long()
        return self.transformer(ids, rows=before, **options)  # type: ignore[no-any-return]

    def positions(self, attention_mask: Tensor | None) -> Tensor | None:
        """Rotary positions [B, L] of left-padded rows; None where canvas positions serve (LLaDA counts padding)."""
        if attention_mask is None or not (self.config.causal or self.config.text_positions):
            return None
        return rotary_positions(attention_mask)


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
