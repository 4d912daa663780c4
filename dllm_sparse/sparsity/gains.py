"""What skipped channels are worth: the weights that need not be read nor multiplied, and the speed-up that allows.

`skippable` is the share of a site's channels that no token of a forward kept, in [0, 1] by the site's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from dllm_sparse.models.config import TransformerConfig

# Share of the FFN's weights (gate, up and down are equally large) each site's masks govern: x feeds gate and up, the
# intermediate feeds down; a zero of the gate or of up zeroes a row of the other projection and a column of down.
_GOVERNED = {"input": 2 / 3, "gate": 2 / 3, "up": 2 / 3, "intermediate": 1 / 3}


class FFNGain(TypedDict):
    """Shares of the FFN's weight bytes and of its FLOPs saved, and the best speed-up where reading them is all.

    The two shares are equal: a channel that is skipped is neither read nor multiplied, whatever the number of tokens.
    `ffn_speedup_bound` is None where nothing is left to read.
    """

    ffn_bytes_saved: float
    ffn_flops_saved: float
    ffn_speedup_bound: float | None


def ffn_gain(skippable: Mapping[str, float]) -> FFNGain:
    """What the FFN gains at best. Sites in the attention govern none of its weights and change nothing here."""
    saved = _ffn_saved(skippable)
    bound = 1 / (1 - saved) if saved < 1 else None
    return {"ffn_bytes_saved": saved, "ffn_flops_saved": saved, "ffn_speedup_bound": bound}


def weights_saved(config: TransformerConfig, skippable: Mapping[str, float]) -> float:
    """Weights of all layers, attention included, that a forward need not read."""
    attention = config.width * sum(config.qkv_widths) * skippable.get("attention_input", 0.0)
    attention += config.heads * config.head_dim * config.width * skippable.get("attention_output", 0.0)
    return config.layers * attention + config.ffn_weights * _ffn_saved(skippable)


def _ffn_saved(skippable: Mapping[str, float]) -> float:
    return sum(_GOVERNED.get(site, 0.0) * share for site, share in skippable.items())
