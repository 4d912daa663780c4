"""What masking costs on a CPU: one forward of N tokens, dense against the reference-masked one, in the same run.

    python benchmarks/masked_forward.py FOLDER [--tokens 640] [--out FILE]

Prints the ratio of median CPU seconds (of --threads threads) per setting; the same selection by torch.sort is
timed beside the rule as the baseline it replaces.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dllm_sparse as ds
from dllm_sparse.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = ds.load(args.folder, device="cpu", dtype="float32")
    ids = torch.randint(lm.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    variants = {"dense": lambda: lm.logits(ids)}
    for p in (0.5, 0.8, 0.95):
        variants[f"top_p p={p}"] = sparse_forward(lm, ids, p)
    seconds = alternate(variants, args.repeats)
    layer = {"rule": selection_seconds(lm, args.tokens, by_sort=False)}
    layer["torch_sort"] = selection_seconds(lm, args.tokens, by_sort=True)
    for name, value in seconds.items():
        print(f"{name:<16}{value * 1e3:9.0f} ms {value / seconds['dense']:6.2f}x dense")
    rule, torch_sort = layer["rule"] * 1e3, layer["torch_sort"] * 1e3
    print(f"selection of both sites of a layer: {rule:.1f} ms, by torch.sort {torch_sort:.1f} ms")
    if args.out:
        settings = {"model": Path(args.folder).name, "tokens": args.tokens, "dtype": "float32"}
        settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        write_json(args.out, {**settings, "median_seconds": seconds, "layer_selection_seconds": layer})


def sparse_forward(lm: ds.LanguageModel, ids: torch.Tensor, p: float) -> Callable[[], object]:
    def run() -> object:
        with ds.sparsify(lm, ds.SparsityConfig(p=p)):
            return lm.logits(ids)

    return run


def alternate(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns so that a slow spell hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(repeats + 1):
        for name, run in variants.items():
            started = time.process_time()
            run()
            if round_:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def selection_seconds(lm: ds.LanguageModel, tokens: int, *, by_sort: bool) -> float:
    """Median seconds of the two masks of one layer, by our rule or by a descending sort with an fp64 cumsum."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(tokens, width, generator=generator) for width in (lm.config.width, lm.config.ffn_width)]
    rule = sorted_top_p if by_sort else ds.top_p_mask
    return alternate({"rule": lambda: [rule(v, 0.8) for v in values]}, 9)["rule"]


def sorted_top_p(v: torch.Tensor, p: float) -> torch.Tensor:
    ordered = v.abs().sort(dim=-1, descending=True).values
    mass = ordered.cumsum(-1, dtype=torch.float64)
    place = (mass < p * mass[:, -1:]).sum(-1, keepdim=True)
    return v.abs() >= ordered.gather(-1, place.clamp_max(v.shape[-1] - 1))


if __name__ == "__main__":
    main()
