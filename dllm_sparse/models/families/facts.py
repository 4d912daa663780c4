"""What sets a family apart when it decodes: read off the native families' own data, said here for transformers'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

from dllm_sparse.models.families import FAMILIES
from dllm_sparse.models.families.family import Family
from dllm_sparse.types import Kind

if TYPE_CHECKING:
    from dllm_sparse.models.config import Attention
    from dllm_sparse.models.language_model import Engine, Noise


class FamilyFacts(NamedTuple):
    """One row of the family table. `mask_token_id` is what holds where a checkpoint's config names none."""

    name: str
    model_type: str
    kind: Kind
    engine: Engine
    attention: Attention
    noise: Noise | None
    mask_token_id: int | None
    logit_shift: Literal[0, 1]
    blocks: str
    cache: str
    sites: str


_BLOCKS: Mapping[Attention, str] = MappingProxyType(
    {"bidirectional": "yours, in order", "block_causal": "its own, of {}", "causal": "token by token"}
)
_CACHE: Mapping[Attention, str] = MappingProxyType(
    {
        "bidirectional": "prefix or dual, approximate",
        "block_causal": "finished blocks, exact",
        "causal": "tokens before, exact",
    }
)
_GLU_SITES = "FFN input after the norm; gate, up and intermediate of a GLU"
_EXPERT_SITES = "input of every expert after the norm; gate, up and intermediate of its GLU; the router sees x as is"

THROUGH_TRANSFORMERS: tuple[FamilyFacts, ...] = (
    FamilyFacts(
        name="DiffusionGemma",
        model_type="diffusion_gemma",
        kind="diffusion",
        engine="transformers",
        attention="bidirectional",
        noise="uniform",
        mask_token_id=None,
        logit_shift=0,
        blocks="its own canvases",
        cache="prompt and canvases before, exact",
        sites="the dense FFN and every expert of a layer, in the encoder and in the decoder, which share their weights",
    ),
    FamilyFacts(
        name="any other causal LM",
        model_type="*",
        kind="autoregressive",
        engine="transformers",
        attention="causal",
        noise=None,
        mask_token_id=None,
        logit_shift=0,
        blocks=_BLOCKS["causal"],
        cache=_CACHE["causal"],
        sites="as in the native families, or input and intermediate of a plain MLP; found by structure, and said",
    ),
)


def family_table() -> Iterator[FamilyFacts]:
    """Every family that loads, the native ones first."""
    for key, family in FAMILIES.items():
        yield _native(key, family)
    yield from THROUGH_TRANSFORMERS


def _native(key: str, family: Family) -> FamilyFacts:
    known = {**family.defaults, **family.fixed}
    attention: Attention = "bidirectional"
    if family.kind == "autoregressive":
        attention = "causal"
    elif "block_length" in known:
        attention = "block_causal"
    return FamilyFacts(
        name=family.name,
        model_type=family.model_type or key,
        kind=family.kind,
        engine="native",
        attention=attention,
        noise="mask" if family.kind == "diffusion" else None,
        mask_token_id=known.get("mask_token_id"),
        logit_shift=known.get("logit_shift", 0),
        blocks=_BLOCKS[attention].format(known.get("block_length")),
        cache=_CACHE[attention],
        sites=family.sites or (_EXPERT_SITES if family.mixture else _GLU_SITES),
    )
