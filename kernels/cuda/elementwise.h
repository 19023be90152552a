/*
 * elementwise.h -- the engine that brings operands to a functor on the device: elementwise.cu for the op table,
 * copy.cu for casts.
 *
 * Two kernels for each functor.  `runs` takes 4 or 8 neighbours at once by accesses of up to 16 bytes, for float32,
 * half and byte operands that are dense along the innermost dim or constant there: whole tensors, and rows with
 * broadcast operands.  `single` takes one element a time, of any dtypes and strides.  Dtypes are looked at once for
 * each group of elements, so there is no kernel for each combination.
 *
 * A functor has inputs, attrs, width, runs (0: the kernel `single` is enough) and value(inputs, constants); see
 * scripts/gen/emit_cuda.lua.
 */
#ifndef HM_CUDA_ELEMENTWISE_H
#define HM_CUDA_ELEMENTWISE_H

#include "view.h"

/* What an input is along the innermost dim. */
enum { HM_INPUT_NUMBER, HM_INPUT_SAME, HM_INPUT_RUN };

/* One call, as the kernels get it.  Operand 0 is the output, 1 + i input i. */
template <class T, int N, int C> struct hm_elements {
  hm_walk<N + 1> walk;
  void *data[N + 1];
  int8_t dtype[N + 1], kind[N + 1];
  uint32_t tail; /* elements behind the last whole group (single dim only) */
  T number[N];   /* of inputs that are numbers */
  T constant[C ? C : 1];
  hm_cuda_fault *fault; /* integer division: in[1] must not hold 0; else NULL */
  int32_t op;
};

/* ====== Kernels ====== */

/* The element at offsets `at`, from loading to storing. */
template <class Op, class T, class E> HM_DEV void hm_one_element(const E &e, const int64_t (&at)[Op::inputs + 1]) {
  T in[Op::inputs];
#pragma unroll
  for (int n = 0; n < Op::inputs; n++)
    in[n] = e.kind[n + 1] == HM_INPUT_NUMBER ? e.number[n] : hm_load<T>(e.data[n + 1], e.dtype[n + 1], at[n + 1]);
  if constexpr (sizeof(T) == 8 && Op::inputs == 2) {
    if (e.fault && in[1] == (T)0) hm_fault(e.fault, HM_ERR_ARG, e.op, 0, 0);
  }
  hm_store<T>(e.data[0], e.dtype[0], at[0], Op::value(in, e.constant));
}

template <class Op, class T>
static __global__ void __launch_bounds__(HM_BLOCK, 2) hm_elements_single(hm_elements<T, Op::inputs, Op::attrs> e) {
  for (uint32_t i = hm_global_thread(); i < e.walk.count; i += hm_global_threads()) {
    int64_t at[Op::inputs + 1];
    hm_offsets(e.walk, i, at);
    hm_one_element<Op, T>(e, at);
  }
}

template <class Op>
static __global__ void __launch_bounds__(HM_BLOCK, 2) hm_elements_runs(hm_elements<float, Op::inputs, Op::attrs> e) {
  const int N = Op::inputs, V = Op::width;
  for (uint32_t i = hm_global_thread(); i < e.walk.count; i += hm_global_threads()) {
    int64_t at[N + 1];
    float in[N][V], out[V];
    hm_offsets(e.walk, i, at);
#pragma unroll
    for (int n = 0; n < N; n++) {
      if (e.kind[n + 1] == HM_INPUT_RUN) {
        hm_load_run<V>(e.data[n + 1], e.dtype[n + 1], at[n + 1], in[n]);
      } else {
        const float x =
            e.kind[n + 1] == HM_INPUT_NUMBER ? e.number[n] : hm_load<float>(e.data[n + 1], e.dtype[n + 1], at[n + 1]);
#pragma unroll
        for (int k = 0; k < V; k++) in[n][k] = x;
      }
    }
#pragma unroll
    for (int k = 0; k < V; k++) {
      float a[N];
#pragma unroll
      for (int n = 0; n < N; n++) a[n] = in[n][k];
      out[k] = Op::value(a, e.constant);
    }
    hm_store_run<V>(e.data[0], e.dtype[0], at[0], out);
  }
  const uint32_t t = hm_global_thread();
  if (t >= e.tail) return;
  int64_t at[N + 1];
  const int64_t i = (int64_t)e.walk.count * V + t;
#pragma unroll
  for (int k = 0; k < N + 1; k++) at[k] = e.kind[k] == HM_INPUT_RUN ? i : 0;
  hm_one_element<Op, float>(e, at);
}

/* ====== Setting up ====== */

static inline void hm_set_number(const hm_view *v, float *to) { hm__scalar_value(v, HM_F32, to); }
static inline void hm_set_number(const hm_view *v, double *to) { hm__scalar_value(v, HM_F64, to); }
static inline void hm_set_number(const hm_view *v, int64_t *to) { hm__scalar_value(v, HM_I64, to); }

/* How an input looks along the innermost dim of a loop. */
static inline int hm_input_kind(const hm_loop *l, const hm_view *v, int operand) {
  if (v->flags & HM_VIEW_SCALAR) return HM_INPUT_NUMBER;
  return l->stride[operand][l->ndim - 1] == 0 ? HM_INPUT_SAME : HM_INPUT_RUN;
}

/* Can operand k, which begins at `data`, be taken in groups of `width`? */
static inline bool hm_operand_runs(const hm_loop *l, int k, const hm_view *v, const void *data, int width) {
  const int inner = l->ndim - 1;
  if (k > 0 && hm_input_kind(l, v, k) != HM_INPUT_RUN) return true;
  if (l->stride[k][inner] != 1 || !hm_runs_take(v->dtype) || !hm_runs_align(data, v->dtype, width)) return false;
  for (int d = 0; d < inner; d++)
    if (l->stride[k][d] % width) return false;
  return true;
}

/* Fills e for one piece of a call; true: for the kernel `runs`. */
template <class T, int N, int C>
static bool hm_elements_set(hm_elements<T, N, C> *e, const hm_loop *l, const int64_t *base, const hm_view *out,
                            const hm_view *in, int width) {
  const int inner = l->ndim - 1;
  const bool whole = inner == 0 ? l->shape[0] >= width : l->shape[inner] % width == 0;
  bool runs = sizeof(T) == 4 && whole;
  for (int k = 0; k <= N; k++) {
    const hm_view *v = k ? &in[k - 1] : out;
    e->data[k] = hm_element(v->data, base[k], v->dtype);
    e->dtype[k] = (int8_t)v->dtype;
    e->kind[k] = (int8_t)(k ? hm_input_kind(l, v, k) : HM_INPUT_RUN);
    if (k && e->kind[k] == HM_INPUT_NUMBER) hm_set_number(v, &e->number[k - 1]);
    runs = runs && hm_operand_runs(l, k, v, e->data[k], width);
  }
  e->tail = runs && inner == 0 ? (uint32_t)(l->shape[0] % width) : 0;
  e->walk = hm_make_walk<N + 1>(l, runs ? width : 1);
  return runs;
}

/* Queues the functor for an output and its inputs of the same shape.  T: what to compute in. */
template <class Op, class T>
static int hm_elements_run(const char *name, const hm_view *out, const hm_view *in, const hm_attr *attr,
                           hm_cuda_fault *fault, int op, void *stream) {
  const int N = Op::inputs;
  hm_loop loop;
  if (hm__loop_make(&loop, out, N, in) == 0) return HM_OK;
  int64_t base[N + 1] = {0};
  hm_elements<T, Op::inputs, Op::attrs> e;
  memset(&e, 0, sizeof e);
  Op::constants(attr, e.constant);
  e.fault = fault;
  e.op = op;
  return hm_each_piece(&loop, N + 1, base, [&](const hm_loop &l, const int64_t *at) {
    if constexpr (sizeof(T) == 4 && Op::runs) {
      if (hm_elements_set(&e, &l, at, out, in, Op::width))
        return HM_RUN(name, (hm_elements_runs<Op>), hm_blocks(e.walk.count), HM_BLOCK, 0, stream, e);
    } else {
      hm_elements_set(&e, &l, at, out, in, 1);
    }
    return HM_RUN(name, (hm_elements_single<Op, T>), hm_blocks(e.walk.count), HM_BLOCK, 0, stream, e);
  });
}

#endif
