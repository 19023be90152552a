/*
 * scaler_late.c -- the gradient scaler without waits: its scale lives on a device, and the host hears later what became
 * of a step.
 *
 * A scaler with `async` takes the device of the first tensor it sees for its home.  Where that device has the late
 * entries of kernels.h, the scaler is late from then on:
 *
 *   scale()    multiplies by a tensor that holds the present scale.  A scale is never overwritten: each update makes
 *              a new cell, so that a graph keeps the one its loss was multiplied by.
 *   step()     queues the check and the update; the update's kernels skip themselves where the check found something.
 *              What was found stays in device memory, behind a promise that is read when somebody asks.
 *   update()   queues the scale's next step by the rule, and starts to bring the round's event to the host.
 *   hear()     takes the oldest event that has come.  With a policy to ask, the policy is asked then, and its answer
 *              written to the device, backed off once for every overflow that the device has met since: for a policy
 *              that backs off by the same factor that is what it would have said without the delay.
 *
 * Whether a second step() without update() is allowed depends on what the first one did, so that one waits.
 *
 * Cells, events and promises are small blocks of the caching allocator, which is ordered by the device's stream: they
 * may be given up while kernels that use them are still queued.
 *
 * Called by scaler.c, and by lua/bind through halfmoon.h; on the mutator thread only.
 */
#include "scaler.h"

#include <math.h>
#include <string.h>

/* ====== Small blocks on the device ====== */

static int new_bytes(int device, size_t bytes, hm_tensor **out) {
  const int64_t n = (int64_t)bytes;
  return hm_empty(1, &n, HM_U8, device, out);
}

static void cell_free(hm_late_cell *c) {
  hm_tensor_release(c->cell);
  hm_tensor_release(c->rounded);
  *c = (hm_late_cell){NULL, NULL};
}

/* A cell without contents.  The first of its three numbers is the scale, in double. */
static int cell_new(int device, hm_late_cell *out) {
  const int64_t n = (int64_t)(sizeof(hm_scale_cell) / sizeof(double));
  hm_late_cell c = {NULL, NULL};
  int rc = hm_empty(1, &n, HM_F64, device, &c.cell);
  if (!rc) rc = hm_empty(0, NULL, HM_F32, device, &c.rounded);
  if (rc) cell_free(&c);
  else *out = c;
  return rc;
}

static hm_late_cell cell_retain(const hm_late_cell *c) {
  return (hm_late_cell){hm_tensor_retain(c->cell), hm_tensor_retain(c->rounded)};
}

/* ====== Home ====== */

int hm__late_restart(hm_scaler *s, double scale, int64_t clean) {
  const hm_backend *backend = hm_device_backend(s->l.home);
  hm_late_cell c = {NULL, NULL};
  if (!backend) return HM_ERR_DEVICE;
  int rc = cell_new(s->l.home, &c);
  if (rc) return rc;
  const hm_scale_cell values = {.scale = scale, .clean = clean};
  const float rounded = (float)scale;
  rc = backend->mem_from_host(hm_tensor_data(c.cell), &values, sizeof values, NULL);
  if (!rc) rc = backend->mem_from_host(hm_tensor_data(c.rounded), &rounded, sizeof rounded, NULL);
  if (rc) {
    cell_free(&c);
    return rc;
  }
  cell_free(&s->l.now);
  s->l.now = c;
  s->l.decided = scale;
  return HM_OK;
}

int hm__late_home(hm_scaler *s, int device, const char *what) {
  static const char *const hint = "a scaler with async = true keeps its scale on one device\n"
                                  "  hint: make one without async, or a scaler for each device";
  if (device == s->l.home) return HM_OK;
  if (device < 0) return hm_fail(HM_ERR_DEVICE, "%s: the gradients lie on several devices; %s", what, hint);
  if (s->l.home >= 0) {
    return hm_fail(HM_ERR_DEVICE, "%s: came %s, expected %s, where this scaler has worked so far; %s", what,
                   hm_device_name(device), hm_device_name(s->l.home), hint);
  }
  const hm_backend *backend = hm_device_backend(device);
  if (!backend) return HM_ERR_DEVICE;
  s->l.home = device;
  if (!backend->late_tensor) return HM_OK; /* everything is known at once there */
  int rc = hm__late_restart(s, s->scale, s->l.clean);
  if (rc) s->l.home = -1;
  else s->late = true;
  return rc;
}

int hm__late_read(const hm_scaler *s, hm_scale_cell *cell) {
  const hm_backend *backend = hm_device_backend(s->l.home);
  if (!backend) return HM_ERR_DEVICE;
  return backend->mem_to_host(cell, hm_tensor_data(s->l.now.cell), sizeof *cell, NULL);
}

int hm__late_scale(hm_scaler *s, hm_tensor *loss, hm_tensor **out) {
  const bool is_double = loss->dtype == HM_F64;
  hm_tensor *scale = NULL;
  int rc = is_double ? hm_as_strided(s->l.now.cell, 0, NULL, NULL, 0, &scale) : HM_OK;
  if (rc) return rc;
  const hm_arg in[2] = {hm_t(loss), hm_t(is_double ? scale : s->l.now.rounded)};
  rc = hm_call_as(HM_OP_MUL, in, NULL, is_double ? HM_F64 : HM_F32, out);
  hm_tensor_release(scale);
  if (rc) return rc;
  cell_free(&s->l.made);
  s->l.made = cell_retain(&s->l.now);
  s->pending = true;
  return HM_OK;
}

/* The cell of the gradients at hand. */
static const hm_scale_cell *gradient_cell(const hm_scaler *s) {
  return hm_tensor_data(s->pending ? s->l.made.cell : s->l.now.cell);
}

/* ====== Promises ====== */

/* An item of a check, as its culprit will need it. */
typedef struct hm_promised {
  hm_tensor *param; /* borrowed: the optimizer outlives the promise's readers */
  int index;
  uint64_t order;
} hm_promised;

struct hm_promise {
  int refs;
  int device;
  hm_tensor *found; /* hm_late_found and n hm_multi_stat; NULL once they are read */
  hm_step_record record;
  hm_culprit *culprit; /* behind the items */
  int n;
  hm_promised item[];
};

/* A promise about the last collect, n items. */
static int promise_new(const hm_optim *o, int n, int device, hm_promise **out) {
  const size_t items = (size_t)n * sizeof(hm_promised);
  hm_promise *p = hm_calloc(sizeof *p + items);
  if (!p) return HM_ERR_MEMORY;
  p->refs = 1;
  p->device = device;
  p->n = n;
  for (int i = 0; i < n; i++) {
    const int index = hm__optim_item_param(o, i);
    hm_tensor *param = hm_optim_param(o, index);
    p->item[i] = (hm_promised){param, index, hm__grad_order(param)};
  }
  int rc = new_bytes(device, sizeof(hm_late_found) + (size_t)n * sizeof(hm_multi_stat), &p->found);
  if (rc) hm_promise_free(p);
  else *out = p;
  return rc;
}

static hm_promise *promise_retain(hm_promise *p) {
  p->refs++;
  return p;
}

void hm_promise_free(hm_promise *p) {
  if (!p || --p->refs > 0) return;
  hm_tensor_release(p->found);
  hm_free(p->culprit);
  hm_free(p);
}

/* Lists the culprits among the items. */
static int name_culprits(hm_promise *p, const hm_multi_stat *stat) {
  int bad = 0;
  for (int i = 0; i < p->n; i++) bad += stat[i].inf_count + stat[i].nan_count > 0;
  if (bad == 0) return HM_OK;
  hm_suspect *suspect = hm_alloc((size_t)bad * sizeof *suspect);
  p->culprit = hm_alloc((size_t)bad * sizeof *p->culprit);
  if (!suspect || !p->culprit) {
    hm_free(suspect);
    return HM_ERR_MEMORY;
  }
  int k = 0;
  for (int i = 0; i < p->n; i++) {
    const hm_promised *item = &p->item[i];
    if (stat[i].inf_count + stat[i].nan_count == 0) continue;
    suspect[k++] = (hm_suspect){item->order, {item->param, item->index, stat[i].inf_count, stat[i].nan_count}};
  }
  hm__scaler_rank(suspect, bad, p->culprit);
  hm_free(suspect);
  p->record.culprits = p->culprit;
  p->record.n_culprits = bad;
  return HM_OK;
}

/* Takes the values out of what came from the device. */
static int fill_promise(hm_promise *p, const hm_late_found *found) {
  const hm_multi_stat *total = &found->total;
  p->record = (hm_step_record){
      .stepped = !found->found_inf,
      .found_inf = found->found_inf,
      .inf_count = total->inf_count,
      .nan_count = total->nan_count,
      .scale = found->scale,
      .norm = sqrt(total->sum_sq),
      .amax = total->amax,
  };
  return name_culprits(p, (const hm_multi_stat *)(found + 1));
}

int hm_promise_read(hm_promise *p, hm_step_record *record) {
  if (p->found) {
    const hm_backend *backend = hm_device_backend(p->device);
    const size_t bytes = sizeof(hm_late_found) + (size_t)p->n * sizeof(hm_multi_stat);
    hm_late_found *found = backend ? hm_alloc(bytes) : NULL;
    if (!found) return backend ? HM_ERR_MEMORY : HM_ERR_DEVICE;
    int rc = backend->mem_to_host(found, hm_tensor_data(p->found), bytes, NULL);
    if (!rc) rc = fill_promise(p, found);
    hm_free(found);
    if (rc) return rc;
    hm_tensor_release(p->found);
    p->found = NULL;
  }
  *record = p->record;
  return HM_OK;
}

int hm__late_settle_stage(hm_checked *c) {
  if (c->stage != HM_STAGE_STEPPED || !c->promise) return HM_OK;
  hm_step_record record;
  int rc = hm_promise_read(c->promise, &record);
  if (!rc && !record.stepped) c->stage = HM_STAGE_SKIPPED;
  return rc;
}

/* ====== Checks and steps ====== */

int hm__late_check(hm_scaler *s, hm_optim *o, hm_checked *c, hm_multi_op op, int n) {
  const int r = c->round < HM_MAX_ROUNDS ? c->round : HM_MAX_ROUNDS - 1;
  const bool begin = r >= s->n_rounds;
  hm_promise *p = NULL;
  int rc = hm__scaler_refuse_f16(s, o, n);
  if (!rc && !s->l.event[r]) rc = new_bytes(s->l.home, sizeof(hm_scale_event), &s->l.event[r]);
  if (!rc) rc = promise_new(o, n, s->l.home, &p);
  if (rc) return rc;
  const hm_late late = {
      .cell = gradient_cell(s),
      .found = hm_tensor_data(p->found),
      .event = hm_tensor_data(s->l.event[r]),
      .begin = begin,
  };
  rc = hm__optim_late_run(o, op, &late);
  if (rc) {
    hm_promise_free(p);
    return rc;
  }
  hm_promise_free(c->promise);
  c->promise = p;
  if (begin) s->n_rounds = r + 1;
  c->round = r + 1;
  return HM_OK;
}

/* Checks gradients that are unscaled already as they are now, for clipping.  *found: a new reference. */
static int check_norm(hm_scaler *s, hm_optim *o, int n, hm_tensor **found) {
  int rc = new_bytes(s->l.home, sizeof(hm_late_found) + (size_t)n * sizeof(hm_multi_stat), found);
  if (rc) return rc;
  const hm_late late = {.found = hm_tensor_data(*found)};
  return hm__optim_late_run(o, HM_MULTI_CHECK, &late);
}

int hm__late_step(hm_scaler *s, hm_optim *o, hm_checked *c, double max_norm, int n, hm_step_record *record) {
  const bool unscaled = c->stage == HM_STAGE_UNSCALED;
  hm_tensor *norm = NULL;
  int rc = HM_OK;
  if (!unscaled) rc = hm__late_check(s, o, c, HM_MULTI_CHECK, n);
  else if (max_norm > 0) rc = check_norm(s, o, n, &norm);
  if (!rc) {
    const hm_promise *p = c->promise;
    hm_tensor *clip = max_norm > 0 ? (unscaled ? norm : p->found) : NULL;
    const hm_late late = {
        .cell = unscaled ? NULL : gradient_cell(s),
        .found = p->found ? hm_tensor_data(p->found) : NULL,
        .norm = clip ? hm_tensor_data(clip) : NULL,
        .max_norm = max_norm,
    };
    /* a promise that was read between unscale_ and step says what it found */
    if (p->found || p->record.stepped) rc = hm__optim_late_apply(o, &late);
  }
  hm_tensor_release(norm);
  if (rc) return rc;
  c->stage = HM_STAGE_STEPPED;
  *record = (hm_step_record){.promise = promise_retain(c->promise)};
  return HM_OK;
}

/* ====== The scale's steps ====== */

/* Queues one and takes its cell for the present one.  step: all but from, to and the bounds. */
static int move_scale(hm_scaler *s, hm_scale_step step) {
  const hm_backend *backend = hm_device_backend(s->l.home);
  hm_late_cell to = {NULL, NULL};
  if (!backend) return HM_ERR_DEVICE;
  int rc = cell_new(s->l.home, &to);
  if (rc) return rc;
  step.from = hm_tensor_data(s->l.now.cell);
  step.to = hm_tensor_data(to.cell);
  step.to32 = hm_tensor_data(to.rounded);
  step.backoff = s->l.rule.backoff;
  hm__scaler_limits(s, &step.min, &step.max);
  rc = backend->late_scale(s->l.home - 1, &step);
  if (rc) {
    cell_free(&to);
    return rc;
  }
  cell_free(&s->l.now);
  s->l.now = to;
  return HM_OK;
}

int hm__late_set(hm_scaler *s, double scale) {
  int rc = move_scale(s, (hm_scale_step){.set = scale, .heard = -1});
  if (!rc) s->l.decided = hm__scaler_clamp(s, scale);
  return rc;
}

/* Room for one more untold update. */
static int reserve_waiting(hm_scaler *s) {
  hm_late_state *l = &s->l;
  if (l->n_waiting < l->cap_waiting) return HM_OK;
  void *list = hm_realloc(l->waiting, ((size_t)l->cap_waiting + 8) * sizeof *l->waiting);
  if (!list) return HM_ERR_MEMORY;
  l->waiting = list;
  l->cap_waiting += 8;
  return HM_OK;
}

/* Queues a step of the scale that `event` is about, and begins to bring the event here.  Takes the event over. */
static int tell(hm_scaler *s, hm_tensor *event, hm_scale_step step, bool told) {
  hm_late_state *l = &s->l;
  const hm_backend *backend = hm_device_backend(l->home);
  hm_waiting w = {.event = event, .step = s->step, .told = told, .asks = told && !l->rule.alone && s->policy};
  step.event = hm_tensor_data(event);
  int rc = backend ? reserve_waiting(s) : HM_ERR_DEVICE;
  if (!rc) rc = move_scale(s, step);
  if (!rc) rc = backend->fetch_begin(l->home - 1, hm_tensor_data(event), sizeof(hm_scale_event), &w.fetch);
  if (rc) {
    hm_tensor_release(event);
    return rc;
  }
  w.ticket = ++l->ticket;
  l->waiting[l->n_waiting++] = w;
  return HM_OK;
}

/* update() with a given scale, or without a round to tell of. */
static int tell_plainly(hm_scaler *s, double new_scale) {
  hm_late_state *l = &s->l;
  hm_tensor *event = s->n_rounds ? l->event[s->n_rounds - 1] : NULL;
  const bool blank = !event;
  int rc = blank ? new_bytes(l->home, sizeof(hm_scale_event), &event) : HM_OK;
  if (rc) return rc;
  if (!blank) l->event[s->n_rounds - 1] = NULL;
  s->step += s->n_rounds;
  rc = tell(s, event, (hm_scale_step){.blank = blank, .set = new_scale, .heard = -1}, false);
  if (!rc && new_scale > 0) l->decided = hm__scaler_clamp(s, new_scale);
  return rc;
}

int hm__late_update(hm_scaler *s, double new_scale, hm_update_record *record) {
  hm_late_state *l = &s->l;
  int rc = HM_OK;
  if (new_scale > 0 || s->n_rounds == 0) {
    rc = tell_plainly(s, new_scale);
  } else {
    const hm_scale_step step = {.heard = -1,
                                .growth = l->rule.growth,
                                .interval = l->rule.alone ? l->rule.interval : 0};
    for (int r = 0; r < s->n_rounds && !rc; r++) {
      hm_tensor *event = l->event[r];
      l->event[r] = NULL;
      s->step++;
      rc = tell(s, event, step, true);
    }
  }
  if (!rc) *record = (hm_update_record){.ticket = l->ticket};
  return rc;
}

void hm__late_begin_step(hm_scaler *s) {
  if (!s->pending) cell_free(&s->l.made);
  for (int r = 0; r < HM_MAX_ROUNDS && s->l.event[r]; r++) {
    hm_tensor_release(s->l.event[r]);
    s->l.event[r] = NULL;
  }
}

/* ====== Hearing ====== */

/* Takes the oldest event, if it has come. */
static int take_oldest(hm_scaler *s, bool wait, bool *come, hm_waiting *w, hm_scale_event *event) {
  hm_late_state *l = &s->l;
  const hm_backend *backend = hm_device_backend(l->home);
  *come = false;
  if (!backend) return HM_ERR_DEVICE;
  *w = l->waiting[0];
  int rc = backend->fetch_end(w->fetch, event, wait, come);
  if (!rc && !*come) return HM_OK;
  if (rc) backend->fetch_drop(w->fetch); /* it will never come */
  hm_tensor_release(w->event);
  l->n_waiting--;
  memmove(l->waiting, l->waiting + 1, (size_t)l->n_waiting * sizeof *l->waiting);
  return rc;
}

/* Asks the policy about an event and writes its answer to the device. */
static int ask(hm_scaler *s, const hm_waiting *w, const hm_scale_event *e, hm_heard *out) {
  const hm_finding found = {e->total.inf_count, e->total.nan_count, e->total.sum_sq, e->total.amax, e->scale};
  const double old = s->l.decided;
  const char *stop = NULL;
  double wanted = old;
  s->updating = true;
  const bool fault = hm__scaler_ask(s, &found, NULL, w->step, old, &wanted, &stop) != HM_OK;
  s->updating = false;
  if (fault) wanted = old;
  s->l.decided = hm__scaler_clamp(s, wanted);
  out->record = (hm_update_record){old, s->l.decided, hm__scaler_change(old, wanted, s->l.decided), w->ticket};
  if (fault) out->record.event = HM_SCALE_FAULT;
  if (stop) out->record.event = HM_SCALE_STOP;
  int rc = HM_OK;
  if (out->found_inf || s->l.decided != old)
    rc = move_scale(s, (hm_scale_step){.set = s->l.decided, .heard = e->overflows});
  if (!rc && stop) rc = hm_fail(HM_ERR_CALLBACK, "%s", stop);
  return rc;
}

int hm_scaler_hear(hm_scaler *s, bool all, bool *heard, hm_heard *out) {
  const int most = s->l.rule.alone ? HM_SCALER_UNTOLD : HM_SCALER_LAG;
  hm_scale_event event;
  hm_waiting w;
  *heard = false;
  if (!s->late || s->updating || s->l.n_waiting == 0) return HM_OK;
  int rc = take_oldest(s, all || s->l.n_waiting > most, heard, &w, &event);
  if (rc || !*heard) return rc;
  *out = (hm_heard){
      .ticket = w.ticket,
      .step = w.step,
      .told = w.told,
      .record = {event.old_scale, event.new_scale, hm__scaler_change(event.old_scale, event.wanted, event.new_scale),
                 w.ticket},
      .found_inf = event.total.inf_count + event.total.nan_count > 0,
      .inf_count = event.total.inf_count,
      .nan_count = event.total.nan_count,
  };
  return w.asks ? ask(s, &w, &event, out) : HM_OK;
}

void hm__late_free(hm_scaler *s) {
  hm_late_state *l = &s->l;
  const hm_backend *backend = l->n_waiting ? hm_device_backend(l->home) : NULL;
  for (int i = 0; i < l->n_waiting; i++) {
    if (backend) backend->fetch_drop(l->waiting[i].fetch);
    hm_tensor_release(l->waiting[i].event);
  }
  for (int r = 0; r < HM_MAX_ROUNDS; r++) hm_tensor_release(l->event[r]);
  cell_free(&l->now);
  cell_free(&l->made);
  hm_free(l->waiting);
}
