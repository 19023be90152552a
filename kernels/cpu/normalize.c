/*
 * normalize.c -- batch_norm and group_norm, and their gradients.
 *
 * Compiled once per instruction set.  Called through norm.c, which hands on what is not a softmax; the row norms go on to rownorm.c.
 *
 * Forward: moments of each part (normalize.h) in one pass over memory; parts joined in double; coefficients mean, scale and bias for each
 * channel; y = (x - mean) * scale + bias.  Backward: sums of g and g * (x - mean) of each part; dx = g * scale - (less + (x - mean) * tilt).
 * Moments are sums about the mean of all numbers before, joined leaf by leaf (Chan's formula): what is lost to cancellation stays
 * below what the true spread rounds away.
 *
 * Tiles of channels-innermost memory are rows of channels; a plane is taken as rows of 64 pixels with the same coefficients everywhere.
 * Half types are converted tile by tile.  Statistics of parts and their joining are double.  All memory is the call's workspace.
 */
#include "normalize.h"
#include "vec.h"

#define HM_TYPE float
#define HM_TILE(name) name##_f32
#include "normalize_tiles.h"
#undef HM_TYPE
#undef HM_TILE
#define HM_TYPE double
#define HM_TILE(name) name##_f64
#include "normalize_tiles.h"
#undef HM_TYPE
#undef HM_TILE

/* Channels of a strip; numbers of a tile and of a leaf, rows of a leaf at least; columns that narrow rows and planes are made to. */
enum { STRIP = 512, TILE = 2048, LEAF = 4096, LEAF_ROWS = 32, WIDE = 64, SPAN = 64 };
enum { MEAN, SCALE, BIAS, LESS, TILT, COEFFICIENTS };

typedef enum pass { MOMENTS, APPLY, SUMS, GRADIENT } pass;

typedef struct job {
  hm_channel_plan p;
  const hm_view *x, *g, *out;      /* g: NULL forward; out: y or dx */
  int type;                        /* computed in: F32 or F64 */
  bool relu, plain;                /* plain: dx = g * scale, since the statistics did not come from x */
  double *stat;                    /* [images * parts][2][c]: mean and spread, or the two sums */
  double *weight, *offset;         /* [c]: weight and bias as numbers of `type` */
  double *mean, *rstd;             /* [sets][groups] */
  char *coefficient[COEFFICIENTS]; /* [sets][c] of `type` */
} job;

static hm_channel_plan plan_of(const hm_kernel_call *call) {
  const bool batch = call->op == HM_OP_BATCH_NORM || call->op == HM_OP_BATCH_NORM_BACKWARD;
  const bool backward = call->op == HM_OP_BATCH_NORM_BACKWARD || call->op == HM_OP_GROUP_NORM_BACKWARD;
  return hm__channel_plan(&call->in[backward], call->attr[0].i, batch, 65536, 64, 4096);
}

static int64_t stat_numbers(const hm_channel_plan *p) { return p->images * p->parts * 2 * p->c; }

/* The plan does not depend on the instruction set, so one of the three variants answers for all. */
#define HM_FIRST_baseline 1
#if HM_ISA_JOIN(HM_FIRST, HM_ISA)
int hm_cpu_channel_norm_workspace(const hm_kernel_call *call, size_t *bytes) {
  const hm_channel_plan p = plan_of(call);
  *bytes = (size_t)(stat_numbers(&p) + 2 * p.c + 2 * p.sets * p.groups + COEFFICIENTS * p.sets * p.c) * sizeof(double);
  return HM_OK;
}
#endif

static void lay_out(job *j, void *workspace) {
  double *at = workspace;
  j->stat = at;
  at += stat_numbers(&j->p);
  j->weight = at;
  j->offset = at += j->p.c;
  j->mean = at += j->p.c;
  j->rstd = at += j->p.sets * j->p.groups;
  at += j->p.sets * j->p.groups;
  for (int k = 0; k < COEFFICIENTS; k++, at += j->p.sets * j->p.c) j->coefficient[k] = (char *)at;
}

/* ====== Small vectors: weights and statistics ====== */

/* n numbers as numbers of `type`, held in doubles; `absent` where the view is not given. */
static void read_numbers(double *to, const hm_view *v, int64_t n, int type, double absent) {
  if (v->flags & HM_VIEW_ABSENT) {
    for (int64_t i = 0; i < n; i++) to[i] = absent;
    return;
  }
  hm_cpu_isa()->convert(to, HM_F64, v->data, v->dtype, n);
  for (int64_t i = 0; type == HM_F32 && i < n; i++) to[i] = (float)to[i];
}

static void write_numbers(const hm_view *v, const double *from, int64_t n) {
  hm_cpu_isa()->convert(v->data, v->dtype, from, HM_F64, n);
}

static inline void put(char *array, int type, int64_t i, double x) {
  if (type == HM_F64) ((double *)array)[i] = x;
  else ((float *)array)[i] = (float)x;
}

static const void *coefficient(const job *j, int k, int64_t set, int64_t c) {
  return j->coefficient[k] + (set * j->p.c + c) * hm_dtype_size(j->type);
}

/* mean, scale and bias of every set, from mean, rstd, weight and offset. */
static void fill_coefficients(job *j) {
  const hm_channel_plan *p = &j->p;
  const int64_t wide = p->groups > 0 ? p->c / p->groups : 1;
  for (int64_t s = 0; s < p->sets; s++)
    for (int64_t c = 0; c < p->c; c++) {
      const int64_t at = s * p->c + c, group = s * p->groups + c / wide;
      put(j->coefficient[MEAN], j->type, at, j->mean[group]);
      put(j->coefficient[SCALE], j->type, at, j->rstd[group] * j->weight[c]);
      put(j->coefficient[BIAS], j->type, at, j->offset[c]);
    }
}

/* ====== One tile ====== */

typedef struct tile {
  const void *at;
  int64_t pitch;
} tile;

/* Coefficients of a tile's columns. */
typedef struct columns {
  const void *k[COEFFICIENTS];
  void *sum[2];
} columns;

static void run_tile(const job *j, pass what, tile x, tile g, void *y, int64_t y_pitch, int64_t rows, int64_t width,
                     const columns *c) {
#define RUN(S)                                                                                                         \
  switch (what) {                                                                                                      \
  case MOMENTS: tile_moments_##S(x.at, x.pitch, rows, width, c->k[MEAN], c->sum[0], c->sum[1]); break;                 \
  case APPLY:                                                                                                          \
    tile_apply_##S(y, y_pitch, x.at, x.pitch, rows, width, c->k[MEAN], c->k[SCALE], c->k[BIAS], j->relu);              \
    break;                                                                                                             \
  case SUMS:                                                                                                           \
    tile_sums_##S(g.at, g.pitch, x.at, x.pitch, rows, width, c->k[MEAN], c->k[SCALE], c->k[BIAS], j->relu, c->sum[0],  \
                  c->sum[1]);                                                                                          \
    break;                                                                                                             \
  case GRADIENT:                                                                                                       \
    tile_gradient_##S(y, y_pitch, g.at, g.pitch, x.at, x.pitch, rows, width, c->k[MEAN], c->k[SCALE], c->k[BIAS],      \
                      c->k[LESS], c->k[TILT], j->relu, j->plain);                                                      \
    break;                                                                                                             \
  }
  if (j->type == HM_F64) {
    RUN(f64)
  } else {
    RUN(f32)
  }
#undef RUN
}

/* ====== Rows of channels ====== */

/* A block of rows in memory: begins at `at` elements, rows are `pitch` apart. */
typedef struct block {
  int64_t at, pitch, rows, width;
} block;

/* Its numbers in v: where they lie, or converted into the buffer. */
static tile rows_in(const job *j, const hm_view *v, const block *b, void *buffer) {
  const char *from = hm_at(v->data, b->at, v->dtype);
  if (v->dtype == j->type) return (tile){from, b->pitch};
  const int64_t step = b->width == b->pitch ? b->rows : 1;
  for (int64_t r = 0; r < b->rows; r += step)
    hm_cpu_isa()->convert(hm_at_mut(buffer, r * b->width, j->type), j->type, hm_at(from, r * b->pitch, v->dtype),
                          v->dtype, step * b->width);
  return (tile){buffer, b->width};
}

static void rows_out(const job *j, const void *buffer, const block *b) {
  const hm_view *v = j->out;
  const int64_t step = b->width == b->pitch ? b->rows : 1;
  for (int64_t r = 0; r < b->rows; r += step)
    hm_cpu_isa()->convert(hm_at_mut(v->data, b->at + r * b->pitch, v->dtype), v->dtype,
                          hm_at(buffer, r * b->width, j->type), j->type, step * b->width);
}

static void block_tiles(const job *j, pass what, const block *all, const columns *c) {
  double xs[TILE], gs[TILE];
  const int64_t high = TILE / all->width / 4 * 4;
  const bool direct = j->out->dtype == j->type;
  for (int64_t r = 0; r < all->rows; r += high) {
    const block b = {all->at + r * all->pitch, all->pitch, all->rows - r < high ? all->rows - r : high, all->width};
    tile x = {NULL, 0}, g = {NULL, 0};
    if (!(what == GRADIENT && j->plain && !j->relu)) x = rows_in(j, j->x, &b, xs);
    if (what >= SUMS) g = rows_in(j, j->g, &b, gs);
    void *y = direct ? (void *)hm_at_mut(j->out->data, b.at, j->type) : xs;
    run_tile(j, what, x, g, y, direct ? b.pitch : b.width, b.rows, b.width, c);
    if (!direct && (what == APPLY || what == GRADIENT)) rows_out(j, xs, &b);
  }
}

/* So many narrow rows are taken as one wide one, with every coefficient as often. */
static int64_t rows_together(const hm_channel_plan *p) { return p->c < WIDE ? WIDE / p->c : 1; }

/* Pixels [from, to) of a strip of channels; the coefficients of c stand rows_together times. */
static void row_tiles(const job *j, pass what, int64_t from, int64_t to, int64_t channel, int64_t width,
                      const columns *c) {
  const int64_t k = rows_together(&j->p), whole = (to - from) / k, pitch = j->p.c;
  const block wide = {from * pitch + channel, k * pitch, whole, k * width};
  const block rest = {(from + whole * k) * pitch + channel, pitch, to - from - whole * k, width};
  if (wide.rows) block_tiles(j, what, &wide, c);
  if (rest.rows) block_tiles(j, what, &rest, c);
}

/* Repeats the first `width` numbers of an array of `type` k times. */
static void repeat(void *array, int type, int64_t width, int64_t k) {
  for (int64_t i = 1; i < k; i++)
    memcpy(hm_at_mut(array, i * width, type), array, (size_t)(width * hm_dtype_size(type)));
}

/* Adds k runs of `width` numbers into the first; the others become 0. */
static void fold_runs(void *array, int type, int64_t width, int64_t k) {
  for (int64_t i = 1; i < k; i++) {
    void *run = hm_at_mut(array, i * width, type);
    if (type == HM_F64) hm_sum_combine_f64(array, run, width);
    else hm_sum_combine_f32(array, run, width);
  }
  if (k > 1) memset(hm_at_mut(array, width, type), 0, (size_t)((k - 1) * width * hm_dtype_size(type)));
}

/* Mean and spread of a strip of a part.  The first leaf is looked at twice: once for a mean to begin with. */
static void row_moments(const job *j, int64_t from, int64_t to, int64_t channel, int64_t width, double *stat) {
  double shift[STRIP], spread[STRIP] = {0}, sum[STRIP] = {0}, square[STRIP] = {0};
  const columns c = {.k = {[MEAN] = shift}, .sum = {sum, square}};
  const int64_t leaf = LEAF / width < LEAF_ROWS ? LEAF_ROWS : LEAF / width / 4 * 4, k = rows_together(&j->p);
  hm_tile_fill(shift, j->type, hm_at(j->x->data, from * j->p.c + channel, j->x->dtype), j->x->dtype, width, 1);
  for (int64_t at = from, first = 1; at < to; first = 0) {
    const int64_t end = to - at < leaf ? to : at + leaf;
    repeat(shift, j->type, width, k);
    row_tiles(j, MOMENTS, at, end, channel, width, &c);
    fold_runs(sum, j->type, width, k);
    fold_runs(square, j->type, width, k);
    const double before = first ? 0 : (double)(at - from), n = (double)(end - at);
    if (j->type == HM_F64) tile_join_f64(shift, spread, sum, square, width, before, n);
    else tile_join_f32((float *)shift, (float *)spread, (float *)sum, (float *)square, width, before, n);
    if (first) memset(spread, 0, sizeof spread);
    else at = end;
  }
  hm_cpu_isa()->convert(stat + channel, HM_F64, shift, j->type, width);
  hm_cpu_isa()->convert(stat + j->p.c + channel, HM_F64, spread, j->type, width);
}

/* One pass over a strip of a part of an image. */
static void row_part(const job *j, pass what, int64_t image, int64_t part, int64_t channel, int64_t width) {
  const hm_channel_plan *p = &j->p;
  const int64_t from = image * p->pixels + part * p->part, to = from + hm__part_pixels(p, part);
  const int64_t together = rows_together(p);
  double *stat = j->stat + (image * p->parts + part) * 2 * p->c;
  if (what == MOMENTS) {
    row_moments(j, from, to, channel, width, stat);
    return;
  }
  double sum[STRIP] = {0}, dot[STRIP] = {0}, many[COEFFICIENTS][WIDE];
  columns c = {.sum = {sum, dot}};
  for (int k = 0; k < COEFFICIENTS; k++) {
    c.k[k] = coefficient(j, k, p->batch ? 0 : image, channel);
    if (together == 1) continue;
    memcpy(many[k], c.k[k], (size_t)(width * hm_dtype_size(j->type)));
    repeat(many[k], j->type, width, together);
    c.k[k] = many[k];
  }
  row_tiles(j, what, from, to, channel, width, &c);
  if (what != SUMS) return;
  fold_runs(sum, j->type, width, together);
  fold_runs(dot, j->type, width, together);
  hm_cpu_isa()->convert(stat + channel, HM_F64, sum, j->type, width);
  hm_cpu_isa()->convert(stat + p->c + channel, HM_F64, dot, j->type, width);
}

/* ====== Planes of pixels ====== */

/* Runs `n` dense numbers as rows of SPAN, then what is left as one shorter row. */
static void run_span(const job *j, pass what, const void *x, const void *g, void *y, int64_t n, const columns *c) {
  const int64_t rows = n / SPAN, left = n % SPAN, at = rows * SPAN;
  if (rows) run_tile(j, what, (tile){x, SPAN}, (tile){g, SPAN}, y, SPAN, rows, SPAN, c);
  if (left)
    run_tile(j, what, (tile){x ? hm_at(x, at, j->type) : NULL, SPAN}, (tile){g ? hm_at(g, at, j->type) : NULL, SPAN},
             y ? hm_at_mut(y, at, j->type) : NULL, SPAN, 1, left, c);
}

/* The sum of SPAN columns of `type`; they become 0. */
static double fold(void *columns_sum, int type) {
  double s = 0;
  if (type == HM_F64)
    for (int i = 0; i < SPAN; i++) s += ((double *)columns_sum)[i];
  else
    for (int i = 0; i < SPAN; i++) s += (double)((float *)columns_sum)[i];
  memset(columns_sum, 0, (size_t)(SPAN * hm_dtype_size(type)));
  return s;
}

static void spread_over(void *array, int type, double x) {
  if (type == HM_F64)
    for (int i = 0; i < SPAN; i++) ((double *)array)[i] = x;
  else
    for (int i = 0; i < SPAN; i++) ((float *)array)[i] = (float)x;
}

/* Joins n numbers with a mean and a sum of squares about it to those of `before` numbers. */
static inline void join(double *mean, double *spread, double before, double mean2, double spread2, double n) {
  const double d = mean2 - *mean;
  *spread += spread2 + d * d * (n * before / (before + n));
  *mean += d * (n / (before + n));
}

/* Mean and spread of n dense numbers: sums about the first, then about the mean. */
static void plane_moments(const job *j, const void *x, int64_t n, const columns *c, double *mean, double *spread) {
  double m = 0;
  hm_cpu_isa()->convert(&m, HM_F64, x, j->type, 1);
  for (int round = 0; round < 2; round++) {
    spread_over((void *)c->k[MEAN], j->type, m);
    run_span(j, MOMENTS, x, NULL, NULL, n, c);
    const double s = fold(c->sum[0], j->type) / (double)n;
    *spread = fold(c->sum[1], j->type) - s * s * (double)n;
    /* the shift as the tile had it */
    m = (j->type == HM_F64 ? m : (double)(float)m) + s;
  }
  *mean = m;
}

static void plane(const job *j, pass what, int64_t image, int64_t channel) {
  const hm_channel_plan *p = &j->p;
  double xs[TILE], gs[TILE], k[COEFFICIENTS][SPAN], sum[2][SPAN] = {{0}};
  columns c = {.sum = {sum[0], sum[1]}};
  for (int i = 0; i < COEFFICIENTS; i++) {
    double value;
    c.k[i] = k[i];
    if (what == MOMENTS) continue; /* plane_moments sets what it uses */
    hm_cpu_isa()->convert(&value, HM_F64, coefficient(j, i, p->batch ? 0 : image, channel), j->type, 1);
    spread_over(k[i], j->type, value);
  }
  const bool direct = j->out->dtype == j->type;
  double *stat = j->stat + image * 2 * p->c + channel, total[2] = {0, 0};
  const int64_t from = (image * p->c + channel) * p->pixels;
  for (int64_t at = 0; at < p->pixels; at += TILE) {
    const int64_t n = p->pixels - at < TILE ? p->pixels - at : TILE;
    const void *x = hm_tile_in(xs, j->type, hm_at(j->x->data, from + at, j->x->dtype), j->x->dtype, n, 1);
    if (what == MOMENTS) {
      double mean, spread;
      plane_moments(j, x, n, &c, &mean, &spread);
      join(&total[0], &total[1], (double)at, mean, spread, (double)n);
      continue;
    }
    const void *g =
        what == APPLY ? NULL : hm_tile_in(gs, j->type, hm_at(j->g->data, from + at, j->g->dtype), j->g->dtype, n, 1);
    void *y = direct ? (void *)hm_at_mut(j->out->data, from + at, j->type) : xs;
    run_span(j, what, x, g, y, n, &c);
    if (what == SUMS)
      for (int i = 0; i < 2; i++) total[i] += fold(sum[i], j->type);
    else if (!direct) hm_tile_out(hm_at_mut(j->out->data, from + at, j->out->dtype), j->out->dtype, 1, y, j->type, n);
  }
  if (what == MOMENTS || what == SUMS) {
    stat[0] = total[0];
    stat[p->c] = total[1];
  }
}

/* ====== Passes over all of the tensor ====== */

static void run_pass(const job *j, pass what) {
  const hm_channel_plan *p = &j->p;
  const int64_t numel = p->images * p->pixels * p->c;
  const int threads = hm_cpu_threads(numel, 8);
  const int64_t strips = p->rows ? (p->c + STRIP - 1) / STRIP : 1, width = p->rows ? (p->c + strips - 1) / strips : 1;
  const int64_t units = p->rows ? p->images * p->parts * strips : p->pixels ? p->images * p->c : 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t u = 0; u < units; u++) {
    if (p->rows) {
      const int64_t channel = u % strips * width, part = u / strips;
      const int64_t wide = p->c - channel < width ? p->c - channel : width;
      if (wide > 0) row_part(j, what, part / p->parts, part % p->parts, channel, wide);
    } else {
      plane(j, what, u / p->c, u % p->c);
    }
  }
}

/* Joins the moments of `parts` parts into the first one's; `size` gives a part's numbers. */
static void join_parts(const hm_channel_plan *p, double *stat, int64_t images) {
  double before = 0;
  for (int64_t u = 0; u < images * p->parts; u++) {
    const double n = (double)hm__part_pixels(p, u % p->parts);
    const double part = n / (before + n), both = n * before / (before + n);
    const double *mean = stat + u * 2 * p->c, *spread = mean + p->c;
    for (int64_t c = 0; u > 0 && c < p->c; c++) {
      const double d = mean[c] - stat[c];
      stat[p->c + c] += spread[c] + d * d * both;
      stat[c] += d * part;
    }
    before += n;
  }
}

static void add_parts(const hm_channel_plan *p, double *stat, int64_t images) {
  for (int64_t u = 1; u < images * p->parts; u++)
    for (int64_t i = 0; i < 2 * p->c; i++) stat[i] += stat[u * 2 * p->c + i];
}

/* ====== Forward ====== */

/* Rounds as the outputs are rounded: backward sees those. */
static void settle(job *j, int64_t i, double mean, double variance, double eps) {
  const double rstd = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
  j->mean[i] = j->type == HM_F64 ? mean : (double)(float)mean;
  j->rstd[i] = j->type == HM_F64 ? rstd : (double)(float)rstd;
}

static void move_running(const hm_view *running, int64_t i, double momentum, double batch) {
  if (running->dtype == HM_F64) {
    double *r = (double *)running->data + i;
    *r = (1 - momentum) * *r + momentum * batch;
  } else {
    float *r = (float *)running->data + i;
    *r = (float)((1 - momentum) * (double)*r + momentum * batch);
  }
}

static void batch_statistics(job *j, const hm_kernel_call *call) {
  const hm_channel_plan *p = &j->p;
  const hm_view *running_mean = &call->in[3], *running_var = &call->in[4];
  const double momentum = call->attr[1].f, eps = call->attr[2].f, n = (double)p->count;
  if (!call->attr[0].i) { /* statistics as they were learnt; rstd holds the variance first */
    read_numbers(j->mean, running_mean, p->c, HM_F64, 0);
    read_numbers(j->rstd, running_var, p->c, HM_F64, 1);
    for (int64_t c = 0; c < p->c; c++) settle(j, c, j->mean[c], j->rstd[c], eps);
    return;
  }
  run_pass(j, MOMENTS);
  join_parts(p, j->stat, p->images);
  for (int64_t c = 0; c < p->c; c++) {
    if (p->count == 0) { /* nothing has no mean, and teaches nothing */
      settle(j, c, NAN, NAN, eps);
      continue;
    }
    const double spread = j->stat[p->c + c] < 0 ? 0 : j->stat[p->c + c];
    settle(j, c, j->stat[c], spread / n, eps);
    if (running_mean->flags & HM_VIEW_ABSENT) continue;
    move_running(running_mean, c, momentum, j->stat[c]);
    move_running(running_var, c, momentum, spread / (n - 1));
  }
}

static void group_statistics(job *j, double eps) {
  const hm_channel_plan *p = &j->p;
  const int64_t wide = p->groups > 0 ? p->c / p->groups : 0;
  run_pass(j, MOMENTS);
  for (int64_t i = 0; i < p->n; i++) {
    double *stat = j->stat + i * p->parts * 2 * p->c;
    join_parts(p, stat, 1);
    for (int64_t g = 0; g < p->groups; g++) {
      double mean = 0, spread = 0;
      for (int64_t c = 0; p->count && c < wide; c++)
        join(&mean, &spread, (double)(c * p->pixels), stat[g * wide + c], stat[p->c + g * wide + c], (double)p->pixels);
      if (!p->count) mean = NAN;
      settle(j, i * p->groups + g, mean, p->count ? spread / (double)p->count : NAN, eps);
    }
  }
}

static int forward(job *j, const hm_kernel_call *call) {
  const hm_channel_plan *p = &j->p;
  j->relu = p->batch && call->attr[3].i;
  read_numbers(j->weight, &call->in[1], p->c, j->type, 1);
  read_numbers(j->offset, &call->in[2], p->c, j->type, 0);
  if (p->batch) batch_statistics(j, call);
  else group_statistics(j, call->attr[1].f);
  fill_coefficients(j);
  write_numbers(&call->out[1], j->mean, p->sets * p->groups);
  write_numbers(&call->out[2], j->rstd, p->sets * p->groups);
  run_pass(j, APPLY);
  return HM_OK;
}

/* ====== Backward ====== */

/* less and tilt of every channel; gradients of weight and bias into the first part's sums of image 0. */
static void batch_gradients(job *j) {
  const hm_channel_plan *p = &j->p;
  add_parts(p, j->stat, p->images);
  for (int64_t c = 0; c < p->c; c++) {
    const double rstd = j->rstd[c], scale = rstd * j->weight[c] / (double)p->count;
    put(j->coefficient[LESS], j->type, c, scale * j->stat[c]);
    put(j->coefficient[TILT], j->type, c, scale * j->stat[p->c + c] * rstd * rstd);
    j->stat[p->c + c] *= rstd;
  }
}

static void group_gradients(job *j) {
  const hm_channel_plan *p = &j->p;
  const int64_t wide = p->c / p->groups;
  for (int64_t i = 0; i < p->n; i++) {
    double *stat = j->stat + i * p->parts * 2 * p->c;
    add_parts(p, stat, 1);
    for (int64_t g = 0; g < p->groups; g++) {
      const double rstd = j->rstd[i * p->groups + g];
      double sum = 0, dot = 0;
      for (int64_t c = g * wide; c < (g + 1) * wide; c++) {
        sum += j->weight[c] * stat[c];
        dot += j->weight[c] * stat[p->c + c];
      }
      for (int64_t c = g * wide; c < (g + 1) * wide; c++) {
        put(j->coefficient[LESS], j->type, i * p->c + c, rstd * sum / (double)p->count);
        put(j->coefficient[TILT], j->type, i * p->c + c, rstd * dot / (double)p->count * rstd * rstd);
        stat[p->c + c] *= rstd;
      }
    }
    for (int64_t c = 0; i > 0 && c < 2 * p->c; c++) j->stat[c] += stat[c];
  }
}

static int backward(job *j, const hm_kernel_call *call) {
  const hm_channel_plan *p = &j->p;
  const hm_view *bias = p->batch ? &call->in[3] : NULL, *mean = &call->in[p->batch ? 4 : 3];
  j->relu = p->batch && call->attr[1].i;
  j->plain = p->batch && !call->attr[0].i;
  read_numbers(j->weight, &call->in[2], p->c, j->type, 1);
  const hm_view none = {.flags = HM_VIEW_ABSENT};
  read_numbers(j->offset, bias ? bias : &none, p->c, j->type, 0);
  read_numbers(j->mean, mean, p->sets * p->groups, j->type, 0);
  read_numbers(j->rstd, mean + 1, p->sets * p->groups, j->type, 0);
  fill_coefficients(j);
  if (stat_numbers(p) == 0) { /* no numbers: sums of nothing */
    for (int64_t c = 0; c < p->c; c++) j->weight[c] = 0;
    write_numbers(&call->out[1], j->weight, p->c);
    write_numbers(&call->out[2], j->weight, p->c);
    return HM_OK;
  }
  run_pass(j, SUMS);
  if (p->batch) batch_gradients(j);
  else group_gradients(j);
  write_numbers(&call->out[1], j->stat + p->c, p->c);
  write_numbers(&call->out[2], j->stat, p->c);
  run_pass(j, GRADIENT);
  return HM_OK;
}

int HM_ISA_FN(hm_cpu_channel_norm)(const hm_kernel_call *call) {
  const bool back = call->op == HM_OP_BATCH_NORM_BACKWARD || call->op == HM_OP_GROUP_NORM_BACKWARD;
  job j = {.p = plan_of(call),
           .x = &call->in[back],
           .g = back ? &call->in[0] : NULL,
           .out = &call->out[0],
           .type = call->compute == HM_F64 ? HM_F64 : HM_F32};
  lay_out(&j, call->workspace);
  return back ? backward(&j, call) : forward(&j, call);
}
