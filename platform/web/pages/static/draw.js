// Draw the rows of the chart on a canvas, in the colours of the style sheet. Only what is in sight is drawn.

import { COLOURS } from "./layout.js";

export const AXIS = 26;
export const GAP = 8;
// Shades of one task's runs, so that neighbours differ.
const SHADES = [1, 0.82, 0.66];
const STEPS = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800];

export function palette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    tasks: Array.from({ length: COLOURS }, (_, number) => colour(`c${number}`)),
    ...Object.fromEntries(["ink", "soft", "line", "track", "card", "alarm", "busy"].map((name) => [name, colour(name)])),
    font: `12px ${getComputedStyle(document.body).fontFamily}`,
  };
}

export function gutterOf(context, rows, width, font) {
  context.font = font;
  const longest = Math.max(52, ...rows.map((row) => context.measureText(row.name).width));
  return Math.min(longest + 14, 200, width * 0.25);
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
  const wide = (seconds) => (seconds * 1000 * (size.width - size.gutter)) / (view.end - view.begin) >= 76;
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

function bars(context, row, view, colours, size, y, height, now) {
  const scale = height / row.top;
  for (const bar of row.bars) {
    const end = Math.min(bar.end, now);
    if (end < view.begin || bar.start > view.end) continue;
    const left = Math.max(size.gutter, size.x(bar.start));
    const right = Math.min(size.width, size.x(end));
    const width = Math.max(1, right - left - (right - left > 3 ? 1 : 0));
    for (const [from, to] of bar.pieces) {
      const top = y + height - to * scale;
      const high = Math.max(1, (to - from) * scale - ((to - from) * scale > 4 ? 1 : 0));
      context.fillStyle = colours.tasks[bar.colour];
      context.globalAlpha = SHADES[bar.shade];
      context.fillRect(left, top, width, high);
      context.globalAlpha = 1;
      if (bar.run.ready > bar.start && width > 3) {
        const wait = Math.min(right, size.x(bar.run.ready)) - left;
        context.fillStyle = colours.card;
        context.globalAlpha = 0.55;
        if (wait > 0) context.fillRect(left, top, wait, high);
        context.globalAlpha = 1;
      }
      if (["failed", "lost", "taken_back"].includes(bar.run.outcome)) {
        context.fillStyle = colours.alarm;
        context.fillRect(Math.max(left, left + width - 4), top, Math.min(4, width), high);
      }
      if (width > 60 && high >= 14) {
        context.fillStyle = "#10140f";
        context.textAlign = "left";
        context.fillText(shortened(context, bar.run.task, width - 10), left + 5, top + high / 2);
      }
    }
  }
}

export function draw(context, size, rows, view, cursor, colours) {
  context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
  context.clearRect(0, 0, size.width, size.height);
  context.font = colours.font;
  context.textBaseline = "middle";
  axis(context, view, colours, size);
  context.save();
  context.beginPath();
  context.rect(0, AXIS, size.width, size.height - AXIS);
  context.clip();
  const now = view.now;
  for (const row of rows) {
    const y = AXIS + row.y - view.scroll;
    const { height } = row;
    if (y > size.height || y + height < AXIS) continue;
    context.fillStyle = colours.track;
    const end = Math.min(size.width, size.x(now));
    const share = row.top ? row.cpus / row.top : 1;
    if (end > size.gutter) context.fillRect(size.gutter, y + height * (1 - share), end - size.gutter, height * share);
    bars(context, row, view, colours, size, y, height, now);
    context.textAlign = "left";
    context.fillStyle = colours.ink;
    context.fillText(shortened(context, row.name, size.gutter - 12), 2, y + Math.min(height / 2, 10) + 2);
    context.fillStyle = colours.soft;
    if (row.cpus && height >= 28) context.fillText(`${row.cpus} ${size.cpus}`, 2, y + Math.min(height / 2, 10) + 16);
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
