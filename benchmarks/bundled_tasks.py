"""The items of the bundled tasks, written anew from the corpus the twins were trained on.

    python benchmarks/bundled_tasks.py --corpus corpus.jsonl.xz --tokenizer FOLDER_OF_A_TWIN --out items

Held-out documents and problems alone; the same recipe and corpus give the same items as
`dllm_sparse/evaluation/tasks/bundled/data`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from dllm_sparse.training.held_out import write_tasks
from dllm_sparse.training.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny-twins")
    parser.add_argument("--corpus", type=Path, required=True, help='lines of {"text": ...}')
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json, of a twin")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(asked.tokenizer / "tokenizer.json"))
    for path in write_tasks(asked.corpus, load_recipe(asked.recipe), tokenizer, asked.out, asked.items):
        print(path)


if __name__ == "__main__":
    main()
