"use strict";
// Elements are built with createElement and textContent: no string becomes markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const STATES = ["reported", "evidence", "run"];
const SVG = "http://www.w3.org/2000/svg";
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** Create an HTML element with attributes and children; strings become text. */
function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Create an SVG element. */
function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== ""));
  return element;
}

const link = (kind, key) => `#${kind}/${encodeURIComponent(key).replaceAll("%2F", "/")}`;
const shown = (state) => $(`#show-${state}`).checked;

/** A setting that persists across reloads, if the browser allows it. */
const kept = {
  get: (name) => {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  },
  set: (name, value) => {
    try {
      localStorage.setItem(name, value);
    } catch {
      /* storage is not available */
    }
  },
};

// ---- Light and dark

const root = document.documentElement;
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";

function nameTheme() {
  $("#theme").textContent = isDark() ? "Light" : "Dark";
}

function setUpTheme() {
  const before = kept.get("hovit-theme");
  if (before === "light" || before === "dark") root.dataset.theme = before;
  nameTheme();
  systemDark.addEventListener("change", nameTheme);
  $("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    kept.set("hovit-theme", root.dataset.theme);
    nameTheme();
  });
}

// ---- Show or hide reported numbers, evidence and this run

function setUpStates(changed) {
  for (const state of STATES) {
    $(`#show-${state}`).addEventListener("change", () => {
      document.body.classList.toggle(`hide-${state}`, !shown(state));
      changed();
    });
  }
}

// ---- Sorting

/** Sort key of a cell: its first number in a numeric column, else its text. */
function sortKey(cell, numeric) {
  const text = cell.textContent.trim();
  if (!numeric) return text.toLowerCase();
  const found = text.replaceAll(",", "").replaceAll("\u2212", "-").match(/-?\d+(\.\d+)?(e[-+]?\d+)?/);
  return found ? Number(found[0]) : null;
}

function compare(a, b) {
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1; // empty cells come last
  return typeof a === "string" ? a.localeCompare(b, "en") : a - b;
}

/** Sort by a column: ascending, descending, then the original order. */
function sortBy(table, th) {
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  const direction = next[th.getAttribute("aria-sort") ?? "none"];
  const heads = $$("thead th", table);
  for (const each of heads) each.removeAttribute("aria-sort");
  if (direction !== "none") th.setAttribute("aria-sort", direction);
  const at = heads.indexOf(th),
    numeric = th.classList.contains("number");
  const rows = [...table.tBodies[0].rows];
  rows.forEach((row, i) => {
    row.dataset.order ??= i;
  });
  const key = new Map(rows.map((row) => [row, sortKey(row.cells[at], numeric)]));
  const inOrder = (a, b) => a.dataset.order - b.dataset.order;
  rows.sort((a, b) => {
    if (direction === "none") return inOrder(a, b);
    const [x, y] = [key.get(a), key.get(b)];
    const sign = direction === "descending" && x !== null && y !== null ? -1 : 1;
    return sign * compare(x, y) || inOrder(a, b);
  });
  table.tBodies[0].append(...rows);
}

/** The heading of a sortable column. */
function sortHead(text, numeric) {
  return h(
    "th",
    { scope: "col", class: numeric ? "number" : undefined },
    h("button", { type: "button" }, h("span", {}, text)),
  );
}

function setUpSorting(within = document) {
  for (const button of $$("table.sortable thead button", within)) {
    button.addEventListener("click", () => sortBy(button.closest("table"), button.closest("th")));
  }
}

// ---- Arrow keys: each table is one tab stop; arrow keys move between its numbers

const usable = (table) => $$("tbody a", table).filter((a) => a.offsetParent !== null);

function moveFocus(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[
    event.key
  ];
  const cell = event.target.closest("td, th");
  if (!step || !cell || event.target.tagName !== "A") return;
  const [down, right] = step;
  let row = cell.parentElement,
    at = cell.cellIndex,
    next;
  do {
    if (down) row = down > 0 ? row.nextElementSibling : row.previousElementSibling;
    at += right;
    next = row?.cells[at] && $("a", row.cells[at]);
  } while (row?.cells[at] && !(next && next.offsetParent !== null));
  event.preventDefault();
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function setUpKeys() {
  for (const table of $$("table.numbers")) {
    usable(table).forEach((a, i) => {
      a.tabIndex = i ? -1 : 0;
    });
    table.addEventListener("keydown", moveFocus);
    table.addEventListener("focusin", (event) => {
      if (event.target.tagName !== "A") return;
      for (const a of $$('tbody a[tabindex="0"]', table)) a.tabIndex = -1;
      event.target.tabIndex = 0;
    });
  }
}

/** Every table keeps a tab stop, even if the column that had it is hidden. */
function keepTabStops() {
  for (const table of $$("table.numbers")) {
    const links = usable(table);
    if (links.length && !links.some((a) => a.tabIndex === 0)) links[0].tabIndex = 0;
  }
}

// ---- Claims

function filterClaims() {
  const form = $("#filters");
  const words = form.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const verdicts = new Set($$('[name="verdict"]:checked', form).map((box) => box.value));
  const rows = $$(".claims tbody tr");
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden =
      !verdicts.has(row.dataset.verdict) ||
      Boolean(form.paper.value && form.paper.value !== row.dataset.paper) ||
      !words.every((word) => text.includes(word));
  }
  $("#shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
}

function setUpClaims() {
  const form = $("#filters");
  form.addEventListener("input", () => {
    filterClaims();
    for (const group of $$("#claims details.group")) group.open = true;
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  filterClaims(); // browsers may keep form values over a reload
}

// ---- Groups: collapsed at first; an address within a group opens it

function openGroup() {
  const target = /^#[\w-]+$/.test(location.hash) && $(location.hash);
  if (!target) return;
  const closed = target.closest("details.group:not([open])");
  if (!closed) return;
  closed.open = true;
  target.scrollIntoView();
}

/** Tab stops of a table are counted when it is first visible. */
function setUpGroups() {
  addEventListener("hashchange", openGroup);
  for (const group of $$("details.group")) group.addEventListener("toggle", keepTabStops);
  openGroup();
}
