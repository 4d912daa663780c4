"""The launches of a mixture against loops and their plain twins: in Triton's interpreter, on a GPU, in a graph."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import dllm_sparse as ds
from dllm_sparse.kernels.experts import combine
from dllm_sparse.kernels.mixture import MAX_TOKENS, can_mix, choose_shared, mixture, order_pairs, route
from dllm_sparse.kernels.routing import RouterRule, Routing, choose_experts, sort_pairs
from tests.helpers import interpreted, random_ids, tiny_lm
from tests.kernels.test_experts import layer, looped, relative, routed
from tests.models.plain_moe import chosen
from tests.models.test_moe import SIGMOID, SOFTMAX

RULES = (
    (RouterRule("softmax", 8), 64),
    (RouterRule("softmax", 3, renormalise=True, scaling=0.5), 7),
    (RouterRule("softmax", 1, renormalise=True), 1),
    (RouterRule("softmax", 16), 16),
    (RouterRule("sigmoid", 8, groups=8, groups_per_token=4, renormalise=True, scaling=2.5), 256),
    (RouterRule("sigmoid", 5, groups=3, groups_per_token=2, renormalise=True), 15),
    (RouterRule("sigmoid", 1, renormalise=True), 5),
    (RouterRule("sigmoid", 2, groups=6, groups_per_token=3), 6),
    (RouterRule("sigmoid", 10), 333),
)
# (tokens, experts a token, experts, width, width of an expert)
SMALL = (
    (1, 1, 1, 16, 8),
    (3, 2, 5, 24, 70),
    (33, 3, 9, 40, 33),
    (20, 1, 2, 130, 8),
    (64, 2, 20, 16, 8),
    (70, 2, 3, 16, 8),
)
H200 = (
    (1, 8, 64, 512, 256),
    (32, 8, 64, 512, 256),
    (64, 8, 256, 256, 128),
    (7, 3, 256, 96, 40),
    (32, 8, 8, 256, 128),
    (300, 8, 64, 256, 128),
)

gpu = pytest.mark.gpu
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def scores_of(logits: Tensor, rule: RouterRule) -> Tensor:
    return logits.softmax(-1) if rule.kind == "softmax" else logits.sigmoid()


def expected(logits: Tensor, bias: Tensor | None, rule: RouterRule) -> Routing:
    """Token by token in fp64; of equals the lowest id."""
    scores = scores_of(logits.double(), rule)
    none = torch.zeros_like(scores[0])
    count = (rule.experts_per_token, rule.groups, rule.groups_per_token)
    experts = torch.tensor([chosen(row, none if bias is None else bias.double(), *count) for row in scores])
    weights = scores.gather(-1, experts)
    if rule.renormalise and (rule.kind == "softmax" or rule.experts_per_token > 1):
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights * rule.scaling)


def check_choices(device: str) -> None:
    """Random logits in two shares, and few values, so that many scores tie."""
    generator = torch.Generator().manual_seed(0)
    for (rule, experts), tied, biased in product(RULES, (False, True), (False, True)):
        logits = torch.randn(3, experts, generator=generator)
        bias = torch.randn(experts, generator=generator) if biased else None
        if tied:
            logits = torch.stack((torch.zeros(experts), (logits[1] > 0).float(), logits[2].round()))
            bias = None if bias is None else bias.round()
        shares = torch.stack((logits / 2, logits / 2)).to(device)
        found = choose_shared(shares, torch.float32, None if bias is None else bias.to(device), rule)
        truth = expected(logits, bias, rule)
        assert torch.equal(found.experts.cpu(), truth.experts), (rule, tied, biased)
        assert relative(found.weights.cpu(), truth.weights) < 1e-6, (rule, tied, biased)
        if not tied:
            plain = choose_experts(logits, bias, rule)
            assert torch.equal(plain.experts, truth.experts)
            assert relative(found.weights.cpu(), plain.weights.double()) < 1e-6


def check_broken_tokens(device: str) -> None:
    """NaN and infinities stay in their token, name experts that exist, and come out as NaN where the twin's do."""
    for (rule, experts), biased in product(RULES, (False, True)):
        logits = torch.randn(6, experts, generator=torch.Generator().manual_seed(1))
        logits[0], logits[1, experts // 2], logits[2] = torch.nan, -torch.nan, -torch.inf
        logits[3, experts - 1], logits[4] = torch.inf, torch.inf
        bias = torch.randn(experts, generator=torch.Generator().manual_seed(2)) if biased else None
        if bias is not None:  # NaN with a sign is no less a NaN
            bias[experts // 2] = torch.tensor(-(1 << 22), dtype=torch.int32).view(torch.float32)
        found = choose_shared(logits[None].to(device), torch.float32, None if bias is None else bias.to(device), rule)
        truth = choose_experts(logits, bias, rule)
        chosen_ids = found.experts.cpu()
        assert all(len(set(row)) == len(row) and 0 <= min(row) <= max(row) < experts for row in chosen_ids.tolist())
        assert torch.equal(found.weights.isnan().any(-1).cpu(), truth.weights.isnan().any(-1)), rule
        assert torch.equal(chosen_ids[5], truth.experts[5])
        assert relative(found.weights.cpu()[5], truth.weights[5].double()) < 1e-6


def check_routes(device: str, dtype: torch.dtype) -> None:
    """Inputs of few bits, whose sums are exact in any order: only the rounding to the model's type is left to differ,
    which makes many logits equal. A sigmoid's are not rounded."""
    for kind, (tokens, experts, width) in product(("softmax", "sigmoid"), ((1, 5, 9), (37, 65, 140))):
        generator = torch.Generator().manual_seed(width)
        x = ((torch.randn(tokens, width, generator=generator) * 8).round() / 8).to(dtype)
        weight = ((torch.randn(experts, width, generator=generator) * width**-0.5 * 512).round() / 512).to(dtype)
        logits = x.double() @ weight.double().t()
        rule = RouterRule(kind, 4)
        truth = expected(logits.to(dtype) if kind == "softmax" else logits, None, rule)
        found = route(x.to(device), weight.to(device), None, rule, fused=True)
        assert relative(found.weights.cpu(), truth.weights) < 1e-6
        assert torch.equal(found.experts.cpu(), truth.experts), (kind, tokens)


def check_pairs(device: str) -> None:
    """As sorting does it: all tokens at one expert, experts that nobody chose, more pairs than a block, one pair."""
    cases = [(routed(*case[:3]), case[2]) for case in SMALL]
    cases += [(torch.full((40, 1), 3), 5), (torch.arange(8).expand(64, 8), 300), (routed(50, 7, 30, seed=1), 30)]
    for experts, count in cases:
        found, truth = order_pairs(experts.to(device), count), sort_pairs(experts, count)
        for one, other in zip(found, truth, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.cpu(), other), (experts.shape, count)


def check_mixtures(device: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    """Against loops in fp64 and no worse than the twin; what nobody chose is never read; NaN stays in its token."""
    bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # of a few entries, chance decides
    for tokens, places, experts, width, inner in shapes:
        gate_up, down = layer(experts, width, inner, device, dtype)
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, width, generator=generator).to(device, dtype)
        routing = Routing(
            routed(tokens, places, experts).to(device), torch.rand(tokens, places, generator=generator).to(device)
        )
        for expert in set(range(experts)) - set(routing.experts.flatten().tolist()):
            gate_up[expert], down[expert] = torch.nan, torch.nan
        pairs = sort_pairs(routing.experts, experts)
        outputs = looped(x.double(), pairs, places, gate_up.double(), down.double(), "silu")
        by_pair = torch.empty_like(outputs)
        by_pair[pairs.order] = outputs
        truth = (by_pair.view(tokens, places, width) * routing.weights.double().unsqueeze(-1)).sum(1)
        own = relative(combine(looped(x, pairs, places, gate_up, down, "silu"), pairs.order, routing.weights), truth)
        found = mixture(x, routing, gate_up, down, "silu", fused=True)
        assert found.shape == x.shape
        assert found.dtype == x.dtype
        assert relative(found, truth) <= max(1.2 * own, bound), (tokens, experts)
        x[tokens // 2] = torch.nan
        broken = mixture(x, routing, gate_up, down, "silu", fused=True)
        assert broken[tokens // 2].isnan().all()
        others = torch.arange(tokens, device=device) != tokens // 2
        assert torch.equal(broken[others], found[others])


def check_all(device: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    check_choices(device)
    check_broken_tokens(device)
    check_routes(device, dtype)
    check_pairs(device)
    check_mixtures(device, shapes, dtype)


def check_listeners(device: str) -> None:
    """Who masks nothing in the experts leaves what the fused launches give, bit for bit; who masks, does not."""
    for moe in (SOFTMAX, SIGMOID):
        lm = tiny_lm(moe=moe)
        lm.transformer.to(device)
        ids = random_ids(2, 9).to(device)
        dense = lm.logits(ids)
        for options, apply in (({"p": 1.0}, True), ({"p": 0.5}, False)):
            with ds.sparsify(lm, ds.SparsityConfig(**options), apply=apply):
                assert torch.equal(lm.logits(ids), dense), (moe.router, options)
        with ds.sparsify(lm, ds.SparsityConfig(p=0.5)):
            assert not torch.allclose(lm.logits(ids), dense, rtol=0, atol=1e-3)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    poisoned = "import torch; torch.use_deterministic_algorithms(True)"  # fresh outputs are NaN
    code = f"check_all('cpu', {SMALL}, torch.float32); check_routes('cpu', torch.float16)"
    fused = "from dllm_sparse.kernels import mixture; mixture.fuses_on = lambda device, dtype: True"
    code = f"{code}; {fused}; check_listeners('cpu')"
    interpreted(f"{poisoned}; from tests.kernels.test_mixture import check_all, check_listeners, check_routes; {code}")


def test_only_few_rows_without_a_gradient_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    assert not can_mix(x, weight)  # on a CPU
    monkeypatch.setattr("dllm_sparse.kernels.mixture.fuses_on", lambda device, dtype: True)
    assert can_mix(x, weight)
    assert not can_mix(torch.randn(MAX_TOKENS + 1, 8), weight)
    assert not can_mix(torch.randn(0, 8), weight)
    assert not can_mix(x, weight.half())
    assert not can_mix(x, weight.requires_grad_())
    assert not can_mix(x, torch.randn(4, 8), weight)
    with torch.no_grad():
        assert can_mix(x, weight)


@gpu
@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_the_gpu(dtype: torch.dtype) -> None:
    check_all("cuda", (*SMALL, *H200), dtype)
    check_listeners("cuda")


@gpu
@cuda
def test_a_graph_replays_with_other_tokens() -> None:
    gate_up, down = layer(16, 256, 128, "cuda", torch.bfloat16)
    router = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(9, 256, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(16, device="cuda")
    rule = RouterRule("sigmoid", 4, groups=4, groups_per_token=2, renormalise=True)

    def run() -> Tensor:
        return mixture(x, route(x, router, bias, rule), gate_up, down, "silu")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(4):
        x.normal_(generator=torch.Generator("cuda").manual_seed(seed))
        if seed == 3:
            x.copy_(x[0].expand_as(x).clone())  # four experts get everything
        graph.replay()
        assert torch.equal(out, run())
