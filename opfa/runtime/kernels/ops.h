/* What runtime.c gives to the work of a step, and how a level of instructions offers that work. */
#ifndef OPFA_OPS_H
#define OPFA_OPS_H
#include "opfa_runtime.h"

#define OPFA_DENSE_BLOCK 48 /* rows of a dense matrix that are one item of work */
#define OPFA_PARTS 4        /* items of a tile that is made narrow */
#define OPFA_MOST_HEAD 256  /* channels of a head */

typedef struct {
  int32_t sequence, tile, lane, count;
} opfa_queries; /* of one sequence in one tile */

typedef struct {
  const opfa_program *program;
  const opfa_call *call;
  int32_t padded, tiles; /* tokens with those that fill the last group */
  int32_t num_queries;
  const opfa_queries *queries;
  const int32_t *positions; /* of tokens in their sequences */
  int32_t thread;           /* which one works */
} opfa_work;

typedef struct {
  void (*work[OPFA_KINDS])(const opfa_work *, const opfa_step *, int64_t item);
  double (*peak)(void);
} opfa_ops;

/* Rows of a matrix that are one item of work, and how many such blocks it has. */
static inline int32_t opfa_height(const opfa_matrix *m) {
  return m->block ? m->block : OPFA_DENSE_BLOCK;
}
static inline int32_t opfa_blocks(const opfa_matrix *m) {
  return (m->rows + opfa_height(m) - 1) / opfa_height(m);
}

/* Gradients of weights are summed in so many parts of the tiles of tokens. */
#define OPFA_PARTIALS 8
#define OPFA_JOINED 4096 /* weights whose parts are added as one item of work */
static inline int32_t opfa_partials(int32_t tiles) {
  return tiles < OPFA_PARTIALS ? tiles : OPFA_PARTIALS;
}
static inline int64_t opfa_live(const opfa_product *p) {
  return p->gradient ? p->matrix->entries[opfa_blocks(p->matrix)] : 0;
}
/* Floats of a part: its sums for weights and biases, in whole lines. */
static inline int64_t opfa_partial(const opfa_product *p) {
  return (opfa_live(p) + p->matrix->rows + 15) / 16 * 16;
}

double opfa_now(void);
#endif
