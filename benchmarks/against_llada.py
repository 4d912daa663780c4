"""The official LLaDA `generate` and ours, side by side on the same weights, prompts and forward counts.

    python benchmarks/against_llada.py --repo PATH --modeling FOLDER --shape llada-8b [--execution auto] [--out FILE]

PATH is a checkout of the LLaDA project (its generate.py is imported and run as it is). FOLDER holds the checkpoint's
modeling_llada.py and configuration_llada.py, which the project keeps beside its weights. Nothing of either is part of
this repository.
"""

from __future__ import annotations

from pathlib import Path

import torch
from llada_peer import llada_peer
from peers import import_from, our_model, our_run, parser, race
from torch import Tensor

import dllm_sparse as ds


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repo", type=Path, required=True)
    options.add_argument("--modeling", type=Path, required=True)
    options.add_argument("--block-length", type=int, default=32)
    options.add_argument("--steps", type=int)
    args = options.parse_args()
    lm = our_model(args)
    sampler = ds.SamplerConfig(gen_length=args.gen_length, block_length=args.block_length, steps=args.steps)
    ours, prompts, facts = our_run(lm, args, sampler)
    model = llada_peer(lm, args.modeling)
    peer = import_from(args.repo, "generate", "llada_peer_loop")
    steps = args.steps or args.gen_length

    def theirs() -> tuple[Tensor, int]:
        with torch.inference_mode():
            ids = peer.generate(
                model,
                prompts,
                steps=steps,
                gen_length=args.gen_length,
                block_length=args.block_length,
                mask_id=lm.mask_token_id,
            )
        return ids, steps  # its loop runs every planned step

    race(ours, {"LLaDA": theirs}, lm, args, facts)


if __name__ == "__main__":
    main()
