"""Log-likelihood of a continuation: the official Monte-Carlo estimator for diffusion, exact for autoregressive."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.fields import plain_arguments
from dllm_sparse.models.finite import locating, not_finite_logits
from dllm_sparse.models.language_model import LanguageModel, token_classes
from dllm_sparse.samplers.confidence import guide
from dllm_sparse.samplers.schedule import block_spans
from dllm_sparse.samplers.uniform_likelihood import canvases, check_guidance, denoised, noised
from dllm_sparse.types import Step, StepContext, UsageError


@plain_arguments
@torch.inference_mode()
def log_likelihood(
    lm: LanguageModel,
    prompt_ids: Tensor | list[int],
    target_ids: Tensor | list[int],
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    seed: int = 0,
) -> float:
    """log p(target | prompt) in nats, summed over the target's tokens; prompt [P] and target [L] are 1-D ids.

    Diffusion: LLaDA's stratified Monte-Carlo bound, mc_num // batch_size forwards of batch_size rows, random numbers in
    the official order (arXiv 2502.09992, eq. 6 and alg. 3). A target of one token is exact, whatever the seed.
    A block-causal model's is a chain: each block's part of the target is estimated like that behind all tokens before
    it, which are known, as in training (block diffusion, arXiv 2503.09573); the last block ends with the target.
    Uniform noise: the same with random tokens in the place of masks (`uniform_likelihood`), no exact case.
    Autoregressive: exact, one forward; mc_num, batch_size, cfg_scale and seed are not used.
    Raises UsageError when mc_num is not a multiple of batch_size, the text does not fit the context or holds tokens
    the model has not, NonFiniteActivations for NaN or Inf.
    """
    given = {"prompt_ids": _row(prompt_ids), "target_ids": _row(target_ids)}
    for name, ids in given.items():
        lm.check_ids(name, ids)
    prompt, target = (ids.to(lm.device) for ids in given.values())
    if not len(target):
        return 0.0
    length, limit = len(prompt) + len(target), lm.config.max_positions
    if length > limit:
        raise UsageError(f"prompt and target have {length} tokens, the context {limit}; leave out {length - limit}")
    if lm.kind == "autoregressive":
        return _autoregressive(lm, prompt, target)
    if mc_num < 1 or batch_size < 1 or mc_num % batch_size:
        raise UsageError(
            f"mc_num {mc_num} is not a multiple of batch_size {batch_size}; try mc_num {max(batch_size, 1) * 8}"
        )
    generator = torch.Generator().manual_seed(seed)
    batches = mc_num // batch_size
    if lm.noise == "uniform":
        check_guidance(lm, cfg_scale)
        texts = canvases(lm, prompt.tolist(), target.tolist())
        parts = [(_row(before).to(lm.device), _row(written).to(lm.device)) for before, written in texts]
        return -sum(_noise_loss(lm, *part, batch_size, generator) for part in parts for _ in range(batches)) / batches
    whole, known = torch.cat((prompt, target)), len(prompt)
    block = lm.config.block_length
    spans = [(known, len(whole))] if block is None else block_spans(known, len(whole), block)
    losses = [
        _batch_loss(lm, whole[:end], begin, known, batch_size, cfg_scale, generator)
        for begin, end in spans
        for _ in range(batches)
    ]
    return -sum(losses) / batches


def stratified_masks(length: int, rows: int, generator: torch.Generator) -> Tensor:
    """Random masks [rows, length] bool whose sizes are spread evenly over 1..length from one random offset."""
    offset = int(torch.randint(1, length + 1, (), generator=generator))
    sizes = torch.linspace(float(offset), offset + (rows - 1) * (length / rows), steps=rows).round().long()
    sizes = (sizes - 1) % length + 1
    orders = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])
    return orders < sizes[:, None]


def _batch_loss(
    lm: LanguageModel, ids: Tensor, begin: int, prompt: int, rows: int, cfg_scale: float, generator: torch.Generator
) -> float:
    """Mean over the rows of sum CE(masked) * L / (number masked), the noise being in ids [T] from `begin` on.

    Guidance compares with a copy whose first `prompt` ids are masked.
    """
    assert lm.mask_token_id is not None
    target = ids[begin:]
    masked = stratified_masks(len(target), rows, generator).to(lm.device)
    noisy = torch.where(masked, lm.mask_token_id, target[None])
    ids = torch.cat((ids[None, :begin].expand(rows, -1), noisy), dim=1)
    if cfg_scale > 0:
        unconditional = ids.clone()
        unconditional[:, :prompt] = lm.mask_token_id
        ids = torch.cat((ids, unconditional))
    context = StepContext(Step(0, 1), token_classes(ids, None, lm.mask_token_id), guided=cfg_scale > 0)

    def forward() -> Tensor:
        logits = lm.predictions(ids, slice(begin, None), context=context)
        return guide(logits, cfg_scale) if cfg_scale > 0 else logits

    return _finite(lm, forward, lambda logits: _weighted(logits, target, masked))


def _noise_loss(lm: LanguageModel, prompt: Tensor, target: Tensor, rows: int, generator: torch.Generator) -> float:
    """Mean over the rows of sum CE(unwritten) * L / (number unwritten)."""
    unwritten = stratified_masks(len(target), rows, generator)
    canvas = noised(target.cpu(), unwritten, lm.config.vocab_size, generator).to(lm.device)
    unwritten = unwritten.to(lm.device)
    forward = partial(denoised, lm, prompt, canvas, unwritten)
    return _finite(lm, forward, lambda logits: _weighted(logits, target, unwritten))


def _finite(lm: LanguageModel, forward: Callable[[], Tensor], nats: Callable[[Tensor], float]) -> float:
    """The nats of a forward's logits; raises NonFiniteActivations unless they are a finite number."""
    with locating(lm.transformer, forward):
        if math.isfinite(found := nats(forward())):
            return found
        raise not_finite_logits(0)


def _weighted(logits: Tensor, target: Tensor, hidden: Tensor) -> float:
    """Mean over rows [R, L, V] of the cross-entropies at the hidden positions [R, L], times L / (their number)."""
    loss = F.cross_entropy(logits.transpose(1, 2), target[None].expand(len(logits), -1), reduction="none")
    weight = len(target) / hidden.sum(-1, keepdim=True)
    return float((loss * hidden * weight).sum() / len(logits))


def _autoregressive(lm: LanguageModel, prompt: Tensor, target: Tensor) -> float:
    if not len(prompt):
        first = lm.config.bos_token_id if lm.config.bos_token_id is not None else lm.config.eos_token_id
        if first is None:
            raise UsageError("an autoregressive model without a BOS or EOS token needs a prompt of at least one token")
        prompt = torch.tensor([first], device=lm.device)
    ids = torch.cat((prompt, target))[None]
    ids = ids[:, :-1]
    context = StepContext(Step(0, 1), token_classes(ids, None, None))
    forward = partial(lm.transformer, ids, rows=slice(len(prompt) - 1, None), context=context)
    return _finite(
        lm, forward, lambda logits: float(logits[0].float().log_softmax(-1).gather(-1, target[:, None]).sum())
    )


def _row(ids: Tensor | list[int]) -> Tensor:
    row = torch.as_tensor(ids, dtype=torch.int64)
    if row.dim() == 2 and row.shape[0] == 1:
        row = row[0]
    if row.dim() != 1:
        raise UsageError(f"ids of one text are expected, 1-D; got shape {list(row.shape)}")
    return row
