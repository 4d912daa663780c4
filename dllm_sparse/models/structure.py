"""Finding an FFN by its structure: which projections belong together, and a probe that shows what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparse.types import SiteName

ATTENTION_CHILDREN = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "in_proj_qkv")
"""A module with one of these mixes tokens; its projections are no FFN."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths inside a decoder layer. `module` receives x; `first` is the up projection, a fused gate and up, or the only
    first projection of a plain MLP; `gate` is None in the latter two; `activation` None where no module computes it."""

    module: str
    gate: str | None
    first: str
    down: str
    activation: str | None
    fused: bool = False

    @property
    def gated(self) -> bool:
        """Whether the FFN is a GLU."""
        return self.fused or self.gate is not None

    @property
    def sites(self) -> tuple[SiteName, ...]:
        """The sites it has. In a plain MLP the activated hidden vector is the intermediate; there is no gate."""
        if not self.gated:
            return ("input", "intermediate")
        return ("input", "up", "intermediate") if self.activation is None else ("input", "gate", "up", "intermediate")

    def __str__(self) -> str:
        kind = "fused GLU" if self.fused else "GLU" if self.gate else "plain MLP"
        parts = [f"{name} {path}" for name in ("gate", "first", "down", "activation") if (path := getattr(self, name))]
        return f"{kind}: x into {self.module}, {', '.join(parts)}"


def structural_layouts(block: nn.Module, width: int) -> Iterator[tuple[Layout, str]]:
    """GLUs and plain MLPs among sibling projections: D -> F once or twice (or D -> 2F), and F -> D."""
    for name, parent in block.named_modules():
        children = {child: widths(module) for child, module in parent.named_children()}
        linear = {child: shape for child, shape in children.items() if shape is not None}
        mixes_tokens = any(child in linear for child in ATTENTION_CHILDREN) or any(
            isinstance(module, nn.Conv1d) for module in parent.children()
        )
        if mixes_tokens or "attention" in type(parent).__name__.lower():
            continue
        for down in (child for child, shape in linear.items() if shape[1] == width):
            inner = linear[down][0]
            firsts = [c for c, shape in linear.items() if c != down and shape in ((width, inner), (width, 2 * inner))]
            if 1 <= len(firsts) <= 2:
                found = _described(parent, name, firsts, down, fused=linear[firsts[0]][1] == 2 * inner)
                if found is not None:
                    yield found
                    break


def _described(parent: nn.Module, name: str, firsts: list[str], down: str, *, fused: bool) -> tuple[Layout, str] | None:
    """The layout, and how sure it is; None where running it on a probe shows that it computes something else."""
    activation = next((child for child, module in parent.named_children() if _is_activation(module)), None)
    seen = _probe(parent, [*firsts, down], activation)
    gate = None
    if len(firsts) == 2:
        named = [child for child in firsts if "gate" in child]
        fed = [child for child in firsts if seen and torch.equal(seen[child], seen["activation"])]
        gate = (fed or named or firsts)[0]
    first = next(child for child in firsts if child != gate)
    if seen and not _computes(seen, gate, first, down, fused=fused):
        return None
    prefix = f"{name}." if name else ""
    whole = name if gate or (fused and name) else f"{prefix}{first}"
    paths = [None if child is None else f"{prefix}{child}" for child in (gate, first, down, activation)]
    layout = Layout(whole, paths[0], f"{prefix}{first}", f"{prefix}{down}", paths[3], fused)
    return layout, "found by structure, checked on a probe" if seen else "found by structure, not checked"


def _probe(parent: nn.Module, projections: list[str], activation: str | None) -> dict[str, Tensor]:
    """What a module's parts see for one made-up x; empty where it cannot be run alone.

    By child: the output of a first projection, the input of the last; `activation` and `activated` around that.
    """
    *firsts, down = projections
    first: Any = parent.get_submodule(firsts[0])
    weight: Tensor = first.weight
    if activation is None or (weight.device.type == "meta" and not hasattr(first, "_hf_hook")):
        return {}
    seen: dict[str, Tensor] = {}

    def keep(child: str, *, before: str | None = None, after: str | None = None) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.update({before: args[0].detach()} if before else {}, **({after: output.detach()} if after else {}))

        return parent.get_submodule(child).register_forward_hook(hook)

    handles = [keep(child, after=child) for child in firsts]
    handles += [keep(down, before=down), keep(activation, before="activation", after="activated")]
    features = (widths(first) or (1, 1))[0]
    try:
        with torch.no_grad():
            parent(torch.linspace(-1, 1, features, dtype=weight.dtype, device=_device_of(first, weight))[None, None])
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return {}  # it wants other arguments or another shape: the layout is then reported as not checked
    finally:
        for handle in handles:
            handle.remove()
    return seen if {*projections, "activation"} <= seen.keys() else {}


def _device_of(module: nn.Module, weight: Tensor) -> Any:
    """Where a module computes: where its weights are, or where accelerate brings them."""
    hook = getattr(module, "_hf_hook", None)
    return weight.device if hook is None else hook.execution_device


def _computes(seen: dict[str, Tensor], gate: str | None, first: str, down: str, *, fused: bool) -> bool:
    """Whether the last projection was fed act(gate) * up, or act(first) in a plain MLP."""
    activated, fed = seen["activated"], seen["activation"]
    if fused:
        half, up = seen[first].chunk(2, dim=-1)
        return torch.equal(fed, half) and torch.allclose(seen[down], activated * up)
    if gate is None:
        return torch.equal(fed, seen[first]) and torch.allclose(seen[down], activated)
    return torch.equal(fed, seen[gate]) and torch.allclose(seen[down], activated * seen[first])


def _is_activation(module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None and next(module.parameters(), None) is None
    return leaf and not isinstance(module, (nn.Dropout, nn.Identity))


def widths(module: nn.Module | None) -> tuple[int, int] | None:
    """(input, output) features of a projection: nn.Linear, GPT-2's transposed Conv1D, or a quantised linear."""
    if module is None:
        return None
    if isinstance(getattr(module, "in_features", None), int):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if isinstance(getattr(module, "nf", None), int) and isinstance(getattr(module, "nx", None), int):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None
