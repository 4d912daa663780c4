"""The report in sentences: what was asked, and what came out, with the numbers."""

from __future__ import annotations

from dllm_sparse.report.schema import CurveValues, DriftReport, RuleVariant
from dllm_sparse.types import Kind

QUESTIONS: dict[Kind, str] = {
    "diffusion": (
        "Do the FFN channels a position needs stay the same while a diffusion model denoises? Every position is "
        "compared with itself: with the step before, and with the first. If masks stayed, one selection could serve "
        "many steps."
    ),
    "autoregressive": (
        "Are the FFN channels the prompt needed also those the generated tokens need? Every token is compared with "
        "the token before it, and with the prompt's consensus mask (the channels its tokens keep most often). If "
        "they agreed, masks chosen once on the prompt could be reused while decoding."
    ),
}


_FEWEST_FOR_AN_INTERVAL = 5
"""A bootstrap over fewer prompts says too little to be called 95 %."""


def overall(variant: RuleVariant, site: str, tokens: str = "response") -> CurveValues | None:
    """The curve of a site with all layers pooled; None where such tokens do not occur."""
    found = (c for c in variant["curves"] if (c["site"], c["layer"], c["tokens"]) == (site, None, tokens))
    return next(found, None)


def site_names(variant: RuleVariant) -> list[str]:
    """The sites of a variant in the order of the computation."""
    return list(dict.fromkeys(curve["site"] for curve in variant["curves"]))


def summarise(report: DriftReport) -> list[str]:
    """One sentence per finding, the main rule first."""
    main, kind = report["variants"][0], report["model"]["kind"]
    sentences = []
    if not report["complete"]:
        sentences.append(f"Interrupted: what was finished by then is reported, from {len(report['prompts'])} prompts.")
    sentences.append(_density(main, applied=report["config"]["apply"]))
    if report["model"]["experts"]:
        sentences.append(
            f"A channel of a mixture layer is a pair of one of its {report['model']['experts']} experts and a channel; "
            "experts a token was not sent to count as off, so routing is part of every similarity."
        )
    for site in site_names(main):
        curve = overall(main, site)
        if curve is not None:
            sentences.append(f"{_stability(curve, kind, len(report['prompts']))} {_drift(curve, kind)}")
            sentences += [_movement(curve)] if kind == "diffusion" and site == "input" else []
    sentences += [_unions(main, kind)] if main["exploitable"] else []
    sentences += [_rules(main, other) for other in report["variants"][1:]]
    sentences += [_reuse(report)] if report["reuse"] else []
    return sentences


def percent(value: float | None) -> str:
    """0.123 -> 12 %."""
    return "unknown" if value is None else f"{value:.0%}".replace("%", "\u202f%")


def decimals(value: float | None, digits: int = 2) -> str:
    """A number for a sentence."""
    return "unknown" if value is None else f"{value:.{digits}f}"


def _density(variant: RuleVariant, *, applied: bool) -> str:
    rule, found = variant["sparsity"], variant["measured_sparsity"]
    sites = ", ".join(f"{percent(1 - found[site])} of the {site} channels" for site in site_names(variant))
    name = "top-p" if rule["rule"] == "top_p" else str(rule["rule"])
    how = "The masks were applied." if applied else "The masks were only observed: the model decoded dense."
    return f"With {name} at p = {rule['p']:g}, one mask per {rule['scope']}, a token keeps {sites}. {how}"


def _stability(curve: CurveValues, kind: str, prompts: int) -> str:
    pooled = curve["jaccard_overall"]
    before = "one step to the next" if kind == "diffusion" else "one token to the next"
    bounds = f" (over {prompts} prompts)"
    if pooled["low"] is not None and prompts >= _FEWEST_FOR_AN_INTERVAL:
        bounds = (
            f" (95 % interval {decimals(pooled['low'], 3)} to {decimals(pooled['high'], 3)} over {prompts} prompts)"
        )
    return (
        f"At the {curve['site']}, from {before} the masks of generated positions overlap with a Jaccard similarity of "
        f"{decimals(pooled['micro'], 3)}{bounds}; independent masks of that density would reach "
        f"{decimals(pooled['chance'], 3)}."
    )


def _drift(curve: CurveValues, kind: str) -> str:
    values = [value for value in curve["drift"]["micro"] if value is not None]
    chance = [value for value in curve["drift"]["chance"] if value is not None]
    if not values or not chance:
        return "Masks that keep nothing have no similarity."
    if kind == "autoregressive":
        mean = sum(values) / len(values)
        return (
            f"Its generated tokens' masks overlap with the prompt's consensus by {decimals(mean)} on average "
            f"(chance {decimals(chance[-1])}), {decimals(values[0])} at the first token and {decimals(values[-1])} at "
            f"the last."
        )
    half = curve["half_life"]
    ends = (
        f"half of what exceeds chance is gone {f'after {half:.1f} steps' if half >= 1 else 'within the first step'}"
        if half is not None
        else ("more than half of what exceeds chance remains at the end")
    )
    return (
        f"After {len(values) - 1} steps the similarity to step 0 is {decimals(values[-1])} "
        f"(chance {decimals(chance[-1])}); {ends}."
    )


def _movement(curve: CurveValues) -> str:
    found = curve["movement"]["overall"]
    return (
        f"The FFN input of a generated position changes by {percent(found['median'])} per step in the median and by "
        f"more than {percent(found['p90'])} for one in ten; {percent(found['share_above_0.1'])} of them move by more "
        "than 10\u202f%."
    )


def _unions(variant: RuleVariant, kind: str) -> str:
    one, last = variant["exploitable"][0], variant["exploitable"][-1]
    whole = (
        f"{last['tokens']} neighbouring tokens"
        if last["tokens"]
        else ("the whole block" if kind == "diffusion" else "the whole prompt")
    )
    return (
        f"A forward of one token would have to read {percent(one['ffn_bytes'])} of the FFN's weights (at best "
        f"{decimals(one['ffn_speedup'])} times faster); a forward of {whole} {percent(last['ffn_bytes'])} "
        f"({decimals(last['ffn_speedup'])} times)."
    )


def _rules(main: RuleVariant, other: RuleVariant) -> str:
    parts = []
    for site in site_names(main):
        ours, theirs = overall(main, site), overall(other, site)
        if ours and theirs:
            a, b = ours["jaccard_overall"], theirs["jaccard_overall"]
            parts.append(
                f"{site}: {decimals(b['micro'])} instead of {decimals(a['micro'])} from step to step "
                f"({decimals(b['corrected'])} instead of {decimals(a['corrected'])} above chance)"
            )
    scope = "sequence (the published LLaDA code)" if other["scope"] == "sequence" else other["scope"]
    return f"With one mask per {scope} at the same p the figures become {'; '.join(parts)}."


def _reuse(report: DriftReport) -> str:
    masks = [row for row in report["reuse"] if row["refresh_every"]]
    outputs = [row for row in report["reuse"] if row["tau"] is not None]
    longest, each = masks[-1], masks[0]
    kept = f"masks kept for {longest['refresh_every']} steps cost a KL to dense of {decimals(longest['kl'], 4)} nats"
    parts = [f"{kept}, {decimals(each['kl'], 4)} of it top-p's own, at {percent(longest['ffn_work'])} of the FFN work"]
    if outputs:
        alike = min(outputs, key=lambda row: abs(row["ffn_work"] - longest["ffn_work"]))
        parts.append(
            f"a dense FFN that keeps the whole outputs of tokens that moved less than {alike['tau']:g} costs "
            f"{decimals(alike['kl'], 4)} at {percent(alike['ffn_work'])} (work counts "
            "multiply-adds per token, not bytes read)"
        )
    return f"Reuse: {'; '.join(parts)}."
