"""The command line on a block-causal model: its options reach the decoder, and what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dllm_sparse as ds
from tests.cli.conftest import Cli
from tests.families import llada2, write_checkpoint
from tests.helpers import write_toy_tokenizer

PROMPT = "once upon a time"


@pytest.fixture(scope="module")
def llada2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaDA2 in blocks of 4, with a tokenizer."""
    folder = write_checkpoint(tmp_path_factory.mktemp("llada2"), *llada2(block_size=4, num_hidden_layers=2))
    write_toy_tokenizer(folder)
    return folder


def test_its_options_reach_the_decoder(cli: Cli, llada2_folder: Path) -> None:
    options = {"gen_length": 10, "threshold": 0.3, "minimal_topk": 2, "editing_threshold": 0.2, "max_post_steps": 3}
    words = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    answer = cli("generate", "--model", llada2_folder, "--prompt", PROMPT, "--stop-at-eos", *words, "--json")
    assert answer.code == 0, answer.stderr
    sampler = answer.json["config"]["sampler"]
    assert {name: sampler[name] for name in options} == options
    assert sampler["block_length"] == 4
    expected = ds.generate(
        ds.load(str(llada2_folder), device="cpu"), [PROMPT], sampler=ds.SamplerConfig(**options, stop_at_eos=True)
    )
    assert answer.json["batches"][0]["ids"] == expected.ids.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--block-length", 8), "block_length is 8, but this block-causal model decodes in its own blocks of 4"),
        (("--cache", "dual"), "cache is dual; a block-causal model allows: none"),
        (("--max-post-steps", 3), "max_post_steps is 3, but decoding without editing_threshold"),
        (("--editing-threshold", 1.5), "editing_threshold is 1.5; allowed: 0 to 1"),
        (("--minimal-topk", 0), "minimal_topk is 0; it must be at least 1"),
        (("--eps", 0.1), "eps is 0.1, but remasking 'low_confidence' does not use it"),
    ],
)
def test_what_it_cannot_do_is_a_usage_error(
    cli: Cli, llada2_folder: Path, options: tuple[object, ...], words: str
) -> None:
    answer = cli("generate", "--model", llada2_folder, "--prompt", PROMPT, "--gen-length", 8, *options)
    assert (answer.code, answer.stdout) == (2, "")
    assert words in answer.stderr


@pytest.mark.parametrize("command", [("drift-report",), ("critical-sparsity",), ("bench", "engine")])
def test_every_command_refuses_other_blocks(cli: Cli, llada2_folder: Path, command: tuple[str, ...]) -> None:
    answer = cli(*command, "--model", llada2_folder, "--gen-length", 8, "--block-length", 8)
    assert (answer.code, answer.stdout) == (2, "")
    assert "its own blocks of 4 tokens" in answer.stderr


@pytest.mark.parametrize("options", [("--minimal-topk", 2), ("--editing-threshold", 0.5), ("--max-post-steps", 3)])
def test_its_options_are_refused_by_other_diffusion_models(cli: Cli, toy: Path, options: tuple[object, ...]) -> None:
    answer = cli("generate", "--model", toy, "--prompt", "abc", "--gen-length", 8, "--block-length", 8, *options)
    assert (answer.code, answer.stdout) == (2, "")
    assert "those that do: block-causal ones (LLaDA2, SDAR)" in answer.stderr


def test_autoregressive_models_say_that_they_ignore_them(cli: Cli, toy_ar: Path) -> None:
    options = ("--editing-threshold", 0.5, "--minimal-topk", 2)
    answer = cli("generate", "--model", toy_ar, "--prompt", "abc", "--gen-length", 4, *options)
    assert answer.code == 0
    assert "only diffusion models use minimal_topk, editing_threshold; ignored" in answer.stderr


def test_the_end_of_dreams_times_reaches_the_decoder(cli: Cli, toy: Path) -> None:
    ids = []
    for eps in (0.001, 0.9):
        words = ("--gen-length", 12, "--steps", 4, "--remasking", "entropy", "--eps", eps, "--json")
        answer = cli("generate", "--model", toy, "--prompt", "abc", *words)
        assert answer.json["config"]["sampler"]["eps"] == eps
        ids.append(torch.tensor(answer.json["batches"][0]["ids"]))
    assert not torch.equal(*ids)
