"""Effective rank: known spectra, streaming against one decomposition."""

import pytest
import torch

import dllm_sparse as ds
from dllm_sparse.analysis.rank import StreamingRank, batch_rank


def matrix_with_spectrum(values: list[float], rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("values", [[1.0] * 8, [5.0, 1.0, 0.5, 0.1], [3.0, 0.0, 0.0], [2.0**-i for i in range(20)]])
def test_known_spectrum(values: list[float]) -> None:
    share = torch.tensor(values, dtype=torch.float64) / sum(values)
    expected = float(torch.special.entr(share).sum().exp())
    x = matrix_with_spectrum(values, rows=40)
    assert ds.effective_rank(x) == pytest.approx(expected, rel=1e-6)
    assert ds.effective_rank(x, normalised=True) == pytest.approx(expected / len(values), rel=1e-6)


def test_streaming_equals_one_decomposition_however_the_tokens_are_split() -> None:
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -3, 24)
    streams = [StreamingRank(24), StreamingRank(24)]
    for index, part in enumerate(x.split([1, 99, 150, 50])):
        streams[index % 2].add(part.view(1, -1, 24))
    streams[0].merge(streams[1])
    assert streams[0].tokens == 300
    assert streams[0].value() == pytest.approx(ds.effective_rank(x), rel=1e-6)


def test_bounds_and_bad_input() -> None:
    assert ds.effective_rank(torch.zeros(3, 4)) == 0.0
    assert 1.0 <= ds.effective_rank(torch.randn(5, 9)) <= 5.0
    with pytest.raises(ValueError, match="matrix"):
        ds.effective_rank(torch.zeros(3))
    with pytest.raises(ds.types.NonFiniteActivations):
        ds.effective_rank(torch.tensor([[float("nan"), 1.0]]))
    stream = StreamingRank(2)
    stream.add(torch.tensor([[float("inf"), 1.0]]))
    with pytest.raises(ds.types.NonFiniteActivations, match="effective rank"):
        stream.value()


def test_the_published_protocol_is_the_rank_of_one_batch() -> None:
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    assert batch_rank(x) == pytest.approx(ds.effective_rank(x), rel=1e-5)
    assert batch_rank(torch.zeros(6, 9)) == pytest.approx(6.0)  # the added 1e-10 alone
