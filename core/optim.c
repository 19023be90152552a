/*
 * optim.c -- optimizers: their life, groups, parameters and options.
 *
 * An optimizer retains its parameters and owns their state (moments, step counts).  optim_parts.h says what stands in
 * which file.
 *
 * Called by lua/bind through halfmoon.h, and by scaler.c through optim.h.  On the mutator thread only.
 */
#include "optim_parts.h"

int hm_optim_new(hm_optim_kind kind, hm_optim **out) {
  if (!hm_optim_kind_name(kind)) return hm_fail(HM_ERR_ARG, "optim: unknown kind %d", (int)kind);
  hm_optim *o = hm_calloc(sizeof *o);
  if (!o) return HM_ERR_MEMORY;
  o->kind = kind;
  *out = o;
  return HM_OK;
}

void hm_optim_free(hm_optim *o) {
  if (!o) return;
  for (int i = 0; i < o->n_params; i++) {
    for (int k = 0; k < HM_MAX_STATE; k++) hm_tensor_release(o->param[i].state[k]);
    hm_tensor_release(o->tensor[i]);
  }
  for (int g = 0; g < o->n_groups; g++) hm_free(o->group[g]);
  hm__batch_free(&o->batch);
  hm_tensor_release(o->done);
  hm_free(o->group);
  hm_free(o->tensor);
  hm_free(o->param);
  hm_free(o->low);
  hm_free(o->multi);
  hm_free(o->key);
  hm_free(o);
}

/* Refuses a tensor that cannot be a parameter. */
static int check_param(const hm_optim *o, hm_tensor *const *params, int index) {
  const hm_tensor *p = params[index];
  const char *name = hm_optim_kind_name(o->kind);
  char text[128];
  if (!p) return hm_fail(HM_ERR_ARG, "%s: parameter %d is missing", name, index + 1);
  hm_describe(p, text, sizeof text);
  if (!hm_dtype_is_float(p->dtype) || hm_dtype_is_f8(p->dtype)) {
    return hm_fail(HM_ERR_DTYPE, "%s: parameter %d is %s: a floating dtype of 16 bits or more was expected", name,
                   index + 1, text);
  }
  if (!hm_tensor_is_leaf(p)) {
    return hm_fail(HM_ERR_ARG,
                   "%s: parameter %d (%s) is the result of an operation: only leaf tensors can be optimized\n"
                   "  hint: detach() it, then set requires_grad",
                   name, index + 1, text);
  }
  if (!hm__is_dense(p)) {
    return hm_fail(HM_ERR_ARG, "%s: parameter %d (%s) is a view with gaps or repeats\n  hint: contiguous()", name,
                   index + 1, text);
  }
  bool twice = false;
  for (int i = 0; i < index && !twice; i++) twice = params[i] == p;
  for (int i = 0; i < o->n_params && !twice; i++) twice = o->tensor[i] == p;
  if (twice) return hm_fail(HM_ERR_ARG, "%s: parameter %d (%s) is already in the optimizer", name, index + 1, text);
  return HM_OK;
}

/* Makes room for n parameters and one more group. */
static int reserve(hm_optim *o, int n) {
  int rc = HM_OK;
  if (o->n_groups == o->cap_groups) {
    rc = hm__grow(&o->group, (size_t)o->cap_groups + 4, sizeof *o->group);
    if (!rc) o->cap_groups += 4;
  }
  if (rc || n <= o->cap_params) return rc;
  rc = hm__batch_reserve(&o->batch, n);
  if (!rc) rc = hm__grow(&o->tensor, (size_t)n, sizeof *o->tensor);
  if (!rc) rc = hm__grow(&o->param, (size_t)n, sizeof *o->param);
  if (!rc) rc = hm__grow(&o->low, (size_t)n, sizeof *o->low);
  if (!rc) rc = hm__grow(&o->multi, (size_t)n, sizeof *o->multi);
  if (!rc) rc = hm__grow(&o->key, (size_t)n, sizeof *o->key);
  if (!rc) o->cap_params = n;
  return rc;
}

int hm_optim_add_group(hm_optim *o, hm_tensor *const *params, int n, const hm_optim_options *options, int *group) {
  int rc = hm__optim_check_options(o->kind, options, o->n_groups);
  for (int i = 0; i < n && !rc; i++) rc = check_param(o, params, i);
  if (!rc) rc = hm_optim_settle(o);
  if (!rc) rc = reserve(o, o->n_params + n);
  if (rc) return rc;
  hm_optim_options *own = hm_alloc(sizeof *own);
  if (!own) return HM_ERR_MEMORY;
  *own = *options;
  for (int i = 0; i < n; i++) {
    o->tensor[o->n_params] = hm_tensor_retain(params[i]);
    o->param[o->n_params] = (hm_param){.group = o->n_groups};
    o->n_params++;
  }
  o->group[o->n_groups] = own;
  *group = o->n_groups++;
  return HM_OK;
}

int hm_optim_group_count(const hm_optim *o) { return o->n_groups; }

hm_optim_options *hm_optim_group_options(hm_optim *o, int group) {
  return group >= 0 && group < o->n_groups ? o->group[group] : NULL;
}

int hm_optim_param_count(const hm_optim *o) { return o->n_params; }

hm_tensor *hm_optim_param(const hm_optim *o, int index) {
  return index >= 0 && index < o->n_params ? o->tensor[index] : NULL;
}

int hm_optim_param_group(const hm_optim *o, int index) {
  return index >= 0 && index < o->n_params ? o->param[index].group : -1;
}

void hm_optim_zero_grad(hm_optim *o) {
  for (int i = 0; i < o->n_params; i++) {
    hm_tensor *g = o->tensor[i]->grad;
    o->tensor[i]->grad = NULL;
    hm_tensor_release(g);
  }
}
