"""Fast-dLLM's own code and ours, side by side on the same weights, prompts and forward counts.

    python benchmarks/against_fast_dllm.py --repo PATH --shape llada-8b [--cache dual] [--execution auto] [--out FILE]

PATH is a checkout of the Fast-dLLM project; its llada/ folder is imported and run as it is (it needs einops). Nothing
of it is part of this repository. It decodes one prompt at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from llada_peer import llada_peer
from peers import our_model, our_run, parser, race
from torch import Tensor

import dllm_sparse as ds

FUNCTIONS = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repo", type=Path, required=True)
    options.add_argument("--cache", default="dual", choices=list(FUNCTIONS))
    options.add_argument("--block-length", type=int, default=32)
    options.add_argument("--threshold", type=float)
    args = options.parse_args()
    if args.batch != 1:
        raise SystemExit("Fast-dLLM's functions take one prompt; use --batch 1")
    lm = our_model(args)
    sampler = ds.SamplerConfig(
        gen_length=args.gen_length,
        block_length=args.block_length,
        cache=args.cache,
        threshold=args.threshold,
        confidence_dtype="float64",
        early_block_exit=True,
    )
    ours, prompts, facts = our_run(lm, args, sampler)
    model = llada_peer(lm, args.repo / "llada" / "model")
    sys.path.insert(0, str(args.repo / "llada"))
    import generate as peer  # type: ignore[import-not-found]

    function = getattr(peer, FUNCTIONS[args.cache])

    def theirs() -> tuple[Tensor, int]:
        with torch.inference_mode():
            ids, forwards = function(
                model,
                prompts,
                steps=args.gen_length,
                gen_length=args.gen_length,
                block_length=args.block_length,
                threshold=args.threshold,
                mask_id=lm.mask_token_id,
            )
        return ids, forwards

    race(ours, {"Fast-dLLM": theirs}, lm, args, facts)


if __name__ == "__main__":
    main()
