/*
 * op.h -- private to core: one op call on its way through dispatch.c, and the rules that infer.c applies to it.
 *
 * A call passes five stations (dispatch.c): autocast chooses dtypes and casts operands; promotion sets the dtype computed in; the row's
 * infer function sets shapes and layouts and may replace operands (a contiguous copy); outputs are allocated and the backend runs;
 * one node is recorded if a gradient is wanted.
 */
#ifndef HM_CORE_OP_H
#define HM_CORE_OP_H

#include "halfmoon.h"

typedef struct hm_out_spec {
  int32_t dtype;
  int32_t ndim;
  int64_t shape[HM_MAX_NDIM];
  bool channels_last; /* else, with no stride given, row-major */
  bool has_stride;    /* stride[] is set (dense in some order) */
  int64_t stride[HM_MAX_NDIM];
} hm_out_spec;

typedef struct hm_opcall {
  const hm_op_info *info;
  int op;
  hm_arg src[HM_MAX_IN]; /* as the caller gave them: what gradients flow to */
  hm_arg in[HM_MAX_IN];  /* as the kernel gets them: cast, made contiguous */
  uint32_t owned;        /* bit i: in[i].t is a temporary of this call */
  hm_attr attr[HM_MAX_ATTR];
  int compute;   /* F32, F64 or I64 */
  int dtype;     /* promoted dtype of the class L, F, P and T inputs */
  int out_dtype; /* asked for by the caller, or HM_NONE */
  int device;
  bool inplace;
  bool grad;               /* gradients were on when the call began */
  struct hm_fp8_site *fp8; /* of a product on 8-bit operands (fp8.h), owned by the call; else NULL */
  hm_out_spec spec[HM_MAX_OUT];
  hm_tensor *out[HM_MAX_OUT]; /* view ops set them in infer; else dispatch allocates */
} hm_opcall;

/* ---- infer functions: named hm__infer_<name>; the generator picks the row's own (infer = "name") or its family's ---- */
int hm__infer_elementwise(hm_opcall *c);
int hm__infer_reduce(hm_opcall *c);
int hm__infer_reduce_index(hm_opcall *c); /* max_dim, min_dim, argmax, argmin */
/* Sums and products of integers and bools are int64 unless the caller asked for another dtype. */
void hm__widen_integers(hm_opcall *c);
/* The shape of a reduction of operand 0 over a dims attribute, which is completed. */
int hm__reduce_spec(hm_opcall *c, hm_attr *dims, bool keepdim);
int hm__infer_index(hm_opcall *c);
int hm__infer_norm(hm_opcall *c);
int hm__infer_loss(hm_opcall *c);
int hm__infer_matmul(hm_opcall *c);
int hm__infer_linear(hm_opcall *c);
int hm__infer_linear_backward_bias(hm_opcall *c);
int hm__infer_conv(hm_opcall *c);
int hm__infer_conv2d_backward_bias(hm_opcall *c);
int hm__infer_copy(hm_opcall *c);
/* May src be copied into x?  It must broadcast to x's shape. */
int hm__check_copy(const hm_tensor *x, const hm_tensor *src);
int hm__infer_fill(hm_opcall *c);
int hm__infer_random(hm_opcall *c);
/* infer_reduce.c */
int hm__infer_reduce_dim(hm_opcall *c);    /* prod */
int hm__infer_reduce_spread(hm_opcall *c); /* var, std */
int hm__infer_reduce_norm(hm_opcall *c);   /* norm */
int hm__infer_prod_backward(hm_opcall *c);
int hm__infer_scan(hm_opcall *c); /* cumsum, cumprod and their gradients */
/* infer_norm.c */
int hm__infer_batch_norm(hm_opcall *c);
int hm__infer_row_norm(hm_opcall *c); /* layer_norm, rms_norm */
int hm__infer_group_norm(hm_opcall *c);
/* infer_loss.c */
int hm__infer_nll_loss(hm_opcall *c);
/* infer_window.c: pools, interpolation */
int hm__infer_pool(hm_opcall *c); /* max_pool2d, its gradients, max_pool2d_pick */
int hm__infer_average_pool(hm_opcall *c);
int hm__infer_adaptive_pool(hm_opcall *c);
int hm__infer_interpolate(hm_opcall *c);
/* Windows along one dim, for convolution and pooling. */
typedef struct hm_window {
  int64_t kernel, stride, padding, dilation;
  bool ceil_mode;
} hm_window;
/* Spells a one-number ints attribute (the row's number `which`) out for H and W, and checks its range: at least `least`, below 2^31. */
int hm__pair(const hm_opcall *c, hm_attr *a, int which, int64_t least);
/* *out: how many windows dim d of x has; refuses a window that does not fit. */
int hm__window_output(const hm_opcall *c, const hm_tensor *x, int d, const hm_window *w, int64_t *out);
/* infer_attention.c */
int hm__infer_attention(hm_opcall *c);
int hm__infer_dropout(hm_opcall *c);
/* Refuses a probability outside [0, 1] (dropout, bernoulli_). */
int hm__check_chance(const hm_opcall *c, double p);
/* infer_index.c */
int hm__infer_indexing(hm_opcall *c); /* gather, index_select, index_add, scatter, scatter_add, flip and gradients */
int hm__infer_embedding(hm_opcall *c);
int hm__infer_one_hot(hm_opcall *c);
int hm__infer_sort(hm_opcall *c); /* sort, topk */
int hm__infer_triangle(hm_opcall *c);
int hm__infer_pad(hm_opcall *c);
/* view ops: infer makes the output tensor itself (view.c) */
int hm__infer_view(hm_opcall *c);
/* composites: infer runs other ops and sets out[] (composite.c); gradients are recorded for the row, not for what it ran */
int hm__infer_composite(hm_opcall *c);
/* its part in composite_loss.c: the second derivatives of cross_entropy */
int hm__cross_entropy_by_g(hm_opcall *c);
int hm__cross_entropy_by_x(hm_opcall *c);
/* its part in composite_prod.c: the second derivatives of prod and cumprod */
int hm__prod_backward_backward(hm_opcall *c);
int hm__cumprod_backward_backward(hm_opcall *c);

/* copy_ from a tensor on another device (composite.c): recorded as a move and a copy_ over there.  *out: a new reference to x. */
int hm__copy_across(hm_tensor *x, hm_tensor *src, hm_tensor **out);

/* ---- elementwise calls of no row (dispatch.c), for expression.c ---- */

/* Stands for the backend's kernel: the operands' views have the output's shape; k->op is -1. */
typedef int (*hm_run_fn)(void *ud, hm_opcall *c, hm_kernel_call *k);
/* Takes a call through hm_call's stations up to the finished output (a new reference); nothing is recorded.  info: the caller's own, of the family
 * elementwise with one output; it must live as long as the call. */
int hm__call_with(const hm_op_info *info, const hm_arg *in, hm_run_fn run, void *ud, hm_tensor **out);

/* ---- services for infer functions (dispatch.c) ---- */

/* in[i] as row-major / channels-last memory: replaces it by a temporary copy where needed, counting a layout copy. */
int hm__want_contiguous(hm_opcall *c, int i);
/* Puts t (taken over) in the place of operand i. */
void hm__replace_operand(hm_opcall *c, int i, hm_tensor *t);
int hm__want_channels_last(hm_opcall *c, int i);
/* Wraps a negative dim; HM_ERR_SHAPE with op, range and hint when it is out of range. */
int hm__wrap_dim(const hm_opcall *c, int64_t *dim, int ndim);

/* ---- tensors (tensor.c) ---- */
struct hm_shadow;
struct hm_storage {
  _Atomic int32_t refs;
  int32_t device;
  uint32_t version; /* bumped by every write after creation */
  uint32_t
      rewrites; /* of its writes, those that changed a graph: views taken before one belong to the graph as it was */
  void *data;
  size_t bytes;
  struct hm_shadow *shadows; /* derived read-only copies, see shadow.c */
};
int hm__storage_new(size_t bytes, int device, hm_storage **out); /* new reference */
void hm__storage_retain(hm_storage *s);
void hm__storage_release(hm_storage *s);
/* A tensor on an existing storage, geometry as given; takes over nothing, retains s. */
int hm__tensor_on(hm_storage *s, int dtype, int ndim, const int64_t *shape, const int64_t *stride, int64_t offset,
                  hm_tensor **out);
/* A new tensor by spec (row-major, channels-last or dense strides as given). */
int hm__tensor_by_spec(const hm_out_spec *spec, int device, hm_tensor **out);
void hm__row_major(int ndim, const int64_t *shape, int64_t *stride);
void hm__channels_last_strides(const int64_t *shape, int64_t *stride); /* 4-d */
void hm__touch(hm_tensor *t);                                          /* marks a write: bumps the version */
void hm__view_of(const hm_tensor *t, hm_view *v);
void hm__count_layout_copy(int device);
/* Copies src into dst through the device's COPY kernel: equal shapes, any strides, converted once.  No autograd, no log. */
int hm__copy_view(int device, const hm_view *src, const hm_view *dst);
/* A view struct over plain memory, row-major. */
void hm__plain_view(void *data, int dtype, int ndim, const int64_t *shape, hm_view *v);

/* ---- the allocator (alloc.c) ---- */
int hm__device_alloc(int device, size_t bytes, void **out);
void hm__device_free(int device, void *data, size_t bytes);
void hm__count_shadow_bytes(int device, int64_t delta);
/* Pinned host memory for uploads to a device; mutator thread only.  HM_ERR_UNSUPPORTED where the device's backend has none. */
int hm__pinned_alloc(int device, size_t bytes, void **out);
void hm__pinned_free(int device, void *data, size_t bytes); /* no copy out of it may be under way; NULL is ignored */

/* ---- shadows (shadow.c): derived copies that live with a storage, stamped with its version ---- */
/* Key of the row-major copy of a storage in another dtype; packings use the backend's keys, which have the top bit set. */
#define HM_SHADOW_DTYPE(dtype) ((uint64_t)(dtype) + 1)
/* The up-to-date shadow under key, borrowed, or NULL. */
hm_storage *hm__shadow_get(hm_storage *s, uint64_t key);
/* A shadow of `bytes` under key, made or recycled, stamped current; the caller fills it. Borrowed in *out. */
int hm__shadow_make(hm_storage *s, uint64_t key, size_t bytes, hm_storage **out);
void hm__shadow_drop_all(hm_storage *s);
/* Drops every shadow of every storage (memory pressure). */
void hm__shadow_purge(void);
int64_t hm__shadow_total_bytes(void);

#endif
