"""Small models and recorders shared by the tests. Models are seeded and random: nothing here needs a download."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import typing
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.analysis.heldout import HeldOut
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.transformer import Transformer
from dllm_sparse.types import Observer, Site, Step, StepContext, StepResult

GOLDEN = Path(__file__).parent / "golden"


def golden(file: str, key: str = "cases") -> list[dict[str, Any]]:
    """The cases of one golden file."""
    found = json.loads((GOLDEN / f"{file}.json").read_text())[key]
    return [found] if isinstance(found, dict) else found


def interpreted(code: str) -> str:
    """What `code` prints where Triton's interpreter runs the kernels: chosen at import, so in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def conforms(value: Any, kind: Any) -> bool:
    """Whether a value has the shape of a type of the schema: exactly its keys, all the way down."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        return set(value) == set(hints) and all(conforms(value[key], hints[key]) for key in hints)
    if origin is list:
        return isinstance(value, list) and all(conforms(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(item, arguments[1]) for item in value.values())
    if arguments:
        return any(conforms(value, option) for option in arguments)
    return kind is typing.Any or isinstance(value, (int, float) if kind is float else kind)


def by_name(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize` for golden cases: their values and their names."""
    return {"argvalues": cases, "ids": [case["name"] for case in cases]}


def tiny_lm(kind: str = "diffusion", seed: int = 0, **facts: Any) -> LanguageModel:
    """A seeded random model of 2 layers: vocabulary 40, mask id 39, eos = pad 38, eot 37, bos 36."""
    causal = kind == "autoregressive"
    values: dict[str, Any] = {
        "vocab_size": 40,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "ffn_width": 24,
        "max_positions": 96,
        "bos_token_id": 36,
        "eos_token_id": 38,
        "eot_token_id": 37,
        "pad_token_id": 38,
        "mask_token_id": None if causal else 39,
    }
    config = TransformerConfig(causal=causal, **{**values, **facts})
    generator = torch.Generator().manual_seed(seed)
    transformer = Transformer(config).requires_grad_(False).eval()
    for name, parameter in transformer.named_parameters():
        scale, shift = (0.2, 1.0) if "norm" in name else (0.5, 0.0)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + shift)
    if not (causal or config.tied):
        transformer.head.weight[config.mask_token_id] = 0.0  # predicted never, as in a trained model
    return LanguageModel("tiny", "autoregressive" if causal else "diffusion", config, transformer)


def random_ids(rows: int, length: int, seed: int = 0, vocabulary: int = 36) -> Tensor:
    """Ids [rows, length] without any special token of `tiny_lm`."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def own_words(lm: LanguageModel, data: HeldOut) -> HeldOut:
    """The same problem with answers drawn from the model itself: changing the model can then only raise the loss."""
    odds = lm.logits(data.ids).float().softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(odds, 1, generator=torch.Generator().manual_seed(0))
    return replace(data, targets=drawn.view(data.ids.shape))


def left_padded(rows: list[Tensor], pad: int = 38) -> tuple[Tensor, Tensor]:
    """Prompts of different length as one batch [B, P] and its 0/1 mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((torch.full((width - len(row),), pad), row)) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message['content'] }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<bos>{% endif %}"
)


def write_toy_tokenizer(folder: Path) -> None:
    """One piece per id: letters, then four special tokens; every fifth piece carries what a terminal would act on."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    hostile = ("\x1b[2J", "\x9b31m", "\x07", "\x1b]0;title\x07")
    pieces = [chr(ord("a") + index) for index in range(26)] + [" "]
    pieces += [chr(0x100 + index) + (hostile[index % 4] if index % 5 == 0 else "") for index in range(27, 248)]
    pieces += ["<bos>", "<eos>", "<mask>", "<eot>"] + [chr(0x300 + index) for index in range(252, 256)]
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        additional_special_tokens=["<eot>"],
    )
    fast.save_pretrained(folder)


@dataclass
class Recorder(Observer):
    """Keeps copies of everything an observer is offered."""

    starts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    masks: list[tuple[Site, Tensor, Tensor, StepContext]] = field(default_factory=list)
    steps: list[tuple[Step, StepResult]] = field(default_factory=list)

    def on_start(self, ids: Tensor, token_class: Tensor) -> None:
        self.starts.append((ids.clone(), token_class.clone()))

    def on_mask(self, site: Site, values: Tensor, keep: Tensor, context: StepContext) -> None:
        self.masks.append((site, values.clone(), keep.clone(), context))

    def on_step(self, step: Step, result: StepResult) -> None:
        confidence = None if result.confidence is None else result.confidence.clone()
        self.steps.append((step, StepResult(result.ids.clone(), result.committed.clone(), confidence)))


def call_cli(*arguments: str) -> int:
    """The command line in this process, through its error boundary; returns the exit code."""
    from dllm_sparse.cli.app import app
    from dllm_sparse.cli.errors import run

    return run(lambda: app(list(arguments), prog_name="dllm-sparse"))


def run_cli(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in its own process, offline, as a user's shell would run it."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", "from dllm_sparse.cli import main; main()", *arguments]
    feed: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False, **feed)


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """For a while the system gives this process no more than `limit` of a resource (a constant of `resource`)."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def small_files_only(limit: int) -> AbstractContextManager[None]:
    """No file may grow past `limit` bytes, as on a disk that is full by then."""
    return limited(resource.RLIMIT_FSIZE, limit)


def little_memory(more: int) -> AbstractContextManager[None]:
    """This process gets at most about `more` bytes beyond what it holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limited(resource.RLIMIT_AS, pages * resource.getpagesize() + more)
