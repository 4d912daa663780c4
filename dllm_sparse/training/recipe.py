"""The recipe of a training run: every number that decides its result, read from one TOML file.

Two runs of one recipe that differ in the objective alone are twins: same data in the same order, same token budget.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from dllm_sparse.fields import check_fields, check_names, check_ranges
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.config_values import LARGEST
from dllm_sparse.types import Kind, UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """The architecture both twins share; widths in features, `max_positions` in tokens."""

    width: int
    layers: int
    heads: int
    ffn_width: int
    max_positions: int
    activation: Literal["silu", "relu"] = "silu"
    rope_theta: float = 10000.0
    tied: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = ("width", "layers", "heads", "ffn_width", "max_positions")
        check_ranges(self, **dict.fromkeys(sizes, (1, LARGEST)), rope_theta=(1, 1e12))
        if self.width % (2 * self.heads):
            raise UsageError(f"width={self.width} is not divisible by 2 x heads={2 * self.heads}: rotary pairs need it")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """How the corpus becomes tokens. Shares are per mille, decided by hashes, so that they never depend on order.

    `min_distinct` is the least share of distinct 4-grams of words in a document; `min_characters` its least length.
    """

    vocab_size: int
    held_out_per_mille: int = 30
    min_distinct: float = 0.9
    min_characters: int = 200
    skill_problems: int = 300_000
    skill_held_out_per_mille: int = 100

    def __post_init__(self) -> None:
        check_fields(self)
        shares = ("held_out_per_mille", "skill_held_out_per_mille")
        check_ranges(self, **dict.fromkeys(shares, (1, 999)), vocab_size=(1, 1 << 16), min_distinct=(0, 1))
        check_ranges(self, min_characters=(0, LARGEST), skill_problems=(1, LARGEST))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """One micro-batch of every step: `rows` rows of `length` tokens.

    `documents` rows begin with a document and are filled with EOS; `stream` rows are windows anywhere in the packed
    documents; `skills` rows hold one prompt, its answer and EOS to the end. `weight` is this micro-batch's part of the
    loss, `fill_weight` that of a filling EOS against 1 for a token of text. In a `prefix_share` of the rows the
    diffusion objective keeps a prefix of random length unmasked (a prompt); next-token training does not need it.
    """

    source: Literal["documents", "stream", "skills"]
    length: int
    rows: int
    weight: float = 1.0
    fill_weight: float = 0.1
    prefix_share: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, length=(2, LARGEST), rows=(1, LARGEST), prefix_share=(0, 1))
        check_ranges(self, weight=(1e-6, 1e6), fill_weight=(0, 1e6))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserRecipe:
    """AdamW with linear warmup and cosine decay to `final_fraction` of the peak rate."""

    peak_rate: float
    warmup_steps: int
    final_fraction: float = 0.02
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, peak_rate=(0, 10), warmup_steps=(0, LARGEST), final_fraction=(0, 1), weight_decay=(0, 10))
        check_ranges(self, beta1=(0, 0.9999), beta2=(0, 0.999999), clip=(1e-6, 1e6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a run depends on besides the corpus and the objective."""

    name: str
    seed: int
    steps: int
    model: ModelRecipe
    data: DataRecipe
    optimiser: OptimiserRecipe
    mix: tuple[Mix, ...]
    checkpoint_every: int = 1000
    evaluate_every: int = 500
    min_time: float = 1e-3  # smallest masking ratio t; keeps 1/t finite (LLaDA uses the same)

    def __post_init__(self) -> None:
        check_fields(self)
        counts = ("steps", "checkpoint_every", "evaluate_every")
        check_ranges(self, **dict.fromkeys(counts, (1, LARGEST)), seed=(0, 1 << 62), min_time=(1e-6, 1))
        longest = max((entry.length for entry in self.mix), default=0)
        if not self.mix:
            raise UsageError(
                f"recipe {self.name!r} has no [[mix]] entry; give at least one with source, length and rows"
            )
        if longest > self.model.max_positions:
            raise UsageError(f"a mix row of {longest} tokens exceeds model.max_positions={self.model.max_positions}")

    @property
    def tokens_per_step(self) -> int:
        """Token positions of one optimiser step, filling included, over all micro-batches."""
        return sum(entry.rows * entry.length for entry in self.mix)

    def transformer_config(self, kind: Kind, special: dict[str, int]) -> TransformerConfig:
        """The model of one twin; `special` holds the ids of bos, eos, pad and mask."""
        model = self.model
        return TransformerConfig(
            vocab_size=self.data.vocab_size,
            width=model.width,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.heads,
            head_dim=model.width // model.heads,
            ffn_width=model.ffn_width,
            max_positions=model.max_positions,
            causal=kind == "autoregressive",
            activation=model.activation,
            rope_theta=model.rope_theta,
            tied=model.tied,
            mask_token_id=special["mask"] if kind == "diffusion" else None,
            bos_token_id=special["bos"],
            eos_token_id=special["eos"],
            pad_token_id=special["pad"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        return asdict(self)

    def digest(self, *parts: str) -> str:
        """SHA-256 of the recipe, or of the named parts of it: decides what may be reused or resumed."""
        chosen = {key: value for key, value in self.to_dict().items() if not parts or key in parts}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def load_recipe(name: str | Path, **overrides: Any) -> Recipe:
    """Reads a recipe that ships with the package (by name) or a TOML file (by path).

    `overrides` replace fields after reading; None leaves a field alone, `model_width` reaches into a section. A
    `steps` override keeps the warmup no longer than a tenth of the run. Raises UsageError.
    """
    shipped = files("dllm_sparse.training") / "recipes" / f"{name}.toml"
    path = Path(str(shipped)) if shipped.is_file() else Path(name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = sorted(
            p.name[:-5] for p in (files("dllm_sparse.training") / "recipes").iterdir() if p.name.endswith(".toml")
        )
        raise UsageError(
            f"no recipe {str(name)!r}: give the path of a TOML file or one of {', '.join(names)}"
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or too deep
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    return _overridden(recipe_from_dict(table, str(path)), overrides, str(path))


def _overridden(recipe: Recipe, overrides: dict[str, Any], origin: str) -> Recipe:
    given = {key: value for key, value in overrides.items() if value is not None}
    table = recipe.to_dict()
    for key, value in given.items():
        section, _, leaf = key.partition("_") if key.startswith("model_") else ("", "", key)
        (table[section] if section else table)[leaf] = value
    if "steps" in given:
        table["optimiser"]["warmup_steps"] = min(recipe.optimiser.warmup_steps, max(1, given["steps"] // 10))
    return recipe_from_dict(table, origin) if given else recipe


def recipe_from_dict(table: dict[str, Any], origin: str) -> Recipe:
    """Builds a recipe from plain values; unknown or missing keys raise UsageError naming `origin` and the section."""
    values = dict(table)
    sections = {"model": ModelRecipe, "data": DataRecipe, "optimiser": OptimiserRecipe}
    for section, kind in sections.items():
        if section in values:
            values[section] = _build(kind, values[section], f"{origin} [{section}]")
    if "mix" in values:
        entries = values["mix"] if isinstance(values["mix"], list | tuple) else [values["mix"]]
        values["mix"] = tuple(_build(Mix, entry, f"{origin} [[mix]]") for entry in entries)
    return _build(Recipe, values, origin)


def _build(kind: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected keys and values, found {repr(values)[:60]}")
    check_names(kind, values, f"{where}: unknown key")
    try:
        return kind(**values)
    except (TypeError, UsageError) as error:
        raise UsageError(f"{where}: {error}") from error
