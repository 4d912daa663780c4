"""The scorer: lm-eval's three kinds of request, answered by one model, dense or sparsified, on any number of processes.

Requests are prepared once (tokenised, deduplicated, cut into jobs) and can then be run at every point of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dllm_sparse.evaluation.decoding import Text, decode_jobs, greedy_jobs, text_before_stop
from dllm_sparse.evaluation.jobs import Advance, DecodeJob, Measured, ScoreJob, check_scores, run_jobs
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.plans import plan
from dllm_sparse.evaluation.processes import Processes
from dllm_sparse.evaluation.requests import Encoder, Pair
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.types import UsageError

RequestKind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
Answer = tuple[float, bool] | float | str
"""(nats, is greedy), nats of a whole text, or generated text, by kind of request."""


class Request(NamedTuple):
    """One lm-eval request: (context, continuation), (text,) or (context, generation options)."""

    kind: RequestKind
    arguments: tuple[Any, ...]
    greedy: bool = False


@dataclass(slots=True)
class Prepared:
    """Requests in the form that is run: unique pairs and texts, where each request finds its answer, and the jobs."""

    kinds: list[RequestKind]
    where: list[list[int]]  # indices into pairs (several for a rolling text) or the index of a text
    pairs: list[Pair]
    texts: list[Text]
    greedy: list[int]  # pairs that need a greedy decoding of their own
    jobs: dict[bool, list[ScoreJob]] = field(default_factory=dict)  # by whether prompts are shared
    decodings: list[DecodeJob] = field(default_factory=list)
    order: list[list[int]] = field(default_factory=list)  # rows of the decodings: greedy pairs, then texts


class Scorer:
    """Answers requests with one model. `options` and `sampler` decide results, `processes` only who computes them."""

    def __init__(
        self,
        lm: LanguageModel,
        options: ScoringOptions | None = None,
        sampler: SamplerConfig | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.lm = lm
        self.options = options or ScoringOptions()
        self.sampler = sampler
        self.processes = processes or Processes()
        self.encoder = Encoder(lm, self.options.max_length)

    def prepare(self, requests: Sequence[Request]) -> Prepared:
        """Tokenises, merges equal requests and plans the jobs. Raises UsageError for what does not fit."""
        pairs: dict[Pair, int] = {}
        texts: dict[Text, int] = {}
        where = []
        for request in requests:
            if request.kind == "generate_until":
                text = self._text(*request.arguments)
                where.append([texts.setdefault(text, len(texts))])
            else:
                found = self._pairs(request)
                where.append([pairs.setdefault(pair, len(pairs)) for pair in found])
        prepared = Prepared([request.kind for request in requests], where, list(pairs), list(texts), [])
        if self.lm.noise == "uniform" and any(pair.greedy for pair in pairs):
            raise UsageError(f"the task asks what greedy decoding gives; {self.lm.name} decodes by drawing at random")
        if self.lm.noise == "mask":
            prepared.greedy = [index for index, pair in enumerate(pairs) if pair.greedy and len(pair.target) > 1]
        wanted = [prepared.pairs[index] for index in prepared.greedy]
        first, first_rows = greedy_jobs(self.lm, wanted, self.options)
        second, second_rows = decode_jobs(self.lm, prepared.texts, self.options)
        prepared.decodings = [*first, *second]
        prepared.order = [*first_rows, *second_rows]
        return prepared

    def run(
        self, prepared: Prepared, sparsity: SparsityConfig | None = None, advance: Advance | None = None
    ) -> tuple[list[Answer], Measured]:
        """Answers in the order of the requests, and the sparsity measured; every process gets both.

        Raises NonFiniteActivations for NaN or Inf.
        """
        # Only what no later token changes can be shared; a bidirectional model has one plan for every scope.
        token_masks = sparsity is None or sparsity.scope == "token"
        bidirectional = self.lm.kind == "diffusion" and self.lm.config.block_length is None
        shared = bidirectional or (self.lm.transformer.shares_prefixes and token_masks)
        if shared not in prepared.jobs:
            batches = plan(self.lm, prepared.pairs, self.options, share_prompts=shared)
            cfg_scale = self.options.cfg_scale if self.lm.kind == "diffusion" else 0.0
            prepared.jobs[shared] = [ScoreJob(batch, cfg_scale) for batch in batches]
        scoring = prepared.jobs[shared]
        results, measured = run_jobs(self.lm, [*scoring, *prepared.decodings], sparsity, self.processes, advance)
        check_scores(self.lm, scoring, results[: len(scoring)], sparsity)
        values, greedy = _sum_rows(scoring, results, len(prepared.pairs))
        generated = [row for (ids,) in results[len(scoring) :] for row in ids.tolist()]
        self._judge_greedy(prepared, generated, greedy)
        texts = self._texts(prepared, generated)
        return [
            _answer(kind, places, values, greedy, texts)
            for kind, places in zip(prepared.kinds, prepared.where, strict=True)
        ], measured

    def _pairs(self, request: Request) -> list[Pair]:
        if request.kind == "loglikelihood_rolling":
            return self.encoder.windows(str(request.arguments[0]))
        context, continuation = request.arguments
        wanted = request.greedy and self.options.check_greedy
        return [self.encoder.pair(str(context), str(continuation), greedy=wanted)]

    def _text(self, context: str, options: Mapping[str, Any]) -> Text:
        return Text.from_request(self.lm, self.encoder, context, options, self.sampler)

    def _judge_greedy(self, prepared: Prepared, generated: list[list[int]], greedy: list[bool]) -> None:
        rows = [index for part in prepared.order for index in part][: len(prepared.greedy)]
        for row, ids in zip(rows, generated, strict=False):
            index = prepared.greedy[row]
            greedy[index] = tuple(ids) == prepared.pairs[index].target
        if self.lm.kind == "diffusion":
            # What the rows of a Monte-Carlo estimate found likely says nothing about greedy decoding.
            exact = 1 if self.lm.noise == "mask" else 0  # longest target whose copies are all alike
            decided = {*prepared.greedy, *(i for i, pair in enumerate(prepared.pairs) if len(pair.target) <= exact)}
            greedy[:] = [value and index in decided for index, value in enumerate(greedy)]

    def _texts(self, prepared: Prepared, generated: list[list[int]]) -> list[str]:
        rows = [index for part in prepared.order for index in part][len(prepared.greedy) :]
        decoded: list[str] = [""] * len(prepared.texts)
        for row, ids in zip(rows, generated[len(prepared.greedy) :], strict=True):
            decoded[row] = text_before_stop(self.lm, ids, prepared.texts[row])
        return decoded


def _sum_rows(
    jobs: Sequence[ScoreJob], results: Sequence[tuple[torch.Tensor, ...]], pairs: int
) -> tuple[list[float], list[bool]]:
    """Per pair: the sum of its rows' values in row order (fp64, sequential), and whether all rows were greedy."""
    if not jobs:
        return [0.0] * pairs, [True] * pairs
    owners = np.concatenate([job.batch.owners.numpy() for job in jobs])
    scored = results[: len(jobs)]
    values = np.concatenate([value.numpy() for value, _ in scored])
    missed = np.concatenate([~greedy.numpy() for _, greedy in scored])
    sums = np.bincount(owners, weights=values, minlength=pairs)
    bad = np.bincount(owners, weights=missed, minlength=pairs)
    return sums.tolist(), (bad == 0).tolist()


def _answer(kind: RequestKind, places: list[int], values: list[float], greedy: list[bool], texts: list[str]) -> Answer:
    if kind == "generate_until":
        return texts[places[0]]
    if kind == "loglikelihood_rolling":
        return math.fsum(values[place] for place in places)
    return values[places[0]], greedy[places[0]]
