"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const themes = read("themes");
  const charts = read("charts");
  const journey = read("journey-data");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 599px)");
  const views = new Map();
  let horizon = Number(document.querySelector('input[name="horizon"]:checked')?.value ?? NaN);
  let drawing = 0;

  const config = () => {
    const theme = structuredClone(dark.matches ? themes.dark : themes.light);
    if (narrow.matches) {
      // Long predictor names leave too little room for the plot otherwise.
      Object.assign(theme.style.names, { minExtent: 122, maxExtent: 122, labelLimit: 120, labelFontSize: 10, labelLineHeight: 11 });
      theme.style.label.fontSize = 10;
      theme.style["reference-text"].fontSize = 10;
      theme.legend.columns = 1;
    }
    return theme;
  };

  const hasHorizon = (spec) => (spec.params ?? []).some((param) => param.name === "horizon");

  async function draw() {
    const round = ++drawing;
    const theme = config();
    document.documentElement.dataset.drawn = "no";
    for (const [id, original] of Object.entries(charts)) {
      if (round !== drawing) return;
      const spec = structuredClone(original);
      if (!Number.isNaN(horizon)) {
        for (const param of spec.params ?? []) if (param.name === "horizon") param.value = horizon;
      }
      const place = document.getElementById(id);
      const options = {
        mode: "vega-lite",
        renderer: "svg",
        actions: false,
        config: theme,
        tooltip: { theme: dark.matches ? "dark" : "light" },
      };
      views.get(id)?.finalize();
      const result = await vegaEmbed(place, spec, options);
      views.set(id, result);
    }
    if (round === drawing) document.documentElement.dataset.drawn = "yes";
  }

  async function changeHorizon(value) {
    horizon = value;
    for (const place of document.querySelectorAll("[data-horizon]")) place.textContent = String(value);
    drawJourney();
    for (const [id, result] of views) {
      if (hasHorizon(charts[id])) await result.view.signal("horizon", value).runAsync();
    }
  }

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function drawJourney() {
    if (!journey) return;
    const name = document.getElementById("journey-predictor").value;
    const h = Number.isNaN(horizon) ? Object.keys(journey.predictions[name])[0] : String(horizon);
    const foreseen = journey.predictions[name][h];
    const share = document.getElementById("journey-share");
    const grid = document.getElementById("journey-grid");
    if (!foreseen) {
      share.textContent = `${name} has no predictions at h=${h}.`;
      grid.replaceChildren();
      return;
    }
    const [hits, total] = journey.shares[name][h];
    share.textContent = total ? `${hits} of ${total} visits foreseen (${((100 * hits) / total).toFixed(1)} %)` : "";
    const head = element("thead");
    const tokens = element("tr");
    tokens.append(element("th", "layer"));
    journey.tokens.forEach((token, t) => {
      const cell = element("th", token);
      cell.scope = "col";
      cell.title = `token ${t}: ${token}`;
      tokens.append(cell);
    });
    head.append(tokens);
    const body = element("tbody");
    const layers = journey.actual.length ? journey.actual[0].length : 0;
    for (let layer = 0; layer < layers; layer++) {
      const row = element("tr");
      const label = element("th", String(layer));
      label.scope = "row";
      row.append(label);
      journey.actual.forEach((visited, t) => row.append(journeyCell(visited[layer], foreseen[t][layer])));
      body.append(row);
    }
    grid.replaceChildren(head, body);
  }

  function journeyCell(visited, foreseen) {
    const needed = visited.filter((expert) => expert >= 0);
    const found = foreseen ? needed.filter((expert) => foreseen.includes(expert)).length : 0;
    const kind = !foreseen ? "early" : found === needed.length ? "hit" : found ? "part" : "miss";
    const words = { early: "too early to foresee", hit: "all foreseen", part: "some foreseen", miss: "none foreseen" };
    const cell = element("td", undefined, kind);
    cell.title = `used ${needed.join(", ")}; ${foreseen ? `foreseen ${foreseen.join(", ")}: ` : ""}${words[kind]}`;
    const inner = element("div");
    for (const expert of needed) {
      inner.append(element("span", String(expert), foreseen?.includes(expert) ? "foreseen" : "unforeseen"));
    }
    cell.append(inner);
    return cell;
  }

  function sortable(table) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.firstElementChild.addEventListener("click", () => {
        const numeric = heading.classList.contains("n");
        // Numbers start with the largest, names with A.
        const before = heading.getAttribute("aria-sort");
        const down = before ? before === "ascending" : numeric;
        const key = (row) => row.cells[column].dataset.value;
        const compare = (a, b) => (numeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)));
        const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? compare(b, a) : compare(a, b)));
        table.tBodies[0].append(...rows);
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      });
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) sortable(table);
  for (const input of document.querySelectorAll('input[name="horizon"]')) {
    input.addEventListener("change", () => changeHorizon(Number(input.value)));
  }
  document.getElementById("journey-predictor")?.addEventListener("change", drawJourney);
  const contents = document.querySelector(".toc");
  const small = window.matchMedia("(max-width: 1079px)");
  const fold = () => { contents.open = !small.matches; };
  small.addEventListener("change", fold);
  contents.addEventListener("click", (event) => {
    if (small.matches && event.target.closest("a")) contents.open = false;
  });
  fold();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  drawJourney();
  draw();
})();
