"""`dllm-sparse generate`: the answer on stdout, the narration on stderr, every option on its way to the decoder."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dllm_sparse as ds
import dllm_sparse.generation
from dllm_sparse.cli.watch import CanvasView
from tests.cli.conftest import Cli

SHORT = ("--gen-length", "8", "--block-length", "4", "--steps", "4")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
NAMES = (
    "--model --p --prompt --gen-length --steps --block-length --temperature --cfg-scale --remasking --cache "
    "--threshold --device --dtype --seed --sites --rule --scope --backend --out --json --watch --chat --prompts"
)
PROMPTS = ("once upon a time", "a cat", "z")
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4, steps=4)


@pytest.fixture(scope="module")
def toy_lm(toy: Path) -> ds.LanguageModel:
    return ds.load(str(toy), device="cpu")


def prompt_options(prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_json_is_one_object_and_nothing_else(cli: Cli, toy: Path, toy_lm: ds.LanguageModel) -> None:
    answer = cli("generate", "--model", toy, "--p", "0.8", *prompt_options(), *SHORT, "--json")
    assert (answer.code, answer.stderr) == (0, "")
    assert answer.stdout.count("\n") == 1
    assert not CONTROL.search(answer.stdout)
    expected = ds.generate(toy_lm, list(PROMPTS), sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.8))
    value = answer.json
    assert value["schema"] == "dllm-sparse/generate@1"
    assert value["prompts"] == list(PROMPTS)
    assert value["texts"] == expected.texts
    (batch,) = value["batches"]
    assert batch["ids"] == expected.ids.tolist()
    assert batch["forward_passes"] == 4
    assert batch["sparsity"] == expected.sparsity


def test_stdout_is_the_text_and_stderr_the_story(cli: Cli, toy: Path, toy_lm: ds.LanguageModel) -> None:
    answer = cli("generate", "--model", toy, "--p", "0.8", *prompt_options(), *SHORT)
    expected = ds.generate(toy_lm, list(PROMPTS), sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.8))
    assert answer.code == 0
    assert any(CONTROL.search(text) for text in expected.texts)  # the model does speak escape sequences
    assert answer.stdout == "".join(CONTROL.sub("", text) + "\n" for text in expected.texts)
    assert expected.sparsity is not None
    assert f"input {expected.sparsity['input']:.1%}" in answer.stderr
    assert f"intermediate {expected.sparsity['intermediate']:.1%}" in answer.stderr
    for words in ("masked diffusion", "float32 on cpu", "tokens/s", "4 forwards", "shared by all tokens"):
        assert words in answer.stderr
    assert "\x1b" not in answer.stderr
    quiet = cli("generate", "--model", toy, "--p", "0.8", *prompt_options(), *SHORT, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (answer.stdout, "")


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
    call = ("generate", "--model", toy, *prompt_options(), *SHORT, "--json", "--rule", rule)
    dense = cli(*call).json["batches"][0]
    identity = cli(*call, "--p", {"top_p": 1, "top_k": 1, "max_p": 0, "threshold": 0}[rule]).json["batches"][0]
    assert dense["sparsity"] is None
    assert identity["sparsity"] is not None
    assert identity["ids"] == dense["ids"]


def test_sparsity_options_without_p_are_said_to_do_nothing(cli: Cli, toy: Path) -> None:
    call = ("generate", "--model", toy, *prompt_options(), *SHORT, "--quiet")
    assert "nothing is masked" in cli(*call, "--sites", "input").stderr
    for given in ((), ("--sites", "input", "--p", 0.9), ("--p-schedule", "0:0.9,1:0.8", "--scope", "sequence")):
        assert "nothing is masked" not in cli(*call, *given).stderr


def test_prompts_from_files_and_stdin(cli: Cli, toy: Path, tmp_path: Path) -> None:
    expected = cli("generate", "--model", toy, *prompt_options(), *SHORT, "--quiet").stdout
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for name in ("p.txt", "p.jsonl"):
        assert cli("generate", "--model", toy, "--prompts", tmp_path / name, *SHORT, "--quiet").stdout == expected
    piped = cli("generate", "--model", toy, *SHORT, "--quiet", stdin="a cat\n")
    assert piped.stdout == expected.splitlines(keepends=True)[1]


@pytest.mark.parametrize("size", [1, 2])
def test_batches_do_not_change_texts(cli: Cli, toy: Path, toy_ar: Path, size: int) -> None:
    for folder in (toy, toy_ar):
        call = ("generate", "--model", folder, *prompt_options(), *SHORT, "--json")
        together, apart = cli(*call).json, cli(*call, "--batch-size", size).json
        assert apart["texts"] == together["texts"]
        assert len(apart["batches"]) == (3, 2)[size - 1]


def test_an_autoregressive_model_goes_through_the_same_command(cli: Cli, toy_ar: Path) -> None:
    # A length no block divides: blocks are nothing to an autoregressive model.
    answer = cli("generate", "--model", toy_ar, "--p", "0.7", "--prompt", "abc", "--gen-length", "7", "--json")
    assert answer.code == 0, answer.stderr
    expected = ds.generate(
        ds.load(str(toy_ar), device="cpu"),
        "abc",
        sampler=ds.SamplerConfig(gen_length=7),
        sparsity=ds.SparsityConfig(p=0.7),
    )
    assert answer.json["batches"][0]["ids"] == expected.ids.tolist()


def test_out_writes_the_same_object_and_names_the_file(cli: Cli, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    call = ("generate", "--model", toy, "--prompt", "abc", *SHORT, "--out", out)
    answer = cli(*call)
    file = out / "generate.json"
    assert answer.stdout.splitlines()[-2:] == [str(file), str(out / "sparsity.csv")]
    assert sorted(path.name for path in out.iterdir()) == ["generate.json", "sparsity.csv"]
    written = json.loads(file.read_text())
    as_json = cli(*call, "--json")
    assert as_json.stdout.count("\n") == 1
    assert as_json.json["texts"] == written["texts"]


def test_chat_templates(cli: Cli, toy: Path, toy_chat: Path) -> None:
    call = ("--prompt", "abc", *SHORT, "--json")
    assert cli("generate", "--model", toy, *call).json["batches"][0]["ids"][0][:3] == [0, 1, 2]
    for options, expected in (((), [248, 0, 1, 2, 251, 248]), (("--chat",), [248, 0, 1, 2, 251, 248])):
        assert cli("generate", "--model", toy_chat, *call, *options).json["batches"][0]["ids"][0][:6] == expected
    plain = cli("generate", "--model", toy_chat, *call, "--no-chat").json["batches"][0]
    assert (plain["ids"][0][:3], plain["prompt_length"]) == ([0, 1, 2], 3)
    refused = cli("generate", "--model", toy, *call, "--chat")
    assert (refused.code, refused.stdout) == (2, "")
    assert "no chat template; use --no-chat" in refused.stderr


def test_watch_draws_the_canvas_on_stderr(cli: Cli, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ("generate", "--model", toy, "--prompt", "abc", *SHORT)
    plain = cli(*call)
    assert cli(*call, "--watch").stdout == plain.stdout  # no terminal: nothing moves
    monkeypatch.setenv("FORCE_COLOR", "1")
    watched = cli(*call, "--watch")
    assert watched.stdout == plain.stdout
    assert "step 4/4, block 2" in watched.stderr
    assert "\x1b[" in watched.stderr
    assert "░" in watched.stderr
    for hostile in ("\x1b[2J", "\x9b", "\x07", "\x1b]0;"):
        assert hostile not in watched.stderr


def test_the_canvas_view(toy_lm: ds.LanguageModel) -> None:
    """Masks are blocks, what was just committed is bold, older tokens carry the colour of their step."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", record=True, width=60)
    drawn: list[Any] = []

    class Watching(CanvasView):
        def render(self, ids: list[int], step: ds.Step) -> Any:
            drawn.append((ids, step, super().render(ids, step)))
            return drawn[-1][2]

    with Watching(console, toy_lm) as view:
        out = ds.generate(toy_lm, ["abc", "a longer one"], sampler=SAMPLER, observers=[view])
    assert [step.index for _, step, _ in drawn] == [0, 1, 2, 3]
    for ids, step, text in drawn:
        canvas, caption = text.plain.split("\n")
        assert canvas.count("░") == ids.count(250) == 8 - 2 * (step.index + 1)
        assert caption == f"step {step.index + 1}/4, block {step.block + 1}"
        assert sum("bold" in str(span.style) for span in text.spans) == 2
    last = drawn[-1][2]
    assert last.plain.split("\n")[0] == CONTROL.sub("", toy_lm.tokenizer.decode(out.ids[0, -8:].tolist()))  # type: ignore[union-attr]
    colours = {str(span.style) for span in last.spans if " on " in str(span.style)}
    assert len(colours) == 3
    assert "step 4/4, block 2" in console.export_text()


def test_an_alias_runs_offline_from_the_hub_cache(
    cli: Cli, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llada-8b` is found where a download would have put it, and `models` says that it is here."""
    repository = tmp_path / "models--GSAI-ML--LLaDA-8B-Instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(toy)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    answer = cli("generate", "--model", "llada-8b", "--p", "0.8", "--prompt", "abc", *SHORT, "--json")
    assert answer.code == 0, answer.stderr
    expected = ds.generate(ds.load(str(toy), device="cpu"), "abc", sampler=SAMPLER, sparsity=ds.SparsityConfig(p=0.8))
    assert answer.json["texts"] == expected.texts
    listed = cli("models", "--json").json["models"]
    assert [row["name"] for row in listed if row["local"] and row["source"] != "bundled"] == ["llada-8b"]


@pytest.mark.parametrize("options", [(), ("--model", "tiny-ar")])
def test_the_bundled_models_speak_without_any_setup(cli: Cli, options: tuple[str, ...]) -> None:
    answer = cli("generate", *options, "--p", "0.8", "--prompt", "Once upon a time", *SHORT, "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["batches"][0]["sparsity"]["mean"] > 0.1
    assert all(word.isascii() for word in answer.json["texts"][0].split())


def test_tokens_before_the_end_are_counted(toy_lm: ds.LanguageModel) -> None:
    free = ds.generate(toy_lm, ["abc"], sampler=SAMPLER)
    tokens = free.ids[0, 3:].tolist()
    end = tokens[5]
    first = tokens.index(end)
    cut = ds.generate(toy_lm, ["abc"], sampler=replace(SAMPLER, eos_token_id=end))
    assert torch.equal(cut.ids, free.ids)
    assert cut.generated_tokens == first
    assert cut.texts == [toy_lm.tokenizer.decode(tokens[:first])]  # type: ignore[union-attr]
    assert cut.tokens_per_second == pytest.approx(first / cut.seconds)
    assert cut.canvas_tokens_per_second == pytest.approx(8 / cut.seconds)


def test_ctrl_c_keeps_the_batches_that_were_finished(
    cli: Cli, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "--model", toy, *prompt_options(PROMPTS[:2]), *SHORT, "--batch-size", "1", "--out", tmp_path)
    whole = cli(*call)
    decode, calls = dllm_sparse.generation.generate, iter(range(9))

    def interrupted(*arguments: Any, **options: Any) -> ds.Generation:
        if next(calls):
            raise KeyboardInterrupt
        return decode(*arguments, **options)

    monkeypatch.setattr(dllm_sparse.generation, "generate", interrupted)
    answer = cli(*call)
    assert answer.code == 130
    assert answer.stdout.splitlines()[0] == whole.stdout.splitlines()[0]
    assert len(json.loads((tmp_path / "generate.json").read_text())["texts"]) == 1


def test_a_prompt_that_is_too_long_is_found_before_anything_is_decoded(cli: Cli, toy: Path) -> None:
    answer = cli("generate", "--model", toy, "--prompt", "a", "--prompt", "b " * 400, *SHORT, "--batch-size", "1")
    assert (answer.code, answer.stdout) == (2, "")
    assert "exceeds the context" in answer.stderr


def test_options_an_autoregressive_model_ignores_are_named(cli: Cli, toy_ar: Path) -> None:
    answer = cli("generate", "--model", toy_ar, "--prompt", "a", "--gen-length", "4", "--steps", "3", "--cache", "dual")
    assert answer.code == 0
    assert "steps, cache" in answer.stderr


def test_the_summary_names_the_backend(cli: Cli, toy: Path) -> None:
    assert "reference backend" in cli("generate", "--model", toy, "--prompt", "a", "--p", "0.8", *SHORT).stderr
