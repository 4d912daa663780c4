"""Where the FFNs of a transformers model are: a table for known architectures, a search with an explanation for others.

A layout names, inside one decoder layer, the module that receives x, the projections, and the activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from dllm_sparse.models.structure import Layout, structural_layouts, widths
from dllm_sparse.types import UnsupportedArchitecture


def _glu(module: str = "mlp") -> Layout:
    return Layout(module, f"{module}.gate_proj", f"{module}.up_proj", f"{module}.down_proj", f"{module}.act_fn")


_FUSED = Layout("mlp", None, "mlp.gate_up_proj", "mlp.down_proj", "mlp.activation_fn", fused=True)


def _plain(first: str, down: str, activation: str, module: str = "mlp.") -> Layout:
    return Layout(f"{module}{first}", None, f"{module}{first}", f"{module}{down}", f"{module}{activation}")


_GLU_TYPES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "smollm3"),
    *("olmo", "olmo2", "olmo3", "granite", "stablelm", "cohere", "cohere2", "helium", "exaone4", "seed_oss"),
    *("mixtral", "olmoe", "qwen3_moe", "diffusion_gemma_text"),
)
_UP_DOWN = _plain("up_proj", "down_proj", "act_fn")

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        **dict.fromkeys(_GLU_TYPES, _glu()),
        **dict.fromkeys(("phi3", "glm", "glm4"), _FUSED),
        "qwen2_moe": _glu("mlp.shared_expert"),
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
    for layout, how in structural_layouts(block, width):
        yield FoundFFN(layer, block, layout), f"{layout} ({how})"


def _is_packed(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3


def _seen(block: nn.Module) -> str:
    shapes = ((name, widths(module)) for name, module in block.named_modules())
    return ", ".join(f"{name} {shape[0]}->{shape[1]}" for name, shape in shapes if shape is not None) or "none"


def _get(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None
