/*
 * copy.c -- casts, strided copies, copies between layouts.
 *
 * One engine for `cast` and `copy_`: any dtype to any other, any strides on both sides, numbers and broadcast sources.  Contiguous pieces
 * are converted straight from memory to memory.  Where the input runs along another dim than the output (row-major to
 * channels-last and back, transposes) blocks are turned in L1, so that both sides are read and written in whole cache lines.
 * Compiled once per instruction set; called through hm_isa.copy; owns no memory.
 */
#include <omp.h>
#include <string.h>

#include "isa.h"
#include "layout.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum {
  TILE = 512,        /* elements of a piece that passes through buffers */
  BLOCK_BYTES = 256, /* a row of a block that is turned: input, block and output lie in L1 together */
  BLOCK = 64,        /* side of a block at most */
  SHORTEST_TURN = 8, /* with fewer input elements in a row, picking them one by one is as good */
  LONG_ROW = 64,     /* rows from here on are converted one by one, shorter ones together */
  GRAIN = 4096       /* elements: least share of a thread in a contiguous copy */
};

/* One copy, as the threads share it. */
typedef struct job {
  char *dst;
  const char *src;
  int dst_dtype, src_dtype, dst_size, src_size;
  hm_loop loop;
  int turn;           /* the dim along which the input is contiguous; -1: no block is turned */
  int64_t rows, cols; /* sizes of dim `turn` (else the second innermost) and of the innermost */
  int64_t tile_rows, tile_cols, row_tiles, col_tiles, tiles;
  int row_dim; /* -1: a single dim */
} job;

/* ====== Pieces ====== */

/* d[r * drow + c * dcol] = s[r * srow + c * scol] */
#define COPY_2D(type)                                                                                                  \
  static void copy_##type(type *restrict d, int64_t drow, int64_t dcol, const type *restrict s, int64_t srow,          \
                          int64_t scol, int64_t rows, int64_t cols) {                                                  \
    for (int64_t r = 0; r < rows; r++) {                                                                               \
      for (int64_t c = 0; c < cols; c++) d[r * drow + c * dcol] = s[r * srow + c * scol];                              \
    }                                                                                                                  \
  }
COPY_2D(uint8_t)
COPY_2D(uint16_t)
COPY_2D(uint32_t)
COPY_2D(uint64_t)

static void copy_2d(int size, void *d, int64_t drow, int64_t dcol, const void *s, int64_t srow, int64_t scol,
                    int64_t rows, int64_t cols) {
  if (size == 4) copy_uint32_t(d, drow, dcol, s, srow, scol, rows, cols);
  else if (size == 2) copy_uint16_t(d, drow, dcol, s, srow, scol, rows, cols);
  else if (size == 8) copy_uint64_t(d, drow, dcol, s, srow, scol, rows, cols);
  else copy_uint8_t(d, drow, dcol, s, srow, scol, rows, cols);
}

#if defined(__SSE2__)

/* Turns 4 x 4 elements of 4 bytes. */
static inline void turn_4x4(uint32_t *d, int64_t drow, const uint32_t *s, int64_t srow) {
  const __m128i a = _mm_loadu_si128((const __m128i *)s), b = _mm_loadu_si128((const __m128i *)(s + srow));
  const __m128i c = _mm_loadu_si128((const __m128i *)(s + 2 * srow)),
                e = _mm_loadu_si128((const __m128i *)(s + 3 * srow));
  const __m128i ab0 = _mm_unpacklo_epi32(a, b), ab1 = _mm_unpackhi_epi32(a, b);
  const __m128i ce0 = _mm_unpacklo_epi32(c, e), ce1 = _mm_unpackhi_epi32(c, e);
  _mm_storeu_si128((__m128i *)d, _mm_unpacklo_epi64(ab0, ce0));
  _mm_storeu_si128((__m128i *)(d + drow), _mm_unpackhi_epi64(ab0, ce0));
  _mm_storeu_si128((__m128i *)(d + 2 * drow), _mm_unpacklo_epi64(ab1, ce1));
  _mm_storeu_si128((__m128i *)(d + 3 * drow), _mm_unpackhi_epi64(ab1, ce1));
}

/* Turns 8 x 8 elements of 2 bytes. */
static inline void turn_8x8(uint16_t *d, int64_t drow, const uint16_t *s, int64_t srow) {
  __m128i x[8], y[8];
  for (int i = 0; i < 8; i++) x[i] = _mm_loadu_si128((const __m128i *)(s + i * srow));
  for (int i = 0; i < 4; i++) {
    y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    x[4 * i] = _mm_unpacklo_epi32(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm_unpackhi_epi32(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm_unpacklo_epi32(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm_unpackhi_epi32(y[4 * i + 1], y[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    _mm_storeu_si128((__m128i *)(d + 2 * i * drow), _mm_unpacklo_epi64(x[i], x[4 + i]));
    _mm_storeu_si128((__m128i *)(d + (2 * i + 1) * drow), _mm_unpackhi_epi64(x[i], x[4 + i]));
  }
}

/* Turns as much as whole squares of 16-byte rows cover; tells how much that is. */
static void turn_squares(int size, char *d, int64_t drow, const char *s, int64_t srow, int64_t rows, int64_t cols,
                         int64_t *done_rows, int64_t *done_cols) {
  const int64_t side = 16 / size;
  *done_rows = rows / side * side;
  *done_cols = cols / side * side;
  for (int64_t r = 0; r < *done_rows; r += side) {
    for (int64_t c = 0; c < *done_cols; c += side) {
      if (size == 4) turn_4x4((uint32_t *)d + r * drow + c, drow, (const uint32_t *)s + c * srow + r, srow);
      else turn_8x8((uint16_t *)d + r * drow + c, drow, (const uint16_t *)s + c * srow + r, srow);
    }
  }
}

#endif

/* d[r][c] = s[c][r]: rows x cols elements, rows drow and srow apart, contiguous along the row on both sides. */
static void turn(int size, char *d, int64_t drow, const char *s, int64_t srow, int64_t rows, int64_t cols) {
  int64_t done_rows = 0, done_cols = 0;
#if defined(__SSE2__)
  if (size == 4 || size == 2) turn_squares(size, d, drow, s, srow, rows, cols, &done_rows, &done_cols);
#endif
  if (done_cols < cols)
    copy_2d(size, d + done_cols * size, drow, 1, s + done_cols * srow * size, 1, srow, done_rows, cols - done_cols);
  if (done_rows < rows)
    copy_2d(size, d + done_rows * drow * size, drow, 1, s + done_rows * size, 1, srow, rows - done_rows, cols);
}

/* One block: the input is contiguous along the rows' dim, the output along the columns'. */
static void turn_tile(const job *j, char *dst, const char *src, int64_t rows, int64_t cols) {
  _Alignas(64) char block[BLOCK * BLOCK_BYTES];
  const int inner = j->loop.ndim - 1;
  const int64_t step = j->loop.stride[1][inner] * j->src_size;
  for (int64_t c = 0; c < cols; c++)
    HM_ISA_FN(hm_cpu_convert)(block + c * rows * j->dst_size, j->dst_dtype, src + c * step, j->src_dtype, rows);
  turn(j->dst_size, dst, j->loop.stride[0][j->row_dim], block, rows, rows, cols);
}

/* rows x cols elements with any strides. */
static void plain_tile(const job *j, char *dst, const char *src, int64_t rows, int64_t cols) {
  _Alignas(64) char raw[TILE * 8], out[TILE * 8];
  const int inner = j->loop.ndim - 1;
  const int64_t dcol = j->loop.stride[0][inner], scol = j->loop.stride[1][inner];
  const int64_t drow = j->row_dim >= 0 ? j->loop.stride[0][j->row_dim] : 0,
                srow = j->row_dim >= 0 ? j->loop.stride[1][j->row_dim] : 0;
  if (dcol == 1 && scol == 1 && (cols >= LONG_ROW || rows == 1)) {
    for (int64_t r = 0; r < rows; r++) HM_ISA_FN(hm_cpu_convert)
    (dst + r * drow * j->dst_size, j->dst_dtype, src + r * srow * j->src_size, j->src_dtype, cols);
  } else if (j->dst_dtype == j->src_dtype) {
    copy_2d(j->dst_size, dst, drow, dcol, src, srow, scol, rows, cols);
  } else {
    copy_2d(j->src_size, raw, cols, 1, src, srow, scol, rows, cols);
    HM_ISA_FN(hm_cpu_convert)(out, j->dst_dtype, raw, j->src_dtype, rows * cols);
    copy_2d(j->dst_size, dst, drow, dcol, out, cols, 1, rows, cols);
  }
}

/* ====== The walk ====== */

/* Tile number t. */
static void run_tile(const job *j, int64_t t) {
  const int inner = j->loop.ndim - 1;
  const int64_t c = t % j->col_tiles * j->tile_cols, r = t / j->col_tiles % j->row_tiles * j->tile_rows;
  int64_t outer = t / (j->col_tiles * j->row_tiles);
  int64_t at[2] = {c * j->loop.stride[0][inner], c * j->loop.stride[1][inner]};
  for (int d = inner - 1; d >= 0; d--) {
    int64_t i = r;
    if (d != j->row_dim) {
      i = outer % j->loop.shape[d];
      outer /= j->loop.shape[d];
    }
    for (int k = 0; k < 2; k++) at[k] += i * j->loop.stride[k][d];
  }
  const int64_t rows = j->rows - r < j->tile_rows ? j->rows - r : j->tile_rows;
  const int64_t cols = j->cols - c < j->tile_cols ? j->cols - c : j->tile_cols;
  char *const dst = j->dst + at[0] * j->dst_size;
  const char *const src = j->src + at[1] * j->src_size;
  if (j->turn >= 0) turn_tile(j, dst, src, rows, cols);
  else plain_tile(j, dst, src, rows, cols);
}

/* The dim along which the input is contiguous, if it is not the output's and turning pays; else -1. */
static int find_turn(const job *j) {
  const int inner = j->loop.ndim - 1;
  if (j->loop.stride[0][inner] != 1 || j->loop.stride[1][inner] == 1 || j->loop.stride[1][inner] == 0) return -1;
  for (int d = 0; d < inner; d++) {
    if (j->loop.stride[1][d] == 1 && j->loop.shape[d] >= SHORTEST_TURN) return d;
  }
  return -1;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Chooses tiles. */
static void set_tiles(job *j) {
  const int inner = j->loop.ndim - 1;
  j->turn = find_turn(j);
  j->row_dim = j->turn >= 0 ? j->turn : inner - 1;
  j->cols = j->loop.shape[inner];
  j->rows = j->row_dim >= 0 ? j->loop.shape[j->row_dim] : 1;
  if (j->turn >= 0) {
    const int64_t side = least(BLOCK, BLOCK_BYTES / j->dst_size);
    j->tile_rows = least(j->rows, side);
    j->tile_cols = least(j->cols, side);
  } else {
    j->tile_cols = least(j->cols, TILE);
    j->tile_rows = least(j->rows, j->cols >= TILE ? 1 : TILE / j->cols);
  }
  j->col_tiles = (j->cols + j->tile_cols - 1) / j->tile_cols;
  j->row_tiles = (j->rows + j->tile_rows - 1) / j->tile_rows;
  j->tiles = j->col_tiles * j->row_tiles;
  for (int d = 0; d < inner; d++) j->tiles *= d == j->row_dim ? 1 : j->loop.shape[d];
}

/* Contiguous on both sides. */
static void copy_flat(const job *j, int64_t n, int threads) {
  if (threads <= 1) {
    HM_ISA_FN(hm_cpu_convert)(j->dst, j->dst_dtype, j->src, j->src_dtype, n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t first, last;
    hm__share(n, GRAIN, omp_get_thread_num(), omp_get_num_threads(), &first, &last);
    HM_ISA_FN(hm_cpu_convert)
    (j->dst + first * j->dst_size, j->dst_dtype, j->src + first * j->src_size, j->src_dtype, last - first);
  }
}

static void copy_tiles(const job *j, int threads) {
  if (threads > j->tiles) threads = (int)j->tiles;
  if (threads <= 1) {
    for (int64_t t = 0; t < j->tiles; t++) run_tile(j, t);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    int64_t first, last;
    hm__share(j->tiles, 1, omp_get_thread_num(), omp_get_num_threads(), &first, &last);
    for (int64_t t = first; t < last; t++) run_tile(j, t);
  }
}

/* Writes `in`, converted and broadcast, to `out`. */
static int copy_view(const hm_view *out, const hm_view *in) {
  job j;
  char number[8];
  const int64_t numel = hm__loop_make(&j.loop, out, 1, in);
  if (numel == 0) return HM_OK;
  j.dst = out->data;
  j.src = in->data;
  j.dst_dtype = out->dtype;
  j.src_dtype = in->dtype;
  if (in->flags & HM_VIEW_SCALAR) { /* a number: converted once, then copied as what it is */
    HM_ISA_FN(hm_cpu_convert)(number, j.dst_dtype, &in->scalar, in->dtype, 1);
    j.src = number;
    j.src_dtype = j.dst_dtype;
  }
  j.dst_size = hm_dtype_size(j.dst_dtype);
  j.src_size = hm_dtype_size(j.src_dtype);
  const int threads = hm_cpu_threads(numel, j.dst_size + j.src_size);
  if (j.loop.ndim == 1 && j.loop.stride[0][0] == 1 && j.loop.stride[1][0] == 1) {
    copy_flat(&j, numel, threads);
    return HM_OK;
  }
  set_tiles(&j);
  copy_tiles(&j, threads);
  return HM_OK;
}

int HM_ISA_FN(hm_cpu_copy)(const hm_kernel_call *call) {
  if (call->op == HM_OP_CAST) return copy_view(&call->out[0], &call->in[0]);
  if (call->op == HM_OP_COPY_) return copy_view(&call->out[0], &call->in[1]);
  return hm_cpu_fail(HM_ERR_UNSUPPORTED, "copy: op %d is unknown to the cpu", call->op);
}
