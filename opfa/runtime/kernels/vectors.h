/* Vectors of one level of instructions: what a compiler doesn't find by itself, and activations. */
#ifndef OPFA_VECTORS_H
#define OPFA_VECTORS_H
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

#if defined(__AVX512F__)
#define REGISTER "v"
#elif defined(__x86_64__)
#define REGISTER "x"
#elif defined(__aarch64__)
#define REGISTER "w"
#else
#define REGISTER "m"
#endif

typedef float vec __attribute__((vector_size(VB), may_alias));
typedef float loose __attribute__((vector_size(VB), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(VB), may_alias));
typedef int32_t loose_ints __attribute__((vector_size(VB), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec v) { *(loose *)p = v; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ints mask, vec yes, vec no) {
  return (vec)((mask & (ints)yes) | (~mask & (ints)no));
}

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

/* LANES vectors as a matrix, transposed: log2(LANES) times the first half between the second. */
INLINE void transpose(vec *rows) {
#if LANES == 16
#define LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
  UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
    vec next[LANES];
    UNROLL for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = LOW(rows[i], rows[i + LANES / 2]);
      next[2 * i + 1] = HIGH(rows[i], rows[i + LANES / 2]);
    }
    UNROLL for (int i = 0; i < LANES; i++) rows[i] = next[i];
  }
}

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
      -1.552543655e-02f, 9.402215472e-02f,  -2.326666556e-01f, 2.569682349e-01f,  1.737571025e-02f,
      -4.189895038e-01f, 4.908141079e-01f,  -7.726290745e-02f, -3.452840057e-01f, 2.514059251e-01f,
      9.252006717e-02f,  -1.315878590e-01f, -7.233589428e-03f, 2.544361179e-02f};
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

/* Rounds to the nearest integer, ties to even; |x| < 2^22. Nothing reassociates these sums. */
INLINE vec nearest(vec x) { return (x + 12582912.0f) - 12582912.0f; }

/* Rounds to bf16, ties to even, and back. */
INLINE vec to_bf16(vec x) {
  const ints bits = (ints)x;
  return (vec)((bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000);
}

#endif
