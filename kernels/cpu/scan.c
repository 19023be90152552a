/*
 * scan.c -- running sums and products along a dim, and the gradients of prod and cumprod.
 *
 * Compiled once: the arithmetic is a chain, or bound by memory.  The family's kernel on the CPU; called through the backend's table.
 *
 * A line is what lies along the dim at one position of the others.  Lines are taken in pieces of `reach` steps, one at a time where the dim is
 * dense, up to 64 side by side where the lines lie side by side in memory; a piece is a tile of float64 (int64 for integers), rounded once on
 * the way out.  Sums of a lone line run as 16 chains within a piece, and a piece begins at 0: its sum is added to what came before.  So long
 * lines can be summed by several threads with the same bits.  Products are one chain: cut up, they could overflow where the whole does not.
 *
 * Gradients need no division, and so are right where elements are zero.  With P_k the product of the elements before k:
 *   prod      g * P_k * (product of the elements behind k)
 *   cumprod   P_k * S_k,  S_k = g_k + x_(k+1) * S_(k+1)
 * P is kept at the beginning of each piece (workspace); then pieces are taken from the last to the first.
 */
#include "vec.h"

enum {
  WIDE = 64,
  REACH_WIDE = 64,
  REACH = 1024,
  ROOM = WIDE * REACH_WIDE,
  CHAINS = 16,
  FEW_LINES = 16,
  LONG = 1 << 16
};
enum { X, OUT, G }; /* views of the rows */

typedef struct work {
  hm_rows rows;
  int op, type; /* type: HM_F64 or HM_I64 */
  char *data[HM_ROW_VIEWS];
  int64_t reach, pieces; /* steps to a piece, pieces of a line */
  bool side_by_side;
  void *space; /* 8 bytes for each piece of each line */
} work;

/* Lines [line, line + wide), as one unit of work. */
typedef struct lines {
  int64_t line, wide;
  int64_t at[HM_ROW_VIEWS], pitch[HM_ROW_VIEWS]; /* where the first begins; from one to the next */
} lines;

/* ====== Tiles: element (step l, line c) of a piece is tile[l * wide + c] ====== */

static void tile_read(const work *w, int view, const lines *s, int64_t begin, int64_t n, void *tile) {
  const int dtype = w->rows.view[view]->dtype;
  const int64_t step = w->rows.step[view], from = s->at[view] + begin * step;
  if (s->wide == 1) {
    hm_tile_fill(tile, w->type, hm_at(w->data[view], from, dtype), dtype, n, step);
    return;
  }
  for (int64_t l = 0; l < n; l++)
    hm_tile_fill(hm_at_mut(tile, l * s->wide, w->type), w->type, hm_at(w->data[view], from + l * step, dtype), dtype,
                 s->wide, s->pitch[view]);
}

static void tile_write(const work *w, const lines *s, int64_t begin, int64_t n, const void *tile) {
  const int dtype = w->rows.view[OUT]->dtype;
  const int64_t step = w->rows.step[OUT], to = s->at[OUT] + begin * step;
  if (s->wide == 1) {
    hm_tile_out(hm_at_mut(w->data[OUT], to, dtype), dtype, step, tile, w->type, n);
    return;
  }
  for (int64_t l = 0; l < n; l++)
    hm_tile_out(hm_at_mut(w->data[OUT], to + l * step, dtype), dtype, s->pitch[OUT], hm_at(tile, l * s->wide, w->type),
                w->type, s->wide);
}

static int64_t piece_length(const work *w, int64_t piece) {
  const int64_t left = w->rows.length - piece * w->reach;
  return left < w->reach ? left : w->reach;
}

/* The workspace's number for a piece of a line. */
static void *kept(const work *w, int64_t line, int64_t piece) {
  return (uint64_t *)w->space + line * w->pieces + piece;
}

/* ====== Sums and products ====== */

#define DEFINE_SCAN(T, S)                                                                                              \
  /* Running sums of a lone line's piece, from 0, plus carry; returns the piece's own sum. */                          \
  static T sum_piece_##S(T *t, int64_t n, T carry) {                                                                   \
    T run[CHAINS] = {0}, sum = 0;                                                                                      \
    const int64_t each = n / CHAINS;                                                                                   \
    for (int64_t i = 0; i < each; i++)                                                                                 \
      for (int k = 0; k < CHAINS; k++) t[k * each + i] = run[k] += t[k * each + i];                                    \
    for (int k = 0; k < CHAINS; k++) {                                                                                 \
      const T add = carry + sum;                                                                                       \
      for (int64_t i = k * each; i < (k + 1) * each; i++) t[i] += add;                                                 \
      sum += run[k];                                                                                                   \
    }                                                                                                                  \
    for (int64_t i = CHAINS * each; i < n; i++) {                                                                      \
      sum += t[i];                                                                                                     \
      t[i] = carry + sum;                                                                                              \
    }                                                                                                                  \
    return sum;                                                                                                        \
  }                                                                                                                    \
  static void scan_lines_##S(const work *w, const lines *s, bool product) {                                            \
    T tile[ROOM], carry[WIDE];                                                                                         \
    for (int c = 0; c < WIDE; c++) carry[c] = product;                                                                 \
    for (int64_t p = 0; p < w->pieces; p++) {                                                                          \
      const int64_t n = piece_length(w, p), wide = s->wide;                                                            \
      tile_read(w, X, s, p * w->reach, n, tile);                                                                       \
      if (product)                                                                                                     \
        for (int64_t l = 0; l < n; l++)                                                                                \
          for (int64_t c = 0; c < wide; c++) tile[l * wide + c] = carry[c] *= tile[l * wide + c];                      \
      else if (wide == 1) carry[0] += sum_piece_##S(tile, n, carry[0]);                                                \
      else                                                                                                             \
        for (int64_t l = 0; l < n; l++)                                                                                \
          for (int64_t c = 0; c < wide; c++) tile[l * wide + c] = carry[c] += tile[l * wide + c];                      \
      tile_write(w, s, p * w->reach, n, tile);                                                                         \
    }                                                                                                                  \
  }                                                                                                                    \
  /* One piece of a lone line: only its sum, to the workspace; or with what came before, from there. */                \
  static void sum_apart_##S(const work *w, const lines *s, int64_t p, bool write) {                                    \
    T tile[ROOM], *const own = kept(w, s->line, p);                                                                    \
    const int64_t n = piece_length(w, p);                                                                              \
    tile_read(w, X, s, p * w->reach, n, tile);                                                                         \
    const T sum = sum_piece_##S(tile, n, write ? *own : 0);                                                            \
    if (write) tile_write(w, s, p * w->reach, n, tile);                                                                \
    else *own = sum;                                                                                                   \
  }                                                                                                                    \
  static void carry_over_##S(const work *w, int64_t line) {                                                            \
    T carry = 0;                                                                                                       \
    for (int64_t p = 0; p < w->pieces; p++) {                                                                          \
      T *own = kept(w, line, p);                                                                                       \
      const T sum = *own;                                                                                              \
      *own = carry;                                                                                                    \
      carry += sum;                                                                                                    \
    }                                                                                                                  \
  }

typedef double number_f64 __attribute__((may_alias));
typedef uint64_t number_u64 __attribute__((may_alias));
DEFINE_SCAN(number_f64, f64)
DEFINE_SCAN(number_u64, u64)

/* ====== Gradients of products ====== */

/* Products of all elements before each piece, to the workspace. */
static void products_before(const work *w, const lines *s) {
  double tile[ROOM], carry[WIDE];
  const int64_t wide = s->wide;
  for (int64_t c = 0; c < wide; c++) carry[c] = 1;
  for (int64_t p = 0; p < w->pieces; p++) {
    for (int64_t c = 0; c < wide; c++) *(number_f64 *)kept(w, s->line + c, p) = carry[c];
    if (p == w->pieces - 1) return;
    tile_read(w, X, s, p * w->reach, w->reach, tile);
    for (int64_t l = 0; l < w->reach; l++)
      for (int64_t c = 0; c < wide; c++) carry[c] *= tile[l * wide + c];
  }
}

/* y[l] = product of the elements before l; carry: of those before the piece. */
static void exclusive_products(double *y, const double *x, double *carry, int64_t n, int64_t wide) {
  for (int64_t l = 0; l < n; l++) {
    for (int64_t c = 0; c < wide; c++) {
      y[l * wide + c] = carry[c];
      carry[c] *= x[l * wide + c];
    }
  }
}

/* y: products before, becomes the gradient; behind: what comes from the pieces behind.  g: one number for each line. */
static void prod_piece(double *y, const double *x, const double *g, double *behind, int64_t n, int64_t wide) {
  for (int64_t l = n - 1; l >= 0; l--) {
    for (int64_t c = 0; c < wide; c++) {
      y[l * wide + c] = g[c] * (y[l * wide + c] * behind[c]);
      behind[c] *= x[l * wide + c];
    }
  }
}

/* The same for cumprod; g: a number for each element. */
static void cumprod_piece(double *y, const double *x, const double *g, double *behind, int64_t n, int64_t wide) {
  for (int64_t l = n - 1; l >= 0; l--) {
    for (int64_t c = 0; c < wide; c++) {
      const double s = g[l * wide + c] + behind[c];
      y[l * wide + c] *= s;
      behind[c] = x[l * wide + c] * s;
    }
  }
}

static void gradient_lines(const work *w, const lines *s) {
  double x[ROOM], y[ROOM], g[ROOM], before[WIDE], behind[WIDE];
  const bool all = w->op == HM_OP_PROD_BACKWARD;
  const int64_t wide = s->wide;
  for (int64_t c = 0; c < wide; c++) before[c] = 1, behind[c] = all;
  if (w->pieces > 1) products_before(w, s);
  if (all) tile_read(w, G, s, 0, 1, g);
  for (int64_t p = w->pieces - 1; p >= 0; p--) {
    const int64_t n = piece_length(w, p), begin = p * w->reach;
    for (int64_t c = 0; c < wide && w->pieces > 1; c++) before[c] = *(number_f64 *)kept(w, s->line + c, p);
    tile_read(w, X, s, begin, n, x);
    exclusive_products(y, x, before, n, wide);
    if (!all) tile_read(w, G, s, begin, n, g);
    (all ? prod_piece : cumprod_piece)(y, x, g, behind, n, wide);
    tile_write(w, s, begin, n, y);
  }
}

/* ====== Setting up ====== */

/* A view of one line of all elements (dense memory). */
static hm_view flat_view(const hm_view *v, int64_t numel) {
  hm_view w = *v;
  w.ndim = 1;
  w.shape[0] = numel;
  w.stride[0] = 1;
  return w;
}

/* The gradient of a product, repeated along the dim: x's shape. */
static hm_view spread_view(const hm_view *g, const hm_view *x, int dim) {
  hm_view w = *x;
  w.data = g->data;
  w.dtype = g->dtype;
  for (int d = 0; d < x->ndim; d++)
    w.stride[d] = d == dim ? 0 : g->ndim == x->ndim ? g->stride[d] : g->stride[d < dim ? d : d - 1];
  return w;
}

static bool is_sum(int op) { return op == HM_OP_CUMSUM || op == HM_OP_CUMSUM_REVERSE; }

/* Views of x, the result and g, all of x's shape, and the dim. */
static int make_views(const hm_kernel_call *call, hm_view view[HM_ROW_VIEWS]) {
  const int op = call->op;
  const bool forward = is_sum(op) || op == HM_OP_CUMPROD;
  view[X] = call->in[forward ? 0 : 1];
  view[OUT] = call->out[0];
  view[G] = call->in[0];
  int dim = (int)call->attr[0].i;
  if (op != HM_OP_PROD_BACKWARD) return view[X].ndim ? dim : 0;
  if (call->attr[0].i == HM_NONE) {
    int64_t numel = 1;
    for (int d = 0; d < view[X].ndim; d++) numel *= view[X].shape[d];
    view[X] = flat_view(&view[X], numel);
    view[OUT] = flat_view(&view[OUT], numel);
    view[G].ndim = 1;
    dim = 0;
  }
  view[G] = spread_view(&view[G], &view[X], dim);
  return dim;
}

static void make_work(work *w, const hm_kernel_call *call, hm_view view[HM_ROW_VIEWS]) {
  const int dim = make_views(call, view);
  const hm_view *views[HM_ROW_VIEWS] = {&view[X], &view[OUT], &view[G]};
  *w = (work){.op = call->op, .type = call->compute == HM_I64 ? HM_I64 : HM_F64, .space = call->workspace};
  hm_rows *r = &w->rows;
  hm_rows_init(r, dim, call->n_in > 1 ? 3 : 2, views);
  for (int v = 0; v < (call->n_in > 1 ? 3 : 2); v++) w->data[v] = views[v]->data;
  w->side_by_side = r->nd > 0 && r->length > 1 && r->step[X] != 1 && r->stride[X][r->nd - 1] == 1;
  w->reach = w->side_by_side ? REACH_WIDE : REACH;
  w->pieces = (r->length + w->reach - 1) / w->reach;
  if (call->op != HM_OP_CUMSUM_REVERSE || r->length < 2 || r->count == 0) return;
  for (int v = 0; v < 2; v++) { /* from the end: along a step the other way */
    w->data[v] += (r->length - 1) * r->step[v] * hm_dtype_size(views[v]->dtype);
    r->step[v] = -r->step[v];
  }
}

static lines lines_at(const work *w, int64_t line, int64_t wide) {
  const hm_rows *r = &w->rows;
  lines s = {.line = line, .wide = wide};
  for (int v = 0; v < HM_ROW_VIEWS && r->view[v]; v++) {
    s.at[v] = hm_rows_offset(r, v, line);
    s.pitch[v] = wide > 1 ? r->stride[v][r->nd - 1] : 1;
  }
  return s;
}

/* Few long lines: summed by pieces. */
static bool by_pieces(const work *w) {
  return is_sum(w->op) && !w->side_by_side && w->rows.count < FEW_LINES && w->rows.length >= LONG;
}

static void sum_by_pieces(const work *w, bool write, int threads) {
  const int64_t units = w->rows.count * w->pieces;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t u = 0; u < units; u++) {
    const lines s = lines_at(w, u / w->pieces, 1);
    if (w->type == HM_I64) sum_apart_u64(w, &s, u % w->pieces, write);
    else sum_apart_f64(w, &s, u % w->pieces, write);
  }
}

static void run_lines(const work *w, const lines *s) {
  if (w->op == HM_OP_PROD_BACKWARD || w->op == HM_OP_CUMPROD_BACKWARD) gradient_lines(w, s);
  else if (w->type == HM_I64) scan_lines_u64(w, s, w->op == HM_OP_CUMPROD);
  else scan_lines_f64(w, s, w->op == HM_OP_CUMPROD);
}

/* ====== Entry ====== */

int hm_cpu_scan_workspace(const hm_kernel_call *call, size_t *bytes) {
  work w;
  hm_view view[HM_ROW_VIEWS];
  make_work(&w, call, view);
  const bool gradient = !is_sum(call->op);
  *bytes = w.pieces > 1 && (gradient || by_pieces(&w)) ? (size_t)(w.rows.count * w.pieces) * sizeof(uint64_t) : 0;
  return HM_OK;
}

int hm_cpu_scan(const hm_kernel_call *call) {
  work w;
  hm_view view[HM_ROW_VIEWS];
  make_work(&w, call, view);
  const int64_t count = w.rows.count, length = w.rows.length;
  if (count == 0 || length == 0) return HM_OK;
  const int threads = hm_cpu_threads(count * length, 16);
  if (threads > 1 && by_pieces(&w)) {
    sum_by_pieces(&w, false, threads);
    for (int64_t i = 0; i < count; i++) (w.type == HM_I64 ? carry_over_u64 : carry_over_f64)(&w, i);
    sum_by_pieces(&w, true, threads);
    return HM_OK;
  }
  const int64_t inner = w.side_by_side ? w.rows.n[w.rows.nd - 1] : 1, tiles = (inner + WIDE - 1) / WIDE;
  const int64_t units = count / inner * tiles;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    const int64_t first = u % tiles * WIDE, left = inner - first;
    const lines s = lines_at(&w, u / tiles * inner + first, left < WIDE ? left : WIDE);
    run_lines(&w, &s);
  }
  return HM_OK;
}
