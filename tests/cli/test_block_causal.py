"""The command line on a block-causal model: its options reach the decoder, and what it cannot do is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import dllm_sparse as ds
from dllm_sparse.cli.watch import CanvasView
from dllm_sparse.types import StepResult, TokenClass
from tests.cli.conftest import Cli
from tests.families import write_checkpoint
from tests.helpers import write_toy_tokenizer
from tests.layouts import llada2

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


def test_it_says_in_which_blocks_it_decodes(cli: Cli, llada2_folder: Path) -> None:
    answer = cli("generate", "--model", llada2_folder, "--prompt", PROMPT, "--gen-length", 4)
    assert answer.code == 0, answer.stderr
    assert "it decodes in its own blocks of 4 tokens" in answer.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--block-length", 8), "block_length is 8, but this block-causal model decodes in its own blocks of 4"),
        (("--block-length", 32), "decodes in blocks of 4 tokens here; leave --block-length out"),
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


@pytest.mark.parametrize(
    "command", [("drift-report",), ("critical-sparsity",), ("bench", "engine"), ("bench", "sparse")]
)
@pytest.mark.parametrize(("asked", "words"), [(8, "its own blocks of 4 tokens"), (32, "in blocks of 4 tokens here")])
def test_every_command_refuses_other_blocks(
    cli: Cli, llada2_folder: Path, command: tuple[str, ...], asked: int, words: str
) -> None:
    """Among them the default's length, which gives way to the model's own only where nobody asked for it."""
    answer = cli(*command, "--model", llada2_folder, "--gen-length", 8, "--block-length", asked)
    assert (answer.code, answer.stdout) == (2, "")
    assert words in answer.stderr


def test_dreams_rules_refuse_any_block_but_the_canvas(cli: Cli, toy: Path) -> None:
    words = ("--gen-length", 64, "--block-length", 32, "--remasking", "entropy")
    answer = cli("generate", "--model", toy, "--prompt", "abc", *words)
    assert (answer.code, answer.stdout) == (2, "")
    assert "--block-length is 32" in answer.stderr
    assert "decodes in blocks of 64 tokens here" in answer.stderr


@pytest.mark.parametrize("option", [("--steps", 4), ("--block-length", 4)])
def test_sweeps_refuse_to_split_a_length_they_were_not_given(cli: Cli, option: tuple[object, ...]) -> None:
    answer = cli("critical-sparsity", "--limit", 1, *option)
    assert (answer.code, answer.stdout) == (2, "")
    assert "give --gen-length, too" in answer.stderr


def test_the_canvas_view_follows_edits_beyond_the_planned_steps(llada: ds.LanguageModel) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, record=True)
    ids, edited = torch.tensor([[5, 6, 7]]), torch.tensor([[False, True, True]])
    with CanvasView(console, llada) as view:
        view.on_start(ids, torch.tensor([[TokenClass.PROMPT, TokenClass.MASKED, TokenClass.MASKED]]))
        view.on_step(ds.Step(6, 4), StepResult(ids, edited))
    assert "step 7/7" in console.export_text()


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
