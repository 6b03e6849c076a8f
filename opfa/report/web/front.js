// A front as a scatter plot: all models that were judged, even ones, and the front, whose nearest
// point is told with its shape. Which cost is drawn, and on which examples, can be chosen.

const HEIGHT = 360, LEFT = 56, RIGHT = 14, TOP = 12, BOTTOM = 42;
const EXAMPLES = [["fresh", "fresh examples"], ["held_out", "held-out examples"]];
const $ = id => document.getElementById(id);
const plot = $("plot"), svg = plot.querySelector("svg"), { front, whole, even, tried } = DATA;
const state = { cost: 0, value: "fresh", at: front.length >> 1 };

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

// The points of the front from cheap to dear, as the axis has them.
function sorted() { return [...front].sort((a, b) => a.costs[state.cost] - b.costs[state.cost]); }
function line(points) { return points.map((p, i) => `${i ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}`).join(""); }

function draw() {
  const width = svg.clientWidth, { cost, value } = state;
  if (!width) return;
  const isHeld = value === "held_out", points = sorted();
  const x = point => point.costs[cost], y = point => point[value];
  const known = [...points, whole, ...even];
  const [x0, x1] = range([0, ...known.map(x), ...(isHeld ? tried.map(t => t[cost]) : [])]);
  const [y0, y1] = range([...known.map(y), ...(isHeld ? tried.map(t => t.at(-1)) : [])]);
  const px = v => LEFT + (v - x0) / (x1 - x0) * (width - LEFT - RIGHT);
  const py = v => HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP);
  state.px = points.map(p => px(x(p)));
  state.py = points.map(p => py(y(p)));
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.setAttribute("height", HEIGHT);
  const found = [], right = width - RIGHT, bottom = HEIGHT - BOTTOM;
  for (const v of ticks(y0, y1, 7)) {
    found.push(element("line", { class: "grid", x1: LEFT, x2: right, y1: py(v), y2: py(v) }));
    found.push(element("text", { x: LEFT - 7, y: py(v) + 4, "text-anchor": "end" }, number(v)));
  }
  for (const v of ticks(Math.max(0, x0), x1, clamp(width / 80, 2, 10))) found.push(element("text", { x: px(v), y: bottom + 16, "text-anchor": "middle" }, number(v)));
  found.push(element("line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom }));
  found.push(element("text", { x: (LEFT + right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, DATA.costs[cost].label));
  if (isHeld) for (const t of tried) found.push(element("circle", { class: "tried", cx: px(t[cost]), cy: py(t.at(-1)), r: 2.5 }));
  const dots = (all, colour, r) => all.map(p => element("circle", { class: `dot ${colour}`, cx: px(x(p)), cy: py(y(p)), r }));
  const path = (all, colour) => element("path", { class: `series ${colour}`, d: line(all.map(p => [px(x(p)), py(y(p))])) });
  if (even.length) found.push(path(even, "orange"), ...dots(even, "orange", 3.5));
  found.push(path(points, "blue"), ...dots(points, "blue", 4.5), ...dots([whole], "green", 5.5));
  state.mark = element("g");
  svg.replaceChildren(...found, state.mark);
  show();
}

// One row for each layer: a bar for its heads and one for its neurons.
function shapeOf(point) {
  const bars = (num, of, label) => element("span", { class: "units" },
    element("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none" },
      element("path", { class: "track", d: "M0 0H100V8H0Z" }), element("path", { class: "filled", d: `M0 0H${of ? 100 * num / of : 0}V8H0Z` })),
    element("b", {}, number(num)), label);
  const rows = point.layers.map((stays, i) => element("li", {}, element("span", { class: "layer" }, String(i)),
    ...(stays ? [bars(point.heads[i], whole.heads[i], " heads"), bars(point.neurons[i], whole.neurons[i], " neurons")] : [element("span", { class: "units" }, "gone")])));
  return element("ol", { class: "layers" }, ...rows);
}

function show(isSpoken = false) {
  const points = sorted(), point = points[state.at];
  if (!point || !state.mark) return;
  state.mark.replaceChildren(element("circle", { class: "chosen", cx: state.px[state.at], cy: state.py[state.at], r: 8 }));
  const facts = [["point", point.name], [`${DATA.metric}, held out`, number(point.held_out)], [`${DATA.metric}, fresh`, number(point.fresh)],
    ...DATA.costs.map((c, i) => [c.label, `${number(point.costs[i])} (${Math.round(100 * point.costs[i] / whole.costs[i])} %)`]),
    ["milliseconds, measured", number(Number(point.measured.toPrecision(4)))], ...(point.inside ? [["inside", point.inside]] : [])];
  $("shape").replaceChildren(element("dl", { class: "facts" }, ...facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)])), shapeOf(point));
  if (isSpoken) $("said").textContent = facts.map(pair => pair.join(" ")).join(", ");
}

function buttons(place, choices, chosen, choose) {
  place.replaceChildren(...choices.map(([key, label]) => {
    const made = element("button", { type: "button", "aria-pressed": String(key === chosen()) }, label);
    made.onclick = () => { choose(key); for (const other of place.children) other.setAttribute("aria-pressed", String(other === made)); draw(); };
    return made;
  }));
}

svg.addEventListener("pointermove", event => point(event));
svg.addEventListener("pointerdown", event => point(event));
function point(event) {
  const box = svg.getBoundingClientRect(), at = [event.clientX - box.left, event.clientY - box.top];
  const far = state.px.map((x, i) => Math.hypot(x - at[0], state.py[i] - at[1]));
  state.at = far.indexOf(Math.min(...far));
  show();
}
plot.addEventListener("keydown", event => {
  const last = front.length - 1, next = { ArrowLeft: state.at - 1, ArrowRight: state.at + 1, Home: 0, End: last }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  state.at = clamp(next, 0, last);
  show(true);
});
const kinds = [["blue", "front"], ["orange", "even models"], ["green", "the whole model"]].filter(([colour]) => colour !== "orange" || even.length);
$("legend").append(...kinds.map(([colour, label]) => element("span", {}, element("svg", { viewBox: "0 0 18 10" }, element("circle", { class: `dot ${colour}`, cx: 9, cy: 5, r: 4 })), label)));
plot.setAttribute("aria-label", `${DATA.metric} against costs: ${front.length} points. Left and right arrow keys move along the front.`);
buttons($("axes"), DATA.costs.map((cost, i) => [i, cost.label]), () => state.cost, key => { state.cost = key; });
buttons($("values"), EXAMPLES, () => state.value, key => { state.value = key; });
onChange(plot, draw);
