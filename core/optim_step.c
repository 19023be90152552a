/*
 * optim_step.c -- the passes of a step over all parameters at once.
 *
 * One step is one multi-tensor call of the backend per device.  The tables that describe the parameters to it live in
 * the optimizer and are reused: a loop in its steady state allocates nothing.
 *
 * A parameter whose storage carries a current low-precision shadow (made by autocast) has it refreshed by the same pass
 * over memory and stamped current, so that the next forward pass need not cast.
 *
 * Called by scaler*.c through optim.h, and by lua/bind through halfmoon.h.
 */
#include "optim_parts.h"

int hm__optim_collect(hm_optim *o, int *n) {
  uint32_t devices = 0;
  int rc = hm__batch_check(hm_optim_kind_name(o->kind), o->tensor, o->n_params, true, &devices);
  if (rc) return rc;
  hm__batch_fill(&o->batch, o->tensor, o->n_params, true, devices);
  *n = o->batch.n;
  return HM_OK;
}

int hm__optim_device(const hm_optim *o) { return o->batch.n_ranges == 1 ? o->batch.range[0].device : -1; }

int hm__optim_late_run(hm_optim *o, hm_multi_op op, const hm_late *late) {
  int rc = hm__batch_late(&o->batch, hm_optim_kind_name(o->kind), op, NULL, late);
  if (!rc && op != HM_MULTI_CHECK) hm__batch_touch(&o->batch);
  return rc;
}

int hm__optim_item_param(const hm_optim *o, int i) { return o->batch.param[i]; }

hm_tensor *hm__optim_item_grad(const hm_optim *o, int i) { return o->batch.grad[i]; }

int hm__optim_run(hm_optim *o, hm_multi_op op, double inv_scale, double grad_mul, const hm_multi_stat **stat) {
  int rc = hm__batch_run(&o->batch, hm_optim_kind_name(o->kind), op, NULL, inv_scale, grad_mul);
  if (rc) return rc;
  if (op != HM_MULTI_CHECK) hm__batch_touch(&o->batch);
  if (stat) *stat = o->batch.stat;
  return HM_OK;
}

int hm__optim_count(hm_optim *o, hm_multi_op op, double inv_scale, const hm_multi_stat **stat,
                    const int64_t **histogram) {
  hm_batch *b = &o->batch;
  if (b->n > b->cap_histogram) {
    int rc = hm__grow(&b->histogram, (size_t)b->n, HM_HISTOGRAM * sizeof *b->histogram);
    if (rc) return rc;
    b->cap_histogram = b->n;
  }
  b->counts = true;
  int rc = hm__optim_run(o, op, inv_scale, 1, stat);
  b->counts = false;
  *histogram = b->histogram;
  return rc;
}

/* The hyperparameters of one parameter's next update, as an entry of the multi-group table: parameters that agree share
 * it. */
static int multi_group(hm_optim *o, const hm_param *q) {
  for (int k = o->n_multi - 1; k >= 0; k--) {
    if (o->key[k].group == q->group && o->key[k].step == q->step && o->key[k].fresh == q->fresh) return k;
  }
  o->key[o->n_multi] = (hm_group_key){q->step, q->group, q->fresh};
  o->multi[o->n_multi] = hm__optim_constants(o->kind, o->group[q->group], q->step);
  o->multi[o->n_multi].first = q->fresh;
  return o->n_multi++;
}

/* The current low-precision shadow of a parameter that is all of its storage, element for element; storage NULL if
 * there is none. */
static hm_low find_low(const hm_tensor *p) {
  static const int dtypes[] = {HM_F16, HM_BF16};
  hm_storage *s = p->storage;
  if (hm__is_half(p->dtype)) return (hm_low){NULL, 0}; /* it would have to be made of the rounded values */
  bool whole = p->offset == 0 && hm_is_contiguous(p) && (size_t)p->numel * (size_t)hm_dtype_size(p->dtype) == s->bytes;
  if (!whole || !s->shadows) return (hm_low){NULL, 0};
  for (size_t k = 0; k < sizeof dtypes / sizeof dtypes[0]; k++) {
    uint64_t key = HM_SHADOW_DTYPE(dtypes[k]);
    hm_storage *low = hm__shadow_get(s, key);
    bool unread = low && atomic_load_explicit(&low->refs, memory_order_acquire) ==
                             1; /* no saved operand still needs the old values */
    if (unread) return (hm_low){low, key};
  }
  return (hm_low){NULL, 0};
}

/* What a half parameter's item has beside its state: what rounding took, or its place among the random numbers. */
static void fill_half(const hm_optim *o, int index, hm_multi_item *item) {
  const hm_param *q = &o->param[index];
  const hm_tensor *p = o->tensor[index];
  if (!hm__is_half(p->dtype)) return;
  if (hm__optim_uses(o, index, HM_STATE_LOST)) item->lost = hm_tensor_data(q->state[HM_STATE_LOST]);
  if (!o->group[q->group]->stochastic) return;
  hm_attr rng;
  hm_random_take(hm_tensor_device(p), p->numel, &rng);
  item->by_chance = true;
  item->counter = (uint64_t)rng.v[1];
}

/* Completes the items for pass 2: state, hyperparameters, the shadow to refresh. */
static void fill_update(hm_optim *o) {
  o->n_multi = 0;
  for (int i = 0; i < o->batch.n; i++) {
    hm_multi_item *item = &o->batch.item[i];
    const int index = o->batch.param[i];
    const hm_param *q = &o->param[index];
    for (int k = 0; k < HM_STATE_LOST; k++)
      item->state[k] = hm__optim_uses(o, index, k) ? hm_tensor_data(q->state[k]) : NULL;
    item->group = multi_group(o, q);
    fill_half(o, index, item);
    o->low[i] = find_low(o->tensor[index]);
    if (o->low[i].storage) {
      item->low = o->low[i].storage->data;
      item->low_dtype = (int16_t)(o->low[i].key - 1);
    }
  }
}

/* Says that a parameter's shadow, just rewritten along with it, is current again; what was derived from the shadow
 * itself is not. */
static int stamp_low(hm_tensor *p, hm_low low) {
  hm_storage *again = NULL;
  int rc = hm__shadow_make(p->storage, low.key, low.storage->bytes, &again);
  if (rc || again != low.storage) {
    hm__shadow_drop_all(
        p->storage); /* what was written is not what the storage now holds: the next use makes a new one */
    return rc;
  }
  again->version++;
  return HM_OK;
}

/* Bookkeeping after pass 2; late: the device counts. */
static int finish_update(hm_optim *o, bool grads_written, bool late) {
  int rc = HM_OK;
  for (int i = 0; i < o->batch.n; i++) {
    int index = o->batch.param[i];
    hm_param *q = &o->param[index];
    hm_tensor *p = o->tensor[index];
    if (!late) {
      q->step++;
      q->fresh = false;
    }
    hm__touch(p);
    for (int k = 0; k < HM_MAX_STATE; k++) {
      if (q->state[k]) hm__touch(q->state[k]);
    }
    if (o->low[i].storage) {
      int failed = stamp_low(p, o->low[i]);
      if (!rc) rc = failed;
    }
  }
  if (grads_written) hm__batch_touch(&o->batch);
  return rc;
}

/* Checks all groups' options: they may be written between steps. */
static int check_groups(const hm_optim *o) {
  bool wanted = false, half = false;
  for (int g = 0; g < o->n_groups; g++) {
    int rc = hm__optim_check_options(o->kind, o->group[g], g);
    if (rc) return rc;
    wanted = wanted || o->group[g]->kahan || o->group[g]->stochastic;
  }
  for (int i = 0; i < o->n_params && wanted && !half; i++) half = hm__is_half(o->tensor[i]->dtype);
  if (!wanted || half) return HM_OK;
  return hm_fail(HM_ERR_DTYPE,
                 "%s: Kahan sums and stochastic rounding are for bfloat16 and float16 parameters, and there is none",
                 hm_optim_kind_name(o->kind));
}

/* Makes the tables for pass 2, and state that is missing. */
static int prepare_update(hm_optim *o) {
  uint32_t devices = 0;
  int rc = check_groups(o);
  if (!rc) rc = hm__batch_check(hm_optim_kind_name(o->kind), o->tensor, o->n_params, true, &devices);
  for (int i = 0; i < o->n_params && !rc; i++) {
    if (hm__takes_part(o->tensor[i], true)) rc = hm__optim_make_state(o, i);
  }
  if (rc) return rc;
  /* from here on nothing allocates, so no collector runs and no pointer in the tables can go stale */
  hm__batch_fill(&o->batch, o->tensor, o->n_params, true, devices);
  fill_update(o);
  return HM_OK;
}

int hm__optim_apply(hm_optim *o, double inv_scale, double grad_mul) {
  int rc = hm_optim_settle(o);
  if (!rc) rc = prepare_update(o);
  if (!rc)
    rc = hm__batch_run(&o->batch, hm_optim_kind_name(o->kind), hm__optim_rule(o->kind)->op, o->multi, inv_scale,
                       grad_mul);
  return rc ? rc : finish_update(o, inv_scale != 1 || grad_mul != 1, false);
}

/* The counts of updates on a device, zero at first. */
static int make_done(hm_optim *o, int device) {
  if (o->done && hm_tensor_device(o->done) == device) return HM_OK;
  int rc = hm_optim_settle(o);
  if (rc) return rc;
  const int64_t n = o->n_params;
  hm_tensor *zeros = NULL;
  rc = hm_empty(1, &n, HM_I64, device, &zeros);
  if (!rc) rc = hm__write_plain(HM_OP_FILL_, zeros, hm_i(0));
  if (rc) {
    hm_tensor_release(zeros);
    return rc;
  }
  o->done = zeros;
  return HM_OK;
}

/* Will the next update make a first state? */
static bool lacks_state(const hm_optim *o) {
  for (int i = 0; i < o->n_params; i++) {
    if (!o->param[i].state[0] && hm__takes_part(o->tensor[i], true) && hm__optim_uses(o, i, 0)) return true;
  }
  return false;
}

int hm__optim_late_apply(hm_optim *o, const hm_late *late) {
  /* a device takes a state for new where it has counted no update since the last settling */
  int rc = o->done && lacks_state(o) ? hm_optim_settle(o) : HM_OK;
  if (!rc) rc = make_done(o, hm__optim_device(o));
  if (!rc) rc = prepare_update(o);
  if (rc) return rc;
  hm_late whole = *late;
  whole.done = hm_tensor_data(o->done);
  whole.index = o->batch.param;
  rc = hm__batch_late(&o->batch, hm_optim_kind_name(o->kind), hm__optim_rule(o->kind)->op, o->multi, &whole);
  return rc ? rc : finish_update(o, true, true);
}

int hm_optim_step(hm_optim *o) { return hm__optim_apply(o, 1, 1); }
