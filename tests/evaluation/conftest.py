"""Golden checkpoints with a character tokenizer beside them, and tasks over local files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dllm_sparse as ds
from tests.helpers import GOLDEN

SPECIAL = {
    "llama-tiny": {"pad_token": 0, "bos_token": 1, "eos_token": 2},
    "llada-tiny": {"bos_token": 248, "eos_token": 249, "mask_token": 250},
}
LETTERS = "\n" + "".join(chr(code) for code in range(32, 127))


def checkpoint(name: str, folder: Path) -> Path:
    """A copy of a golden checkpoint with a tokenizer of one token a character (ids 3 and up)."""
    shutil.copytree(GOLDEN / name, folder)
    vocabulary = {letter: index for index, letter in enumerate(LETTERS, start=3)}
    special = {f"<{role}>": index for role, index in SPECIAL[name].items()}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, **special}, unk_token="<eos_token>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{role: f"<{role}>" for role in SPECIAL[name]})
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the golden Llama checkpoint with a tokenizer."""
    return checkpoint("llama-tiny", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def llada_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the golden LLaDA checkpoint with a tokenizer."""
    return checkpoint("llada-tiny", tmp_path_factory.mktemp("models") / "llada")


@pytest.fixture(scope="session")
def ar(llama_folder: Path) -> ds.LanguageModel:
    """The autoregressive model, with tokenizer."""
    return ds.load(str(llama_folder), device="cpu")


@pytest.fixture(scope="session")
def diffusion(llada_folder: Path) -> ds.LanguageModel:
    """The diffusion model, with tokenizer."""
    return ds.load(str(llada_folder), device="cpu")


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice, a greedy, a rolling and a generation task of a few items each, as lm-eval YAMLs."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["fox", "river", "stone", "cloud", "lamp", "sea", "tree", "bird"]
    docs = [
        {
            "context": f"The {words[i % 8]} and the {words[(3 * i + 1) % 8]}",
            "choices": [words[(i + j) % 8] for j in range(3)],
            "label": i % 3,
            "answer": "ab"[i % 2],
        }
        for i in range(12)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {folder}/docs.jsonl}}\ntest_split: test\n"
    mean = "aggregation: mean\n    higher_is_better: true\n"
    tasks = {
        "choice": f"output_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\ndoc_to_target: label\n"
        f"metric_list:\n  - metric: acc\n    {mean}",
        "greedy": f"output_type: loglikelihood\ndoc_to_text: context\ndoc_to_target: answer\n"
        f"metric_list:\n  - metric: acc\n    {mean}",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: context\n"
        "metric_list:\n  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n",
        "written": f"output_type: generate_until\ndoc_to_text: context\ndoc_to_target: answer\n"
        f"generation_kwargs: {{until: ['\\n'], max_gen_toks: 4, do_sample: false}}\n"
        f"metric_list:\n  - metric: exact_match\n    {mean}",
    }
    for name, body in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{body}")
    return folder
