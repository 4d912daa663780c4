"""`python -m dllm_sparse`: the command line; `accelerate launch -m dllm_sparse ...` runs it on several processes."""

from __future__ import annotations

from dllm_sparse.cli import main

if __name__ == "__main__":
    main()
