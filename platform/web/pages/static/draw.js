// Draw the rows of the chart on a canvas, in the colours of the style sheet. Only what is in sight is drawn.
//
// The bars stand on a layer that reaches beyond the sight on both sides. While somebody pans, it is moved, not drawn.

import { COLOURS } from "./layout.js";

export const AXIS = 26;
export const GAP = 8;
// Shades of one task's runs, so that neighbours differ.
const SHADES = [1, 0.82, 0.66];
// Share of the width by which the layer reaches beyond the sight.
const MARGIN = 0.25;
const FAILED = new Set(["failed", "lost", "taken_back"]);
const STEPS = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800];

export function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  // Text grows with that of the page, which is larger on a wide screen.
  const text = Math.max(12, Math.round(0.75 * parseFloat(style.fontSize)));
  const tasks = Array.from({ length: COLOURS }, (_, number) => colour(`c${number}`));
  return {
    tasks: tasks.map((task) => SHADES.map((share) => mixed(task, colour("track"), share))),
    ...Object.fromEntries(["ink", "soft", "line", "track", "card", "alarm", "busy"].map((name) => [name, colour(name)])),
    text,
    font: `${text}px ${getComputedStyle(document.body).fontFamily}`,
  };
}

// A share of one colour with the rest of another, both as #rrggbb. Opaque bars are drawn faster than those with alpha.
function mixed(colour, other, share) {
  const parts = (text) => text.match(/^#(..)(..)(..)$/)?.slice(1).map((part) => parseInt(part, 16));
  const [front, back] = [parts(colour), parts(other)];
  return front && back ? `rgb(${front.map((part, at) => Math.round(part * share + back[at] * (1 - share))).join(" ")})` : colour;
}

let measured = {};
export function gutterOf(context, rows, width, font) {
  if (measured.rows !== rows || measured.font !== font) {
    context.font = font;
    measured = { rows, font, longest: rows.reduce((most, row) => Math.max(most, context.measureText(row.name).width), 52) };
  }
  return Math.min(measured.longest + 14, Math.max(200, width * 0.08), width * 0.25);
}

function clock(time, step) {
  const date = new Date(time);
  const two = (number) => String(number).padStart(2, "0");
  if (step >= 86400) return `${date.getMonth() + 1}-${two(date.getDate())}`;
  const text = `${two(date.getHours())}:${two(date.getMinutes())}`;
  return step < 60 ? `${text}:${two(date.getSeconds())}` : text;
}

function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > width) end -= 1;
  return `${text.slice(0, end)}…`;
}

function axis(context, view, colours, size) {
  const wide = (seconds) => (seconds * 1000 * (size.width - size.gutter)) / (view.end - view.begin) >= 6.4 * colours.text;
  const step = STEPS.find(wide) ?? STEPS.at(-1);
  const zone = new Date(view.begin).getTimezoneOffset() * 60000;
  const every = step * 1000;
  context.fillStyle = colours.soft;
  context.strokeStyle = colours.line;
  context.textAlign = "center";
  for (let time = Math.ceil((view.begin - zone) / every) * every + zone; time <= view.end; time += every) {
    const x = Math.round(size.x(time)) + 0.5;
    if (x < size.gutter) continue;
    context.beginPath();
    context.moveTo(x, AXIS - 4);
    context.lineTo(x, size.height);
    context.stroke();
    context.fillText(clock(time, step), x, AXIS / 2);
  }
}

// Paint the bars of a row in whole pixels. `place`: the row on the layer. Bars that share a column of pixels and their
// height there are one rectangle.
function bars(context, row, layer, colours, place, now) {
  const { from, scale, ratio } = layer;
  const { width } = layer.canvas;
  const until = from + width / scale;
  const unit = place.height / row.top;
  const level = (cpus) => place.y + Math.round(place.height - cpus * unit);
  const painted = new Map();
  for (const bar of row.bars) {
    const end = Math.min(bar.end, now);
    if (end < from || bar.start > until) continue;
    const left = Math.max(0, Math.round((bar.start - from) * scale));
    const right = Math.max(left + 1, Math.min(width, Math.round((end - from) * scale)));
    const failed = FAILED.has(bar.run.outcome);
    const wide = right - left > 3 * ratio;
    const length = right - left - (wide ? Math.round(ratio) : 0);
    for (const [low, high] of bar.pieces) {
      const top = level(high);
      const tall = level(low) - top;
      if (length === 1) {
        const key = (top * 16384 + tall) * 2 + (failed ? 1 : 0);
        if (painted.get(key) === left) continue;
        painted.set(key, left);
      }
      const deep = Math.max(1, tall - (tall > 4 * ratio ? Math.round(ratio) : 0));
      context.fillStyle = colours.tasks[bar.colour][bar.shade];
      context.fillRect(left, top, length, deep);
      if (wide && bar.run.ready > bar.start) {
        const wait = Math.min(right, Math.round((bar.run.ready - from) * scale)) - left;
        context.fillStyle = colours.card;
        context.globalAlpha = 0.55;
        if (wait > 0) context.fillRect(left, top, wait, deep);
        context.globalAlpha = 1;
      }
      if (failed) {
        const mark = Math.min(Math.round(4 * ratio), length);
        context.fillStyle = colours.alarm;
        context.fillRect(left + length - mark, top, mark, deep);
      }
    }
  }
}

// Write the names of tasks into wide bars, where they are in sight.
function labels(context, row, view, colours, size, y, height, now) {
  const least = (60 * (view.end - view.begin)) / (size.width - size.gutter);
  context.fillStyle = "#10140f";
  context.textAlign = "left";
  for (const bar of row.bars) {
    const end = Math.min(bar.end, now);
    if (end - bar.start < least || end < view.begin || bar.start > view.end) continue;
    const left = Math.max(size.gutter, size.x(bar.start));
    const width = Math.min(size.width, size.x(end)) - left;
    if (width <= 60) continue;
    for (const [low, high] of bar.pieces) {
      const tall = ((high - low) * height) / row.top;
      const middle = y + height - ((high + low) / 2 / row.top) * height;
      if (tall >= 14) context.fillText(shortened(context, bar.run.task, width - 10), left + 5, middle);
    }
  }
}

let layer = null;

// Return the layer with the bars in sight, painted anew only where the old one does not have them.
function layerOf(size, rows, view, colours) {
  const { ratio } = size;
  const width = Math.max(1, Math.round((size.width - size.gutter) * ratio));
  const height = Math.max(1, Math.round((size.height - AXIS) * ratio));
  const length = view.end - view.begin;
  const scale = width / length;
  const same =
    layer &&
    layer.rows === rows &&
    layer.colours === colours &&
    layer.scroll === view.scroll &&
    layer.ratio === ratio &&
    layer.sight === width &&
    layer.canvas.height === height &&
    Math.abs(layer.length - length) * scale < 0.25 &&
    Math.abs(view.now - layer.now) * scale < 1 &&
    layer.from <= view.begin &&
    view.end <= layer.until;
  if (same) return layer;
  const canvas = layer?.canvas ?? document.createElement("canvas");
  const whole = Math.round(width * (1 + 2 * MARGIN));
  if (canvas.width !== whole || canvas.height !== height) Object.assign(canvas, { width: whole, height });
  const [from, until] = [view.begin - length * MARGIN, view.end + length * MARGIN];
  const { now, scroll } = view;
  layer = { canvas, rows, colours, scroll, ratio, sight: width, length, scale, from, until, now };
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, whole, height);
  const end = Math.min(whole, Math.round((now - from) * scale));
  for (const row of rows) {
    const place = { y: Math.round((row.y - scroll) * ratio), height: Math.round(row.height * ratio) };
    if (place.y > height || place.y + place.height < 0) continue;
    context.fillStyle = colours.track;
    const share = Math.round(place.height * (row.top ? row.cpus / row.top : 1));
    if (end > 0) context.fillRect(0, place.y + place.height - share, end, share);
    bars(context, row, layer, colours, place, now);
  }
  return layer;
}

export function draw(context, size, rows, view, cursor, colours) {
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, context.canvas.width, context.canvas.height);
  context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
  context.font = colours.font;
  context.textBaseline = "middle";
  axis(context, view, colours, size);
  context.setTransform(1, 0, 0, 1, 0, 0);
  const { canvas, from, scale, sight } = layerOf(size, rows, view, colours);
  const [left, top] = [Math.round(size.gutter * size.ratio), Math.round(AXIS * size.ratio)];
  const shift = Math.round((view.begin - from) * scale);
  context.drawImage(canvas, shift, 0, sight, canvas.height, left, top, sight, canvas.height);
  context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
  context.save();
  context.beginPath();
  context.rect(0, AXIS, size.width, size.height - AXIS);
  context.clip();
  for (const row of rows) {
    const y = AXIS + row.y - view.scroll;
    const { height } = row;
    if (y > size.height || y + height < AXIS) continue;
    labels(context, row, view, colours, size, y, height, view.now);
    context.textAlign = "left";
    context.fillStyle = colours.ink;
    context.fillText(shortened(context, row.name, size.gutter - 12), 2, y + Math.min(height / 2, 10) + 2);
    context.fillStyle = colours.soft;
    if (row.cpus && height >= colours.text + 16) context.fillText(`${row.cpus} ${size.cpus}`, 2, y + Math.min(height / 2, 10) + colours.text + 4);
  }
  if (cursor) crosshair(context, rows, view, cursor, colours, size);
  context.restore();
}

function crosshair(context, rows, view, cursor, colours, size) {
  const row = rows[cursor.row];
  if (!row) return;
  const x = Math.round(size.x(cursor.time)) + 0.5;
  const { height } = row;
  const y = AXIS + row.y - view.scroll;
  context.strokeStyle = colours.ink;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x, AXIS);
  context.lineTo(x, size.height);
  context.stroke();
  context.fillStyle = colours.busy;
  context.beginPath();
  context.arc(x, y + height - (cursor.level / row.top) * height, 6, 0, 2 * Math.PI);
  context.fill();
  context.stroke();
  context.lineWidth = 1;
}
