/*
 * optim_state.c -- what optimizers keep beside the parameters: moments and step counts.
 *
 * State is float32, float64 for float64 parameters, in the parameter's element order; what rounding took from half
 * parameters (Kahan) is in their own dtype.  Owned by the optimizer; made at the first update that needs it.  Called by
 * lua/bind through halfmoon.h, and by optim_step.c.
 */
#include "optim_parts.h"

#include <string.h>

/* Slot of a state name, or -1. */
static int state_slot(const hm_optim *o, const char *name) {
  for (int k = 0; k < HM_MAX_STATE; k++) {
    const char *known = hm_optim_state_name(o->kind, k);
    if (known && strcmp(known, name) == 0) return k;
  }
  return -1;
}

/* The dtype of a parameter's state in a slot. */
static int state_dtype(const hm_tensor *p, int slot) {
  return slot == HM_STATE_LOST ? p->dtype : p->dtype == HM_F64 ? HM_F64 : HM_F32;
}

bool hm__optim_uses(const hm_optim *o, int i, int slot) {
  const hm_state_rule *s = &hm__optim_rule(o->kind)->state[slot];
  if (!s->name || (slot == HM_STATE_LOST && !hm__is_half(o->tensor[i]->dtype))) return false;
  return !s->used || s->used(o->group[o->param[i].group]);
}

hm_tensor *hm_optim_state(const hm_optim *o, int index, const char *name) {
  int slot = state_slot(o, name);
  if (slot < 0 || index < 0 || index >= o->n_params || o->param[index].fresh) return NULL;
  return o->param[index].state[slot];
}

int hm_optim_settle(hm_optim *o) {
  if (!o->done) return HM_OK;
  int64_t *done = hm_alloc((size_t)o->n_params * sizeof *done);
  if (!done) return HM_ERR_MEMORY;
  int rc = hm_to_host(o->done, done, HM_I64);
  for (int i = 0; i < o->n_params && !rc; i++) {
    o->param[i].step += done[i];
    if (done[i] > 0) o->param[i].fresh = false;
  }
  hm_free(done);
  if (rc) return rc;
  hm_tensor_release(o->done);
  o->done = NULL;
  return HM_OK;
}

int hm_optim_set_state(hm_optim *o, int index, const char *name, hm_tensor *value) {
  const char *op = hm_optim_kind_name(o->kind);
  char a[128], b[128];
  int settled = hm_optim_settle(o);
  if (settled) return settled;
  int slot = state_slot(o, name);
  if (slot < 0) return hm_fail(HM_ERR_ARG, "%s: there is no state called \"%s\"", op, name);
  if (index < 0 || index >= o->n_params) {
    return hm_fail(HM_ERR_ARG, "%s: there is no parameter %d, only %d of them", op, index + 1, o->n_params);
  }
  hm_tensor *p = o->tensor[index], *own = NULL;
  if (slot == HM_STATE_LOST && !hm__is_half(p->dtype)) {
    return hm_fail(HM_ERR_DTYPE, "%s: parameter %d has no %s: it is %s, float16 or bfloat16 was expected", op,
                   index + 1, name, hm_describe(p, a, sizeof a));
  }
  if (value) {
    if (!hm_dtype_is_float(value->dtype) || !hm__same_shape(p, value)) {
      return hm_fail(HM_ERR_SHAPE, "%s: %s of parameter %d does not fit: it is %s, the parameter is %s", op, name,
                     index + 1, hm_describe(value, a, sizeof a), hm_describe(p, b, sizeof b));
    }
    hm_tensor *here = NULL;
    int rc = hm_to(value, HM_NONE, hm_tensor_device(p), false, &here);
    if (!rc) rc = hm__like_param(p, state_dtype(p, slot), &own);
    if (!rc) rc = hm__write_plain(HM_OP_COPY_, own, hm_t(here));
    hm_tensor_release(here);
    if (rc) {
      hm_tensor_release(own);
      return rc;
    }
  }
  hm_tensor_release(o->param[index].state[slot]);
  o->param[index].state[slot] = own;
  if (slot == 0) o->param[index].fresh = false;
  return HM_OK;
}

int64_t hm_optim_param_step(const hm_optim *o, int index) {
  return index >= 0 && index < o->n_params ? o->param[index].step : 0;
}

void hm_optim_set_param_step(hm_optim *o, int index, int64_t step) {
  if (index >= 0 && index < o->n_params) o->param[index].step = step < 0 ? 0 : step;
}

int64_t hm_optim_state_bytes(const hm_optim *o) {
  int64_t bytes = 0;
  for (int i = 0; i < o->n_params; i++) {
    for (int k = 0; k < HM_MAX_STATE; k++) {
      const hm_tensor *s = o->param[i].state[k];
      if (s) bytes += s->numel * hm_dtype_size(s->dtype);
    }
  }
  return bytes;
}

int hm__optim_make_state(hm_optim *o, int i) {
  hm_param *q = &o->param[i];
  const hm_tensor *p = o->tensor[i];
  const hm_state_rule *rule = hm__optim_rule(o->kind)->state;
  for (int k = 0; k < HM_MAX_STATE; k++) {
    if (q->state[k] || !hm__optim_uses(o, i, k)) continue;
    hm_tensor *own = NULL;
    int rc = hm__like_param(p, state_dtype(p, k), &own);
    if (!rc) rc = hm__write_plain(HM_OP_FILL_, own, hm_f(rule[k].start ? rule[k].start(o->group[q->group]) : 0));
    if (rc) {
      hm_tensor_release(own);
      return rc;
    }
    q->state[k] = own;
    if (k == 0) q->fresh = true;
  }
  return HM_OK;
}
