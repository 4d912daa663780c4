"""Drift, unions and reuse of a 135M masked-diffusion model, beside figures measured earlier on a sister checkpoint.

    python benchmarks/drift_135m.py --model FOLDER --out benchmarks/results/drift_135m.json

The earlier figures: SmolLM2-135M adapted to LLaDA-style diffusion, 16 prompts, one block of 32 decoded one token a
step, fp32. Drift and unions come from a first adaptation, reuse from a second with a little less data; this checkpoint
is the second one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import dllm_sparse as ds
from dllm_sparse.analysis.drift import Statistics
from dllm_sparse.analysis.prompts import bundled_prompts
from dllm_sparse.analysis.recorder import MaskRecorder
from dllm_sparse.analysis.reuse import measure_reuse
from dllm_sparse.generation import encode

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
SITES = (("intermediate", 0.9), ("intermediate", 0.8), ("input", 0.9))


def drift(lm: ds.LanguageModel, prompts: list[str], sampler: ds.SamplerConfig, config: ds.SparsityConfig) -> Any:
    """Similarity, drift, unions and movement of one site at one p."""
    recorder = MaskRecorder(lm.kind, sampler)
    for start in range(0, len(prompts), 4):
        ds.generate(lm, prompts[start : start + 4], sampler=sampler, sparsity=config, observers=(recorder,))
    statistics = Statistics(recorder.counts())
    site = config.site_names[0]
    curve = statistics.curve(site, None, "response")
    by_layer = [statistics.curve(site, layer, "response") for layer in statistics.counts.layers]
    pooled = curve.jaccard_overall
    return {
        "jaccard_consecutive": [float(pooled.micro[0]), float(pooled.low[0]), float(pooled.high[0])],
        "jaccard_consecutive_by_layer": [float(layer.jaccard_overall.micro[0]) for layer in by_layer],
        "jaccard_token_mean": float(pooled.token_mean[0]),
        "chance": float(pooled.chance[0]),
        "drift_after_31_steps": [
            float(values[-1]) for values in (curve.drift.micro, curve.drift.low, curve.drift.high)
        ],
        "drift_after_31_steps_by_layer": [float(layer.drift.micro[-1]) for layer in by_layer],
        "half_life_steps": curve.half_life,
        "union_density": {str(u.tokens): u.density for u in statistics.unions(site, None)},
        "change": curve.moved_overall,
        "change_by_layer": [layer.moved_overall for layer in by_layer],
    }


def main() -> None:
    """Measures everything and writes it beside the earlier figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--reuse-prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.time()
    lm = ds.load(arguments.model, device="cpu", dtype="float32")
    sampler = ds.SamplerConfig(gen_length=32, block_length=32)
    prompts = bundled_prompts()[: arguments.prompts]
    result: dict[str, Any] = {"model": Path(arguments.model).name, "prompts": len(prompts), "earlier": EARLIER}
    result["measured"] = {}
    for site, p in SITES:
        config = ds.SparsityConfig(p=p, sites=site)
        result["measured"][f"{site} {p}"] = drift(lm, prompts, sampler, config)
        print(site, p, f"{time.time() - started:.0f} s", file=sys.stderr)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    few = [encode(lm, prompts[: arguments.reuse_prompts])]
    config = ds.SparsityConfig(p=0.9, sites="intermediate")
    result["reuse_prompts"] = arguments.reuse_prompts
    result["reuse p=0.9"] = [asdict(row) for row in measure_reuse(lm, few, sampler, config)]
    config = replace(config, p=0.95)
    result["reuse p=0.95"] = [asdict(row) for row in measure_reuse(lm, few, sampler, config, refresh=(1, 2), taus=())]
    result["seconds"] = time.time() - started
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
