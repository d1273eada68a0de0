// The chart of runs: read who ran where, follow what happens, and answer to pointer and keyboard.

import { AXIS, GAP, draw, gutterOf, palette } from "./draw.js";
import { barAt, barsAt, colourOf, freeAt, rowsOf, stack } from "./layout.js";

const canvas = document.getElementById("chart");
const context = canvas.getContext("2d");
const words = canvas.dataset;
const under = document.getElementById("under");
const tip = document.getElementById("tip");
const detail = document.getElementById("detail");
const wanted = document.getElementById("chart-worker");
const stretch = document.getElementById("stretch");

// Milliseconds between two reads, and by which a read goes behind the one before: Postgres learns of an end a little later.
const PACE = 1000;
const OVERLAP = 10_000;
const MAX_RUNS = 10_000;
const KEPT = 30_000;
const SHORTEST = 200;
const LONGEST = 60 * 86_400_000;

const runs = new Map();
let workers = new Map();
let rows = [];
let colours = palette();
let size = { width: 0, height: 0, gutter: 100, ratio: 1, x: () => 0 };
let cursor = null;
let loaded = null;
let reading = false;
let again = false;
let following = true;
let skew = 0;
let pending = 0;
const view = { begin: 0, end: 0, now: 0, scroll: 0 };

const timeNow = () => Date.now() + skew;
const iso = (time) => new Date(Math.round(time)).toISOString();

function redraw() {
  if (pending) return;
  pending = requestAnimationFrame(() => {
    pending = 0;
    draw(context, size, rows, view, document.activeElement === canvas ? cursor : null, colours);
  });
}

function measure() {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  // A canvas that gets a size loses its picture, even where that is its size.
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  const gutter = gutterOf(context, rows, width, colours.font);
  const x = (time) => gutter + ((time - view.begin) * (width - gutter)) / (view.end - view.begin);
  if (height !== size.height) view.whole = stack(rows, height - AXIS, GAP);
  size = { width, height, gutter, ratio, x, cpus: words.cpus };
  scrollTo(view.scroll);
}

const timeAt = (x) => view.begin + ((x - size.gutter) * (view.end - view.begin)) / (size.width - size.gutter);

function layout() {
  rows = rowsOf([...runs.values()], [...workers.values()], wanted.value);
  canvas.dataset.runs = rows.reduce((sum, row) => sum + row.bars.length, 0);
  canvas.dataset.open = [...runs.values()].filter((run) => run.end === Infinity).length;
  view.whole = stack(rows, size.height - AXIS, GAP);
  measure();
  legend();
}

function scrollTo(scroll) {
  view.scroll = Math.max(0, Math.min(scroll, (view.whole ?? 0) - (size.height - AXIS)));
  redraw();
}

function legend() {
  const counts = new Map();
  for (const run of runs.values()) counts.set(run.task, (counts.get(run.task) ?? 0) + 1);
  const shown = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 12);
  document.getElementById("legend").replaceChildren(
    ...shown.map(([task, count]) => {
      const item = document.createElement("li");
      const dot = document.createElement("span");
      dot.className = `dot c${colourOf(task)}`;
      item.append(dot, `${task} · ${count.toLocaleString()}`);
      return item;
    }),
  );
}

async function answerOf(path) {
  const answer = await fetch(path, { credentials: "same-origin" });
  if (!answer.ok) throw new Error(String(answer.status));
  return answer;
}

async function load(since, until) {
  const query = new URLSearchParams({ limit: MAX_RUNS, ...(since ? { since: iso(since) } : {}), ...(until ? { until: iso(until) } : {}) });
  const page = await (await answerOf(`/api/v1/runs?${query}`)).json();
  const keys = new Set();
  for (const run of page.runs) {
    const key = `${run.job} ${run.epoch} ${run.attempt}`;
    const start = Date.parse(run.admitted_at);
    const end = run.ended_at ? Date.parse(run.ended_at) : Infinity;
    const ready = run.started_at ? Date.parse(run.started_at) : end;
    runs.set(key, { ...run, start, end, ready });
    keys.add(key);
  }
  if (runs.size > KEPT) {
    const oldest = [...runs].sort((a, b) => a[1].start - b[1].start).slice(0, runs.size - KEPT);
    for (const [key] of oldest) runs.delete(key);
  }
  document.getElementById("cut").hidden &&= page.whole;
  for (const worker of page.workers) workers.set(worker.name, worker);
  return { since: Date.parse(page.since), until: Date.parse(page.until), workers: page.workers, whole: page.whole, keys };
}

// Read the ends of open runs that a whole answer lacks. Postgres learned of such an end later than OVERLAP.
async function loadLateEnds(keys) {
  const lost = [...runs].filter(([key, run]) => run.end === Infinity && !keys.has(key));
  if (!lost.length) return;
  const page = await load(Math.min(...lost.map(([, run]) => run.start)), null);
  // A run that is in no answer any more has gone with its job.
  for (const [key] of lost) if (page.whole && !page.keys.has(key)) runs.delete(key);
}

// Read what happened since the last read.
async function follow() {
  if (reading || document.hidden || !loaded) {
    again = true;
    return;
  }
  reading = true;
  again = false;
  try {
    const page = await load(loaded.until - OVERLAP, null);
    if (page.whole) await loadLateEnds(page.keys);
    loaded.until = page.until;
    skew = page.until - Date.now();
    layout();
  } catch {
    again = true;
  }
  setTimeout(() => {
    reading = false;
    if (again) follow();
  }, PACE);
}

// Read the stretch from its beginning.
async function open() {
  const length = Number(stretch.value) * 1000;
  runs.clear();
  workers = new Map();
  document.getElementById("cut").hidden = true;
  const page = await load(timeNow() - length, null);
  skew = page.until - Date.now();
  loaded = { since: page.since, until: page.until };
  following = true;
  // A young cluster fills the chart too.
  const first = Math.min(page.until - 20_000, ...[...runs.values()].map((run) => run.start));
  show(Math.max(page.until - length, first - (page.until - first) / 30), page.until);
  canvas.dataset.ready = "true";
  layout();
}

function show(begin, end) {
  const now = timeNow();
  const length = Math.min(LONGEST, Math.max(SHORTEST, end - begin));
  view.end = Math.min(end, now + length / 20);
  view.begin = view.end - length;
  view.now = now;
  canvas.dataset.begin = Math.round(view.begin);
  canvas.dataset.end = Math.round(view.end);
  measure();
  clearTimeout(earlier.timer);
  earlier.timer = setTimeout(earlier, 300);
}

// Read what lies before the stretch, once somebody looks there.
async function earlier() {
  if (!loaded || view.begin >= loaded.since) return;
  const since = view.begin - (view.end - view.begin) / 2;
  const until = loaded.since;
  loaded.since = since;
  try {
    await load(since, until);
    layout();
  } catch {
    loaded.since = until;
  }
}

function zoom(factor, middle = (view.begin + view.end) / 2) {
  following = following && factor > 1;
  show(middle - (middle - view.begin) * factor, middle + (view.end - middle) * factor);
}

function pan(share) {
  const by = (view.end - view.begin) * share;
  following = false;
  show(view.begin + by, view.end + by);
}

function toNow() {
  following = true;
  show(timeNow() - (view.end - view.begin), timeNow());
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const top = y - AXIS + view.scroll;
  const row = rows.findIndex((line) => line.y <= top && top < line.y + line.height);
  if (row < 0 || x < size.gutter || y < AXIS) return null;
  const height = rows[row].height;
  return { row, time: timeAt(x), level: ((rows[row].y + height - top) / height) * rows[row].top, x, y };
}

const seconds = (length) => (length < 60_000 ? `${(length / 1000).toFixed(1)} s` : `${Math.floor(length / 60_000)} min ${Math.round((length % 60_000) / 1000)} s`);

function describe(at) {
  const row = rows[at.row];
  const bar = barAt(row, at.time, at.level);
  const when = new Date(at.time).toLocaleTimeString(document.documentElement.lang);
  if (bar) {
    const state = words[bar.run.outcome ?? "running"] ?? bar.run.outcome;
    return `${bar.run.task} · ${row.name} · ${bar.run.cpus} ${words.cpus} · ${state} · ${seconds(Math.min(bar.end, timeNow()) - bar.start)}`;
  }
  if (at.time > timeNow()) return `${row.name} · ${when}`;
  return `${row.name} · ${when} · ${freeAt(row, at.time)} / ${row.cpus} ${words.cpus} ${words.free}. ${words.hint}`;
}

async function act(at) {
  const row = rows[at.row];
  const bar = barAt(row, at.time, at.level);
  if (bar) {
    location.assign(`/jobs/${encodeURIComponent(bar.run.job)}`);
    return;
  }
  if (at.time > timeNow()) return;
  try {
    const answer = await answerOf(`/runs/hole?${new URLSearchParams({ worker: row.name, at: iso(at.time) })}`);
    // The parser runs nothing of the answer.
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    detail.replaceChildren(document.importNode(page.getElementById("hole"), true));
  } catch {
    detail.textContent = words.failed_read;
  }
}

// -- pointer

let drag = null;
canvas.addEventListener("pointerdown", (event) => {
  drag = { x: event.clientX, y: event.clientY, begin: view.begin, end: view.end, scroll: view.scroll, moved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (drag) {
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    drag.moved ||= Math.abs(dx) + Math.abs(dy) > 4;
    if (!drag.moved) return;
    const by = (dx * (drag.end - drag.begin)) / (size.width - size.gutter);
    following = false;
    show(drag.begin - by, drag.end - by);
    scrollTo(drag.scroll - dy);
    tip.hidden = true;
    return;
  }
  const at = place(event);
  tip.hidden = !at;
  if (!at) return;
  tip.textContent = describe(at);
  tip.style.left = `${Math.min(at.x + 14, Math.max(0, size.width - 260))}px`;
  tip.style.top = `${at.y + 18}px`;
});
canvas.addEventListener("pointerup", (event) => {
  const clicked = drag && !drag.moved;
  drag = null;
  const at = clicked ? place(event) : null;
  if (!at) return;
  cursor = at;
  act(at);
});
canvas.addEventListener("pointercancel", () => {
  drag = null;
});
canvas.addEventListener("pointerleave", () => {
  tip.hidden = true;
});
canvas.addEventListener("dblclick", (event) => {
  const at = place(event);
  if (at) zoom(0.5, at.time);
});
canvas.addEventListener(
  "wheel",
  (event) => {
    const sideways = event.shiftKey ? event.deltaY : event.deltaX;
    if (event.ctrlKey || event.metaKey) {
      zoom(Math.exp(event.deltaY / 300), timeAt(event.clientX - canvas.getBoundingClientRect().left));
    } else if (Math.abs(sideways) > Math.abs(event.shiftKey ? 0 : event.deltaY)) {
      pan(sideways / 1500);
    } else {
      const before = view.scroll;
      scrollTo(view.scroll + event.deltaY);
      // The page scrolls on where the chart is at its end.
      if (view.scroll === before) return;
    }
    event.preventDefault();
  },
  { passive: false },
);

// -- keyboard

function step(by) {
  const row = rows[cursor.row];
  const bars = barsAt(row, cursor.time);
  const levels = bars.map((bar) => (bar.pieces[0][0] + bar.pieces[0][1]) / 2);
  const top = Math.max(0, ...bars.flatMap((bar) => bar.pieces.map((piece) => piece[1])));
  if (top < row.top) levels.push((top + row.top) / 2);
  const next = by > 0 ? levels.find((level) => level > cursor.level + 1e-9) : levels.findLast((level) => level < cursor.level - 1e-9);
  if (next !== undefined) {
    cursor.level = next;
    return;
  }
  const other = Math.min(rows.length - 1, Math.max(0, cursor.row - by));
  if (other === cursor.row) return;
  cursor.row = other;
  cursor.level = by > 0 ? 0 : rows[other].top;
  step(by);
}

function keepInSight() {
  const length = view.end - view.begin;
  if (cursor.time < view.begin || cursor.time > view.end) {
    following = false;
    show(cursor.time - length / 2, cursor.time + length / 2);
  }
  const row = rows[cursor.row];
  if (row.y < view.scroll) scrollTo(row.y - GAP);
  else if (row.y + row.height > view.scroll + size.height - AXIS) scrollTo(row.y + row.height - (size.height - AXIS) + GAP);
}

const KEYS = {
  ArrowLeft: (event) => (cursor.time -= ((view.end - view.begin) * (event.shiftKey ? 10 : 1)) / 60),
  ArrowRight: (event) => (cursor.time = Math.min(timeNow(), cursor.time + ((view.end - view.begin) * (event.shiftKey ? 10 : 1)) / 60)),
  ArrowUp: () => step(1),
  ArrowDown: () => step(-1),
  "+": () => zoom(0.5, cursor.time),
  "=": () => zoom(0.5, cursor.time),
  "-": () => zoom(2, cursor.time),
  Home: () => (cursor.time = loaded.since),
  End: () => {
    toNow();
    cursor.time = timeNow();
  },
  Enter: () => act(cursor),
  " ": () => act(cursor),
  Escape: () => detail.replaceChildren(),
};
canvas.addEventListener("keydown", (event) => {
  const key = KEYS[event.key];
  if (!key || event.ctrlKey || event.metaKey || event.altKey || !rows.length || !loaded) return;
  event.preventDefault();
  cursor = cursor && rows[cursor.row] ? cursor : { row: 0, time: (view.begin + Math.min(view.end, timeNow())) / 2, level: 0 };
  key(event);
  keepInSight();
  under.textContent = describe(cursor);
  redraw();
});
for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, redraw);

// -- tools

const ACTS = { in: () => zoom(0.5), out: () => zoom(2), back: () => pan(-0.5), on: () => pan(0.5), now: toNow };
for (const button of document.querySelectorAll("[data-act]")) button.addEventListener("click", () => ACTS[button.dataset.act]());
wanted.addEventListener("input", () => {
  cursor = null;
  layout();
});
stretch.addEventListener("change", open);
document.addEventListener("live", follow);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && again) follow();
});
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => {
  colours = palette();
  redraw();
});
new ResizeObserver(measure).observe(canvas);
setInterval(() => {
  if (document.hidden || !loaded) return;
  if (following) toNow();
  else {
    view.now = timeNow();
    redraw();
  }
}, 1000);
show(timeNow() - Number(stretch.value) * 1000, timeNow());
open().catch(() => {
  detail.textContent = words.failed_read;
});
