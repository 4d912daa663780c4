"""What a family is: how its config.json reads and what its tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dllm_sparse.types import Kind

KeyMap = Mapping[str, str]
"""From checkpoint name to parameter name.

`{i}` is the layer, `{e}` the expert whose weights are `[{e}]` of a packed parameter; `#k` is the k-th part of a fused
one (query, key, value of `qkv_proj`; gate, up of `gate_up_proj`).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one `model_type` is read. `fixed` overrides config fields, `must_be` lists the only values supported.

    `mixture` names the config field of each `MoEConfig` field and makes this the family of that type's models with
    experts, `mixture_defaults` holds what a config leaves out. `model_type` is the key in `FAMILIES` where it is empty.
    `sites` says where the masks are taken where the usual places of a GLU or of experts do not say it all.
    `tokenizer` is transformers' class for the folder's files, where the checkpoints name one of their own remote code.
    """

    name: str
    kind: Kind
    fields: Mapping[str, str]
    keys: KeyMap
    model_type: str = ""
    mixture: Mapping[str, str] = field(default_factory=dict)
    mixture_defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tokenizer: str | None = None
    sites: str = ""


class Alias(NamedTuple):
    """A short name's hub repository, its family key and its parameters in billions (for the memory column)."""

    repository: str
    family: str
    billions: float
