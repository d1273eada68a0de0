// Place runs on a chart: a row for each worker, as high as its CPUs, in which each run holds its CPUs while it lasts.
// What no run holds stays free, so a hole in the picture is a hole in the allocation.

export const COLOURS = 10;
// Height of a run that asks for no CPU, as a part of its worker.
const THIN = 1 / 40;
// Milliseconds by which the noted end of a run may be late. Its CPUs were released, and given away, before.
const LATE = [0, 50, 500, 2000];
const encoder = new TextEncoder();

// The colour of a task, as on the other pages: FNV-1a of its name.
export function colourOf(task) {
  return hashOf(task) % COLOURS;
}

function hashOf(text) {
  let hash = 0x811c9dc5;
  for (const byte of encoder.encode(text)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return hash;
}

// Return the free pieces of a row for so many CPUs, the lowest first. A run that finds no room is placed above all.
function pieces(held, cpus) {
  const gaps = [];
  let level = 0;
  for (const [from, to] of held.flatMap((bar) => bar.pieces).sort((a, b) => a[0] - b[0])) {
    if (from > level) gaps.push([level, from]);
    level = Math.max(level, to);
  }
  gaps.push([level, Infinity]);
  const fitting = gaps.find(([from, to]) => to - from >= cpus);
  if (fitting[1] !== Infinity || gaps.length === 1) return [[fitting[0], fitting[0] + cpus]];
  const taken = [];
  let left = cpus;
  for (const [from, to] of gaps) {
    const size = Math.min(left, to - from);
    taken.push([from, from + size]);
    left -= size;
    if (left <= 0) break;
  }
  return taken;
}

// `runs`: with `start` and `end` in milliseconds, `end` Infinity for one that has not ended.
export function rowsOf(runs, workers, wanted) {
  const rows = new Map();
  const row = (name, cpus) => {
    if (!rows.has(name)) rows.set(name, { name, cpus, top: cpus, bars: [] });
    return rows.get(name);
  };
  for (const worker of workers) if (worker.name.includes(wanted)) row(worker.name, worker.cpus);
  const sorted = runs.filter((run) => run.worker.includes(wanted)).sort((a, b) => a.start - b.start);
  for (const run of sorted) {
    const line = row(run.worker, 0);
    line.held = (line.held ?? []).filter((bar) => bar.end > run.start);
    const cpus = run.cpus || (line.cpus || 1) * THIN;
    let placed;
    for (const late of LATE) {
      placed = pieces(line.held.filter((bar) => bar.end > run.start + late), cpus);
      if (placed.at(-1)[1] <= line.cpus) break;
    }
    const bar = { run, start: run.start, end: run.end, colour: colourOf(run.task), shade: hashOf(run.job) % 3, pieces: placed };
    line.held.push(bar);
    line.bars.push(bar);
    line.top = Math.max(line.top, bar.pieces.at(-1)[1]);
  }
  return [...rows.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

// Give each row its height and its place: all of them fill the chart, unless that would make one too low to see.
export function stack(rows, available, gap) {
  const whole = rows.reduce((sum, row) => sum + (row.top || 1), 0);
  const scale = (available - gap * (rows.length + 1)) / whole;
  let y = gap;
  for (const row of rows) {
    row.y = y;
    row.height = Math.min(360, Math.max(30, (row.top || 1) * scale));
    y += row.height + gap;
  }
  return y;
}

// The bars of a row at a moment, the lowest first.
export function barsAt(row, time) {
  return row.bars.filter((bar) => bar.start <= time && time < bar.end).sort((a, b) => a.pieces[0][0] - b.pieces[0][0]);
}

export function barAt(row, time, level) {
  return barsAt(row, time).find((bar) => bar.pieces.some(([from, to]) => from <= level && level < to)) ?? null;
}

// CPUs that no run holds at a moment.
export function freeAt(row, time) {
  return Math.max(0, row.cpus - barsAt(row, time).reduce((sum, bar) => sum + bar.run.cpus, 0));
}
