// The charts of critical-sparsity and compare: score kept against sparsity, and critical sparsity per site.
"use strict";
(() => {
  const sweep = report.data("sweep");
  const colours = ["var(--first)", "var(--second)", "var(--third)", "var(--fourth)"];
  const chosen = (id) => document.getElementById(id).value;
  const colour = (model) => colours[sweep.models.indexOf(model) % colours.length];
  const percent = (share) => (share === null || share === undefined ? null : 100 * share);
  const name = { element: "all entries pooled", hook_mean: "mean over hooks and calls" };

  const frame = (width, options) => Plot.plot({
    width: Math.min(width, 1100), height: Math.max(240, Math.min(380, width * 0.5)), marginLeft: 48, marginTop: 30,
    marginBottom: 40, style: { background: "none", color: "inherit", fontSize: "12px" }, ...options,
  });
  const legend = () => sweep.models.map((model) => ({ label: model, colour: colour(model) }));

  const curves = (width) => {
    const axis = chosen("average");
    const found = sweep.curves.filter((c) => c.site === chosen("site") && c.task === chosen("task"));
    const rows = found.flatMap((c) => c.points.filter((point) => point.kept !== null).map((point) => ({
      model: c.model, p: point.p, sparsity: percent(point[axis]), score: point.score, kept: percent(point.kept),
      low: percent(point.low), high: percent(point.high),
      "FFN speed-up at most, T=1": point.bounds["1"], "T=8": point.bounds["8"], "T=32": point.bounds["32"],
    })));
    rows.sort((one, two) => one.model.localeCompare(two.model) || one.sparsity - two.sparsity);
    const banded = rows.filter((row) => row.low !== null);
    const node = frame(width, {
      x: { label: "sparsity (% of entries) →", domain: [0, 100] },
      y: { label: "↑ score kept (% of dense)", grid: true },
      marks: [
        Plot.areaY(banded, { x: "sparsity", y1: "low", y2: "high", z: "model", fill: (d) => colour(d.model),
          fillOpacity: 0.18 }),
        Plot.ruleY([percent(sweep.retain)], { strokeDasharray: "5 4" }),
        Plot.lineY(rows, { x: "sparsity", y: "kept", z: "model", stroke: (d) => colour(d.model), strokeWidth: 2 }),
        Plot.dot(rows, { x: "sparsity", y: "kept", fill: (d) => colour(d.model), r: 2.5 }),
        Plot.tip(rows, Plot.pointer({ x: "sparsity", y: "kept", title: (d) =>
          `${d.model}\np ${d.p}\nsparsity ${d.sparsity.toFixed(1)} %\nkept ${d.kept.toFixed(1)} %` })),
      ],
    });
    return { node, rows, legend: legend(),
      label: `Line chart: score kept against sparsity, ${chosen("site")}, ${chosen("task")}, ${name[axis]}` };
  };

  const critical = (width) => {
    const axis = chosen("average");
    const rows = sweep.curves.filter((c) => c.task === chosen("task")).map((c) => {
      const found = c.critical[axis];
      return { site: c.site, model: c.model, critical: percent(found.crossing.value),
        low: percent(found.crossing.low), high: percent(found.crossing.high),
        "grid maximum": percent(found.grid_max.value), "lower bound only": found.censored ? "yes" : "" };
    }).filter((row) => row.critical !== null);
    const node = frame(width, {
      height: 60 + sweep.sites.length * (14 + 22 * sweep.models.length), marginLeft: 110, marginRight: 90,
      x: { label: "critical sparsity (% of entries) →", domain: [0, 100], grid: true },
      y: { label: null, domain: sweep.models }, fy: { label: null, domain: sweep.sites },
      marks: [
        Plot.ruleY(rows.filter((row) => row.low !== null), { x1: "low", x2: "high", y: "model", fy: "site",
          stroke: (d) => colour(d.model), strokeWidth: 3, strokeOpacity: 0.5 }),
        Plot.dot(rows, { x: "critical", y: "model", fy: "site", r: 4.5, fill: (d) => colour(d.model) }),
        Plot.tip(rows, Plot.pointer({ x: "critical", y: "model", fy: "site", title: (d) =>
          `${d.model}, ${d.site}\n${d.critical.toFixed(1)} % [${d.low?.toFixed(1)}, ${d.high?.toFixed(1)}]` })),
      ],
    });
    return { node, rows, legend: legend(), label: `Dot chart: critical sparsity per site, ${chosen("task")}` };
  };

  report.chart("curves", curves);
  report.chart("critical", critical);
  for (const id of ["site", "task", "average"]) {
    document.getElementById(id).addEventListener("change", () => report.redraw());
  }
  report.start();
})();
