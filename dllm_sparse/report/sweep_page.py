"""The page of critical-sparsity and compare: sections and tables here, charts in assets/sweep.js."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dllm_sparse.analysis.exploitable import TOKENS
from dllm_sparse.report.html import (
    CHARTS,
    Section,
    bullets,
    controls,
    figure,
    page,
    paragraph,
    select,
    table,
)
from dllm_sparse.report.sweep_results import results_by_model

_MEANINGS = {
    "Sparsity": "zeroed entries of the masked activations / entries, over counted tokens; pooled over all entries, or "
    "the unweighted mean over hooks and calls (as published for LLaDA).",
    "Critical": "where the score first falls below the line, interpolated between the two points around it. Grid "
    "maximum: the largest measured sparsity that still passes. With >=, nothing measured fell below: a lower bound.",
    "Intervals": "95 %, bootstrap over items; models are resampled together, item by item.",
    "At chance": "the dense score is not above guessing.",
    "Below resolution": "fewer than one item may fail before the line is crossed. Few deciding items: fewer than five "
    "may, and the interval comes out too narrow.",
    "Exploitable": "the share of the FFN's weight bytes, and of its FLOPs, that 1 / 8 / 32 neighbouring tokens sharing "
    "one pass can skip at the grid maximum: channels that none of them keeps.",
    "Speed-up at most": "if reading weights is all that costs time and T neighbouring tokens share one pass.",
}


def sweep_page(name: str, value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole page of one result as one string of HTML; `rows` are its table's."""
    by_model = results_by_model(value)
    retain = value["config"]["plan"]["retain"]
    title = "Critical sparsity" if name == "critical-sparsity" else "Critical sparsity compared"
    subtitle = f"{', '.join(by_model)}: the most that can be zeroed while {100 * retain:g} % of the dense score is kept"
    sections = [
        Section("summary", "Summary", bullets(_sentences(value, rows))),
        Section("controls", "", _choices(by_model)),
        Section("curves", "Score kept", figure("curves", "Score kept against sparsity; bands are 95 % intervals")),
        Section("critical", "Critical sparsity", figure("critical", "Critical sparsity per site") + _table(rows)),
        *_published(value),
        *_noise(value),
        Section("meanings", "What the words mean", bullets(map(": ".join, _MEANINGS.items()))),
        Section("settings", "Settings", bullets(map(": ".join, _settings(value["config"])))),
    ]
    data = {"models": list(by_model), "sites": _sites(by_model), "retain": retain, "curves": list(_curves(by_model))}
    return page(title, subtitle, sections, {"sweep": data}, (*CHARTS, "sweep.js"))


def _sites(by_model: Mapping[str, Any]) -> list[str]:
    return list(next(iter(by_model.values())))


def _entries(found: Mapping[str, Any]) -> dict[str, Any]:
    """The average first, where there is one, then the tasks."""
    return {**({} if found["average"] is None else {"average": found["average"]}), **found["tasks"]}


def _sentences(value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if "differences" in value:
        yield from (f"{entry['site']}: {entry['verdict']}" for entry in value["differences"] if entry["main"])
        return
    sites = {row["site"] for row in rows if row["task"] == "average"}
    for row in rows:
        if row["task"] == "average" or row["site"] not in sites:
            beware = f". Beware: {row['flags']}" if row["flags"] else ""
            yield f"{row['site']}, {row['task']}: {_span(row, 'element')} of the entries{beware}"


def _span(row: Mapping[str, Any], average: str) -> str:
    value, low, high = (row[f"{average}_crossing{part}"] for part in ("", "_low", "_high"))
    if value is None:
        return "-"
    bound = ">= " if row[f"{average}_censored"] else ""
    return f"{bound}{_percent(value)} [{_percent(low)}, {_percent(high)}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _choices(by_model: Mapping[str, Any]) -> str:
    sites = _sites(by_model)
    tasks = list(_entries(next(iter(by_model.values()))[sites[0]]))
    averages = [("element", "entries pooled"), ("hook_mean", "mean over hooks")]
    return controls(
        select("site", "Site", [(site, site) for site in sites]),
        select("task", "Task", [(task, task) for task in tasks]),
        select("average", "Average", averages),
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    headers = (
        "site",
        "task",
        "model",
        "items",
        "dense score",
        "critical",
        "grid maximum",
        "exploitable",
        "hook mean",
        "beware",
    )
    cells = (
        (
            row["site"],
            row["task"],
            row["model"],
            row["items"],
            f"{row['dense_score']:.4g}",
            _span(row, "element"),
            _percent(row["element_grid_max"]),
            " / ".join(_percent(row[f"element_exploitable_T{tokens}"]) for tokens in TOKENS),
            _span(row, "hook_mean"),
            row["flags"],
        )
        for row in rows
    )
    return f'<div class="notes-last">{table(headers, cells)}</div>'


def _published(value: Mapping[str, Any]) -> list[Section]:
    """The published settings beside the corrected ones."""
    cells = [
        (model, site, name, entry["average"], _percent(entry["crossing"]), _percent(entry["confound"]))
        for model, sites in value.get("as_published", {}).items()
        for site, settings in sites.items()
        for name, entry in settings.items()
    ]
    headers = ("model", "site", "setting", "average", "critical", "difference from corrected")
    return [Section("published", "As published", table(headers, cells))] if cells else []


def _noise(value: Mapping[str, Any]) -> list[Section]:
    """Spread over Monte-Carlo seeds against spread over items."""
    cells = [
        (model, task, entry["seeds"], *(_percent(entry[f"{over}_sd_{what}"]) for what, over in _SPREADS))
        for model, found in value.get("likelihood_noise", {}).items()
        for task, entry in found["tasks"].items()
    ]
    headers = ("model", "task", "seeds", "dense: seeds", "dense: items", "kept: seeds", "kept: items")
    intro = paragraph("Standard deviations over seeds of the likelihood estimate and over items.")
    return [Section("noise", "Likelihood noise", intro + table(headers, cells))] if cells else []


_SPREADS = (("dense", "seed"), ("dense", "item"), ("kept", "seed"), ("kept", "item"))


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, model in config["models"].items():
        yield name, f"{model['kind']}, {model['dtype']} on {model['device']}, weights {model['weights_sha256'][:16]}"
    for name, task in config["tasks"].items():
        yield name, f"{task['items']} items, {task['metric']}, {_plain(task['scoring'])}"
    swept = dict.fromkeys(("p", "sites"))  # what the sweep sets itself; the plan says to what
    shown = {**config, "sparsity": {**config["sparsity"], **swept}}
    for key in ("limit", "plan", "sparsity", "versions", "git_revision"):
        yield key, _plain(shown[key])


def _plain(value: Any) -> str:
    """Settings as words: `mc_num 128, seed 0`; what is None is left out."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items() if one is not None)
    return "none" if value is None else str(value)


def _curves(by_model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the charts are drawn from."""
    for model, sites in by_model.items():
        for site, found in sites.items():
            bounds = _bounds(found["tasks"])
            for task, entry in _entries(found).items():
                points = [
                    {
                        **{key: point[key] for key in ("p", "element", "hook_mean", "score", "kept")},
                        "low": (point["kept_interval"] or (None, None))[0],
                        "high": (point["kept_interval"] or (None, None))[1],
                        "bounds": bounds.get((task, point["p"]), {}),
                    }
                    for point in entry["points"]
                ]
                yield {"model": model, "site": site, "task": task, "points": points, "critical": entry["critical"]}


def _bounds(tasks: Mapping[str, Any]) -> dict[tuple[str, float], dict[str, float]]:
    return {
        (task, point["p"]): {group: found["ffn_speedup_bound"] for group, found in point["exploitable"].items()}
        for task, entry in tasks.items()
        for point in entry["points"]
    }
