/*
 * elementwise.c -- the engine that feeds the generated formulas.
 *
 * tiles.h has, for each elementwise op, a loop over contiguous elements in float32, float64 and int64.  The engine brings any mix of
 * dtypes, strides, broadcasts and numbers to them: dims are joined where they can be, and the rest is cut into tiles.  An operand that already lies
 * contiguous in the type computed in is used where it lies; others are gathered and converted into buffers in L1, and the result is
 * converted and scattered out.  Compiled once per instruction set; its entry is called through hm_isa.elementwise; owns no memory.
 */
#include "../half.h"
#include "isa.h"
#include "layout.h"
#include "tiles.h"

#include <omp.h>

#include "tiles_hot.h"

enum {
  TILE_BYTES = 4096,   /* one buffer */
  TILE = 512,          /* elements of a tile when anything is gathered */
  DIRECT_TILE = 16384, /* elements of a tile when nothing is */
  BLOCK_ROWS = 16,     /* shape of a tile when an operand runs along the rows: each cache line serves 16 of them */
  BLOCK_COLS = 32,
  SHORT_ROW = 64 /* rows below this are collected first and converted together */
};

typedef union number {
  float f32;
  double f64;
  int64_t i64;
} number;

/* One operand: index 0 is the output, 1 + i input i. */
typedef struct operand {
  char *data;
  int dtype, size;
  bool is_const; /* one value for all elements: buffers are filled with it once per thread */
  number value;
  int64_t row, col; /* strides of the two innermost dims, in elements */
} operand;

/* One call, as the threads share it. */
typedef struct job {
  hm_tile fn;
  const hm_program *program; /* instead of fn, or NULL */
  const hm_attr *attr;
  int dtype, size; /* computed in */
  int n_in;
  bool check_zero; /* integer division: in[1] must not hold 0 */
  operand arg[HM_MAX_IN + 1];
  hm_loop loop;
  int64_t rows, cols;           /* sizes of the two innermost dims */
  int64_t tile_rows, tile_cols; /* of a full tile */
  int64_t row_tiles, col_tiles, tiles;
} job;

/* A thread's buffers.  filled[i] tells what buffer i holds, so that a broadcast operand is converted once, not once per tile. */
typedef struct scratch {
  _Alignas(64) char in[HM_MAX_IN][TILE_BYTES];
  _Alignas(64) char out[TILE_BYTES];
  _Alignas(64) char raw[TILE_BYTES];
  const char *filled[HM_MAX_IN];
  int64_t filled_rows[HM_MAX_IN], filled_cols[HM_MAX_IN];
} scratch;

/* ====== Gather and scatter ====== */

/* rows x cols elements with any strides to dense ones (or, out of a dense block, the other way round). */
#define STRIDED_COPIES(type)                                                                                           \
  static void pick_##type(type *restrict d, const type *restrict s, int64_t rows, int64_t cols, int64_t row,           \
                          int64_t col) {                                                                               \
    if (row == 1) { /* memory runs along the rows: whole cache lines at a time */                                      \
      for (int64_t c = 0; c < cols; c++) {                                                                             \
        for (int64_t r = 0; r < rows; r++) d[r * cols + c] = s[r + c * col];                                           \
      }                                                                                                                \
      return;                                                                                                          \
    }                                                                                                                  \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      for (int64_t c = 0; c < cols; c++) d[r * cols + c] = s[r * row + c * col];                                       \
    }                                                                                                                  \
  }                                                                                                                    \
  static void place_##type(type *restrict d, const type *restrict s, int64_t rows, int64_t cols, int64_t row,          \
                           int64_t col) {                                                                              \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      for (int64_t c = 0; c < cols; c++) d[r * row + c * col] = s[r * cols + c];                                       \
    }                                                                                                                  \
  }
STRIDED_COPIES(uint8_t)
STRIDED_COPIES(uint16_t)
STRIDED_COPIES(uint32_t)
STRIDED_COPIES(uint64_t)

static void pick(void *d, const void *s, int size, int64_t rows, int64_t cols, int64_t row, int64_t col) {
  if (size == 4) pick_uint32_t(d, s, rows, cols, row, col);
  else if (size == 2) pick_uint16_t(d, s, rows, cols, row, col);
  else if (size == 8) pick_uint64_t(d, s, rows, cols, row, col);
  else pick_uint8_t(d, s, rows, cols, row, col);
}

static void place(void *d, const void *s, int size, int64_t rows, int64_t cols, int64_t row, int64_t col) {
  if (size == 4) place_uint32_t(d, s, rows, cols, row, col);
  else if (size == 2) place_uint16_t(d, s, rows, cols, row, col);
  else if (size == 8) place_uint64_t(d, s, rows, cols, row, col);
  else place_uint8_t(d, s, rows, cols, row, col);
}

/* Fills n elements of `size` bytes from the first `have` of them, which repeat. */
static void repeat(char *d, int64_t have, int64_t n) {
  while (have < n) {
    const int64_t m = have < n - have ? have : n - have;
    memcpy(d + have, d, (size_t)m);
    have += m;
  }
}

/* rows x cols elements of an operand from src, as dense elements of the type computed in. */
static void gather(const job *j, const operand *a, const char *src, int64_t rows, int64_t cols, char *dst, char *raw) {
  const int64_t distinct = a->row == 0 ? 1 : rows;
  if (a->col == 1 && (distinct == 1 || a->row == cols)) {
    HM_ISA_FN(hm_cpu_convert)(dst, j->dtype, src, a->dtype, distinct * cols);
  } else if (a->dtype == j->dtype) {
    pick(dst, src, a->size, distinct, cols, a->row, a->col);
  } else if (a->col == 1 && cols >= SHORT_ROW) {
    for (int64_t r = 0; r < distinct; r++)
      HM_ISA_FN(hm_cpu_convert)(dst + r * cols * j->size, j->dtype, src + r * a->row * a->size, a->dtype, cols);
  } else {
    pick(raw, src, a->size, distinct, cols, a->row, a->col);
    HM_ISA_FN(hm_cpu_convert)(dst, j->dtype, raw, a->dtype, distinct * cols);
  }
  repeat(dst, distinct * cols * j->size, rows * cols * j->size);
}

/* Dense results of the type computed in to where the output wants them. */
static void scatter(const job *j, const operand *a, char *dst, int64_t rows, int64_t cols, const char *src, char *raw) {
  if (a->col == 1 && (rows == 1 || a->row == cols)) {
    HM_ISA_FN(hm_cpu_convert)(dst, a->dtype, src, j->dtype, rows * cols);
  } else if (a->dtype == j->dtype) {
    place(dst, src, a->size, rows, cols, a->row, a->col);
  } else if (a->col == 1 && cols >= SHORT_ROW) {
    for (int64_t r = 0; r < rows; r++)
      HM_ISA_FN(hm_cpu_convert)(dst + r * a->row * a->size, a->dtype, src + r * cols * j->size, j->dtype, cols);
  } else {
    HM_ISA_FN(hm_cpu_convert)(raw, a->dtype, src, j->dtype, rows * cols);
    place(dst, raw, a->size, rows, cols, a->row, a->col);
  }
}

/* ====== Tiles ====== */

static bool is_direct(const job *j, const operand *a, int64_t rows, int64_t cols) {
  return a->dtype == j->dtype && a->col == 1 && (rows == 1 || a->row == cols);
}

static void fill_const(const job *j, const operand *a, char *dst, int64_t n) {
  if (j->size == 4) {
    for (int64_t i = 0; i < n; i++) ((float *)dst)[i] = a->value.f32;
  } else {
    for (int64_t i = 0; i < n; i++) ((double *)dst)[i] = a->value.f64; /* int64 has the same bits */
  }
}

static bool has_zero(const int64_t *x, int64_t n) {
  bool zero = false;
  for (int64_t i = 0; i < n; i++) zero |= x[i] == 0;
  return zero;
}

static void apply(const job *j, int64_t n, void *o, const void *const *in) {
  if (j->program) HM_ISA_FN(hm_cpu_expression_tile)(j->program, j->dtype, n, o, in);
  else if (j->dtype == HM_F32) j->fn.f32(n, o, (const float *const *)in, j->attr);
  else if (j->dtype == HM_F64) j->fn.f64(n, o, (const double *const *)in, j->attr);
  else j->fn.i64(n, o, (const int64_t *const *)in, j->attr);
}

/* Computes one tile; at[k] is where it begins in operand k.  False: a division by zero. */
static bool run_tile(const job *j, scratch *s, char *const *at, int64_t rows, int64_t cols) {
  const void *in[HM_MAX_IN];
  for (int i = 0; i < j->n_in; i++) {
    const operand *a = &j->arg[1 + i];
    in[i] = s->in[i];
    if (a->is_const) continue;
    if (is_direct(j, a, rows, cols)) {
      in[i] = at[1 + i];
    } else if (a->row != 0 || s->filled[i] != at[1 + i] || s->filled_cols[i] != cols || s->filled_rows[i] < rows) {
      gather(j, a, at[1 + i], rows, cols, s->in[i], s->raw);
      s->filled[i] = at[1 + i];
      s->filled_rows[i] = rows;
      s->filled_cols[i] = cols;
    }
  }
  if (j->check_zero && has_zero(in[1], rows * cols)) return false;
  if (is_direct(j, &j->arg[0], rows, cols)) {
    apply(j, rows * cols, at[0], in);
  } else {
    apply(j, rows * cols, s->out, in);
    scatter(j, &j->arg[0], at[0], rows, cols, s->out, s->raw);
  }
  return true;
}

/* Places of tile number t: how far it lies from the operands' first elements, and its size. */
static void locate(const job *j, int64_t t, char **at, int64_t *rows, int64_t *cols) {
  const int64_t c = t % j->col_tiles * j->tile_cols, r = t / j->col_tiles % j->row_tiles * j->tile_rows;
  int64_t outer = t / (j->col_tiles * j->row_tiles);
  *rows = j->rows - r < j->tile_rows ? j->rows - r : j->tile_rows;
  *cols = j->cols - c < j->tile_cols ? j->cols - c : j->tile_cols;
  int64_t offset[HM_MAX_IN + 1];
  for (int k = 0; k <= j->n_in; k++) offset[k] = r * j->arg[k].row + c * j->arg[k].col;
  for (int d = j->loop.ndim - 3; d >= 0; d--) {
    const int64_t i = outer % j->loop.shape[d];
    outer /= j->loop.shape[d];
    for (int k = 0; k <= j->n_in; k++) offset[k] += i * j->loop.stride[k][d];
  }
  for (int k = 0; k <= j->n_in; k++) at[k] = j->arg[k].data + offset[k] * j->arg[k].size;
}

/* Tiles [first, last) on one thread. */
static bool run(const job *j, int64_t first, int64_t last) {
  scratch s;
  const int64_t most = j->tile_rows * j->tile_cols;
  for (int i = 0; i < j->n_in; i++) {
    s.filled[i] = NULL;
    if (j->arg[1 + i].is_const) fill_const(j, &j->arg[1 + i], s.in[i], most);
  }
  for (int64_t t = first; t < last; t++) {
    char *at[HM_MAX_IN + 1];
    int64_t rows, cols;
    locate(j, t, at, &rows, &cols);
    if (!run_tile(j, &s, at, rows, cols)) return false;
  }
  return true;
}

/* ====== Setting up ====== */

/* Operand k of the call: its data and strides, or the one value that it has everywhere. */
static void set_operand(job *j, int k, const hm_view *v) {
  operand *a = &j->arg[k];
  const int inner = j->loop.ndim - 1;
  a->data = v->data;
  a->dtype = v->dtype;
  a->size = hm_dtype_size(v->dtype);
  a->col = j->loop.stride[k][inner];
  a->row = inner > 0 ? j->loop.stride[k][inner - 1] : 0;
  a->is_const = false;
  if (k == 0) return;
  if (v->flags & HM_VIEW_SCALAR) {
    a->is_const = true;
    a->data = NULL;
    hm__scalar_value(v, j->dtype, &a->value);
    return;
  }
  for (int d = 0; d <= inner; d++) {
    if (j->loop.stride[k][d] != 0) return;
  }
  a->is_const = true;
  HM_ISA_FN(hm_cpu_convert)(&a->value, j->dtype, v->data, v->dtype, 1);
}

/* Chooses the tile: big when nothing needs a buffer, blocks when an operand runs along the rows, else whole rows up to TILE elements. */
static void set_tiles(job *j) {
  const int inner = j->loop.ndim - 1;
  bool gathers = false, constants = false, blocks = false;
  j->cols = j->loop.shape[inner];
  j->rows = inner > 0 ? j->loop.shape[inner - 1] : 1;
  for (int k = 0; k <= j->n_in; k++) {
    const operand *a = &j->arg[k];
    constants |= a->is_const;
    gathers |= !a->is_const && (a->dtype != j->dtype || a->col != 1);
    blocks |= !a->is_const && a->col > 1 && a->row == 1;
  }
  const int64_t most = gathers ? TILE : (constants ? TILE_BYTES / j->size : DIRECT_TILE);
  if (blocks && j->rows > 1) {
    j->tile_rows = j->rows < BLOCK_ROWS ? j->rows : BLOCK_ROWS;
    j->tile_cols = j->cols < BLOCK_COLS ? j->cols : BLOCK_COLS;
  } else {
    j->tile_cols = j->cols < most ? j->cols : most;
    j->tile_rows = TILE / j->cols;
    if (j->tile_rows < 1) j->tile_rows = 1;
    if (j->tile_rows > j->rows) j->tile_rows = j->rows;
  }
  j->col_tiles = (j->cols + j->tile_cols - 1) / j->tile_cols;
  j->row_tiles = (j->rows + j->tile_rows - 1) / j->tile_rows;
  j->tiles = j->col_tiles * j->row_tiles;
  for (int d = 0; d < inner - 1; d++) j->tiles *= j->loop.shape[d];
}

static bool run_threads(const job *j, int64_t numel) {
  int64_t bytes = 8; /* of traffic and arithmetic per element */
  if (j->program) bytes += 8 * j->program->n_steps;
  for (int k = 0; k <= j->n_in; k++) bytes += j->arg[k].is_const ? 0 : j->arg[k].size;
  int threads = hm_cpu_threads(numel, bytes);
  if (threads > j->tiles) threads = (int)j->tiles;
  if (threads <= 1) return run(j, 0, j->tiles);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    int64_t first, last;
    hm__share(j->tiles, 1, omp_get_thread_num(), omp_get_num_threads(), &first, &last);
    failed |= !run(j, first, last);
  }
  return !failed;
}

/* Sets up the rest of a job whose loop, dtype and function are set, and runs it; false: an integer division by zero. */
static bool start(job *j, const hm_kernel_call *call, int64_t numel) {
  j->attr = call->attr;
  j->size = hm_dtype_size(j->dtype);
  j->n_in = call->n_in;
  set_operand(j, 0, &call->out[0]);
  for (int i = 0; i < j->n_in; i++) set_operand(j, 1 + i, &call->in[i]);
  set_tiles(j);
  return run_threads(j, numel);
}

int HM_ISA_FN(hm_cpu_expression)(const hm_kernel_call *call, const hm_program *program) {
  job j;
  const int64_t numel = hm__loop_make(&j.loop, &call->out[0], call->n_in, call->in);
  if (numel == 0) return HM_OK;
  j.program = program;
  j.dtype = call->compute;
  j.check_zero = false;
  (void)start(&j, call, numel);
  return HM_OK;
}

int HM_ISA_FN(hm_cpu_elementwise)(const hm_kernel_call *call) {
  job j;
  const int64_t numel = hm__loop_make(&j.loop, &call->out[0], call->n_in, call->in);
  j.program = NULL;
  j.fn = hm_cold_tiles[call->op];
  if (!j.fn.f32) j.fn.f32 = hm_hot_tiles[call->op];
  j.dtype = call->compute;
  const bool known =
      j.dtype == HM_F32 ? j.fn.f32 != NULL : (j.dtype == HM_F64 ? j.fn.f64 != NULL : j.dtype == HM_I64 && j.fn.i64);
  if (!known)
    return hm_cpu_fail(HM_ERR_DTYPE, "elementwise op %d: cannot be computed in %s", call->op,
                       hm_dtype_name(call->compute));
  if (numel == 0) return HM_OK;
  j.check_zero = j.dtype == HM_I64 && (call->op == HM_OP_FLOOR_DIVIDE || call->op == HM_OP_REMAINDER);
  if (!start(&j, call, numel))
    return hm_cpu_fail(HM_ERR_ARG, "%s: integer division by zero",
                       call->op == HM_OP_REMAINDER ? "remainder" : "floor_divide");
  return HM_OK;
}
