"""A recording that is stopped keeps its finished batches, and the same call ends with the same report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dllm_sparse as ds
from dllm_sparse.types import DllmSparseError, Observer, Step, StepResult

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12]]
SAMPLER = ds.SamplerConfig(gen_length=4, block_length=2)
SCOPED = ds.SparsityConfig(p=0.7, scope="sequence", sites="intermediate")


class StopAt(Observer):
    """Ends the run, as a kill would, after so many steps."""

    def __init__(self, steps: int, how: type[BaseException]) -> None:
        self.left, self.how = steps, how

    def on_step(self, step: Step, result: StepResult) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.how


def report_of(lm: ds.LanguageModel, out: Path | None, *observers: Observer, **options: Any) -> dict[str, Any]:
    said: list[str] = []
    options = {"batch_size": 2, "snapshot_every": 2, "deltas": (2,), "say": said.append, **options}
    report = dict(ds.drift_report(lm, PROMPTS, SAMPLER, SCOPED, out, observers=observers, **options))
    report["said"] = said
    return {key: value for key, value in report.items() if key not in ("date", "seconds")}


def test_every_stop_resumes_to_the_same_report(llada: ds.LanguageModel, tmp_path: Path) -> None:
    whole = report_of(llada, None)
    for steps, how in ((6, RuntimeError), (14, KeyboardInterrupt)):
        out = tmp_path / f"{steps}-{how.__name__}"
        with pytest.raises(how):
            report_of(llada, out, StopAt(steps, how))
        assert list((out / "batches").glob("*.json"))
        resumed = report_of(llada, out)
        assert resumed.pop("said")[0].startswith("1 batches" if steps == 6 else "3 batches")
        assert resumed == {key: value for key, value in whole.items() if key != "said"}
        assert not (out / "batches").exists()
        assert (out / "report.html").exists()


def test_other_circumstances_are_other_batches(llada: ds.LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        report_of(llada, tmp_path, StopAt(6, RuntimeError))
    assert report_of(llada, tmp_path, batch_size=1)["said"] == []
    assert len(list((tmp_path / "batches").iterdir())) == 2  # the first call's, still resumable


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"ids": [["a"]], "commit_steps": [[]]}', b"\xff"])
def test_a_damaged_batch_is_named(llada: ds.LanguageModel, tmp_path: Path, suffix: str, content: bytes) -> None:
    with pytest.raises(RuntimeError):
        report_of(llada, tmp_path, StopAt(6, RuntimeError))
    (file,) = (tmp_path / "batches").glob(f"*.{suffix}")
    file.write_bytes(content)
    with pytest.raises(DllmSparseError, match="remove it and run again") as caught:
        report_of(llada, tmp_path)
    assert str(file) in str(caught.value)
