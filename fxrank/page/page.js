"use strict";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

// Specifications name colours of the page, "@pair" say: they are its style's, so that charts follow its theme, on paper too.
const themed = (text) => JSON.parse(text.replace(/"@(\w+)"/g, '"var(--$1)"'));
const config = {
  background: null,
  font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: { labelColor: "var(--soft)", titleColor: "var(--soft)", gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", titleFontWeight: 500 },
  legend: { labelColor: "var(--text)", titleColor: "var(--soft)", titleFontWeight: 500 },
  text: { color: "var(--text)" },
};

async function draw() {
  for (const place of document.querySelectorAll(".chart")) {
    const spec = themed(document.getElementById(place.dataset.spec).textContent);
    await vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", actions: false, config });
  }
  root.dataset.drawn = "yes";
}

const wear = (theme) => { root.dataset.theme = theme; };
const preferred = () => (dark.matches ? "dark" : "light");
dark.addEventListener("change", () => wear(preferred()));
document.getElementById("theme").addEventListener("click", () => wear(root.dataset.theme === "dark" ? "light" : "dark"));
let worn = null;
addEventListener("beforeprint", () => { worn = root.dataset.theme; root.dataset.theme = "light"; });
addEventListener("afterprint", () => { root.dataset.theme = worn; });
wear(preferred());
draw();

// The table: sorted by a click on a head, numbers as numbers and empty cells last; filtered by words, all of which a row must have.
const table = document.querySelector("#decisions table");
const body = table.tBodies[0];
const rows = [...body.rows];
const heads = [...table.tHead.rows[0].cells];
const value = (row, i) => {
  const cell = row.cells[i];
  return cell.dataset.number === undefined ? cell.textContent : Number(cell.dataset.number);
};
heads.forEach((head, i) => head.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const empty = (x) => x === "" || x === "-";
  rows.sort((a, b) => {
    const [x, y] = [value(a, i), value(b, i)];
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
    return up ? order : -order;
  });
  body.append(...rows);
}));
const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  const left = rows.filter((row) => !row.hidden).length;
  document.getElementById("shown").textContent = words.length ? `${left} of ${rows.length}` : "";
});

// The graphs, larger and smaller.
let zoom = 1;
for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    zoom = Math.min(4, Math.max(0.1, zoom * Number(button.dataset.zoom)));
    for (const graph of document.querySelectorAll(".graph")) graph.style.zoom = zoom;
  });
}
