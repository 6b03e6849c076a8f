"use strict";
// What both kinds of pages need: the data, elements, numbers, and a redraw when size or colours change.

const DATA = JSON.parse(document.getElementById("data").textContent);

function element(name, attributes = {}, ...children) {
  const isSvg = SVG_NAMES.has(name);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const SVG_NAMES = new Set(["svg", "path", "line", "circle", "g", "text"]);

// 1234567 as 1,234,567; 0.00012345 as 1.234e-4; four digits that count.
function number(value) {
  if (value === null || value === undefined) return "none";
  if (value === 0) return "0";
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-3) return String(Number(value.toPrecision(4)).toExponential()).replace("e+", "e");
  return Number(value.toPrecision(size >= 1000 ? 6 : 4)).toLocaleString("en-US", { maximumFractionDigits: 8 });
}

function onChange(target, draw) {
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(target);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
