"""The plain twins of the GPU kernels, in torch: what a kernel must compute, and what runs where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.kernels.listing import Listed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises [..., n] in fp32, casts back, then scales (LLaDA's and Llama's order of operations)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r of [..., d] by halves, in fp32 whatever the dtype (LLaDA's full precision).

    cos, sin [..., r]; what lies behind r passes (partial rotary, r = d in most models).
    """
    turned = x[..., : cos.shape[-1]].float()
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return turned if turned.shape == x.shape else torch.cat((turned, x[..., cos.shape[-1] :]), dim=-1)


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of [..., 2n], gate first -> [..., n]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def rotate_and_store(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """See `cached_attention.rotate_and_store`."""
    batch, kv_heads, _, dim = keys.shape
    parts = qkv.view(batch, slots.shape[0], -1, dim).transpose(1, 2)
    heads = parts.shape[1] - 2 * kv_heads
    q, key, value = parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
    if norms is not None:
        q, key = rms_norm(q, norms[0], norms[2]), rms_norm(key, norms[1], norms[2])
    cos, sin = (table[positions].repeat(1, 2).view(batch, 1, len(slots), -1) for table in tables)
    keys.index_copy_(2, slots, rotate(key, cos, sin))
    values.index_copy_(2, slots, value)
    return rotate(q, cos, sin)


def stream_matmul(
    x: Tensor | Listed,
    weight: Tensor,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See `streaming.stream_matmul`; on a CPU, since it asks how long the list is."""
    if isinstance(x, Listed):
        read = x.rows[: int(x.length)]
        x, weight = x.values[:, : len(read)], weight.index_select(0, read)
    out = x @ weight
    if bias is not None:
        out = out + bias
    if activation is not None:
        out = glu(out, activation)
    return out if residual is None else out + residual


def choose(logits: Tensor, *, wide: bool = False) -> tuple[Tensor, Tensor]:
    """See `streaming.choose`."""
    token = logits.argmax(-1)
    probability = logits.to(torch.float64 if wide else torch.float32).softmax(-1)
    return token, probability.gather(-1, token[:, None]).squeeze(-1)


def select(x: Tensor, p: float | Tensor) -> Tensor:
    """Rows [M, n] with all but the largest entries that hold at least p of the L1 mass zeroed, by sorting in fp64."""
    score = x.abs().double()
    ordered = score.sort(dim=-1, descending=True).values
    enough = ordered.cumsum(-1) < p * score.sum(-1, keepdim=True)
    threshold = ordered.gather(-1, enough.sum(-1, keepdim=True).clamp_max(x.shape[-1] - 1))
    threshold = threshold * (p < 1)  # the sum in fp64 may miss the smallest
    return torch.where(score < threshold, 0.0, x)  # not `>=`: NaN goes on to where it is noticed
