/*
 * im2col.cu -- convolution's windows as the lines of a matrix, and the way back.
 *
 * In channels-last a window's pixel is a run of channels, so lines are made of runs: a thread moves 16 bytes where
 * strides and sizes allow it.  col2im is in gather form: each element of the image adds the windows that cover it, in
 * their order; nothing is added atomically. For conv.cu.  Owns nothing.
 */
#include "view.h"

/* One call of im2col. */
struct unfold {
  hm_im2col g;
  const void *x;
  void *col;
  hm_divisor by_c, by_kw, by_kh, by_ow, by_oh, by_groups; /* by_c: channels of a group, in pieces */
  int64_t lines;                                          /* n * oh * ow */
  int64_t first_line;
  uint32_t count;
};

/* T: one element, or 16 bytes of them; sizes and strides count in T. */
template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) im2col(unfold u) {
  const hm_im2col &g = u.g;
  const int64_t per_group = g.c / g.groups;
  for (uint32_t i = hm_global_thread(); i < u.count; i += hm_global_threads()) {
    const uint32_t q1 = hm_divide(i, u.by_c), c = i - q1 * u.by_c.size;
    const uint32_t q2 = hm_divide(q1, u.by_kw), kx = q1 - q2 * u.by_kw.size;
    const uint32_t q3 = hm_divide(q2, u.by_kh), ky = q2 - q3 * u.by_kh.size;
    const uint32_t q4 = hm_divide(q3, u.by_groups), group = q3 - q4 * u.by_groups.size;
    const int64_t line = u.first_line + q4;
    const uint32_t q5 = hm_divide((uint32_t)line, u.by_ow), ox = (uint32_t)line - q5 * u.by_ow.size;
    const uint32_t n = hm_divide(q5, u.by_oh), oy = q5 - n * u.by_oh.size;
    const int64_t y = oy * g.sh - g.ph + ky * g.dh, x = ox * g.sw - g.pw + kx * g.dw;
    T v;
    memset(&v, 0, sizeof v);
    if (y >= 0 && y < g.h && x >= 0 && x < g.w)
      v = static_cast<const T *>(u.x)[n * g.xs[0] + (group * per_group + c) * g.xs[1] + y * g.xs[2] + x * g.xs[3]];
    static_cast<T *>(u.col)[(group * u.lines + line) * g.ld + (ky * g.kw + kx) * per_group + c] = v;
  }
}

template <class T> static int run_im2col(unfold u, void *stream) {
  const hm_im2col &g = u.g;
  const int64_t per_group = g.c / g.groups, per_line = g.groups * g.kh * g.kw * per_group;
  u.by_c = hm_make_divisor(per_group), u.by_kw = hm_make_divisor(g.kw), u.by_kh = hm_make_divisor(g.kh);
  u.by_groups = hm_make_divisor(g.groups), u.by_ow = hm_make_divisor(g.ow), u.by_oh = hm_make_divisor(g.oh);
  const int64_t most = (HM_CUDA_PIECE - 1) / per_line < 1 ? 1 : (HM_CUDA_PIECE - 1) / per_line;
  for (int64_t at = 0; at < u.lines; at += most) {
    const int64_t lines = u.lines - at < most ? u.lines - at : most;
    u.first_line = at;
    u.count = (uint32_t)(lines * per_line);
    const int status = HM_RUN("im2col", (im2col<T>), hm_blocks(u.count), HM_BLOCK, 0, stream, u);
    if (status != HM_OK) return status;
  }
  return HM_OK;
}

/* May 16 bytes be moved at a time?  Then sizes and strides are changed to count in such pieces. */
static bool to_pieces(unfold *u, int size) {
  hm_im2col *g = &u->g;
  const int64_t per = 16 / size;
  if (g->xs[1] != 1 || g->c / g->groups % per || g->ld % per || ((uintptr_t)u->x | (uintptr_t)u->col) % 16)
    return false;
  if (g->xs[0] % per || g->xs[2] % per || g->xs[3] % per) return false;
  g->c /= per, g->ld /= per;
  g->xs[0] /= per, g->xs[2] /= per, g->xs[3] /= per;
  return true;
}

static int check(const hm_im2col *g) {
  const int64_t lines = g->n * g->oh * g->ow, per_line = g->kh * g->kw * g->c;
  const int64_t most = (int64_t)1 << 31;
  if (lines >= most || per_line >= most || g->h >= most || g->w >= most)
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "convolution: 2^31 windows or more, or a window with 2^31 values");
  return HM_OK;
}

extern "C" int hm_cuda_im2col(const hm_im2col *g, const void *x, void *col, int dtype, void *stream) {
  unfold u;
  memset(&u, 0, sizeof u);
  u.g = *g, u.x = x, u.col = col;
  u.lines = g->n * g->oh * g->ow;
  if (u.lines == 0 || g->c == 0) return HM_OK;
  const int status = check(g);
  if (status != HM_OK) return status;
  const int size = hm_dtype_size(dtype);
  if (to_pieces(&u, size)) return run_im2col<uint4>(u, stream);
  if (size == 2) return run_im2col<uint16_t>(u, stream);
  if (size == 4) return run_im2col<uint32_t>(u, stream);
  if (size == 8) return run_im2col<uint64_t>(u, stream);
  return hm_cuda_fail(HM_ERR_DTYPE, "convolution: expected a floating dtype, got %s", hm_dtype_name(dtype));
}

/* ====== The way back ====== */

struct fold {
  hm_im2col g;
  hm_walk<5> walk; /* over the image; operands: x, and the coordinates n, c, y, x */
  int64_t first[5];
  const void *col;
  void *x;
  int32_t col_dtype, x_dtype;
  int64_t lines;
  hm_divisor by_group; /* channels of a group */
};

/* Does some window lie at image position `pixel` with kernel place k?  Then which. */
HM_DEV bool window_at(int64_t pixel, int k, int64_t stride, int64_t pad, int64_t dilation, int64_t count, int *window) {
  const int64_t from = pixel + pad - k * dilation;
  if (from < 0) return false;
  const int w = (int)from / (int)stride;
  *window = w;
  return (int64_t)w * stride == from && w < count;
}

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) col2im(fold f) {
  const hm_im2col &g = f.g;
  const int64_t per_group = f.by_group.size;
  for (uint32_t i = hm_global_thread(); i < f.walk.count; i += hm_global_threads()) {
    int64_t at[5];
    hm_offsets(f.walk, i, at);
    const int64_t n = f.first[1] + at[1], channel = f.first[2] + at[2], y = f.first[3] + at[3], x = f.first[4] + at[4];
    const uint32_t group = hm_divide((uint32_t)channel, f.by_group);
    const int64_t c = channel - group * per_group;
    T sum = (T)0;
    for (int ky = (int)g.kh - 1; ky >= 0; ky--) { /* windows from the first to the last */
      int oy;
      if (!window_at(y, ky, g.sh, g.ph, g.dh, g.oh, &oy)) continue;
      for (int kx = (int)g.kw - 1; kx >= 0; kx--) {
        int ox;
        if (!window_at(x, kx, g.sw, g.pw, g.dw, g.ow, &ox)) continue;
        const int64_t line = (n * g.oh + oy) * g.ow + ox;
        sum += hm_load<T>(f.col, f.col_dtype, (group * f.lines + line) * g.ld + (ky * g.kw + kx) * per_group + c);
      }
    }
    hm_store<T>(f.x, f.x_dtype, at[0], sum);
  }
}

extern "C" int hm_cuda_col2im(const hm_im2col *g, const void *col, int col_dtype, void *x, int x_dtype, void *stream) {
  hm_view out, in[4];
  memset(&out, 0, sizeof out);
  out.ndim = 4;
  out.data = x, out.dtype = (int16_t)x_dtype;
  const int64_t shape[4] = {g->n, g->c, g->h, g->w};
  for (int d = 0; d < 4; d++) out.shape[d] = shape[d], out.stride[d] = g->xs[d];
  for (int k = 0; k < 4; k++) { /* the coordinate along dim k as if it were memory */
    in[k] = out;
    for (int d = 0; d < 4; d++) in[k].stride[d] = d == k;
  }
  const int status = check(g);
  if (status != HM_OK) return status;
  hm_loop loop;
  if (hm__loop_make(&loop, &out, 4, in) == 0) return HM_OK;
  int64_t base[5] = {0};
  return hm_each_piece(&loop, 5, base, [&](const hm_loop &l, const int64_t *at) {
    fold f;
    memset(&f, 0, sizeof f);
    f.g = *g, f.col = col, f.col_dtype = col_dtype, f.x_dtype = x_dtype;
    f.x = hm_element(x, at[0], x_dtype);
    f.walk = hm_make_walk<5>(&l);
    for (int k = 0; k < 5; k++) f.first[k] = at[k];
    f.lines = g->n * g->oh * g->ow;
    f.by_group = hm_make_divisor(g->c / g->groups);
    const unsigned blocks = hm_blocks(f.walk.count);
    if (x_dtype == HM_F64 || col_dtype == HM_F64)
      return HM_RUN("col2im", (col2im<double>), blocks, HM_BLOCK, 0, stream, f);
    return HM_RUN("col2im", (col2im<float>), blocks, HM_BLOCK, 0, stream, f);
  });
}
