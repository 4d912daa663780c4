import json

from dllm_sparse.report.drift import FILES

SMALL = ("--gen-length", 4, "--block-length", 4, "--limit", 2)


def test_files_on_stdout_and_sentences_on_stderr(cli, tmp_path):
    answer = cli("drift-report", *SMALL, "--out", tmp_path)
    assert answer.code == 0
    assert answer.stdout.splitlines() == [str(tmp_path / name) for name in FILES]
    assert "a token keeps" in answer.stderr
    assert json.loads((tmp_path / "report.json").read_text())["model"]["name"] == "tiny-diffusion"


def test_json_is_one_object_that_knows_its_options(cli, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The fox\nOne day, the fox\n")
    flags = ("--scope", "sequence", "--reuse", 1, "--delta", 2, "--p", 0.7, "--json")
    answer = cli("drift-report", *SMALL, *flags, "--prompts", prompts, "--out", tmp_path / "report")
    assert answer.code == 0
    assert answer.stderr == ""
    assert answer.json["prompts"] == ["The fox", "One day, the fox"]
    assert [variant["scope"] for variant in answer.json["variants"]] == ["token", "sequence"]
    assert len(answer.json["reuse"]) == 4
    assert answer.json["config"]["deltas"] == [2]
    assert answer.json["config"]["snapshot_every"] == 2


def test_prompts_come_from_options_and_files_together(cli, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("The fox\nnever read\n")
    prompts = ("--prompt", "One day", "--prompts", file, "--backend", "reference")
    answer = cli("drift-report", *SMALL, *prompts, "--out", tmp_path / "report", "--json")
    assert answer.code == 0, answer.stderr
    assert answer.json["prompts"] == ["One day", "The fox"]
    assert answer.json["variants"][0]["sparsity"]["backend"] == "reference"


def test_the_fallback_of_auto_is_said_where_masks_are_applied(cli, tmp_path):
    call = ("drift-report", *SMALL, "--batch-size", 1, "--device", "cpu", "--out", tmp_path)
    assert cli(*call).stderr.count("backend auto falls back to cpu") == 1
    assert "falls back" not in cli(*call, "--observe").stderr


def test_an_autoregressive_model_gets_its_own_question(cli, tmp_path):
    answer = cli("drift-report", "--model", "tiny-ar", *SMALL, "--out", tmp_path, "--json")
    assert "prompt's consensus" in answer.json["question"]


def test_wrong_values_exit_with_2_and_run_nothing(cli, tmp_path):
    for flags in (("--p", 1.5), ("--scope", "word"), ("--block-length", 3), ("--prompts", tmp_path / "none.txt")):
        answer = cli("drift-report", *SMALL, *flags, "--out", tmp_path / "report")
        assert answer.code == 2, answer.stderr
        assert answer.stdout == ""
    assert not (tmp_path / "report").exists()
