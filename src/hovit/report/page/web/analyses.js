// ---- Analyses: rows of a record, shown by the shape of their values

const isSeries = (found) =>
  Array.isArray(found) && found.length > 0 && found.length <= 16 && found.every(Number.isFinite);
const isLines = (found) =>
  Array.isArray(found) &&
  found.length > 0 &&
  found.every((line) => line && line.constructor === Object);
const isShort = (found) =>
  ["number", "boolean"].includes(typeof found) ||
  isSeries(found) ||
  (typeof found === "string" && found.length <= 40);

function setUpAnalyses() {
  for (const section of $$(".analysis")) {
    const rows = DATA.records[section.dataset.path]?.results?.rows;
    if (rows) section.append(...analysisParts(Object.entries(rows)));
  }
}

/** Show matrices as images, numbers as one table, and each list of objects as a table. */
function analysisParts(rows) {
  const maps = rows.flatMap(([ref, row]) =>
    Object.entries(row)
      .flatMap(([name, found]) => matrices(found, name))
      .map(([name, found]) => heatMap(`${rowLabel(ref)}: ${name}`, found)),
  );
  const lists = [
    ...new Set(rows.flatMap(([, row]) => Object.keys(row).filter((name) => isLines(row[name])))),
  ];
  return [
    maps.length ? h("div", { class: "maps" }, maps) : "",
    plainTable("numbers", rows),
    ...lists.map((name) =>
      plainTable(
        name,
        rows.flatMap(([ref, row]) => (row[name] ?? []).map((line) => [ref, line])),
      ),
    ),
  ].filter(Boolean);
}

const isBits = (line) => typeof line === "string" && /^[01]{2,}$/.test(line);

/** Find all matrices at any depth, as [name, matrix]: rows of numbers, or strings of 0 and 1. */
function matrices(found, name) {
  if (!Array.isArray(found) || !found.length) return [];
  const lines = found.map((line) => (isBits(line) ? [...line].map(Number) : line));
  const even = lines.every(
    (line) => Array.isArray(line) && line.length === lines[0].length && line.every(Number.isFinite),
  );
  if (even && lines.length > 1) return [[name, lines]];
  return found.flatMap((each, i) => matrices(each, `${name} ${i + 1}`));
}

function plainTable(title, rows) {
  const names = [
    ...new Set(rows.flatMap(([, row]) => Object.keys(row).filter((name) => isShort(row[name])))),
  ];
  if (!names.length) return "";
  const numeric = (name) =>
    rows.every(([, row]) => !["string", "boolean"].includes(typeof row[name]));
  const table = h(
    "table",
    { class: "sortable" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        sortHead("Row", false),
        names.map((name) => sortHead(name.replaceAll("_", " "), numeric(name))),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map(([ref, row]) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, rowLabel(ref)),
          names.map((name) =>
            h("td", { class: numeric(name) ? "number" : undefined }, write(row[name])),
          ),
        ),
      ),
    ),
  );
  const box = h("div", { class: "wide", role: "region", tabindex: 0, "aria-label": title }, table);
  setUpSorting(box);
  return box;
}

function write(found) {
  if (typeof found === "number") return short(found);
  if (typeof found === "boolean") return found ? "yes" : "no";
  return Array.isArray(found) ? found.map(short).join(", ") : (found ?? "");
}

function rowLabel(ref) {
  const [study, id] = ref.split("/");
  return DATA.studies[study]?.rows.find((row) => row.id === id)?.label ?? ref;
}

/** Draw a matrix as squares, darker for larger values, with its range below. */
function heatMap(title, matrix) {
  const every = matrix.flat(),
    low = Math.min(...every),
    high = Math.max(...every);
  const cells = matrix.flatMap((line, y) =>
    line.map((value, x) =>
      s("rect", {
        x,
        y,
        width: 1,
        height: 1,
        "shape-rendering": "crispEdges",
        fill: "currentColor",
        "fill-opacity": high > low ? (value - low) / (high - low) : 0.5,
      }),
    ),
  );
  return h(
    "figure",
    {},
    s(
      "svg",
      { viewBox: `0 0 ${matrix[0].length} ${matrix.length}`, role: "img", "aria-label": title },
      cells,
    ),
    h("figcaption", {}, title, h("small", {}, ` ${short(low)} to ${short(high)}`)),
  );
}

// ---- Start

function setUpCurves() {
  for (const details of $$("details.curves")) {
    details.addEventListener("toggle", () => {
      if (details.open && details.childElementCount === 1) details.append(studyCurves(details));
    });
  }
}

/** In print, groups are open and tables show their data and device. */
function setUpPrinting() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = $$("details.facts:not([open]), details.group:not([open])");
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
}

setUpTheme();
setUpSorting();
setUpClaims();
setUpGroups();
setUpKeys();
setUpAnalyses();
setUpScatter();
setUpCurves();
setUpPrinting();
setUpStates(() => {
  keepTabStops();
  drawScatter();
});
setUpDetail();
