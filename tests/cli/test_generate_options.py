"""Options of `generate`: their names, their way to the decoder, and those that do nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

SHORT = ("--gen-length", "8", "--block-length", "4", "--steps", "4")
NAMES = (
    "--model --p --prompt --gen-length --steps --block-length --temperature --cfg-scale --remasking --cache "
    "--threshold --device --dtype --seed --sites --rule --scope --backend --out --json --watch --chat --prompts"
)
PROMPTS = ("--prompt", "once upon a time", "--prompt", "a cat", "--prompt", "z")


def test_every_option_reaches_the_decoder(cli: Cli, toy: Path) -> None:
    sampler = {
        "gen_length": 8,
        "block_length": 4,
        "steps": 6,
        "temperature": 0.5,
        "cfg_scale": 1.5,
        "remasking": "random",
        "cache": "dual",
        "threshold": 0.25,
        "seed": 7,
    }
    sparsity = {
        "rule": "top_k",
        "sites": "gate",
        "scope": "group",
        "group_size": 2,
        "score": "weighted",
        "refresh_every": 2,
        "backend": "reference",
    }
    words = [part for key, value in {**sampler, **sparsity}.items() for part in (f"--{key.replace('_', '-')}", value)]
    flags = ("--logits-eos-inf", "--confidence-eos-eot-inf", "--stop-at-eos")
    answer = cli("generate", "--model", toy, "--prompt", "abc", "--p-schedule", "0:0.5,1:0.9", *words, *flags, "--json")
    assert answer.code == 0, answer.stderr
    config = answer.json["config"]
    on = {"logits_eos_inf": True, "confidence_eos_eot_inf": True, "stop_at_eos": True}
    assert {key: config["sampler"][key] for key in {**sampler, **on}} == {**sampler, **on}
    assert {key: config["sparsity"][key] for key in sparsity} == sparsity
    assert config["sparsity"]["schedule"] == [[0.0, 0.5], [1.0, 0.9]]
    assert set(answer.json["batches"][0]["sparsity"]) == {"gate", "mean", "hook_mean"}
    factor = cli("generate", "--model", toy, "--prompt", "abc", *SHORT, "--factor", "1.5", "--json")
    assert factor.json["config"]["sampler"]["factor"] == 1.5


def test_the_option_names_of_the_ecosystem(cli: Cli) -> None:
    shown = cli("generate", "--help").stdout
    for name in [
        "--model",
        "--p",
        "--prompt",
        "--gen-length",
        "--steps",
        "--block-length",
        "--temperature",
        "--cfg-scale",
        "--remasking",
        "--cache",
        "--threshold",
        "--device",
        "--dtype",
        "--seed",
        "--sites",
        "--rule",
        "--scope",
        "--backend",
        "--out",
        "--json",
        "--watch",
        "--chat",
        "--prompts",
    ]:
        assert re.search(rf"{name}\b", shown), name


@pytest.mark.parametrize("rule", ["top_p", "top_k", "max_p", "threshold"])
def test_no_p_is_dense_and_so_is_the_identity(cli: Cli, toy: Path, rule: str) -> None:
    call = ("generate", "--model", toy, *PROMPTS, *SHORT, "--json", "--rule", rule)
    dense = cli(*call).json["batches"][0]
    identity = cli(*call, "--p", {"top_p": 1, "top_k": 1, "max_p": 0, "threshold": 0}[rule]).json["batches"][0]
    assert dense["sparsity"] is None
    assert identity["sparsity"] is not None
    assert identity["ids"] == dense["ids"]


def test_sparsity_options_without_p_are_said_to_do_nothing(cli: Cli, toy: Path) -> None:
    call = ("generate", "--model", toy, *PROMPTS, *SHORT, "--quiet")
    assert "nothing is masked" in cli(*call, "--sites", "input").stderr
    for given in ((), ("--sites", "input", "--p", 0.9), ("--p-schedule", "0:0.9,1:0.8", "--scope", "sequence")):
        assert "nothing is masked" not in cli(*call, *given).stderr


def test_options_an_autoregressive_model_ignores_are_named(cli: Cli, toy_ar: Path) -> None:
    answer = cli("generate", "--model", toy_ar, "--prompt", "a", "--gen-length", "4", "--steps", "3", "--cache", "dual")
    assert answer.code == 0
    assert "steps, cache" in answer.stderr
