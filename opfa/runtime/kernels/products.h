/* Matrices times tokens, for one level of instructions. */
#ifndef OPFA_PRODUCTS_H
#define OPFA_PRODUCTS_H
#include "vectors.h"

/* How many tokens a product holds in registers: sparse, and dense with ROWS rows. */
#if VB == 64
enum { MOST = 64, WIDE = 64, ROWS = 6 };
#elif VB == 32 || defined(__aarch64__)
enum { MOST = 64, WIDE = 16, ROWS = 6 };
#else
enum { MOST = 32, WIDE = 16, ROWS = 3 };
#endif

/* Bytes of a token's channel as input of a bf16 and of an int8 matrix. Where the CPU has no
 * products of such numbers they are fp32 numbers with the same values. */
#ifdef __AMX_TILE__ /* two or four channels of a token stand together */
enum { BF16_BYTES = 2, BF16_TOGETHER = 2, INT8_TOGETHER = 4 };
#elif defined(__AVX512BF16__)
enum { BF16_BYTES = 2 };
#else
enum { BF16_BYTES = 4 };
#endif
#ifdef __AVX512VNNI__
enum { INT8_BYTES = 1 };
#else
enum { INT8_BYTES = 4 };
#endif

/* ---- Dense ---- */

/* out[m][lane] += sum over k of a[k * along + m * across] * b[k * stride + lane]. */
INLINE void outer(int rows, int vectors, int64_t k_end, const float *a, int64_t along,
                  int64_t across, const float *b, int64_t stride, float *out, int64_t out_stride) {
  vec sums[ROWS][WIDE / LANES];
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int i = 0; i < vectors; i++) sums[m][i] =
      load(out + m * out_stride + i * LANES);
  for (int64_t k = 0; k < k_end; k++) {
    vec tokens[WIDE / LANES];
    UNROLL for (int i = 0; i < vectors; i++) tokens[i] = load(b + k * stride + i * LANES);
    UNROLL for (int m = 0; m < rows; m++) {
      const float scalar = a[k * along + m * across];
      UNROLL for (int i = 0; i < vectors; i++) sums[m][i] += scalar * tokens[i];
    }
  }
  UNROLL for (int m = 0; m < rows; m++) UNROLL for (int i = 0; i < vectors; i++)
      store(out + m * out_stride + i * LANES, sums[m][i]);
}

/* The same for any number of rows and lanes; lanes are a multiple of 16. */
static void product(int64_t rows, int lanes, int64_t k_end, const float *a, int64_t along,
                    int64_t across, const float *b, int64_t stride, float *out,
                    int64_t out_stride) {
  for (int lane = 0; lane < lanes; lane += WIDE) {
    const int vectors = (lanes - lane < WIDE ? lanes - lane : WIDE) / LANES;
    for (int64_t m = 0; m < rows; m += ROWS) {
      const int some = rows - m < ROWS ? (int)(rows - m) : ROWS;
#define CASE(R, V)                                                      \
  case (V) * 8 + (R):                                                   \
    outer(R, V, k_end, a + m * across, along, across, b + lane, stride, \
          out + m * out_stride + lane, out_stride);                     \
    break;
#if VB > 16 || defined(__aarch64__)
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

/* ---- Sparse: one visit, that is the live weights of one row in one tile of columns ---- */

/* y[lane] += sum of values times tokens, all fp32. Few tokens have several sums each, since a sum
 * must wait for the one before. */
INLINE void visit_fp32(int lanes, int width, const uint8_t *indices, const float *values, int count,
                       const float *x, float *y) {
  const int vectors = lanes / LANES, chains = vectors < 2 ? 4 : vectors < 4 ? 2 : 1;
  vec sums[2 * MOST / LANES];
  UNROLL for (int i = 0; i < chains * vectors; i++) sums[i] =
      i < vectors ? load(y + i * LANES) : all(0);
  int j = 0;
#define LIVE(S)                                                                            \
  {                                                                                        \
    const float *tokens = x + ((four >> (8 * (S))) & 255) * (size_t)width;                 \
    const float value = values[j + (S)];                                                   \
    vec *chain = sums + (S) % chains * vectors;                                            \
    UNROLL for (int i = 0; i < vectors; i++) chain[i] += value * load(tokens + i * LANES); \
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
  UNROLL for (int i = vectors; i < chains * vectors; i++) sums[i % vectors] += sums[i];
  UNROLL for (int i = 0; i < vectors; i++) store(y + i * LANES, sums[i]);
}

#ifdef __AVX512BF16__
/* Two weights at a time: their tokens are interleaved, and vdpbf16ps adds both products in fp32.
 * `narrow_bf16` stores 32 tokens so that the two halves come out in the order of the tokens. */
INLINE void visit_bf16(int lanes, int width, const uint8_t *indices, const uint16_t *values,
                       int count, const uint16_t *x, float *y) {
  __m512 sums[MOST / 16];
  UNROLL for (int i = 0; i < lanes / 16; i++) sums[i] = _mm512_loadu_ps(y + i * 16);
#define TWO(LEFT, RIGHT)                                                                           \
  {                                                                                                \
    const uint16_t *left = x + indices[LEFT] * (size_t)width;                                      \
    const uint16_t *right = x + indices[RIGHT] * (size_t)width;                                    \
    const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)two);                                   \
    UNROLL for (int i = 0; i < lanes / 32; i++) {                                                  \
      const __m512i a = _mm512_loadu_si512(left + i * 32), b = _mm512_loadu_si512(right + i * 32); \
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b);                                  \
      const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(a, b);                                 \
      sums[2 * i] = _mm512_dpbf16_ps(sums[2 * i], low, pair);                                      \
      sums[2 * i + 1] = _mm512_dpbf16_ps(sums[2 * i + 1], high, pair);                             \
    }                                                                                              \
  }
  int j = 0;
  for (; j + 2 <= count; j += 2) {
    uint32_t two;
    memcpy(&two, values + j, 4);
    TWO(j, j + 1)
  }
  if (j < count) {
    const uint32_t two = values[j];
    TWO(j, j)
  }
#undef TWO
  UNROLL for (int i = 0; i < lanes / 16; i++) _mm512_storeu_ps(y + i * 16, sums[i]);
}
#else
INLINE void visit_bf16(int lanes, int width, const uint8_t *indices, const uint16_t *values,
                       int count, const float *x, float *y) {
  float wide[256];
  for (int j = 0; j < count; j++) {
    const uint32_t bits = (uint32_t)values[j] << 16;
    memcpy(wide + j, &bits, 4);
  }
  visit_fp32(lanes, width, indices, wide, count, x, y);
}
#endif

#ifdef __AVX512VNNI__
/* Four weights at a time: the bytes of their tokens are transposed, and vpdpbusd adds the four
 * products in int32. `narrow_int8` stores the tokens so that they come out in their order. */
INLINE void visit_int8(int lanes, int width, const uint8_t *indices, const int8_t *values,
                       int count, const uint8_t *x, int32_t *y) {
#define FOUR(P, LOAD, SET, B, C, D)                                                       \
  {                                                                                       \
    const __typeof__(sums[0]) weights = SET((int)four);                                   \
    const __typeof__(weights) a = LOAD((void *)(x + indices[j] * (size_t)width));         \
    const __typeof__(weights) b = LOAD((void *)(x + indices[B] * (size_t)width));         \
    const __typeof__(weights) c = LOAD((void *)(x + indices[C] * (size_t)width));         \
    const __typeof__(weights) d = LOAD((void *)(x + indices[D] * (size_t)width));         \
    const __typeof__(weights) ab = P##_unpacklo_epi8(a, b), cd = P##_unpacklo_epi8(c, d); \
    const __typeof__(weights) ba = P##_unpackhi_epi8(a, b), dc = P##_unpackhi_epi8(c, d); \
    sums[0] = P##_dpbusd_epi32(sums[0], P##_unpacklo_epi16(ab, cd), weights);             \
    sums[1] = P##_dpbusd_epi32(sums[1], P##_unpackhi_epi16(ab, cd), weights);             \
    sums[2] = P##_dpbusd_epi32(sums[2], P##_unpacklo_epi16(ba, dc), weights);             \
    sums[3] = P##_dpbusd_epi32(sums[3], P##_unpackhi_epi16(ba, dc), weights);             \
  }
#define QUAD(V, P, LOAD, STORE, SET, BITS)                                              \
  V sums[4];                                                                            \
  UNROLL for (int i = 0; i < 4; i++) sums[i] = LOAD((void *)(y + i * (BITS / 32)));     \
  int j = 0;                                                                            \
  for (; j + 4 <= count; j += 4) {                                                      \
    uint32_t four;                                                                      \
    memcpy(&four, values + j, 4);                                                       \
    FOUR(P, LOAD, SET, j + 1, j + 2, j + 3)                                             \
  }                                                                                     \
  if (j < count) {                                                                      \
    const int left = count - j;                                                         \
    uint32_t four = 0;                                                                  \
    for (int i = 0; i < left; i++) four |= (uint32_t)(uint8_t)values[j + i] << (8 * i); \
    FOUR(P, LOAD, SET, left > 1 ? j + 1 : j, left > 2 ? j + 2 : j, j)                   \
  }                                                                                     \
  UNROLL for (int i = 0; i < 4; i++) STORE((void *)(y + i * (BITS / 32)), sums[i]);
  if (lanes == 64) {
    QUAD(__m512i, _mm512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_set1_epi32, 512)
  } else {
    QUAD(__m256i, _mm256, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_set1_epi32, 256)
  }
#undef QUAD
#undef FOUR
}
#else
/* Integers in fp32: a visit's sum is below 2^24 and so exact, and is added as an integer. */
INLINE void visit_int8(int lanes, int width, const uint8_t *indices, const int8_t *values,
                       int count, const float *x, int32_t *y) {
  float wide[256], sums[MOST] __attribute__((aligned(64))) = {0};
  for (int j = 0; j < count; j++) wide[j] = values[j];
  visit_fp32(lanes, width, indices, wide, count, x, sums);
  for (int i = 0; i < lanes; i += LANES)
    *(loose_ints *)(y + i) += __builtin_convertvector(load(sums + i), ints);
}
#endif

/* y[row][token] += a block of rows times a tile's tokens x, of which there are `width`; x and y
 * have the numbers of `dtype`, and y is int32 for int8. */
INLINE void sparse(int dtype, int width, const opfa_matrix *m, int block, const char *x, float *y) {
  const int tiles = (m->columns + m->tile - 1) / m->tile;
  const uint32_t *starts = m->starts + (size_t)block * tiles;
  const size_t bytes = dtype == OPFA_FP32 ? 4 : dtype == OPFA_BF16 ? BF16_BYTES : INT8_BYTES;
  UNROLL for (int lane = 0; lane < width; lane += MOST) {
    const int lanes = width - lane < MOST ? width - lane : MOST;
    size_t entry = m->entries[block];
    for (int t = 0; t < tiles; t++)
      for (uint32_t v = starts[t]; v < starts[t + 1]; v++) {
        const int row = m->visits[2 * v], count = m->visits[2 * v + 1];
        const void *tokens = x + ((size_t)t * m->tile * width + lane) * bytes;
        const uint8_t *indices = m->indices + entry;
        float *out = y + row * width + lane;
        if (dtype == OPFA_FP32)
          visit_fp32(lanes, width, indices, (const float *)m->values + entry, count, tokens, out);
        else if (dtype == OPFA_BF16)
          visit_bf16(lanes, width, indices, (const uint16_t *)m->values + entry, count, tokens,
                     out);
        else
          visit_int8(lanes, width, indices, (const int8_t *)m->values + entry, count, tokens,
                     (int32_t *)out);
        entry += count;
      }
  }
}

#ifdef __AMX_TILE__
enum { SIDE = 16, ROW = 64 }; /* rows and bytes of a tile */

/* y += a group of 16 rows times a tile's tokens, by AMX: the weights of 16 rows and 64 bytes of
 * columns are spread by their masks (vpexpandw, vpexpandb) some tiles ahead of the product that
 * reads them. After SparAMX (AbouElhamayed et al., 2025). */
INLINE void amx(int dtype, int width, int tiles, const void *masks, const char *values,
                const char *x, char *y) {
  enum { AHEAD = 2, SLOTS = 4 };
  char weights[SLOTS][SIDE][ROW] __attribute__((aligned(64)));
  const uint32_t *masks32 = masks;
  const uint64_t *masks64 = masks;
  const size_t stride = (size_t)width * 4; /* bytes of a row, of x as of y */
#define EACH(DO) DO(0) DO(1) if (width > 32){DO(2) DO(3)}
#define LOAD(T) _tile_loadd(T, y + (T) * ROW, stride);
#define STORE(T) _tile_stored(T, y + (T) * ROW, stride);
#define TIMES(T)                         \
  _tile_loadd(5, x + (T) * ROW, stride); \
  if (dtype == OPFA_BF16)                \
    _tile_dpbf16ps(T, 4, 5);             \
  else                                   \
    _tile_dpbsud(T, 4, 5);
  EACH(LOAD)
  for (int t = -AHEAD; t < tiles; t++) {
    if (t + AHEAD < tiles) {
      char (*to)[ROW] = weights[(t + AHEAD) % SLOTS];
      UNROLL for (int r = 0; r < SIDE; r++) {
        const __m512i some = _mm512_loadu_si512(values);
        if (dtype == OPFA_BF16) {
          _mm512_store_si512(to[r], _mm512_maskz_expand_epi16(*masks32, some));
          values += 2 * __builtin_popcount(*masks32++);
        } else {
          _mm512_store_si512(to[r], _mm512_maskz_expand_epi8(*masks64, some));
          values += __builtin_popcountll(*masks64++);
        }
      }
    }
    if (t < 0) continue;
    _tile_loadd(4, weights[t % SLOTS], ROW);
    EACH(TIMES)
    x += SIDE * stride;
  }
  EACH(STORE)
#undef EACH
#undef LOAD
#undef STORE
#undef TIMES
}

/* A block of rows; y has room for a whole number of groups. */
static void masked(const opfa_matrix *m, int block, int rows, int width, const char *x, float *y) {
  static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16}};
  const int weight = m->dtype == OPFA_BF16 ? 2 : 1, columns = ROW / weight; /* bytes; of a tile */
  const int tiles = (m->columns + columns - 1) / columns;
  _tile_loadconfig(&shape);
  for (int r = 0; r < rows; r += SIDE) {
    const int group = (block * m->block + r) / SIDE;
    const char *masks = (const char *)m->masks + (size_t)group * tiles * SIDE * columns / 8;
    const char *values = (const char *)m->values + (size_t)m->entries[group] * weight;
    char *to = (char *)(y + r * width);
#define CASE_OF(D, W) \
  case (D) * 256 + (W): amx(D, W, tiles, masks, values, x, to); break;
    switch (m->dtype * 256 + width) {
      CASE_OF(OPFA_BF16, 32) CASE_OF(OPFA_BF16, 64) CASE_OF(OPFA_INT8, 32) CASE_OF(OPFA_INT8, 64)
    }
#undef CASE_OF
  }
  _tile_release();
}
#endif

/* ---- Input of bf16 and int8 matrices, of tiles of 32 or 64 tokens ---- */

/* q = clamp(round(x / scale) + zero, 0, 255), as torch.fake_quantize_per_tensor_affine. */
INLINE vec quantized(vec x, float inverse, float zero) {
  const vec q = nearest(smaller(larger(x * inverse, all(-1e6f)), all(1e6f))) + zero;
  return smaller(larger(q, all(0)), all(255.0f));
}

#ifdef __AMX_TILE__
/* Rows `first` to `end` of [channels][width], whose places are `to`; channels stand together by two
 * or four, and those beyond the last, up to whole tiles, are 0. */
INLINE void narrow_rows(const opfa_step *s, int channels, int first, int end, int width,
                        const float *from, char *to) {
  const int together = s->form == OPFA_BF16 ? BF16_TOGETHER : INT8_TOGETHER;
  if (end == channels) end = (channels + 63) / 64 * 64;
  for (int c = first; c < end; c += together)
    for (int i = 0; i < width; i += LANES) {
      ints word = {0};
      UNROLL for (int k = 0; k < together; k++) {
        if (c + k >= channels) break;
        const vec x = load(from + (size_t)(c + k - first) * width + i);
        if (s->form == OPFA_BF16) {
          word |= ((ints)to_bf16(x) >> 16 & 0xffff) << (16 * k);
        } else {
          word |= __builtin_convertvector(quantized(x, s->inverse, s->zero), ints) << (8 * k);
        }
      }
      *(loose_ints *)(to + ((size_t)c / together * width + i) * 4) = word;
    }
}
#else
INLINE void narrow_bf16(int width, const float *from, char *to) {
#ifdef __AVX512BF16__
  for (int i = 0; i < width; i += 32) {
    const __m512i low = (__m512i)to_bf16(load(from + i)),
                  high = (__m512i)to_bf16(load(from + i + 16));
    const __m512i both =
        _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
    _mm512_storeu_si512(to + i * 2, both);
  }
#else
  for (int i = 0; i < width; i += LANES) store((float *)to + i, to_bf16(load(from + i)));
#endif
}

INLINE void narrow_int8(int width, const float *from, char *to, float inverse, float zero) {
#ifdef __AVX512VNNI__
  if (width == 64) {
    __m512i q[4];
    UNROLL for (int i = 0; i < 4; i++) q[i] =
        (__m512i) __builtin_convertvector(quantized(load(from + i * 16), inverse, zero), ints);
    const __m512i low = _mm512_packus_epi32(q[0], q[1]), high = _mm512_packus_epi32(q[2], q[3]);
    _mm512_storeu_si512(to, _mm512_packus_epi16(low, high));
  } else {
    __m512i q[2];
    UNROLL for (int i = 0; i < 2; i++) q[i] =
        (__m512i) __builtin_convertvector(quantized(load(from + i * 16), inverse, zero), ints);
    const __m256i low =
        _mm256_packus_epi32(_mm512_castsi512_si256(q[0]), _mm512_extracti64x4_epi64(q[0], 1));
    const __m256i high =
        _mm256_packus_epi32(_mm512_castsi512_si256(q[1]), _mm512_extracti64x4_epi64(q[1], 1));
    _mm256_storeu_si256((void *)to, _mm256_packus_epi16(low, high));
  }
#else
  for (int i = 0; i < width; i += LANES)
    store((float *)to + i, quantized(load(from + i), inverse, zero));
#endif
}

INLINE void narrow_rows(const opfa_step *s, int channels, int first, int end, int width,
                        const float *from, char *to) {
  (void)channels;
  for (int c = first; c < end; c++, from += width)
    if (s->form == OPFA_BF16)
      narrow_bf16(width, from, to + (size_t)c * width * BF16_BYTES);
    else
      narrow_int8(width, from, to + (size_t)c * width * INT8_BYTES, s->inverse, s->zero);
}
#endif

#endif
