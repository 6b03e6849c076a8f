// One matrix: its mask is unpacked when it is shown first. Sums over all rectangles that begin at its
// corner then give the live weights of any rectangle in four reads.

const EDGE = DATA.edge;

async function inflated(name) {
  const text = atob(document.querySelector(`[data-blob="${name}"]`).textContent);
  const bytes = Uint8Array.from(text, letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

class Matrix {
  constructor(facts, index) { Object.assign(this, facts, { index }); [this.rows, this.columns] = this.shape; }

  async load() {
    this.loading ??= inflated(this.index).then(bytes => this.unpack(bytes));
    return this.loading;
  }

  unpack(bytes) {
    const { rows, columns } = this, counts = new Uint32Array(bytes.slice(0, 4 * (rows + columns)).buffer);
    [this.liveInRow, this.liveInColumn] = [counts.subarray(0, rows), counts.subarray(rows)];
    const cells = bytes.subarray(4 * (rows + columns));
    const high = this.high = Math.ceil(rows / EDGE), wide = this.wide = Math.ceil(columns / EDGE);
    const sums = this.sums = new Uint32Array((high + 1) * (wide + 1));
    for (let r = 0, i = 0; r < high; r++) {
      let line = 0;
      for (let c = 0, at = (r + 1) * (wide + 1) + 1; c < wide; c++, i++, at++) {
        line += EDGE === 1 ? cells[i >> 3] >> (7 - (i & 7)) & 1 : cells[2 * i] | cells[2 * i + 1] << 8;
        sums[at] = sums[at - wide - 1] + line;
      }
    }
  }

  // Live weights of tiles [r0, r1) x [c0, c1).
  live(r0, r1, c0, c1) {
    const { sums, wide } = this, a = r0 * (wide + 1), b = r1 * (wide + 1);
    return sums[b + c1] - sums[b + c0] - sums[a + c1] + sums[a + c0];
  }

  // The head that a weight belongs to: [name, live weights, all weights]; null where there are none.
  head(row, column) {
    if (!this.heads) return null;
    const { axis, groups, count } = this.heads, size = this.shape[axis] / groups;
    const group = Math.floor((axis ? column : row) / size), lines = axis ? this.liveInColumn : this.liveInRow;
    const live = lines.slice(group * size, (group + 1) * size).reduce((sum, n) => sum + n, 0);
    const part = groups > count ? `${["query", "key", "value"][Math.floor(group / count)]} ` : "";
    return [`${part}head ${group % count}`, live, size * this.shape[1 - axis]];
  }
}
