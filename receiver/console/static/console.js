// What is live: the page renews its marked parts when something changed. Everything else works without this script.
"use strict";

const main = document.querySelector("main[data-live-url]");

// -- times ------------------------------------------------------------------------------------------------------------
const words = new Intl.RelativeTimeFormat(document.documentElement.lang, { numeric: "auto", style: "short" });
const steps = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
function renewTimes(root) {
  for (const each of root.querySelectorAll("time[datetime]")) {
    const away = (Date.parse(each.dateTime) - Date.now()) / 1000;
    const [unit, seconds] = steps.find(([, length]) => Math.abs(away) >= length) || steps[3];
    const said = words.format(Math.round(away / seconds), unit);
    if (each.textContent !== said) each.textContent = said;
  }
}

// Pictures that came or went while somebody looks further down wait behind a button, so that nothing moves under the eyes.
const fresh = document.querySelector("[data-fresh]");
const tilesOf = (part) => [...part.querySelectorAll(".tile > a")].map((each) => each.getAttribute("href")).join();
function holds(part, other) {
  if (!("hold" in part.dataset)) return false;
  const isHeld = scrollY >= 200;
  fresh.hidden = !isHeld || tilesOf(part) === tilesOf(other);
  return isHeld;
}
if (fresh) fresh.addEventListener("click", () => { fresh.hidden = true; scrollTo(0, 0); fetchedAt = 0; renew(); });

// -- updating in place ------------------------------------------------------------------------------------------------
// An element of the page that the new one has too stays, with its focus, selection, ticks, typed text and open details.
// Rows are the same if they have the same key, or lead to the same page; others by their place among their kind.
function keyOf(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return node.nodeName;
  const link = node.matches("tr, li, .tile") && node.querySelector("a");
  return `${node.nodeName} ${node.dataset.key || node.id || node.getAttribute("action") || (link && link.getAttribute("href"))}`;
}
// Elements that a person is about to use stay until they are done with, though the new page has none of them.
let isHeld = false;
const isWrittenIn = (field) => field === document.activeElement || field.value !== field.defaultValue;
function isInUse(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return false;
  const selection = getSelection(), fields = [...node.querySelectorAll("textarea, input:not([type=hidden], [type=checkbox])")];
  return (!selection.isCollapsed && selection.containsNode(node, true)) || fields.some(isWrittenIn);
}
const OWN = ["open", "data-sent", "data-done"]; // attributes that this script and the reader set
function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) { if (old.data !== fresh.data) old.data = fresh.data; return; }
  for (const { name, value } of fresh.attributes) if (!OWN.includes(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) if (!OWN.includes(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
  const known = new Map();
  for (const each of old.childNodes) known.set(keyOf(each), [...(known.get(keyOf(each)) || []), each]);
  const pairs = [...fresh.childNodes].map((each) => [each, (known.get(keyOf(each)) || []).shift()]);
  const staying = new Set();
  for (const each of [...known.values()].flat()) if (isInUse(each)) { isHeld = true; staying.add(each); } else each.remove();
  let place = old.firstChild;
  for (const [each, same] of pairs) {
    let next = place;
    while (staying.has(next)) next = next.nextSibling;
    if (same && same === next) place = next.nextSibling; else old.insertBefore(same || document.importNode(each, true), place);
    if (same) update(same, each);
  }
}
function updateParts(page) {
  const focused = document.activeElement, before = isHeld;
  isHeld = false;
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = page.querySelector(`[data-live="${CSS.escape(part.dataset.live)}"]`);
    if (other && !part.isEqualNode(other) && !holds(part, other)) update(part, other);
  }
  if (focused.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
  if (window.restoreTicks) window.restoreTicks();
  if (isHeld !== before) showState();
}
const state = document.querySelector("[data-live-state]");
let isLive = false, newest = null;
function showState() {
  if (!state) return;
  state.classList.toggle("on", isLive);
  state.textContent = !isLive ? state.dataset.off : isHeld ? state.dataset.held : state.dataset.on;
}

// -- live -------------------------------------------------------------------------------------------------------------
// The server tells of changes some seconds apart. All consoles that are told at once share what they fetch.
const APART = 2500;
const loadedAt = Date.now();
let wanted = false, fetching = false, fetchedAt = 0;
async function renew() {
  wanted = true;
  if (fetching || document.hidden || Date.now() - fetchedAt < APART) return;
  fetching = true; wanted = false;
  try {
    const answer = await fetch(location.href, { headers: { "X-Live": "1" } });
    // A filter that is no longer understood (400) has a page of its own, whose numbers beside the pages are live too.
    const unread = answer.status === 400;
    if (answer.status === 401 || (unread && !document.querySelector("[data-unread]"))) { location.reload(); return; }
    if (!answer.ok && !unread) { wanted ||= answer.headers.has("Retry-After"); return; }
    newest = new DOMParser().parseFromString(await answer.text(), "text/html");
    renewTimes(newest);
    updateParts(newest);
  } catch { wanted = true; } finally { fetching = false; fetchedAt = Date.now(); }
}
if (main && document.querySelector("[data-live]") && window.EventSource) {
  const show = (on) => { isLive = on; showState(); };
  // Numbers over the whole database are up to three seconds old, and those of a part with `data-late` nearly as many
  // seconds as it says. Look once more for each when nothing follows.
  const late = 1000 * (document.querySelector("[data-late]")?.dataset.late || 0);
  let lost = false, timers = [], source;
  function lookAgain(...after) { timers.forEach(clearTimeout); timers = after.map((each) => setTimeout(renew, each)); }
  function connect() {
    source = new EventSource(main.dataset.liveUrl);
    source.addEventListener("hello", () => { show(true); if (lost) { fetchedAt = 0; renew(); } lost = false; if (late) lookAgain(late); });
    source.addEventListener("change", (event) => { const soon = Number(event.data) + 1000; renew(); lookAgain(soon, ...late > soon ? [late] : []); });
    // A browser connects again by itself, but not after an error page, as a proxy sends one for a server that is away.
    source.addEventListener("error", () => { lost = true; show(false); if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000); });
  }
  connect();
  // What needs a person may come with time alone. Beside very many changes one comes every 60 s.
  const isOld = () => Date.now() - Math.max(fetchedAt, loadedAt) > 65000;
  setInterval(() => { if (wanted || isOld() || document.querySelector("[data-counting]")) renew(); if (isHeld) updateParts(newest); }, 1000);
  document.addEventListener("visibilitychange", () => { if (!document.hidden && wanted) renew(); });
  addEventListener("pagehide", () => source.close());
}
renewTimes(document);
setInterval(() => renewTimes(document), 10000);

// -- small helps ------------------------------------------------------------------------------------------------------
document.addEventListener("click", async (event) => {
  const copy = event.target.closest("[data-copy]");
  if (copy) {
    event.preventDefault();
    try { await navigator.clipboard.writeText(copy.dataset.copy); copy.dataset.done = "1"; } catch { return; }
    const before = copy.textContent; copy.textContent = "✓"; setTimeout(() => { copy.textContent = before; }, 900);
  }
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
});
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method !== "get") { if (form.dataset.sent) { event.preventDefault(); return; } form.dataset.sent = "1"; setTimeout(() => delete form.dataset.sent, 4000); return; }
  for (const field of form.elements) if (field.name && !field.value) field.disabled = true; // short addresses to send on
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const menu of document.querySelectorAll("details.menu[open]")) { menu.open = false; menu.querySelector("summary").focus(); }
  if (event.key === "/" && !event.target.matches("input, textarea, select")) {
    const find = document.querySelector("input[type=search]");
    if (find) { event.preventDefault(); find.focus(); }
  }
});
document.addEventListener("error", (event) => {
  if (event.target.matches("img[data-else]")) { const say = document.createElement("span"); say.className = "other"; say.textContent = event.target.dataset.else; event.target.replaceWith(say); }
}, true);

// -- gallery ----------------------------------------------------------------------------------------------------------
const box = document.querySelector("dialog#lightbox");
if (box) {
  const tiles = () => [...document.querySelectorAll(".tile > a")];
  let current = null;
  const put = (name, text) => { box.querySelector(`[data-put=${name}]`).textContent = text || ""; };
  function open(index) {
    const all = tiles();
    if (index < 0 || index >= all.length) return;
    const link = current = all[index], of = document.getElementById(link.dataset.of), stage = box.querySelector(".stagebox");
    const data = { ...of.dataset, ...link.dataset, file: link.getAttribute("href"), key: link.dataset.uri };
    const shown = document.createElement(data.kind === "video" ? "video" : data.kind === "audio" ? "audio" : "img");
    shown.src = data.file;
    if (shown.tagName === "IMG") shown.alt = data.prompt || data.name; else shown.controls = true;
    stage.replaceChildren(shown);
    for (const name of ["prompt", "name", "facts", "key", "sha"]) put(name, data[name]);
    box.querySelector("[data-copy]").dataset.copy = data.uri;
    box.querySelector("[data-task]").href = data.task;
    box.querySelector("[data-download]").href = data.file + "?download=1";
    if (!box.open) box.showModal();
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest(".tile > a");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) { event.preventDefault(); open(tiles().indexOf(link)); }
    if (event.target.closest("[data-close]")) box.close();
    if (event.target.closest("[data-step]")) open(tiles().indexOf(current) + Number(event.target.closest("[data-step]").dataset.step));
  });
  box.addEventListener("close", () => { box.querySelector(".stagebox").replaceChildren(); if (current) current.focus(); });
  document.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target.matches("input, textarea, select, video, audio")) return;
    const all = tiles(), now = all.indexOf(box.open ? current : document.activeElement);
    event.preventDefault();
    if (box.open) open(now + step); else if (all.length) all[Math.max(0, Math.min(all.length - 1, now + step))].focus();
  });
  const picked = document.querySelector(".picked"), ticks = () => [...document.querySelectorAll(".tile input")], chosen = new Set();
  window.restoreTicks = () => { for (const each of ticks()) each.checked = chosen.has(each.value); countTicks(); };
  function countTicks() {
    if (!picked) return;
    const ticked = ticks().filter((each) => each.checked), zip = picked.querySelector("[data-most]");
    picked.querySelector("[data-number]").textContent = ticked.length;
    zip.disabled = ticked.length === 0 || ticked.length > Number(zip.dataset.most);
    picked.querySelector("[data-copy]").dataset.copy = ticked.map((each) => each.parentElement.querySelector("a").dataset.uri).join("\n");
  }
  document.addEventListener("change", (event) => {
    if (!event.target.matches(".tile input")) return;
    event.target.checked ? chosen.add(event.target.value) : chosen.delete(event.target.value);
    countTicks();
  });
  // A browser may keep the ticks of a page that somebody comes back to.
  addEventListener("pageshow", () => { for (const each of ticks()) if (each.checked) chosen.add(each.value); countTicks(); });
}
