/* The work of each step, for one level of instructions: this file is compiled once for each.
 *
 * OPFA_LEVEL names the level, and VB is the bytes of a vector. All loops are C on the compiler's
 * vectors; the few intrinsics are in vectors.h and products.h.
 */
#include "training.h"

#define TILE OPFA_TILE
#define GROUP OPFA_GROUP
#define PANEL OPFA_PANEL

typedef struct {
  float *data; /* [channels][width] */
  int width;
} tile_of;

INLINE tile_of at(const opfa_work *w, int buffer, int tile) {
  const opfa_buffer *b = w->program->buffers + buffer;
  const int left = w->padded - tile * TILE;
  float *data = w->call->workspace + b->offset * w->padded + (size_t)tile * TILE * b->channels;
  return (tile_of){data, left < TILE ? left : TILE};
}

/* The same, from the first token of an item that is a group of tokens. */
INLINE tile_of group_at(const opfa_work *w, int buffer, int64_t item) {
  const tile_of whole = at(w, buffer, (int)(item * GROUP / TILE));
  return (tile_of){whole.data + item * GROUP % TILE, whole.width};
}

static void narrow(const opfa_work *w, const opfa_step *s, int64_t item) {
  const int tile = (int)(item / OPFA_PARTS), part = (int)(item % OPFA_PARTS);
  const int first = s->channels * part / OPFA_PARTS & ~3; /* AMX holds four together */
  const int end = part + 1 == OPFA_PARTS ? s->channels : s->channels * (part + 1) / OPFA_PARTS & ~3;
  const tile_of in = at(w, s->in, tile);
  narrow_rows(s, s->channels, first, end, in.width, in.data + (size_t)first * in.width,
              (char *)at(w, s->out, tile).data);
}

static void multiply(const opfa_matrix *m, int block, int rows, int width, const float *x,
                     float *y) {
#ifdef __AMX_TILE__
  if (m->masks) {
    masked(m, block, rows, width, (const char *)x, y);
    return;
  }
#endif
#define SPARSE(D, W) \
  case (D) * 256 + (W): sparse(D, W, m, block, (const char *)x, y); return;
  switch (m->block ? m->dtype * 256 + width : 0) {
    SPARSE(OPFA_FP32, 16)
    SPARSE(OPFA_FP32, 32)
    SPARSE(OPFA_FP32, 48)
    SPARSE(OPFA_FP32, 64)
#ifndef __AMX_TILE__
    SPARSE(OPFA_BF16, 32) SPARSE(OPFA_BF16, 64) SPARSE(OPFA_INT8, 32) SPARSE(OPFA_INT8, 64)
#endif
  }
  const int row = block * OPFA_DENSE_BLOCK;
  for (int r = 0; r < rows; r += PANEL)
    product(rows - r < PANEL ? rows - r : PANEL, width, m->columns,
            (const float *)m->values + (size_t)(row + r) * m->columns, PANEL, 1, x, width,
            y + r * width, width);
}

static void activate(int activation, int64_t size, float *y) {
#define ACTIVATION(A)                                      \
  case A:                                                  \
    for (int64_t i = 0; i < size; i += GROUP)              \
      UNROLL for (int j = 0; j < GROUP; j += LANES)        \
          store(y + i + j, activated(A, load(y + i + j))); \
    break;
  switch (activation) {
    ACTIVATION(OPFA_GELU)
    ACTIVATION(OPFA_GELU_TANH) ACTIVATION(OPFA_RELU) ACTIVATION(OPFA_SILU) ACTIVATION(OPFA_TANH)
  }
}

/* out = activation(matrix * in + bias + residual), or the narrow form of that. */
static void linear(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_matrix *m = s->matrix;
  const int height = opfa_height(m), blocks = opfa_blocks(m);
  /* Tile by tile, so that a thread keeps its tokens. */
  const int tile = (int)(item / blocks), block = (int)(item % blocks), row = block * height;
  const int rows = m->rows - row < height ? m->rows - row : height;
  const tile_of in = at(w, s->in, tile), out = at(w, s->out, tile);
  const int width = out.width;
  const float *z = s->residual < 0 ? NULL : at(w, s->residual, tile).data + (size_t)row * width;
  float scratch[256 * TILE] __attribute__((aligned(64)));
  const int is_int8 = m->dtype == OPFA_INT8;
  float *y = s->form == OPFA_FP32 ? out.data + (size_t)(s->first[0] + row) * width : scratch;
  float *sums = is_int8 || m->masks ? scratch : y; /* int32; or whole groups of rows */
  if (is_int8) {
    memset(sums, 0, sizeof(float) * rows * width);
    multiply(m, block, rows, width, in.data, sums);
  }
  for (int r = 0; r < rows; r++) {
    const float bias = m->bias ? m->bias[row + r] : 0, scale = m->scales ? m->scales[row + r] : 0;
    for (int i = r * width; i < (r + 1) * width; i += LANES) {
      const vec sum = bias + (z ? load(z + i) : all(0));
      if (is_int8)
        store(y + i, sum + scale * __builtin_convertvector(*(const loose_ints *)(sums + i), vec));
      else
        store(sums + i, sum);
    }
  }
  if (!is_int8) {
    multiply(m, block, rows, width, in.data, sums);
    if (sums != y) memcpy(y, sums, sizeof(float) * rows * width);
  }
  activate(s->activation, (int64_t)rows * width, y);
  if (s->form != OPFA_FP32) narrow_rows(s, m->rows, row, row + rows, width, y, (char *)out.data);
}

/* out = (in - mean) / sqrt(variance + epsilon) * weight + bias over the channels of a tile: of 16
 * tokens at a time, lines 256 bytes apart would displace each other in L1. */
INLINE void norm_of(const opfa_step *s, int vectors, tile_of in, tile_of out) {
  const float channels = (float)s->channels;
  vec means[TILE / LANES] = {0}, scales[TILE / LANES] = {0};
  const float *x = in.data;
  for (int c = 0; c < s->channels; c++, x += in.width)
    UNROLL for (int i = 0; i < vectors; i++) means[i] += load(x + i * LANES);
  UNROLL for (int i = 0; i < vectors; i++) means[i] /= channels;
  x = in.data;
  for (int c = 0; c < s->channels; c++, x += in.width) UNROLL for (int i = 0; i < vectors; i++) {
      const vec d = load(x + i * LANES) - means[i];
      scales[i] += d * d;
    }
  UNROLL for (int i = 0; i < vectors; i++) scales[i] =
      1.0f / root(scales[i] / channels + s->epsilon);
  x = in.data;
  float *y = out.data;
  for (int c = 0; c < s->channels; c++, x += in.width, y += in.width) {
    const float weight = s->weight[c], bias = s->bias ? s->bias[c] : 0.0f;
    UNROLL for (int i = 0; i < vectors; i++)
        store(y + i * LANES, (load(x + i * LANES) - means[i]) * (scales[i] * weight) + bias);
  }
}

static void norm(const opfa_work *w, const opfa_step *s, int64_t item) {
  const tile_of in = at(w, s->in, (int)item), out = at(w, s->out, (int)item);
  switch (in.width / GROUP) {
    case 1: norm_of(s, GROUP / LANES, in, out); break;
    case 2: norm_of(s, 2 * GROUP / LANES, in, out); break;
    case 3: norm_of(s, 3 * GROUP / LANES, in, out); break;
    case 4: norm_of(s, 4 * GROUP / LANES, in, out); break;
  }
}

/* Sums of up to three rows of channels for GROUP tokens, brought to [channel][token]. */
static void gather(const float *const (*rows)[OPFA_TABLES], int tables, int channels, tile_of out) {
  float *y = out.data;
  for (int t = 0; t < GROUP; t += LANES, y += LANES) {
    int c = 0;
    for (; c + LANES <= channels; c += LANES) {
      vec block[LANES];
      UNROLL for (int i = 0; i < LANES; i++) {
        block[i] = load(rows[t + i][0] + c);
        for (int n = 1; n < tables; n++) block[i] += load(rows[t + i][n] + c);
      }
      transpose(block);
      UNROLL for (int i = 0; i < LANES; i++) store(y + (size_t)(c + i) * out.width, block[i]);
    }
    for (; c < channels; c++)
      for (int i = 0; i < LANES; i++) {
        float sum = 0;
        for (int n = 0; n < tables; n++) sum += rows[t + i][n][c];
        y[(size_t)c * out.width + i] = sum;
      }
  }
}

/* Embeddings, or rows of the caller's input. Tokens that only fill the group repeat the last. */
static void enter(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_call *call = w->call;
  const float *rows[GROUP][OPFA_TABLES];
  int tables = 0;
  for (int t = 0; t < GROUP; t++) {
    const int64_t wanted = item * GROUP + t,
                  token = wanted < call->tokens ? wanted : call->tokens - 1;
    tables = 0;
    if (s->kind == OPFA_LOAD)
      rows[t][tables++] =
          call->input + (call->rows ? call->rows[token] : token) * (int64_t)s->channels;
    else
      for (int i = 0; i < OPFA_TABLES && s->tables[i]; i++)
        rows[t][tables++] = s->tables[i] + (int64_t)call->ids[i][token] * s->channels;
  }
  gather(rows, tables, s->channels, group_at(w, s->out, item));
}

/* [channel][token] to the rows of the caller's output. */
static void leave(const opfa_work *w, const opfa_step *s, int64_t item) {
  const tile_of in = group_at(w, s->in, item);
  for (int t = 0; t < GROUP; t += LANES) {
    const float *x = in.data + t;
    float *rows[LANES];
    int tokens = 0;
    for (int64_t token = item * GROUP + t; tokens < LANES && token < w->call->tokens;
         tokens++, token++)
      rows[tokens] = w->call->output + (w->call->rows ? w->call->rows[token] : token) * s->channels;
    int c = 0;
    for (; c + LANES <= s->channels; c += LANES) {
      vec block[LANES];
      UNROLL for (int i = 0; i < LANES; i++) block[i] = load(x + (size_t)(c + i) * in.width);
      transpose(block);
      UNROLL for (int i = 0; i < LANES; i++) if (i < tokens) store(rows[i] + c, block[i]);
    }
    for (; c < s->channels; c++)
      for (int i = 0; i < tokens; i++) rows[i][c] = x[(size_t)c * in.width + i];
  }
}

/* Queries of one sequence in one tile against its keys, tile by tile; softmax as it goes
 * (Milakov and Gimelshein, 2018). Lanes beyond the queries are computed and not stored. */
static void attention(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_queries q = w->queries[item / s->heads];
  const int head = (int)(item % s->heads), size = s->channels / s->heads, first = head * size;
  const int lanes = (q.count + GROUP - 1) / GROUP * GROUP;
  float scores[TILE * TILE] __attribute__((aligned(64)));
  float sums[OPFA_MOST_HEAD * TILE] __attribute__((aligned(64)));
  float block[OPFA_MOST_HEAD * TILE] __attribute__((aligned(64)));
  float most[TILE], total[TILE];
  const tile_of mine = at(w, s->in, q.tile);
  for (int c = 0; c < size; c++) { /* whole vectors of queries, also at the end of the buffer */
    const float *from = mine.data + (size_t)(s->first[0] + first + c) * mine.width + q.lane;
    for (int i = 0; i < lanes; i++) block[c * TILE + i] = i < q.count ? from[i] * s->scale : 0;
  }
  memset(sums, 0, sizeof(float) * size * TILE);
  for (int i = 0; i < lanes; i += LANES) store(most + i, all(-INFINITY)), store(total + i, all(0));

  const int token = q.tile * TILE + q.lane; /* the first query */
  int from = w->call->starts[q.sequence], to = w->call->starts[q.sequence + 1];
  if (s->window) {
    if (from < token - s->window) from = token - s->window;
    if (to > token + q.count + s->window) to = token + q.count + s->window;
  }
  while (from < to) {
    const tile_of keys = at(w, s->in, from / TILE);
    const int lane = from % TILE, count = to - from < TILE - lane ? to - from : TILE - lane;
    const float *k = keys.data + (size_t)(s->first[1] + first) * keys.width + lane;
    const float *v = keys.data + (size_t)(s->first[2] + first) * keys.width + lane;
    memset(scores, 0, sizeof(float) * count * TILE);
    product(count, lanes, size, k, keys.width, 1, block, TILE, scores, TILE);
    for (int i = 0; i < lanes; i += LANES) {
      vec best = load(most + i);
      if (s->window) {
        ints far;
        for (int l = 0; l < LANES; l++) far[l] = token + i + l - from;
        for (int n = 0; n < count; n++, far -= 1) {
          const ints is_far = (far > s->window) | (far < -s->window);
          store(scores + n * TILE + i, choose(is_far, all(-INFINITY), load(scores + n * TILE + i)));
        }
      }
      for (int n = 0; n < count; n++) best = larger(best, load(scores + n * TILE + i));
      const vec finite = larger(best, all(-3e38f)); /* all keys may be beyond the window so far */
      const vec shrink = exponential(load(most + i) - finite);
      vec sum = load(total + i) * shrink;
      for (int n = 0; n < count; n++) {
        const vec p = exponential(load(scores + n * TILE + i) - finite);
        store(scores + n * TILE + i, p);
        sum += p;
      }
      for (int c = 0; c < size; c++) store(sums + c * TILE + i, load(sums + c * TILE + i) * shrink);
      store(most + i, best), store(total + i, sum);
    }
    product(size, lanes, count, v, 1, keys.width, scores, TILE, sums, TILE);
    from += count;
  }
  const tile_of out = at(w, s->out, q.tile);
  for (int i = 0; i < lanes; i += LANES) store(total + i, 1.0f / load(total + i));
  for (int c = 0; c < size; c++) {
    float *y = out.data + (size_t)(first + c) * out.width + q.lane;
    for (int i = 0; i < q.count; i++) y[i] = sums[c * TILE + i] * total[i];
  }
}

/* Rotates pairs of channels of queries and keys by position (Su et al., 2021). */
static void rotary(const opfa_work *w, const opfa_step *s, int64_t item) {
  const int tile = (int)(item / s->heads), head = (int)(item % s->heads),
            half = s->channels / s->heads / 2;
  const tile_of b = at(w, s->in, tile);
  for (int part = 0; part < 2; part++)
    for (int c = 0; c < half; c++) {
      float *x = b.data + (size_t)(s->first[part] + head * 2 * half + c) * b.width,
            *y = x + (size_t)half * b.width;
      for (int i = 0; i < b.width; i++) {
        const int token = tile * TILE + i;
        const int64_t p = (token < w->call->tokens ? w->positions[token] : 0) * (int64_t)half + c;
        const float cosine = s->tables[0][p], sine = s->tables[1][p], left = x[i], right = y[i];
        x[i] = left * cosine - right * sine;
        y[i] = right * cosine + left * sine;
      }
    }
}

/* out = activation(in from first[0]) * (in from first[1]). */
static void gate(const opfa_work *w, const opfa_step *s, int64_t item) {
  const tile_of in = group_at(w, s->in, item), out = group_at(w, s->out, item);
  for (int c = 0; c < s->channels; c++) {
    const float *x = in.data + (size_t)(s->first[0] + c) * in.width;
    const float *z = in.data + (size_t)(s->first[1] + c) * in.width;
    for (int i = 0; i < GROUP; i += LANES)
      store(out.data + (size_t)c * out.width + i,
            activated(s->activation, load(x + i)) * load(z + i));
  }
}

/* Multiply-adds that wait for nothing: 12 chains in registers. */
static double peak(void) {
  vec sums[12], factor = all(0.9999f);
  UNROLL for (int i = 0; i < 12; i++) sums[i] = all(1.0f);
  const double began = opfa_now();
  for (int n = 0; n < 20000; n++) {
    UNROLL for (int i = 0; i < 12; i++) sums[i] = sums[i] * factor + factor;
    UNROLL for (int i = 0; i < 12; i++) __asm__ volatile("" : "+" REGISTER(sums[i]));
  }
  return 2.0 * 12 * LANES * 20000 / (opfa_now() - began) / 1e9;
}

#define NAME_(level) opfa_ops_##level
#define NAME(level) NAME_(level)
const opfa_ops NAME(OPFA_LEVEL) = {
    .work = {[OPFA_EMBED] = enter,
             [OPFA_LOAD] = enter,
             [OPFA_STORE] = leave,
             [OPFA_NORM] = norm,
             [OPFA_LINEAR] = linear,
             [OPFA_ATTENTION] = attention,
             [OPFA_ROTARY] = rotary,
             [OPFA_GATE] = gate,
             [OPFA_NARROW] = narrow,
             [OPFA_TIMES] = times,
             [OPFA_ACROSS] = times_across,
             [OPFA_JOIN] = join},
    .peak = peak,
};
