/*
 * copy.cu -- casts, strided copies, copies between layouts.
 *
 * Three ways.  Equal dtypes move as bytes, 16 at a time where the innermost dim is dense on both sides.  Floats of 32
 * and 16 bits go through the elementwise engine with the identity; other pairs one element a time, rounded once
 * (view.h).  Where the input is dense along another dim than the output (row-major to channels-last and back,
 * transposes), tiles of 32 x 32 are turned in shared memory, so that both sides are read and written by neighbouring
 * threads.
 */
#include "elementwise.h"

enum { TILE = 32, TILE_ROWS = 8 };

/* The two sides of a copy; operand 0 is the output. */
struct sides {
  hm_walk<2> walk;
  void *dst;
  const void *src;
  int32_t dst_dtype, src_dtype;
};

/* ====== Element by element, and in pieces of 16 bytes ====== */

static __global__ void __launch_bounds__(HM_BLOCK, 2) copy_any(sides s) {
  for (uint32_t i = hm_global_thread(); i < s.walk.count; i += hm_global_threads()) {
    int64_t at[2];
    hm_offsets(s.walk, i, at);
    hm_convert(s.dst, s.dst_dtype, at[0], s.src, s.src_dtype, at[1]);
  }
}

/* ---- 8-bit floats on one side or both; no other kernel reads or writes them ---- */

HM_DEV uint8_t to_f8(int dtype, double x) { return dtype == HM_F8_E4M3 ? hm_f64_to_e4m3(x) : hm_f64_to_e5m2(x); }
HM_DEV uint8_t to_f8(int dtype, int64_t x) { return dtype == HM_F8_E4M3 ? hm_i64_to_e4m3(x) : hm_i64_to_e5m2(x); }
HM_DEV float from_f8(int dtype, uint8_t x) { return dtype == HM_F8_E4M3 ? hm_e4m3_to_f32(x) : hm_e5m2_to_f32(x); }
HM_FN bool is_f8(int dtype) { return dtype == HM_F8_E4M3 || dtype == HM_F8_E5M2; }

static __global__ void __launch_bounds__(HM_BLOCK, 2) copy_f8(sides s) {
  const uint8_t *const src = static_cast<const uint8_t *>(s.src);
  uint8_t *const dst = static_cast<uint8_t *>(s.dst);
  const bool narrow = is_f8(s.dst_dtype), wide = is_f8(s.src_dtype);
  for (uint32_t i = hm_global_thread(); i < s.walk.count; i += hm_global_threads()) {
    int64_t at[2];
    hm_offsets(s.walk, i, at);
    if (!narrow) hm_store<double>(s.dst, s.dst_dtype, at[0], (double)from_f8(s.src_dtype, src[at[1]]));
    else if (wide) dst[at[0]] = to_f8(s.dst_dtype, (double)from_f8(s.src_dtype, src[at[1]]));
    else if (hm_is_int(s.src_dtype)) dst[at[0]] = to_f8(s.dst_dtype, hm_load<int64_t>(s.src, s.src_dtype, at[1]));
    else dst[at[0]] = to_f8(s.dst_dtype, hm_load<double>(s.src, s.src_dtype, at[1]));
  }
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) copy_bytes(sides s) {
  for (uint32_t i = hm_global_thread(); i < s.walk.count; i += hm_global_threads()) {
    int64_t at[2];
    hm_offsets(s.walk, i, at);
    static_cast<T *>(s.dst)[at[0]] = static_cast<const T *>(s.src)[at[1]];
  }
}

/* ====== Turned tiles ====== */

/* Dims `row` (dense in the input) and the innermost (dense in the output) are walked by tiles, the others by
 * `outer`. */
struct turned {
  hm_walk<2> outer;
  void *dst;
  const void *src;
  int32_t dst_dtype, src_dtype;
  int64_t rows, cols, dst_row, src_col; /* sizes of the two dims; strides of the other side */
  hm_divisor row_tiles, col_tiles;
  uint32_t tiles;
};

/* T: what passes through shared memory.  CONVERT: float between 32- and 16-bit floats; else bytes as they are. */
template <class T, bool CONVERT> static __global__ void __launch_bounds__(HM_BLOCK, 2) copy_turned(turned t) {
  HM_SHARED(T, tile, [TILE][TILE + 1]);
  const int x = (int)threadIdx.x % TILE, y = (int)threadIdx.x / TILE;
  for (uint32_t u = blockIdx.x; u < t.tiles; u += gridDim.x) {
    const uint32_t rest = hm_divide(u, t.col_tiles), o = hm_divide(rest, t.row_tiles);
    const int64_t c0 = (int64_t)(u - rest * t.col_tiles.size) * TILE,
                  r0 = (int64_t)(rest - o * t.row_tiles.size) * TILE;
    int64_t at[2];
    hm_offsets(t.outer, o, at);
    for (int j = y; j < TILE; j += TILE_ROWS) {
      const int64_t r = r0 + x, c = c0 + j, from = at[1] + r + c * t.src_col;
      if (r >= t.rows || c >= t.cols) continue;
      if constexpr (CONVERT) tile[j][x] = hm_load<T>(t.src, t.src_dtype, from);
      else tile[j][x] = static_cast<const T *>(t.src)[from];
    }
    HM_BARRIER();
    for (int j = y; j < TILE; j += TILE_ROWS) {
      const int64_t r = r0 + j, c = c0 + x, to = at[0] + r * t.dst_row + c;
      if (r >= t.rows || c >= t.cols) continue;
      if constexpr (CONVERT) hm_store<T>(t.dst, t.dst_dtype, to, tile[x][j]);
      else static_cast<T *>(t.dst)[to] = tile[x][j];
    }
    HM_BARRIER();
  }
}

/* The dim along which the input is dense, if it is not the output's and turning pays; else -1. */
static int find_turn(const hm_loop *l) {
  const int inner = l->ndim - 1;
  if (l->stride[0][inner] != 1 || l->stride[1][inner] == 1 || l->stride[1][inner] == 0 || l->shape[inner] < 4)
    return -1;
  for (int d = 0; d < inner; d++)
    if (l->stride[1][d] == 1 && l->shape[d] >= 8) return d;
  return -1;
}

/* Fills t but for the dtypes. */
static void set_turned(turned *t, const hm_loop *l, int row) {
  const int inner = l->ndim - 1;
  hm_loop outer = *l;
  outer.ndim = 0;
  for (int d = 0; d < inner; d++) {
    if (d == row) continue;
    outer.shape[outer.ndim] = l->shape[d];
    for (int k = 0; k < 2; k++) outer.stride[k][outer.ndim] = l->stride[k][d];
    outer.ndim++;
  }
  if (outer.ndim == 0) outer.ndim = 1, outer.shape[0] = 1, outer.stride[0][0] = outer.stride[1][0] = 0;
  t->outer = hm_make_walk<2>(&outer);
  t->rows = l->shape[row], t->cols = l->shape[inner];
  t->dst_row = l->stride[0][row], t->src_col = l->stride[1][inner];
  const int64_t row_tiles = (t->rows + TILE - 1) / TILE, col_tiles = (t->cols + TILE - 1) / TILE;
  t->row_tiles = hm_make_divisor(row_tiles), t->col_tiles = hm_make_divisor(col_tiles);
  t->tiles = (uint32_t)(t->outer.count * row_tiles * col_tiles);
}

/* ====== Choosing ====== */

struct identity {
  enum { inputs = 1, attrs = 0, width = 8, ints = 0, runs = 1 };
  static void constants(const hm_attr *, float *) {}
  HM_DEV float value(const float *a, const float *) { return a[0]; }
};

static bool is_float32_or_half(int dtype) { return dtype == HM_F32 || dtype == HM_F16 || dtype == HM_BF16; }

static int run_turned(const hm_loop *l, int row, const sides *s, void *stream) {
  turned t;
  memset(&t, 0, sizeof t);
  set_turned(&t, l, row);
  t.dst = s->dst, t.src = s->src, t.dst_dtype = s->dst_dtype, t.src_dtype = s->src_dtype;
  const unsigned blocks = hm_blocks(t.tiles, 1);
  if (t.dst_dtype != t.src_dtype)
    return HM_RUN("copy", (copy_turned<float, true>), blocks, TILE * TILE_ROWS, 0, stream, t);
  switch (hm_dtype_size(t.dst_dtype)) {
  case 1: return HM_RUN("copy", (copy_turned<uint8_t, false>), blocks, TILE * TILE_ROWS, 0, stream, t);
  case 2: return HM_RUN("copy", (copy_turned<uint16_t, false>), blocks, TILE * TILE_ROWS, 0, stream, t);
  case 4: return HM_RUN("copy", (copy_turned<uint32_t, false>), blocks, TILE * TILE_ROWS, 0, stream, t);
  default: return HM_RUN("copy", (copy_turned<uint64_t, false>), blocks, TILE * TILE_ROWS, 0, stream, t);
  }
}

/* Can equal dtypes move 16 bytes at a time?  Then the loop is changed to count in such pieces. */
static bool to_pieces(hm_loop *l, const sides *s) {
  const int inner = l->ndim - 1, per = 16 / hm_dtype_size(s->dst_dtype);
  if (l->stride[0][inner] != 1 || l->stride[1][inner] != 1 || l->shape[inner] % per) return false;
  if (((uintptr_t)s->dst | (uintptr_t)s->src) % 16) return false;
  for (int k = 0; k < 2; k++)
    for (int d = 0; d < inner; d++)
      if (l->stride[k][d] % per) return false;
  l->shape[inner] /= per;
  for (int k = 0; k < 2; k++)
    for (int d = 0; d < inner; d++) l->stride[k][d] /= per;
  return true;
}

static int run_bytes(hm_loop l, sides *s, void *stream) {
  const bool pieces = to_pieces(&l, s);
  s->walk = hm_make_walk<2>(&l);
  const unsigned blocks = hm_blocks(s->walk.count);
  if (pieces) return HM_RUN("copy", (copy_bytes<uint4>), blocks, HM_BLOCK, 0, stream, *s);
  switch (hm_dtype_size(s->dst_dtype)) {
  case 1: return HM_RUN("copy", (copy_bytes<uint8_t>), blocks, HM_BLOCK, 0, stream, *s);
  case 2: return HM_RUN("copy", (copy_bytes<uint16_t>), blocks, HM_BLOCK, 0, stream, *s);
  case 4: return HM_RUN("copy", (copy_bytes<uint32_t>), blocks, HM_BLOCK, 0, stream, *s);
  default: return HM_RUN("copy", (copy_bytes<uint64_t>), blocks, HM_BLOCK, 0, stream, *s);
  }
}

/* Writes `in`, converted and broadcast, to `out`. */
static int copy_view(const hm_view *out, const hm_view *in, void *stream) {
  if (in->flags & HM_VIEW_SCALAR) return hm_cuda_fill_scalar(out, in, stream);
  hm_loop loop;
  if (hm__loop_make(&loop, out, 1, in) == 0) return HM_OK;
  const bool floats = is_float32_or_half(out->dtype) && is_float32_or_half(in->dtype);
  const bool turns = (floats || out->dtype == in->dtype) && find_turn(&loop) >= 0;
  if (floats && out->dtype != in->dtype && !turns)
    return hm_elements_run<identity, float>("cast", out, in, NULL, NULL, HM_OP_CAST, stream);
  int64_t base[2] = {0, 0};
  return hm_each_piece(&loop, 2, base, [&](const hm_loop &l, const int64_t *at) {
    sides s;
    memset(&s, 0, sizeof s);
    s.dst = hm_element(out->data, at[0], out->dtype), s.src = hm_element(in->data, at[1], in->dtype);
    s.dst_dtype = out->dtype, s.src_dtype = in->dtype;
    const int row = turns ? find_turn(&l) : -1;
    if (row >= 0) return run_turned(&l, row, &s, stream);
    if (s.dst_dtype == s.src_dtype) return run_bytes(l, &s, stream);
    s.walk = hm_make_walk<2>(&l);
    if (is_f8(s.dst_dtype) || is_f8(s.src_dtype))
      return HM_RUN("cast", copy_f8, hm_blocks(s.walk.count), HM_BLOCK, 0, stream, s);
    return HM_RUN("cast", copy_any, hm_blocks(s.walk.count), HM_BLOCK, 0, stream, s);
  });
}

extern "C" int hm_cuda_copy(const hm_kernel_call *call) {
  if (call->op == HM_OP_CAST) return copy_view(&call->out[0], &call->in[0], call->stream);
  if (call->op == HM_OP_COPY_) return copy_view(&call->out[0], &call->in[1], call->stream);
  return hm_cuda_fail(HM_ERR_UNSUPPORTED, "copy: op %d is unknown to cuda", call->op);
}
