"""Dream's tokenizer files: a byte-level BPE under a class of remote code, read by transformers' Qwen2Tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dllm_sparse as ds
from dllm_sparse.generation import encode
from tests.families import golden_copy

SPECIAL = {250: "<|beginoftext|>", 251: "<|endoftext|>", 252: "<|mask|>", 253: "<|im_start|>", 254: "<|im_end|>"}
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Dream checkpoint with tokenizer files as the public ones have them: special tokens behind the pieces,
    of which only the first 30 can occur."""
    folder = tmp_path_factory.mktemp("dream")
    golden_copy("dream-tiny")(folder)
    pieces = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", "th", "Ġth"]  # Ġ is a space, Ċ a newline
    pieces += [f"<{index}>" for index in range(len(pieces), 250)]
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nĠ th\n")
    described = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": SPECIAL[250],
        "eos_token": SPECIAL[251],
        "pad_token": SPECIAL[251],
        "mask_token": SPECIAL[252],
        "unk_token": None,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {
            str(token): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            for token, text in SPECIAL.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code was run')\n")
    return folder


def ids_of(text: str) -> list[int]:
    """Ids of lower-case words, byte by byte but for the merges."""
    places = {" ": 26, "\n": 27}
    found = [places[letter] if letter in places else ord(letter) - ord("a") for letter in text]
    joined: list[int] = []
    for token in found:
        joined.append(token)
        if joined[-2:] == [19, 7]:
            joined[-2:] = [28]
        if joined[-2:] == [26, 28]:
            joined[-2:] = [29]
    return joined


def test_text_becomes_the_ids_of_the_files_and_back(folder: Path) -> None:
    lm = ds.load(str(folder), device="cpu")
    ids, mask = encode(lm, ["the path", "go"])
    assert ids.tolist() == [[28, 4, 26, 15, 0, 28], [251] * 4 + [6, 14]]
    assert ids_of("go the path") == [6, 14, 29, 4, 26, 15, 0, 28] == encode(lm, ["go the path"])[0][0].tolist()
    assert mask is not None
    assert mask.tolist() == [[1] * 6, [0] * 4 + [1] * 2]
    assert lm.tokenizer is not None
    assert lm.tokenizer.decode([28, 4, 26, 15, 0, 28, 251, 252], skip_special_tokens=True) == "the path"
    assert lm.tokenizer.convert_tokens_to_ids("<|mask|>") == lm.mask_token_id == 252
    assert encode(lm, ["a<|mask|>b"])[0].tolist() == [[0, 252, 1]]


def test_the_chat_template_is_the_folders(folder: Path) -> None:
    lm = ds.load(str(folder), device="cpu")
    ids, _ = encode(lm, ["go on"], chat=True)
    turns = [("system", "be kind"), ("user", "go on")]
    spoken = [token for role, text in turns for token in [253, *ids_of(f"{role}\n{text}"), 254, 27]]
    assert ids.tolist() == [[*spoken, 253, *ids_of("assistant\n")]]
    out = ds.generate(lm, ["go on"], sampler=ds.SamplerConfig(gen_length=4, remasking="entropy"), chat=True)
    assert out.prompt_length == ids.shape[1]
    assert out.forward_passes == 4
