// Line charts with one cursor for all that have the same x axis. Each is drawn as SVG by its width;
// the pointer and the keyboard move the cursor from one logged step to the next. On a page with the
// buttons of zooming all of them show the same part of that axis, and its values from top to bottom.

const HEIGHT = 232, LEFT = 62, RIGHT = 12, TOP = 10, BOTTOM = 40, FEW = 40, EDGE = 6, FASTER = 1.6;

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found.map(value => Number(value.toPrecision(12)));
}

const $ = id => document.getElementById(id);

function range(values, hasZero) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  if (hasZero) low = Math.min(0, low);
  if (low === high) { const by = Math.abs(low) / 10 || 1; low -= hasZero ? 0 : by; high += by; }
  const room = (high - low) * 0.06;
  return [hasZero && low === 0 ? 0 : low - room, high + room];
}

// The index of the last x at or before this one; -1 where there is none. x is sorted.
function before(x, at) {
  let low = 0, high = x.length;
  while (low < high) { const middle = (low + high) >> 1; if (x[middle] <= at) low = middle + 1; else high = middle; }
  return low - 1;
}

// What a curve says of a place, or null: between corners on the line, else what was logged there.
function valueAt(curve, at) {
  const i = before(curve.x, at);
  if (i < 0) return null;
  if (curve.x[i] === at || curve.how === "steps") return curve.y[i];
  if (curve.how !== "exact" || i + 1 >= curve.x.length) return null;
  if (curve.y[i] === null || curve.y[i + 1] === null) return null;
  const share = (at - curve.x[i]) / (curve.x[i + 1] - curve.x[i]);
  return curve.y[i] + share * (curve.y[i + 1] - curve.y[i]);
}

// The values of a curve in a part of the axis, with those of its line at both ends.
function between(curve, low, high) {
  const inside = curve.y.filter((_, i) => low <= curve.x[i] && curve.x[i] <= high);
  const line = { ...curve, how: curve.how === "steps" ? "steps" : "exact" };
  return [...inside, valueAt(line, low), valueAt(line, high)];
}

class Chart {
  constructor(data, all) {
    this.data = data;
    this.all = all;
    this.places = [...new Set(data.curves.flatMap(curve => curve.x))].sort((a, b) => a - b);
    this.isExact = data.curves.some(curve => curve.how === "exact");
    this.svg = element("svg", { "aria-hidden": "true" });
    this.where = element("span", { class: "where" });
    this.said = element("span", { class: "hidden", "aria-live": "polite" });
    const title = data.unit ? `${data.title}, ${data.unit}` : data.title;
    this.figure = element("figure", {
      class: "chart", tabindex: "0", role: "group", "aria-roledescription": "line chart",
      "aria-label": `${title}. ${this.summary()} Left and right arrow keys move through it.${$("fit") ? " Plus and minus zoom, 0 shows all." : ""}`,
    }, element("div", { class: "heading" }, element("h3", {}, title), this.where), this.legend(), this.svg, this.said);
    this.svg.addEventListener("pointermove", event => this.move(event));
    this.svg.addEventListener("pointerdown", event => this.press(event));
    for (const name of ["pointerup", "pointercancel"]) this.svg.addEventListener(name, () => { this.dragged = null; });
    this.svg.addEventListener("wheel", event => this.wheel(event), { passive: false });
    this.svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") this.share(null); });
    this.figure.addEventListener("keydown", event => this.key(event));
    this.figure.addEventListener("blur", () => this.share(null));
    this.figure.addEventListener("focus", () => { if (this.figure.matches(":focus-visible")) this.share(this.at ?? this.places.at(-1), true); });
    this.at = null;
  }

  summary() {
    const ends = this.data.curves.map(c => `${c.name}: ${number(c.y[0])} at the beginning, ${number(c.y.at(-1))} at the end`);
    return `${ends.join("; ")}.`;
  }

  legend() {
    const items = this.data.curves.map(curve => {
      const line = this.isDotted(curve)
        ? element("circle", { class: `dot ${curve.colour}`, cx: 9, cy: 5, r: 4 })
        : element("path", { class: `series ${curve.how} ${curve.colour}`, d: "M0 5H18" });
      return element("span", {}, element("svg", { viewBox: "0 0 18 10" }, line), curve.name, element("b"));
    });
    this.told = items.map(item => item.lastChild);
    return element("div", { class: "legend", "aria-hidden": "true" }, ...items);
  }

  isDotted(curve) { return curve.how === "points"; }
  hasDots(curve) { return curve.x.length <= FEW && curve.how !== "steps" && curve.how !== "exact"; }

  draw() {
    const width = this.width = this.svg.clientWidth, { curves } = this.data;
    if (!width) return;
    const scaled = this.data.has_log_x ? Math.log : value => value;
    const places = this.all.places[this.data.x_label]; // the same axis for all of them
    const [x0, x1] = this.data.has_log_x || places.length === 1
      ? range(places.map(scaled), false) : this.view;
    const all = curves.flatMap(curve => curve.y), shown = this.all.view ? curves.flatMap(curve => between(curve, x0, x1)) : all;
    const [y0, y1] = range(shown.some(value => value !== null) ? shown : all, this.data.has_zero);
    this.step = place => x0 + (place - LEFT) / (width - LEFT - RIGHT) * (x1 - x0);
    this.x = value => LEFT + (scaled(value) - x0) / (x1 - x0) * (width - LEFT - RIGHT);
    this.y = value => HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("height", HEIGHT);
    this.marks = element("g");
    const box = { x: LEFT - EDGE, y: 0, width: width - LEFT - RIGHT + 2 * EDGE, height: HEIGHT - BOTTOM + EDGE };
    const plot = element("svg", { ...box, viewBox: Object.values(box).join(" ") }); // cuts what is outside
    plot.append(...curves.flatMap(curve => this.drawn(curve)), this.marks);
    this.svg.replaceChildren(...this.axes(x0, x1, y0, y1), plot);
    this.show(this.at);
  }

  get whole() { const places = this.all.places[this.data.x_label]; return [places[0], places.at(-1)]; }
  get view() { return this.all.view ?? this.whole; }

  // Zoom around a place of the axis: by default around the cursor, else the middle.
  zoom(by, at) {
    const [low, high] = this.view, [first, last] = this.whole, gaps = this.all.places[this.data.x_label].length - 1;
    at ??= this.at !== null && low <= this.at && this.at <= high ? this.at : (low + high) / 2;
    const span = clamp((high - low) / by, (last - first) * Math.min(1, 2 / gaps), last - first);
    this.look(at - (at - low) * span / (high - low), span);
  }

  // Show so much of the axis from a place on, in all charts.
  look(from, span) {
    if (!$("fit") || this.whole[0] === this.whole[1]) return;
    const [first, last] = this.whole, low = clamp(from, first, last - span), isAll = span >= last - first;
    this.all.view = isAll ? null : [low, low + span];
    for (const chart of this.all) chart.draw();
    $("shown").textContent = isAll ? "" : `${this.data.x_label}s ${number(Math.ceil(low - 1e-9))} to ${number(Math.floor(low + span + 1e-9))}`;
  }

  axes(x0, x1, y0, y1) {
    const right = this.width - RIGHT, bottom = HEIGHT - BOTTOM, found = [];
    const values = ticks(y0, y1, 7), isSmall = Math.max(...values.map(Math.abs)) < 0.01;
    const label = value => isSmall && value ? value.toExponential() : number(value);
    for (const value of values) {
      const y = this.y(value);
      found.push(element("line", { class: "grid", x1: LEFT, x2: right, y1: y, y2: y }));
      found.push(element("text", { x: LEFT - 7, y: y + 4, "text-anchor": "end" }, label(value)));
    }
    const whole = value => Number.isInteger(value) || this.data.x_label !== "step";
    const places = this.data.has_log_x ? this.places : ticks(x0, x1, clamp(this.width / 80, 2, 10)).filter(whole);
    for (const value of places) {
      found.push(element("text", { x: this.x(value), y: bottom + 16, "text-anchor": "middle" }, number(value)));
    }
    found.push(element("line", { class: "axis", x1: LEFT, x2: right, y1: bottom, y2: bottom }));
    found.push(element("text", { x: (LEFT + right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, this.data.x_label));
    return found;
  }

  drawn(curve) {
    const points = [];
    curve.x.forEach((x, i) => { if (curve.y[i] !== null) points.push([this.x(x).toFixed(1), this.y(curve.y[i]).toFixed(1)]); });
    const found = [];
    if (!this.isDotted(curve) && points.length > 1) {
      const next = curve.how === "steps" ? ([x, y]) => `H${x}V${y}` : ([x, y]) => `L${x} ${y}`;
      found.push(element("path", { class: `series ${curve.how} ${curve.colour}`, d: `M${points[0].join(" ")}${points.slice(1).map(next).join("")}` }));
    }
    if (this.isDotted(curve) || this.hasDots(curve)) {
      const r = points.length > FEW ? 2 : curve.how === "points" ? 4.5 : 3.5;
      for (const [cx, cy] of points) found.push(element("circle", { class: `dot ${curve.colour}`, cx, cy, r }));
    }
    return found;
  }

  press(event) {
    if (this.all.view) {
      this.svg.setPointerCapture(event.pointerId);
      this.dragged = { x: event.clientX, from: this.view[0] };
    }
    this.point(event);
  }

  move(event) {
    if (!this.dragged) return this.point(event);
    const [low, high] = this.view, { x, from } = this.dragged;
    this.look(from - (event.clientX - x) / (this.width - LEFT - RIGHT) * (high - low), high - low);
  }

  wheel(event) {
    if (!$("fit") || !this.x || (!event.ctrlKey && !event.metaKey && document.activeElement !== this.figure)) return;
    event.preventDefault();
    const place = event.clientX - this.svg.getBoundingClientRect().left;
    this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), clamp(this.step(place), ...this.view));
  }

  point(event) {
    if (!this.x) return;
    const place = event.clientX - this.svg.getBoundingClientRect().left, { length } = this.places;
    if (this.isExact) return this.share(clamp(Math.round(this.step(place)), this.places[0], this.places[length - 1]));
    let best = 0;
    for (let i = 1; i < length; i++) if (Math.abs(this.x(this.places[i]) - place) < Math.abs(this.x(this.places[best]) - place)) best = i;
    this.share(this.places[best]);
  }

  // The logged step of this chart that is nearest to a step of another one.
  nearest(at) {
    const i = before(this.places, at), [low, high] = [this.places[Math.max(0, i)], this.places[Math.min(i + 1, this.places.length - 1)]];
    return this.isExact ? at : at - low <= high - at ? low : high;
  }

  key(event) {
    const places = this.isExact ? this.all.places[this.data.x_label] : this.places, last = places.length - 1;
    const i = this.at === null ? last + 1 : before(places, this.at);
    const far = Math.max(1, Math.round(last / 20));
    const next = { ArrowLeft: i - 1, ArrowRight: i + 1, PageUp: i - far, PageDown: i + far, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.share(null);
    const by = { "+": FASTER, "=": FASTER, "-": 1 / FASTER, 0: 0 }[event.key];
    if (by !== undefined && !event.ctrlKey && !event.metaKey) return this.zoom(by);
    if (next === undefined) return;
    event.preventDefault();
    const place = places[clamp(next, 0, last)], [low, high] = this.view;
    if (this.all.view && (place < low || place > high)) this.look(place - (high - low) / 2, high - low);
    this.share(place, true);
  }

  share(at, isSpoken = false) {
    for (const chart of this.all) if (chart.data.x_label === this.data.x_label) chart.show(at, isSpoken && chart === this);
  }

  show(at, isSpoken = false) {
    at = this.at = at === null ? null : this.nearest(at);
    this.marks?.replaceChildren();
    this.where.textContent = "";
    for (const told of this.told) told.textContent = "";
    const values = at === null ? [] : this.data.curves.map(curve => [curve, valueAt(curve, at)]).filter(([, value]) => value !== null);
    if (at === null || !this.x || at < this.places[0] || at > this.places.at(-1)) return;
    const x = this.x(at);
    this.marks.append(element("line", { class: "cross", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    for (const [curve, value] of values) this.marks.append(element("circle", { class: `dot ${curve.colour}`, cx: x, cy: this.y(value), r: 4.5 }));
    for (const [curve, value] of values) this.told[this.data.curves.indexOf(curve)].textContent = number(value);
    this.where.textContent = `${this.data.x_label} ${number(at)}`;
    if (isSpoken) this.said.textContent = `${this.data.x_label} ${number(at)}: ${values.map(([c, v]) => `${c.name} ${number(v)}`).join(", ")}`;
  }
}

const charts = [];
charts.places = {}; // by x axis, of all charts together
charts.view = null; // the part of the x axis that is shown; null for all of it
for (const data of DATA.charts) {
  const chart = new Chart(data, charts);
  charts.push(chart);
  document.querySelector(".charts").append(chart.figure);
  onChange(chart.figure, () => chart.draw());
}
for (const { data, places } of charts) {
  const known = charts.places[data.x_label] ?? [];
  charts.places[data.x_label] = [...new Set([...known, ...places])].sort((a, b) => a - b);
}
if ($("fit")) {
  $("in").onclick = () => charts[0].zoom(FASTER);
  $("out").onclick = () => charts[0].zoom(1 / FASTER);
  $("fit").onclick = () => charts[0].zoom(0);
}
