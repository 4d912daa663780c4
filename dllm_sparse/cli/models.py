"""`dllm-sparse models`: what can be loaded by name, what is here, how much memory it needs, and how families differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.output import Output

if TYPE_CHECKING:
    from dllm_sparse.models.families.facts import FamilyFacts

_WIDTHS = (21, 17, 15, 9, 9, 7, 18, 0)


def models(as_json: opt.JsonOpt = False) -> None:
    """List aliases and families: what is bundled or cached here, parameters, memory for the weights in bf16.

    Of each family: attention, noise, mask id, logit shift, blocks, cache, and where its sites are.
    """
    from dllm_sparse.models.families.facts import family_table

    output = Output(as_json=as_json)
    rows, families = _bundled_rows() + _alias_rows(), list(family_table())
    if as_json:
        families_value = [family._asdict() for family in families]
        output.json({"schema": "dllm-sparse/models@1", "models": rows, "families": families_value})
        return
    output.answer(f"{'name':<24}{'kind':<16}{'here':<9}{'parameters':>11}{'bf16 GB':>9}  source")
    for row in rows:
        here = "yes" if row["local"] else "no"
        size = f"{row['parameters'] / 1e9:.2f}B" if row["parameters"] >= 1e9 else f"{row['parameters'] / 1e6:.1f}M"
        line = f"{row['name']:<24}{row['kind']:<16}{here:<9}{size:>11}{row['bf16_gb']:>9.2f}  {row['source']}"
        output.answer(line)
    for line in _family_lines(families):
        output.answer(line)


def _family_lines(families: list[FamilyFacts]) -> Iterator[str]:
    """The family table, and below it who has their sites where."""
    yield ""
    yield "Any local folder of these families loads too (--model FOLDER):"
    heads = ("model_type", "attention", "noise", "mask id", "shift", "blocks", "cache")
    yield "".join(f"{head:<{width}}" for head, width in zip(("family", *heads), _WIDTHS, strict=True)).rstrip()
    for family in families:
        mask = "-" if family.mask_token_id is None else family.mask_token_id
        cells = [family.name, family.model_type, family.attention.replace("_", "-"), family.noise or "-", mask]
        cells += ["-" if family.noise is None else family.logit_shift, family.blocks, family.cache]
        yield "".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()
    yield "A mask id or block_size in a checkpoint's config wins; SDAR's b8 and b16 run in blocks of 4 without it."
    yield "DiffusionGemma and * run through transformers, the others natively."
    yield ""
    yield "Where the sites are:"
    for sites in dict.fromkeys(family.sites for family in families):
        yield f"  {sites}: {', '.join(family.name for family in families if family.sites == sites)}"


def _bundled_rows() -> list[dict[str, Any]]:
    from dllm_sparse.models.checkpoint_config import read_config
    from dllm_sparse.models.families import BUNDLED
    from dllm_sparse.models.resolve import checkpoint_folder

    rows = []
    for name in BUNDLED:
        family, config, _ = read_config(checkpoint_folder(name))
        rows.append(_row(name, family.kind, "bundled", config.parameters, local=True))
    return rows


def _alias_rows() -> list[dict[str, Any]]:
    from dllm_sparse.models.families import ALIASES, FAMILIES
    from dllm_sparse.models.resolve import cached_folder

    return [
        _row(
            name,
            FAMILIES[alias.family].kind,
            alias.repository,
            round(alias.billions * 1e9),
            local=cached_folder(alias.repository) is not None,
        )
        for name, alias in ALIASES.items()
    ]


def _row(name: str, kind: str, source: str, parameters: int, *, local: bool) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "source": source,
        "local": local,
        "parameters": parameters,
        "bf16_gb": parameters * 2 / 1e9,
    }
