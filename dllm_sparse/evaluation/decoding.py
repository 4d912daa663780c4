"""Generation requests: prompts of similar length decoded together, and the text before the first stop string."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dllm_sparse.evaluation.jobs import DecodeJob
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.plans import token_budget
from dllm_sparse.evaluation.requests import Encoder, Pair
from dllm_sparse.generation import before_end, left_padded
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.samplers.loops import draws, fitted
from dllm_sparse.types import UsageError

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256  # lm-eval's
_BLOCK = 32  # the largest block tried when the request alone decides the length


class Text(NamedTuple):
    """One generation request: prompt ids, how to decode, and where to stop."""

    prompt: tuple[int, ...]
    sampler: SamplerConfig
    until: tuple[str, ...]

    @classmethod
    def from_request(
        cls,
        lm: LanguageModel,
        encoder: Encoder,
        context: str,
        options: Mapping[str, Any],
        sampler: SamplerConfig | None,
    ) -> Text:
        """Reads lm-eval's generation options. A `sampler` overrides their length; unknown options are errors."""
        known = dict(options)
        until = known.pop("until", None) or ()
        lengths = [known.pop(name, None) for name in _LENGTH_NAMES]
        length = next((int(value) for value in lengths if value is not None), _DEFAULT_LENGTH)
        sampling = bool(known.pop("do_sample", False))
        temperature = float(known.pop("temperature", 0.0) or 0.0)
        if known:
            raise UsageError(f"generation option {json.dumps(sorted(known))} is not supported here")
        if sampler is None:
            sampler = default_sampler(lm, length)
        heat = temperature if sampling else sampler.temperature
        sampler = fitted(lm, replace(sampler, temperature=heat, stop_at_eos=True))
        prompt = encoder.encode(context) or ([] if encoder.prefix is None else [encoder.prefix])
        room = encoder.max_length - sampler.gen_length
        if room < 1 or not prompt:
            raise UsageError(
                f"gen_length {sampler.gen_length} leaves no room in a context of {encoder.max_length}; allowed: less"
            )
        return cls(tuple(prompt[-room:]), sampler, (until,) if isinstance(until, str) else tuple(until))


def default_sampler(lm: LanguageModel, length: int) -> SamplerConfig:
    """What decodes a request that says no more than its length: blocks that divide it, or the model's own."""
    if lm.config.block_length is not None or lm.noise == "uniform":
        return SamplerConfig(gen_length=length)
    block = max(size for size in range(1, min(_BLOCK, length) + 1) if length % size == 0)
    return SamplerConfig(gen_length=length, block_length=block)


def decode_jobs(
    lm: LanguageModel, texts: Sequence[Text], options: ScoringOptions
) -> tuple[list[DecodeJob], list[list[int]]]:
    """Jobs, and which texts their rows are. Random decoding gets a job per text, seeded by the request."""
    groups: dict[SamplerConfig, list[int]] = {}
    for index, text in enumerate(texts):
        sampler = text.sampler
        if draws(lm, sampler):
            sampler = replace(sampler, seed=Pair(text.prompt, ()).seed(sampler.seed))
        groups.setdefault(sampler, []).append(index)
    jobs, rows = [], []
    for sampler, members in groups.items():
        ordered = sorted(members, key=lambda index: -len(texts[index].prompt))
        for part in _parts(ordered, [len(text.prompt) + sampler.gen_length for text in texts], lm, options):
            prompts, mask = left_padded(lm, [texts[index].prompt for index in part])
            jobs.append(DecodeJob(prompts, mask, sampler))
            rows.append(part)
    return jobs, rows


def greedy_jobs(
    lm: LanguageModel, pairs: Sequence[Pair], options: ScoringOptions
) -> tuple[list[DecodeJob], list[list[int]]]:
    """Greedy decodings of each pair's prompt, exactly as long as its target, most confident position first."""
    jobs, rows = [], []
    groups: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(len(pair.target), []).append(index)
    for length, members in sorted(groups.items()):
        block = lm.config.block_length or length
        sampler = SamplerConfig(gen_length=length, block_length=block, cfg_scale=options.cfg_scale)
        ordered = sorted(members, key=lambda index: -len(pairs[index].prompt))
        for part in _parts(ordered, [len(pair.prompt) + length for pair in pairs], lm, options):
            prompts, mask = left_padded(lm, [pairs[index].prompt for index in part])
            jobs.append(DecodeJob(prompts, mask, sampler))
            rows.append(part)
    return jobs, rows


def text_before_stop(lm: LanguageModel, ids: Sequence[int], asked: Text) -> str:
    """What was generated before the end of text and before the first stop string."""
    assert lm.tokenizer is not None
    text = str(lm.tokenizer.decode(before_end(lm, ids, asked.sampler), skip_special_tokens=True))
    for stop in asked.until:
        if stop:
            text = text.split(stop)[0]
    return text


def _parts(
    ordered: Sequence[int], lengths: Sequence[int], lm: LanguageModel, options: ScoringOptions
) -> list[list[int]]:
    """Consecutive members (longest first) whose canvases fit one forward; at least one each."""
    budget = token_budget(lm, options)
    parts: list[list[int]] = []
    for index in ordered:
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts
