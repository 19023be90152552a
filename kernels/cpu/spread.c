/*
 * spread.c -- var, std, norm and logsumexp over dims.
 *
 * Compiled once per instruction set.  Called through hm_isa.reduce, by reduce.c.
 *
 * Each chunk of reduced elements (split.h) is looked at twice where the op needs it: first for a centre (the mean, or the largest value), then
 * for a sum of terms about that centre.  The second look finds the chunk in cache.  Chunks are joined in order:
 *   var, std    centre: mean           terms: (x - centre)^2            joined as Chan, Golub and LeVeque have it
 *   logsumexp   centre: largest value  terms: e^(x - centre)            joined by moving the sums to the larger centre
 *   norm        centre: largest |x|    terms: (|x| / centre)^p          likewise; p = 0, 1, and 2 where float64 holds all
 *                                                                       squares, need no centre
 * Sums are made in float64; only the exponentials of float32 inputs are float32.  Chunks and leaves depend on shapes and strides only.
 */
#include "../math.h"
#include "split.h"

enum { ROW_BLOCK = 256 };

typedef enum kind { VARIANCE, COUNT, ABSOLUTE, SQUARE, RATIO, POWER, EXP } kind; /* RATIO: POWER with p = 2 */

/* What is known of some elements: how many, their centre, the sum of the terms. */
typedef struct state {
  double n, centre, sum;
} state;

typedef struct work {
  hm_split split;
  kind kind;
  double p; /* norm */
} work;

static bool is_scaled(kind k) { return k == RATIO || k == POWER; }
static bool has_centre(kind k) { return k == VARIANCE || k == EXP || is_scaled(k); }

/* ====== Terms ====== */

/* y = terms of x about centres c[0], c[by], ...: by is 1 for the columns of a row, 0 where all have the same. */
#define EACH(expression)                                                                                               \
  for (int64_t i = 0; i < n; i++) {                                                                                    \
    const double v = x[i], m = c[by * i];                                                                              \
    (void)m;                                                                                                           \
    y[i] = (expression);                                                                                               \
  }

enum { MOST_FACTORS = 64 }; /* powers up to this one are products */

/* y = |x / c|^p for a whole p from 3 on, by squaring. */
static inline __attribute__((always_inline)) void whole_powers(int p, double *restrict y, const double *restrict x,
                                                               const double *restrict c, int64_t by, int64_t n) {
  double square[HM_LEAF];
  for (int64_t i = 0; i < n; i++) {
    square[i] = hm_abs_f64(x[i]) / c[by * i];
    y[i] = p & 1 ? square[i] : 1;
  }
  while (p >>= 1) {
    for (int64_t i = 0; i < n; i++) square[i] *= square[i];
    if (p & 1)
      for (int64_t i = 0; i < n; i++) y[i] *= square[i];
  }
}

static inline __attribute__((always_inline)) void make_terms(kind k, double p, double *restrict y,
                                                             const double *restrict x, const double *restrict c,
                                                             int64_t by, int64_t n) {
  switch (k) {
  case VARIANCE: EACH((v - m) * (v - m)) break;
  case COUNT: EACH(v != 0 ? 1.0 : 0.0) break;
  case ABSOLUTE: EACH(hm_abs_f64(v)) break;
  case SQUARE: EACH(v * v) break;
  case RATIO: EACH(v / m * (v / m)) break;
  case POWER:
    if (p >= 3 && p <= MOST_FACTORS && p == (int)p) whole_powers((int)p, y, x, c, by, n);
    else {
      EACH(hm_pow_f64(hm_abs_f64(v) / m, p))
    }
    break;
  case EXP: EACH(hm_exp_f64(v - m)) break;
  }
}

static void row_terms(const work *w, double *y, const double *x, double c, int64_t n) {
  make_terms(w->kind, w->p, y, x, &c, 0, n);
}

static void column_terms(const work *w, double *y, const double *x, const double *c, int64_t n) {
  make_terms(w->kind, w->p, y, x, c, 1, n);
}

/* Absolute values where the largest of those is asked for. */
static const double *magnitudes(const work *w, double *y, const double *x, int64_t n) {
  if (!is_scaled(w->kind)) return x;
  for (int64_t i = 0; i < n; i++) y[i] = hm_abs_f64(x[i]);
  return y;
}

/* The number that terms are taken about: infinities cannot be, and nothing is divided by 0. */
static double usable(kind k, double centre) {
  if (k == EXP) return hm_abs_f64(centre) == (double)INFINITY ? 0 : centre;
  if (is_scaled(k)) return centre == 0 || centre == (double)INFINITY ? 1 : centre;
  return centre;
}

/* ====== Joining chunks ====== */

/* A sum of terms about `from`, about `to` instead. */
static double moved(const work *w, double sum, double from, double to) {
  if (sum == 0 || from == to) return sum;
  if (w->kind == EXP) return sum * hm_exp_f64(from - to);
  return sum * hm_pow_f64(from / to, w->p);
}

static state joined(const work *w, state a, state b) {
  if (!has_centre(w->kind)) return (state){a.n + b.n, 0, a.sum + b.sum};
  if (w->kind == VARIANCE) {
    const double n = a.n + b.n, d = b.centre - a.centre;
    return (state){n, a.centre + d * (b.n / n), a.sum + b.sum + d * d * (a.n * (b.n / n))};
  }
  const double centre = HM_MAX_S(a.centre, b.centre), to = usable(w->kind, centre);
  return (state){a.n + b.n, centre,
                 moved(w, a.sum, usable(w->kind, a.centre), to) + moved(w, b.sum, usable(w->kind, b.centre), to)};
}

/* The result that a state stands for. */
static double result(const work *w, state s) {
  const hm_kernel_call *call = w->split.call;
  switch (w->kind) {
  case VARIANCE: {
    const double n = s.n - call->attr[1].f, var = s.sum / (n > 0 ? n : 0);
    return call->op == HM_OP_STD ? hm_sqrt_f64(var) : var;
  }
  case SQUARE: return hm_sqrt_f64(s.sum);
  case RATIO: return usable(RATIO, s.centre) * hm_sqrt_f64(s.sum);
  case POWER: return usable(POWER, s.centre) * hm_pow_f64(s.sum, 1 / w->p);
  case EXP: return usable(EXP, s.centre) + hm_log_f64(s.sum);
  default: return s.sum;
  }
}

/* ====== One chunk: rows ====== */

static double row_centre(const work *w, int64_t base, int64_t begin, int64_t end) {
  double tile[HM_LEAF], size[HM_LEAF], top = -(double)INFINITY;
  hm_pairs_f64 sum = {.count = 0};
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    const double *x = hm_split_run(&w->split, base, i, n, tile);
    if (w->kind == VARIANCE) {
      hm_pairs_add_f64(&sum, hm_sum_row_f64(x, n));
    } else {
      const double m = hm_max_row_f64(magnitudes(w, size, x, n), n);
      top = HM_MAX_S(top, m);
    }
  }
  return w->kind == VARIANCE ? hm_pairs_total_f64(&sum) / (double)(end - begin) : top;
}

static state row_chunk(const work *w, int64_t base, int64_t begin, int64_t end) {
  double tile[HM_LEAF], terms[HM_LEAF];
  hm_pairs_f64 sum = {.count = 0};
  const double centre = has_centre(w->kind) ? row_centre(w, base, begin, end) : 0, c = usable(w->kind, centre);
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    row_terms(w, terms, hm_split_run(&w->split, base, i, n, tile), c, n);
    hm_pairs_add_f64(&sum, hm_sum_row_f64(terms, n));
  }
  return (state){(double)(end - begin), centre, hm_pairs_total_f64(&sum)};
}

/* The same for logsumexp of what is computed in float32. */
static state row_chunk_exp(const work *w, int64_t base, int64_t begin, int64_t end) {
  float tile[HM_LEAF], e[HM_LEAF], top = -INFINITY;
  hm_pairs_f64 sum = {.count = 0};
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    const float m = hm_max_row_f32(hm_split_run(&w->split, base, i, n, tile), n);
    top = HM_MAX_S(top, m);
  }
  const float c = (float)usable(EXP, (double)top);
  for (int64_t i = begin; i < end; i += HM_LEAF) {
    const int64_t n = end - i < HM_LEAF ? end - i : HM_LEAF;
    const float *x = hm_split_run(&w->split, base, i, n, tile);
    for (int64_t j = 0; j < n; j++) e[j] = hm_exp_f32(x[j] - c);
    hm_pairs_add_f64(&sum, (double)hm_sum_row_f32(e, n));
  }
  return (state){(double)(end - begin), (double)top, hm_pairs_total_f64(&sum)};
}

/* ====== Rows of one leaf ====== */

/* Rows that lie end to end, [rows][n] of float64. */
static void dense_rows(const work *w, const double *x, int64_t rows, int64_t n, state *s) {
  double terms[HM_LEAF];
  for (int64_t r = 0; r < rows; r++, x += n) {
    double centre = 0;
    if (w->kind == VARIANCE) centre = hm_sum_row_f64(x, n) / (double)n;
    else if (has_centre(w->kind)) centre = hm_max_row_f64(magnitudes(w, terms, x, n), n);
    row_terms(w, terms, x, usable(w->kind, centre), n);
    s[r] = (state){(double)n, centre, hm_sum_row_f64(terms, n)};
  }
}

/* The same for logsumexp of what is computed in float32; at most HM_SPLIT_TILE elements. */
static void dense_rows_exp(const float *x, int64_t rows, int64_t n, state *s) {
  float e[HM_SPLIT_TILE];
  for (int64_t r = 0; r < rows; r++) {
    const float top = hm_max_row_f32(x + r * n, n), c = (float)usable(EXP, (double)top);
    for (int64_t i = r * n; i < (r + 1) * n; i++) e[i] = x[i] - c;
    s[r].centre = (double)top;
  }
  for (int64_t i = 0; i < rows * n; i++) e[i] = hm_exp_f32(e[i]);
  for (int64_t r = 0; r < rows; r++) s[r] = (state){(double)n, s[r].centre, (double)hm_sum_row_f32(e + r * n, n)};
}

/* Outputs [k, k + n), each of at most one leaf.  Rows that lie end to end are converted together. */
static void short_rows(const work *w, int64_t k, int64_t n, state *s) {
  uint64_t tile[HM_SPLIT_TILE] __attribute__((aligned(64)));
  const hm_split *p = &w->split;
  const bool dense = p->nk == 1 && p->ks[0] == p->n_red && (p->nr == 0 || (p->nr == 1 && p->rs[0] == 1));
  const int64_t group = dense ? HM_SPLIT_TILE / p->n_red : 1;
  for (int64_t i = 0; i < n; i += group) {
    const int64_t rows = n - i < group ? n - i : group;
    const int64_t base = hm_split_offset(p->nk, p->kn, p->ks, k + i);
    const void *x = dense ? hm_tile_in(tile, p->type, hm_at(p->x, base, p->dtype), p->dtype, rows * p->n_red, 1)
                          : hm_split_run(p, base, 0, p->n_red, tile);
    if (p->type == HM_F32) dense_rows_exp(x, rows, p->n_red, s + i);
    else dense_rows(w, x, rows, p->n_red, s + i);
  }
}

/* ====== One chunk: a tile of columns ====== */

/* Sums (variance) or largest values of the columns of some rows into c. */
static void gather_centres(const work *w, double *c, const double *x, int64_t ld, int64_t rows, int64_t width) {
  double size[HM_SPLIT_COLS];
  for (int64_t r = 0; r < rows; r++, x += ld) {
    const double *v = magnitudes(w, size, x, width);
    if (w->kind == VARIANCE)
      for (int64_t i = 0; i < width; i++) c[i] += v[i];
    else
      for (int64_t i = 0; i < width; i++) c[i] = HM_MAX_S(c[i], v[i]);
  }
}

static void column_centres(const work *w, const hm_split_unit *u, int64_t begin, int64_t end, double *c) {
  double tile[HM_SPLIT_TILE];
  for (int64_t i = 0; i < u->width; i++) c[i] = w->kind == VARIANCE ? 0 : -(double)INFINITY;
  for (int64_t r = begin; r < end;) {
    int64_t rows = end - r, ld;
    const double *x = hm_split_rows(&w->split, u->base, r, &rows, u->width, tile, &ld);
    gather_centres(w, c, x, ld, rows, u->width);
    r += rows;
  }
  if (w->kind == VARIANCE)
    for (int64_t i = 0; i < u->width; i++) c[i] /= (double)(end - begin);
}

static void column_chunk(const work *w, const hm_split_unit *u, int64_t begin, int64_t end, state *out) {
  double tile[HM_SPLIT_TILE], terms[HM_SPLIT_COLS], centre[HM_SPLIT_COLS] = {0}, c[HM_SPLIT_COLS],
                                                    sum[HM_SPLIT_COLS] = {0};
  if (has_centre(w->kind)) column_centres(w, u, begin, end, centre);
  for (int64_t i = 0; i < u->width; i++) c[i] = usable(w->kind, centre[i]);
  for (int64_t r = begin; r < end;) {
    int64_t rows = end - r, ld;
    const double *x = hm_split_rows(&w->split, u->base, r, &rows, u->width, tile, &ld);
    for (int64_t j = 0; j < rows; j++) {
      column_terms(w, terms, x + j * ld, c, u->width);
      for (int64_t i = 0; i < u->width; i++) sum[i] += terms[i];
    }
    r += rows;
  }
  for (int64_t i = 0; i < u->width; i++) out[i] = (state){(double)(end - begin), centre[i], sum[i]};
}

static void column_chunk_exp(const work *w, const hm_split_unit *u, int64_t begin, int64_t end, state *out) {
  float tile[HM_SPLIT_TILE], top[HM_SPLIT_COLS], c[HM_SPLIT_COLS], e[HM_SPLIT_COLS];
  double sum[HM_SPLIT_COLS] = {0};
  for (int64_t i = 0; i < u->width; i++) top[i] = -INFINITY;
  for (int64_t r = begin; r < end;) {
    int64_t rows = end - r, ld;
    const float *x = hm_split_rows(&w->split, u->base, r, &rows, u->width, tile, &ld);
    for (int64_t j = 0; j < rows; j++, x += ld)
      for (int64_t i = 0; i < u->width; i++) top[i] = HM_MAX_S(top[i], x[i]);
    r += rows;
  }
  for (int64_t i = 0; i < u->width; i++) c[i] = (float)usable(EXP, (double)top[i]);
  for (int64_t r = begin; r < end;) {
    int64_t rows = end - r, ld;
    const float *x = hm_split_rows(&w->split, u->base, r, &rows, u->width, tile, &ld);
    for (int64_t j = 0; j < rows; j++, x += ld) {
      for (int64_t i = 0; i < u->width; i++) e[i] = hm_exp_f32(x[i] - c[i]);
      for (int64_t i = 0; i < u->width; i++) sum[i] += (double)e[i];
    }
    r += rows;
  }
  for (int64_t i = 0; i < u->width; i++) out[i] = (state){(double)(end - begin), (double)top[i], sum[i]};
}

/* ====== All chunks ====== */

/* Results of n outputs from k on. */
static void finish(const work *w, int64_t k, int64_t n, const state *s) {
  double values[HM_SPLIT_COLS];
  for (int64_t done = 0; done < n;) {
    const int64_t m = n - done < HM_SPLIT_COLS ? n - done : HM_SPLIT_COLS;
    for (int64_t i = 0; i < m; i++) values[i] = result(w, s[done + i]);
    hm_split_store(&w->split, 0, k + done, m, values, HM_F64);
    done += m;
  }
}

static state *partials(const work *w, int64_t chunk) {
  return (state *)w->split.call->workspace + chunk * w->split.n_keep;
}

static void spread_rows(const work *w, int threads) {
  const hm_split *p = &w->split;
  int64_t block = 4 * HM_LEAF / p->n_red; /* rows that are worth a unit */
  block = block < 1 ? 1 : block > ROW_BLOCK ? ROW_BLOCK : block;
  const int64_t units = (p->n_keep + block - 1) / block * p->n_chunks;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    state s[ROW_BLOCK];
    const int64_t k = u / p->n_chunks * block, n = p->n_keep - k < block ? p->n_keep - k : block,
                  chunk = u % p->n_chunks, begin = chunk * p->chunk,
                  end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
    if (p->n_red <= HM_LEAF) short_rows(w, k, n, s);
    for (int64_t i = 0; i < n && p->n_red > HM_LEAF; i++) {
      const int64_t base = hm_split_offset(p->nk, p->kn, p->ks, k + i);
      s[i] = p->type == HM_F32 ? row_chunk_exp(w, base, begin, end) : row_chunk(w, base, begin, end);
    }
    if (p->n_chunks == 1) finish(w, k, n, s);
    else partials(w, chunk)[k] = s[0];
  }
}

static void spread_columns(const work *w, int threads) {
  const hm_split *p = &w->split;
  const int64_t units = hm_split_units(p);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < units; i++) {
    state s[HM_SPLIT_COLS];
    const hm_split_unit u = hm_split_unit_of(p, i);
    const int64_t begin = u.chunk * p->chunk, end = begin + p->chunk < p->n_red ? begin + p->chunk : p->n_red;
    if (p->type == HM_F32) column_chunk_exp(w, &u, begin, end, s);
    else column_chunk(w, &u, begin, end, s);
    if (p->n_chunks == 1) finish(w, u.k, u.width, s);
    else memcpy(partials(w, u.chunk) + u.k, s, (size_t)u.width * sizeof *s);
  }
}

static void join_chunks(const work *w) {
  const hm_split *p = &w->split;
  state *all = partials(w, 0);
  for (int64_t c = 1; c < p->n_chunks; c++)
    for (int64_t k = 0; k < p->n_keep; k++) all[k] = joined(w, all[k], partials(w, c)[k]);
  finish(w, 0, p->n_keep, all);
}

/* ====== Entry ====== */

static kind kind_of(const hm_kernel_call *call) {
  if (call->op == HM_OP_LOGSUMEXP) return EXP;
  if (call->op != HM_OP_NORM) return VARIANCE;
  const double p = call->attr[0].f;
  if (p == 0) return COUNT;
  if (p == 1) return ABSOLUTE;
  return p != 2 ? POWER : call->compute == HM_F64 ? RATIO : SQUARE;
}

static void make_work(work *w, const hm_kernel_call *call) {
  const hm_attr *dims = &call->attr[call->op == HM_OP_NORM ? 1 : 0];
  const bool keep = call->attr[call->op == HM_OP_LOGSUMEXP ? 1 : 2].i != 0;
  const uint32_t everything = (1u << call->in[0].ndim) - 1;
  uint32_t mask = 0;
  for (int i = 0; i < dims->n; i++) mask |= 1u << dims->v[i];
  hm_split_make(&w->split, call, dims->n ? mask & everything : everything, keep, true);
  w->kind = kind_of(call);
  w->p = call->op == HM_OP_NORM ? call->attr[0].f : 0;
  w->split.type = w->kind == EXP && call->compute != HM_F64 ? HM_F32 : HM_F64;
}

/* Outputs exist but nothing is reduced into them. */
static void spread_nothing(const work *w) {
  const double value = w->kind == VARIANCE ? (double)NAN : w->kind == EXP ? -(double)INFINITY : 0;
  for (int64_t k = 0; k < w->split.n_keep; k++) hm_split_store(&w->split, 0, k, 1, &value, HM_F64);
}

int HM_ISA_FN(hm_cpu_spread)(const hm_kernel_call *call) {
  if (call->op != HM_OP_VAR && call->op != HM_OP_STD && call->op != HM_OP_NORM && call->op != HM_OP_LOGSUMEXP)
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no reduction with op id %d", call->op);
  work w;
  make_work(&w, call);
  const hm_split *p = &w.split;
  if (p->n_keep == 0) return HM_OK;
  if (p->n_red == 0) {
    spread_nothing(&w);
    return HM_OK;
  }
  const int threads = hm_cpu_threads(p->n_keep * p->n_red, w.kind == EXP ? 32 : 8);
  if (p->columns) spread_columns(&w, threads);
  else spread_rows(&w, threads);
  if (p->n_chunks > 1) join_chunks(&w);
  return HM_OK;
}

/* The split does not depend on the instruction set, so one of the three variants answers for all. */
#define HM_FIRST_baseline 1
#if HM_ISA_JOIN(HM_FIRST, HM_ISA)
int hm_cpu_spread_workspace(const hm_kernel_call *call, size_t *bytes) {
  work w;
  make_work(&w, call);
  *bytes = w.split.n_chunks > 1 ? (size_t)(w.split.n_chunks * w.split.n_keep) * sizeof(state) : 0;
  return HM_OK;
}
#endif
