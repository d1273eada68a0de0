// Keep the page live: when the server tells of a change, read this page again and exchange the parts that differ.
// Nothing of an answer is run: the parser makes no script of it, and the policy of the page allows none.

const PARTS = ".live-part";
// Milliseconds between two reads: at least, at most, and as a multiple of those that a read took. So a page that costs
// the server much is read less often, and still follows within a second.
const PACE = 400;
// Milliseconds until the events are asked for again, after the server refused them.
const AGAIN = 3000;
const SLOWEST = 700;
const SHARE = 5;

const sign = document.getElementById("live");
let reading = false;
let stale = false;

function show(state) {
  if (!sign || sign.dataset.state === state) return;
  sign.dataset.state = state;
  sign.textContent = sign.dataset[state];
}

// A focused element keeps the focus if the new part has its like, by id, by the place that it leads to, or by name and
// value.
function focusKey(element) {
  if (!element || element === document.body) return null;
  if (element.id) return `#${CSS.escape(element.id)}`;
  if (element.name) return boxKey(element);
  const link = element.getAttribute("href");
  return link ? `[href="${CSS.escape(link)}"]` : null;
}

function boxKey(box) {
  return `[name="${CSS.escape(box.name)}"][value="${CSS.escape(box.value)}"]`;
}

function exchange(next) {
  const fresh = new Map([...next.querySelectorAll(PARTS)].map((part) => [part.id, part]));
  for (const part of document.querySelectorAll(PARTS)) {
    const other = fresh.get(part.id);
    if (!other || other.isEqualNode(part)) continue;
    const key = part.contains(document.activeElement) ? focusKey(document.activeElement) : null;
    const { scrollLeft, scrollTop } = part;
    const checked = [...part.querySelectorAll("input:checked")].map(boxKey);
    part.replaceWith(document.importNode(other, true));
    const now = document.getElementById(other.id);
    now.scrollLeft = scrollLeft;
    now.scrollTop = scrollTop;
    // What somebody has chosen stays chosen, unless it is gone.
    for (const box of checked.map((each) => now.querySelector(each))) if (box) box.checked = true;
    if (key) now.querySelector(key)?.focus({ preventScroll: true });
  }
}

async function read() {
  if (reading || document.hidden) {
    stale = true;
    return;
  }
  reading = true;
  stale = false;
  const begin = performance.now();
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html", "X-Live": "1" }, credentials: "same-origin" });
    if (answer.redirected && new URL(answer.url).pathname === "/login") {
      location.assign(answer.url);
      return;
    }
    exchange(new DOMParser().parseFromString(await answer.text(), "text/html"));
    // A part of the answer was not read anew yet, because that takes the stores long.
    if (answer.headers.has("X-Older")) stale = true;
    // A page about a job that is not there is up to date too.
    show(answer.ok || answer.status === 404 ? "live" : "interrupted");
    // Other scripts of the page read their parts again too.
    document.dispatchEvent(new Event("live"));
  } catch {
    show("interrupted");
  }
  setTimeout(() => {
    reading = false;
    if (stale) read();
  }, Math.min(SLOWEST, Math.max(PACE, SHARE * (performance.now() - begin))));
}

let events;

function connect() {
  events = new EventSource("/api/v1/events?only=changes");
  events.addEventListener("open", () => {
    show("live");
    read();
  });
  events.addEventListener("error", () => {
    show("interrupted");
    // A browser comes again by itself after a broken stream, but not after an answer that is an error.
    if (events.readyState === EventSource.CLOSED) setTimeout(connect, AGAIN);
  });
  for (const kind of ["changed", "reset", "tick"]) events.addEventListener(kind, read);
}

show("connecting");
connect();
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && stale) read();
});
window.addEventListener("pagehide", () => events.close());
window.addEventListener("pageshow", (event) => {
  // The browser kept the page as it was left, and shows it once more.
  if (event.persisted) connect();
});
