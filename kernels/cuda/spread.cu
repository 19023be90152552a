/*
 * spread.cu -- var, std, norm and logsumexp over dims.
 *
 * Where terms are taken about a centre, a first reduction finds it for each result (the mean, the largest value, the largest |x|) and keeps it in
 * the workspace as float64; a second one adds the terms:
 *   var, std    (x - centre)^2
 *   logsumexp   e^(x - centre)
 *   norm        (|x| / centre)^p; p = 0, 1, and 2 where float64 holds all squares, need no centre
 * Sums are made in float64; only the exponentials of float32 inputs are float32.  The kernels are reduce.h's.
 *
 * Called by reduce.cu.  Uses its workspace, owns nothing.
 */
#include "reduce.h"

enum kind { VARIANCE, DEVIATION, COUNT, ABSOLUTE, SQUARE, RATIO, POWER, EXP }; /* RATIO: POWER with p = 2 */

static bool is_scaled(int k) { return k == RATIO || k == POWER; }
static bool has_centre(int k) { return k == VARIANCE || k == DEVIATION || k == EXP || is_scaled(k); }

HM_DEV double magnitude(double x) { return hm_abs_f64(x); }

/* The number that terms are taken about: infinities cannot be, and nothing is divided by 0. */
HM_DEV double usable(int kind, double centre) {
  if (kind == EXP) return magnitude(centre) == (double)INFINITY ? 0.0 : centre;
  return centre == 0.0 || centre == (double)INFINITY ? 1.0 : centre;
}

/* ====== What is reduced ====== */

/* Sums in float64. */
struct of_double {
  typedef double acc, raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
    hm_load_many<HM_REDUCE_AHEAD>(x, dtype, at, v);
  }
  HM_DEV acc identity() { return 0.0; }
  HM_DEV acc join(acc a, acc b) { return a + b; }
  HM_DEV int64_t place(acc) { return 0; }
};

struct op_sum : of_double {
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double) { return v; }
  HM_DEV double value(acc a, const hm_reduction &, double) { return a; }
};

/* The largest x, or |x|. */
struct op_largest : of_double {
  HM_DEV acc identity() { return -(double)INFINITY; }
  HM_DEV acc take(raw v, int64_t, const hm_reduction &p, double) { return p.kind == EXP ? v : magnitude(v); }
  HM_DEV acc join(acc a, acc b) { return hm_max::join(a, b); }
  HM_DEV double value(acc a, const hm_reduction &, double) { return a; }
};

struct op_variance : of_double {
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double centre) { return (v - centre) * (v - centre); }
  HM_DEV double value(acc a, const hm_reduction &p, double) {
    const double n = (double)p.n_red - p.param, var = a / (n > 0 ? n : 0.0);
    return p.kind == DEVIATION ? hm_sqrt_f64(var) : var;
  }
};

struct op_norm : of_double {
  HM_DEV acc take(raw v, int64_t, const hm_reduction &p, double centre) {
    switch (p.kind) {
    case COUNT: return v != 0.0 ? 1.0 : 0.0;
    case ABSOLUTE: return magnitude(v);
    case SQUARE: return v * v;
    default: break;
    }
    const double ratio = magnitude(v) / usable(p.kind, centre);
    return p.kind == RATIO ? ratio * ratio : hm_pow_f64(ratio, p.param);
  }
  HM_DEV double value(acc a, const hm_reduction &p, double centre) {
    switch (p.kind) {
    case SQUARE: return hm_sqrt_f64(a);
    case RATIO: return usable(RATIO, centre) * hm_sqrt_f64(a);
    case POWER: return usable(POWER, centre) * hm_pow_f64(a, 1.0 / p.param);
    default: return a;
    }
  }
};

/* T: what the exponentials are made in. */
template <class T> struct op_exp : of_double {
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double centre) {
    return (double)hm_exp((T)v - (T)usable(EXP, centre));
  }
  HM_DEV double value(acc a, const hm_reduction &, double centre) { return usable(EXP, centre) + hm_log_f64(a); }
};

/* ====== Entry ====== */

static const char *name_of(int op) {
  switch (op) {
  case HM_OP_VAR: return "var";
  case HM_OP_STD: return "std";
  case HM_OP_NORM: return "norm";
  case HM_OP_LOGSUMEXP: return "logsumexp";
  default: return NULL;
  }
}

static int kind_of(const hm_kernel_call *call) {
  if (call->op == HM_OP_VAR) return VARIANCE;
  if (call->op == HM_OP_STD) return DEVIATION;
  if (call->op == HM_OP_LOGSUMEXP) return EXP;
  const double p = call->attr[0].f;
  if (p == 0) return COUNT;
  if (p == 1) return ABSOLUTE;
  return p != 2 ? POWER : call->compute == HM_F64 ? RATIO : SQUARE;
}

static void make_plan(hm_reduction *p, const hm_kernel_call *call) {
  const hm_attr *dims = &call->attr[call->op == HM_OP_NORM ? 1 : 0];
  const bool keep = call->attr[call->op == HM_OP_LOGSUMEXP ? 1 : 2].i != 0;
  const uint32_t everything = (1u << call->in[0].ndim) - 1;
  uint32_t mask = 0;
  for (int i = 0; i < dims->n; i++) mask |= 1u << dims->v[i];
  hm_reduction_make(p, call, dims->n ? mask & everything : everything, keep, true, &call->out[0], NULL);
  p->kind = kind_of(call);
  p->param = call->op == HM_OP_NORM ? call->attr[0].f : call->op == HM_OP_LOGSUMEXP ? 0.0 : call->attr[1].f;
}

/* Bytes of the chunks' partial results; centres come behind them. */
static size_t partial_bytes(const hm_reduction *p) {
  return p->n_chunks > 1 ? (size_t)(p->n_chunks * p->n_keep) * sizeof(double) : 0;
}

static size_t centre_bytes(const hm_reduction *p) {
  return has_centre(p->kind) ? (size_t)p->n_keep * sizeof(double) : 0;
}

extern "C" int hm_cuda_spread_workspace(const hm_kernel_call *call, size_t *bytes) {
  hm_reduction p;
  make_plan(&p, call);
  *bytes = partial_bytes(&p) + centre_bytes(&p);
  return HM_OK;
}

/* Finds the centres. */
static int first_pass(const hm_reduction *plan, double *centre, const char *name, void *stream) {
  hm_reduction p = *plan;
  p.out[0] = NULL;
  p.result = centre;
  p.divide = p.kind == VARIANCE || p.kind == DEVIATION;
  return p.divide ? hm_reduce<op_sum>(&p, name, stream) : hm_reduce<op_largest>(&p, name, stream);
}

static int second_pass(const hm_reduction *p, bool f64, const char *name, void *stream) {
  if (p->kind == VARIANCE || p->kind == DEVIATION) return hm_reduce<op_variance>(p, name, stream);
  if (p->kind != EXP) return hm_reduce<op_norm>(p, name, stream);
  return f64 ? hm_reduce<op_exp<double>>(p, name, stream) : hm_reduce<op_exp<float>>(p, name, stream);
}

extern "C" int hm_cuda_spread(const hm_kernel_call *call) {
  const char *name = name_of(call->op);
  if (!name) return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no reduction with op id %d", call->op);
  hm_reduction p;
  make_plan(&p, call);
  if (p.n_keep == 0) return HM_OK;
  if (p.n_red == 0)
    return hm_cuda_fill_number(&call->out[0],
                               p.kind == EXP                               ? -(double)INFINITY
                               : p.kind == VARIANCE || p.kind == DEVIATION ? (double)NAN
                                                                           : 0.0,
                               0, call->stream);
  if (call->workspace_bytes < partial_bytes(&p) + centre_bytes(&p))
    return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
  if (p.n_chunks > 1) p.partial = call->workspace;
  if (has_centre(p.kind)) {
    double *centre = reinterpret_cast<double *>(static_cast<char *>(call->workspace) + partial_bytes(&p));
    const int status = first_pass(&p, centre, name, call->stream);
    if (status != HM_OK) return status;
    p.centre = centre;
  }
  return second_pass(&p, call->compute == HM_F64, name, call->stream);
}
