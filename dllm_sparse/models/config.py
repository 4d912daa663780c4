"""The one architecture description every native family is reduced to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATION_NAMES: Mapping[str, Activation] = MappingProxyType(
    {
        **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
        **dict.fromkeys(("swish", "swiglu"), "silu"),
    }
)
"""What checkpoints call them besides."""

Attention = Literal["bidirectional", "causal", "block_causal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent position scaling; `kind="linear"` divides all positions by `factor`."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: every token goes to `experts_per_token` of `experts` GLUs of `expert_width` features.

    `shared_experts` of the same width see every token, as one wide GLU. The first `dense_layers` layers have a dense
    FFN instead. The rest says how the router chooses; see `kernels.routing.RouterRule`.
    """

    experts: int
    experts_per_token: int
    expert_width: int
    shared_experts: int = 0
    dense_layers: int = 0
    router: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    groups_per_token: int = 1
    expert_bias: bool = False
    renormalise: bool = False
    routed_scaling: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """A pre-norm GLU transformer: the facts that differ between the native families.

    Widths are in features, `max_positions` in tokens. `causal=False` is the bidirectional attention of a
    masked-diffusion model; with `block_length` it is block-causal: the tokens of a block, counted from the row's first
    token, see each other and every block before (block diffusion). `logit_shift` is 1 where position i predicts
    token i+1 in a diffusion model (Dream). `text_positions`: rotary positions begin at the first real token of a
    left-padded row, not at its padding (Dream; causal models always do so). `partial_rotary` is the share of every
    head's features that positions rotate, the first ones. `float32_logits`: logits leave the head as fp32 whatever the
    model's dtype (LLaDA2). With `moe`, `ffn_width` is that of the dense layers.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    max_positions: int
    causal: bool
    block_length: int | None = None
    activation: Activation = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    logit_shift: Literal[0, 1] = 0
    float32_logits: bool = False
    text_positions: bool = False
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # ends of text besides eos_token_id (Llama 3.1 has three)
    moe: MoEConfig | None = None

    @property
    def attention(self) -> Attention:
        """Which tokens a token sees."""
        if self.causal:
            return "causal"
        return "bidirectional" if self.block_length is None else "block_causal"

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Output widths of the query, key and value projections, in features."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary)

    @property
    def experts(self) -> int:
        """Routed experts of a mixture's layer; 0 in a dense model."""
        return self.moe.experts if self.moe is not None else 0

    @property
    def dense_layers(self) -> int:
        """Layers with a dense FFN."""
        return self.layers if self.moe is None else min(self.moe.dense_layers, self.layers)

    @property
    def ffn_weights(self) -> int:
        """Weights of all gate, up and down projections: of dense FFNs, experts and shared experts."""
        features = self.dense_layers * self.ffn_width
        if self.moe is not None:
            experts = self.moe.experts + self.moe.shared_experts
            features += (self.layers - self.dense_layers) * experts * self.moe.expert_width
        return 3 * self.width * features

    @property
    def parameters(self) -> int:
        """Number of parameters, the tied head counted once."""
        attention = self.width * sum(self.qkv_widths) + self.heads * self.head_dim * self.width
        biases = self.qkv_bias * sum(self.qkv_widths) + self.output_bias * self.width
        norms = 2 * self.width + self.qk_norm * 2 * self.head_dim
        layers = self.layers * (attention + biases + norms) + self.ffn_weights
        layers += self.dense_layers * self.mlp_bias * (2 * self.ffn_width + self.width)
        if self.moe is not None:
            layers += (self.layers - self.dense_layers) * self.moe.experts * (self.width + self.moe.expert_bias)
        return layers + self.width + (1 if self.tied else 2) * self.vocab_size * self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return asdict(self)
