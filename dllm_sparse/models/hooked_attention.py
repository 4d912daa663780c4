"""Attention of a transformers model under forward hooks, where its projections go by a known name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from dllm_sparse.models.feed_forward import Tapper
from dllm_sparse.models.hooked_ffn import HookedModule, column_norms
from dllm_sparse.types import SiteName, UnsupportedArchitecture

if TYPE_CHECKING:
    from dllm_sparse.models.hooked import HookedTransformer

INPUTS = (("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Children of an attention module: projections of the same input (some use the keys as values, too), and the one that
reads what attention gives."""


class HookedAttention(HookedModule):
    """The attention of one layer. Raises UnsupportedArchitecture where no child of the layer looks like one."""

    def __init__(self, network: HookedTransformer, layer: int, block: nn.Module) -> None:
        super().__init__(network, layer)
        found = next((parts for child in block.children() if (parts := _projections(child)) is not None), None)
        if found is None:
            raise UnsupportedArchitecture(
                f"no attention with projections {', '.join('/'.join(names) for names in INPUTS)} and "
                f"{'/'.join(OUTPUTS)} was recognised in layer {layer} of {network.config.architecture}; "
                "sites 'all_inputs' masks the FFNs alone"
            )
        self.module, self.readers, self.output = found

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        return column_norms(self.readers if site == "attention_input" else (self.output,))

    def install(self, override: Tapper) -> None:
        self.before(self.module, "attention_input")
        self.before(self.output, "attention_output")


def _projections(module: nn.Module) -> tuple[nn.Module, list[nn.Module], nn.Module] | None:
    """An attention module, what reads its input, and what reads its heads; None for any other module."""
    children = dict(module.named_children())
    inputs = next((names for names in INPUTS if all(name in children for name in names)), None)
    output = next((name for name in OUTPUTS if name in children), None)
    if inputs is None or output is None:
        return None
    return module, [children[name] for name in inputs], children[output]
