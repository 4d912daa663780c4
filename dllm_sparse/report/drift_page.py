"""The page of a drift report: sections and tables here, charts in assets/drift.js."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm_sparse.report.drift_tables import TOKENS, gain_table, reuse_section, rules_section
from dllm_sparse.report.html import (
    CHARTS,
    Section,
    bullets,
    columns,
    controls,
    figure,
    page,
    paragraph,
    select,
    table,
    text,
)
from dllm_sparse.report.schema import DriftReport
from dllm_sparse.report.summary import site_names

_MEANINGS = {
    "Mask": "the channels of a site that the rule keeps for one token. Sites: input is the FFN's input after the norm, "
    "intermediate is gate times up.",
    "Jaccard": "shared channels / channels in either mask. Micro divides sums over tokens, layers and prompts; token "
    "mean averages the tokens' own values.",
    "Chance": "what independent masks of the same density d would reach, d / (2 - d). Above chance: "
    "(J - chance) / (1 - chance).",
    "Half-life": "steps until the above-chance similarity to the reference has fallen to one half.",
    "Intervals": "95 %, bootstrap over prompts. With few prompts they come out too narrow.",
    "Generated positions": "still masked, just committed (by the step before) or decoded earlier. Padding and the "
    "unconditional rows of guidance are never counted.",
}
_SELECTION = '<p class="selection note" aria-live="polite"></p>'


def drift_page(report: DriftReport) -> str:
    """The whole page as one string of HTML."""
    model, config = report["model"], report["config"]
    steps = len(report["variants"][0]["steps"])
    subtitle = (
        f"{model['name']}, {model['kind']}, {model['parameters'] / 1e6:,.1f}M parameters: {len(report['prompts'])} "
        f"prompts, {config['sampler']['gen_length']} tokens each, {steps} steps. {report['date'][:10]}"
    )
    bar = Section("controls", "", _controls(report))
    sections = [_summary(report), bar, _over_steps(report), _layers(report), _unions(report), _movement(report)]
    sections += [_lags(report)] if any(variant["lags"] for variant in report["variants"]) else []
    sections += [rules_section(report)] if len(report["variants"]) > 1 else []
    sections += [reuse_section(report)] if report["reuse"] else []
    sections += [_canvas(report), _definitions(), _settings(report)]
    scripts = (*CHARTS, "drift.js")
    return page(
        "How the active sets move", subtitle, sections, {"report": _drawn(report)}, scripts, styles=("drift.css",)
    )


def _drawn(report: DriftReport) -> dict[str, Any]:
    """What the charts are drawn from: the report without the lists no chart needs, which keeps the page small."""
    variants = []
    for variant in report["variants"]:
        curves = [dict(curve) for curve in variant["curves"]]
        for curve in curves:
            del curve["count"], curve["density"]
            for key in ("jaccard", "drift"):
                lists: dict[str, Any] = curve[key]  # type: ignore[assignment]
                curve[key] = {name: values for name, values in lists.items() if name != "corrected"}
        parts = {name: variant[name] for name in ("scope", "steps", "unions", "lags", "canvases")}
        variants.append(parts | {"curves": curves})
    return {"model": report["model"], "variants": variants}


def _summary(report: DriftReport) -> Section:
    question = f'<p class="question">{text(report["question"])}</p>'
    return Section("summary", "Summary", question + bullets(report["summary"]))


def _controls(report: DriftReport) -> str:
    main = report["variants"][0]
    rules = [(place, f"one mask per {variant['scope']}") for place, variant in enumerate(report["variants"])]
    layers = [("all", "all"), *((layer, layer) for layer in range(report["model"]["layers"]))]
    present = dict.fromkeys(curve["tokens"] for curve in main["curves"])
    return controls(
        *([select("rule", "Rule", rules)] if len(rules) > 1 else []),
        select("site", "Site", [(site, site) for site in site_names(main)]),
        select("layer", "Layer", layers),
        select("tokens", "Tokens", [(name, TOKENS[name]) for name in present]),
    )


def _over_steps(report: DriftReport) -> Section:
    diffusion = report["model"]["kind"] == "diffusion"
    before = "the same position one step earlier" if diffusion else "the token before it"
    reference = "the same position at step 0" if diffusion else "the consensus mask of the prompt"
    several = diffusion and report["variants"][0]["steps"][-1]["block"] > 0
    blocks = " Thin vertical lines: a new block begins." if several else ""
    body = _SELECTION + columns(
        figure("jaccard", f"Stability: a token's mask against that of {before}.{blocks}"),
        figure("drift", f"Drift: a token's mask against {reference}.{blocks}"),
    )
    return Section("steps", "Stability and drift", body)


def _layers(report: DriftReport) -> Section:
    body = columns(
        figure("jaccard-map", "Stability, layer by step. The colours always span 0 to 1."),
        figure("drift-map", "Drift, layer by step. The colours always span 0 to 1."),
    )
    return Section("layers", "Layer by layer", body + figure("density", "Share of the channels a token keeps."))


def _unions(report: DriftReport) -> Section:
    what = "the tokens of the active block" if report["model"]["kind"] == "diffusion" else "the tokens of the prompt"
    exploitable = gain_table(report)
    body = paragraph(
        f"A forward of T tokens reads a channel's weights if any of them needs it. T neighbours among {what}, all "
        "steps pooled. The difference to the dashed line is what neighbours share.",
        "note",
    )
    return Section(
        "unions", "What a forward can skip", body + columns(figure("unions", "Union of T masks."), exploitable)
    )


def _movement(report: DriftReport) -> Section:
    note = paragraph(
        "Relative change of the values at the site, |v - v'| / |v'| in the L2 norm, v' being the values one "
        f"{'step' if report['model']['kind'] == 'diffusion' else 'token'} earlier. Where most tokens barely move, "
        "their FFN output could be kept.",
        "note",
    )
    charts = columns(
        figure("movement", "How far the values of a token move."), figure("moved", "Tokens that moved more than tau.")
    )
    return Section("movement", "Movement of the values", note + charts)


def _lags(report: DriftReport) -> Section:
    caption = "A token's mask against its own mask some steps earlier, at the later step."
    return Section("lags", "Snapshots", figure("lags", caption))


def _canvas(report: DriftReport) -> Section:
    canvases = report["variants"][0]["canvases"]
    prompts = [(place, f"{place + 1}: {canvas['prompt'][:40]}") for place, canvas in enumerate(canvases)]
    colours = [("step", "when it was committed"), ("similarity", "how similar its mask stayed")]
    body = paragraph(
        "Point at a token, or walk with the arrow keys, to see when it was committed and how its mask moved. Dark is "
        "early or low, bright is late or high.",
        "note",
    )
    choices = select("canvas-prompt", "Prompt", prompts) + select("canvas-colour", "Colour", colours)
    body += f'<form class="choices">{choices}</form>'
    body += '<div id="canvas" class="canvas" role="group" aria-label="Generated tokens"></div>'
    body += '<p id="canvas-detail" aria-live="polite"></p>'
    own = "The chosen position's mask" if report["model"]["kind"] == "diffusion" else "Every token's mask"
    body += figure("canvas-history", f"{own} against the one before, all layers of the site.")
    return Section("canvas", "The canvas", body)


def _definitions() -> Section:
    return Section("definitions", "Definitions", bullets(f"{term}: {meaning}" for term, meaning in _MEANINGS.items()))


def _settings(report: DriftReport) -> Section:
    facts: list[Sequence[object]] = [(f"model {name}", value) for name, value in report["model"].items()]
    config = dict(report["config"])
    facts += [(f"sampler {name}", value) for name, value in config.pop("sampler").items()]
    facts += list(config.items())
    facts += [(f"sparsity {name}", value) for name, value in report["variants"][-1]["sparsity"].items()]
    facts += list(report["versions"].items())
    facts.append(("git revision", report["git_revision"]))
    facts.append(("seconds", report["seconds"]))
    shown = [(name, value) for name, value in facts if value is not None]
    prompts = f"<details><summary>Prompts</summary>{bullets(report['prompts'])}</details>"
    settings = f"<details><summary>Settings</summary>{table(['Setting', 'Value'], shown)}</details>"
    return Section("settings", "Settings and prompts", settings + prompts)
