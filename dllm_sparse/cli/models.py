"""`dllm-sparse models`: what can be loaded by name, what is here, how much memory it needs."""

from __future__ import annotations

from typing import Any

from dllm_sparse.cli import options as opt
from dllm_sparse.cli.output import Output


def models(as_json: opt.JsonOpt = False) -> None:
    """List aliases and families: what is bundled or cached here, parameters, memory for the weights in bf16."""
    from dllm_sparse.models.families import FAMILIES

    output = Output(as_json=as_json)
    rows = _bundled_rows() + _alias_rows()
    families = [
        {"model_type": family.model_type or key, "name": family.name, "kind": family.kind, "sites": family.sites}
        for key, family in FAMILIES.items()
    ]
    if as_json:
        output.json({"schema": "dllm-sparse/models@1", "models": rows, "families": families})
        return
    output.answer(f"{'name':<24}{'kind':<16}{'here':<9}{'parameters':>11}{'bf16 GB':>9}  source")
    for row in rows:
        here = "yes" if row["local"] else "no"
        size = f"{row['parameters'] / 1e9:.2f}B" if row["parameters"] >= 1e9 else f"{row['parameters'] / 1e6:.1f}M"
        line = f"{row['name']:<24}{row['kind']:<16}{here:<9}{size:>11}{row['bf16_gb']:>9.2f}  {row['source']}"
        output.answer(line)
    output.answer("")
    output.answer("Any local folder of these families loads too (--model FOLDER):")
    for family in families:
        output.answer(f"  {family['model_type']:<10}{family['name']:<18}{family['kind']}")
    output.answer("")
    output.answer("Any other causal LM that transformers knows, with a GLU, a plain MLP or packed experts, runs there.")


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
