// ---- Detail panel of a number: value, data and device, records, commands

const UNIT = {
  trained: ["standard deviation over random seeds", "random seeds"],
  timed: ["interquartile range over rounds", "rounds"],
  evaluated: ["", "models"],
};

function fact(term, ...text) {
  return text.flat().some((t) => t !== undefined && t !== "")
    ? [h("dt", {}, term), h("dd", {}, text)]
    : [];
}

/** A command with a button that copies it. */
function command(text) {
  const button = h("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre); // no clipboard access: select the text instead
    }
  });
  const pre = h("pre", {}, text);
  return h("div", { class: "command" }, pre, button);
}

function short(number) {
  return number === undefined ? "" : Number(number.toPrecision(6)).toLocaleString("en");
}

/** Parse the key of a number: study, row, metric, batch, ratio, source, state (reported, evidence, run). */
function parse(key) {
  const [study, row, name, source] = key.split("/");
  return { study, row, name, source, ...DATA.values[key], state: stateOf(source) };
}

const stateOf = (source) => source.split("@")[0];

/** The sources of a study's numbers: reported, this run, then each source of evidence. */
const sourcesOf = (study) => ["reported", ...Object.keys(DATA.studies[study].contexts)];

function heading(part) {
  const what = DATA.metrics[part.metric].heading;
  const over = part.ratio ? `${what.replace(/, ms$/, "")} × its baseline` : what;
  return part.batch ? `${over}, batch ${part.batch}` : over;
}

const STATE_NAMES = { reported: "reported", evidence: "evidence", run: "this run" };

function stateName(state) {
  return h(
    "span",
    {},
    h("i", { class: `mark ${state}`, "aria-hidden": "true" }),
    ` ${STATE_NAMES[state]}`,
  );
}

function valuePanel(key) {
  const value = DATA.values[key];
  if (!value) return null;
  const part = parse(key),
    study = DATA.studies[part.study];
  const row = study.rows.find((each) => each.id === part.row);
  return [
    h("h2", { id: "detail-title" }, `${row.label}: ${heading(part)}`),
    h(
      "p",
      { class: "quiet" },
      stateName(part.state),
      part.state === "evidence" ? ` (${study.contexts[part.source].name})` : "",
      ` · ${study.title}`,
    ),
    h("p", { class: "big" }, value.text),
    h(
      "dl",
      {},
      part.state === "reported"
        ? reportedFacts(part, study, row)
        : measuredFacts(part, value, study),
    ),
    otherSources(part, key),
    (value.records ?? []).map((path) => recordParts(path)),
  ];
}

function reportedFacts(part, study, row) {
  const own = "as stated in the paper";
  return [
    fact("Place", study.place),
    fact("Defined in", h("code", {}, `config/studies/${part.study}.yaml`), `, row ${part.row}`),
    fact("Dataset", row.task),
    fact("Scale", own),
    fact("Device", own),
    fact("n and spread", own),
    fact("Check it", command(`hovit explain ${part.study} ${part.row} ${part.metric}`)),
  ];
}

function measuredFacts(part, value, study) {
  const context = study.contexts[part.source];
  const record = DATA.records[value.records?.[0]];
  const kind = record?.kind === "evaluation" ? "evaluated" : DATA.metrics[part.metric]?.kind;
  const devices = [
    ...new Set((value.records ?? []).map((path) => DATA.records[path].device).filter(Boolean)),
  ];
  const [spreadIs, nIs] = UNIT[kind] ?? [];
  const both = (value.of ?? []).map((each) => DATA.values[each]).filter(Boolean);
  return [
    fact("Unrounded", part.ratio ? "" : short(value.number)),
    fact("Scale", context.scale),
    fact(
      "Dataset",
      ["trained", "evaluated"].includes(kind)
        ? context.data[part.row]
        : images(kind, record, study, part),
    ),
    fact("Device", devices.join("; ") || "none: computed from config/"),
    fact("n", (part.ratio ? both : [value]).map((each) => count(each.n, nIs)).join(" over ")),
    fact(
      "Spread",
      (part.ratio ? both : [value])
        .map((each) =>
          each.spread === undefined
            ? nIs
              ? "none: n = 1"
              : "none: exact"
            : `${short(each.spread)} (${spreadIs})`,
        )
        .join(" over "),
    ),
    fact("Noise", value.noise === undefined ? "" : `± ${short(value.noise)}, as used for claims`),
    fact(
      "Ratio to baseline",
      (value.of ?? []).map((each, i) => [
        i ? (value.inverse ? " under " : " over ") : "",
        numberLink(each),
      ]),
    ),
  ];
}

function count(n, what) {
  return what && n ? `${n} ${n === 1 ? what.slice(0, -1) : what}` : "1: exact";
}

/** The images or synthetic inputs of a number that needs no training. */
function images(kind, record, study, part) {
  if (kind === "counted") return "counted from the images";
  if (kind !== "timed") return study.scope;
  const latency = record?.spec?.latency;
  const own = record?.spec?.rows?.[part.row];
  const card = record?.results?.rows?.[part.row]?.device?.kind === "cuda" && latency?.on_gpu;
  const size = own?.latency_size ?? latency?.image_size;
  return `no images: synthetic input${size ? ` of ${size} px` : ""}, ${(card || latency)?.precision ?? "fp32"}`;
}

function numberLink(key) {
  const value = DATA.values[key];
  const part = parse(key);
  if (!value) return `${part.row} (not in the table)`;
  const label = DATA.studies[part.study].rows.find((each) => each.id === part.row).label;
  return h("a", { href: link("v", key) }, `${value.text} (${label})`);
}

/** The same number from other sources: reported, evidence, this run. */
function otherSources(part, key) {
  const names =
    part.batch || part.metric === "latency"
      ? Object.keys(DATA.values)
          .map(parse)
          .filter((p) => p.metric === "latency")
          .map((p) => p.name)
      : [part.name];
  const found = [...new Set(names)]
    .flatMap((name) =>
      sourcesOf(part.study).map((source) => `${part.study}/${part.row}/${name}/${source}`),
    )
    .filter((each) => each !== key && DATA.values[each] && parse(each).ratio === part.ratio);
  if (!found.length) return "";
  return [
    h("h3", {}, "Other sources"),
    h(
      "ul",
      {},
      found.map((each) =>
        h(
          "li",
          {},
          stateName(parse(each).state),
          ": ",
          h("a", { href: link("v", each) }, DATA.values[each].text),
          parse(each).batch ? ` batch ${parse(each).batch}` : "",
        ),
      ),
    ),
  ];
}

function claimPanel(id) {
  const claim = DATA.claims[id];
  if (!claim) return null;
  const verdict = h(
    "span",
    { class: `verdict ${claim.verdict.replaceAll(" ", "-")}` },
    `${DATA.symbols[claim.verdict]} ${claim.label}`,
  );
  return [
    h("h2", { id: "detail-title" }, claim.says),
    h("p", { class: "big" }, verdict),
    h(
      "dl",
      {},
      fact("Why", claim.why || "the reported and measured numbers decide"),
      fact("Reported", claim.reported ?? "no number (a comparison)"),
      fact("Measured", claim.measured || "not measured"),
      fact("Place", claim.place),
      fact("Checked by", claim.source || "no record"),
      fact(
        "Check",
        `${claim.kind} of `,
        h("code", {}, claim.of),
        claim.to ? [" against ", h("code", {}, claim.to)] : "",
      ),
      fact("Tolerance", tolerance(claim)),
      fact("Numbers", claimNumbers(claim)),
      fact("Defined in", h("code", {}, `config/claims/${claim.file}.yaml`), `, ${claim.id}`),
      fact("Check again", command(claimCommand())),
    ),
    claim.records.map((path) => recordParts(path)),
  ];
}

/** The tolerance of a claim; without one, the noise or the printed digits set it. */
function tolerance({ tolerance: given, reported }) {
  if (given !== null) return String(given);
  if (!reported) return "the noise";
  if (reported.includes("–")) return "the printed range";
  return reported.includes(".") ? "one unit of the last decimal" : "none: exact";
}

function claimCommand() {
  return `snakemake --cores all claims${DATA.scale === "smoke" ? "" : ` --config scale=${DATA.scale}`}`;
}

function claimNumbers(claim) {
  const keys = [claim.of, claim.to]
    .filter(Boolean)
    .flatMap((ref) => sourcesOf(ref.replace(/.*:/, "").split("/")[0]).map((each) => `${ref}/${each}`))
    .filter((key) => DATA.values[key]); // analyses have none
  return keys.length
    ? h(
        "ul",
        {},
        keys.map((key) => h("li", {}, stateName(parse(key).state), ": ", numberLink(key))),
      )
    : "";
}

function recordPanel(path) {
  if (!DATA.records[path]) return null;
  return [h("h2", { id: "detail-title" }, "Record"), recordParts(path, true)];
}

/** A record: path, commit, command that reproduces it, spec, results and curves. */
function recordParts(path, open = false) {
  const record = DATA.records[path];
  // The page is in results/, so records open by a relative path.
  const href = path.startsWith("results/") ? path.slice("results/".length) : `../${path}`;
  const made = record.provenance;
  return h(
    "section",
    { class: "record" },
    h("h3", {}, h("a", { href: href.split("/").map(encodeURIComponent).join("/") }, path)),
    h(
      "dl",
      {},
      fact("Kind", record.kind),
      fact("Scale", record.scale),
      fact("Device", record.device),
      fact(
        "Commit",
        made ? [h("code", {}, record.commit), record.dirty ? " with uncommitted changes" : ""] : "",
      ),
      fact("Spec", made ? h("code", {}, record.spec_hash) : ""),
      fact("sha256", made ? h("code", {}, record.sha256) : ""),
      fact(
        "Made",
        made
          ? `${record.made}, in ${short(made.seconds)} s, peak memory ${short(made.peak_memory_mb)} MB`
          : "",
      ),
      fact(
        "Libraries",
        made
          ? Object.entries(made.versions)
              .map(([name, v]) => `${name} ${v}`)
              .join(", ")
          : "",
      ),
      fact("Reproduce", command(record.rerun)),
      fact("Code", made ? command(`git show ${record.commit}`) : ""),
    ),
    record.history?.length ? folded("Curves", () => historyCharts(record), open) : "",
    made
      ? folded("Spec", () => h("pre", { tabindex: 0 }, JSON.stringify(record.spec, null, 2)))
      : "",
    made
      ? folded("Results", () => h("pre", { tabindex: 0 }, JSON.stringify(record.results, null, 2)))
      : "",
    made
      ? folded("Provenance", () => h("pre", { tabindex: 0 }, JSON.stringify(made, null, 2)))
      : "",
  );
}

/** Content that is built when it is first opened. */
function folded(title, make, open = false) {
  const details = h("details", {}, h("summary", {}, title));
  const once = () => {
    if (details.open && details.childElementCount === 1) details.append(make());
  };
  details.addEventListener("toggle", once);
  if (open) {
    details.open = true;
    once();
  }
  return details;
}

// ---- The URL fragment names the open panel, so that numbers can be linked

const PANELS = { v: valuePanel, c: claimPanel, r: recordPanel };
let opener = null;

function followAddress() {
  const dialog = $("#detail");
  const [, kind, key] = location.hash.match(/^#([vcr])\/(.+)$/) ?? [];
  const parts = kind && PANELS[kind](decodeURIComponent(key));
  if (!parts) {
    if (dialog.open) dialog.close();
    return;
  }
  const close = h("button", { type: "button", class: "close", "aria-label": "Close" }, "✕");
  close.addEventListener("click", () => dialog.close());
  if (!dialog.open) opener = document.activeElement;
  dialog.replaceChildren(close, ...parts.flat(Infinity).filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  close.focus();
}

function setUpDetail() {
  const dialog = $("#detail");
  addEventListener("hashchange", followAddress);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("close", () => {
    if (/^#[vcr]\//.test(location.hash))
      history.replaceState(null, "", location.pathname + location.search);
    opener?.focus?.({ preventScroll: true });
  });
  followAddress();
}
