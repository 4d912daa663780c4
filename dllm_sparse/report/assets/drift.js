// The charts of a drift report. Everything is drawn from the report's own JSON, for the selected rule, site, layer and
// tokens.
"use strict";
(() => {
  const drift = report.data("report");
  const diffusion = drift.model.kind === "diffusion";
  const stepName = diffusion ? "step" : "token";
  const colours = ["var(--first)", "var(--second)", "var(--third)", "var(--fourth)"];
  const unit = [0, 1];

  const chosen = (id) => document.getElementById(id)?.value;
  const variant = () => drift.variants[Number(chosen("rule") ?? 0)];
  const layer = () => (chosen("layer") === "all" ? null : Number(chosen("layer")));
  const find = (site, at, tokens) =>
    variant().curves.find((c) => c.site === site && c.layer === at && c.tokens === tokens);
  const curve = () => find(chosen("site"), layer(), chosen("tokens"));
  const layers = () => d3.range(drift.model.layers);
  const where = () => `${chosen("site")}, ${layer() === null ? "all layers" : `layer ${layer()}`}, ` +
    document.getElementById("tokens").selectedOptions[0].text;

  const frame = (width, options) => Plot.plot({
    width: Math.min(width, 1100), height: Math.max(220, Math.min(330, width * 0.45)), marginLeft: 44, marginTop: 30, marginBottom: 40,
    style: { background: "none", color: "inherit", fontSize: "12px" }, ...options,
  });
  const series = (values) => values.map((value, step) => ({ step, value })).filter((point) => point.value !== null);
  const steps = () => variant().steps;
  const blockStarts = () => steps().flatMap((at, step) => (at.index_in_block === 0 && step > 0 ? [step] : []));
  const stepAxis = () => ({ label: `${stepName} →`, domain: [0, Math.max(steps().length - 1, 1)] });
  const line = (values, colour, extra = {}) =>
    Plot.lineY(series(values), { x: "step", y: "value", stroke: colour, strokeWidth: 2, ...extra });
  const blocks = () => (diffusion ? [Plot.ruleX(blockStarts(), { stroke: "var(--rule)" })] : []);
  // A line of a few points only (just committed tokens, a short run) needs its points drawn to be seen.
  const dots = (values, colour) =>
    series(values).length < 24 ? [Plot.dot(series(values), { x: "step", y: "value", fill: colour, r: 2.5 })] : [];

  const aboveChance = (value, chance) => (chance < 1 ? (value - chance) / (1 - chance) : null);

  const similarity = (key) => (width) => {
    const found = curve();
    const values = found?.[key] ?? { micro: [], token_mean: [], chance: [], low: [], high: [] };
    const band = values.low.map((low, step) => ({ step, low, high: values.high[step] })).filter((b) => b.low !== null);
    const half = key === "drift" && diffusion ? found?.half_life ?? null : null;
    const rows = series(values.micro).map(({ step }) => ({
      [stepName]: step, "Jaccard (micro)": values.micro[step], "95 % low": values.low[step],
      "95 % high": values.high[step], "token mean": values.token_mean[step], chance: values.chance[step],
      "above chance": aboveChance(values.micro[step], values.chance[step]),
    }));
    const node = frame(width, {
      x: stepAxis(), y: { label: "↑ Jaccard", domain: unit, grid: true },
      marks: [
        ...blocks(),
        Plot.areaY(band, { x: "step", y1: "low", y2: "high", fill: "var(--first)", fillOpacity: 0.22 }),
        line(values.chance, "var(--grey)", { strokeDasharray: "5 4" }),
        line(values.token_mean, "var(--second)", { strokeWidth: 1.5, strokeDasharray: "2 3" }),
        line(values.micro, "var(--first)"),
        ...dots(values.micro, "var(--first)"),
        ...(half === null ? [] : [
          Plot.ruleX([half], { stroke: "var(--fourth)", strokeDasharray: "1 3", strokeWidth: 2 }),
          Plot.text([half], { x: (d) => d, y: 1, dy: -8, text: () => `half-life ${half.toFixed(1)}`,
            textAnchor: half > steps().length / 2 ? "end" : "start", fill: "var(--fourth)" }),
        ]),
        Plot.ruleY([0]),
        Plot.tip(rows, Plot.pointerX({ x: stepName, y: "Jaccard (micro)", channels: {
          chance: "chance", "95 % low": "95 % low", "95 % high": "95 % high" }, format: { y: ".3f" } })),
      ],
    });
    return { node, rows, label: `Line chart: Jaccard similarity over ${stepName}s, ${where()}`, legend: [
      { label: "Jaccard (micro), 95 % interval", colour: "var(--first)" },
      { label: "token mean", colour: "var(--second)", dash: "2 3" },
      { label: "chance: independent masks", colour: "var(--grey)", dash: "5 4" },
    ] };
  };

  const heatmap = (read, label) => (width) => {
    const cells = layers().flatMap((at) => {
      const found = find(chosen("site"), at, chosen("tokens"));
      return found ? series(read(found)).map((point) => ({ ...point, layer: at })) : [];
    });
    const rows = cells.map((cell) => ({ layer: cell.layer, [stepName]: cell.step, [label]: cell.value }));
    const node = frame(width, {
      height: Math.max(160, Math.min(420, 70 + layers().length * 16)),
      x: { label: `${stepName} →`, domain: [-0.5, steps().length - 0.5] },
      y: { label: "layer", domain: [layers().length - 0.5, -0.5], labelArrow: "none",
           ticks: layers().filter((at) => at % Math.ceil(layers().length / 12) === 0), tickFormat: "d" },
      color: { scheme: "viridis", domain: unit, clamp: true },
      marks: [
        Plot.rect(cells, { x1: (d) => d.step - 0.5, x2: (d) => d.step + 0.5, y1: (d) => d.layer - 0.5,
          y2: (d) => d.layer + 0.5, fill: "value", inset: 0, shapeRendering: "crispEdges" }),
        Plot.tip(cells, Plot.pointer({ x: "step", y: "layer", title: (d) =>
          `${stepName} ${d.step}, layer ${d.layer}\n${label} ${d.value.toFixed(3)}` })),
      ],
    });
    const ramp = Plot.legend({ width: Math.min(width, 240), label, ticks: 5, tickFormat: ".1f",
      color: { scheme: "viridis", domain: unit, type: "linear" }, style: { background: "none" } });
    return { node: report.element("div", {}, ramp, node), rows, label: `Heatmap: ${label}, layer by ${stepName}` };
  };

  const density = (width) => {
    const sites = [...new Set(variant().curves.map((c) => c.site))];
    const points = sites.flatMap((site) => layers().map((at) => ({
      site, layer: at, density: find(site, at, chosen("tokens"))?.density_overall ?? null,
    }))).filter((point) => point.density !== null);
    const colour = (site) => colours[sites.indexOf(site)];
    const node = frame(width, {
      x: { label: "layer →", domain: [0, Math.max(layers().length - 1, 1)], tickFormat: "d",
           ticks: Math.min(layers().length, 10) },
      y: { label: "↑ kept channels", domain: unit, grid: true },
      marks: [
        Plot.lineY(points, { x: "layer", y: "density", z: "site", stroke: (d) => colour(d.site), strokeWidth: 2 }),
        Plot.dot(points, { x: "layer", y: "density", fill: (d) => colour(d.site), r: 3.5,
          symbol: (d) => (sites.indexOf(d.site) ? "square" : "circle") }),
        Plot.ruleY([0]),
        Plot.tip(points, Plot.pointer({ x: "layer", y: "density", title: (d) =>
          `${d.site}, layer ${d.layer}\n${(100 * d.density).toFixed(1)} % kept` })),
      ],
    });
    return { node, rows: points, label: `Line chart: share of kept channels per layer, ${chosen("tokens")} tokens`,
      legend: sites.map((site) => ({ label: site, colour: colour(site) })) };
  };

  const unions = (width) => {
    const found = variant().unions.filter((u) => u.site === chosen("site") && u.layer === layer() && u.tokens !== null);
    const rows = found.map((u) => ({ "tokens T": u.tokens, "union density": u.density, "95 % low": u.low,
      "95 % high": u.high, "were they independent": u.independent }));
    const domain = found.map((u) => u.tokens);
    const node = frame(width, {
      x: { type: "point", domain, label: "neighbouring tokens T →" },
      y: { label: "↑ channels needed by any of them", domain: unit, grid: true },
      marks: [
        Plot.areaY(found.filter((u) => u.low !== null), { x: "tokens", y1: "low", y2: "high", fill: "var(--first)",
          fillOpacity: 0.22 }),
        Plot.lineY(found, { x: "tokens", y: "independent", stroke: "var(--grey)", strokeDasharray: "5 4" }),
        Plot.lineY(found, { x: "tokens", y: "density", stroke: "var(--first)", strokeWidth: 2 }),
        Plot.dot(found, { x: "tokens", y: "density", fill: "var(--first)", r: 3.5 }),
        Plot.text(found, { x: "tokens", y: "density", text: (d) => d.density.toFixed(2), dy: 14, fill: "currentColor" }),
        Plot.ruleY([0]),
      ],
    });
    return { node, rows, label: `Line chart: union density against the number of neighbouring tokens, ${where()}`,
      legend: [{ label: "union of T masks", colour: "var(--first)" },
        { label: "were they independent: 1 − (1 − d)^T", colour: "var(--grey)", dash: "5 4" }] };
  };

  const movement = (width) => {
    const moved = curve()?.movement ?? { median: [], p90: [], share_above: {} };
    const rows = series(moved.median).map(({ step }) => ({ [stepName]: step, median: moved.median[step],
      "90th percentile": moved.p90[step], ...Object.fromEntries(Object.entries(moved.share_above)
        .map(([tau, share]) => [`share above ${tau}`, share[step]])) }));
    const top = d3.max(rows, (row) => row["90th percentile"]) ?? 1;
    const node = frame(width, {
      x: stepAxis(), y: { label: "↑ relative change", domain: [0, Math.max(top * 1.05, 0.1)], grid: true },
      marks: [
        ...blocks(), line(moved.p90, "var(--second)", { strokeDasharray: "5 3" }), line(moved.median, "var(--first)"),
        ...dots(moved.p90, "var(--second)"), ...dots(moved.median, "var(--first)"), Plot.ruleY([0]),
      ],
    });
    return { node, rows, label: `Line chart: relative change of the values per ${stepName}, ${where()}`, legend: [
      { label: "median token", colour: "var(--first)" },
      { label: "90th percentile", colour: "var(--second)", dash: "5 3" }] };
  };

  const dashes = [null, "6 3", "2 3", "8 3 2 3"];
  const moved = (width) => {
    const shares = Object.entries(curve()?.movement.share_above ?? {});
    const node = frame(width, {
      x: stepAxis(), y: { label: "↑ share of tokens", domain: unit, grid: true },
      marks: [...blocks(), ...shares.flatMap(([, share], place) => [
        line(share, colours[place % 4], { strokeDasharray: dashes[place % 4] }), ...dots(share, colours[place % 4])]),
        Plot.ruleY([0])],
    });
    const rows = steps().map((_, step) => ({ [stepName]: step,
      ...Object.fromEntries(shares.map(([tau, share]) => [`moved more than ${tau}`, share[step]])) }));
    return { node, rows, label: `Line chart: share of tokens that moved more than tau, ${where()}`,
      legend: shares.map(([tau], place) => ({ label: `more than ${tau}`, colour: colours[place % 4],
        dash: dashes[place % 4] })) };
  };

  const lags = (width) => {
    const found = variant().lags.filter((lag) => lag.site === chosen("site") && lag.layer === layer() &&
      lag.tokens === chosen("tokens"));
    const points = found.flatMap((lag, place) => lag.steps
      .map((step, at) => ({ step, value: lag.similarity.micro[at], delta: lag.delta, place })));
    const node = frame(width, {
      x: stepAxis(), y: { label: "↑ Jaccard", domain: unit, grid: true },
      marks: [
        ...blocks(),
        Plot.lineY(points, { x: "step", y: "value", z: "delta", stroke: (d) => colours[d.place % 4], strokeWidth: 2 }),
        Plot.dot(points, { x: "step", y: "value", fill: (d) => colours[d.place % 4], r: 3 }), Plot.ruleY([0]),
      ],
    });
    const rows = points.map((point) => ({ delta: point.delta, [stepName]: point.step, Jaccard: point.value }));
    return { node, rows, label: `Line chart: similarity to masks delta ${stepName}s older, ${where()}`,
      legend: found.map((lag, place) => ({ label: `${lag.delta} ${stepName}s older`, colour: colours[place % 4] })) };
  };

  // The canvas: one button per generated token; arrow keys move along, the panel says what happened to it.
  let current = 0;
  const canvas = () => variant().canvases[Number(chosen("canvas-prompt") ?? 0)];
  const mean = (values) => d3.mean(values.filter((value) => value !== null));
  const shade = (token) => {
    if (chosen("canvas-colour") === "step") return d3.interpolateViridis(token.step / Math.max(steps().length - 1, 1));
    return d3.interpolateViridis(mean(token.similarity[chosen("site")]) ?? 0);
  };
  const ink = (colour) => (d3.lab(colour).l > 55 ? "#000000" : "#ffffff");

  const describe = (token, place) => {
    const similar = token.similarity[chosen("site")];
    const average = mean(similar);
    return `“${token.text}” (position ${place}): committed at step ${token.step}. ` + (average === undefined
      ? "Its mask has no earlier one to be compared with."
      : `Its ${chosen("site")} mask, all layers, overlaps with that of the ${stepName} before by ` +
        average.toFixed(2) + (diffusion ? ` on average, at worst ${d3.min(similar.filter((v) => v !== null)).toFixed(2)}.` : "."));
  };

  // A diffusion model's position has a history over the steps; an autoregressive token is one point among the others.
  const historyOf = (tokens, site) => (diffusion ? tokens[current]?.similarity[site] ?? []
    : tokens.map((token) => mean(token.similarity[site]) ?? null));

  const tokenHistory = (width) => {
    const tokens = canvas()?.tokens ?? [];
    const values = historyOf(tokens, chosen("site"));
    const axis = diffusion ? "step" : "token";
    const rows = series(values).map(({ step, value }) => ({ [axis]: step, Jaccard: value }));
    const token = tokens[current];
    const mark = !diffusion ? { at: current, text: "chosen" }
      : token?.step >= 0 ? { at: token.step + 0.5, text: "committed" } : null;
    const node = frame(width, {
      height: 200, x: { ...stepAxis(), label: `${axis} →` }, y: { label: "↑ Jaccard", domain: unit, grid: true },
      marks: [
        ...(mark === null ? [] : [
          Plot.ruleX([mark.at], { stroke: "var(--second)", strokeDasharray: "4 3" }),
          Plot.text([mark.at], { x: (d) => d, y: 1, dy: -9, text: () => mark.text, fill: "var(--second)",
            textAnchor: mark.at > steps().length / 2 ? "end" : "start" })]),
        line(values, "var(--first)"), ...dots(values, "var(--first)"), Plot.ruleY([0]),
      ],
    });
    return { node, rows, label: token ? describe(token, current) : "No token" };
  };

  const visible = (text) => text.replace(/\n/g, "⏎").replace(/^ /, "·") || "∅";
  const show = (place, focus) => {
    const tokens = canvas().tokens;
    current = Math.max(0, Math.min(place, tokens.length - 1));
    const buttons = document.querySelectorAll("#canvas button");
    buttons.forEach((button, at) => {
      button.tabIndex = at === current ? 0 : -1;
      button.setAttribute("aria-pressed", String(at === current));
    });
    if (focus) buttons[current].focus();
    document.getElementById("canvas-detail").textContent = describe(tokens[current], current);
    report.redraw(["canvas-history"]);
  };

  const drawCanvas = () => {
    const place = document.getElementById("canvas");
    const found = canvas();
    if (!place || !found) return;
    const buttons = found.tokens.map((token, at) => {
      const button = report.element("button", { type: "button", title: describe(token, at) }, visible(token.text));
      button.style.background = shade(token);
      button.style.color = ink(shade(token));
      button.addEventListener("mouseenter", () => show(at, false));
      button.addEventListener("focus", () => { if (at !== current) show(at, false); });
      return button;
    });
    place.replaceChildren(report.element("span", { class: "prompt" }, found.prompt), ...buttons);
    show(current, false);
  };
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
  document.getElementById("canvas")?.addEventListener("keydown", (event) => {
    if (event.key in moves) { event.preventDefault(); show(current + moves[event.key], true); }
    if (event.key === "Home") { event.preventDefault(); show(0, true); }
    if (event.key === "End") { event.preventDefault(); show(Infinity, true); }
  });

  report.chart("jaccard", similarity("jaccard"));
  report.chart("drift", similarity("drift"));
  report.chart("jaccard-map", heatmap((c) => c.jaccard.micro, "Jaccard to the one before"));
  report.chart("drift-map", heatmap((c) => c.drift.micro, "Jaccard to the reference"));
  report.chart("density", density);
  report.chart("unions", unions);
  report.chart("movement", movement);
  report.chart("moved", moved);
  report.chart("lags", lags);
  report.chart("canvas-history", tokenHistory);

  const update = () => {
    for (const place of document.querySelectorAll(".selection")) place.textContent = `Shown: ${where()}.`;
    drawCanvas();
    report.redraw();
  };
  for (const select of document.querySelectorAll("select")) select.addEventListener("change", update);
  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (e) => e.preventDefault());
  report.start();
  update();
})();
