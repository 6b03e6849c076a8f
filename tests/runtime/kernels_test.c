/* The kernels against plain loops in double precision, on random networks, at every level of this
 * CPU: any shapes, densities from 0 to 1, empty rows, one token or 4,096 of many sequences. 1, 2
 * and 4 threads must give the same bits, also when several callers share a pool.
 *
 * Usage: kernels_test [NETWORKS [SEED [KILOBYTES]]]   prints a line for each level; exit code 1 on a
 * failure, or where more memory than that stays behind: an emulator keeps some for each thread
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "opfa_runtime.h"

#define TOLERANCE 3e-5 /* of the largest value: hundreds of roundings in fp32 */
#define NARROW_TOLERANCE 0.1 /* where what is rounded to 8 or 16 bits has such roundings already */
#define MOST_STEPS 16
#define CALLERS 4

/* ---- Chance and memory: each array is exactly as long as it has to be ----------------------- */

static uint64_t state = 1;
static void *arrays[256];
static int num_arrays;

static uint32_t chance(uint32_t below) { /* xorshift64*, Vigna (2016) */
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return (uint32_t)((state * 2685821657736338717u) >> 32) % below;
}
static int from_to(int first, int last) { return first + (int)chance((uint32_t)(last - first + 1)); }
static float value(void) { return ((float)chance(1 << 20) / (1 << 19) - 1) * 1.7f; } /* variance 1 */

static void *take(size_t count, size_t size) {
  void *found = malloc(count && size ? count * size : 1);
  if (!found || num_arrays == 256) abort();
  return arrays[num_arrays++] = found;
}
static float *values(size_t count, float scale) {
  float *found = take(count, sizeof *found);
  for (size_t i = 0; i < count; i++) found[i] = value() * scale;
  return found;
}
static float to_bf16(float x) { /* ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  memcpy(&x, &bits, 4);
  return x;
}
static void drop_all(void) {
  while (num_arrays) free(arrays[--num_arrays]);
}

/* ---- Matrices ------------------------------------------------------------------------------- */

typedef struct {
  opfa_matrix packed; /* in the form that the level wants */
  opfa_matrix visits, masks;
  float *plain; /* [rows][columns], in bf16 and int8 with values that these hold */
} matrix;

static void put(const opfa_matrix *m, void *to, size_t i, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (m->dtype == OPFA_FP32) ((float *)to)[i] = x;
  else if (m->dtype == OPFA_BF16) ((uint16_t *)to)[i] = (uint16_t)(bits >> 16);
  else ((int8_t *)to)[i] = (int8_t)x;
}

static void pack_dense(matrix *m) {
  const int columns = m->packed.columns, panels = (m->packed.rows + OPFA_PANEL - 1) / OPFA_PANEL;
  float *to = take((size_t)panels * OPFA_PANEL * columns, sizeof *to);
  m->packed.values = to;
  for (int row = 0; row < panels * OPFA_PANEL; row++)
    for (int c = 0; c < columns; c++)
      to[(row / OPFA_PANEL * columns + c) * OPFA_PANEL + row % OPFA_PANEL] =
          row < m->packed.rows ? m->plain[(size_t)row * columns + c] : 0;
}

static void pack_sparse(matrix *m) {
  opfa_matrix *p = &m->packed;
  const int blocks = (p->rows + p->block - 1) / p->block, tiles = (p->columns + p->tile - 1) / p->tile;
  size_t live = 0, visits = 0, entry = 0, visit = 0;
  for (size_t i = 0; i < (size_t)p->rows * p->columns; i++) live += m->plain[i] != 0;
  uint32_t *starts = take((size_t)blocks * tiles + 1, 4), *entries = take((size_t)blocks + 1, 4);
  uint8_t *seen = take((size_t)p->rows * tiles * 2, 1), *indices = take(live, 1);
  void *weights = take(live, p->dtype == OPFA_FP32 ? 4 : p->dtype == OPFA_BF16 ? 2 : 1);
  for (int place = 0; place < blocks * tiles; place++) {
    const int first = place / tiles * p->block, from = place % tiles * p->tile;
    if (place % tiles == 0) entries[place / tiles] = (uint32_t)entry;
    starts[place] = (uint32_t)visit;
    for (int wanted = p->tile; wanted > 0; wanted--) /* by falling count */
      for (int row = first; row < first + p->block && row < p->rows; row++) {
        int count = 0;
        for (int c = from; c < from + p->tile && c < p->columns; c++)
          count += m->plain[(size_t)row * p->columns + c] != 0;
        if (count != wanted) continue;
        seen[2 * visit] = (uint8_t)(row - first), seen[2 * visit + 1] = (uint8_t)count, visit++;
        for (int c = from; c < from + p->tile && c < p->columns; c++)
          if (m->plain[(size_t)row * p->columns + c] != 0)
            put(p, weights, entry, m->plain[(size_t)row * p->columns + c]), indices[entry++] = (uint8_t)(c - from);
      }
  }
  starts[blocks * tiles] = (uint32_t)(visits = visit), entries[blocks] = (uint32_t)entry;
  uint8_t *exact = take(2 * visits, 1);
  memcpy(exact, seen, 2 * visits);
  p->starts = starts, p->entries = entries, p->visits = exact, p->indices = indices, p->values = weights;
  if (opfa_check(p, visits, live)) printf("opfa_check refuses a good matrix\n"), exit(1);
}

/* As AMX wants it: 64 bytes may be read behind the last weight. */
static void pack_masks(matrix *m) {
  opfa_matrix *p = &m->masks;
  *p = m->packed;
  const int wide = p->dtype == OPFA_BF16 ? 2 : 1, groups = (p->rows + 15) / 16;
  p->block = 128, p->tile = 64 / wide;
  const int tiles = (p->columns + p->tile - 1) / p->tile;
  size_t live = 0, bit = 0;
  for (size_t i = 0; i < (size_t)p->rows * p->columns; i++) live += m->plain[i] != 0;
  uint32_t *entries = take((size_t)groups + 1, 4);
  uint8_t *masks = take((size_t)groups * tiles * 16, (size_t)p->tile / 8);
  char *weights = take(live * wide + 64, 1);
  memset(masks, 0, (size_t)groups * tiles * 16 * p->tile / 8), memset(weights, 0, live * wide + 64);
  live = 0;
  for (int group = 0; group < groups; group++) {
    entries[group] = (uint32_t)live;
    for (int i = 0; i < tiles * 16; i++) {
      const int row = group * 16 + i % 16, from = i / 16 * p->tile;
      for (int c = from; c < from + p->tile; c++, bit++) {
        if (row >= p->rows || c >= p->columns || m->plain[(size_t)row * p->columns + c] == 0) continue;
        masks[bit / 8] |= (uint8_t)(1 << bit % 8);
        put(p, weights, live++, m->plain[(size_t)row * p->columns + c]);
      }
    }
  }
  entries[groups] = (uint32_t)live;
  p->starts = NULL, p->visits = p->indices = NULL;
  p->entries = entries, p->masks = masks, p->values = weights;
  if (opfa_check(p, 0, live)) printf("opfa_check refuses good masks\n"), exit(1);
}

static opfa_matrix *random_matrix(int dtype, int rows, int columns) {
  static const float densities[] = {0, 0.01f, 0.1f, 0.1f, 0.15f, 0.3f, 0.6f, 1};
  const float density = densities[chance(8)];
  matrix *m = take(1, sizeof *m);
  *m = (matrix){.packed = {.rows = rows, .columns = columns, .dtype = dtype}};
  m->plain = take((size_t)rows * columns, 4);
  const float scale = 1 / sqrtf(density * columns + 1);
  for (int row = 0; row < rows; row++) {
    const int is_empty = chance(10) == 0;
    for (int c = 0; c < columns; c++) {
      const float x = !is_empty && chance(1000) < density * 1000 ? value() * scale : 0;
      m->plain[(size_t)row * columns + c] =
          dtype == OPFA_FP32 ? x : dtype == OPFA_BF16 ? to_bf16(x) : roundf(x / scale * 74);
    }
  }
  if (chance(4)) m->packed.bias = values((size_t)rows, 1);
  if (dtype == OPFA_INT8) m->packed.scales = values((size_t)rows, scale / 74);
  if (dtype == OPFA_FP32 && chance(3) == 0) pack_dense(m);
  else {
    const int usual = (int)chance(2);
    m->packed.block = usual ? 128 : from_to(1, 256), m->packed.tile = usual ? 192 : from_to(1, 255);
    pack_sparse(m);
  }
  m->visits = m->packed;
  if (dtype != OPFA_FP32) pack_masks(m);
  return &m->packed;
}

/* ---- Networks ------------------------------------------------------------------------------- */

typedef struct {
  opfa_program program;
  opfa_step steps[MOST_STEPS];
  opfa_buffer buffers[MOST_STEPS];
  int channels[MOST_STEPS]; /* of the buffers that are used; there are at least 64 */
  opfa_call call;
  int width, num_rows; /* of the output */
  int entries;         /* of the tables */
  int dtype;           /* of the matrices */
  double tolerance;
} network;

static int buffer(network *n, int channels) {
  const int room = channels < 64 ? 64 : channels;
  n->channels[n->program.num_buffers] = channels;
  n->buffers[n->program.num_buffers] = (opfa_buffer){n->program.channels, room};
  n->program.channels += room;
  return n->program.num_buffers++;
}
static opfa_step *add(network *n, int kind, int in, int out) {
  opfa_step *s = n->steps + n->program.num_steps++;
  *s = (opfa_step){.kind = kind, .in = in, .out = out, .residual = -1};
  if (kind != OPFA_LINEAR) s->channels = n->channels[kind == OPFA_STORE ? in : out];
  return s;
}
static int load(network *n, int channels) {
  const int out = buffer(n, channels);
  add(n, OPFA_LOAD, 0, out);
  return out;
}
static int embed(network *n, int channels) {
  const int out = buffer(n, channels), num_tables = from_to(1, OPFA_TABLES);
  opfa_step *s = add(n, OPFA_EMBED, 0, out);
  for (int i = 0; i < num_tables; i++) s->tables[i] = values((size_t)n->entries * channels, 1);
  return out;
}
static int norm(network *n, int in) {
  const int channels = n->channels[in], out = buffer(n, channels);
  opfa_step *s = add(n, OPFA_NORM, in, out);
  s->epsilon = 1e-5f, s->weight = values((size_t)channels, 1);
  if (chance(2)) s->bias = values((size_t)channels, 1);
  return out;
}
static void give_form(opfa_step *s, int form) {
  s->form = form;
  if (form == OPFA_INT8) s->inverse = 10 + value(), s->zero = (float)from_to(0, 255);
}
static opfa_step *linear_into(network *n, int in, int out, int first, int rows) {
  opfa_step *s = add(n, OPFA_LINEAR, in, out);
  s->matrix = random_matrix(n->dtype, rows, n->channels[in]);
  s->first[0] = first;
  return s;
}
static int narrow(network *n, int in) {
  if (n->dtype == OPFA_FP32) return in;
  const int out = buffer(n, n->channels[in]);
  give_form(add(n, OPFA_NARROW, in, out), n->dtype);
  return out;
}
static int linear(network *n, int in, int rows, int residual) {
  const int out = buffer(n, rows), input = narrow(n, in);
  opfa_step *s = linear_into(n, input, out, 0, rows);
  s->activation = (int)chance(OPFA_TANH + 1), s->residual = residual;
  return out;
}
/* Two layers, of which the first writes the input of the second. */
static int two_linear(network *n, int in, int middle, int rows, int residual) {
  if (n->dtype == OPFA_FP32) return linear(n, linear(n, in, middle, -1), rows, residual);
  const int between = buffer(n, middle), out = buffer(n, rows);
  opfa_step *s = linear_into(n, narrow(n, in), between, 0, middle);
  s->activation = (int)chance(OPFA_TANH + 1);
  give_form(s, n->dtype);
  linear_into(n, between, out, 0, rows)->residual = residual;
  n->tolerance = NARROW_TOLERANCE;
  return out;
}
/* Two layers side by side; int8 without anything else gives the integers of the sums. */
static int beside(network *n, int in, int rows, int is_integer) {
  const int out = buffer(n, 2 * rows), input = narrow(n, in);
  for (int i = 0; i < 2; i++) {
    opfa_matrix *m = (opfa_matrix *)linear_into(n, input, out, i * rows, rows)->matrix;
    if (n->dtype != OPFA_INT8 || !is_integer) continue;
    float *ones = take((size_t)rows, sizeof *ones);
    for (int r = 0; r < rows; r++) ones[r] = 1;
    m->scales = ones, m->bias = NULL, n->tolerance = 0;
    ((matrix *)m)->visits = *m, ((matrix *)m)->masks.scales = ones, ((matrix *)m)->masks.bias = NULL;
  }
  return out;
}
static int attention(network *n, int in, int heads, int is_rotated) {
  const int channels = n->channels[in] / 3, out = buffer(n, channels);
  if (is_rotated) {
    opfa_step *r = add(n, OPFA_ROTARY, in, in);
    r->channels = channels, r->heads = heads, r->first[1] = channels;
    const size_t size = (size_t)(n->call.tokens * (channels / heads / 2));
    r->tables[0] = values(size, 0.5f), r->tables[1] = values(size, 0.5f);
  }
  opfa_step *s = add(n, OPFA_ATTENTION, in, out);
  s->heads = heads, s->scale = 1 / sqrtf((float)(channels / heads));
  s->first[1] = channels, s->first[2] = 2 * channels;
  if (chance(2)) s->window = from_to(1, 100);
  return out;
}
static int gate(network *n, int in) {
  const int channels = n->channels[in] / 2, out = buffer(n, channels);
  opfa_step *s = add(n, OPFA_GATE, in, out);
  s->first[1] = channels, s->activation = (int)chance(OPFA_TANH + 1);
  return out;
}

/* Sequences of 1 or more tokens each, whose rows in the input and the output are anywhere. */
static void random_call(network *n, int tokens) {
  int32_t *starts = take((size_t)tokens + 1, 4), *rows, sequences = 0;
  static const int most[] = {1, 20, 130, 700, 5000};
  const int longest = most[chance(5)];
  for (starts[0] = 0; starts[sequences] < tokens; sequences++) {
    const int left = tokens - starts[sequences], length = from_to(1, longest);
    starts[sequences + 1] = starts[sequences] + (length < left ? length : left);
  }
  n->num_rows = tokens + (int)chance(20), n->entries = from_to(1, 50);
  n->call = (opfa_call){.tokens = tokens, .sequences = sequences, .starts = starts};
  for (int i = 0; i < OPFA_TABLES; i++) {
    int32_t *ids = take((size_t)tokens, 4);
    for (int t = 0; t < tokens; t++) ids[t] = (int32_t)chance((uint32_t)n->entries);
    n->call.ids[i] = ids;
  }
  if (chance(4) == 0) return;
  n->call.rows = rows = take((size_t)n->num_rows, 4);
  for (int i = 0; i < n->num_rows; i++) rows[i] = i;
  for (int i = n->num_rows - 1; i > 0; i--) {
    const int other = (int)chance((uint32_t)i + 1), row = rows[i];
    rows[i] = rows[other], rows[other] = row;
  }
}

static int whole_layer(network *n) {
  const int heads = from_to(1, 3), channels = heads * 2 * from_to(1, 16);
  const int x = norm(n, embed(n, channels));
  const int y = linear(n, attention(n, linear(n, x, 3 * channels, -1), heads, (int)chance(2)), channels, x);
  const int z = norm(n, y);
  n->tolerance = n->dtype == OPFA_FP32 ? TOLERANCE : NARROW_TOLERANCE;
  if (chance(2)) return norm(n, two_linear(n, z, 4 * channels, channels, z));
  return norm(n, linear(n, gate(n, linear(n, z, 4 * channels, -1)), channels, z));
}

static void random_network(network *n, int tokens) {
  *n = (network){.tolerance = TOLERANCE, .dtype = (int)chance(3)};
  n->program.group = n->dtype == OPFA_FP32 && chance(2) ? 16 : 32;
  random_call(n, tokens);
  int out = 0, size, heads;
  switch (chance(8)) {
    case 0: out = linear(n, load(n, from_to(1, 500)), from_to(1, 400), -1); break;
    case 1:
      size = from_to(1, 300);
      out = linear(n, load(n, from_to(1, 300)), size, embed(n, size));
      break;
    case 2:
      heads = from_to(1, 3), size = 2 * from_to(1, chance(4) ? 40 : 128);
      out = attention(n, load(n, 3 * heads * size), heads, (int)chance(2));
      break;
    case 3: out = gate(n, load(n, 2 * from_to(1, 200))); break;
    case 4: out = norm(n, embed(n, from_to(2, 300))); break;
    case 5: out = whole_layer(n); break;
    case 6: out = beside(n, load(n, from_to(1, 500)), from_to(1, 300), (int)chance(2)); break;
    case 7:
      size = from_to(1, 300);
      out = two_linear(n, load(n, from_to(1, 300)), from_to(1, 400), size, embed(n, size));
      break;
  }
  add(n, OPFA_STORE, out, out);
  n->width = n->channels[out];
  n->program.steps = n->steps, n->program.buffers = n->buffers;
  int widest = 0;
  for (int i = 0; i < n->program.num_buffers; i++)
    if (n->channels[i] > widest) widest = n->channels[i];
  n->call.input = values((size_t)n->num_rows * widest, 1);
}

/* ---- The same in double precision ------------------------------------------------------------ */

static double activated(int activation, double x) {
  switch (activation) {
    case OPFA_GELU: return x / 2 * erfc(-x / sqrt(2));
    case OPFA_GELU_TANH: return x / 2 * (1 + tanh(sqrt(2 / 3.14159265358979) * (x + 0.044715 * x * x * x)));
    case OPFA_RELU: return x > 0 ? x : 0;
    case OPFA_SILU: return x / (1 + exp(-x));
    case OPFA_TANH: return tanh(x);
    default: return x;
  }
}

/* One token's attention; buffers are [tokens][channels]. */
static void attend(const opfa_step *s, int from, int to, int token, const double *in, int width, double *out) {
  const int size = s->channels / s->heads;
  double *p = malloc(sizeof *p * (size_t)(to - from));
  for (int head = 0; head < s->heads; head++) {
    double best = -INFINITY, sum = 0;
    for (int k = from; k < to; k++) {
      p[k - from] = s->window && abs(k - token) > s->window ? -INFINITY : 0;
      for (int c = head * size; c < (head + 1) * size; c++)
        p[k - from] += in[(size_t)token * width + c] * in[(size_t)k * width + s->first[1] + c] * s->scale;
      best = fmax(best, p[k - from]);
    }
    for (int k = from; k < to; k++) sum += p[k - from] = exp(p[k - from] - best);
    for (int c = head * size; c < (head + 1) * size; c++) {
      double y = 0;
      for (int k = from; k < to; k++) y += p[k - from] * in[(size_t)k * width + s->first[2] + c];
      out[c] = y / sum;
    }
  }
  free(p);
}

/* The values of a form, as fp32 arithmetic gives them. */
static double formed(const opfa_step *s, double x) {
  if (s->form == OPFA_FP32) return x;
  if (s->form == OPFA_BF16) return to_bf16((float)x);
  return fminf(fmaxf(nearbyintf((float)x * s->inverse) + s->zero, 0), 255);
}

static void step_of_token(const network *n, const opfa_step *s, double **b, int token, int from, int to) {
  const opfa_call *call = &n->call;
  const int wide = n->channels[s->in], row = call->rows ? call->rows[token] : token;
  const double *x = b[s->in] + (size_t)token * wide;
  double *y = b[s->out] + (size_t)token * n->channels[s->out], mean = 0, squares = 0;
  switch (s->kind) {
    case OPFA_EMBED:
      for (int c = 0; c < s->channels; c++) {
        y[c] = 0;
        for (int i = 0; i < OPFA_TABLES; i++)
          if (s->tables[i]) y[c] += s->tables[i][(size_t)call->ids[i][token] * s->channels + c];
      }
      break;
    case OPFA_LOAD:
      for (int c = 0; c < s->channels; c++) y[c] = call->input[(size_t)row * s->channels + c];
      break;
    case OPFA_NORM:
      for (int c = 0; c < s->channels; c++) mean += x[c] / s->channels;
      for (int c = 0; c < s->channels; c++) squares += (x[c] - mean) * (x[c] - mean) / s->channels;
      for (int c = 0; c < s->channels; c++)
        y[c] = (x[c] - mean) / sqrt(squares + s->epsilon) * s->weight[c] + (s->bias ? s->bias[c] : 0);
      break;
    case OPFA_LINEAR: {
      const matrix *m = (const matrix *)s->matrix;
      for (int r = 0; r < m->packed.rows; r++) {
        double sum = 0;
        for (int c = 0; c < wide; c++) sum += m->plain[(size_t)r * wide + c] * x[c];
        if (m->packed.scales) sum *= m->packed.scales[r];
        if (m->packed.bias) sum += m->packed.bias[r];
        if (s->residual >= 0) sum += b[s->residual][(size_t)token * n->channels[s->residual] + r];
        y[s->first[0] + r] = formed(s, activated(s->activation, sum));
      }
      break;
    }
    case OPFA_NARROW:
      for (int c = 0; c < s->channels; c++) y[c] = formed(s, x[c]);
      break;
    case OPFA_ATTENTION: attend(s, from, to, token, b[s->in], wide, y); break;
    case OPFA_ROTARY: {
      const int half = s->channels / s->heads / 2;
      for (int i = 0; i < 2 * s->heads * half; i++) {
        double *left = y + s->first[i / (s->heads * half)] + i % (s->heads * half) / half * 2 * half + i % half;
        const int p = (token - from) * half + i % half;
        const double l = left[0], r = left[half];
        left[0] = l * s->tables[0][p] - r * s->tables[1][p];
        left[half] = r * s->tables[0][p] + l * s->tables[1][p];
      }
      break;
    }
    case OPFA_GATE:
      for (int c = 0; c < s->channels; c++) y[c] = activated(s->activation, x[c]) * x[s->first[1] + c];
  }
}

/* The output [tokens][width] of a network. */
static const double *reference(const network *n) {
  double *b[MOST_STEPS];
  for (int i = 0; i < n->program.num_buffers; i++)
    b[i] = take((size_t)n->call.tokens * n->channels[i], sizeof **b);
  for (int i = 0; i < n->program.num_steps - 1; i++)
    for (int s = 0; s < n->call.sequences; s++)
      for (int token = n->call.starts[s]; token < n->call.starts[s + 1]; token++)
        step_of_token(n, n->steps + i, b, token, n->call.starts[s], n->call.starts[s + 1]);
  return b[n->steps[n->program.num_steps - 1].in];
}

/* ---- Checks --------------------------------------------------------------------------------- */

#define UNTOUCHED 12345.0f

/* Runs a network in a workspace of NaN, as long as it has to be, and gives its output
 * [num_rows][width]. */
static float *run(const network *n, opfa_pool *pool) {
  const size_t size = (size_t)opfa_workspace(&n->program, n->call.tokens);
  const size_t num_outputs = (size_t)n->num_rows * n->width;
  void *memory = NULL;
  if (posix_memalign(&memory, 64, size * 4)) abort();
  memset(memory, 0xff, size * 4); /* NaN */
  float *output = malloc(num_outputs * sizeof *output);
  for (size_t i = 0; i < num_outputs; i++) output[i] = UNTOUCHED;
  opfa_call call = n->call;
  call.workspace = memory, call.output = output;
  if (opfa_run(&n->program, &call, pool)) printf("opfa_run: no memory\n"), exit(1);
  free(memory);
  return output;
}

static double worst_error(const network *n, const double *wanted, const float *got) {
  char *is_token = calloc((size_t)n->num_rows, 1);
  double largest = 1, worst = 0;
  for (int t = 0; t < n->call.tokens; t++) {
    const int row = n->call.rows ? n->call.rows[t] : t;
    is_token[row] = 1;
    for (int c = 0; c < n->width; c++) {
      const double right = wanted[(size_t)t * n->width + c], error = fabs(got[(size_t)row * n->width + c] - right);
      largest = fmax(largest, fabs(right));
      if (!(error <= worst)) worst = error; /* NaN too */
    }
  }
  for (int row = 0; row < n->num_rows; row++)
    for (int c = 0; c < n->width && !is_token[row]; c++)
      if (got[(size_t)row * n->width + c] != UNTOUCHED) worst = NAN;
  free(is_token);
  return worst / largest;
}

static void fail(const network *n, const char *level, const char *what, double error) {
  printf("%s, dtype %d: %s, error %g; tokens %d, sequences %d, steps", level, n->dtype, what, error,
         n->call.tokens, n->call.sequences);
  for (int i = 0; i < n->program.num_steps; i++) {
    const opfa_step *s = n->steps + i;
    printf(" %d[%d", s->kind, n->channels[s->out]);
    if (s->matrix) printf(" of %d, block %d, tile %d", s->matrix->columns, s->matrix->block, s->matrix->tile);
    printf(", activation %d, heads %d, window %d]", s->activation, s->heads, s->window);
  }
  printf("\n");
  exit(1);
}

typedef struct {
  const network *n;
  opfa_pool *pool;
  const float *wanted;
  int is_same;
} caller;

static void *call_often(void *argument) {
  caller *mine = argument;
  mine->is_same = 1;
  for (int i = 0; i < 3; i++) {
    float *got = run(mine->n, mine->pool);
    mine->is_same &= !memcmp(got, mine->wanted, sizeof *got * (size_t)mine->n->num_rows * mine->n->width);
    free(got);
  }
  return NULL;
}

/* Several callers at once, on shared pools of 1, 2 and 4 threads. */
static int callers_agree(const network *n, opfa_pool **pools, const float *wanted) {
  caller callers[CALLERS];
  pthread_t threads[CALLERS];
  int agree = 1;
  for (int i = 0; i < CALLERS; i++) {
    callers[i] = (caller){n, pools[i % 3], wanted, 0};
    if (pthread_create(threads + i, NULL, call_often, callers + i)) abort();
  }
  for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL), agree &= callers[i].is_same;
  return agree;
}

static void check(const network *n, char *level_names, opfa_pool **pools, double *worst) {
  static int number;
  const double *wanted = reference(n);
  char names[128], *rest = NULL;
  strcpy(names, level_names);
  int i = 0;
  for (char *level = strtok_r(names, " ", &rest); level; level = strtok_r(NULL, " ", &rest), i++) {
    if (opfa_choose(level)) printf("%s: refused\n", level), exit(1);
    if (strcmp(opfa_level(), level)) printf("%s: %s is used\n", level, opfa_level()), exit(1);
    for (int s = 0; s < n->program.num_steps; s++) {
      matrix *m = (matrix *)n->steps[s].matrix;
      if (m) m->packed = m->packed.dtype == OPFA_FP32 || strcmp(level, "amx") ? m->visits : m->masks;
    }
    float *first = run(n, pools[0]);
    const double error = worst_error(n, wanted, first);
    if (!(error <= n->tolerance)) fail(n, level, "differs from double precision", error);
    if (n->tolerance == TOLERANCE && error > worst[i]) worst[i] = error;
    for (int p = 1; p < 3; p++) {
      float *got = run(n, pools[p]);
      if (memcmp(got, first, sizeof *got * (size_t)n->num_rows * n->width))
        fail(n, level, p == 1 ? "2 threads give other bits" : "4 threads give other bits", 0);
      free(got);
    }
    if (number % 4 == 0 && !callers_agree(n, pools, first)) fail(n, level, "callers get other bits", 0);
    free(first);
  }
  number++;
}

/* ---- Training ------------------------------------------------------------------------------- */

/* Numbers of a type as rows have them; `wide` gets what they are. */
static void *rows_of(int dtype, size_t count, double *wide) {
  void *found = take(count, dtype == OPFA_FP64 ? 8 : dtype == OPFA_FP32 ? 4 : 2);
  for (size_t i = 0; i < count; i++) {
    const float x = dtype == OPFA_BF16 ? to_bf16(value()) : value();
    uint32_t bits;
    memcpy(&bits, &x, 4);
    wide[i] = x;
    if (dtype == OPFA_FP64) ((double *)found)[i] = x;
    else if (dtype == OPFA_FP32) ((float *)found)[i] = x;
    else ((uint16_t *)found)[i] = (uint16_t)(bits >> 16);
  }
  return found;
}
static double number_at(int dtype, const void *from, size_t i) {
  if (dtype == OPFA_FP64) return ((const double *)from)[i];
  if (dtype == OPFA_FP32) return ((const float *)from)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static double distance_of(int dtype, const void *got, const double *wanted, size_t count) {
  double largest = 1e-30, worst = 0;
  for (size_t i = 0; i < count; i++) {
    const double error = fabs(number_at(dtype, got, i) - wanted[i]);
    largest = fmax(largest, fabs(wanted[i]));
    if (!(error <= worst)) worst = error;
  }
  return worst / largest;
}

/* Places [live] of the weights of a packed matrix, in their order. */
static uint32_t *places_of(const opfa_matrix *m, size_t *live) {
  const int blocks = (m->rows + m->block - 1) / m->block, tiles = (m->columns + m->tile - 1) / m->tile;
  uint32_t *found = take(m->entries[blocks], sizeof *found);
  size_t entry = 0;
  for (int place = 0; place < blocks * tiles; place++)
    for (uint32_t v = m->starts[place]; v < m->starts[place + 1]; v++)
      for (int i = 0; i < m->visits[2 * v + 1]; i++, entry++)
        found[entry] = (uint32_t)((place / tiles * m->block + m->visits[2 * v]) * m->columns +
                                  place % tiles * m->tile + m->indices[entry]);
  *live = entry;
  return found;
}

/* A sparse layer's pass forward and back, at every level, with any of the gradients. */
static void check_product(int tokens, char *level_names, opfa_pool **pools, double *worst) {
  static const float densities[] = {0, 0.02f, 0.1f, 0.1f, 0.3f, 1};
  static const int dtypes[] = {OPFA_FP32, OPFA_FP32, OPFA_BF16, OPFA_FP64};
  const int dtype = dtypes[chance(4)], rows = from_to(1, 200), columns = from_to(1, 200);
  const float density = densities[chance(6)];
  matrix m = {.packed = {.rows = rows, .columns = columns, .block = from_to(1, 255), .tile = from_to(1, 255)}};
  matrix back = {.packed = {.rows = columns, .columns = rows, .block = from_to(1, 255), .tile = from_to(1, 255)}};
  const size_t size = (size_t)rows * columns, ins = (size_t)tokens * columns, outs = (size_t)tokens * rows;
  m.plain = take(size, 4), back.plain = take(size, 4);
  for (size_t i = 0; i < size; i++) {
    m.plain[i] = (float)chance(1000) < density * 1000 ? value() + 3 : 0; /* never 0 by chance */
    back.plain[i % columns * rows + i / columns] = m.plain[i];
  }
  pack_sparse(&m), pack_sparse(&back);
  size_t live;
  const uint32_t *places = places_of(&m.packed, &live);
  double *x = take(ins, 8), *g = take(outs, 8), *bias = take(rows, 8), *y = take(outs, 8), *dx = take(ins, 8),
         *dw = take(live, 8), *db = take(rows, 8);
  const int exact = dtype == OPFA_FP64 ? OPFA_FP64 : OPFA_FP32;
  const void *rows_in = rows_of(dtype, ins, x), *rows_g = rows_of(dtype, outs, g), *biases = rows_of(exact, rows, bias);
  memset(dx, 0, 8 * ins), memset(db, 0, 8 * (size_t)rows), memset(dw, 0, 8 * live);
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < rows; r++) y[(size_t)t * rows + r] = bias[r], db[r] += g[(size_t)t * rows + r];
  double *wide = take(live, 8);
  for (size_t i = 0; i < live; i++) {
    const int r = (int)places[i] / columns, c = (int)places[i] % columns;
    wide[i] = m.plain[places[i]];
    for (int t = 0; t < tokens; t++) {
      y[(size_t)t * rows + r] += wide[i] * x[(size_t)t * columns + c];
      dx[(size_t)t * columns + c] += wide[i] * g[(size_t)t * rows + r];
      dw[i] += g[(size_t)t * rows + r] * x[(size_t)t * columns + c];
    }
  }
  opfa_matrix forward = m.packed;
  if (exact == OPFA_FP64) forward.values = wide;
  const int wanted = from_to(1, 7), bytes = dtype == OPFA_FP64 ? 8 : dtype == OPFA_FP32 ? 4 : 2;
  const size_t one = exact == OPFA_FP64 ? 8 : 4;
  const size_t sizes[] = {outs * bytes, ins * bytes, live * one, rows * one};
  char names[128], *rest = NULL;
  strcpy(names, level_names);
  int i = 0;
  for (char *level = strtok_r(names, " ", &rest); level; level = strtok_r(NULL, " ", &rest), i++) {
    opfa_choose(level);
    void *first[4] = {0};
    for (int p = 0; p < 3; p++) {
      void *got[4];
      for (int k = 0; k < 4; k++) got[k] = malloc(sizes[k] ? sizes[k] : 1);
      for (int is_back = 0; is_back < 2; is_back++) {
        opfa_matrix with_bias = forward;
        with_bias.bias = is_back ? NULL : biases;
        opfa_product product = {.tokens = tokens, .dtype = dtype, .matrix = &with_bias, .across = &back.packed, .input = rows_in,
                                .output = is_back ? (void *)rows_g : got[0]};
        if (is_back && wanted & 1) product.input_gradient = got[1];
        if (is_back && wanted & 2) product.gradient = got[2];
        if (is_back && wanted & 4) product.bias_gradient = got[3];
        const size_t floats = (size_t)opfa_product_workspace(&product, is_back, pools[p]);
        char *memory = malloc(floats * 4 + 64);
        product.workspace = (float *)(memory + (64 - (uintptr_t)memory % 64) % 64);
        if ((is_back ? opfa_backward : opfa_forward)(&product, pools[p])) abort();
        free(memory);
      }
      const double *right[] = {y, dx, dw, db};
      const size_t counts[] = {outs, ins, live, (size_t)rows};
      for (int k = 0; k < 4; k++) {
        if (k && !(wanted >> (k - 1) & 1)) continue;
        const int kind = k < 2 ? dtype : exact;
        const double limit = kind == OPFA_BF16 ? 1e-2 : kind == OPFA_FP64 ? 1e-12 : TOLERANCE;
        const double error = distance_of(kind, got[k], right[k], counts[k]);
        if (!(error <= limit)) printf("%s: training, number %d of dtype %d: error %g\n", level, k, dtype, error), exit(1);
        if (kind == OPFA_FP32 && error > worst[i]) worst[i] = error;
        if (p && memcmp(got[k], first[k], sizes[k])) printf("%s: training, other threads, other bits\n", level), exit(1);
      }
      for (int k = 0; k < 4; k++) {
        if (p) free(got[k]);
        else first[k] = got[k];
      }
    }
    for (int k = 0; k < 4; k++) free(first[k]);
  }
}

static long resident_pages(void) {
  long all = 0, resident = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (file && fscanf(file, "%ld %ld", &all, &resident) != 2) resident = 0;
  if (file) fclose(file);
  return resident;
}

/* Kilobytes that 10,000 calls and 1,000 pools leave behind. */
static long leaked(int calls) {
  network n;
  do drop_all(), random_network(&n, 40);
  while (n.width > 100);
  long before = 0;
  for (int i = 0; i < calls + calls / 5; i++) {
    if (i == calls / 5) before = resident_pages(); /* what an allocator keeps is there by now */
    opfa_pool *pool = i % 10 ? NULL : opfa_pool_new(from_to(1, 4));
    static opfa_pool *kept;
    if (!kept) kept = opfa_pool_new(2);
    free(run(&n, pool ? pool : kept));
    opfa_pool_free(pool);
  }
  return (resident_pages() - before) * (sysconf(_SC_PAGESIZE) / 1024);
}

int main(int argc, char **argv) {
  const int networks = argc > 1 ? atoi(argv[1]) : 100, calls = networks < 100 ? 2000 : 10000;
  state = argc > 2 ? strtoull(argv[2], NULL, 10) * 2 + 1 : 1;
  if (opfa_abi() != OPFA_ABI) printf("the library has another interface\n"), exit(1);
  opfa_pool *pools[] = {opfa_pool_new(1), opfa_pool_new(2), opfa_pool_new(4)};
  static const int sizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 200};
  char levels[128], *rest = NULL;
  strcpy(levels, opfa_levels());
  double worst[8] = {0};
  for (int i = 0; i < networks; i++) {
    network n;
    random_network(&n, i % 40 == 39 ? 4096 : sizes[chance(16)]);
    check(&n, levels, pools, worst);
    drop_all();
    check_product(i % 40 == 39 ? 1500 : sizes[chance(16)], levels, pools, worst);
    drop_all();
  }
  if (!opfa_choose("no such level")) printf("an unknown level is accepted\n"), exit(1);
  int i = 0;
  for (char *level = strtok_r(levels, " ", &rest); level; level = strtok_r(NULL, " ", &rest))
    printf("%s: %d networks, largest error %.1e\n", level, networks, worst[i++]);
  for (i = 0; i < 3; i++) opfa_pool_free(pools[i]);
  const long kilobytes = leaked(calls);
  printf("%d calls and %d pools: %ld KB left behind\n", calls, calls / 10, kilobytes);
  drop_all();
  return kilobytes > (argc > 3 ? atol(argv[3]) : 512);
}
