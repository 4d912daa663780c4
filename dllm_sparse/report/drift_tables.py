"""The tables of a drift report's page: gains, rules side by side, reuse."""

from __future__ import annotations

from dllm_sparse.report.html import Section, paragraph, table
from dllm_sparse.report.schema import DriftReport, Exploitable, RuleVariant
from dllm_sparse.report.summary import decimals, overall, percent, site_names

TOKENS = {
    "response": "generated positions",
    "masked": "still masked",
    "committed": "just committed",
    "decoded": "decoded earlier",
    "prompt": "prompt",
    "all": "all positions",
}
"""How the selections of tokens are called on the page."""

_SEQUENCE = (
    "One mask per sequence is the published LLaDA code: the largest values of all positions together, so positions "
    "with large values take channels from the others. Published figures pool all positions, the prompt's included."
)


def gain_table(report: DriftReport) -> str:
    """What a forward of T tokens could gain; the whole block only where no size of the table is the block's."""
    several = len(report["variants"]) > 1
    listed = [gain["tokens"] for gain in report["variants"][0]["exploitable"]]
    whole_listed = report["model"]["kind"] == "diffusion" and report["config"]["sampler"]["block_length"] in listed
    headers = [*(["Mask per"] if several else []), "Tokens T", "FFN bytes read", "FFN faster", "Forward faster"]
    rows = [
        [*([variant["scope"]] if several else []), *_gain(gain)]
        for variant in report["variants"]
        for gain in variant["exploitable"]
        if gain["tokens"] or not whole_listed
    ]
    caption = (
        "The best possible gain of a memory-bound forward of T tokens, all layers; what is not read is not computed."
    )
    return table(headers, rows, caption)


def _gain(gain: Exploitable) -> list[object]:
    tokens = gain["tokens"] or "all"
    return [
        tokens,
        percent(gain["ffn_bytes"]),
        "-" if gain["ffn_speedup"] is None else f"{decimals(gain['ffn_speedup'])}x",
        f"{decimals(gain['forward_speedup'])}x",
    ]


def rules_section(report: DriftReport) -> Section:
    """The same p under each rule."""
    headers = ["Site", "One mask per", "Kept", "Jaccard", "Chance", "Above chance", "Drift at the end", "Half-life"]
    rows = [
        _rule_row(site, variant, tokens)
        for tokens in ("response", "all")
        for site in site_names(report["variants"][0])
        for variant in report["variants"]
    ]
    scopes = [variant["scope"] for variant in report["variants"]]
    explained = _SEQUENCE if "sequence" in scopes else ""
    note = paragraph(f"The same p under each rule. {explained}", "note")
    return Section("rules", "Rules side by side", note + table(["Tokens", *headers], rows))


def _rule_row(site: str, variant: RuleVariant, tokens: str) -> list[object]:
    curve = overall(variant, site, tokens)
    if curve is None:
        return [TOKENS[tokens], site, variant["scope"], *["-"] * 6]
    pooled, half = curve["jaccard_overall"], curve["half_life"]
    drift = [value for value in curve["drift"]["micro"] if value is not None]
    values = (pooled["micro"], pooled["chance"], pooled["corrected"], drift[-1] if drift else None)
    end = "never" if half is None else f"{half:.1f} steps"
    return [TOKENS[tokens], site, variant["scope"], percent(curve["density_overall"]), *map(decimals, values), end]


def reuse_section(report: DriftReport) -> Section:
    """Fidelity against work saved."""
    headers = [
        "Variant",
        "FFN work",
        "Selections",
        "KL (nats)",
        "Same token",
        "Same position",
        "Final tokens",
        "Identical",
    ]
    rows = [
        [
            row["variant"],
            percent(row["ffn_work"]),
            "-" if row["selections"] is None else percent(row["selections"]),
            decimals(row["kl"], 4),
            percent(row["token_agreement"]),
            "-" if row["position_agreement"] is None else percent(row["position_agreement"]),
            percent(row["tokens_equal"]),
            percent(row["exact_match"]),
        ]
        for row in report["reuse"]
    ]
    note = paragraph(
        "Against dense decoding. FFN work: share of the dense multiply-adds done. Selections: share of the steps that "
        "choose masks anew. KL, same token and same position follow the dense trajectory step by step; the last two "
        "columns compare whole generations decoded freely: equal tokens, and prompts whose text is identical.",
        "note",
    )
    return Section("reuse", "Reuse across steps", note + table(headers, rows))
