/* Runs a program step by step on a pool of threads, with the best instructions that the CPU has. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "exact.h"

#define SPIN_SECONDS 50e-6

double opfa_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* ---- Levels -------------------------------------------------------------------------------- */

extern const opfa_ops opfa_ops_plain;
#if defined(__x86_64__)
extern const opfa_ops opfa_ops_amx, opfa_ops_avx512bf16, opfa_ops_avx512vnni, opfa_ops_avx512,
    opfa_ops_avx2;
#endif

/* What the CPU has and the system keeps for each thread. By hand: where zig's clang compiles,
 * __builtin_cpu_supports denies everything. */
#if defined(__x86_64__)
static unsigned xcr0(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return a;
}

static int has_avx2(void) {
  unsigned a, b, c, d;
  return (xcr0() & 0x06) == 0x06 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && b & bit_AVX2;
}

static int has_avx512(void) {
  unsigned a, b, c, d;
  const unsigned all = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  return has_avx2() && (xcr0() & 0xe6) == 0xe6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (b & all) == all;
}

static int has_vnni(void) {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && c & bit_AVX512VNNI;
}

static int has_bf16(void) {
  unsigned a, b, c, d;
  return has_vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
         a & 1u << 5; /* old headers have no name for it */
}

/* The system must also allow a process to use the tiles, which make its threads' state large. */
static int has_amx(void) {
#if defined(__linux__)
  unsigned a, b, c, d;
  const unsigned all = 1u << 22 | 1u << 24 | 1u << 25; /* bf16, tiles, int8 */
  if (!has_bf16() || (xcr0() >> 17 & 3) != 3) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c & bit_AVX512VBMI2) || (d & all) != all)
    return 0;
  return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18);
#else
  return 0;
#endif
}
#endif

static int always(void) { return 1; }

static const struct level {
  const char *name;
  int (*is_there)(void);
  const opfa_ops *ops;
} levels[] = {
#if defined(__x86_64__)
#ifndef OPFA_WITHOUT_AMX /* what an old compiler doesn't know */
    {"amx", has_amx, &opfa_ops_amx},
#endif
#ifndef OPFA_WITHOUT_AVX512BF16
    {"avx512bf16", has_bf16, &opfa_ops_avx512bf16},
#endif
    {"avx512vnni", has_vnni, &opfa_ops_avx512vnni},
    {"avx512", has_avx512, &opfa_ops_avx512},
    {"avx2", has_avx2, &opfa_ops_avx2},
    {"plain", always, &opfa_ops_plain},
#elif defined(__aarch64__)
    {"neon", always, &opfa_ops_plain},
#else
    {"plain", always, &opfa_ops_plain},
#endif
};
enum { NUM_LEVELS = sizeof(levels) / sizeof(*levels) };
static _Atomic(const opfa_ops *) chosen;

int32_t opfa_abi(void) { return OPFA_ABI; }

const char *opfa_levels(void) {
  static char names[64];
  char found[64] = "";
  for (int i = 0; i < NUM_LEVELS; i++)
    if (levels[i].is_there()) strcat(strcat(found, *found ? " " : ""), levels[i].name);
  return strcpy(names, found);
}

int opfa_choose(const char *level) {
  for (int i = 0; i < NUM_LEVELS; i++)
    if (!strcmp(levels[i].name, level) && levels[i].is_there()) {
      chosen = levels[i].ops;
      return 0;
    }
  return -1;
}

static const struct level *current(void) {
  const opfa_ops *wanted = chosen;
  for (const struct level *l = levels;; l++)
    if (wanted ? l->ops == wanted : l->is_there()) return l;
}

const char *opfa_level(void) { return current()->name; }

static const opfa_ops *ops(void) { return current()->ops; }

double opfa_peak(void) { return ops()->peak(); }

/* ---- Threads ------------------------------------------------------------------------------- */

typedef struct {
  _Alignas(64) atomic_int_least64_t next;
  int64_t end;
} range;

typedef struct {
  opfa_work work;
  int threads;
  const opfa_ops *ops;
  range *ranges;       /* [steps][threads] */
  atomic_int *arrived; /* [steps] */
} job;

struct opfa_pool {
  int threads;
  pthread_t *handles;
  pthread_mutex_t calls, lock; /* one call at a time; the state below */
  pthread_cond_t wake;
  atomic_long epoch;
  atomic_int sleeping;
  atomic_int running;
  job *job;
  opfa_parallel parallel; /* or none: threads of its own */
  int (*index)(void), (*present)(void);
};

typedef struct {
  opfa_pool *pool;
  int index;
} seat;

/* Waits until *value is at least `wanted`: spins, then gives the core to others. */
static void await(atomic_int *value, int wanted) {
  double until = 0;
  for (int n = 0; atomic_load_explicit(value, memory_order_acquire) < wanted; n++) {
    relax();
    if (n % 64 != 63) continue;
    if (!until) until = opfa_now() + SPIN_SECONDS;
    if (opfa_now() > until) sched_yield();
  }
}

/* Each thread has a part of a step's items, and helps the others when it is done. */
static void take_part(job *j, int index, int present) {
  opfa_work work = j->work;
  work.thread = index;
  for (int n = 0; n < j->work.program->num_steps; n++) {
    const opfa_step *step = j->work.program->steps + n;
    range *ranges = j->ranges + (size_t)n * j->threads;
    for (int i = 0; i < j->threads; i++) {
      range *r = ranges + (index + i) % j->threads;
      for (;;) {
        const int64_t item = atomic_fetch_add_explicit(&r->next, 1, memory_order_relaxed);
        if (item >= r->end) break;
        j->ops->work[step->kind](&work, step, item);
      }
    }
    atomic_fetch_add_explicit(j->arrived + n, 1, memory_order_acq_rel);
    await(j->arrived + n, present);
  }
}

static void *worker(void *argument) {
  const seat mine = *(seat *)argument;
  free(argument);
  opfa_pool *pool = mine.pool;
  for (long seen = 0;; seen++) {
    const double until = opfa_now() + SPIN_SECONDS;
    while (atomic_load(&pool->epoch) == seen && opfa_now() < until) relax();
    if (atomic_load(&pool->epoch) == seen) {
      pthread_mutex_lock(&pool->lock);
      atomic_fetch_add(&pool->sleeping, 1);
      while (atomic_load(&pool->epoch) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
      atomic_fetch_sub(&pool->sleeping, 1);
      pthread_mutex_unlock(&pool->lock);
    }
    if (!pool->job) return NULL;
    take_part(pool->job, mine.index, pool->threads);
    atomic_fetch_sub(&pool->running, 1);
  }
}

static void start(opfa_pool *pool, job *j) {
  pool->job = j;
  atomic_store(&pool->running, pool->threads - 1);
  atomic_fetch_add(&pool->epoch, 1);
  if (atomic_load(&pool->sleeping)) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
  }
}

opfa_pool *opfa_pool_new(int32_t threads) {
  opfa_pool *pool = calloc(1, sizeof *pool);
  if (!pool || !(pool->handles = calloc((size_t)threads, sizeof *pool->handles))) {
    free(pool);
    return NULL;
  }
  pthread_mutex_init(&pool->calls, NULL);
  pthread_mutex_init(&pool->lock, NULL);
  pthread_cond_init(&pool->wake, NULL);
  for (pool->threads = 1; pool->threads < threads; pool->threads++) {
    seat *mine = malloc(sizeof *mine);
    if (mine) *mine = (seat){pool, pool->threads};
    if (!mine || pthread_create(pool->handles + pool->threads, NULL, worker, mine)) {
      free(mine);
      opfa_pool_free(pool);
      return NULL;
    }
  }
  return pool;
}

opfa_pool *opfa_pool_of(int32_t threads, opfa_parallel parallel, int (*index)(void),
                        int (*present)(void)) {
  opfa_pool *pool = calloc(1, sizeof *pool);
  if (!pool) return NULL;
  pthread_mutex_init(&pool->calls, NULL);
  pool->threads = threads;
  pool->parallel = parallel;
  pool->index = index;
  pool->present = present;
  return pool;
}

/* What one of others' threads does; there may be fewer than asked for. */
static void join(void *argument) {
  opfa_pool *pool = argument;
  take_part(pool->job, pool->index(), pool->present());
}

void opfa_pool_free(opfa_pool *pool) {
  if (!pool) return;
  if (pool->parallel) {
    free(pool);
    return;
  }
  start(pool, NULL);
  for (int i = 1; i < pool->threads; i++) pthread_join(pool->handles[i], NULL);
  free(pool->handles);
  free(pool);
}

/* ---- Runs ---------------------------------------------------------------------------------- */

static int32_t padded_to_groups(const opfa_program *program, int32_t tokens) {
  return (tokens + program->group - 1) / program->group * program->group;
}

int64_t opfa_workspace(const opfa_program *program, int32_t tokens) {
  return program->channels * padded_to_groups(program, tokens) +
         2 * OPFA_TILE; /* vectors may begin late */
}

static int64_t num_items(const opfa_work *w, const opfa_step *s) {
  switch (s->kind) {
    case OPFA_LINEAR: return (int64_t)opfa_blocks(s->matrix) * w->tiles;
    case OPFA_ATTENTION: return (int64_t)w->num_queries * s->heads;
    case OPFA_NORM:
    case OPFA_TIMES: return w->tiles;
    case OPFA_ACROSS: return opfa_partials(w->tiles);
    case OPFA_JOIN:
      return (opfa_live(s->product) + s->product->matrix->rows + OPFA_JOINED - 1) / OPFA_JOINED;
    case OPFA_NARROW: return (int64_t)w->tiles * OPFA_PARTS;
    case OPFA_ROTARY: return (int64_t)w->tiles * s->heads;
    default: return w->padded / OPFA_GROUP;
  }
}

/* The queries of each sequence by tiles, and the position of each token. */
static void split(opfa_work *w, opfa_queries *queries, int32_t *positions) {
  int n = 0;
  for (int s = 0; s < w->call->sequences; s++) /* none in training */
    for (int token = w->call->starts[s], end = w->call->starts[s + 1]; token < end;) {
      const int lane = token % OPFA_TILE;
      const int count = end - token < OPFA_TILE - lane ? end - token : OPFA_TILE - lane;
      queries[n++] = (opfa_queries){s, token / OPFA_TILE, lane, count};
      for (int i = 0; i < count; i++) positions[token + i] = token + i - w->call->starts[s];
      token += count;
    }
  w->num_queries = n;
  w->queries = queries;
  w->positions = positions;
}

int opfa_run(const opfa_program *program, const opfa_call *call, opfa_pool *pool) {
  const int threads = pool->threads, steps = program->num_steps;
  opfa_work w = {
      .program = program, .call = call, .padded = padded_to_groups(program, call->tokens)};
  w.tiles = (w.padded + OPFA_TILE - 1) / OPFA_TILE;
  opfa_queries *queries = malloc(sizeof *queries * (size_t)(call->sequences + w.tiles));
  int32_t *positions = malloc(sizeof *positions * (size_t)w.padded);
  range *ranges = aligned_alloc(64, sizeof *ranges * (size_t)(steps * threads));
  atomic_int *arrived = calloc((size_t)steps, sizeof *arrived);
  const int is_there = queries && positions && ranges && arrived;
  if (is_there) {
    split(&w, queries, positions);
    for (int n = 0; n < steps; n++) {
      const int64_t items = num_items(&w, program->steps + n);
      for (int i = 0; i < threads; i++) {
        atomic_init(&ranges[n * threads + i].next, items * i / threads);
        ranges[n * threads + i].end = items * (i + 1) / threads;
      }
    }
    job j = {w, threads, ops(), ranges, arrived};
    pthread_mutex_lock(&pool->calls);
    if (pool->parallel) {
      pool->job = &j;
      pool->parallel(join, pool, (unsigned)threads, 0);
    } else {
      if (threads > 1) start(pool, &j);
      take_part(&j, 0, threads);
      for (int n = 0; atomic_load(&pool->running); n++)
        if (n % 1024 == 1023)
          sched_yield();
        else
          relax();
    }
    pthread_mutex_unlock(&pool->calls);
  }
  free(queries);
  free(positions);
  free(ranges);
  free(arrived);
  return is_there ? 0 : -1;
}

/* ---- Training ------------------------------------------------------------------------------ */

/* Threads have room for a tile of the input, going back also for one of the output's gradient. The
 * parts of sums are at the beginning of the workspace, as if they were a buffer's. */
static int64_t scratch_of(const opfa_product *p, int is_back) {
  const int64_t channels = p->matrix->columns + (is_back ? p->matrix->rows : 0);
  return channels * OPFA_TILE;
}

static int64_t parts_of(const opfa_product *p, int is_back) {
  const int32_t tiles = (p->tokens + OPFA_TILE - 1) / OPFA_TILE;
  return is_back ? opfa_partial(p) * opfa_partials(tiles) : 0;
}

int64_t opfa_product_workspace(const opfa_product *p, int is_back, const opfa_pool *pool) {
  return parts_of(p, is_back) + scratch_of(p, is_back) * pool->threads;
}

static int run_product(const opfa_product *p, int is_back, opfa_pool *pool) {
  const opfa_step forward[] = {{.kind = OPFA_TIMES, .product = p}};
  const opfa_step back[] = {{.kind = OPFA_ACROSS, .product = p}, {.kind = OPFA_JOIN, .product = p}};
  const opfa_program program = {.num_steps = is_back ? 2 : 1,
                                .group = OPFA_GROUP,
                                .steps = is_back ? back : forward,
                                .scratch_start = parts_of(p, is_back),
                                .scratch = scratch_of(p, is_back)};
  const opfa_call call = {.tokens = p->tokens, .workspace = p->workspace};
  return opfa_run(&program, &call, pool);
}

int opfa_forward(const opfa_product *p, opfa_pool *pool) {
  if (p->dtype != OPFA_FP64) return run_product(p, 0, pool);
  opfa_forward_exact(p);
  return 0;
}

int opfa_backward(const opfa_product *p, opfa_pool *pool) {
  if (p->dtype != OPFA_FP64) return run_product(p, 1, pool);
  opfa_backward_exact(p);
  return 0;
}

#define TAKE(BYTES, TYPE) \
  case BYTES: \
    for (int64_t i = 0; i < count; i++) ((TYPE *)values)[i] = ((const TYPE *)whole)[places[i]]; \
    break;
#define PUT(BYTES, TYPE) \
  case BYTES: \
    for (int64_t i = 0; i < count; i++) ((TYPE *)whole)[places[i]] = ((const TYPE *)values)[i]; \
    break;

void opfa_take(int32_t bytes, const void *whole, const int32_t *places, int64_t count,
               void *values) {
  switch (bytes) { TAKE(2, uint16_t) TAKE(4, uint32_t) TAKE(8, uint64_t) }
}

void opfa_put(int32_t bytes, void *whole, const int32_t *places, int64_t count,
              const void *values) {
  switch (bytes) { PUT(2, uint16_t) PUT(4, uint32_t) PUT(8, uint64_t) }
}

/* ---- What is packed ------------------------------------------------------------------------ */

/* The masks of each group of rows have as many bits as it has weights. */
static int check_masks(const opfa_matrix *m, uint64_t live) {
  const int64_t columns = m->dtype == OPFA_BF16 ? 32 : 64, groups = (m->rows + 15) / 16;
  const int64_t words = (m->columns + columns - 1) / columns * 16 * columns / 32;
  const uint32_t *masks = m->masks;
  uint64_t entry = 0;
  if (m->dtype == OPFA_FP32 || m->block % 16 || m->tile != columns) return 1;
  for (int64_t g = 0; g < groups; g++) {
    if (m->entries[g] != entry) return 3;
    for (int64_t i = 0; i < words; i++) entry += (uint64_t)__builtin_popcount(*masks++);
  }
  return m->entries[groups] == entry && entry == live ? 0 : 3;
}

int opfa_check(const opfa_matrix *m, uint64_t visits, uint64_t live) {
  if (m->rows < 1 || m->columns < 1 || m->block < 1 || m->block > 256 || m->tile < 1 ||
      m->tile > 256)
    return 1;
  if (m->masks) return check_masks(m, live);
  const int64_t blocks = (m->rows + m->block - 1) / m->block,
                tiles = (m->columns + m->tile - 1) / m->tile;
  uint64_t entry = 0;
  if (m->starts[0] != 0 || m->starts[blocks * tiles] != visits) return 2;
  for (int64_t b = 0; b < blocks; b++) {
    const int rows = m->rows - b * m->block < m->block ? (int)(m->rows - b * m->block) : m->block;
    if (m->entries[b] != entry) return 3;
    for (int64_t t = 0; t < tiles; t++) {
      const int columns =
          m->columns - t * m->tile < m->tile ? (int)(m->columns - t * m->tile) : m->tile;
      const uint32_t from = m->starts[b * tiles + t], to = m->starts[b * tiles + t + 1];
      if (to < from || to > visits) return 2;
      for (uint32_t v = from; v < to; v++) {
        const int row = m->visits[2 * v], count = m->visits[2 * v + 1];
        if (row >= rows || count > columns || entry + (uint64_t)count > live) return 4;
        for (int i = 0; i < count; i++)
          if (m->indices[entry + i] >= columns) return 5;
        entry += count;
      }
    }
  }
  return m->entries[blocks] == entry && entry == live ? 0 : 3;
}
