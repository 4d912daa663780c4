"""`python -m dllm_sparse` is `dllm-sparse`."""

from dllm_sparse.cli import main

main()
