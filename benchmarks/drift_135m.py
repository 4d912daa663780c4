"""Drift, unions and reuse of a 135M masked-diffusion model, beside figures measured earlier on a sister checkpoint.

    python benchmarks/drift_135m.py --model FOLDER --out benchmarks/results/drift_135m.json [--parts observed]
    ... --parts long --texts CORPUS.jsonl.xz    # the same with prompts of 64 tokens, cut from longer texts

Masks are measured twice: observed, while the model decodes dense, and applied. Parts are kept in the file one by one,
so a long run may be split.

The earlier figures: SmolLM2-135M adapted to LLaDA-style diffusion, 16 prompts, one block of 32 decoded one token a
step, fp32. Drift and unions come from a first adaptation, reuse from a second with a little less data; this checkpoint
is the second one.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import dllm_sparse as ds
from dllm_sparse.analysis.drift import Statistics
from dllm_sparse.analysis.prompts import bundled_prompts
from dllm_sparse.analysis.recording import Prompts, record
from dllm_sparse.analysis.reuse import measure_reuse
from dllm_sparse.generation import encode
from dllm_sparse.types import SiteName

EARLIER = {
    "jaccard_consecutive": [0.87, 0.92],
    "drift_after_31_steps": [0.23, 0.59],
    "union_density": {
        "intermediate 0.9": {"1": 0.517, "2": 0.625, "4": 0.720, "8": 0.792, "16": 0.856, "32": 0.956},
        "intermediate 0.8": {"1": 0.367, "2": 0.462, "4": 0.566, "8": 0.664, "16": 0.756, "32": 0.895},
        "input 0.9": {"1": 0.623, "2": 0.730, "4": 0.806, "8": 0.855, "16": 0.902, "32": 0.976},
    },
    "mask_reuse_kl_by_lag": {
        "0.9": {"0": 0.013, "1": 0.047, "2": 0.072, "4": 0.113, "8": 0.142},
        "0.95": {"0": 0.0035, "1": 0.022},
    },
    "token_reuse": {"0.05": [13.0, 0.0020], "0.1": [8.1, 0.0091], "0.2": [5.1, 0.037]},
    "input_change_median": [0.036, 0.052],
    "input_change_p90": [0.26, 0.39],
}
APPLIED = (("intermediate", 0.9), ("intermediate", 0.8), ("input", 0.9))
SAMPLER = ds.SamplerConfig(gen_length=32, block_length=32)


def statistics(lm: ds.LanguageModel, prompts: Prompts, config: ds.SparsityConfig, apply: bool) -> dict[str, Any]:
    """Similarity, drift, unions and movement of the config's sites, all layers pooled, with the range over layers."""
    found = Statistics(record(lm, prompts, SAMPLER, config, batch_size=4, apply=apply).counts)
    return {f"{site} {config.p:g}": site_statistics(found, site) for site in config.site_names}


def site_statistics(found: Statistics, site: SiteName) -> dict[str, Any]:
    """One site's numbers; three of them are value, 95 % low, 95 % high."""
    curve = found.curve(site, None, "response")
    layers = [found.curve(site, layer, "response") for layer in found.counts.layers]
    pooled, drift = curve.jaccard_overall, curve.drift
    return {
        "jaccard_consecutive": [float(values[0]) for values in (pooled.micro, pooled.low, pooled.high)],
        "jaccard_consecutive_layers": spread([float(layer.jaccard_overall.micro[0]) for layer in layers]),
        "jaccard_token_mean": float(pooled.token_mean[0]),
        "chance": float(pooled.chance[0]),
        "drift_after_31_steps": [float(values[-1]) for values in (drift.micro, drift.low, drift.high)],
        "drift_after_31_steps_layers": spread([float(layer.drift.micro[-1]) for layer in layers]),
        "half_life_steps": curve.half_life,
        "union_density": {str(u.tokens): u.density for u in found.unions(site, None) if u.tokens},
        "change": curve.moved_overall,
        "change_median_layers": spread([layer.moved_overall["median"] for layer in layers]),
        "change_p90_layers": spread([layer.moved_overall["p90"] for layer in layers]),
    }


def spread(values: Sequence[float]) -> list[float]:
    """Smallest and largest."""
    return [min(values), max(values)]


def observed(lm: ds.LanguageModel, prompts: Sequence[str]) -> dict[str, Any]:
    """Masks of dense decoding: both sites from one run at each p."""
    configs = [ds.SparsityConfig(p=p) for p in (0.9, 0.8)]
    return {key: value for config in configs for key, value in statistics(lm, prompts, config, False).items()}


def applied(lm: ds.LanguageModel, prompts: Sequence[str]) -> dict[str, Any]:
    """Masks that were applied, one site at a time."""
    configs = [ds.SparsityConfig(p=p, sites=site) for site, p in APPLIED]
    return {key: value for config in configs for key, value in statistics(lm, prompts, config, True).items()}


def reuse(lm: ds.LanguageModel, prompts: Sequence[str]) -> dict[str, Any]:
    """Reuse of masks and of FFN outputs, four prompts."""
    few = [encode(lm, prompts[:4])]
    config = ds.SparsityConfig(p=0.9, sites="intermediate")
    rows = measure_reuse(lm, few, SAMPLER, config)
    sharper = measure_reuse(lm, few, SAMPLER, replace(config, p=0.95), refresh=(1, 2), taus=())
    return {"prompts": 4, "0.9": [asdict(row) for row in rows], "0.95": [asdict(row) for row in sharper]}


def long(lm: ds.LanguageModel, texts: Path) -> dict[str, Any]:
    """Observed masks and reuse after four prompts of 64 tokens, the first of the file's texts that have 80."""
    assert lm.tokenizer is not None
    rows: list[list[int]] = []
    with lzma.open(texts, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids = lm.tokenizer(json.loads(line)["text"])["input_ids"]
            rows += [ids[:64]] if len(ids) >= 80 and len(rows) < 4 else []
            if len(rows) == 4:
                break
    config = ds.SparsityConfig(p=0.9, sites="intermediate")
    found = measure_reuse(lm, [(torch.tensor(rows), None)], SAMPLER, config, refresh=(1, 2), taus=(0.05,))
    return statistics(lm, rows, ds.SparsityConfig(p=0.9), False) | {"reuse": [asdict(row) for row in found]}


PARTS: dict[str, Callable[[ds.LanguageModel, Sequence[str]], dict[str, Any]]] = {
    "observed": observed,
    "applied": applied,
    "reuse": reuse,
}


def main() -> None:
    """Measures the parts asked for and keeps them beside the earlier figures and the parts already in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "long"], default=list(PARTS))
    parser.add_argument("--texts", type=Path, help="xz-compressed JSON lines with a `text`, for part long")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = ds.load(arguments.model, device="cpu", dtype="float32")
    prompts = bundled_prompts(arguments.prompts)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result |= {"model": Path(arguments.model).name, "prompts": len(prompts), "earlier": EARLIER}
    for part in arguments.parts:
        result[part] = long(lm, arguments.texts) if part == "long" else PARTS[part](lm, prompts)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
