"""What a user meets when something is wrong: a message, an exit code, nothing on stdout, no traceback."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_sparse.cli.critical_sparsity import critical_sparsity
from dllm_sparse.cli.errors import run
from dllm_sparse.cli.generate import generate
from dllm_sparse.cli.layers import layers
from dllm_sparse.cli.memory import names_memory_options
from dllm_sparse.cli.models import models
from dllm_sparse.cli.train import train
from dllm_sparse.types import OutOfMemory, out_of_memory
from tests.cli.conftest import Cli
from tests.helpers import little_memory

ENTRY = [sys.executable, "-c", "from dllm_sparse.cli import main; main()"]


@pytest.fixture
def broken(toy: Path, tmp_path: Path) -> Path:
    """The toy with weights in the up projection of layer 1 that overflow."""
    folder = Path(shutil.copytree(toy, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.transformer.blocks.1.up_proj.weight"][0] = 3e38
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(cli: Cli, code: int, *arguments: object, words: tuple[str, ...]) -> None:
    """Also under --json, where stdout must stay empty."""
    for extra in ((), ("--json",)):
        answer = cli(*arguments, *extra)
        assert answer.code == code, answer.stderr
        assert answer.stdout == ""
        assert "Traceback" not in answer.stderr
        for word in words:
            assert word in answer.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--p", "1.5"), ("p is 1.5", "0 to 1", "0.8")),
        (("--p", "nan"), ("p is nan", "0 to 1", "0.8")),
        (("--threshold", "nan"), ("threshold is nan", "0 to 1", "0.9")),
        (("--p", "-1", "--rule", "threshold"), ("magnitude of at least 0",)),
        (("--gen-length", "30"), ("block_length 32 does not divide gen_length 30", "try block_length 30")),
        (("--gen-length", "30", "--block-length", "7"), ("allowed: divisors of 30", "try block_length 6")),
        (("--steps", "5"), ("steps 5", "4 blocks", "try steps 4")),
        (("--gen-length", "320"), ("prompt of 3 tokens", "context of 256", "try gen_length 224")),
        (("--gen-length", "0"), ("gen_length is 0",)),
        (("--threshold", "2"), ("threshold is 2.0",)),
        (("--threshold", "0.5", "--factor", "1"), ("give one of them",)),
        (("--p-schedule", "0.5"), ("--p-schedule is '0.5'", "0:0.7,1:0.9")),
        (("--p-schedule", "0:0.5,1:7"), ("p is 7.0",)),
        (("--device", "gpu"), ("device is 'gpu'", "cuda:N")),
        (("--dtype", "int4"), ("--dtype", "bfloat16")),
        (("--scope", "batch"), ("--scope", "sequence")),
        (("--batch-size", "0"), ("--batch-size",)),
        (("--no-such-option",), ("No such option",)),
    ],
)
def test_usage_errors_exit_2(cli: Cli, toy: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(cli, 2, "generate", "--model", toy, "--prompt", "abc", *options, words=words)


def test_usage_errors_come_before_the_model_is_looked_for(cli: Cli) -> None:
    refused(cli, 2, "generate", "--model", "no-such-model", "--prompt", "a", "--p", "7", words=("p is 7",))


def test_a_bad_line_runs_nothing(cli: Cli, toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "abc"}\n{"prompt": }\n')
    out = tmp_path / "out"
    refused(
        cli, 2, "generate", "--model", toy, "--prompts", file, "--out", out, words=(str(file), "line 2", "expected")
    )
    assert not out.exists()


def test_models_that_cannot_be_loaded_exit_1(
    cli: Cli, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    call = ("generate", "--prompt", "abc", "--model")
    refused(cli, 1, *call, "llada-8", words=("unknown model 'llada-8'", "llada-8b", "--model FOLDER"))
    refused(cli, 1, *call, "llada-8b", words=("GSAI-ML/LLaDA-8B-Instruct", "HF_HUB_OFFLINE", "--model FOLDER"))
    refused(cli, 1, *call, tmp_path, words=("no config.json",))
    folder = Path(shutil.copytree(toy, tmp_path / "toy"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(cli, 1, *call, folder, words=("model.safetensors", "download it again"))
    weights.rename(folder / "pytorch_model.bin")
    refused(cli, 1, *call, folder, words=("pickle", "refused"))


def test_nan_names_its_place(cli: Cli, broken: Path) -> None:
    call = ("generate", "--model", broken, "--prompt", "abc", "--gen-length", "4", "--block-length", "4")
    refused(cli, 1, *call, words=("layer 1, site up, step 0: NaN or Inf",))
    refused(cli, 1, *call, "--p", "0.8", words=("layer 1, site intermediate, step 0: NaN or Inf",))
    refused(cli, 1, *call, "--p", "1", words=("layer 1, site intermediate, step 0: NaN or Inf",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_options_without_a_gpu(cli: Cli, toy: Path) -> None:
    call = ("generate", "--model", toy, "--prompt", "abc", "--gen-length", "4", "--block-length", "4")
    refused(cli, 1, *call, "--p", "0.8", "--backend", "triton", words=("triton", "GPU", "--backend auto"))
    refused(cli, 2, *call, "--device", "cuda", words=("no CUDA GPU", "--device cpu"))
    assert cli(*call, "--p", "0.8", "--backend", "auto").code == 0


def test_tracebacks_only_on_request(cli: Cli, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback stands above the message, and the exit code stays what it is."""
    call = ("generate", "--model", toy, "--prompt", "a", "--p", "7")
    assert "Traceback" not in cli(*call).stderr
    monkeypatch.setenv("DLLM_SPARSE_DEBUG", "1")
    answer = cli(*call)
    assert (answer.code, answer.stdout) == (2, "")
    assert answer.stderr.startswith("Traceback (most recent call last):")
    assert answer.stderr.endswith("\nerror: p is 7.0; allowed: 0 to 1 (for example 0.8)\n")
    gone = cli("generate", "--model", toy / "gone", "--prompt", "a")
    assert gone.code == 1
    assert "Traceback" in gone.stderr


def test_unexpected_failures_say_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyError("surprise")

    assert run(fail) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "unexpected KeyError: 'surprise'" in printed.err
    assert "DLLM_SPARSE_DEBUG=1" in printed.err


def test_memory_runs_out_on_a_cpu(cli: Cli, toy: Path, tmp_path: Path) -> None:
    """Really: the system gives no more."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n" * 4000)
    decoding = ("generate", "--model", toy, "--prompts", prompts, "--batch-size", "4000", "--gen-length", "224")
    shape = ("bench", "engine", "--shape", "llama-3.1-8b", "--device", "cpu")
    cli(*decoding, "--gen-length", "0")  # imports are done with
    with little_memory(300 << 20):
        refused(cli, 1, *decoding, words=("error: out of memory: ", "GiB could not be allocated on the CPU; lower "))
        refused(cli, 1, *decoding, words=("--batch-size", "--gen-length", "--dtype bfloat16"))
        refused(cli, 1, *shape, "--dtype", "float32", words=("weights take 29.9 GiB in float32", "--dtype bfloat16"))
        answer = cli(*shape, "--dtype", "bfloat16")
    assert (answer.code, answer.stdout) == (1, "")
    assert answer.stderr == "error: out of memory: the weights take 15.0 GiB in bfloat16; choose a smaller model\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has"), "3.50 GiB could not be "),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`\nmore"), "CUBLAS_STATUS"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "(CUDA error: out of memory)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."),
            "2.00 Gi",
        ),
        (MemoryError("Unable to allocate 7.45 GiB for an array"), "7.45 GiB could not be allocated on the CPU"),
        (MemoryError(), "out of memory"),
    ],
)
def test_every_kind_of_memory_error_is_known(error: Exception, words: str) -> None:
    """CUDA's in the words torch gives them; no GPU is needed to read them."""
    assert words in (out_of_memory(error) or "")
    assert out_of_memory(ValueError("out of memory")) is None


def test_advice_names_options_the_command_has() -> None:
    def advice(command: Callable[..., None], **given: object) -> str:
        def fail(**_: object) -> None:
            raise MemoryError

        fail.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
        with pytest.raises(OutOfMemory) as caught:
            names_memory_options(fail)(**given)
        return str(caught.value).partition("; ")[2]

    assert advice(critical_sparsity, dtype="auto") == (
        "lower --batch-tokens, --mc-batch, --gen-length or use --dtype bfloat16"
    )
    assert advice(layers, dtype="bfloat16", windows=8) == "lower --windows, --length"
    assert advice(generate, dtype="bfloat16", batch_size=1) == "lower --gen-length"
    assert advice(train) == "lower --width, --layers, --ffn-width or take fewer rows in the recipe's [[mix]]"
    assert advice(models) == "choose a smaller model"


def test_a_file_that_cannot_be_written(cli: Cli, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    call = ("generate", "--model", toy, "--prompt", "abc", "--gen-length", "4", "--block-length", "4")
    refused(cli, 1, *call, "--out", tmp_path / "file" / "out", words=("error:", "file"))


def test_interrupt_exits_130(toy: Path) -> None:
    """A real Ctrl-C, in the middle of decoding."""
    call = "--prompt abc --gen-length 240 --block-length 240 --steps 240000"
    process = subprocess.Popen(
        [*ENTRY, "generate", "--model", str(toy), *call.split()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert any("masked diffusion" in line for line in process.stderr)  # loaded; decoding starts
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr.endswith("interrupted\n")
    assert "Traceback" not in stderr


def test_a_reader_that_leaves_is_no_failure_to_shout_about() -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # buffered, as usual
    process = subprocess.Popen([*ENTRY, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "")


def test_a_full_disk_behind_stdout_is_said() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 (the device that is always full)
        ended = subprocess.run([*ENTRY, "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: the answer cannot be written to stdout (No space left on device)\n"
