"""How text is decoded: one frozen, validated description for both kinds of model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dllm_sparse.fields import check_fields, check_names
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.types import UsageError

Remasking = Literal["low_confidence", "random", "entropy", "maskgit_plus", "topk_margin", "origin"]
Cache = Literal["none", "prefix", "dual"]
ConfidenceDtype = Literal["model", "float32", "float64"]
Execution = Literal["auto", "eager", "graph"]


_TIMESTEP_RULES: tuple[Remasking, ...] = ("entropy", "maskgit_plus", "topk_margin", "origin")
_TIMESTEP_OPTIONS: Mapping[str, Any] = {"alg_temp": 0.0, "eps": 1e-3}
_SAMPLING_OPTIONS: Mapping[str, Any] = {"top_p": None, "top_k": None}
_EDITING_OPTIONS: Mapping[str, Any] = {"max_post_steps": 16}
_BLOCK_CAUSAL_OPTIONS: Mapping[str, Any] = {"minimal_topk": 1, "editing_threshold": None, **_EDITING_OPTIONS}
_DEFAULT_BLOCK = 32
_RANGED = ("temperature", "cfg_scale", "alg_temp")
_PROBABILITIES = ("threshold", "editing_threshold")


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """Decoding options under LLaDA's names (arXiv 2502.09992, app. B.4); Fast-dLLM's for cache, threshold, factor.

    Diffusion: `gen_length` masks are decoded in blocks of `block_length`, `steps` (None: one per token) split evenly
    over the blocks. `threshold` commits every masked token of the block at least that confident (always the best one),
    `factor` uses Fast-dLLM's factor rule; both ignore `steps`. `confidence_dtype` is the type of the confidence
    softmax: the model's (LLaDA) or float64 (Fast-dLLM).

    Dream's rules (arXiv 2508.15487) serve any diffusion model: remasking "entropy" (its negative), "maskgit_plus"
    (probability) and "topk_margin" (best minus second) name the confidence by which each step commits its share of the
    masks left, on the way from time 1 to `eps`; `alg_temp` > 0 draws positions in proportion to
    exp(confidence / alg_temp) instead. "origin" commits each mask with that share as probability. `top_p` and `top_k`
    restrict the tokens. Without a cache the canvas is one block: `block_length` becomes `gen_length`, and any other but
    the default is refused. With one, every block runs through the times. A `threshold` (with "maskgit_plus" Fast-dLLM's
    decoding for Dream) ignores `steps` behind a cache; without one they are its budget: a step commits at most its even
    part of the masks and what earlier steps left of theirs, and more steps follow if masks are left.

    A block-causal model (LLaDA2, SDAR) decodes in its own blocks, which need not divide `gen_length`; `block_length` is
    left at its default or names them, and `steps` are split over ceil(gen_length / block). A step commits the tokens
    surer than `threshold`, or where those are fewer its quota of the surest, at least `minimal_topk`.
    `editing_threshold` lets a step rewrite the block's decoded tokens that it is surer about, for up to
    `max_post_steps` more steps once none is masked (LLaDA2.1). `top_k`, then `top_p` restrict the tokens sampled at a
    temperature, and are refused without one; confidence is the probability under that distribution.

    Autoregressive: only gen_length, temperature, stop_at_eos, the eos ids, execution and seed are used.

    Extras that are off by default: `stop_at_eos` ends a row that holds an end of text in its finished blocks (what
    follows is filled with EOS, or with the pad id by an autoregressive model) and a generation once all rows have;
    `early_block_exit` skips the forwards of a block that has no mask left. `execution` says how forwards are executed:
    "eager" layer by layer, "graph" as captured CUDA graphs with fused layers, "auto" the faster one that can.
    Raises UsageError for impossible values.
    """

    gen_length: int = 128
    steps: int | None = None
    block_length: int = _DEFAULT_BLOCK
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    cache: Cache = "none"
    threshold: float | None = None
    factor: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    confidence_dtype: ConfidenceDtype = "model"
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    stop_at_eos: bool = False
    early_block_exit: bool = False
    execution: Execution = "auto"
    seed: int = 0
    alg_temp: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    eps: float = 1e-3
    minimal_topk: int = 1
    editing_threshold: float | None = None
    max_post_steps: int = 16

    def __post_init__(self) -> None:
        check_fields(self, ranged=(*_RANGED, *_PROBABILITIES, "top_p", "factor"))
        for name in ("gen_length", "block_length", "top_k", "minimal_topk", "max_post_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        for name in _RANGED:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} is {value}; it must be a number of at least 0 (for example 0.0)")
        for name in _PROBABILITIES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}; allowed: 0 to 1 (for example 0.9)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; allowed: above 0, at most 1 (for example 0.95)")
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise UsageError(f"factor is {self.factor}; it must be above 0 (for example 1.0)")
        if self.threshold is not None and self.factor is not None:
            raise UsageError("threshold and factor are two rules for the same choice; give one of them")
        if self.by_timesteps:
            self._check_timesteps()
            if self.cache == "none":
                self._take_whole_canvas()
        if not self.by_timesteps:
            self._refuse(_TIMESTEP_OPTIONS, f"remasking {self.remasking!r}", ", ".join(_TIMESTEP_RULES))

    def _refuse(self, options: Mapping[str, Any], user: str, users: str) -> None:
        """Raises UsageError for an option away from its default that its user has no use for."""
        for name, default in options.items():
            if getattr(self, name) != default:
                raise UsageError(f"{name} is {getattr(self, name)}, but {user} does not use it; those that do: {users}")

    def _check_timesteps(self) -> None:
        if not 0 <= self.eps < 1:
            raise UsageError(f"eps is {self.eps}; allowed: from 0, below 1 (for example 0.001)")
        if not self.by_quota and self.remasking in ("entropy", "origin"):
            raise UsageError(
                f"remasking {self.remasking!r} has no confidence between 0 and 1 to compare with threshold or factor; "
                "try remasking 'maskgit_plus'"
            )
        if not self.by_quota and self.alg_temp > 0:
            raise UsageError("alg_temp draws a planned number of positions; threshold and factor plan none")
        if self.confidence_eos_eot_inf:
            raise UsageError(f"confidence_eos_eot_inf is for remasking 'low_confidence'; it is {self.remasking!r}")

    def _take_whole_canvas(self) -> None:
        """Dream's loop has no blocks: the default length means nothing there, and any other would be a mistake."""
        if self.block_length not in (_DEFAULT_BLOCK, self.gen_length):
            raise UsageError(
                f"block_length is {self.block_length}, but without a cache remasking {self.remasking!r} decodes the "
                f"{self.gen_length} tokens as one block; leave block_length out, or give cache 'prefix' or 'dual'"
            )
        object.__setattr__(self, "block_length", self.gen_length)

    def fitted(self, model: TransformerConfig) -> SamplerConfig:
        """The same options in the blocks a masked diffusion model decodes in; a block-causal one has its own.

        Raises UsageError for what this kind of diffusion model cannot do, as `check_blocks` does for the others.
        """
        if model.block_length is None:
            self._refuse(_BLOCK_CAUSAL_OPTIONS, "this model", "block-causal ones (LLaDA2, SDAR)")
            if not self.by_timesteps:
                self._refuse(_SAMPLING_OPTIONS, f"remasking {self.remasking!r}", ", ".join(_TIMESTEP_RULES))
            self.check_blocks()
            return self
        self._check_block_causal(model.block_length)
        own = replace(self, block_length=model.block_length)
        own._check_steps()
        return own

    def _check_block_causal(self, block_length: int) -> None:
        rules = {"remasking": ("low_confidence", "random"), "cache": ("none",), "confidence_eos_eot_inf": (False,)}
        for name, allowed in rules.items():
            if getattr(self, name) not in allowed:
                names = ", ".join(str(value) for value in allowed)
                raise UsageError(f"{name} is {getattr(self, name)}; a block-causal model allows: {names}")
        if self.block_length not in (_DEFAULT_BLOCK, block_length):
            raise UsageError(
                f"block_length is {self.block_length}, but this block-causal model decodes in its own blocks of "
                f"{block_length} tokens; leave block_length out (a checkpoint of other blocks names its block_size in "
                "config.json)"
            )
        if self.temperature == 0:
            self._refuse(_SAMPLING_OPTIONS, "greedy decoding", "decoding at a temperature above 0")
        if self.editing_threshold is None:
            self._refuse(_EDITING_OPTIONS, "decoding without editing_threshold", "decoding with one, such as 0.9")

    def check_blocks(self) -> None:
        """Raises UsageError, with a working suggestion, unless blocks divide the canvas and the steps."""
        if self.gen_length % self.block_length:
            suggestion = max(d for d in range(1, self.block_length + 1) if self.gen_length % d == 0)
            raise UsageError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}; "
                f"allowed: divisors of {self.gen_length}; try block_length {suggestion}"
            )
        self._check_steps()

    def _check_steps(self) -> None:
        blocks = self.blocks
        if self.steps is not None and (self.steps < blocks or self.steps % blocks):
            suggestion = max(round(self.steps / blocks), 1) * blocks
            raise UsageError(
                f"steps {self.steps} cannot be split over {blocks} blocks; allowed: multiples of {blocks}; "
                f"try steps {suggestion}"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks of the canvas."""
        return -(-self.gen_length // self.block_length)

    @property
    def steps_per_block(self) -> int:
        """Planned steps of one block; confidence-parallel decoding needs at most one per token."""
        return self.steps // self.blocks if self.steps and self.by_quota else self.block_length

    @property
    def by_quota(self) -> bool:
        """True where the number of tokens per step is planned rather than decided by confidence."""
        return self.threshold is None and self.factor is None

    @property
    def by_budget(self) -> bool:
        """True where `steps` plan how many tokens a threshold may have committed by then."""
        return self.by_timesteps and self.cache == "none" and self.threshold is not None and self.steps is not None

    @property
    def by_timesteps(self) -> bool:
        """True for Dream's rules."""
        return self.remasking in _TIMESTEP_RULES

    @property
    def draws(self) -> bool:
        """True where decoding depends on random numbers."""
        return self.temperature > 0 or self.alg_temp > 0 or self.remasking in ("random", "origin")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamplerConfig:
        """Inverse of `to_dict`; unknown keys raise UsageError."""
        check_names(cls, values, "unknown sampler option")
        return cls(**values)
