"""lm-eval's `--model_args`: any value of any argument is used as it was meant, or refused by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.utils import simple_parse_args_string

import dllm_sparse as ds
from dllm_sparse.evaluation.adapter import DllmSparseLM
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.types import DllmSparseError, UsageError

KINDS = (ScoringOptions, ds.SamplerConfig, ds.SparsityConfig)
NAMES = sorted(
    {field.name for kind in KINDS for field in fields(kind)} | {"device", "dtype", "revision", "engine", "x"}
)
WORDS = ("", "None", "True", "false", "0", "-1", "1", "2", "0.5", "1.5", "nan", "inf", "1e30", "9" * 30, "[1]", "{}")
CHOICES = ("cpu", "cuda:9", "float32", "triton", "sequence", "entropy", "dual", "pseudo", "top_k", "a=b", "\x1b[2J")
ARGUMENTS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(WORDS + CHOICES) | st.text()), max_size=3)
FEW = settings(max_examples=max(settings.default.max_examples // 2, 5))


def request() -> Instance:
    return Instance("loglikelihood", {}, ("the fox", " and"), 0, metadata=("task", 0, 1))


@FEW
@given(ARGUMENTS)
def test_any_argument_is_used_or_refused_by_name(llada_folder: Path, arguments: list[tuple[str, str]]) -> None:
    """Through lm-eval's own parser, which makes numbers and switches of some words."""
    text = ",".join(["pretrained=" + str(llada_folder), "mc_num=2", *(f"{name}={value}" for name, value in arguments)])
    try:
        parsed = simple_parse_args_string(text)
    except ValueError:
        return  # lm-eval refuses what is no name=value
    try:
        model = DllmSparseLM(**parsed)
        ((nats, _),) = model.loglikelihood([request()])
    except DllmSparseError as error:
        assert any(name in str(error) for name in (*parsed, "exceeds the context")), error  # noqa: PT017
    else:
        assert nats < 0


@given(st.sampled_from(KINDS), st.data())
def test_fields_hold_what_they_say(kind: Any, data: st.DataObject) -> None:
    """Any Python value: a configuration of plain values that survives the way through JSON, or UsageError."""
    odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
    name = data.draw(st.sampled_from([field.name for field in fields(kind)]))
    value = data.draw(odd | st.dictionaries(st.text(), st.integers(), max_size=1) | st.binary())
    try:
        made = kind(**{name: value})
    except UsageError as error:
        assert name in str(error)  # noqa: PT017
        return
    stored = getattr(made, name)
    assert not isinstance(stored, int) or abs(stored) < 1 << 63
    assert stored == (float(value) if isinstance(stored, float) else value) or list(stored) == list(value)
    if hasattr(kind, "from_dict"):
        assert kind.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"p": "half"}, "p is 'half'; expected a finite number"),
        ({"p": True}, "p is True; expected a finite number"),
        ({"layers": [0.5]}, r"layers is \[0.5\]; expected a list, each a whole number"),
        ({"rule": ["top_p"]}, r"rule is \['top_p'\]; allowed: top_p, top_k"),
        ({"group_size": 10**30}, "group_size is 1000.*; expected a whole number"),
    ],
)
def test_what_was_expected_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ds.SparsityConfig(**given)
