// Matrices as pictures of their zeros: small ones to choose from, and one to look at.

const MOST_SCALE = 28, MARGIN = 16, STRIP = 10; // pixels a weight, and beside the picture
const $ = id => document.getElementById(id);

const matrices = DATA.matrices.map((facts, index) => new Matrix(facts, index));
let colours = [], dead = "", accent = "", line = "";

function readColours() {
  const style = getComputedStyle(document.documentElement), triple = name => style.getPropertyValue(name).trim().split(/\s+/).map(Number);
  const [empty, full] = [triple("--empty"), triple("--full")];
  // By the root of the density, so that 10 % and 12 % can be told apart.
  colours = Array.from({ length: 257 }, (_, i) => {
    const share = Math.sqrt(i / 256), mixed = empty.map((from, k) => Math.round(from + share * (full[k] - from)));
    return (255 << 24 | mixed[2] << 16 | mixed[1] << 8 | mixed[0]) >>> 0;
  });
  [dead, accent, line] = ["--dead", "--accent", "--soft"].map(name => style.getPropertyValue(name).trim());
}

const css = colour => `rgb(${colour & 255} ${colour >> 8 & 255} ${colour >> 16 & 255})`;
const share = (live, size) => `${number(live)} of ${number(size)}, ${(100 * live / size).toFixed(2)}\u00a0%`;

async function drawThumbnails() {
  const size = DATA.thumbnail, maps = await (drawThumbnails.maps ??= inflated("thumbnails"));
  for (const button of document.querySelectorAll(".pick")) {
    const context = button.querySelector("canvas").getContext("2d"), image = context.createImageData(size, size);
    const pixels = new Uint32Array(image.data.buffer), start = button.dataset.matrix * size * size;
    for (let i = 0; i < pixels.length; i++) pixels[i] = colours[Math.ceil(maps[start + i] * 256 / 255)];
    context.putImageData(image, 0, 0);
  }
}

class Viewer {
  constructor() {
    this.canvas = $("picture");
    this.context = this.canvas.getContext("2d");
    this.fingers = new Map();
    this.pointer = null; // [row, column]
    const on = (name, does) => this.canvas.addEventListener(name, does, { passive: false });
    on("pointerdown", event => this.press(event));
    on("pointermove", event => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) on(name, event => this.fingers.delete(event.pointerId));
    on("wheel", event => this.wheel(event));
    on("dblclick", event => this.zoom(3, ...this.offset(event)));
    on("keydown", event => this.key(event));
    $("in").onclick = () => this.zoom(1.6);
    $("out").onclick = () => this.zoom(1 / 1.6);
    $("fit").onclick = () => this.fit();
    $("previous").onclick = () => this.choose(this.matrix.index - 1);
    $("next").onclick = () => this.choose(this.matrix.index + 1);
    $("choice").onchange = event => this.choose(Number(event.target.value));
    onChange(this.canvas.parentElement, () => { readColours(); drawThumbnails(); this.resize(); });
  }

  async choose(index) {
    const matrix = matrices[(index + matrices.length) % matrices.length];
    await matrix.load();
    this.matrix = matrix;
    this.pointer = null;
    $("choice").value = matrix.index;
    const { name, rows, columns, zeros, pattern } = matrix;
    $("about").textContent = `${number(rows)} outputs × ${number(columns)} inputs, ${(100 * zeros / (rows * columns)).toFixed(2)} % zeros, ${pattern}`;
    this.canvas.setAttribute("aria-label", `${name}, ${$("about").textContent}`);
    for (const button of document.querySelectorAll(".pick")) button.setAttribute("aria-pressed", Number(button.dataset.matrix) === matrix.index);
    this.resize();
  }

  resize() {
    if (!this.matrix) return;
    const width = this.canvas.parentElement.clientWidth, { rows, columns } = this.matrix;
    const most = Math.max(260, Math.min(720, innerHeight * 0.6));
    this.least = Math.min((width - MARGIN) / columns, (most - MARGIN) / rows, MOST_SCALE);
    this.width = Math.round(width);
    this.height = Math.round(Math.min(most, Math.max(160, this.least * rows + MARGIN)));
    const dense = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: Math.round(this.width * dense), height: Math.round(this.height * dense) });
    this.canvas.style.height = `${this.height}px`;
    this.fit();
  }

  fit() { this.scale = this.least; this.left = this.top = 0; this.draw(); this.read(); }

  // How many weights fit beside the margin.
  get across() { return (this.width - MARGIN) / this.scale; }
  get down() { return (this.height - MARGIN) / this.scale; }

  zoom(by, x, y) {
    if (x === undefined) [x, y] = this.pointer ? this.place() : [(this.width + MARGIN) / 2, (this.height + MARGIN) / 2];
    const scale = clamp(this.scale * by, this.least, MOST_SCALE);
    this.left += (x - MARGIN) * (1 / this.scale - 1 / scale);
    this.top += (y - MARGIN) * (1 / this.scale - 1 / scale);
    this.scale = scale;
    this.settle();
  }

  settle() {
    this.left = clamp(this.left, 0, Math.max(0, this.matrix.columns - this.across));
    this.top = clamp(this.top, 0, Math.max(0, this.matrix.rows - this.down));
    this.canvas.style.touchAction = this.scale > this.least * 1.01 ? "none" : "pan-y";
    this.draw();
    this.read();
  }

  place() { const [row, column] = this.pointer; return [MARGIN + (column + 0.5 - this.left) * this.scale, MARGIN + (row + 0.5 - this.top) * this.scale]; }
  offset(event) { const box = this.canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; }

  press(event) {
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.fingers.set(event.pointerId, this.offset(event));
    this.aim(event);
  }

  move(event) {
    const before = this.fingers.get(event.pointerId), now = this.offset(event);
    if (!before) return this.aim(event);
    if (this.fingers.size === 2) {
      const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1], gap = point => Math.hypot(point[0] - other[0], point[1] - other[1]);
      this.zoom(gap(now) / Math.max(1, gap(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (this.scale <= this.least) {
      this.aim(event); // there is nothing to move
    } else {
      this.left -= (now[0] - before[0]) / this.scale;
      this.top -= (now[1] - before[1]) / this.scale;
      this.settle();
    }
    this.fingers.set(event.pointerId, now);
  }

  aim(event) {
    if (!this.matrix) return;
    const [x, y] = this.offset(event), row = Math.floor(this.top + (y - MARGIN) / this.scale), column = Math.floor(this.left + (x - MARGIN) / this.scale);
    const isInside = row >= 0 && column >= 0 && row < this.matrix.rows && column < this.matrix.columns;
    if (isInside) { this.pointer = [row, column]; this.draw(); this.read(); }
  }

  wheel(event) {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== this.canvas) return;
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...this.offset(event));
  }

  key(event) {
    if (!this.matrix || event.ctrlKey || event.metaKey || event.altKey) return;
    const { rows, columns } = this.matrix, by = event.shiftKey ? Math.max(1, Math.round(Math.min(this.across, this.down, rows, columns) / 16)) : 1;
    const step = { ArrowLeft: [0, -by], ArrowRight: [0, by], ArrowUp: [-by, 0], ArrowDown: [by, 0], Home: [0, -columns], End: [0, columns], PageUp: [-rows, 0], PageDown: [rows, 0] }[event.key];
    const does = { "+": () => this.zoom(1.6), "=": () => this.zoom(1.6), "-": () => this.zoom(1 / 1.6), 0: () => this.fit(), n: () => $("next").click(), p: () => $("previous").click() }[event.key.toLowerCase()];
    if (!step && !does) return;
    event.preventDefault();
    if (does) return does();
    const [row, column] = this.pointer ?? [Math.floor(this.top), Math.floor(this.left)];
    this.pointer = this.pointer ? [clamp(row + step[0], 0, rows - 1), clamp(column + step[1], 0, columns - 1)] : [row, column];
    this.follow();
    this.read(true);
  }

  follow() {
    const [row, column] = this.pointer;
    if (column < this.left || column + 1 > this.left + this.across) this.left = column + 0.5 - this.across / 2;
    if (row < this.top || row + 1 > this.top + this.down) this.top = row + 0.5 - this.down / 2;
    this.settle();
  }

  // What is under the pointer.
  read(isSpoken = false) {
    const { matrix } = this, list = $("readout");
    if (!this.pointer) {
      list.replaceChildren(element("dt", {}, "pointer"), element("dd", {}, "move it over the picture"));
      return;
    }
    const [row, column] = this.pointer, { rows, columns } = matrix;
    const r = Math.floor(row / EDGE), c = Math.floor(column / EDGE), head = matrix.head(row, column);
    const found = [["row", `${number(row)} of ${number(rows)}`], ["column", `${number(column)} of ${number(columns)}`]];
    if (EDGE === 1) found.push(["weight", matrix.live(r, r + 1, c, c + 1) ? "live" : "zero"]);
    const near = Math.max(8, 2 ** Math.ceil(Math.log2(16 / this.scale)), EDGE);
    const [r0, c0] = [row, column].map(at => Math.floor(at / near) * near), r1 = Math.min(rows, r0 + near), c1 = Math.min(columns, c0 + near);
    const live = matrix.live(Math.floor(r0 / EDGE), Math.ceil(r1 / EDGE), Math.floor(c0 / EDGE), Math.ceil(c1 / EDGE));
    found.push(["live in row", share(matrix.liveInRow[row], columns)], ["live in column", share(matrix.liveInColumn[column], rows)]);
    if (head) found.push([`live in ${head[0]}`, share(head[1], head[2])]);
    found.push([`live in ${r1 - r0} × ${c1 - c0} around`, share(live, (r1 - r0) * (c1 - c0))]);
    list.replaceChildren(...found.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    if (isSpoken) $("spoken").textContent = found.slice(0, 3).map(pair => pair.join(" ")).join(", ");
  }

  draw() {
    const { matrix, context, canvas } = this;
    if (!matrix) return;
    const dense = canvas.width / this.width, margin = Math.round(MARGIN * dense);
    const wide = Math.max(1, Math.min(canvas.width - margin, Math.round((matrix.columns - this.left) * this.scale * dense)));
    const high = Math.max(1, Math.min(canvas.height - margin, Math.round((matrix.rows - this.top) * this.scale * dense)));
    const by = 1 / (this.scale * dense);
    const columns = edges(wide, this.left, by, matrix.columns), rows = edges(high, this.top, by, matrix.rows);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const image = context.createImageData(wide, high), pixels = new Uint32Array(image.data.buffer);
    for (let y = 0, i = 0; y < high; y++) {
      const r0 = rows[2 * y], r1 = rows[2 * y + 1], deep = span(r0, r1, matrix.rows);
      for (let x = 0; x < wide; x++, i++) {
        const c0 = columns[2 * x], c1 = columns[2 * x + 1];
        pixels[i] = colours[Math.ceil(256 * matrix.live(r0, r1, c0, c1) / (deep * span(c0, c1, matrix.columns)))];
      }
    }
    context.putImageData(image, margin, margin);
    this.strips(margin, dense, by, wide, high);
    this.lines(margin, dense, wide, high);
  }

  // Beside the picture how many weights of a row or column live; none is shown in another colour.
  strips(margin, dense, by, wide, high) {
    const { context, matrix } = this, thick = STRIP * dense;
    for (const [lines, size, count, start, isRow] of [[matrix.liveInRow, matrix.columns, high, this.top, true], [matrix.liveInColumn, matrix.rows, wide, this.left, false]]) {
      for (let i = 0; i < count; i++) {
        const from = Math.min(lines.length - 1, Math.floor(start + i * by)), to = Math.max(from + 1, Math.min(lines.length, Math.floor(start + (i + 1) * by)));
        let live = 0, isDead = true;
        for (let at = from; at < to; at++) { live += lines[at]; isDead &&= !lines[at]; }
        context.fillStyle = isDead ? dead : css(colours[Math.ceil(256 * live / (size * (to - from)))]);
        if (isRow) context.fillRect(0, margin + i, thick, 1); else context.fillRect(margin + i, 0, 1, thick);
      }
    }
  }

  lines(margin, dense, wide, high) {
    const { context, matrix } = this, across = column => margin + (column - this.left) * this.scale * dense, down = row => margin + (row - this.top) * this.scale * dense;
    const draw = (x0, y0, x1, y1) => { context.beginPath(); context.moveTo(x0, y0); context.lineTo(x1, y1); context.stroke(); };
    context.save();
    context.beginPath();
    context.rect(margin, margin, wide, high);
    context.clip();
    context.lineWidth = Math.max(1, dense / 2);
    if (matrix.heads) {
      const { axis, groups } = matrix.heads, size = matrix.shape[axis] / groups;
      Object.assign(context, { strokeStyle: line, globalAlpha: 0.55 });
      for (let group = 1; group < groups; group++) {
        if (axis) draw(across(group * size), margin, across(group * size), margin + high); else draw(margin, down(group * size), margin + wide, down(group * size));
      }
    }
    if (this.pointer) {
      const [row, column] = this.pointer, half = this.scale * dense / 2, x = across(column) + half, y = down(row) + half;
      Object.assign(context, { strokeStyle: accent, globalAlpha: 0.9, lineWidth: Math.max(1, dense) });
      const gap = Math.max(5 * dense, half);
      draw(margin, y, x - gap, y); draw(x + gap, y, margin + wide, y); draw(x, margin, x, y - gap); draw(x, y + gap, x, margin + high);
      context.lineWidth = 2 * dense;
      context.strokeRect(x - gap, y - gap, 2 * gap, 2 * gap);
    }
    context.restore();
  }
}

// For each pixel the first tile, and the one after the last.
function edges(count, start, by, extent) {
  const most = Math.ceil(extent / EDGE), found = new Int32Array(2 * count);
  for (let i = 0; i < count; i++) {
    const from = clamp(Math.floor((start + i * by) / EDGE), 0, most - 1);
    found[2 * i] = from;
    found[2 * i + 1] = clamp(Math.floor((start + (i + 1) * by) / EDGE), from + 1, most);
  }
  return found;
}

const span = (from, to, extent) => Math.min(extent, to * EDGE) - from * EDGE;

// Arrow keys go through the small pictures; one of them is in the order of Tab.
function roving(buttons) {
  const cells = [...buttons].map(button => [button, button.closest("tr").rowIndex, button.closest("td").cellIndex]);
  const focus = button => { for (const each of buttons) each.tabIndex = each === button ? 0 : -1; button.focus(); };
  for (const button of buttons) {
    button.tabIndex = button === buttons[0] ? 0 : -1;
    button.onclick = async () => {
      await viewer.choose(Number(button.dataset.matrix));
      $("picture").scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    };
    button.onkeydown = event => {
      const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!way) return;
      event.preventDefault();
      const i = cells.findIndex(([each]) => each === button), [, row, column] = cells[i];
      const next = way[0]
        ? cells.filter(([, r]) => Math.sign(r - row) === way[0]).sort((a, b) => Math.abs(a[1] - row) - Math.abs(b[1] - row) || Math.abs(a[2] - column) - Math.abs(b[2] - column))[0]
        : cells[i + way[1]];
      if (next) focus(next[0]);
    };
  }
}

let viewer;
if (matrices.length) {
  readColours();
  viewer = new Viewer();
  roving(document.querySelectorAll(".pick"));
  const scale = $("scale").getContext("2d");
  const paint = () => { for (let x = 0; x < 120; x++) { scale.fillStyle = css(colours[Math.round(256 * x / 119)]); scale.fillRect(x, 0, 1, 10); } };
  onChange($("scale"), paint);
  drawThumbnails();
  viewer.choose(0);
}
