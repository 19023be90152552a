/*
 * scaler.c -- the gradient scaler: multiplies the loss, finds overflows, steps or skips, moves the scale by a policy.
 *
 * State machine, one per optimizer, reset to READY by update():
 *
 *   READY     unscale_ -> UNSCALED        step -> STEPPED, or SKIPPED when a gradient is not finite
 *   UNSCALED  unscale_ is an error        step -> STEPPED or SKIPPED by what unscale_ found, without looking again
 *   STEPPED   unscale_ and step are errors
 *   SKIPPED   as READY: new gradients may be tried without update() in between; that begins another round
 *
 * An optimizer without gradients is left as it is: no check, no change of state, record.empty.
 *
 * Work in two passes (optim.h).  Pass 1 only reads: counts, sum of squares, largest value, each of the unscaled
 * gradient.  Pass 2 unscales, clips, updates and writes the gradient back; a skipped step skips all of it.  unscale_()
 * alone is one extra write.
 *
 * Rounds.  What checks find is gathered by round: the first check of each optimizer since update() belongs to round 0,
 * the next one (after a skipped step) to round 1, and so on; checks of several optimizers in a round are one event.
 * update() hands the events to the policy in order, so that a policy hears of every skipped step, whether or not
 * update() was called after it.  An optimizer that is tried again after a skipped step ends the rounds before: the
 * policy hears of them at once, and the next loss has the new scale.  So a loop that calls update() after good steps
 * only backs off all the same, one step late.
 *
 * The scale of gradients.  Gradients are unscaled by the scale that the last scale() used, even if set_scale() came in
 * between; without a scale() call since the last update() that had a check, by the current scale (for loops that
 * multiply by get_scale() themselves).
 *
 * The scale itself stays within [min_scale, max_scale], and always within [2^-126, 2^127], where it and its reciprocal
 * are float32 numbers.
 *
 * A policy that fails: update() returns HM_OK with event HM_SCALE_FAULT, the scale stays, and hm_error_message() says
 * why.
 *
 * With `async` the same acts on tensors of a device go through scaler_late.c; what happens there is told by promises
 * and by hm_scaler_hear.
 *
 * Called by lua/bind through halfmoon.h, on the mutator thread only.
 */
#include "scaler.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *hm_scale_change_name(hm_scale_change event) {
  static const char *const names[] = {"hold", "grow", "backoff", "floor", "cap", "fault", "stop"};
  return (unsigned)event < sizeof names / sizeof names[0] ? names[event] : "unknown";
}

/* ====== Construction ====== */

static bool is_scale(double x) { return x > 0 && isfinite(x); }

/* Fills the bounds of s from the options; NaN stands for "not given". */
static int set_bounds(hm_scaler *s, const hm_scaler_options *o) {
  double init = s->scale;
  if (!(init >= HM_SCALE_LOWEST && init <= HM_SCALE_HIGHEST)) {
    return hm_fail(HM_ERR_ARG,
                   "GradScaler: init_scale must be a positive number that float32 can hold (2^-126 to 2^127), got %g",
                   init);
  }
  s->min_scale = isnan(o->min_scale) ? fmin(1, init) : o->min_scale;
  s->max_scale = isnan(o->max_scale) ? fmax(0x1p24, init) : o->max_scale;
  if (s->min_scale < 0)
    return hm_fail(HM_ERR_ARG, "GradScaler: min_scale must be 0 (none) or a positive number, got %g", s->min_scale);
  if (s->min_scale > init) {
    return hm_fail(HM_ERR_ARG,
                   "GradScaler: min_scale %g excludes init_scale %g\n  hint: lower min_scale, or raise init_scale",
                   s->min_scale, init);
  }
  if (s->max_scale < init) {
    return hm_fail(HM_ERR_ARG,
                   "GradScaler: max_scale %g excludes init_scale %g\n  hint: raise max_scale, or lower init_scale",
                   s->max_scale, init);
  }
  return HM_OK;
}

int hm_scaler_new(const hm_scaler_options *options, hm_scaler **out) {
  hm_scaler *s = hm_calloc(sizeof *s);
  if (!s) return HM_ERR_MEMORY;
  s->enabled = options->enabled;
  s->allow_f16_grads = options->allow_f16_grads;
  s->async = options->async;
  s->l.home = -1;
  s->l.rule = (hm_scaler_rule){.alone = false, .growth = 2, .backoff = 0.5};
  s->scale = isnan(options->init_scale) ? 65536 : options->init_scale;
  int rc = set_bounds(s, options);
  if (rc) {
    hm_free(s);
    return rc;
  }
  *out = s;
  return HM_OK;
}

/* Empties a record and gives its parameters back. */
static void detail_clear(hm_detail *d) {
  for (int i = 0; i < d->n; i++) hm_tensor_release(d->param[i].param);
  d->n = 0;
  memset(d->histogram, 0, sizeof d->histogram);
}

static void detail_release(hm_detail *d) {
  detail_clear(d);
  hm_free(d->param);
}

static void checked_free(hm_checked *c) {
  detail_release(&c->detail);
  hm_promise_free(c->promise);
  hm_free(c->suspect);
  hm_free(c->culprit);
  hm_free(c);
}

void hm_scaler_free(hm_scaler *s) {
  if (!s) return;
  hm_scaler_set_policy(s, NULL, NULL, NULL);
  for (int i = 0; i < s->n_checked; i++) checked_free(s->checked[i]);
  hm_free(s->checked);
  for (int r = 0; r < HM_MAX_ROUNDS; r++) {
    if (s->detail[r]) detail_release(s->detail[r]);
    hm_free(s->detail[r]);
  }
  hm__late_free(s);
  hm_free(s);
}

bool hm_scaler_enabled(const hm_scaler *s) { return s->enabled; }

bool hm_scaler_late(const hm_scaler *s) { return s->late; }

double hm_scaler_get_scale(const hm_scaler *s) { return !s->enabled ? 1 : s->late ? s->l.decided : s->scale; }

int hm_scaler_read(const hm_scaler *s, double *scale, int64_t *clean) {
  *scale = hm_scaler_get_scale(s);
  *clean = s->l.clean;
  if (!s->late) return HM_OK;
  hm_scale_cell cell;
  int rc = hm__late_read(s, &cell);
  if (rc) return rc;
  *scale = cell.scale;
  *clean = cell.clean;
  return HM_OK;
}

void hm__scaler_limits(const hm_scaler *s, double *low, double *high) {
  *low = fmax(s->min_scale, HM_SCALE_LOWEST);
  *high = fmin(s->max_scale, HM_SCALE_HIGHEST);
}

/* The nearest scale within the bounds. */
double hm__scaler_clamp(const hm_scaler *s, double scale) {
  double low, high;
  hm__scaler_limits(s, &low, &high);
  return scale < low ? low : scale > high ? high : scale;
}

int hm_scaler_set_scale(hm_scaler *s, double scale) {
  if (!is_scale(scale))
    return hm_fail(HM_ERR_ARG, "set_scale: the scale must be a positive finite number, got %g", scale);
  if (s->late) return hm__late_set(s, scale);
  s->scale = hm__scaler_clamp(s, scale);
  return HM_OK;
}

int hm_scaler_restart(hm_scaler *s, double scale, int64_t clean) {
  if (!is_scale(scale)) return hm_fail(HM_ERR_ARG, "the scale must be a positive finite number, got %g", scale);
  if (s->late) return hm__late_restart(s, hm__scaler_clamp(s, scale), clean);
  s->scale = hm__scaler_clamp(s, scale);
  s->l.clean = clean;
  return HM_OK;
}

void hm_scaler_set_rule(hm_scaler *s, const hm_scaler_rule *rule) { s->l.rule = *rule; }

void hm_scaler_bounds(const hm_scaler *s, double *min_scale, double *max_scale) {
  *min_scale = s->min_scale;
  *max_scale = s->max_scale;
}

int64_t hm_scaler_get_step(const hm_scaler *s) { return s->step; }

void hm_scaler_set_step(hm_scaler *s, int64_t step) { s->step = step < 0 ? 0 : step; }

void hm_scaler_set_policy(hm_scaler *s, hm_policy_fn fn, void *ud, void (*drop)(void *ud)) {
  void (*old_drop)(void *) = s->policy_drop;
  void *old = s->policy_ud;
  s->policy = fn;
  s->policy_ud = ud;
  s->policy_drop = drop;
  if (old_drop) old_drop(old);
}

void hm_scaler_want(hm_scaler *s, bool histogram, bool per_param) {
  s->want_histogram = histogram;
  s->want_params = per_param;
}

int hm_scaler_scale(hm_scaler *s, hm_tensor *loss, hm_tensor **out) {
  if (!s->enabled) {
    *out = hm_tensor_retain(loss);
    return HM_OK;
  }
  if (!hm_dtype_is_float(loss->dtype)) {
    char text[128];
    return hm_fail(HM_ERR_DTYPE, "scale: a floating tensor was expected, got %s", hm_describe(loss, text, sizeof text));
  }
  int rc = s->async ? hm__late_home(s, hm_tensor_device(loss), "scale") : HM_OK;
  if (rc) return rc;
  if (s->late) return hm__late_scale(s, loss, out);
  const hm_arg in[2] = {hm_t(loss), hm_f(s->scale)};
  rc = hm_call_as(HM_OP_MUL, in, NULL, loss->dtype == HM_F64 ? HM_F64 : HM_F32, out);
  if (rc) return rc;
  s->made_with = s->scale;
  s->pending = true;
  return HM_OK;
}

/* The scale that the gradients at hand were made with. */
static double gradient_scale(const hm_scaler *s) { return s->pending ? s->made_with : s->scale; }

/* ====== Records of optimizers ====== */

static hm_checked *find_checked(const hm_scaler *s, const hm_optim *o) {
  for (int i = 0; i < s->n_checked; i++) {
    if (s->checked[i]->optim == o) return s->checked[i];
  }
  return NULL;
}

/* The record of an optimizer, made at first sight, with room for a culprit per parameter. */
static int get_checked(hm_scaler *s, const hm_optim *o, hm_checked **out) {
  hm_checked *c = find_checked(s, o);
  if (!c) {
    if (s->n_checked == s->cap_checked) {
      void *list = hm_realloc(s->checked, ((size_t)s->cap_checked + 4) * sizeof(hm_checked *));
      if (!list) return HM_ERR_MEMORY;
      s->checked = list;
      s->cap_checked += 4;
    }
    c = hm_calloc(sizeof *c);
    if (!c) return HM_ERR_MEMORY;
    c->optim = o;
    s->checked[s->n_checked++] = c;
  }
  int n = hm_optim_param_count(o);
  if (n > c->cap) {
    void *suspect = hm_realloc(c->suspect, (size_t)n * sizeof *c->suspect);
    if (suspect) c->suspect = suspect;
    void *culprit = hm_realloc(c->culprit, (size_t)n * sizeof *c->culprit);
    if (culprit) c->culprit = culprit;
    if (!suspect || !culprit) return HM_ERR_MEMORY;
    c->cap = n;
  }
  *out = c;
  return HM_OK;
}

void hm_scaler_forget(hm_scaler *s, const hm_optim *o) {
  for (int i = 0; i < s->n_checked; i++) {
    if (s->checked[i]->optim != o) continue;
    checked_free(s->checked[i]);
    s->checked[i] = s->checked[--s->n_checked];
    return;
  }
}

/* ====== Checks ====== */

/* Earlier gradients first, parameters without a known time last, ties by index. */
static int compare_suspects(const void *a, const void *b) {
  const hm_suspect *x = a, *y = b;
  if (x->order != y->order) {
    if (!x->order || !y->order) return x->order ? -1 : 1;
    return x->order < y->order ? -1 : 1;
  }
  return (x->culprit.index > y->culprit.index) - (x->culprit.index < y->culprit.index);
}

void hm__scaler_rank(hm_suspect *suspect, int n, hm_culprit *culprit) {
  if (n > 1) qsort(suspect, (size_t)n, sizeof *suspect, compare_suspects);
  for (int i = 0; i < n; i++) culprit[i] = suspect[i].culprit;
}

/* Sums up what the backend wrote about n items and lists the culprits. */
static void gather_findings(hm_checked *c, const hm_optim *o, const hm_multi_stat *stat, int n, double scale) {
  hm_finding found = {.scale = scale};
  int bad = 0;
  for (int i = 0; i < n; i++) {
    found.inf_count += stat[i].inf_count;
    found.nan_count += stat[i].nan_count;
    found.sum_sq += stat[i].sum_sq;
    found.amax = fmax(found.amax, stat[i].amax);
    if (stat[i].inf_count == 0 && stat[i].nan_count == 0) continue;
    int index = hm__optim_item_param(o, i);
    hm_tensor *param = hm_optim_param(o, index);
    c->suspect[bad++] = (hm_suspect){hm__grad_order(param), {param, index, stat[i].inf_count, stat[i].nan_count}};
  }
  hm__scaler_rank(c->suspect, bad, c->culprit);
  c->n_culprits = bad;
  c->found = found;
}

/* Room for n more parameters. */
static int detail_reserve(hm_detail *d, int n) {
  if (d->n + n <= d->cap) return HM_OK;
  void *param = hm_realloc(d->param, (size_t)(d->n + n) * sizeof *d->param);
  if (!param) return HM_ERR_MEMORY;
  d->param = param;
  d->cap = d->n + n;
  return HM_OK;
}

/* Makes room for what is wanted of the next check of c, in its own record and in its round's. */
static int prepare_detail(hm_scaler *s, hm_checked *c, int n) {
  if (!s->want_histogram && !s->want_params) return HM_OK;
  detail_clear(&c->detail);
  const int r = c->round < HM_MAX_ROUNDS ? c->round : HM_MAX_ROUNDS - 1;
  if (!s->detail[r]) s->detail[r] = hm_calloc(sizeof *s->detail[r]);
  if (!s->detail[r]) return HM_ERR_MEMORY;
  if (!s->want_params) return HM_OK;
  int rc = detail_reserve(&c->detail, n);
  return rc ? rc : detail_reserve(s->detail[r], n);
}

/* Takes down the details of a check: n items; histogram: of each item, or NULL. */
static void gather_detail(hm_scaler *s, hm_checked *c, const hm_optim *o, const hm_multi_stat *stat,
                          const int64_t *histogram, int n) {
  hm_detail *d = &c->detail;
  for (int64_t i = 0; histogram && i < (int64_t)n * HM_HISTOGRAM; i++) d->histogram[i % HM_HISTOGRAM] += histogram[i];
  for (int i = 0; s->want_params && i < n; i++) {
    const int index = hm__optim_item_param(o, i);
    d->param[d->n++] = (hm_param_finding){hm_tensor_retain(hm_optim_param(o, index)),
                                          index,
                                          stat[i].inf_count,
                                          stat[i].nan_count,
                                          stat[i].amax,
                                          sqrt(stat[i].sum_sq)};
  }
}

/* Moves what is in one record to another, which has room. */
static void detail_move(hm_detail *to, hm_detail *from) {
  for (int b = 0; b < HM_HISTOGRAM; b++) to->histogram[b] += from->histogram[b];
  for (int i = 0; i < from->n; i++) to->param[to->n++] = from->param[i];
  from->n = 0;
  detail_clear(from);
}

static bool found_inf(const hm_finding *f) { return f->inf_count + f->nan_count > 0; }

/* Adds a check to its round; the next check of this optimizer belongs to the round after it. */
static void join_round(hm_scaler *s, hm_checked *c) {
  int r = c->round < HM_MAX_ROUNDS ? c->round : HM_MAX_ROUNDS - 1;
  if (r >= s->n_rounds) {
    s->round[r] = (hm_finding){.scale = c->found.scale};
    s->n_rounds = r + 1;
  }
  s->round[r].inf_count += c->found.inf_count;
  s->round[r].nan_count += c->found.nan_count;
  s->round[r].sum_sq += c->found.sum_sq;
  s->round[r].amax = fmax(s->round[r].amax, c->found.amax);
  if (s->detail[r] && (s->want_histogram || s->want_params)) detail_move(s->detail[r], &c->detail);
  c->round = r + 1;
}

/* Float16 gradients have lost what scaling was to save; they are refused unless the user insists. */
int hm__scaler_refuse_f16(const hm_scaler *s, const hm_optim *o, int n) {
  if (s->allow_f16_grads) return HM_OK;
  for (int i = 0; i < n; i++) {
    if (hm__optim_item_grad(o, i)->dtype != HM_F16) continue;
    char text[128];
    int index = hm__optim_item_param(o, i);
    return hm_fail(
        HM_ERR_DTYPE,
        "Attempting to unscale FP16 gradients.\n  parameter %d is %s\n"
        "  hint: keep parameters in float32 and let autocast cast them, or make the scaler with allow_f16_grads = true",
        index + 1, hm_describe(hm_optim_param(o, index), text, sizeof text));
  }
  return HM_OK;
}

/* Gathers an optimizer's gradients and runs CHECK or UNSCALE over them.  *n: how many there are; 0: nothing was done.
 */
static int check_gradients(hm_scaler *s, hm_optim *o, hm_checked *c, hm_multi_op op, int *n) {
  const hm_multi_stat *stat = NULL;
  const int64_t *histogram = NULL;
  double scale = gradient_scale(s);
  int rc = hm__optim_collect(o, n);
  if (rc || *n == 0) return rc;
  rc = hm__scaler_refuse_f16(s, o, *n);
  if (!rc) rc = prepare_detail(s, c, *n);
  if (!rc && s->want_histogram) rc = hm__optim_count(o, op, 1 / scale, &stat, &histogram);
  else if (!rc) rc = hm__optim_run(o, op, 1 / scale, 1, &stat);
  if (rc) return rc;
  gather_findings(c, o, stat, *n, scale);
  gather_detail(s, c, o, stat, histogram, *n);
  return HM_OK;
}

/* ====== Asking the policy ====== */

hm_scale_change hm__scaler_change(double old, double wanted, double now) {
  if (wanted < now) return HM_SCALE_FLOOR;
  if (wanted > now) return HM_SCALE_CAP;
  return now > old ? HM_SCALE_GROW : now < old ? HM_SCALE_BACKOFF : HM_SCALE_HOLD;
}

int hm__scaler_ask(hm_scaler *s, const hm_finding *f, const hm_detail *d, int64_t step, double scale, double *wanted,
                   const char **stop) {
  hm_scaler_event event = {
      .found_inf = found_inf(f),
      .inf_count = f->inf_count,
      .nan_count = f->nan_count,
      .step = step,
      .scale = f->scale,
      .amax = f->amax,
      .norm = sqrt(f->sum_sq),
      .histogram = d && s->want_histogram ? d->histogram : NULL,
      .param = d && s->want_params ? d->param : NULL,
      .n_params = d && s->want_params ? d->n : 0,
  };
  const double now = scale;
  int rc = s->policy(s->policy_ud, &event, &scale, stop);
  if (rc) return rc;
  if (!is_scale(scale)) {
    return hm_fail(HM_ERR_CALLBACK,
                   "update: the policy asked for the scale %g: a positive finite number was expected\n"
                   "  the scale stays at %g",
                   scale, now);
  }
  *wanted = scale;
  return HM_OK;
}

/* Hands every round to the policy.  The first stop message is kept in s->why. */
static hm_scale_change run_policy(hm_scaler *s) {
  double old = s->scale, wanted = s->scale;
  bool fault = s->early == HM_SCALE_FAULT, stopped = s->early == HM_SCALE_STOP;
  s->updating = true;
  for (int r = 0; r < s->n_rounds; r++) {
    const char *stop = NULL;
    s->step++;
    if (!s->policy) continue;
    if (hm__scaler_ask(s, &s->round[r], s->detail[r], s->step, s->scale, &wanted, &stop)) {
      fault = true;
      wanted = s->scale;
    } else {
      s->scale = hm__scaler_clamp(s, wanted);
    }
    if (stop && !stopped) {
      stopped = true;
      snprintf(s->why, sizeof s->why, "%s", stop);
    }
  }
  s->updating = false;
  if (stopped) return HM_SCALE_STOP;
  return fault ? HM_SCALE_FAULT : hm__scaler_change(old, wanted, s->scale);
}

/* No rounds are kept any more. */
static void clear_rounds(hm_scaler *s) {
  for (int i = 0; i < s->n_checked; i++) s->checked[i]->round = 0;
  for (int r = 0; r < s->n_rounds; r++)
    if (s->detail[r]) detail_clear(s->detail[r]);
  s->n_rounds = 0;
}

/* An optimizer that skipped a step is tried again without update(): the rounds before are over, and the policy hears
 * of them now.  What goes wrong there, update() reports. */
static void tell_early(hm_scaler *s, const hm_checked *c) {
  if (c->stage != HM_STAGE_SKIPPED || s->n_rounds == 0 || s->updating) return;
  const hm_scale_change event = run_policy(s);
  if (event == HM_SCALE_FAULT || event == HM_SCALE_STOP) s->early = event;
  clear_rounds(s);
}

/* ====== unscale_ ====== */

int hm_scaler_unscale(hm_scaler *s, hm_optim *o) {
  if (!s->enabled) return HM_OK;
  hm_checked *c = NULL;
  int n = 0;
  int rc = get_checked(s, o, &c);
  if (!rc && s->late) rc = hm__late_settle_stage(c);
  if (rc) return rc;
  if (c->stage == HM_STAGE_UNSCALED) {
    return hm_fail(HM_ERR_STATE, "unscale_() has already been called on this optimizer since the last update().\n"
                                 "  hint: call unscale_() once, after the last backward() of the step");
  }
  if (c->stage == HM_STAGE_STEPPED) {
    return hm_fail(HM_ERR_STATE,
                   "unscale_() is being called after step().\n  hint: the order is unscale_(), step(), update()");
  }
  if (s->async) {
    rc = hm__optim_collect(o, &n);
    if (!rc && n) rc = hm__late_home(s, hm__optim_device(o), "unscale_");
    if (rc || n == 0) return rc;
  }
  if (s->late) {
    rc = hm__late_check(s, o, c, HM_MULTI_UNSCALE, n);
    if (!rc) c->stage = HM_STAGE_UNSCALED;
    return rc;
  }
  if (c->stage == HM_STAGE_SKIPPED) {
    rc = hm__optim_collect(o, &n);
    if (rc || n == 0) return rc;
    tell_early(s, c);
  }
  rc = check_gradients(s, o, c, HM_MULTI_UNSCALE, &n);
  if (rc || n == 0) return rc;
  join_round(s, c);
  c->stage = HM_STAGE_UNSCALED;
  return HM_OK;
}

/* ====== step ====== */

/* The record of a check. */
static hm_step_record make_record(const hm_checked *c, bool stepped) {
  const hm_finding *f = &c->found;
  return (hm_step_record){
      .stepped = stepped,
      .found_inf = found_inf(f),
      .inf_count = f->inf_count,
      .nan_count = f->nan_count,
      .scale = f->scale,
      .norm = sqrt(f->sum_sq),
      .amax = f->amax,
      .culprits = c->n_culprits ? c->culprit : NULL,
      .n_culprits = c->n_culprits,
  };
}

/* The clipping coefficient for gradients that are unscaled already: looks at them as they are now.  1 when max_norm is
 * 0. */
static int clip_unscaled(hm_optim *o, double max_norm, double *coef) {
  *coef = 1;
  if (max_norm == 0) return HM_OK;
  const hm_multi_stat *stat = NULL;
  int n = 0;
  int rc = hm__optim_collect(o, &n);
  if (!rc) rc = hm__optim_run(o, HM_MULTI_CHECK, 1, 1, &stat);
  if (rc) return rc;
  double sum = 0;
  int64_t infs = 0, nans = 0;
  for (int i = 0; i < n; i++) {
    sum += stat[i].sum_sq;
    infs += stat[i].inf_count;
    nans += stat[i].nan_count;
  }
  *coef = hm__clip_coefficient(nans ? NAN : infs ? INFINITY : sqrt(sum), max_norm);
  return HM_OK;
}

/* A disabled scaler: the plain step, clipped if asked. */
static int step_disabled(hm_optim *o, double max_norm, hm_step_record *record) {
  double coef = 1;
  int n = 0;
  int rc = hm__optim_collect(o, &n);
  if (!rc && n) rc = clip_unscaled(o, max_norm, &coef);
  if (!rc && n) rc = hm__optim_apply(o, 1, coef);
  if (!rc) *record = (hm_step_record){.stepped = n > 0, .empty = n == 0, .scale = 1};
  return rc;
}

/* step() on gradients that unscale_ has seen: what it found decides. */
static int step_unscaled(hm_optim *o, hm_checked *c, double max_norm, hm_step_record *record) {
  bool skip = found_inf(&c->found);
  double coef = 1;
  int rc = HM_OK;
  if (!skip) {
    rc = clip_unscaled(o, max_norm, &coef);
    if (!rc) rc = hm__optim_apply(o, 1, coef);
  }
  if (rc) return rc;
  c->stage = skip ? HM_STAGE_SKIPPED : HM_STAGE_STEPPED;
  *record = make_record(c, !skip);
  return HM_OK;
}

/* step() on scaled gradients: pass 1 decides, pass 2 does the rest. */
static int step_scaled(hm_scaler *s, hm_optim *o, hm_checked *c, double max_norm, hm_step_record *record) {
  int n = 0;
  int rc = check_gradients(s, o, c, HM_MULTI_CHECK, &n);
  if (rc) return rc;
  bool skip = found_inf(&c->found);
  if (!skip) {
    double coef = max_norm > 0 ? hm__clip_coefficient(sqrt(c->found.sum_sq), max_norm) : 1;
    rc = hm__optim_apply(o, 1 / c->found.scale, coef);
    if (rc) return rc;
  }
  join_round(s, c);
  c->stage = skip ? HM_STAGE_SKIPPED : HM_STAGE_STEPPED;
  *record = make_record(c, !skip);
  return HM_OK;
}

int hm_scaler_step(hm_scaler *s, hm_optim *o, double max_norm, hm_step_record *record) {
  if (!(max_norm >= 0))
    return hm_fail(HM_ERR_ARG, "step: max_norm must be 0 (none) or a positive number, got %g", max_norm);
  if (!s->enabled) return step_disabled(o, max_norm, record);
  hm_checked *c = NULL;
  int n = 0;
  int rc = get_checked(s, o, &c);
  if (!rc && s->late) rc = hm__late_settle_stage(c);
  if (rc) return rc;
  if (c->stage == HM_STAGE_STEPPED) {
    return hm_fail(
        HM_ERR_STATE,
        "step() has already been called since the last update().\n  hint: call update() at the end of each step");
  }
  rc = hm__optim_collect(o, &n);
  if (rc) return rc;
  if (n == 0) {
    /* gradients cleared after unscale_: its check still counts, the next ones begin a new round */
    if (c->stage == HM_STAGE_UNSCALED) c->stage = HM_STAGE_SKIPPED;
    *record = (hm_step_record){.empty = true, .scale = s->late ? NAN : gradient_scale(s)};
    return HM_OK;
  }
  if (s->async) rc = hm__late_home(s, hm__optim_device(o), "step");
  if (rc) return rc;
  if (s->late) return hm__late_step(s, o, c, max_norm, n, record);
  tell_early(s, c);
  return c->stage == HM_STAGE_UNSCALED ? step_unscaled(o, c, max_norm, record) : step_scaled(s, o, c, max_norm, record);
}

/* ====== update ====== */

bool hm_scaler_checked(const hm_scaler *s, const hm_optim *o, hm_step_record *record) {
  const hm_checked *c = find_checked(s, o);
  if (s->late || !c || c->stage == HM_STAGE_READY) return false;
  *record = make_record(c, c->stage == HM_STAGE_STEPPED);
  return true;
}

void hm_scaler_assume(hm_scaler *s, double scale) {
  s->made_with = scale;
  s->pending = true;
}

int hm_scaler_tell(hm_scaler *s, int64_t inf_count, int64_t nan_count, double amax, double norm) {
  if (!s->enabled) return hm_fail(HM_ERR_STATE, "tell: the scaler is disabled");
  if (s->late) return hm_fail(HM_ERR_STATE, "tell: the scaler works without waits, on a device");
  if (s->n_rounds == HM_MAX_ROUNDS) return hm_fail(HM_ERR_STATE, "tell: call update() after each step");
  s->round[s->n_rounds++] = (hm_finding){inf_count, nan_count, norm * norm, amax, gradient_scale(s)};
  return HM_OK;
}

/* All optimizers are READY again.  Gradients that no one has looked at yet keep their scale. */
static void begin_step(hm_scaler *s) {
  for (int i = 0; i < s->n_checked; i++) s->checked[i]->stage = HM_STAGE_READY;
  if (s->n_rounds) s->pending = false;
  clear_rounds(s);
  s->early = HM_SCALE_HOLD;
  if (s->late) hm__late_begin_step(s);
}

int hm_scaler_update(hm_scaler *s, double new_scale, hm_update_record *record) {
  if (!s->enabled) {
    *record = (hm_update_record){1, 1, HM_SCALE_HOLD, 0};
    return HM_OK;
  }
  if (new_scale != 0 && !is_scale(new_scale)) {
    return hm_fail(HM_ERR_ARG, "update: new_scale must be a positive finite number, got %g", new_scale);
  }
  if (s->updating) return hm_fail(HM_ERR_STATE, "update: called by the scaler's own policy");
  if (s->late) {
    int rc = hm__late_update(s, new_scale, record);
    begin_step(s);
    return rc;
  }
  double old = s->scale;
  hm_scale_change event;
  if (new_scale != 0) {
    s->step += s->n_rounds;
    s->scale = hm__scaler_clamp(s, new_scale);
    event = s->early == HM_SCALE_STOP ? HM_SCALE_STOP : hm__scaler_change(old, new_scale, s->scale);
  } else {
    event = run_policy(s);
  }
  begin_step(s);
  *record = (hm_update_record){old, s->scale, event, 0};
  return event == HM_SCALE_STOP ? hm_fail(HM_ERR_CALLBACK, "%s", s->why) : HM_OK;
}
