// What every report page shares: the theme button, charts that redraw when something changes, tables of their numbers.
"use strict";
const report = (() => {
  const drawers = new Map();

  const element = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);  // strings become text nodes: nothing is ever parsed as markup
    return node;
  };

  const data = (id) => JSON.parse(document.getElementById(id).textContent);

  const format = (value) =>
    value === null || value === undefined ? "" :
    typeof value !== "number" || Number.isInteger(value) ? String(value) : value.toFixed(3);

  // rows: objects with the same keys.
  const table = (rows) => {
    const keys = rows.length ? Object.keys(rows[0]) : [];
    const cells = (row) => keys.map((key, place) =>
      element(place ? "td" : "th", place ? {} : { scope: "row" }, format(row[key])));
    return element("div", { class: "scroll", tabindex: "0" }, element("table", {},
      element("thead", {}, element("tr", {}, ...keys.map((key) => element("th", { scope: "col" }, key)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))))));
  };

  const sample = (entry) => {
    const svg = d3.create("svg").attr("width", 26).attr("height", 10);
    svg.append("line").attr("x1", 0).attr("x2", 26).attr("y1", 5).attr("y2", 5).attr("stroke", entry.colour)
      .attr("stroke-width", entry.width ?? 2).attr("stroke-dasharray", entry.dash ?? null);
    return svg.node();
  };
  const legend = (entries) => element("div", { class: "legend" },
    ...entries.map((entry) => element("span", {}, sample(entry), entry.label)));

  // draw(width) -> { node, rows, legend?, label }. Called again on every redraw.
  const chart = (id, draw) => { drawers.set(id, draw); };

  const render = (id) => {
    const place = document.getElementById(id);
    if (!place || !place.clientWidth) return;
    const drawn = drawers.get(id)(place.clientWidth);
    drawn.node.setAttribute("role", "img");
    drawn.node.setAttribute("aria-label", drawn.label);
    place.replaceChildren(...(drawn.legend ? [legend(drawn.legend)] : []), drawn.node);
    const details = document.querySelector(`details[data-for="${id}"]`);
    if (details) {
      details.rows = drawn.rows;
      if (details.open) fill(details);
    }
  };
  const fill = (details) => {
    for (const old of details.querySelectorAll(".scroll")) old.remove();
    details.append(table(details.rows ?? []));
  };
  const redraw = (ids = [...drawers.keys()]) => ids.forEach(render);

  const start = () => {
    for (const details of document.querySelectorAll("details.numbers")) {
      details.addEventListener("toggle", () => { if (details.open) fill(details); });
    }
    document.getElementById("theme").addEventListener("click", () => {
      const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark");
      document.documentElement.dataset.theme = dark ? "light" : "dark";
    });
    // A chart is as wide as its place; only a change of width asks for a new drawing.
    let width = 0;
    new ResizeObserver(() => {
      if (document.body.clientWidth !== width) { width = document.body.clientWidth; redraw(); }
    }).observe(document.body);
    redraw();
  };

  return { chart, data, element, format, legend, redraw, start, table };
})();
