/*
 * telemetry.c -- what tensors hold, counted on the host, and two watches: on every kernel call, and on gradients.
 *
 * A census counts one tensor's values.  The watch on calls takes one of each operand before a kernel runs and of each result after it, and
 * tells its function of the calls that met anything not finite.  The watch on gradients counts those that float16 training would hold in
 * float16, for recordings that a simulator replays.  All wait for the device: they are for looking, not for every step.
 * Without a watch a call pays for one test of hm__watched and one of hm__tapped, a gradient for one of hm__tapped.
 */
#include <math.h>
#include <string.h>

#include "graph.h"

/* ====== Census ====== */

/* Counts one finite magnitude by its float32 exponent. */
static void count_exponent(int64_t *histogram, double a) {
  uint64_t bits;
  memcpy(&bits, &a, sizeof bits);
  const int exponent = (int)(bits >> 52) - 1023; /* of float64; a is not negative */
  const int bin = exponent < -126 ? HM_HISTOGRAM_SUBNORMALS : exponent > 127 ? 254 : exponent + 127;
  histogram[a == 0 ? HM_HISTOGRAM_ZEROS : bin]++;
}

/* What float16 would make of a magnitude: rounding to the nearest, ties to even. */
static void count_f16(hm_census *c, double a) {
  if (a >= 65520.0) c->overflow++;
  else if (a != 0 && a <= 0x1p-25) c->flushed++;
  else if (a != 0 && a < 0x1p-14 - 0x1p-25) c->subnormal++;
}

static void count_value(hm_census *c, double v, double scale, int64_t *histogram) {
  if (isnan(v)) {
    c->nan++;
  } else if (isinf(v)) {
    if (v > 0) c->inf++;
    else c->minus_inf++;
  } else {
    const double a = fabs(v);
    c->zeros += a == 0;
    if (a > c->amax) c->amax = a;
    c->sum_sq += a * a;
    count_f16(c, a * scale);
    if (histogram) count_exponent(histogram, a);
  }
}

static void count_values(hm_census *c, const void *data, bool wide, double scale, int64_t *histogram) {
  for (int64_t i = 0; i < c->n; i++)
    count_value(c, wide ? ((const double *)data)[i] : (double)((const float *)data)[i], scale, histogram);
}

int hm_take_census(const hm_tensor *t, double scale, hm_census *out, int64_t *histogram) {
  *out = (hm_census){0};
  if (histogram) memset(histogram, 0, HM_HISTOGRAM * sizeof *histogram);
  if (!hm_dtype_is_float(t->dtype)) {
    char text[160];
    return hm_fail(HM_ERR_DTYPE, "counting values: expected a tensor of a floating dtype, got %s",
                   hm_describe(t, text, sizeof text));
  }
  if (t->numel == 0) return HM_OK;
  const bool wide = t->dtype == HM_F64;
  out->n = t->numel;
  if (hm_tensor_device(t) == HM_CPU && hm_is_contiguous(t) && (wide || t->dtype == HM_F32)) {
    count_values(out, hm_tensor_data(t), wide, scale, histogram);
    return HM_OK;
  }
  void *copy = hm_alloc((size_t)t->numel * (wide ? sizeof(double) : sizeof(float)));
  if (!copy) return HM_ERR_MEMORY;
  const int status = hm_to_host(t, copy, wide ? HM_F64 : HM_F32);
  if (!status) count_values(out, copy, wide, scale, histogram);
  hm_free(copy);
  return status;
}

/* ====== The watch ====== */

bool hm__watched;

static hm_op_watch_fn watch_fn;
static void *watch_ud;
static bool looking; /* ops of the watch itself are not watched */
static int64_t calls;
static hm_census in_census[HM_MAX_IN], out_census[HM_MAX_IN + HM_MAX_OUT];

void hm_set_op_watch(hm_op_watch_fn fn, void *ud) {
  watch_fn = fn;
  watch_ud = ud;
  hm__watched = fn != NULL;
  if (fn) calls = 0;
}

int64_t hm_op_watch_calls(void) { return calls; }

static bool all_finite(const hm_census *c) { return c->nan == 0 && c->inf == 0 && c->minus_inf == 0; }

static int look(const hm_tensor *t, hm_census *c) {
  *c = (hm_census){0};
  if (!t || !hm_dtype_is_float(t->dtype)) return HM_OK;
  looking = true;
  const int status = hm_take_census(t, 1, c, NULL);
  looking = false;
  return status;
}

/* A destination that is only written: what lies there does not count. */
static bool overwritten(const hm_opcall *c, int i) {
  return i == 0 && !c->inplace && c->info->in[0].mutated &&
         (c->info->family == HM_FAMILY_FILL || c->info->family == HM_FAMILY_COPY);
}

int hm__watch_before(const hm_opcall *c) {
  if (looking) return HM_OK;
  int status = HM_OK;
  for (int i = 0; i < c->info->n_in && !status; i++)
    status = look(c->in[i].kind == HM_ARG_TENSOR && !overwritten(c, i) ? c->in[i].t : NULL, &in_census[i]);
  return status;
}

/* The results of a call and the operands beside the first that it wrote to (running statistics). */
static int list_results(const hm_opcall *c, hm_op_result *list) {
  int n = 0;
  for (int i = 0; i < c->info->n_out; i++)
    if (c->out[i]) list[n++] = (hm_op_result){c->info->out[i].name, c->out[i], NULL};
  for (int i = 1; i < c->info->n_in; i++)
    if (c->info->in[i].mutated && c->in[i].kind == HM_ARG_TENSOR)
      list[n++] = (hm_op_result){c->info->in[i].name, c->in[i].t, NULL};
  return n;
}

int hm__watch_after(const hm_opcall *c) {
  hm_op_result results[HM_MAX_IN + HM_MAX_OUT];
  if (looking || !watch_fn) return HM_OK;
  calls++;
  const int n = list_results(c, results);
  bool plain = true;
  for (int i = 0; i < n; i++) {
    const int status = look(results[i].t, &out_census[i]);
    if (status) return status;
    results[i].census = &out_census[i];
    plain = plain && all_finite(&out_census[i]);
  }
  for (int i = 0; i < c->info->n_in; i++) plain = plain && all_finite(&in_census[i]);
  if (plain) return HM_OK;
  const hm_node *node = hm__walked_node();
  const hm_op_sight sight = {
      .info = c->info,
      .backward = hm__in_backward(),
      .backward_of = node ? hm__node_name(node) : NULL,
      .recorded = node ? node->trace : NULL,
      .in = c->in,
      .in_census = in_census,
      .n_results = n,
      .result = results,
  };
  looking = true;
  watch_fn(watch_ud, &sight);
  looking = false;
  return HM_OK;
}

/* ====== The watch on gradients ====== */

bool hm__tapped;

static hm_gradient_watch_fn tap_fn;
static void *tap_ud;

void hm_set_gradient_watch(hm_gradient_watch_fn fn, void *ud) {
  tap_fn = fn;
  tap_ud = ud;
  hm__tapped = fn != NULL;
}

static bool is_half(int dtype) { return dtype == HM_F16 || dtype == HM_BF16; }

/* The class by which autocast treats an op as a whole: L before F, else P. */
static char op_class(const hm_op_info *info) {
  bool wide = false;
  for (int i = 0; i < info->n_in; i++) {
    if (info->in[i].cls == 'L') return 'L';
    wide = wide || info->in[i].cls == 'F';
  }
  return wide ? 'F' : 'P';
}

/* How the class of an op answers: is its result low under autocast? */
typedef enum hm_lowness { LOW_NO, LOW_YES, LOW_AS_INPUT } hm_lowness;

static hm_lowness lowness(const hm_node *n) {
  if (n->op < 0) return LOW_NO; /* a leaf; a function in Lua, which autocast leaves alone */
  if (n->lent) return LOW_AS_INPUT;
  if (n->op == HM_OP_CAST) return is_half((int)n->attr[0].i) ? LOW_YES : LOW_NO;
  const char cls = op_class(hm_op_get(n->op));
  return cls == 'L' ? LOW_YES : cls == 'F' ? LOW_NO : LOW_AS_INPUT;
}

/* Would autocast have made the result of this node in low precision?  Ops that follow their operand are asked about what made it; a chain
 * of them that is longer than this counts as low. */
static bool foretell(const hm_node *n) {
  for (int depth = 0; depth < 256; depth++) {
    const hm_lowness answer = lowness(n);
    if (answer != LOW_AS_INPUT) return answer == LOW_YES;
    const hm_node *below = NULL;
    for (int i = 0; i < n->n_in && !below; i++) below = n->edge[i].node;
    if (!below) return false;
    n = below;
  }
  return true;
}

/* The result of an op in a region with backward = "float32" was low, though its gradient is not. */
static bool was_low(const hm_node *n) { return n->backward_f32 && lowness(n) != LOW_NO; }

static bool is_foretold(const hm_edge *e) { return !is_half(e->dtype) && !was_low(e->node); }

bool hm__tap_wants(const hm_edge *e) {
  if (looking || !hm_dtype_is_float(e->dtype) || e->dtype == HM_F64) return false;
  return !is_foretold(e) || foretell(e->node);
}

/* The largest magnitude's bits. */
static uint32_t largest(const float *x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, &x[i], sizeof u);
    u &= 0x7fffffff;
    most = u > most ? u : most;
  }
  return most;
}

/* Counts by exponent; all values are finite. */
static void count_exponents(const float *x, int64_t n, hm_census *c, int64_t *histogram) {
  int64_t part[4][256] = {
      {0}}; /* neighbours have equal exponents: four tables, so that one count need not wait for the last */
  int64_t zeros = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, &x[i], sizeof u);
    u &= 0x7fffffff;
    part[i & 3][u >> 23]++;
    zeros += u == 0;
  }
  for (int b = 0; b < 255; b++) histogram[b] = part[0][b] + part[1][b] + part[2][b] + part[3][b];
  histogram[HM_HISTOGRAM_SUBNORMALS] = histogram[0] - zeros;
  histogram[HM_HISTOGRAM_ZEROS] = c->zeros = zeros;
}

/* A census without the sum of squares and float16's shares: of large tensors, several times as fast.  histogram: may be NULL. */
static int take_quick_census(const hm_tensor *t, hm_census *c, int64_t *histogram) {
  if (t->numel == 0) return hm_take_census(t, 1, c, histogram);
  const bool lies_ready = hm_tensor_device(t) == HM_CPU && hm_is_contiguous(t) && t->dtype == HM_F32;
  float *copy = lies_ready ? NULL : hm_alloc((size_t)t->numel * sizeof *copy);
  if (!lies_ready && !copy) return HM_ERR_MEMORY;
  const int status = lies_ready ? HM_OK : hm_to_host(t, copy, HM_F32);
  const float *x = lies_ready ? hm_tensor_data(t) : copy;
  const uint32_t most = status ? 0 : largest(x, t->numel);
  if (!status && most < 0x7f800000) {
    float amax;
    memcpy(&amax, &most, sizeof amax);
    *c = (hm_census){.n = t->numel, .amax = amax};
    if (histogram) count_exponents(x, t->numel, c, histogram);
  }
  hm_free(copy);
  return status || most < 0x7f800000 ? status : hm_take_census(t, 1, c, histogram);
}

static int tap(const hm_tensor *t, hm_gradient_sight *sight) {
  static int64_t histogram[HM_HISTOGRAM];
  hm_census census;
  if (!tap_fn) return HM_OK; /* it was switched off by its own function, between two sights of one gradient */
  looking = true;
  int status = take_quick_census(t, &census, sight->forward ? NULL : histogram);
  sight->t = t;
  sight->census = &census;
  sight->histogram = sight->forward ? NULL : histogram;
  if (!status) status = tap_fn(tap_ud, sight);
  looking = false;
  return status;
}

int hm__tap_gradient(const hm_edge *e, const hm_tensor *g) {
  hm_gradient_sight sight = {.op = hm__node_name(e->node), .recorded = e->node->trace, .foretold = is_foretold(e)};
  return tap(g, &sight);
}

int hm__tap_forward(const hm_opcall *c) {
  if (looking || hm__in_backward() || op_class(c->info) != 'L' || !c->out[0] || !c->out[0]->node ||
      c->out[0]->dtype == HM_F64)
    return HM_OK;
  hm_gradient_sight sight = {.op = c->info->name, .recorded = c->out[0]->node->trace, .forward = true};
  return tap(c->out[0], &sight);
}
