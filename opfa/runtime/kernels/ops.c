/* The work of each step, for one level of instructions: this file is compiled once for each.
 *
 * OPFA_LEVEL names the level, and VB is the bytes of a vector. All loops are C on the compiler's
 * vectors; what a compiler doesn't find by itself is in the few functions under "Vectors".
 */
#include <math.h>
#include <string.h>

#include "ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LANES (VB / 4)
#define TILE OPFA_TILE
#define GROUP OPFA_GROUP
#define PANEL OPFA_PANEL
/* How many tokens a product holds in registers: sparse, and dense with ROWS rows. */
#if VB == 64
enum { MOST = 64, WIDE = 64, ROWS = 6 };
#elif VB == 32
enum { MOST = 64, WIDE = 16, ROWS = 6 };
#elif defined(__aarch64__)
enum { MOST = 64, WIDE = 16, ROWS = 6 };
#else
#define OPFA_PLAIN
enum { MOST = 32, WIDE = 16, ROWS = 3 };
#endif

#if defined(__AVX512F__)
#define REGISTER "v"
#elif defined(__x86_64__)
#define REGISTER "x"
#elif defined(__aarch64__)
#define REGISTER "w"
#endif

/* ---- Vectors ------------------------------------------------------------------------------- */

typedef float vec __attribute__((vector_size(VB), may_alias));
typedef float loose __attribute__((vector_size(VB), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(VB), may_alias));

INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec v) { *(loose *)p = v; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

#if VB == 64
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE vec root(vec a) { return (vec)_mm512_sqrt_ps((__m512)a); }
#elif VB == 32
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vec root(vec a) { return (vec)_mm256_sqrt_ps((__m256)a); }
#elif defined(__aarch64__)
INLINE vec larger(vec a, vec b) { return (vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vec smaller(vec a, vec b) { return (vec)vminq_f32((float32x4_t)a, (float32x4_t)b); }
INLINE vec root(vec a) { return (vec)vsqrtq_f32((float32x4_t)a); }
#else
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }
INLINE vec root(vec a) {
  for (int i = 0; i < LANES; i++) a[i] = sqrtf(a[i]);
  return a;
}
#endif

/* exp by 2^n * exp(r), |r| <= ln 2 / 2, to 2e-7 of its value; 0 below -87. */
INLINE vec exponential(vec x) {
  const ints dead = x < -87.0f;
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  const vec shifted = x * 1.44269504f + 12582912.0f; /* adds 1.5 * 2^23: rounds */
  const vec n = shifted - 12582912.0f;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const ints scaled = (ints)y + ((ints)shifted << 23);
  return (vec)(scaled & ~dead);
}

/* GELU is max(x, 0) + h(|x|), and h(a) = -a/2 erfc(a / sqrt 2) is small: a polynomial of degree 13
 * in 2a/5 - 1 between Chebyshev nodes, to 1.6e-6. Beyond 5 it is 0 to 1e-6. */
INLINE vec gelu(vec x) {
  static const float h[] = {
      -1.552543655e-02f, 9.402215472e-02f, -2.326666556e-01f, 2.569682349e-01f, 1.737571025e-02f,
      -4.189895038e-01f, 4.908141079e-01f, -7.726290745e-02f, -3.452840057e-01f, 2.514059251e-01f,
      9.252006717e-02f, -1.315878590e-01f, -7.233589428e-03f, 2.544361179e-02f};
  const vec t = smaller(larger(x, -x), all(5.0f)) * 0.4f - 1.0f;
  vec y = all(h[13]);
  UNROLL for (int i = 12; i >= 0; i--) y = y * t + h[i];
  return larger(x, all(0)) + y;
}

INLINE vec tangent(vec x) { return 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f); }

INLINE vec activated(int activation, vec x) {
  switch (activation) {
    case OPFA_GELU: return gelu(x);
    case OPFA_GELU_TANH:
      return 0.5f * x * (1.0f + tangent(0.7978845608f * (x + 0.044715f * x * x * x)));
    case OPFA_RELU: return larger(x, all(0));
    case OPFA_SILU: return x / (1.0f + exponential(-x));
    case OPFA_TANH: return tangent(x);
    default: return x;
  }
}

/* ---- Products ------------------------------------------------------------------------------ */

/* out[m][lane] += sum over k of a[k * along + m * across] * b[k * stride + lane]. */
INLINE void outer(int rows, int vectors, int64_t k_end, const float *a, int64_t along, int64_t across,
                  const float *b, int64_t stride, float *out, int64_t out_stride) {
  vec sums[ROWS][WIDE / LANES];
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int i = 0; i < vectors; i++) sums[m][i] = load(out + m * out_stride + i * LANES);
  for (int64_t k = 0; k < k_end; k++) {
    vec tokens[WIDE / LANES];
    UNROLL for (int i = 0; i < vectors; i++) tokens[i] = load(b + k * stride + i * LANES);
    UNROLL for (int m = 0; m < rows; m++) {
      const float scalar = a[k * along + m * across];
      UNROLL for (int i = 0; i < vectors; i++) sums[m][i] += scalar * tokens[i];
    }
  }
  UNROLL for (int m = 0; m < rows; m++)
    UNROLL for (int i = 0; i < vectors; i++) store(out + m * out_stride + i * LANES, sums[m][i]);
}

/* The same for any number of rows and lanes; lanes are a multiple of GROUP. */
static void product(int64_t rows, int lanes, int64_t k_end, const float *a, int64_t along,
                    int64_t across, const float *b, int64_t stride, float *out, int64_t out_stride) {
  for (int lane = 0; lane < lanes; lane += WIDE) {
    const int vectors = (lanes - lane < WIDE ? lanes - lane : WIDE) / LANES;
    for (int64_t m = 0; m < rows; m += ROWS) {
      const int some = rows - m < ROWS ? (int)(rows - m) : ROWS;
#define CASE(R, V)                                                                             \
  case (V) * 8 + (R):                                                                          \
    outer(R, V, k_end, a + m * across, along, across, b + lane, stride, out + m * out_stride + lane, \
          out_stride);                                                                         \
    break;
#if !defined(OPFA_PLAIN)
#define CASES(V) CASE(1, V) CASE(2, V) CASE(3, V) CASE(4, V) CASE(5, V) CASE(6, V)
#else
#define CASES(V) CASE(1, V) CASE(2, V) CASE(3, V)
#endif
      switch (vectors * 8 + some) {
#if VB == 64
        CASES(1) CASES(2) CASES(3) CASES(4)
#elif VB == 32
        CASES(2)
#else
        CASES(4)
#endif
      }
    }
  }
}

/* One row's live weights in one tile of columns: y[lane] += sum of values times tokens. */
INLINE void visit(int lanes, int width, const uint8_t *indices, const float *values, int count,
                  const float *x, float *y) {
  vec sums[MOST / LANES];
  UNROLL for (int i = 0; i < lanes / LANES; i++) sums[i] = load(y + i * LANES);
  int j = 0;
#define LIVE(S)                                                                      \
  {                                                                                  \
    const float *tokens = x + ((four >> (8 * (S))) & 255) * (size_t)width;           \
    const float value = values[j + (S)];                                             \
    UNROLL for (int i = 0; i < lanes / LANES; i++) sums[i] += value * load(tokens + i * LANES); \
  }
  for (; j + 4 <= count; j += 4) {
    uint32_t four;
    memcpy(&four, indices + j, 4);
    LIVE(0) LIVE(1) LIVE(2) LIVE(3)
  }
  for (; j < count; j++) {
    const uint32_t four = indices[j];
    LIVE(0)
  }
#undef LIVE
  UNROLL for (int i = 0; i < lanes / LANES; i++) store(y + i * LANES, sums[i]);
}

/* A block of rows times the tokens of a tile, which has `width` of them. */
INLINE void sparse(int width, const opfa_matrix *m, int block, const float *x, float *y) {
  const int tiles = (m->columns + m->tile - 1) / m->tile;
  const uint32_t *starts = m->starts + (size_t)block * tiles;
  UNROLL for (int lane = 0; lane < width; lane += MOST) {
    const uint8_t *indices = m->indices + m->entries[block];
    const float *values = m->values + m->entries[block];
    for (int t = 0; t < tiles; t++)
      for (uint32_t v = starts[t]; v < starts[t + 1]; v++) {
        const int row = m->visits[2 * v], count = m->visits[2 * v + 1];
        visit(width - lane < MOST ? width - lane : MOST, width, indices, values, count,
              x + (size_t)t * m->tile * width + lane, y + row * width + lane);
        indices += count, values += count;
      }
  }
}

/* ---- Steps --------------------------------------------------------------------------------- */

typedef struct {
  float *data;
  int channels, width;
} tile_of;

INLINE tile_of at(const opfa_work *w, int buffer, int tile) {
  const opfa_buffer *b = w->program->buffers + buffer;
  const int left = w->padded - tile * TILE;
  float *data = w->call->workspace + b->offset * w->padded + (size_t)tile * TILE * b->channels;
  return (tile_of){data, b->channels, left < TILE ? left : TILE};
}

static void linear(const opfa_work *w, const opfa_step *s, int64_t item) {
  const opfa_matrix *m = s->matrix;
  const int height = m->block ? m->block : OPFA_DENSE_BLOCK;
  const int blocks = (m->rows + height - 1) / height; /* tile by tile: each thread keeps its tokens */
  const int tile = (int)(item / blocks), block = (int)(item % blocks), row = block * height;
  const int rows = m->rows - row < height ? m->rows - row : height;
  const tile_of in = at(w, s->in, tile), out = at(w, s->out, tile);
  const float *x = in.data + (size_t)s->first[0] * in.width;
  float *y = out.data + (size_t)(s->first[1] + row) * out.width;
  const int width = out.width;
  const float *z = s->residual < 0 ? NULL : at(w, s->residual, tile).data + (size_t)row * width;
  for (int r = 0; r < rows; r++) {
    const vec bias = all(m->bias ? m->bias[row + r] : 0.0f);
    for (int i = r * width; i < (r + 1) * width; i += LANES) store(y + i, bias + (z ? load(z + i) : all(0)));
  }
  if (m->block) {
    switch (width) {
      case 16: sparse(16, m, block, x, y); break;
      case 32: sparse(32, m, block, x, y); break;
      case 48: sparse(48, m, block, x, y); break;
      default: sparse(64, m, block, x, y);
    }
  } else {
    for (int r = 0; r < rows; r += PANEL)
      product(rows - r < PANEL ? rows - r : PANEL, width, m->columns,
              m->values + (size_t)(row + r) * m->columns, PANEL, 1, x, width, y + r * width, width);
  }
  const int64_t size = (int64_t)rows * width;
#define ACTIVATION(A)                                                                      \
  case A:                                                                                  \
    for (int64_t i = 0; i < size; i += GROUP)                                              \
      UNROLL for (int j = 0; j < GROUP; j += LANES) store(y + i + j, activated(A, load(y + i + j))); \
    break;
  switch (s->activation) {
    ACTIVATION(OPFA_GELU) ACTIVATION(OPFA_GELU_TANH) ACTIVATION(OPFA_RELU)
    ACTIVATION(OPFA_SILU) ACTIVATION(OPFA_TANH)
  }
}

/* out = (in - mean) / sqrt(variance + epsilon) * weight + bias over channels; 16 tokens an item. */
static void norm(const opfa_work *w, const opfa_step *s, int64_t item) {
  const tile_of in = at(w, s->in, (int)(item * GROUP / TILE)), out = at(w, s->out, (int)(item * GROUP / TILE));
  const int lane = (int)(item * GROUP % TILE), width = in.width;
  for (int i = lane; i < lane + GROUP; i += LANES) {
    vec sum = {0}, squares = {0};
    for (int c = 0; c < s->channels; c++) sum += load(in.data + (size_t)c * width + i);
    const vec mean = sum / (float)s->channels;
    for (int c = 0; c < s->channels; c++) {
      const vec d = load(in.data + (size_t)c * width + i) - mean;
      squares += d * d;
    }
    const vec scale = 1.0f / root(squares / (float)s->channels + s->epsilon);
    for (int c = 0; c < s->channels; c++) {
      const vec d = (load(in.data + (size_t)c * width + i) - mean) * (scale * s->weight[c]);
      store(out.data + (size_t)c * width + i, d + (s->bias ? s->bias[c] : 0.0f));
    }
  }
}

/* Sums of rows of tables, brought from [token, channel] to [channel, token]. */
static void embed(const opfa_work *w, const opfa_step *s, int64_t item) {
  const int tile = (int)(item * GROUP / TILE), lane = (int)(item * GROUP % TILE);
  const tile_of out = at(w, s->out, tile);
  for (int t = 0; t < GROUP; t++) {
    const int64_t token = item * GROUP + t;
    float *y = out.data + lane + t;
    if (token >= w->call->tokens) {
      for (int c = 0; c < s->channels; c++) y[(size_t)c * out.width] = 0;
      continue;
    }
    const float *rows[OPFA_TABLES];
    int n = 0;
    for (int i = 0; i < OPFA_TABLES; i++)
      if (s->tables[i]) rows[n++] = s->tables[i] + (size_t)w->call->ids[i][token] * s->channels;
    if (n == 3)
      for (int c = 0; c < s->channels; c++) y[(size_t)c * out.width] = rows[0][c] + rows[1][c] + rows[2][c];
    else if (n == 2)
      for (int c = 0; c < s->channels; c++) y[(size_t)c * out.width] = rows[0][c] + rows[1][c];
    else
      for (int c = 0; c < s->channels; c++) y[(size_t)c * out.width] = rows[0][c];
  }
}

/* Rows of the caller's input to [channel, token], and back. */
static void transfer(const opfa_work *w, const opfa_step *s, int64_t item) {
  const int is_load = s->kind == OPFA_LOAD;
  const int tile = (int)(item * GROUP / TILE), lane = (int)(item * GROUP % TILE);
  const tile_of b = at(w, is_load ? s->out : s->in, tile);
  for (int t = 0; t < GROUP; t++) {
    const int64_t token = item * GROUP + t;
    float *y = b.data + lane + t;
    if (token >= w->call->tokens) {
      if (is_load)
        for (int c = 0; c < s->channels; c++) y[(size_t)c * b.width] = 0;
      continue;
    }
    const int64_t row = w->call->rows ? w->call->rows[token] : token;
    if (is_load) {
      const float *x = w->call->input + row * s->channels;
      for (int c = 0; c < s->channels; c++) y[(size_t)c * b.width] = x[c];
    } else {
      float *x = w->call->output + row * s->channels;
      for (int c = 0; c < s->channels; c++) x[c] = y[(size_t)c * b.width];
    }
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
  const int tile = (int)(item / s->heads), head = (int)(item % s->heads), half = s->channels / s->heads / 2;
  const tile_of b = at(w, s->in, tile);
  for (int part = 0; part < 2; part++)
    for (int c = 0; c < half; c++) {
      float *x = b.data + (size_t)(s->first[part] + head * 2 * half + c) * b.width, *y = x + (size_t)half * b.width;
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
  const int tile = (int)(item * GROUP / TILE), lane = (int)(item * GROUP % TILE);
  const tile_of in = at(w, s->in, tile), out = at(w, s->out, tile);
  for (int c = 0; c < s->channels; c++) {
    const float *x = in.data + (size_t)(s->first[0] + c) * in.width + lane;
    const float *z = in.data + (size_t)(s->first[1] + c) * in.width + lane;
    for (int i = 0; i < GROUP; i += LANES)
      store(out.data + (size_t)c * out.width + lane + i, activated(s->activation, load(x + i)) * load(z + i));
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
    .work = {[OPFA_EMBED] = embed, [OPFA_LOAD] = transfer, [OPFA_STORE] = transfer, [OPFA_NORM] = norm,
             [OPFA_LINEAR] = linear, [OPFA_ATTENTION] = attention, [OPFA_ROTARY] = rotary, [OPFA_GATE] = gate},
    .peak = peak,
};
