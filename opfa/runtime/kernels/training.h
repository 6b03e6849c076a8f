/* Sparse products of a training step: W x, W^T g, and g x^T where W lives.
 *
 * Callers have rows of tokens. A tile of tokens is transposed into a thread's scratch, multiplied
 * while it is in the cache, and its result transposed back. Going back, the gradients of weights are
 * summed over a part of the tiles, and the parts are added in their order: OPFA_PARTIALS parts
 * whatever the number of threads, so no sum depends on it.
 */
#ifndef OPFA_TRAINING_H
#define OPFA_TRAINING_H
#include "products.h"

typedef float four_of __attribute__((vector_size(16), may_alias));
typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));

/* ---- Rows of tokens and tiles ---- */

/* LANES numbers of a row. */
INLINE vec load_row(int dtype, const void *row, int64_t i) {
  if (dtype == OPFA_FP32) return load((const float *)row + i);
  ints bits;
  const uint16_t *from = (const uint16_t *)row + i;
  UNROLL for (int j = 0; j < LANES; j++) bits[j] = from[j];
  return (vec)(bits << 16);
}

INLINE float load_one(int dtype, const void *row, int64_t i) {
  if (dtype == OPFA_FP32) return ((const float *)row)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE void store_row(int dtype, void *row, int64_t i, vec v) {
  if (dtype == OPFA_FP32) {
    store((float *)row + i, v);
    return;
  }
  const ints bits = (ints)to_bf16(v) >> 16;
  uint16_t *to = (uint16_t *)row + i;
  UNROLL for (int j = 0; j < LANES; j++) to[j] = (uint16_t)bits[j];
}

INLINE void store_one(int dtype, void *row, int64_t i, float x) {
  if (dtype == OPFA_FP32) {
    ((float *)row)[i] = x;
    return;
  }
  const vec v = to_bf16(all(x));
  ((uint16_t *)row)[i] = (uint16_t)((uint32_t)((ints)v)[0] >> 16);
}

INLINE size_t size_of(int dtype) { return dtype == OPFA_FP32 ? 4 : 2; }

/* Rows of `count` tokens to [channel][width]; tokens that only fill the tile are 0. */
INLINE void rows_to_tile(int dtype, const char *rows, int channels, int count, int width,
                         float *tile) {
  const size_t stride = (size_t)channels * size_of(dtype);
  for (int t = 0; t < width; t += LANES) {
    int c = 0;
    for (; c + LANES <= channels; c += LANES) {
      vec block[LANES];
      if (t + LANES <= count) {
        UNROLL for (int i = 0; i < LANES; i++) block[i] =
            load_row(dtype, rows + (t + i) * stride, c);
      } else {
        UNROLL for (int i = 0; i < LANES; i++) block[i] =
            t + i < count ? load_row(dtype, rows + (t + i) * stride, c) : all(0);
      }
      transpose(block);
      UNROLL for (int i = 0; i < LANES; i++) store(tile + (size_t)(c + i) * width + t, block[i]);
    }
    for (; c < channels; c++)
      for (int i = 0; i < LANES; i++)
        tile[(size_t)c * width + t + i] =
            t + i < count ? load_one(dtype, rows + (t + i) * stride, c) : 0;
  }
}

/* Channels `first` to `end` of [channel][width], which begins at `first`, to rows. */
INLINE void tile_to_rows(int dtype, const float *tile, int first, int end, int channels, int count,
                         int width, char *rows) {
  const size_t stride = (size_t)channels * size_of(dtype);
  for (int t = 0; t < count; t += LANES) {
    int c = first;
    for (; c + LANES <= end; c += LANES) {
      vec block[LANES];
      UNROLL for (int i = 0; i < LANES; i++) block[i] =
          load(tile + (size_t)(c - first + i) * width + t);
      transpose(block);
      UNROLL for (int i = 0; i < LANES; i++) if (t + i < count)
          store_row(dtype, rows + (t + i) * stride, c, block[i]);
    }
    for (; c < end; c++)
      for (int i = 0; i < LANES && t + i < count; i++)
        store_one(dtype, rows + (t + i) * stride, c, tile[(size_t)(c - first) * width + t + i]);
  }
}

INLINE void to_tile(int dtype, const void *rows, int channels, int tile, int count, int width,
                    float *to) {
  const char *from = (const char *)rows + (size_t)tile * OPFA_TILE * channels * size_of(dtype);
  if (dtype == OPFA_FP32)
    rows_to_tile(OPFA_FP32, from, channels, count, width, to);
  else
    rows_to_tile(OPFA_BF16, from, channels, count, width, to);
}

/* ---- Products ---- */

/* y = m * x + bias for one tile, to rows. */
static void tile_times(const opfa_matrix *m, int dtype, const float *x, int tile, int count,
                       int width, void *output) {
  float y[256 * OPFA_TILE] __attribute__((aligned(64)));
  char *rows_out = (char *)output + (size_t)tile * OPFA_TILE * m->rows * size_of(dtype);
  for (int block = 0; block < opfa_blocks(m); block++) {
    const int first = block * m->block;
    const int rows = m->rows - first < m->block ? m->rows - first : m->block;
    for (int r = 0; r < rows; r++) {
      const vec bias = all(m->bias ? m->bias[first + r] : 0);
      for (int i = 0; i < width; i += LANES) store(y + r * width + i, bias);
    }
    switch (width) {
      case 16: sparse(OPFA_FP32, 16, m, block, (const char *)x, y); break;
      case 32: sparse(OPFA_FP32, 32, m, block, (const char *)x, y); break;
      case 48: sparse(OPFA_FP32, 48, m, block, (const char *)x, y); break;
      default: sparse(OPFA_FP32, 64, m, block, (const char *)x, y); break;
    }
    if (dtype == OPFA_FP32)
      tile_to_rows(OPFA_FP32, y, first, first + rows, m->rows, count, width, rows_out);
    else
      tile_to_rows(OPFA_BF16, y, first, first + rows, m->rows, count, width, rows_out);
  }
}

/* Tokens of a tile, and its width. */
INLINE int count_of(const opfa_work *w, int tile, int *width) {
  const int left = w->padded - tile * OPFA_TILE, tokens = w->call->tokens - tile * OPFA_TILE;
  *width = left < OPFA_TILE ? left : OPFA_TILE;
  return tokens < OPFA_TILE ? tokens : OPFA_TILE;
}

INLINE float *scratch_of(const opfa_work *w) {
  return w->call->workspace + w->program->scratch_start + w->program->scratch * w->thread;
}

static void times(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_product *p = s->product;
  int width;
  const int tile = (int)item, count = count_of(w, tile, &width);
  float *x = scratch_of(w);
  to_tile(p->dtype, p->input, p->matrix->columns, tile, count, width, x);
  tile_times(p->matrix, p->dtype, x, tile, count, width, p->output);
}

/* ---- The gradient of live weights ---- */

/* Pairs of neighbouring lanes of two vectors, added: [a0+a1, b0+b1, ...] in each 128 bits. */
#if LANES == 16
#define EVEN(a, b) \
  __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30)
#define ODD(a, b) \
  __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31)
#elif LANES == 8
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15)
#else
#define EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#endif

/* The sums of the lanes of four vectors. */
INLINE four_of sums_of(vec a, vec b, vec c, vec d) {
  const vec ab = EVEN(a, b) + ODD(a, b), cd = EVEN(c, d) + ODD(c, d);
  const vec sums = EVEN(ab, cd) + ODD(ab, cd);
#if LANES == 16
  typedef float eight __attribute__((vector_size(32)));
  const eight half = __builtin_shufflevector(sums, sums, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15);
  return (four_of)(__builtin_shufflevector(half, half, 0, 1, 2, 3) +
                   __builtin_shufflevector(half, half, 4, 5, 6, 7));
#elif LANES == 8
  return (four_of)(__builtin_shufflevector(sums, sums, 0, 1, 2, 3) +
                   __builtin_shufflevector(sums, sums, 4, 5, 6, 7));
#else
  return (four_of)sums;
#endif
}

INLINE void add_to(float *values, int count, four_of sums) {
  UNROLL for (int i = 0; i < count; i++) values[i] += sums[i];
}

/* values[j] += the products of a row's tokens and those of its live columns, summed. */
INLINE void visit_sampled(int width, const uint8_t *indices, int count, const float *g,
                          const float *x, float *values) {
  const int vectors = width / LANES;
  vec mine[OPFA_TILE / LANES];
  UNROLL for (int i = 0; i < vectors; i++) mine[i] = load(g + i * LANES);
#define DOT(S, J)                                                          \
  {                                                                        \
    const float *tokens = x + (J) * (size_t)width;                         \
    S = mine[0] * load(tokens);                                            \
    UNROLL for (int i = 1; i < vectors; i++) S += mine[i] * load(tokens + i * LANES); \
  }
  int j = 0;
  for (; j + 4 <= count; j += 4) {
    uint32_t four;
    memcpy(&four, indices + j, 4);
    vec a, b, c, d;
    DOT(a, four & 255)
    DOT(b, four >> 8 & 255)
    DOT(c, four >> 16 & 255)
    DOT(d, four >> 24)
    loose_four *to = (loose_four *)(values + j);
    *to = *to + sums_of(a, b, c, d);
  }
  switch (count - j) {
    vec a, b, c;
    case 3:
      DOT(a, indices[j])
      DOT(b, indices[j + 1])
      DOT(c, indices[j + 2])
      add_to(values + j, 3, sums_of(a, b, c, c));
      break;
    case 2:
      DOT(a, indices[j])
      DOT(b, indices[j + 1])
      add_to(values + j, 2, sums_of(a, b, b, b));
      break;
    case 1:
      DOT(a, indices[j])
      add_to(values + j, 1, sums_of(a, a, a, a));
      break;
  }
#undef DOT
}

INLINE void sample(int width, const opfa_matrix *m, int block, const float *g, const float *x,
                   float *values) {
  const int tiles = (m->columns + m->tile - 1) / m->tile;
  const uint32_t *starts = m->starts + (size_t)block * tiles;
  size_t entry = m->entries[block];
  for (int t = 0; t < tiles; t++)
    for (uint32_t v = starts[t]; v < starts[t + 1]; v++) {
      const int row = m->visits[2 * v], count = m->visits[2 * v + 1];
      visit_sampled(width, m->indices + entry, count, g + row * width,
                    x + (size_t)t * m->tile * width, values + entry);
      entry += count;
    }
}

/* sums[row] += a row's tokens, of all rows. */
INLINE void sum_rows(int rows, int width, const float *g, float *sums) {
  for (int r = 0; r < rows; r += 4) {
    vec four[4];
    UNROLL for (int k = 0; k < 4; k++) {
      four[k] = all(0);
      if (r + k < rows)
        for (int i = 0; i < width; i += LANES) four[k] += load(g + (size_t)(r + k) * width + i);
    }
    add_to(sums + r, rows - r < 4 ? rows - r : 4, sums_of(four[0], four[1], four[2], four[3]));
  }
}

/* One part of the tiles, backwards: the gradient of the input, and sums for weights and biases. */
static void times_across(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_product *p = s->product;
  const opfa_matrix *m = p->matrix;
  const int parts = opfa_partials(w->tiles), blocks = opfa_blocks(m);
  const int end = (int)(w->tiles * (item + 1) / parts);
  const int64_t live = opfa_live(p), size = opfa_partial(p);
  float *g = scratch_of(w), *x = g + (size_t)m->rows * OPFA_TILE;
  float *values = w->call->workspace + size * item, *biases = values + live;
  memset(values, 0, sizeof(float) * size);
  for (int tile = (int)(w->tiles * item / parts); tile < end; tile++) {
    int width;
    const int count = count_of(w, tile, &width);
    to_tile(p->dtype, p->output, m->rows, tile, count, width, g);
    if (p->input_gradient)
      tile_times(p->across, p->dtype, g, tile, count, width, p->input_gradient);
    if (p->bias_gradient) sum_rows(m->rows, width, g, biases);
    if (!p->gradient) continue;
    to_tile(p->dtype, p->input, m->columns, tile, count, width, x);
    for (int block = 0; block < blocks; block++) {
      const float *rows = g + (size_t)block * m->block * width;
      switch (width) {
        case 16: sample(16, m, block, rows, x, values); break;
        case 32: sample(32, m, block, rows, x, values); break;
        case 48: sample(48, m, block, rows, x, values); break;
        default: sample(64, m, block, rows, x, values); break;
      }
    }
  }
}

/* The sums of all parts, in their order. */
static void join(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_product *p = s->product;
  const int parts = opfa_partials(w->tiles);
  const int64_t live = opfa_live(p), size = opfa_partial(p), first = item * OPFA_JOINED;
  const int64_t end = first + OPFA_JOINED < live + p->matrix->rows ? first + OPFA_JOINED
                                                                   : live + p->matrix->rows;
  for (int64_t i = first; i < end; i++) {
    float sum = 0;
    for (int part = 0; part < parts; part++) sum += w->call->workspace[size * part + i];
    if (i >= live) {
      if (p->bias_gradient) ((float *)p->bias_gradient)[i - live] = sum;
    } else if (p->gradient) {
      ((float *)p->gradient)[i] = sum;
    }
  }
}

#endif
