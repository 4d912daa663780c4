"""Where the FFNs of a transformers model are: a table for known architectures, a search with an explanation for others.

A layout names, inside one decoder layer, the module that receives x, the projections, and the activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dllm_sparse.types import SiteName, UnsupportedArchitecture


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


def _glu(module: str = "mlp", activation: str = "act_fn") -> Layout:
    return Layout(module, f"{module}.gate_proj", f"{module}.up_proj", f"{module}.down_proj", f"{module}.{activation}")


def _fused(module: str = "mlp") -> Layout:
    return Layout(module, None, f"{module}.gate_up_proj", f"{module}.down_proj", f"{module}.activation_fn", fused=True)


def _plain(first: str, down: str, activation: str, module: str = "mlp.") -> Layout:
    return Layout(f"{module}{first}", None, f"{module}{first}", f"{module}{down}", f"{module}{activation}")


_GLU_TYPES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3"),
    *("olmo", "olmo2", "olmo3", "granite", "stablelm", "cohere", "cohere2", "helium", "exaone4", "seed_oss"),
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
)
_UP_DOWN = _plain("up_proj", "down_proj", "act_fn")

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        **dict.fromkeys(_GLU_TYPES, _glu()),
        **dict.fromkeys(("phi3", "glm", "glm4"), _fused()),
        "apertus": _UP_DOWN,
        "arcee": _UP_DOWN,
        "nemotron": _UP_DOWN,
        "phi": _plain("fc1", "fc2", "activation_fn"),
        "gpt_neox": _plain("dense_h_to_4h", "dense_4h_to_h", "act"),
        "persimmon": _plain("dense_h_to_4h", "dense_4h_to_h", "act"),
        "falcon": _plain("dense_h_to_4h", "dense_4h_to_h", "act"),
        "bloom": _plain("dense_h_to_4h", "dense_4h_to_h", "gelu_impl"),
        "gpt2": _plain("c_fc", "c_proj", "act"),
        "starcoder2": _plain("c_fc", "c_proj", "act"),
        "gptj": _plain("fc_in", "fc_out", "act"),
        "codegen": _plain("fc_in", "fc_out", "act"),
        "opt": _plain("fc1", "fc2", "activation_fn", module=""),
    }
)
"""By the text model's `model_type`."""

_ATTENTION_CHILDREN = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "query", "in_proj_qkv")


@dataclass(frozen=True, slots=True)
class FoundFFN:
    """One FFN: its layer, its layout inside `root`, and the experts beside it (None in a dense layer)."""

    layer: int
    root: nn.Module
    layout: Layout | None
    experts: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in a model, and how: the sentences say it to a user."""

    ffns: tuple[FoundFFN, ...]
    sentences: tuple[str, ...]


def find_ffns(model: nn.Module, model_type: str, layers: int, width: int) -> Found:
    """The FFNs of every decoder layer of D = `width` features: by the table, else by their structure.

    Raises UnsupportedArchitecture that lists what was seen where a layer has none.
    """
    path, blocks = _decoder_layers(model, layers, model_type)
    found: list[FoundFFN] = []
    sentences: dict[str, int] = {}
    for layer, block in enumerate(blocks):
        here = list(_layer_ffns(layer, block, model_type, width))
        if not here:
            raise UnsupportedArchitecture(
                f"no FFN was recognised in layer {layer} of {model_type!r} ({path}.{layer}); its projections are "
                f"{_seen(block)}. A GLU or a plain MLP is needed"
            )
        found += [ffn for ffn, _ in here]
        for _, how in here:
            sentences[how] = sentences.get(how, 0) + 1
    return Found(tuple(found), tuple(f"{path}, {count} of {layers} layers: {how}" for how, count in sentences.items()))


def _decoder_layers(model: nn.Module, layers: int, model_type: str) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: as long as the config says, holding the most parameters, not of a vision tower."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and not any(word in name for word in ("vision", "visual", "audio", "experts"))
    ]
    if not lists:
        raise UnsupportedArchitecture(f"{model_type!r} has no list of {layers} decoder layers")
    return max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))


def _layer_ffns(layer: int, block: nn.Module, model_type: str, width: int) -> Iterator[tuple[FoundFFN, str]]:
    """Packed experts first, then dense FFNs: the layer's own, or shared experts."""
    experts = next((module for module in block.modules() if _is_packed(module)), None)
    if experts is not None:
        name = next(name for name, module in block.named_modules() if module is experts)
        yield FoundFFN(layer, block, None, experts), f"{experts.num_experts} packed experts at {name}"
    layout = LAYOUTS.get(model_type)
    if layout is not None and all(_get(block, path) is not None for path in (layout.first, layout.down)):
        yield FoundFFN(layer, block, layout), f"{layout} (known architecture)"
        return
    for layout, how in _structural(block, width):
        yield FoundFFN(layer, block, layout), f"{layout} ({how})"


def _is_packed(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def _structural(block: nn.Module, width: int) -> Iterator[tuple[Layout, str]]:
    """GLUs and plain MLPs among sibling projections: D -> F once or twice (or D -> 2F), and F -> D."""
    for name, parent in block.named_modules():
        children = {child: widths(module) for child, module in parent.named_children()}
        linear = {child: shape for child, shape in children.items() if shape is not None}
        mixes_tokens = any(child in linear for child in _ATTENTION_CHILDREN) or any(
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
    weight: Any = parent.get_submodule(firsts[0]).weight
    if activation is None or (weight.device.type == "meta" and not hasattr(parent.get_submodule(down), "_hf_hook")):
        return {}
    seen: dict[str, Tensor] = {}

    def keep(child: str, *, before: str | None = None, after: str | None = None) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.update({before: args[0].detach()} if before else {}, **({after: output.detach()} if after else {}))

        return parent.get_submodule(child).register_forward_hook(hook)

    handles = [keep(child, after=child) for child in firsts]
    handles += [keep(down, before=down), keep(activation, before="activation", after="activated")]
    features = (widths(parent.get_submodule(firsts[0])) or (1, 1))[0]
    try:
        with torch.no_grad():
            parent(torch.linspace(-1, 1, features, dtype=weight.dtype, device=_device_of(parent, weight))[None, None])
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return seen if {*projections, "activation"} <= seen.keys() else {}


def _device_of(parent: nn.Module, weight: Tensor) -> Any:
    return weight.device if weight.device.type != "meta" else getattr(parent, "_hf_hook", None).execution_device  # type: ignore[union-attr]


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


def _seen(block: nn.Module) -> str:
    shapes = ((name, widths(module)) for name, module in block.named_modules())
    return ", ".join(f"{name} {shape[0]}->{shape[1]}" for name, shape in shapes if shape is not None) or "none"


def _get(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None
