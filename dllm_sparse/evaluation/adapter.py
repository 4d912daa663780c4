"""lm-eval's model `dllm-sparse`: both kinds of model, dense or sparsified, on any lm-eval task.

lm-eval 0.4 finds models in its own registry only, and nothing third-party is imported by the plain `lm-eval` program.
So `python -m dllm_sparse.evaluation` is `lm-eval` with this model registered: the same options, the same output.
In Python, `import dllm_sparse.evaluation.adapter` before `lm_eval.simple_evaluate(model="dllm-sparse", ...)` is enough.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dllm_sparse.evaluation.jobs import Measured
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.processes import Processes, join
from dllm_sparse.evaluation.scorer import Answer, Request, RequestKind, Scorer
from dllm_sparse.models.loading import EngineChoice, load
from dllm_sparse.samplers.config import SamplerConfig
from dllm_sparse.sparsity.config import SparsityConfig
from dllm_sparse.types import UsageError

_IGNORED = ("batch_size", "max_batch_size")  # lm-eval always passes them; batches follow from batch_tokens


@register_model("dllm-sparse")
class DllmSparseLM(LM):  # type: ignore[misc]
    """A model by alias, folder or hub id under optional sparsity.

    `p` switches sparsity on; every field of SparsityConfig, ScoringOptions and SamplerConfig is an argument, and
    decoding arguments apply where `gen_length` is given (else a task's own length decides). `seed` is the seed of both
    estimate and decoding. Raises UsageError for unknown arguments.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        engine: EngineChoice = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        processes, own_device = join(str(device or "auto"))
        self._rank, self._world_size = processes.rank, processes.world
        options = {name: value for name, value in options.items() if name not in _IGNORED}
        scoring, sampler, sparsity = _split(options)
        revision = None if revision is None else str(revision)  # lm-eval has made a number of what looks like one
        report = None if processes.first else lambda _: None  # one process speaks for all
        self.lm = load(str(pretrained), device=own_device, dtype=dtype, revision=revision, engine=engine, report=report)
        self._device = self.lm.device
        # lm-eval deals documents to the processes itself; each scores its own share.
        self.scorer = Scorer(self.lm, scoring, sampler, Processes.alone())
        self.sparsity = sparsity
        self.measured = Measured()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, is greedy) of each (context, continuation)."""
        return self._answers("loglikelihood", requests)  # type: ignore[return-value]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text."""
        return self._answers("loglikelihood_rolling", requests)  # type: ignore[return-value]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text behind each context, up to its first stop string."""
        return self._answers("generate_until", requests)  # type: ignore[return-value]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the configuration in its results: settings, and the sparsity measured so far."""
        return {
            "model_dtype": str(self.lm.dtype),
            "model_num_parameters": self.lm.config.parameters,
            "scoring": self.scorer.options.identity(),
            "sparsity": None if self.sparsity is None else self.sparsity.to_dict(),
            "measured": self.measured.to_dict(),
        }

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's request cache."""
        return self.lm.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the tokenizer's template writes it."""
        return self.lm.chat_text(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template."""
        return getattr(self.scorer.encoder.tokenizer, "chat_template", None)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everybody's tensor, concatenated along a new first axis."""
        if self._world_size == 1:
            return tensor
        gathered = [torch.zeros_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Everybody's object, in process `dst`."""
        if self._world_size == 1:
            return [obj]
        everyone: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, everyone, dst=dst)
        return everyone

    def barrier(self) -> None:
        """Waits for everybody."""
        if self._world_size > 1:
            dist.barrier()

    def _answers(self, kind: RequestKind, requests: list[Any]) -> list[Answer]:
        greedy = _reads_greedy(requests)
        asked = [Request(kind, tuple(one.args), greedy=reads) for one, reads in zip(requests, greedy, strict=True)]
        answers, measured = self.scorer.run(self.scorer.prepare(asked), self.sparsity)
        self.measured.merge(measured)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def _reads_greedy(requests: list[Any]) -> list[bool]:
    """Where a score may read is_greedy: in likelihood tasks, not among the choices of a multiple-choice document."""
    asked = Counter((request.task_name, request.doc_id) for request in requests)
    return [asked[request.task_name, request.doc_id] == 1 for request in requests]


def _split(options: dict[str, Any]) -> tuple[ScoringOptions, SamplerConfig | None, SparsityConfig | None]:
    """Arguments dealt to the three configurations by the names of their fields."""
    known = {kind: {field.name for field in fields(kind)} for kind in (ScoringOptions, SamplerConfig, SparsityConfig)}
    unknown = sorted(set(options) - set().union(*known.values()))
    if unknown:
        everything = ", ".join(sorted(set().union(*known.values())))
        raise UsageError(
            f"unknown model argument {unknown[0]!r}; known: pretrained, device, dtype, revision, {everything}"
        )
    chosen = {kind: {name: value for name, value in options.items() if name in names} for kind, names in known.items()}
    scoring = ScoringOptions(**chosen[ScoringOptions])
    sampler = SamplerConfig(**chosen[SamplerConfig]) if "gen_length" in options else None
    sparsity = SparsityConfig(**chosen[SparsityConfig]) if "p" in options else None
    return scoring, sampler, sparsity
