"""From texts to token ids: one scoring request is a prompt and a target, and its seed is a hash of the two.

Nothing else enters the seed, so the order of requests, the batch and the number of processes change no result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from dllm_sparse.samplers.schedule import block_spans
from dllm_sparse.types import UsageError

if TYPE_CHECKING:
    from dllm_sparse.models.language_model import LanguageModel


class Pair(NamedTuple):
    """One scoring request: log p(target | prompt). `greedy` asks whether greedy decoding would give the target."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    greedy: bool = False

    def seed(self, base: int) -> int:
        """A 63-bit seed from the ids and a base seed."""
        text = f"{base}|{','.join(map(str, self.prompt))}|{','.join(map(str, self.target))}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def blocks_of(pair: Pair, length: int) -> list[Pair]:
    """The chain of a block-causal model: each block's part of the target behind everything before it, all of it known.

    Blocks are counted from the prompt's first token; the end of a prompt shares one with the target's first tokens.
    """
    whole, start = pair.prompt + pair.target, len(pair.prompt)
    return [Pair(whole[:begin], whole[begin:end]) for begin, end in block_spans(start, len(whole), length)]


class Encoder:
    """Token ids of lm-eval's requests, under lm-eval's own conventions (`TemplateLM`, `hf` model)."""

    def __init__(self, lm: LanguageModel, max_length: int | None = None) -> None:
        if lm.tokenizer is None:
            raise UsageError(f"{lm.name} has no tokenizer; tasks are made of text")
        self.tokenizer, self._token_ids = lm.tokenizer, lm.token_ids
        self.diffusion = lm.kind == "diffusion"
        self.max_length = min(max_length or lm.config.max_positions, lm.config.max_positions)
        ids = (
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            lm.config.bos_token_id,
            lm.config.eos_token_id,
        )
        self.prefix: int | None = next((int(token) for token in ids if token is not None), None)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; `special` lets the tokenizer add what it adds by default (a BOS, usually)."""
        if special and self.prefix is not None and text.startswith(str(self.tokenizer.decode([self.prefix]))):
            special = False
        return self._token_ids(text, **({} if special else {"add_special_tokens": False}))

    def pair(self, context: str, continuation: str, *, greedy: bool = False) -> Pair:
        """Splits the ids of context + continuation where those of the context end; spaces go to the continuation.

        An empty context is replaced by the prefix token (BOS, else EOS); prompts too long lose their beginning.
        """
        if not context:
            target = self.encode(continuation, special=False)
            prompt = [] if self.prefix is None else [self.prefix]
            if prompt and target[:1] == prompt:
                target = target[1:]
        else:
            stripped = context.rstrip()
            spaces = context[len(stripped) :]
            prompt = self.encode(stripped)
            target = self.encode(stripped + spaces + continuation)[len(prompt) :]
        room = self.max_length + (0 if self.diffusion else 1) - len(target)
        if room < 0:
            raise UsageError(f"a continuation of {len(target)} tokens exceeds the context of {self.max_length}")
        return Pair(tuple(prompt[len(prompt) - room :] if len(prompt) > room else prompt), tuple(target), greedy)

    def windows(self, text: str) -> list[Pair]:
        """Disjoint targets that cover a text, each behind as much context as fits (one token between full windows)."""
        if self.prefix is None:
            raise UsageError("the tokenizer has neither BOS nor EOS; rolling likelihood needs a first token")
        return [Pair(tuple(prompt), tuple(target)) for prompt, target in _windows(self, self.encode(text))]


def _windows(encoder: Encoder, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """lm-eval's rolling windows with one token of context, made disjoint.

    A causal model of length M predicts M tokens behind one; a diffusion model sees prompt and target at once, so one
    fewer.
    """
    assert encoder.prefix is not None
    length = encoder.max_length - (1 if encoder.diffusion else 0)
    yield [encoder.prefix], ids[:length]
    done = min(length, len(ids))
    while done < len(ids):
        end = min(done + length, len(ids))
        # The last window is filled up with context to the full length.
        yield ids[end - length - 1 : done], ids[done:end]
        done = end
