/*
 * telemetry.c -- what tensors hold, counted on the host, and a watch on every kernel call.
 *
 * A census counts one tensor's values.  The watch takes one of each operand before a kernel runs and of each result after it, and tells
 * its function of the calls that met anything not finite.  Both wait for the device: they are for looking, not for every step.
 * Without a watch a call pays for one test of hm__watched.
 */
#include <math.h>
#include <string.h>

#include "graph.h"

/* ====== Census ====== */

/* Counts one finite magnitude by its float32 exponent. */
static void count_exponent(int64_t *histogram, double a) {
  int exponent;
  (void)frexp(a, &exponent); /* a = f * 2^exponent, f from 1/2 to 1 */
  const int bin = exponent < -125 ? HM_HISTOGRAM_SUBNORMALS : exponent > 128 ? 254 : exponent + 126;
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
  if (hm_tensor_is_dropped(t)) return hm_fail(HM_ERR_STATE, "counting values: the tensor was released");
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
