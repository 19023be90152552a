/*
 * optim_rules.c -- the table of optimizers: what each is called, keeps, and can be told.
 *
 * A new kind is a row here, a formula in kernels/rules.h, a line in each of kernels/cpu/multi.c and
 * kernels/cuda/multi.cu, and its constructor in lua/halfmoon/optim/init.lua.  Owns nothing.
 */
#include "optim_parts.h"

#include <float.h>
#include <math.h>
#include <stdio.h>

/* ====== Options ====== */

enum {
  SGD = 1 << HM_OPTIM_SGD,
  ADAMS = 1 << HM_OPTIM_ADAM | 1 << HM_OPTIM_ADAMW,
  RMSPROP = 1 << HM_OPTIM_RMSPROP,
  ADAGRAD = 1 << HM_OPTIM_ADAGRAD,
  LION = 1 << HM_OPTIM_LION,
  ALL = (1 << HM_OPTIM_KINDS) - 1
};

#define NUMBER(name, low, high, kinds)                                                                                 \
  { #name, offsetof(hm_optim_options, name), false, low, high, kinds }
#define FLAG(name, kinds)                                                                                              \
  { #name, offsetof(hm_optim_options, name), true, 0, 1, kinds }
static const hm_optim_field fields[] = {
    NUMBER(lr, 0, INFINITY, ALL),
    NUMBER(weight_decay, 0, INFINITY, ALL),
    NUMBER(momentum, 0, INFINITY, SGD | RMSPROP),
    NUMBER(dampening, -DBL_MAX, INFINITY, SGD),
    NUMBER(beta1, 0, 1, ADAMS | LION),
    NUMBER(beta2, 0, 1, ADAMS | LION),
    NUMBER(eps, 0, INFINITY, ADAMS | RMSPROP | ADAGRAD),
    NUMBER(alpha, 0, INFINITY, RMSPROP),
    NUMBER(lr_decay, 0, INFINITY, ADAGRAD),
    NUMBER(initial_accumulator_value, 0, INFINITY, ADAGRAD),
    FLAG(nesterov, SGD),
    FLAG(amsgrad, ADAMS),
    FLAG(centered, RMSPROP),
    FLAG(maximize, ALL),
    FLAG(kahan, SGD | ADAMS),
    FLAG(stochastic, SGD | ADAMS),
};
#undef NUMBER
#undef FLAG

const hm_optim_field *hm_optim_fields(int *n) {
  *n = (int)(sizeof fields / sizeof *fields);
  return fields;
}

/* ====== Kinds ====== */

static bool has_momentum(const hm_optim_options *o) { return o->momentum != 0; }
static bool is_amsgrad(const hm_optim_options *o) { return o->amsgrad; }
static bool is_centered(const hm_optim_options *o) { return o->centered; }
static bool is_kahan(const hm_optim_options *o) { return o->kahan; }
static double initial_sum(const hm_optim_options *o) { return o->initial_accumulator_value; }

#define LOST [HM_STATE_LOST] = {"compensation", is_kahan, NULL}
#define ADAM_STATES                                                                                                    \
  { {"exp_avg", NULL, NULL}, {"exp_avg_sq", NULL, NULL}, {"max_exp_avg_sq", is_amsgrad, NULL}, LOST }
#define BETAS(first, second) .beta1 = first, .beta2 = second

/* States stand in the order of kernels/rules.h.  Defaults are PyTorch's; Lion's are those of its paper. */
static const hm_optim_rule rules[HM_OPTIM_KINDS] = {
    [HM_OPTIM_SGD] = {"sgd", HM_MULTI_SGD, false, {{"momentum_buffer", has_momentum, NULL}, LOST}, {.lr = 1e-3}},
    [HM_OPTIM_ADAM] = {"adam", HM_MULTI_ADAM, false, ADAM_STATES, {.lr = 1e-3, BETAS(0.9, 0.999), .eps = 1e-8}},
    [HM_OPTIM_ADAMW] =
        {"adamw", HM_MULTI_ADAM, true, ADAM_STATES, {.lr = 1e-3, .weight_decay = 1e-2, BETAS(0.9, 0.999), .eps = 1e-8}},
    [HM_OPTIM_RMSPROP] = {"rmsprop",
                          HM_MULTI_RMSPROP,
                          false,
                          {{"square_avg", NULL, NULL},
                           {"grad_avg", is_centered, NULL},
                           {"momentum_buffer", has_momentum, NULL}},
                          {.lr = 1e-2, .alpha = 0.99, .eps = 1e-8}},
    [HM_OPTIM_ADAGRAD] = {"adagrad", HM_MULTI_ADAGRAD, false, {{"sum", NULL, initial_sum}}, {.lr = 1e-2, .eps = 1e-10}},
    [HM_OPTIM_LION] = {"lion", HM_MULTI_LION, true, {{"exp_avg", NULL, NULL}}, {.lr = 1e-4, BETAS(0.9, 0.99)}},
};

const hm_optim_rule *hm__optim_rule(hm_optim_kind kind) { return &rules[kind]; }

const char *hm_optim_kind_name(hm_optim_kind kind) {
  return kind >= 0 && kind < HM_OPTIM_KINDS ? rules[kind].name : NULL;
}

const char *hm_optim_state_name(hm_optim_kind kind, int slot) {
  return slot >= 0 && slot < HM_MAX_STATE ? rules[kind].state[slot].name : NULL;
}

void hm_optim_defaults(hm_optim_kind kind, hm_optim_options *out) { *out = rules[kind].defaults; }

/* ====== Checks ====== */

static int check_field(const char *name, const hm_optim_field *f, const void *value, int group) {
  char text[64];
  if (f->flag) return HM_OK;
  const double x = *(const double *)value;
  if (x >= f->low && x < f->high) return HM_OK; /* NaN is neither */
  if (f->high < INFINITY) snprintf(text, sizeof text, "in [%g, %g)", f->low, f->high);
  else if (f->low > -DBL_MAX) snprintf(text, sizeof text, "a finite number >= %g", f->low);
  else snprintf(text, sizeof text, "a finite number");
  return hm_fail(HM_ERR_ARG, "%s: %s must be %s, got %g (group %d)", name, f->name, text, x, group + 1);
}

int hm__optim_check_options(hm_optim_kind kind, const hm_optim_options *p, int group) {
  const char *name = rules[kind].name;
  int n;
  const hm_optim_field *f = hm_optim_fields(&n);
  for (int i = 0; i < n; i++) {
    if (!(f[i].kinds >> kind & 1)) continue;
    int rc = check_field(name, &f[i], (const char *)p + f[i].offset, group);
    if (rc) return rc;
  }
  if (p->nesterov && (p->momentum <= 0 || p->dampening != 0)) {
    return hm_fail(HM_ERR_ARG,
                   "%s: nesterov needs a momentum above 0 and dampening 0, got momentum %g, dampening %g (group %d)",
                   name, p->momentum, p->dampening, group + 1);
  }
  if ((p->kahan || p->stochastic) && !rules[kind].state[HM_STATE_LOST].name) {
    return hm_fail(HM_ERR_ARG,
                   "%s: it has neither Kahan sums nor stochastic rounding; sgd, adam and adamw have (group %d)", name,
                   group + 1);
  }
  if (p->kahan && p->stochastic) {
    return hm_fail(HM_ERR_ARG, "%s: Kahan sums and stochastic rounding exclude each other (group %d)", name, group + 1);
  }
  return HM_OK;
}

hm_multi_group hm__optim_constants(hm_optim_kind kind, const hm_optim_options *p, int64_t step) {
  const bool adam = rules[kind].op == HM_MULTI_ADAM;
  return (hm_multi_group){
      .step = step,
      .lr = p->lr,
      .weight_decay = p->weight_decay,
      .momentum = p->momentum,
      .dampening = p->dampening,
      .beta1 = p->beta1,
      .beta2 = kind == HM_OPTIM_RMSPROP ? p->alpha : p->beta2,
      .eps = p->eps,
      .lr_decay = p->lr_decay,
      .bias_correction1 = adam ? 1 - pow(p->beta1, (double)step + 1) : 1 + (double)step * p->lr_decay,
      .bias_correction2 = adam ? 1 - pow(p->beta2, (double)step + 1) : 1,
      .nesterov = p->nesterov,
      .maximize = p->maximize,
      .centered = p->centered,
      .decoupled = rules[kind].decoupled,
  };
}
