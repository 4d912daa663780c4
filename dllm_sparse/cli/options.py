"""Option types shared by the commands, spelled as LLaDA and transformers spell them. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_MODEL = "Model"
_SPARSITY = "Sparsity"
_DECODING = "Decoding"
_OUTPUT = "Output"

ModelOpt = Annotated[
    str,
    typer.Option("--model", help="Alias (see `dllm-sparse models`), folder or hub id.", rich_help_panel=_MODEL),
]
DeviceOpt = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N; balanced spreads a model over all (engine transformers).",
        rich_help_panel=_MODEL,
    ),
]
EngineOpt = Annotated[
    Literal["auto", "native", "transformers"],
    typer.Option(help="auto: native where the family is known, else transformers.", rich_help_panel=_MODEL),
]
DtypeOpt = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="auto: the checkpoint's own on a GPU, float32 on a CPU.", rich_help_panel=_MODEL),
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_MODEL)]

POpt = Annotated[
    float, typer.Option("--p", help="The rule's knob: kept L1 mass for top_p. 1 is dense.", rich_help_panel=_SPARSITY)
]
SitesOpt = Annotated[
    Literal["input", "up", "gate", "intermediate", "all_inputs", "all_linear"],
    typer.Option(help="What is masked; all_linear: also what attention projections read.", rich_help_panel=_SPARSITY),
]
RuleOpt = Annotated[
    Literal["top_p", "top_k", "max_p", "threshold"],
    typer.Option(help="The mask rule.", rich_help_panel=_SPARSITY),
]
ScopeOpt = Annotated[
    Literal["token", "sequence", "group"],
    typer.Option(help="Who shares a mask; sequence is the published LLaDA code.", rich_help_panel=_SPARSITY),
]
GroupSizeOpt = Annotated[int, typer.Option(help="Tokens per mask under --scope group.", rich_help_panel=_SPARSITY)]
ScoreOpt = Annotated[
    Literal["magnitude", "weighted"],
    typer.Option(help="|v|, or |v| times the norm of the weight column it meets.", rich_help_panel=_SPARSITY),
]
RefreshEveryOpt = Annotated[
    int, typer.Option(help="Recompute masks every k-th step (1 = each step).", rich_help_panel=_SPARSITY)
]
BackendOpt = Annotated[
    Literal["auto", "reference", "triton", "cpu"],
    typer.Option(help="What computes the sparse FFN.", rich_help_panel=_SPARSITY),
]

GenLengthOpt = Annotated[int, typer.Option(help="Tokens to generate.", rich_help_panel=_DECODING)]
StepsOpt = Annotated[int | None, typer.Option(help="Steps; default one per token.", rich_help_panel=_DECODING)]
BlockLengthOpt = Annotated[
    int | None,
    typer.Option(
        help="Tokens per semi-autoregressive block; divides --gen-length. Default 32, or the model's own blocks.",
        rich_help_panel=_DECODING,
    ),
]
TemperatureOpt = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_DECODING)]
CfgScaleOpt = Annotated[float, typer.Option(help="Classifier-free guidance; 0 is off.", rich_help_panel=_DECODING)]
RemaskingOpt = Annotated[
    Literal["low_confidence", "random", "entropy", "maskgit_plus", "topk_margin", "origin"],
    typer.Option(
        help="Which positions are committed: LLaDA's two rules, or Dream's four (whole canvas unless cached).",
        rich_help_panel=_DECODING,
    ),
]
AlgTempOpt = Annotated[
    float,
    typer.Option(help="Draw Dream's positions at this temperature; 0 takes the surest.", rich_help_panel=_DECODING),
]
TopPOpt = Annotated[
    float | None,
    typer.Option(
        help="Dream, block-causal: only the likeliest tokens of this total probability.", rich_help_panel=_DECODING
    ),
]
TopKOpt = Annotated[
    int | None, typer.Option(help="Dream, block-causal: only the k likeliest tokens.", rich_help_panel=_DECODING)
]
EpsOpt = Annotated[
    float, typer.Option(help="Dream: the time at which decoding ends, from 1 down.", rich_help_panel=_DECODING)
]
MinimalTopKOpt = Annotated[
    int, typer.Option(help="Block-causal models: commit at least so many tokens a step.", rich_help_panel=_DECODING)
]
EditingThresholdOpt = Annotated[
    float | None,
    typer.Option(
        help="Block-causal models: rewrite decoded tokens where another is surer than this (LLaDA2.1: 0.9).",
        rich_help_panel=_DECODING,
    ),
]
MaxPostStepsOpt = Annotated[
    int,
    typer.Option(help="Steps that only edit, at most, once a block has no mask left.", rich_help_panel=_DECODING),
]
CacheOpt = Annotated[
    Literal["none", "prefix", "dual"],
    typer.Option(help="Fast-dLLM's approximate KV caches.", rich_help_panel=_DECODING),
]
ThresholdOpt = Annotated[
    float | None,
    typer.Option(
        help="Commit all tokens at least this confident; for Dream as Fast-dLLM does: --remasking maskgit_plus.",
        rich_help_panel=_DECODING,
    ),
]
FactorOpt = Annotated[float | None, typer.Option(help="Fast-dLLM's factor rule.", rich_help_panel=_DECODING)]
ExecutionOpt = Annotated[
    Literal["auto", "eager", "graph"],
    typer.Option(help="auto, eager, or graph: steps as captured CUDA graphs.", rich_help_panel=_DECODING),
]
SeedOpt = Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=_DECODING)]

ChatOpt = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Chat template; default: when the tokenizer has one.")
]
BatchSizeOpt = Annotated[int, typer.Option(min=1, help="Prompts decoded together.", rich_help_panel=_DECODING)]
PromptOpt = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")]
PromptsOpt = Annotated[
    Path | None, typer.Option("--prompts", help="File with prompts: .txt one a line, or .jsonl with a `prompt` field.")
]
LimitOpt = Annotated[int | None, typer.Option(help="Use only the first N items.", rich_help_panel=_OUTPUT)]
OutOpt = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for result files.", rich_help_panel=_OUTPUT),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=_OUTPUT)]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="No narration.", rich_help_panel=_OUTPUT)]
