// Checks of a page as a browser has it. Each returns what is wrong, at most a few.

function luminance(color) {
  const parts = color.slice(0, 3).map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}

function behind(element) {
  for (let each = element; each; each = each.parentElement) {
    const color = getComputedStyle(each).backgroundColor.match(/[\d.]+/g).map(Number);
    if (color[3] !== 0) return color;
  }
  return [255, 255, 255];
}

// WCAG 1.4.3, level AA: text has 4.5 times the contrast of what it stands on, large text 3 times.
function poorContrast() {
  const poor = [];
  for (const each of document.querySelectorAll("body *")) {
    const hasText = [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!hasText || !each.getClientRects().length || each.closest(".says, .hidden, dialog, :disabled")) continue;
    const style = getComputedStyle(each);
    const pair = [style.color.match(/[\d.]+/g).map(Number), behind(each)].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) poor.push(`${each.outerHTML.slice(0, 60)} ${ratio.toFixed(2)}`);
  }
  return poor.slice(0, 5);
}

// WCAG 4.1.2, 1.1.1, 1.3.1, 2.4.2: names of what can be used, words for pictures, ids that are one, headings, titles.
function nameless() {
  const show = (elements) => elements.map((each) => each.outerHTML.slice(0, 90));
  const all = (css) => [...document.querySelectorAll(css)];
  const named = (each) => each.type === "hidden" || each.getAttribute("aria-label") || each.textContent.trim() ||
    (each.labels && each.labels.length) || each.title || each.querySelector("img[alt]");
  const ids = all("[id]").map((each) => each.id);
  return [
    ...show(all("a, button, input, select, textarea, summary").filter((each) => !named(each))),
    ...show(all("img:not([alt]), svg[role=img]:not([aria-label]), section:not([aria-labelledby]):not([role]):not(.panel)")),
    ...show(all("[aria-labelledby]").filter((each) => !document.getElementById(each.getAttribute("aria-labelledby")))),
    ...ids.filter((id, place) => ids.indexOf(id) !== place),
    ...(all("h1").length === 1 ? [] : ["not one h1"]),
    ...(document.title ? [] : ["no title"]),
  ].slice(0, 5);
}

// Elements beyond the window. A table scrolls.
function beyond() {
  return [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility() && each.getClientRects().length
    && !each.closest(".table, .hidden, .skip") && each.getBoundingClientRect().right > innerWidth + 1)
    .map((each) => each.outerHTML.slice(0, 80)).slice(0, 3);
}

// Fields and buttons that stick out of what is around them, and so cover the next one. A table scrolls.
function spilling() {
  return [...document.querySelectorAll("input, select, textarea, button, .button")].filter((each) => {
    if (!each.checkVisibility() || !each.getClientRects().length || each.closest(".table, .hidden, .skip")) return false;
    let box = each.parentElement;
    while (getComputedStyle(box).display === "contents") box = box.parentElement;
    const own = each.getBoundingClientRect(), around = box.getBoundingClientRect();
    return own.right > around.right + 1 || own.left < around.left - 1;
  }).map((each) => `spills: ${each.outerHTML.slice(0, 80)}`).slice(0, 3);
}

// A page is not wider than the window, and the menu is whole. On a phone it is one row.
function brokenLayout() {
  const menu = document.querySelector(".rail");
  return [
    ...spilling(),
    ...(document.documentElement.scrollWidth > innerWidth ? ["the page is wider than the window"] : []),
    ...(menu.scrollWidth > menu.clientWidth ? ["the menu is cut"] : []),
    ...(innerWidth < 400 && menu.getBoundingClientRect().height >= 60 ? ["the menu has two rows"] : []),
  ];
}
