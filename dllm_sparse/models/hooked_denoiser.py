"""DiffusionGemma behind the native network's interface: an encoder that caches what is decided, a decoder that denoises
a canvas of random tokens behind it. Generation is transformers' own; two seams of its loop are watched.

Encoder and decoder share their weights, so a layer's FFN is one site, wherever it runs. The decoder's self-conditioning
has an FFN of its own before the layers; it belongs to none of them and stays dense.
Shapes: B rows, T tokens fed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparse.models.hooked import HookedCache, HookedConfig, HookedTransformer, hooked_attentions, hooked_ffns
from dllm_sparse.models.layouts import Found, find_ffns
from dllm_sparse.types import Step, StepContext, TokenClass, UnsupportedArchitecture, UsageError

DENOISERS = {"diffusion_gemma": "DiffusionGemmaForBlockDiffusion"}
"""transformers' block-diffusion classes with uniform noise, by `model_type`."""

_SEAMS = ("_denoising_step", "_prepare_generation_config")
"""What of transformers' generation loop is watched; not public there, so their presence is checked."""


@dataclass(slots=True)
class Encoded(HookedCache):
    """What the encoder has read: its keys and values, and the 0/1 mask [B, T] of its tokens (None: all real)."""

    mask: Tensor | None = None


class HookedDenoiser(HookedTransformer):
    """A uniform-noise block-diffusion model: `forward` gives the decoder's logits of one canvas."""

    def __init__(self, model: Any, config: HookedConfig, found: tuple[Found, Found]) -> None:
        decoder, encoder = found
        super().__init__(model, config, decoder)
        if missing := [name for name in _SEAMS if not hasattr(model, name)]:
            raise UnsupportedArchitecture(
                f"the installed transformers' {type(model).__name__} has no {missing[0]}; its generation loop cannot "
                "be watched. transformers 5.23 and 5.24 are known to work"
            )
        self._encoder = encoder
        for here, there in zip(self.ffns, hooked_ffns(self, encoder), strict=True):
            here.twin = there

    @property
    def attentions(self) -> Sequence[Any]:
        """The decoder's, as in any network; what is tapped in them is tapped in the encoder's."""
        if self._attentions is None:
            self._attentions = hooked_attentions(self, self.found)
            for here, there in zip(self._attentions, hooked_attentions(self, self._encoder), strict=True):
                here.twin = there
        return self._attentions

    def generation_config(self, **options: Any) -> Any:
        """transformers' generation configuration: the options given, else the checkpoint's, else its defaults."""
        return self.model._prepare_generation_config(None, **options)[0]  # type: ignore[operator]

    def new_cache(self, batch: int, length: int) -> Any:
        """Refused: what a canvas is denoised behind comes from `encode`."""
        raise UsageError(f"{self.config.architecture} reads its prompt with `encode`, not token by token")

    def encode(self, ids: Tensor, attention_mask: Tensor | None, context: StepContext) -> Encoded:
        """Reads what is decided, ids [B, T] from position 0 on."""
        from transformers import DynamicCache

        model: Any = self.model
        past = DynamicCache(config=model.config.get_text_config(decoder=True))
        with self.running(context):
            model.model.encoder(input_ids=ids, attention_mask=attention_mask, cache=past)
        return Encoded(past, ids.shape[1], attention_mask)

    def forward(
        self,
        ids: Tensor,
        *,
        start: int = 0,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        rows: slice | Tensor = slice(None),
        context: StepContext | None = None,
    ) -> Tensor:
        """Logits [B, rows, V] (or [N, V] for flat indices) of a canvas `ids` [B, T] behind an `Encoded` prompt.

        Without one it stands behind BOS alone, which is not counted. No self-conditioning, as in a first step.
        """
        if context is None:
            context = StepContext(Step(0, 1), _classes(ids, TokenClass.MASKED), start)
        if cache is None:
            cache = self._encoded_bos(ids, context)
        mask = None
        if attention_mask is not None or cache.mask is not None:
            before = ids.new_ones(ids.shape[0], cache.length) if cache.mask is None else cache.mask
            mask = torch.cat((before, torch.ones_like(ids) if attention_mask is None else attention_mask), dim=1)
        with self.running(context), self._only(rows):
            logits: Tensor = self.model(decoder_input_ids=ids, cache=cache.past, decoder_attention_mask=mask).logits
        return logits if isinstance(rows, slice) else logits[0]

    def _encoded_bos(self, ids: Tensor, context: StepContext) -> Encoded:
        bos = self.config.bos_token_id
        first = torch.full_like(ids[:, :1], bos if bos is not None else self.config.pad_token_id or 0)
        return self.encode(first, None, StepContext(context.step, _classes(first, TokenClass.PADDING)))

    @contextmanager
    def watched(
        self,
        encoding: Callable[[Tensor], StepContext],
        denoising: Callable[[Callable[..., Any], dict[str, Any]], Any],
    ) -> Iterator[None]:
        """Inside the block transformers' `generate` asks before the encoder reads ids [B, T], and has every denoising
        step run by `denoising(its own step, its arguments)`, which returns what the step returned."""
        model: Any = self.model
        encoder: nn.Module = model.model.encoder

        def before(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
            self.context = encoding(arguments["input_ids"])

        def after(*_: Any) -> None:
            self.context = None

        with ExitStack() as undo:
            undo.callback(after)
            undo.callback(encoder.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(encoder.register_forward_hook(after).remove)
            model._denoising_step = partial(_run, denoising, model._denoising_step)
            undo.callback(delattr, model, "_denoising_step")
            yield


def find_denoiser_ffns(model: Any, text: Any) -> tuple[Found, Found]:
    """The FFNs of the decoder and, layer by layer the same weights, of the encoder."""
    parts = (model.model.decoder, model.model.encoder.language_model)
    decoder, encoder = (find_ffns(part, text.model_type, text.num_hidden_layers, text.hidden_size) for part in parts)
    return decoder, encoder


def _run(denoising: Callable[..., Any], step: Callable[..., Any], **arguments: Any) -> Any:
    return denoising(step, arguments)


def _classes(ids: Tensor, kind: TokenClass) -> Tensor:
    return torch.full(ids.shape, kind, dtype=torch.int8, device=ids.device)
