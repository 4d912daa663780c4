"""`dllm-sparse generate`: the answer on stdout, the narration on stderr, every option on its way to the decoder."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm_sparse as ds
import dllm_sparse.generation
from dllm_sparse.cli.prompts import DEFAULT_PROMPT
from tests.cli.conftest import Cli

SHORT = ("--gen-length", "8", "--block-length", "4", "--steps", "4")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
PROMPTS = ("once upon a time", "a cat", "z")
SAMPLER = ds.SamplerConfig(gen_length=8, block_length=4, steps=4)


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


def test_prompts_from_files_and_stdin(cli: Cli, toy: Path, tmp_path: Path) -> None:
    expected = cli("generate", "--model", toy, *prompt_options(), *SHORT, "--quiet").stdout
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    for name in ("p.txt", "p.jsonl"):
        assert cli("generate", "--model", toy, "--prompts", tmp_path / name, *SHORT, "--quiet").stdout == expected
    piped = cli("generate", "--model", toy, *SHORT, "--quiet", stdin="a cat\n")
    assert piped.stdout == expected.splitlines(keepends=True)[1]


def test_without_a_prompt_a_story_begins(cli: Cli, toy: Path, toy_chat: Path) -> None:
    for model in (toy, toy_chat):
        call = ("generate", "--model", model, "--p", "0.8", *SHORT)
        answer, asked = cli(*call), cli(*call, "--prompt", DEFAULT_PROMPT)
        assert (answer.code, answer.stdout) == (0, asked.stdout)
        said = f'no prompt given; continuing "{DEFAULT_PROMPT}"'
        assert answer.stderr.splitlines().count(said) == 1
        assert said not in asked.stderr
        as_json = cli(*call, "--json")
        assert (as_json.stderr, as_json.json["prompts"]) == ("", [DEFAULT_PROMPT])
        empty = cli(*call, "--json", stdin="")
        assert (empty.code, empty.stdout) == (2, "")
        assert "stdin holds no prompt" in empty.stderr


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


def test_the_fallback_of_auto_is_said_once_and_a_named_backend_never(cli: Cli, toy: Path) -> None:
    call = ("generate", "--model", toy, *prompt_options(), "--batch-size", "1", "--device", "cpu", *SHORT)
    (said,) = (line for line in cli(*call, "--p", "0.8").stderr.splitlines() if "backend" in line)
    assert "backend auto falls back to cpu, because triton needs a CUDA GPU" in said
    assert said.endswith("; here: reference")  # these forwards are too long to skip anything
    for named in (("--p", "0.8", "--backend", "reference"), ()):
        answer = cli(*call, *named)
        assert answer.code == 0
        assert "backend" not in answer.stderr
