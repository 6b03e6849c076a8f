/* The same products in double precision, live weight by live weight. */
#ifndef OPFA_EXACT_H
#define OPFA_EXACT_H
#include <string.h>

#include "ops.h"

typedef struct {
  int64_t block, tile, visit, entry, left; /* `left` live weights of this visit */
  int64_t row, column;
} opfa_place;

/* The next live weight; `entry` is -1 before the first one. 0 after the last. */
static int opfa_next(const opfa_matrix *m, opfa_place *at) {
  const int64_t tiles = (m->columns + m->tile - 1) / m->tile, all = opfa_blocks(m) * tiles;
  while (at->left == 0) {
    int64_t place = at->block * tiles + at->tile;
    while (place < all && at->visit >= m->starts[place + 1]) place++;
    if (place == all) return 0;
    at->block = place / tiles, at->tile = place % tiles;
    at->row = at->block * m->block + m->visits[2 * at->visit];
    at->left = m->visits[2 * at->visit + 1];
    at->visit++;
  }
  at->left--;
  at->entry++;
  at->column = at->tile * m->tile + m->indices[at->entry];
  return 1;
}

static void opfa_forward_exact(const opfa_product *p) {
  const opfa_matrix *m = p->matrix;
  const double *x = p->input, *values = m->values, *bias = (const double *)m->bias;
  double *y = p->output;
  for (int64_t t = 0; t < p->tokens; t++)
    for (int64_t r = 0; r < m->rows; r++) y[t * m->rows + r] = bias ? bias[r] : 0;
  for (opfa_place at = {.entry = -1}; opfa_next(m, &at);)
    for (int64_t t = 0; t < p->tokens; t++)
      y[t * m->rows + at.row] += values[at.entry] * x[t * m->columns + at.column];
}

static void opfa_backward_exact(const opfa_product *p) {
  const opfa_matrix *m = p->matrix;
  const double *x = p->input, *g = p->output, *values = m->values;
  double *dx = p->input_gradient, *dw = p->gradient, *db = p->bias_gradient;
  if (dx) memset(dx, 0, sizeof(double) * (size_t)p->tokens * (size_t)m->columns);
  for (opfa_place at = {.entry = -1}; (dx || dw) && opfa_next(m, &at);) {
    double sum = 0;
    for (int64_t t = 0; t < p->tokens; t++) {
      const double gradient = g[t * m->rows + at.row];
      sum += gradient * x[t * m->columns + at.column];
      if (dx) dx[t * m->columns + at.column] += gradient * values[at.entry];
    }
    if (dw) dw[at.entry] = sum;
  }
  for (int64_t r = 0; db && r < m->rows; r++) {
    db[r] = 0;
    for (int64_t t = 0; t < p->tokens; t++) db[r] += g[t * m->rows + r];
  }
}

#endif
