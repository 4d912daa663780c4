import csv
import json
from dataclasses import replace

import numpy as np
import pytest

import dllm_sparse as ds
from dllm_sparse.report import schema
from dllm_sparse.report.drift import FILES, write_report
from dllm_sparse.report.drift_plots import write_plots
from dllm_sparse.types import Observer, UsageError
from tests.helpers import conforms
from tests.report.conftest import PROMPTS


def test_the_report_is_what_its_schema_says(report, causal_report, folder):
    assert report["schema"] == schema.DRIFT_SCHEMA == "dllm-sparse/drift-report@1"
    for found in (report, causal_report):
        assert conforms(found, schema.DriftReport)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))


def test_the_folder_holds_all_files(report, folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_steps_csv_is_the_json_in_long_format(report, folder):
    lines = list(csv.DictReader((folder / "steps.csv").read_text(encoding="utf-8").splitlines()))
    keys = ("scope", "site", "layer", "tokens")
    found = {(*(line[key] for key in keys), int(line["step"])): line for line in lines}
    assert len(found) == len(lines)
    for variant in report["variants"]:
        for curve in variant["curves"]:
            layer = "all" if curve["layer"] is None else str(curve["layer"])
            for step, value in enumerate(curve["drift"]["micro"]):
                line = found.get((variant["scope"], curve["site"], layer, curve["tokens"], step))
                assert (line is None) == (not curve["count"][step])
                if line is not None:
                    assert line["drift_micro"] == ("" if value is None else str(value))
                    assert line["block"] == str(step // 4)


def test_the_sequence_rule_stands_beside_the_token_rule(report):
    assert [variant["scope"] for variant in report["variants"]] == ["token", "sequence"]
    assert report["variants"][0]["sparsity"] == report["variants"][1]["sparsity"] | {"scope": "token"}
    assert any("published LLaDA code" in sentence for sentence in report["summary"])


def test_reuse_keeps_every_promise_of_the_table(report):
    rows = {row["variant"]: row for row in report["reuse"]}
    assert [row["refresh_every"] for row in report["reuse"]] == [1, 2, None, None, None]
    assert list(rows["masks every 2 steps"]["kl_by_age"]) == ["0", "1"]
    for row in report["reuse"]:
        assert 0 < row["ffn_work"] < 1
        assert row["kl"] >= 0


def test_the_question_depends_on_the_kind_of_model(report, causal_report):
    assert "denoises" in report["question"]
    assert "prompt" in causal_report["question"]
    assert "consensus" in " ".join(causal_report["summary"])
    assert {row["position_agreement"] for row in causal_report["reuse"]} == {None}


def test_one_prompt_has_no_interval(llada):
    found = ds.drift_report(llada, PROMPTS[:1], ds.SamplerConfig(gen_length=4, block_length=4))
    curve = found["variants"][0]["curves"][0]
    assert set(curve["jaccard"]["low"]) == {None}
    assert curve["jaccard_overall"]["micro"] > 0


class Interrupting(Observer):
    """Presses Ctrl-C during the n-th generation."""

    def __init__(self, generation):
        self.left = generation

    def on_start(self, ids, token_class):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_prompts_that_are_done(llada, tmp_path):
    sampler = ds.SamplerConfig(gen_length=4, block_length=4)
    with pytest.raises(KeyboardInterrupt):
        ds.drift_report(llada, PROMPTS, sampler, out=tmp_path, batch_size=1, observers=(Interrupting(3),))
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["complete"] is False
    assert found["prompts"] == ["5 6 7 8", "9 10 11"]
    assert found["summary"][0] == "Interrupted: what was finished by then is reported, from 2 prompts."
    with pytest.raises(KeyboardInterrupt):
        ds.drift_report(llada, PROMPTS[:1], sampler, out=tmp_path, reuse=1, observers=(Interrupting(2),))
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["complete"], found["prompts"], found["reuse"]) == (False, ["5 6 7 8"], [])
    with pytest.raises(KeyboardInterrupt):
        ds.drift_report(llada, PROMPTS, sampler, out=tmp_path / "none", observers=(Interrupting(1),))
    assert not (tmp_path / "none").exists()


def test_without_matplotlib_there_are_no_pictures(report, tmp_path, monkeypatch):
    monkeypatch.setattr("dllm_sparse.report.drift_plots.find_spec", lambda name: None)
    assert write_plots(tmp_path, report) == []
    assert [path.name for path in write_report(report, tmp_path)] == ["report.json", "steps.csv", "report.html"]


@pytest.mark.parametrize(
    ("prompts", "options", "message"), [([], {}, "no prompt"), (PROMPTS, {"batch_size": 0}, "batch_size")]
)
def test_impossible_requests_are_refused(llada, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        ds.drift_report(llada, prompts, ds.SamplerConfig(gen_length=4, block_length=4), **options)


def test_text_prompts_need_a_tokenizer(llada, hostile):
    with pytest.raises(UsageError, match="no tokenizer"):
        ds.drift_report(llada, ["hello"], ds.SamplerConfig(gen_length=4, block_length=4))
    with pytest.raises(UsageError, match="not both"):
        ds.drift_report(hostile, ["hello", "you", [1, 2]], ds.SamplerConfig(gen_length=4, block_length=4), batch_size=2)
    with pytest.raises(UsageError, match=r"give a single row as \[\[\.\.\]\]"):
        ds.drift_report(llada, [1, 2], ds.SamplerConfig(gen_length=4, block_length=4))


def test_the_gain_follows_from_the_unions(report, llada):
    variant = report["variants"][0]
    for gain in variant["exploitable"]:
        union = {
            found["site"]: found["density"]
            for found in variant["unions"]
            if found["layer"] is None and found["tokens"] == gain["tokens"]
        }
        assert gain["ffn_bytes"] == pytest.approx((2 * union["input"] + union["intermediate"]) / 3, abs=2e-4)
        assert gain["ffn_bytes_saved"] == gain["ffn_flops_saved"] == pytest.approx(1 - gain["ffn_bytes"], abs=1e-4)
        assert gain["ffn_speedup"] == pytest.approx(1 / gain["ffn_bytes"], rel=1e-3)
        config = replace(llada.config, tied=False)
        forward = config.parameters - config.vocab_size * config.width
        ffn = 3 * config.layers * config.width * config.ffn_width
        expected = forward / (forward - ffn + ffn * gain["ffn_bytes"])
        assert gain["forward_speedup"] == pytest.approx(expected, rel=1e-3)


def test_a_rule_that_keeps_everything_has_nothing_above_chance(llada, tmp_path):
    sampler = ds.SamplerConfig(gen_length=4, block_length=4)
    found = ds.drift_report(llada, PROMPTS[:2], sampler, ds.SparsityConfig(p=1.0), tmp_path)
    curve = found["variants"][0]["curves"][0]
    assert curve["density_overall"] == 1
    assert set(curve["jaccard"]["micro"][1:]) == {1.0}
    assert set(curve["jaccard"]["corrected"]) == {None}
    assert curve["half_life"] is None


@pytest.mark.parametrize("kind", ["llada", "llama"])
def test_a_rule_that_keeps_nothing_has_no_similarity(request, tmp_path, kind):
    lm, sampler = request.getfixturevalue(kind), ds.SamplerConfig(gen_length=4, block_length=4)
    nothing = ds.SparsityConfig(rule="threshold", p=1e9, scope="sequence")
    found = ds.drift_report(lm, PROMPTS[:2], sampler, nothing, tmp_path)
    assert any("Masks that keep nothing" in sentence for sentence in found["summary"])
    for gain in found["variants"][0]["exploitable"]:
        assert (gain["ffn_bytes_saved"], gain["ffn_flops_saved"], gain["ffn_speedup"]) == (1, 1, None)


@pytest.mark.parametrize("sites", ["up", "gate"])
def test_every_site_makes_a_report(llada, tmp_path, sites):
    sampler = ds.SamplerConfig(gen_length=4, block_length=4, threshold=0.1)
    found = ds.drift_report(llada, PROMPTS[:2], sampler, ds.SparsityConfig(p=0.5, sites=sites), tmp_path, apply=False)
    assert {curve["site"] for curve in found["variants"][0]["curves"]} == {sites}
    assert "only observed" in found["summary"][0]


def test_a_text_alone_is_one_prompt_and_numpys_numbers_are_numbers(toy, tmp_path):
    """A report is JSON: what came from numpy must have become Python's own by then."""
    lm = ds.load(str(toy), device="cpu")
    sampler = ds.SamplerConfig(gen_length=np.int64(4), block_length=np.int64(4), temperature=np.float32(0.5))
    rule = ds.SparsityConfig(p=np.float32(0.75), group_size=np.int8(3))
    options = {
        "batch_size": np.int64(2),
        "reuse": np.int64(0),
        "snapshot_every": np.int16(2),
        "deltas": np.arange(2, 4),
    }
    report = ds.drift_report(lm, "abc", sampler, rule, tmp_path, **options)
    assert report["prompts"] == ["abc"]
    assert json.loads((tmp_path / "report.json").read_text())["config"]["deltas"] == [2, 3]
    assert json.loads(json.dumps(rule.to_dict()))["p"] == 0.75
