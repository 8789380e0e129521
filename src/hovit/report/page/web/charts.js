// ---- Charts: plain SVG, from the same numbers as the tables

/** Round ticks over a range: [first, …, last], and their format. */
function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
      for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
    }
    return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }
  const rough = (high - low) / 6 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((each) => each >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step); tick * step <= high + step / 1e6; tick += 1)
    found.push(tick * step);
  return found;
}

/** Position of a number on an axis from `from` to `to`. */
function scaleOf([low, high], from, to, log) {
  const f = log ? Math.log10 : (x) => x;
  const span = f(high) - f(low) || 1;
  return (x) => from + ((f(x) - f(low)) / span) * (to - from);
}

function rangeOf(numbers, log) {
  const low = Math.min(...numbers),
    high = Math.max(...numbers);
  if (log) return [low / 1.2, high * 1.2];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

/** Draw axes with grid, ticks and titles. */
function frame(box, xs, ys, x, y, titles, { log = false, whole = false } = {}) {
  const { width, height, left, bottom, top, right } = box;
  const write = (tick) => Number(tick.toPrecision(6)).toLocaleString("en");
  return [
    ticks(...ys, false).map((tick) => [
      s("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }),
      s("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, write(tick)),
    ]),
    ticks(...xs, log)
      .filter((tick) => !whole || Number.isInteger(tick))
      .map((tick) => [
        s("line", { class: "grid", y1: top, y2: height - bottom, x1: x(tick), x2: x(tick) }),
        s("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, write(tick)),
      ]),
    s("line", {
      class: "axis",
      x1: left,
      x2: width - right,
      y1: height - bottom,
      y2: height - bottom,
    }),
    s("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, titles[0]),
    s("text", { x: left, y: top - 10 }, titles[1]),
  ];
}

// ---- Accuracy against latency, parameters …

const lastBatch = (name) => name.replace(/^latency_\d+/, "latency");

/** One number of a row; exact numbers may come from any source. */
function numberOf(study, row, name, source) {
  const own = source === "reported" ? lastBatch(name) : name;
  const key = `${study}/${row.id}/${own}/${source}`;
  if (DATA.values[key]) return { key, number: DATA.values[key].number };
  if (DATA.metrics[name]?.kind !== "exact") return null;
  const other = sourcesOf(study)
    .reverse()
    .map((each) => `${study}/${row.id}/${name}/${each}`)
    .find((each) => DATA.values[each]);
  return other ? { key: other, number: DATA.values[other].number } : null;
}

function parametersOf(study, row, source) {
  const found = numberOf(study, row, "parameters", source);
  if (found) return found.number;
  const millions = numberOf(study, row, "parameters_m", source);
  return millions ? millions.number * 1e6 : null;
}

const deviceOf = (key) => DATA.records[DATA.values[key].records?.[0]]?.device ?? "";

/** Choices for the x axis: ratios and exact counts, and times of one device. */
function acrossChoices() {
  const found = new Map();
  for (const key of Object.keys(DATA.values)) {
    const part = parse(key);
    const kind = DATA.metrics[part.metric]?.kind;
    if (kind === "trained" || kind === "counted" || (part.ratio && part.metric === "macs")) continue;
    if (kind === "timed" && !part.ratio) {
      if (part.state === "reported") continue; // measured on another device
      const device = deviceOf(key);
      found.set(
        `${part.name}|${part.state}|${device}`,
        `${heading(part)}: ${STATE_NAMES[part.state]}, ${device}`,
      );
    } else if (part.name !== "latency:ratio") {
      found.set(`${part.name}||`, heading(part));
    }
  }
  return [...found].sort((a, b) => rank(a[0]) - rank(b[0]) || a[1].localeCompare(b[1], "en"));
}

const rank = (choice) =>
  choice.startsWith("latency_32:ratio")
    ? 0
    : choice.includes(":ratio")
      ? 1
      : choice.endsWith("||")
        ? 2
        : 3;

/** The images of a number: stand-ins never share a plot with the images of the paper. */
const imagesOf = (study, row, source) =>
  DATA.studies[study].contexts[source]?.stand_ins[row.id] ?? row.task;

function pointsOf(form) {
  const [name, only, device] = form.x.value.split("|");
  const words = form.text.value.toLowerCase();
  const found = new Map();
  for (const [study, { rows }] of Object.entries(DATA.studies)) {
    for (const row of rows) {
      for (const source of sourcesOf(study)) {
        const state = stateOf(source);
        if (imagesOf(study, row, source) !== form.task.value) continue;
        if (!shown(state) || (only && only !== state)) continue;
        if (!`${row.label} ${row.model}`.toLowerCase().includes(words)) continue;
        const y = numberOf(study, row, form.y.value, source);
        const x = numberOf(study, row, name, source) ?? baselineOf(row, name);
        const id = `${source}/${row.system}`;
        if (!x || !y || found.has(id) || (device && deviceOf(x.key) !== device)) continue;
        found.set(id, {
          study,
          row,
          state,
          x: x.number,
          y: y.number,
          key: y.key,
          size: parametersOf(study, row, source),
        });
      }
    }
  }
  return [...found.values()];
}

/** The ratio of a baseline to itself is 1. */
function baselineOf(row, name) {
  return row.base && name.endsWith(":ratio") ? { key: "", number: 1 } : null;
}

function mark(point, x, y, most) {
  const radius = point.size ? 3 + 11 * Math.sqrt(point.size / most) : 5;
  const looks = { class: `dot ${point.state}` };
  if (point.state === "run") return [s("circle", { ...looks, cx: x, cy: y, r: radius }), radius];
  const side = radius * 1.7;
  const turn = point.state === "reported" ? `rotate(45 ${x} ${y})` : undefined;
  return [
    s("rect", {
      ...looks,
      x: x - side / 2,
      y: y - side / 2,
      width: side,
      height: side,
      transform: turn,
    }),
    radius,
  ];
}

/** Put a label next to its point if there is room for it. */
function place(text, x, y, radius, taken, box) {
  const width = text.length * 6,
    gap = radius + 4;
  const tries = [
    [x + gap, y + 4, "start"],
    [x - gap, y + 4, "end"],
    [x, y - gap, "middle"],
    [x, y + gap + 9, "middle"],
  ];
  for (const [tx, ty, anchor] of tries) {
    const start = anchor === "start" ? tx : anchor === "end" ? tx - width : tx - width / 2;
    const area = [start, ty - 11, start + width, ty + 2];
    const fits = start > box.left && area[2] < box.width - 4 && ty < box.height - box.bottom - 2;
    if (
      fits &&
      !taken.some((t) => area[0] < t[2] && area[2] > t[0] && area[1] < t[3] && area[3] > t[1])
    ) {
      taken.push(area);
      return s("text", { class: "label", x: tx, y: ty, "text-anchor": anchor }, text);
    }
  }
  return "";
}

function describePoint(point, form) {
  const [xs, ys] = [form.x, form.y].map((each) => each.selectedOptions[0].textContent);
  const size = point.size ? `\n${short(point.size / 1e6)} M parameters` : "";
  return `${point.row.label} (${STATE_NAMES[point.state]})\n${ys}: ${short(point.y)}\n${xs}: ${short(point.x)}${size}`;
}

function drawScatter() {
  const form = $("#axes"),
    chart = $("#scatter");
  const points = form.x.value ? pointsOf(form) : [];
  if (!points.length) {
    chart.replaceChildren(
      h("p", { class: "quiet" }, "No model has both numbers."),
    );
    $("#points").replaceChildren();
    return;
  }
  const width = Math.max(300, Math.min(1100, chart.clientWidth || 900));
  const box = { width, height: width < 600 ? 380 : 500, left: 46, right: 14, top: 34, bottom: 44 };
  const log = form.log.checked && points.every((point) => point.x > 0);
  const xs = rangeOf(
      points.map((p) => p.x),
      log,
    ),
    ys = rangeOf(
      points.map((p) => p.y),
      false,
    );
  const x = scaleOf(xs, box.left, width - box.right, log);
  const y = scaleOf(ys, box.height - box.bottom, box.top, false);
  const most = Math.max(...points.map((p) => p.size ?? 0), 1);
  const titles = [form.x, form.y].map((each) => each.selectedOptions[0].textContent);
  const across =
    width < 600 ? titles[0].split(": this run,")[0].split(": evidence,")[0] : titles[0];
  points.sort((a, b) => (b.size ?? 0) - (a.size ?? 0));
  const at = points.map((p) => mark(p, x(p.x), y(p.y), most));
  const taken = points.map((p, i) => [
    x(p.x) - at[i][1],
    y(p.y) - at[i][1],
    x(p.x) + at[i][1],
    y(p.y) + at[i][1],
  ]);
  const labels = points.map((p, i) => place(p.row.label, x(p.x), y(p.y), at[i][1], taken, box));
  const links = points.map((p, i) => {
    const text = describePoint(p, form);
    const a = s(
      "a",
      { href: link("v", p.key), "aria-label": text.replaceAll("\n", ", ") },
      at[i][0],
      labels[i],
    );
    withTip(a, text);
    return a;
  });
  chart.replaceChildren(
    s(
      "svg",
      {
        width,
        height: box.height,
        viewBox: `0 0 ${width} ${box.height}`,
        role: "group",
        "aria-label": `${titles[1]} against ${titles[0]}`,
      },
      frame(box, xs, ys, x, y, [across, titles[1]], { log }),
      joins(points, x, y),
      links,
    ),
  );
  $("#points").replaceChildren(pointTable(points, titles));
}

/** A dotted line through the points of one model. */
function joins(points, x, y) {
  const systems = Map.groupBy ? Map.groupBy(points, (p) => p.row.system) : new Map();
  return [...systems.values()]
    .filter((same) => same.length > 1)
    .map((same) =>
      s("polyline", {
        class: "join",
        fill: "none",
        points: STATES.flatMap((state) => same.filter((p) => p.state === state))
          .map((p) => `${x(p.x)},${y(p.y)}`)
          .join(" "),
      }),
    );
}

function pointTable(points, titles) {
  const heads = ["Model", "Source", titles[1], titles[0], "Parameters, M"];
  const table = h(
    "table",
    { class: "sortable" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        heads.map((text, i) => sortHead(text, i > 1)),
      ),
    ),
    h(
      "tbody",
      {},
      points.map((p) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, p.row.label),
          h("td", {}, stateName(p.state)),
          h("td", { class: "number" }, h("a", { href: link("v", p.key) }, short(p.y))),
          h("td", { class: "number" }, short(p.x)),
          h("td", { class: "number" }, p.size ? short(p.size / 1e6) : ""),
        ),
      ),
    ),
  );
  const box = h("div", {}, table);
  setUpSorting(box);
  return box;
}

function withTip(element, text) {
  const tip = $("#tip");
  const show = () => {
    const at = element.getBoundingClientRect();
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(at.right + 6, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(at.top, innerHeight - tip.offsetHeight - 8))}px`;
  };
  const hide = () => {
    tip.hidden = true;
  };
  for (const name of ["pointerenter", "focus"]) element.addEventListener(name, show);
  for (const name of ["pointerleave", "blur", "click"]) element.addEventListener(name, hide);
}

const options = (values) => values.map(([value, text]) => h("option", { value }, text));

/** Offer only choices for which a model has numbers on these images; keep the current choice. */
function offerAcross(form, across) {
  const before = form.x.value;
  const found = across.filter((choice) => {
    form.x.replaceChildren(...options([choice]));
    return pointsOf(form).length;
  });
  form.x.replaceChildren(...options(found));
  if (found.some(([value]) => value === before)) form.x.value = before;
}

function setUpScatter() {
  const form = $("#axes");
  const across = acrossChoices();
  const trained = Object.entries(DATA.metrics).filter(
    ([name, { kind }]) =>
      kind === "trained" && Object.keys(DATA.values).some((key) => parse(key).name === name),
  );
  form.y.append(...options(trained.map(([name, { heading: text }]) => [name, text])));
  if (trained.some(([name]) => name === "top1")) form.y.value = "top1";
  const every = Object.entries(DATA.studies).flatMap(([study, { rows }]) =>
    rows.flatMap((row) => sourcesOf(study).map((source) => imagesOf(study, row, source))),
  );
  const tasks = [...new Set(every)];
  form.task.append(...options(tasks.map((task) => [task, task])));
  const count = (task) => {
    form.task.value = task;
    offerAcross(form, across);
    return form.x.value ? pointsOf(form).length : 0;
  };
  form.task.value = tasks.map((task) => [count(task), task]).sort((a, b) => b[0] - a[0])[0][1];
  offerAcross(form, across);
  for (const field of [form.task, form.y])
    field.addEventListener("input", () => offerAcross(form, across));
  form.addEventListener("input", drawScatter);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", drawScatter);
  drawScatter();
}
