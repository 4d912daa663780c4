"""`python -m dllm_sparse.evaluation`: lm-eval's own command line with the model `dllm-sparse` registered."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import dllm_sparse.evaluation.adapter  # noqa: F401 (registers the model)

if __name__ == "__main__":
    cli_evaluate()
