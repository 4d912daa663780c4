"""Where the time of a forward goes: marks before and after the modules, while the real loop runs.

The marks are module hooks, so they see every forward that calls the model's modules (the eager engine). They cost a
few microseconds each: the shares are of a marked run, never of the timed one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dllm_sparse.bench.timing import Stopwatch
from dllm_sparse.models.language_model import LanguageModel
from dllm_sparse.models.transformer import Transformer

COMPONENTS = ("attention_linears", "attention", "ffn", "head_and_choice", "rest")
"""Projections around attention; attention with RoPE and the cache; FFN; head and everything outside the forward
(choice, commit, the loop); norms, residuals, embedding."""


def component_milliseconds(lm: LanguageModel, run: Callable[[], int]) -> dict[str, float]:
    """Milliseconds per forward of each component, for a `run` that returns how many forwards it did."""
    watch = Stopwatch(lm.device)
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    with _marked(lm.transformer, watch, spans):
        begin = watch.mark()
        forwards = run()
        whole = watch.milliseconds(begin, watch.mark())
    sums = {name: sum(watch.milliseconds(*span) for span in places) for name, places in spans.items()}
    values = {
        "attention_linears": sums["linears"],
        "attention": sums["attention"] - sums["linears"],
        "ffn": sums["ffn"],
        "head_and_choice": sums["head"] + whole - sums["transformer"],
        "rest": sums["transformer"] - sums["attention"] - sums["ffn"] - sums["head"],
    }
    return {name: values[name] / forwards for name in COMPONENTS}


@contextmanager
def _marked(transformer: Transformer, watch: Stopwatch, spans: dict[str, list[tuple[int, int]]]) -> Iterator[None]:
    """Hooks on the modules of every component inside the block."""
    with ExitStack() as undo:
        for name, module in _modules(transformer):
            began: list[int] = []

            def before(_module: nn.Module, _inputs: Any, began: list[int] = began) -> None:
                began.append(watch.mark())

            def after(_module: nn.Module, _inputs: Any, _out: Any, began: list[int] = began, name: str = name) -> None:
                spans[name].append((began.pop(), watch.mark()))

            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after).remove)
        yield


def _modules(transformer: Transformer) -> Iterator[tuple[str, nn.Module]]:
    yield "transformer", transformer
    yield "head", transformer.head
    for name, module in transformer.named_modules():
        last = name.rpartition(".")[2]
        if last in ("attention", "ffn"):
            yield last, module
        elif last in ("qkv_proj", "o_proj"):
            yield "linears", module
