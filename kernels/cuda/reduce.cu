/*
 * reduce.cu -- sum, mean, prod, amax, amin, any, all, bias gradients; max_dim, min_dim, argmax, argmin.
 *
 * What is reduced; the plan and the kernels are reduce.h's.
 *
 * Accumulates in float32, float64 or int64 (modulo 2^64); products in float64, as on the CPU.  Uses its workspace, owns nothing.
 */
#include "reduce.h"

/* ====== What is reduced: a value and how two become one ====== */

/* A value with its place.  The first NaN wins, else the first of the best. */
template <class T> struct placed {
  T value;
  int64_t place;
};

template <class T> HM_DEV placed<T> hm_shuffle_down(placed<T> x, int by) {
  placed<T> y;
  y.value = hm_shuffle_down(x.value, by);
  y.place = hm_shuffle_down(x.place, by);
  return y;
}

template <class T> HM_DEV placed<T> hm_first_lane(placed<T> x) {
  placed<T> y;
  y.value = hm_first_lane(x.value);
  y.place = hm_first_lane(x.place);
  return y;
}

/* The type that sums of T are kept in: integers wrap. */
template <class T> struct sum_type { typedef T type; };
template <> struct sum_type<int64_t> { typedef uint64_t type; };

template <class T> struct op_sum {
  typedef typename sum_type<T>::type acc;
  HM_DEV acc identity() { return (acc)0; }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
    hm_load_many<HM_REDUCE_AHEAD>(x, dtype, at, v);
  }
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double) { return (acc)v; }
  HM_DEV acc join(acc a, acc b) { return a + b; }
  HM_DEV T value(acc a, const hm_reduction &, double) { return (T)a; }
  HM_DEV int64_t place(acc) { return 0; }
};

/* T: double, or int64_t, whose products wrap. */
template <class T> struct op_prod {
  typedef typename sum_type<T>::type acc;
  HM_DEV acc identity() { return (acc)1; }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
    hm_load_many<HM_REDUCE_AHEAD>(x, dtype, at, v);
  }
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double) { return (acc)v; }
  HM_DEV acc join(acc a, acc b) { return a * b; }
  HM_DEV T value(acc a, const hm_reduction &, double) { return (T)a; }
  HM_DEV int64_t place(acc) { return 0; }
};

template <class T> HM_DEV T lowest() {
  if constexpr (sizeof(T) == 8 && (T)0.5 == (T)0) return INT64_MIN;
  else return -(T)INFINITY;
}
template <class T> HM_DEV T highest() {
  if constexpr (sizeof(T) == 8 && (T)0.5 == (T)0) return INT64_MAX;
  else return (T)INFINITY;
}

template <class T, bool LARGEST> struct op_extreme {
  typedef T acc;
  HM_DEV acc identity() { return LARGEST ? lowest<T>() : highest<T>(); }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
    hm_load_many<HM_REDUCE_AHEAD>(x, dtype, at, v);
  }
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double) { return v; }
  HM_DEV acc join(acc a, acc b) { return (LARGEST ? b > a : b < a) || b != b ? b : a; }
  HM_DEV T value(acc a, const hm_reduction &, double) { return a; }
  HM_DEV int64_t place(acc) { return 0; }
};

template <class T, bool LARGEST> struct op_find {
  typedef placed<T> acc;
  HM_DEV acc identity() {
    acc a;
    a.value = LARGEST ? lowest<T>() : highest<T>();
    a.place = INT64_MAX;
    return a;
  }
  typedef T raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
    hm_load_many<HM_REDUCE_AHEAD>(x, dtype, at, v);
  }
  HM_DEV acc take(raw v, int64_t place, const hm_reduction &, double) {
    acc a;
    a.value = v;
    a.place = place;
    return a;
  }
  HM_DEV acc join(acc a, acc b) {
    const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
    const bool better = nan_a || nan_b ? nan_b && !nan_a : (LARGEST ? b.value > a.value : b.value < a.value);
    const bool same = nan_a == nan_b && (nan_a || a.value == b.value);
    return better || (same && b.place < a.place) ? b : a;
  }
  HM_DEV T value(acc a, const hm_reduction &, double) { return a.value; }
  HM_DEV int64_t place(acc a) { return a.place; }
};

/* Nonzero in its own dtype; NaN counts. */
HM_DEV bool is_true(const void *x, int dtype, int64_t at) {
  if (dtype == HM_F32) return static_cast<const float *>(x)[at] != 0.0f;
  if (dtype == HM_F64) return static_cast<const double *>(x)[at] != 0.0;
  if (dtype == HM_F16 || dtype == HM_BF16) return (static_cast<const uint16_t *>(x)[at] & 0x7fffu) != 0;
  if (dtype == HM_I64) return static_cast<const int64_t *>(x)[at] != 0;
  if (dtype == HM_I32) return static_cast<const int32_t *>(x)[at] != 0;
  return static_cast<const uint8_t *>(x)[at] != 0;
}

template <bool ANY> struct op_logic {
  typedef int acc;
  HM_DEV acc identity() { return ANY ? 0 : 1; }
  typedef int raw;
  HM_DEV void load(const void *x, int dtype, const int64_t *at, raw *v) {
#pragma unroll
    for (int j = 0; j < HM_REDUCE_AHEAD; j++) v[j] = is_true(x, dtype, at[j]);
  }
  HM_DEV acc take(raw v, int64_t, const hm_reduction &, double) { return v; }
  HM_DEV acc join(acc a, acc b) { return ANY ? a | b : a & b; }
  HM_DEV int64_t value(acc a, const hm_reduction &, double) { return a; }
  HM_DEV int64_t place(acc) { return 0; }
};

/* ====== Which dims ====== */

static bool is_index_op(int op) {
  return op == HM_OP_MAX_DIM || op == HM_OP_MIN_DIM || op == HM_OP_ARGMAX || op == HM_OP_ARGMIN;
}

static bool is_bias_op(int op) { return op == HM_OP_LINEAR_BACKWARD_BIAS || op == HM_OP_CONV2D_BACKWARD_BIAS; }

/* Bit mask of the dims that the op reduces. */
static uint32_t reduced_dims(const hm_kernel_call *call) {
  const int ndim = call->in[0].ndim;
  const uint32_t everything = (1u << ndim) - 1;
  if (call->op == HM_OP_LINEAR_BACKWARD_BIAS) return everything & ~(1u << (ndim - 1));
  if (call->op == HM_OP_CONV2D_BACKWARD_BIAS) return everything & ~2u;
  if (is_index_op(call->op) || call->op == HM_OP_PROD)
    return call->attr[0].i == HM_NONE ? everything : everything & (1u << call->attr[0].i);
  uint32_t mask = 0;
  for (int i = 0; i < call->attr[0].n; i++) mask |= 1u << call->attr[0].v[i];
  return call->attr[0].n ? mask & everything : everything;
}

static void make_plan(hm_reduction *p, const hm_kernel_call *call) {
  const bool index = is_index_op(call->op), both = call->op == HM_OP_MAX_DIM || call->op == HM_OP_MIN_DIM;
  hm_reduction_make(p, call, reduced_dims(call), !is_bias_op(call->op) && call->attr[1].i != 0, !index,
                    !index || both ? &call->out[0] : NULL,
                    both    ? &call->out[1]
                    : index ? &call->out[0]
                            : NULL);
}

/* ====== Entry ====== */

template <class T> static int launch_typed(int op, const hm_reduction *p, const char *name, void *stream) {
  switch (op) {
  case HM_OP_AMAX: return hm_reduce<op_extreme<T, true>>(p, name, stream);
  case HM_OP_AMIN: return hm_reduce<op_extreme<T, false>>(p, name, stream);
  case HM_OP_MAX_DIM:
  case HM_OP_ARGMAX: return hm_reduce<op_find<T, true>>(p, name, stream);
  case HM_OP_MIN_DIM:
  case HM_OP_ARGMIN: return hm_reduce<op_find<T, false>>(p, name, stream);
  default: return hm_reduce<op_sum<T>>(p, name, stream);
  }
}

static const char *name_of(int op) {
  switch (op) {
  case HM_OP_SUM: return "sum";
  case HM_OP_MEAN: return "mean";
  case HM_OP_PROD: return "prod";
  case HM_OP_AMAX: return "amax";
  case HM_OP_AMIN: return "amin";
  case HM_OP_MAX_DIM: return "max_dim";
  case HM_OP_MIN_DIM: return "min_dim";
  case HM_OP_ARGMAX: return "argmax";
  case HM_OP_ARGMIN: return "argmin";
  case HM_OP_ANY: return "any";
  case HM_OP_ALL: return "all";
  case HM_OP_LINEAR_BACKWARD_BIAS: return "linear_backward_bias";
  case HM_OP_CONV2D_BACKWARD_BIAS: return "conv2d_backward_bias";
  default: return NULL;
  }
}

/* Outputs exist but nothing is reduced into them: sums are 0, products 1, means NaN, any false, all true. */
static int reduce_nothing(const hm_kernel_call *call, const char *name) {
  const int op = call->op;
  if (is_index_op(op) || op == HM_OP_AMAX || op == HM_OP_AMIN)
    return hm_cuda_fail(HM_ERR_ARG, "%s: a largest or smallest value of no elements does not exist", name);
  const bool one = op == HM_OP_ALL || op == HM_OP_PROD;
  return hm_cuda_fill_number(&call->out[0], op == HM_OP_MEAN ? (double)NAN : (double)one, one, call->stream);
}

/* Bytes of one partial result. */
static size_t partial_bytes(int op) { return is_index_op(op) ? sizeof(placed<double>) : sizeof(double); }

extern "C" int hm_cuda_reduce_workspace(const hm_kernel_call *call, size_t *bytes) {
  hm_reduction p;
  make_plan(&p, call);
  *bytes = p.n_chunks > 1 ? (size_t)(p.n_chunks * p.n_keep) * partial_bytes(call->op) : 0;
  return HM_OK;
}

extern "C" int hm_cuda_reduce(const hm_kernel_call *call) {
  hm_reduction p;
  const char *name = name_of(call->op);
  if (!name) return hm_cuda_spread(call);
  make_plan(&p, call);
  if (p.n_keep == 0) return HM_OK;
  if (p.n_red == 0) return reduce_nothing(call, name);
  if (p.n_chunks > 1) {
    if (call->workspace_bytes < (size_t)(p.n_chunks * p.n_keep) * partial_bytes(call->op))
      return hm_cuda_fail(HM_ERR_INTERNAL, "%s: the workspace is too small", name);
    p.partial = call->workspace;
  }
  if (call->op == HM_OP_ANY) return hm_reduce<op_logic<true>>(&p, name, call->stream);
  if (call->op == HM_OP_ALL) return hm_reduce<op_logic<false>>(&p, name, call->stream);
  if (call->op == HM_OP_PROD)
    return call->compute == HM_I64 ? hm_reduce<op_prod<int64_t>>(&p, name, call->stream)
                                   : hm_reduce<op_prod<double>>(&p, name, call->stream);
  if (call->compute == HM_F32) return launch_typed<float>(call->op, &p, name, call->stream);
  if (call->compute == HM_F64) return launch_typed<double>(call->op, &p, name, call->stream);
  return launch_typed<int64_t>(call->op, &p, name, call->stream);
}
