// ---- Training curves of the rows of a table, or of one record

const CURVES = [
  ["val_top1", "Validation top-1, %"],
  ["val_loss", "Validation loss"],
  ["train_loss", "Training loss"],
];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const look = (i) => ({
  class: `c${i % 7}`,
  "stroke-dasharray": DASHES[Math.floor(i / 7) % DASHES.length],
});

/** Draw lines {label, href, i, histories}: mean over random seeds, with the range as a band. */
function lineChart(lines, key, title, width = 640) {
  const drawn = lines
    .map((line) => ({ ...line, points: overSeeds(line.histories, key) }))
    .filter((l) => l.points.length);
  if (!drawn.length) return h("p", { class: "quiet" }, "No history in the records.");
  const box = { width, height: width * 0.5, left: 46, right: 12, top: 30, bottom: 42 };
  const every = drawn.flatMap((line) => line.points);
  const ys = rangeOf(
    every.flatMap((p) => [p.low, p.high]),
    false,
  );
  const xs = [1, Math.max(2, ...every.map((p) => p.epoch))];
  const x = scaleOf(xs, box.left, width - box.right, false);
  const y = scaleOf(ys, box.height - box.bottom, box.top, false);
  const path = (points, value) => points.map((p) => `${x(p.epoch)},${y(value(p))}`);
  return s(
    "svg",
    {
      width,
      height: box.height,
      viewBox: `0 0 ${width} ${box.height}`,
      role: "img",
      "aria-label": `${title} by epoch`,
    },
    frame(box, xs, ys, x, y, ["Epoch", title], { whole: true }),
    drawn.map((line) => {
      const { class: colour, ...dash } = look(line.i);
      const band = [
        ...path(line.points, (p) => p.low),
        ...path(line.points, (p) => p.high).reverse(),
      ];
      return s(
        "g",
        { class: colour },
        line.histories.length > 1 ? s("polygon", { class: "band", points: band.join(" ") }) : "",
        line.points.length > 1
          ? s("polyline", {
              class: "line",
              ...dash,
              points: path(line.points, (p) => p.mean).join(" "),
            })
          : s("circle", {
              class: "line",
              cx: x(line.points[0].epoch),
              cy: y(line.points[0].mean),
              r: 3,
            }),
      );
    }),
  );
}

function overSeeds(histories, key) {
  const length = Math.min(...histories.map((history) => history.length));
  return Array.from({ length }, (_, i) => {
    const found = histories.map((history) => history[i][key]);
    const mean = found.reduce((a, b) => a + b, 0) / found.length;
    return {
      epoch: histories[0][i].epoch,
      mean,
      low: Math.min(...found),
      high: Math.max(...found),
    };
  }).filter((p) => Number.isFinite(p.mean));
}

function historyCharts(record) {
  const lines = [{ i: 0, histories: [record.history] }];
  return h(
    "div",
    {},
    CURVES.map(([key, title]) => h("div", { class: "chart" }, lineChart(lines, key, title, 480))),
  );
}

function studyLines(study, source) {
  const runs = study.contexts[source].runs;
  return study.rows
    .filter((row) => runs[row.id]?.some((path) => DATA.records[path].history?.length))
    .map((row, i) => ({
      label: row.label,
      i,
      path: runs[row.id][0],
      n: runs[row.id].length,
      histories: runs[row.id].map((path) => DATA.records[path].history),
    }));
}

/** Choices and a chart inside the <details> of a study, built when first opened. */
function studyCurves(details) {
  const study = DATA.studies[details.dataset.study];
  const sources = Object.keys(study.contexts).filter((each) => studyLines(study, each).length);
  if (!sources.length) return h("p", { class: "quiet" }, "No run of this table has a record yet.");
  const what = h(
    "select",
    {},
    CURVES.map(([key, title]) => h("option", { value: key }, title)),
  );
  const source = h(
    "select",
    {},
    sources.map((each) => {
      const { state, name, scale } = study.contexts[each];
      const label = state === "run" ? `${name}, ${scale.split(":")[0]}` : `evidence, ${name}`;
      return h("option", { value: each }, label);
    }),
  );
  const chart = h("div", { class: "chart" }),
    keys = h("ul", { class: "keys-list" });
  const draw = () => {
    const on = new Set(
      $$("input", keys)
        .filter((box) => box.checked)
        .map((box) => box.value),
    );
    const lines = studyLines(study, source.value).filter((line) => on.has(String(line.i)));
    const width = Math.min(760, Math.max(300, details.clientWidth));
    chart.replaceChildren(lineChart(lines, what.value, what.selectedOptions[0].textContent, width));
  };
  const choose = () => {
    keys.replaceChildren(...studyLines(study, source.value).map(curveKey));
    draw();
  };
  what.addEventListener("input", draw);
  keys.addEventListener("input", draw);
  source.addEventListener("input", choose);
  queueMicrotask(choose); // after it is in the page, so that it has a width
  return h(
    "div",
    {},
    h(
      "div",
      { class: "tools" },
      h("label", { class: "field" }, "Curve ", what),
      h("label", { class: "field" }, "Source ", source),
    ),
    chart,
    keys,
  );
}

function curveKey(line) {
  const { class: colour, ...dash } = look(line.i);
  return h(
    "li",
    { class: `key ${colour}` },
    h(
      "label",
      {},
      h("input", { type: "checkbox", value: line.i, checked: "" }),
      s(
        "svg",
        { viewBox: "0 0 28 8", "aria-hidden": "true" },
        s("line", { x1: 0, x2: 28, y1: 4, y2: 4, ...dash }),
      ),
      line.label,
    ),
    " ",
    h(
      "a",
      { href: link("r", line.path), "aria-label": `record of ${line.label}` },
      `n = ${line.n}`,
    ),
  );
}
