"""Compares the native engine with transformers' own class on a real autoregressive checkpoint, in fp32 on a CPU.

    python benchmarks/check_against_transformers.py FOLDER [--out FILE]

Prints the largest absolute logit difference over some texts and whether greedy continuations of 64 tokens agree.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import dllm_sparse as ds
from dllm_sparse.files import write_json

TEXTS = (
    "Once upon a time, a small brown fox",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at a lower temperature on a mountain because",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = ds.load(str(args.folder), device="cpu", dtype="float32")
    other = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    rows = [compare(lm, other, text, args.tokens) for text in TEXTS]
    for row in rows:
        print(f"{row['max_logit_difference']:.2e}  identical greedy: {row['identical']}  {row['text']!r}")
    if args.out:
        settings = {"model": args.folder.name, "dtype": "float32", "device": "cpu", "tokens": args.tokens}
        write_json(args.out, {**settings, "torch": torch.__version__, "rows": rows})


@torch.inference_mode()
def compare(lm: ds.LanguageModel, other: torch.nn.Module, text: str, tokens: int) -> dict[str, object]:
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    difference = float((lm.logits(ids) - other(ids).logits).abs().max())
    ours = ds.generate(lm, prompt_ids=ids, sampler=ds.SamplerConfig(gen_length=tokens, stop_at_eos=True)).ids
    theirs = other.generate(ids, do_sample=False, max_new_tokens=tokens)
    return {"text": text, "max_logit_difference": difference, "identical": torch.equal(ours, theirs)}


if __name__ == "__main__":
    main()
