/* The C interface of opfa's CPU runtime: sparse encoders on real tokens only.
 *
 * Activations are channel-major. The tokens of all sequences follow one another, in tiles of
 * OPFA_TILE; the last tile has a multiple of 16 tokens, with bf16 and int8 of 32. A buffer of C
 * channels is [tile][C][tokens of the tile], so a vector holds the same channel of 16 tokens, and a
 * live weight is multiplied with the tokens of a tile at once.
 */
#ifndef OPFA_RUNTIME_H
#define OPFA_RUNTIME_H
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

#define OPFA_ABI 5
#define OPFA_TILE 64
#define OPFA_GROUP 16
#define OPFA_PANEL 6 /* rows of a dense matrix that stand together */
#define OPFA_TABLES 3

enum opfa_activation { OPFA_NONE, OPFA_GELU, OPFA_GELU_TANH, OPFA_RELU, OPFA_SILU, OPFA_TANH };
enum opfa_kind {
  OPFA_EMBED,
  OPFA_LOAD,
  OPFA_STORE,
  OPFA_NORM,
  OPFA_LINEAR,
  OPFA_ATTENTION,
  OPFA_ROTARY,
  OPFA_GATE,
  OPFA_NARROW,
  OPFA_TIMES, /* of training: what opfa_forward and opfa_backward run */
  OPFA_ACROSS,
  OPFA_JOIN,
  OPFA_KINDS
};
enum opfa_dtype { OPFA_FP32, OPFA_BF16, OPFA_INT8, OPFA_FP64 }; /* the last only in training */

/* A matrix [rows, columns] times tokens. Sparse: rows in blocks, columns in tiles; in a block and
 * tile each row that lives has one visit (row in the block, live weights), by falling count.
 * With `masks`, as AMX wants it: for 16 rows and 64 bytes of columns (32 of bf16, 64 of int8) a
 * mask for each row, and the live weights in the same order. */
typedef struct {
  int32_t rows, columns;
  int32_t block, tile;     /* rows of a block, columns of a tile; block 0: dense, in panels */
  int32_t dtype;           /* of values; dense: fp32 */
  const uint32_t *starts;  /* [blocks * tiles + 1] first visit */
  const uint32_t *entries; /* [blocks + 1] first live weight; with masks [groups of 16 rows + 1] */
  const void *masks;       /* [groups][tiles][16] bits, lowest column first; NULL: visits */
  const uint8_t *visits;   /* [visits][2] */
  const uint8_t *indices;  /* [live] column in its tile */
  const void *values;      /* [live], or dense [rows / PANEL][columns][PANEL] */
  const float *scales;     /* [rows] of int8: of the weights times of the input */
  const float *bias;       /* [rows], or NULL */
} opfa_matrix;

/* A sparse linear layer in a training step. Rows of tokens are fp32 or bf16; sums and what belongs
 * to weights are fp32. With OPFA_FP64 all are, values and bias of the matrix too, in plain loops
 * that others can be compared with. */
typedef struct {
  int32_t tokens, dtype;       /* dtype of rows */
  const opfa_matrix *matrix;   /* [rows, columns] by visits in fp32, with its bias */
  const opfa_matrix *across;   /* its transpose, without bias; only to go back */
  const void *input;           /* [tokens, columns] */
  void *output;                /* [tokens, rows]; going back its gradient, which is only read */
  void *input_gradient;        /* [tokens, columns], or NULL */
  void *gradient;              /* [live] of the weights, in their order, or NULL */
  void *bias_gradient;         /* [rows], or NULL */
  float *workspace;            /* aligned to 64 bytes, of opfa_product_workspace floats */
} opfa_product;

typedef struct {
  int64_t offset; /* in channels, from the beginning of the workspace */
  int32_t channels;
} opfa_buffer;

typedef struct {
  int32_t kind, activation;
  int32_t in, out, residual; /* buffers; residual -1: none */
  int32_t first[3];          /* first channel: q, k, v of in; input and gate */
  int32_t channels, heads, window;
  int32_t form;        /* dtype of out: the input of what matrices */
  float inverse, zero; /* of int8: q = round(x * inverse) + zero */
  float epsilon, scale;
  const opfa_matrix *matrix;
  const float *weight, *bias;       /* of a norm */
  const opfa_product *product;      /* of training */
  const float *tables[OPFA_TABLES]; /* of embeddings [entries, channels]; rotary: cos and sin */
} opfa_step;

typedef struct {
  int32_t num_steps, num_buffers;
  int32_t group; /* tokens of the last tile are a multiple of it: 16 or 32 */
  const opfa_step *steps;
  const opfa_buffer *buffers;
  int64_t channels; /* of all buffers */
  int64_t scratch_start, scratch; /* floats: where each thread's own begin, and how many */
} opfa_program;

typedef struct {
  int32_t tokens, sequences;
  const int32_t *starts;           /* [sequences + 1] */
  const int32_t *ids[OPFA_TABLES]; /* [tokens] rows of the tables */
  const int32_t *rows;             /* [tokens] rows of input and output */
  const float *input;              /* [rows, channels] for OPFA_LOAD */
  float *output;                   /* [rows, channels] */
  float *workspace;                /* aligned to 64 bytes */
} opfa_call;

typedef struct opfa_pool opfa_pool;

int32_t opfa_abi(void);
const char *opfa_levels(void);      /* what this CPU can run, best first, by blanks */
const char *opfa_level(void);       /* the one that is used */
int opfa_choose(const char *level); /* 0, or -1: not known, or not on this CPU */
opfa_pool *opfa_pool_new(int32_t threads);
/* Others' threads, OpenMP's: `parallel` calls a function with its data on up to so many of them at
 * once, on which `index` and `present` say which one it is and how many there are. */
typedef void (*opfa_parallel)(void (*)(void *), void *, unsigned threads, unsigned flags);
opfa_pool *opfa_pool_of(int32_t threads, opfa_parallel parallel, int (*index)(void),
                        int (*present)(void));
void opfa_pool_free(opfa_pool *);
int64_t opfa_workspace(const opfa_program *, int32_t tokens);       /* in floats */
int opfa_run(const opfa_program *, const opfa_call *, opfa_pool *); /* 0, or -1: no memory */
int64_t opfa_product_workspace(const opfa_product *, int is_back, const opfa_pool *);
int opfa_forward(const opfa_product *, opfa_pool *);  /* 0, or -1: no memory */
int opfa_backward(const opfa_product *, opfa_pool *); /* the same */
/* values[i] = whole[places[i]], and the other way round, of numbers of 2, 4 or 8 bytes. */
void opfa_take(int32_t bytes, const void *whole, const int32_t *places, int64_t count, void *values);
void opfa_put(int32_t bytes, void *whole, const int32_t *places, int64_t count, const void *values);
/* 0, or what is wrong with a packed matrix. */
int opfa_check(const opfa_matrix *, uint64_t visits, uint64_t live);
double opfa_peak(void); /* GFLOP/s of multiply-adds in registers, one core */
#endif
