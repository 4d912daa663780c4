"""Launches the GPU kernels on torch tensors: shapes in, launch grids out. The plain twin of each is a line of torch.

Shapes: M rows (tokens of all sequences), K inputs, N outputs, n entries of a row. Nothing here synchronises with the
host, and everything may be captured in a CUDA graph once `Scratch` has been sized by a first call.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.kernels import reference
from dllm_sparse.kernels.histogram import Histogram
from dllm_sparse.kernels.listing import Listed, run_space
from dllm_sparse.kernels.selection import triton_installed
from dllm_sparse.kernels.tuning import Problem, Tile, padded_tokens, tile_for

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
ACTIVATION_CODES = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
MAX_STREAMED = 64
"""Most rows the streaming product takes; above, the product is bound by arithmetic and belongs to cuBLAS."""

RUNS_A_SHARE = 4
"""Runs of a list, where it lies in runs, that make up one share of a product."""

_SWAPPED = 64  # columns from which on the weights are the tall operand

PRODUCTS_OVERLAP, LAYERS_OVERLAP, LISTS_OVERLAP = (False, True), (True, False), (True, True)
"""Programmatic dependent launch of (products, the layers between, selections and the products that read their lists):
(starts before the kernel in front has ended, lets the next one start early). Measured on an H200: small kernels gain
behind products, products lose, except behind a selection, which leaves most of the GPU idle."""


def overlapping(kind: tuple[bool, bool], device: torch.device) -> dict[str, bool]:
    """One of the three above as launch options; before compute capability 9 there are no such launches."""
    if device.type != "cuda":  # Triton's interpreter, which knows no such option
        return {"WAIT": False, "TRIGGER": False}
    wait, trigger = kind if _capability(device) >= 9 else (False, False)
    return {"WAIT": wait, "TRIGGER": trigger, "launch_pdl": wait}


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one of Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


class Scratch:
    """Workspace shared by launches that follow each other on one stream; counters are left at zero by every kernel.

    Graphs keep its addresses: it never shrinks, and what it outgrew stays alive.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counters = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        self._space = torch.zeros(1 << 20, dtype=torch.float32, device=device)
        self._retired: list[Tensor] = []

    def space(self, entries: int) -> Tensor:
        """At least `entries` fp32, contents undefined."""
        if self._space.numel() < entries:
            self._retired.append(self._space)  # an earlier graph may still write here
            self._space = torch.empty(entries, dtype=torch.float32, device=self.device)
        return self._space


def on_gpu(x: Tensor) -> bool:
    """True where the kernels for 16-bit rows run; elsewhere their plain twins do."""
    return x.is_cuda and x.dtype in SIXTEEN_BIT and triton_installed()


def can_stream(x: Tensor, weight: Tensor) -> bool:
    """True where `stream_matmul` runs: few 16-bit rows on a CUDA device, the weight [K, N] contiguous by input."""
    return (
        on_gpu(x)
        and weight.dtype == x.dtype
        and x.shape[0] <= MAX_STREAMED
        and weight.is_contiguous()
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 32 == 0
    )


def can_list(x: Tensor, weight: Tensor) -> bool:
    """True where `stream_matmul` takes a list of the channels of x: where it streams, and by its twin on a CPU."""
    return can_stream(x, weight) or (x.is_cpu and x.shape[0] <= MAX_STREAMED)


def stream_matmul(
    x: Tensor | Listed,
    weight: Tensor,
    scratch: Scratch,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
    atomic: bool = False,
    histogram: Histogram | None = None,
) -> Tensor:
    """x [M, K] @ weight [K, N] (+ bias [N]) (+ residual [M, N]) -> [M, N].

    With `activation` the weight is [K, 2N], gate first, and the result act(gate) * up. With `Listed` only the listed
    rows are read. Shares of K are added in a fixed order; `atomic=True` adds them as they come (not deterministic).
    A `histogram` counts the result, bf16, for `packing.select`.
    """
    if not weight.is_cuda:
        return reference.stream_matmul(x, weight, activation=activation, bias=bias, residual=residual)
    from dllm_sparse.kernels.gpu.stream_matmul import stream_matmul_kernel

    listed = isinstance(x, Listed)
    values = x.values if isinstance(x, Listed) else x
    tokens, k = values.shape
    gated, padded = activation is not None, padded_tokens(tokens)
    n = weight.shape[1] // (2 if gated else 1)
    tile = tile or tile_for(Problem(padded, k, n, gated, listed), values.device)
    runs = x.length.numel() if isinstance(x, Listed) else 1
    if runs > 1:
        tile = tile._replace(splits=runs // RUNS_A_SHARE)
    assert histogram is None or (values.dtype == torch.bfloat16 and tile.columns <= 128)
    out = torch.empty((tokens, n), dtype=values.dtype, device=values.device)
    space = scratch.space(tile.splits * tokens * n * (2 if gated else 1) if tile.splits > 1 else 1)
    if atomic and tile.splits > 1:
        space[: tokens * n * (2 if gated else 1)].zero_()
    stream_matmul_kernel[(-(-n // tile.columns) * tile.splits,)](
        values,
        weight,
        bias if bias is not None else values,
        residual if residual is not None else values,
        out,
        space,
        scratch.counters,
        x.rows if isinstance(x, Listed) else scratch.counters,
        x.length if isinstance(x, Listed) else scratch.counters,
        histogram.near if histogram is not None else scratch.counters,
        histogram.counts if histogram is not None else scratch.counters,
        histogram.lines if histogram is not None else scratch.counters,
        tokens,
        n,
        k,
        weight.stride(0),
        tile.splits,
        run_space(k, runs) // 16,
        BT=padded,
        BO=8 if tokens <= 8 and tile.columns >= _SWAPPED else padded,
        BN=tile.columns,
        BK=tile.rows,
        GATED=gated,
        ACT=ACTIVATION_CODES[activation] if activation is not None else 0,
        LISTED=listed,
        RUNS=RUNS_A_SHARE if runs > 1 else 0,
        COUNT=histogram is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ATOMIC=atomic,
        SWAP=tile.columns >= _SWAPPED,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **overlapping(LISTS_OVERLAP if listed else PRODUCTS_OVERLAP, values.device),
    )
    return out


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, RMSNorm(x + delta)) of rows [M, n]; delta None adds nothing."""
    if not on_gpu(x):
        total = x if delta is None else x + delta
        return total, reference.rms_norm(total, weight, eps)
    from dllm_sparse.kernels.gpu.layers import add_norm_kernel

    n = x.shape[1]
    out = torch.empty_like(x)
    total = torch.empty_like(x) if delta is not None else x
    block = 1 << (n - 1).bit_length()
    warps = min(max(block // 512, 1), 16)
    add_norm_kernel[(x.shape[0],)](
        x,
        delta if delta is not None else x,
        weight,
        total,
        out,
        n,
        eps,
        BLOCK=block,
        ADD=delta is not None,
        num_warps=warps,
        **overlapping(LAYERS_OVERLAP, x.device),
    )
    return total, out


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of rows [M, 2n], gate first -> [M, n]."""
    if not on_gpu(gate_up):
        return reference.glu(gate_up, activation)
    from dllm_sparse.kernels.gpu.layers import glu_kernel

    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, n), dtype=gate_up.dtype, device=gate_up.device)
    glu_kernel[(rows, -(-n // 2048))](
        gate_up,
        out,
        n,
        ACT=ACTIVATION_CODES[activation],
        BLOCK=2048,
        num_warps=8,
        **overlapping(LAYERS_OVERLAP, gate_up.device),
    )
    return out


def choose(logits: Tensor, scratch: Scratch, *, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Argmax [M] int64 (lowest id of equals) and its softmax probability [M] fp32 (fp64 if `wide`) of logits [M, V].

    Computed in fp32 (fp64 if `wide`) from the logits as they are. A row with NaN or +Inf gets a NaN probability.
    """
    if not logits.is_cuda or not triton_installed():
        return reference.choose(logits, wide=wide)
    from dllm_sparse.kernels.gpu.choose import choose_kernel

    rows, vocabulary = logits.shape
    assert rows <= scratch.counters.numel()
    splits = max(min(-(-vocabulary // 4096), 512 // rows, 64), 1)
    accumulator = torch.float64 if wide else torch.float32
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    probability = torch.empty(rows, dtype=accumulator, device=logits.device)
    best = torch.empty((rows, splits), dtype=torch.float32, device=logits.device)
    mass = torch.empty((rows, splits), dtype=accumulator, device=logits.device)
    where = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
    choose_kernel[(rows, splits)](
        logits,
        token,
        probability,
        best,
        where,
        mass,
        scratch.counters,
        vocabulary,
        splits,
        BLOCK=1024,
        PADDED=1 << (splits - 1).bit_length(),
        WIDE=wide,
        num_warps=4,
        **overlapping(LAYERS_OVERLAP, logits.device),
    )
    return token, probability


def linear(
    x: Tensor,
    layer: torch.nn.Linear,
    scratch: Scratch,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer on rows [M, K], plus a residual [M, N]: streamed where that runs, cuBLAS elsewhere."""
    weight = layer.weight.t()
    if can_stream(x, weight):
        return stream_matmul(x, weight, scratch, bias=layer.bias, residual=residual)
    out = F.linear(x, layer.weight, layer.bias)
    return out if residual is None else residual + out
