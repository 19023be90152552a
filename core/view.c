/*
 * view.c -- view ops: another shape, other strides, the same memory.
 *
 * hm__infer_view makes the output tensor of every row declared with view{} in kernels/ops.def.  It knows no autograd:
 * dispatch.c records afterwards, from the attributes, which are therefore left normalised (dims and indices wrapped, -1
 * in shapes filled in).  reshape and flatten copy when strides forbid a view, which counts as a layout copy.
 *
 * Messages count positions from 1, as Lua does.
 */
#include <stdio.h>
#include <string.h>

#include "op.h"

/* A geometry in the making. */
typedef struct geometry {
  int ndim;
  int64_t offset;
  int64_t shape[HM_MAX_NDIM];
  int64_t stride[HM_MAX_NDIM];
} geometry;

static const char *op_name(const hm_opcall *c) { return c->info->name; }
static hm_tensor *source(const hm_opcall *c) { return c->in[0].t; }

static geometry geometry_of(const hm_tensor *t) {
  geometry g = {.ndim = t->ndim, .offset = t->offset};
  memcpy(g.shape, t->shape, (size_t)t->ndim * sizeof g.shape[0]);
  memcpy(g.stride, t->stride, (size_t)t->ndim * sizeof g.stride[0]);
  return g;
}

static void append(geometry *g, int64_t size, int64_t stride) {
  g->shape[g->ndim] = size;
  g->stride[g->ndim] = stride;
  g->ndim++;
}

/* Can its elements be counted?  Repeated dims may promise more than there are numbers for. */
static bool countable(const geometry *g) {
  int64_t numel = 1;
  for (int d = 0; d < g->ndim; d++) {
    if (__builtin_mul_overflow(numel, g->shape[d], &numel)) return false;
  }
  return true;
}

/* Sets the call's output: a view of the source with geometry g. */
static int give_view(hm_opcall *c, const geometry *g) {
  hm_tensor *x = source(c);
  if (!countable(g)) return hm_fail(HM_ERR_SHAPE, "%s: the number of elements does not fit 63 bits", op_name(c));
  int status = hm__tensor_on(x->storage, x->dtype, g->ndim, g->shape, g->stride, g->offset, &c->out[0]);
  if (status == HM_OK) c->out[0]->is_view = true;
  return status;
}

/* "[2,3,-1]" for messages. */
static const char *shape_text(int n, const int64_t *shape, char *buffer, size_t size) {
  size_t at = (size_t)snprintf(buffer, size, "[");
  for (int d = 0; d < n && at < size; d++)
    at += (size_t)snprintf(buffer + at, size - at, d ? ",%lld" : "%lld", (long long)shape[d]);
  if (at < size) snprintf(buffer + at, size - at, "]");
  return buffer;
}

/* An error of the form "op: <what>, came <shape> for <tensor>\n  hint: ...". */
static int shape_error(const hm_opcall *c, const char *what, int n, const int64_t *shape, const char *hint) {
  char dims[192], name[256];
  return hm_fail(HM_ERR_SHAPE, "%s: %s; came %s for %s%s%s", op_name(c), what, shape_text(n, shape, dims, sizeof dims),
                 hm_describe(source(c), name, sizeof name), hint ? "\n  hint: " : "", hint ? hint : "");
}

/* ====== view, reshape, flatten ====== */

/* Fills in a -1 and checks that the shape holds as many elements as the source. */
static int settle_shape(hm_opcall *c, hm_attr *want) {
  hm_tensor *x = source(c);
  int64_t known = 1;
  int open = -1;
  if (want->n > HM_MAX_NDIM)
    return hm_fail(HM_ERR_SHAPE, "%s: expected at most %d dims, came %d", op_name(c), HM_MAX_NDIM, want->n);
  for (int d = 0; d < want->n; d++) {
    if (want->v[d] == -1 && open < 0) {
      open = d;
    } else if (want->v[d] < 0) {
      return shape_error(c, "expected sizes of 0 or more and at most one -1", want->n, want->v, NULL);
    } else if (__builtin_mul_overflow(known, want->v[d], &known)) {
      return shape_error(c, "the sizes are too large", want->n, want->v, NULL);
    }
  }
  if (open >= 0) {
    if (known == 0)
      return shape_error(c, "-1 could be anything beside a size of 0", want->n, want->v, "give every size");
    if (x->numel % known)
      return shape_error(c, "the sizes given do not divide the number of elements", want->n, want->v, NULL);
    want->v[open] = x->numel / known;
  } else if (known != x->numel) {
    char what[96];
    snprintf(what, sizeof what, "expected a shape of %lld elements", (long long)x->numel);
    return shape_error(c, what, want->n, want->v, "-1 stands for the rest");
  }
  return HM_OK;
}

/* Strides that give x's elements, in row-major order, the new shape; false where there are none.  Runs of x's dims that
 * lie without a gap between them act as one dim; each run must be cut up by whole new dims.  Dims of size 1 have a
 * stride that never matters: they are skipped in x and get the current step in the new shape. */
static bool view_strides(const hm_tensor *x, int ndim, const int64_t *shape, int64_t *stride) {
  if (x->numel == 0) {
    hm__row_major(ndim, shape, stride);
    return true;
  }
  int to = ndim - 1; /* the next new dim, from the innermost */
  int64_t step = 1;
  for (int from = x->ndim - 1; from >= 0;) {
    if (x->shape[from] == 1) {
      from--;
      continue;
    }
    int64_t run = x->shape[from];
    step = x->stride[from];
    int64_t end = step * run; /* the stride that the next dim must have to belong to the run */
    for (from--; from >= 0 && (x->shape[from] == 1 || x->stride[from] == end); from--) {
      run *= x->shape[from];
      if (x->shape[from] != 1) end *= x->shape[from];
    }
    while (run > 1) {
      if (to < 0 || run % shape[to]) return false;
      stride[to] = step;
      step *= shape[to];
      run /= shape[to];
      to--;
    }
  }
  for (; to >= 0; to--) stride[to] = step; /* what is left has size 1 */
  return true;
}

/* Sets the call's output: a row-major copy of the source in another shape. */
static int give_copy(hm_opcall *c, int ndim, const int64_t *shape) {
  hm_tensor *x = source(c), *copy;
  int status = hm_empty(ndim, shape, x->dtype, x->storage->device, &copy);
  if (status) return status;
  hm_view from, to;
  hm__view_of(x, &from);
  hm__plain_view(hm_tensor_data(copy), x->dtype, x->ndim, x->shape, &to);
  if ((status = hm__copy_view(x->storage->device, &from, &to))) {
    hm_tensor_release(copy);
    return status;
  }
  hm__count_layout_copy(x->storage->device);
  c->out[0] = copy;
  return HM_OK;
}

/* The source in a settled shape: a view, or a copy where that is allowed. */
static int give_shape(hm_opcall *c, int ndim, const int64_t *shape, bool may_copy) {
  hm_tensor *x = source(c);
  geometry g = {.ndim = ndim, .offset = x->offset};
  memcpy(g.shape, shape, (size_t)ndim * sizeof g.shape[0]);
  if (view_strides(x, ndim, shape, g.stride)) return give_view(c, &g);
  if (may_copy) return give_copy(c, ndim, shape);
  char strides[192], what[288];
  snprintf(what, sizeof what, "the strides %s do not allow this shape without a copy",
           shape_text(x->ndim, x->stride, strides, sizeof strides));
  return shape_error(c, what, ndim, shape, "reshape copies when it must");
}

static int infer_shape(hm_opcall *c, bool may_copy) {
  int status = settle_shape(c, &c->attr[0]);
  return status ? status : give_shape(c, c->attr[0].n, c->attr[0].v, may_copy);
}

static int infer_flatten(hm_opcall *c) {
  hm_tensor *x = source(c);
  if (x->ndim == 0) {
    const int64_t one = 1;
    return give_shape(c, 1, &one, true);
  }
  int status = hm__wrap_dim(c, &c->attr[0].i, x->ndim);
  if (status == HM_OK) status = hm__wrap_dim(c, &c->attr[1].i, x->ndim);
  if (status) return status;
  int first = (int)c->attr[0].i, last = (int)c->attr[1].i;
  if (first > last)
    return hm_fail(HM_ERR_ARG, "flatten: expected start_dim before end_dim, came %d and %d", first + 1, last + 1);
  geometry g = {.ndim = 0};
  for (int d = 0; d < x->ndim; d++) {
    if (d > first && d <= last) g.shape[g.ndim - 1] *= x->shape[d];
    else append(&g, x->shape[d], 0);
  }
  return give_shape(c, g.ndim, g.shape, true);
}

/* ====== permute, transpose, t ====== */

static int infer_permute(hm_opcall *c) {
  hm_tensor *x = source(c);
  hm_attr *dims = &c->attr[0];
  geometry g = {.ndim = 0, .offset = x->offset};
  uint32_t seen = 0;
  if (dims->n != x->ndim) {
    char name[256];
    return hm_fail(HM_ERR_ARG, "permute: expected every dim once, %d of them, came %d for %s", x->ndim, dims->n,
                   hm_describe(x, name, sizeof name));
  }
  for (int i = 0; i < dims->n; i++) {
    int status = hm__wrap_dim(c, &dims->v[i], x->ndim);
    if (status) return status;
    int d = (int)dims->v[i];
    if (seen & (1u << d)) return hm_fail(HM_ERR_ARG, "permute: expected every dim once, came dim %d twice", d + 1);
    seen |= 1u << d;
    append(&g, x->shape[d], x->stride[d]);
  }
  return give_view(c, &g);
}

/* Two dims exchanged. */
static int give_swapped(hm_opcall *c, int a, int b) {
  hm_tensor *x = source(c);
  geometry g = geometry_of(x);
  g.shape[a] = x->shape[b];
  g.shape[b] = x->shape[a];
  g.stride[a] = x->stride[b];
  g.stride[b] = x->stride[a];
  return give_view(c, &g);
}

static int infer_transpose(hm_opcall *c) {
  hm_tensor *x = source(c);
  int status = hm__wrap_dim(c, &c->attr[0].i, x->ndim);
  if (status == HM_OK) status = hm__wrap_dim(c, &c->attr[1].i, x->ndim);
  if (status) return status;
  return give_swapped(c, (int)c->attr[0].i, (int)c->attr[1].i);
}

static int infer_t(hm_opcall *c) {
  hm_tensor *x = source(c);
  char name[256];
  if (x->ndim > 2)
    return hm_fail(HM_ERR_SHAPE, "t: expected at most 2 dims, came %s\n  hint: transpose(dim0, dim1) exchanges any two",
                   hm_describe(x, name, sizeof name));
  if (x->ndim == 2) return give_swapped(c, 0, 1);
  geometry g = geometry_of(x);
  return give_view(c, &g);
}

/* ====== squeeze, unsqueeze ====== */

static int infer_squeeze(hm_opcall *c) {
  hm_tensor *x = source(c);
  hm_attr *dims = &c->attr[0];
  uint32_t named = dims->n == 0 ? ~0u : 0;
  for (int i = 0; i < dims->n; i++) {
    int status = hm__wrap_dim(c, &dims->v[i], x->ndim);
    if (status) return status;
    named |= 1u << dims->v[i];
  }
  geometry g = {.ndim = 0, .offset = x->offset};
  for (int d = 0; d < x->ndim; d++) {
    if (x->shape[d] != 1 || !(named & (1u << d))) append(&g, x->shape[d], x->stride[d]);
  }
  return give_view(c, &g);
}

/* No room for one more dim? */
static int check_room(const hm_opcall *c) {
  char name[256];
  if (source(c)->ndim < HM_MAX_NDIM) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: a tensor has at most %d dims, came %s", op_name(c), HM_MAX_NDIM,
                 hm_describe(source(c), name, sizeof name));
}

static int infer_unsqueeze(hm_opcall *c) {
  hm_tensor *x = source(c);
  int status = check_room(c);
  if (status == HM_OK) status = hm__wrap_dim(c, &c->attr[0].i, x->ndim + 1);
  if (status) return status;
  int at = (int)c->attr[0].i;
  geometry g = {.ndim = 0, .offset = x->offset};
  for (int d = 0; d < at; d++) append(&g, x->shape[d], x->stride[d]);
  append(&g, 1, at < x->ndim ? x->stride[at] * x->shape[at] : 1);
  for (int d = at; d < x->ndim; d++) append(&g, x->shape[d], x->stride[d]);
  return give_view(c, &g);
}

/* ====== expand and its relatives ====== */

static int infer_expand(hm_opcall *c) {
  hm_tensor *x = source(c);
  hm_attr *want = &c->attr[0];
  int added = want->n - x->ndim;
  if (want->n > HM_MAX_NDIM)
    return hm_fail(HM_ERR_SHAPE, "expand: expected at most %d dims, came %d", HM_MAX_NDIM, want->n);
  if (added < 0) return shape_error(c, "expected at least as many dims as the tensor has", want->n, want->v, NULL);
  geometry g = {.ndim = 0, .offset = x->offset};
  for (int d = 0; d < want->n; d++) {
    int64_t size = want->v[d];
    if (d < added) {
      if (size < 0) return shape_error(c, "expected a size of 0 or more for every new dim", want->n, want->v, NULL);
      append(&g, size, 0);
      continue;
    }
    int64_t have = x->shape[d - added];
    if (size == -1) size = want->v[d] = have;
    if (size < 0 || (size != have && have != 1)) {
      char what[128];
      snprintf(what, sizeof what, "dim %d has size %lld, and only dims of size 1 are repeated", d - added + 1,
               (long long)have);
      return shape_error(c, what, want->n, want->v, NULL);
    }
    append(&g, size, size == have ? x->stride[d - added] : 0);
  }
  return give_view(c, &g);
}

/* attr: shape, dims, keepdim.  x is what a reduction of a tensor of that shape gave. */
static int infer_expand_reduced(hm_opcall *c) {
  hm_tensor *x = source(c);
  const hm_attr *want = &c->attr[0];
  hm_attr *dims = &c->attr[1];
  bool keepdim = c->attr[2].i != 0;
  uint32_t reduced = dims->n == 0 ? ~0u : 0;
  for (int i = 0; i < dims->n; i++) {
    int status = hm__wrap_dim(c, &dims->v[i], want->n);
    if (status) return status;
    reduced |= 1u << dims->v[i];
  }
  geometry g = {.ndim = 0, .offset = x->offset};
  int from = 0; /* the next dim of x */
  for (int d = 0; d < want->n; d++) {
    bool repeat = reduced & (1u << d);
    if (repeat && !keepdim) {
      append(&g, want->v[d], 0);
      continue;
    }
    if (from == x->ndim || x->shape[from] != (repeat ? 1 : want->v[d])) break;
    append(&g, want->v[d], repeat ? 0 : x->stride[from]);
    from++;
  }
  if (g.ndim != want->n || from != x->ndim)
    return shape_error(c, "expected the shape of a tensor that these dims reduce to this one", want->n, want->v, NULL);
  return give_view(c, &g);
}

static int infer_grad_channels(hm_opcall *c) {
  hm_tensor *x = source(c);
  const hm_attr *want = &c->attr[0];
  if (x->ndim != 1 || want->n < 2 || want->v[1] != x->shape[0])
    return shape_error(c, "expected a vector as long as dim 2 of the shape", want->n, want->v, NULL);
  geometry g = {.ndim = 0, .offset = x->offset};
  for (int d = 0; d < want->n; d++) append(&g, want->v[d], d == 1 ? x->stride[0] : 0);
  return give_view(c, &g);
}

/* ====== narrow, select ====== */

/* A 0-based position as messages write it. */
static long long position(int64_t index) { return (long long)(index < 0 ? index : index + 1); }

static int check_not_scalar(const hm_opcall *c) {
  if (source(c)->ndim > 0) return HM_OK;
  return hm_fail(HM_ERR_SHAPE,
                 "%s: a tensor without dims has no entries to choose from\n  hint: item() reads its value", op_name(c));
}

static int infer_narrow(hm_opcall *c) {
  hm_tensor *x = source(c);
  char name[256];
  int status = check_not_scalar(c);
  if (status == HM_OK) status = hm__wrap_dim(c, &c->attr[0].i, x->ndim);
  if (status) return status;
  int d = (int)c->attr[0].i;
  int64_t size = x->shape[d], start = c->attr[1].i, length = c->attr[2].i;
  if (start < 0) start += size;
  if (start < 0 || length < 0 || length > size || start > size - length)
    return hm_fail(HM_ERR_ARG, "narrow: expected entries within 1 to %lld of dim %d, came %lld from %lld on of %s",
                   (long long)size, d + 1, (long long)length, position(c->attr[1].i),
                   hm_describe(x, name, sizeof name));
  c->attr[1].i = start;
  geometry g = geometry_of(x);
  g.shape[d] = length;
  if (length > 0) g.offset += start * x->stride[d];
  return give_view(c, &g);
}

static int infer_select(hm_opcall *c) {
  hm_tensor *x = source(c);
  char name[256];
  int status = check_not_scalar(c);
  if (status == HM_OK) status = hm__wrap_dim(c, &c->attr[0].i, x->ndim);
  if (status) return status;
  int at = (int)c->attr[0].i;
  int64_t size = x->shape[at], index = c->attr[1].i;
  if (index < 0) index += size;
  if (index < 0 || index >= size)
    return hm_fail(HM_ERR_ARG, "select: expected an entry within 1 to %lld of dim %d, came %lld for %s",
                   (long long)size, at + 1, position(c->attr[1].i), hm_describe(x, name, sizeof name));
  c->attr[1].i = index;
  geometry g = {.ndim = 0, .offset = x->offset + index * x->stride[at]};
  for (int d = 0; d < x->ndim; d++) {
    if (d != at) append(&g, x->shape[d], x->stride[d]);
  }
  return give_view(c, &g);
}

/* ====== The entry ====== */

int hm__infer_view(hm_opcall *c) {
  if (c->in[0].kind != HM_ARG_TENSOR)
    return hm_fail(HM_ERR_ARG, "%s: expected a tensor, came %s", op_name(c),
                   c->in[0].kind == HM_ARG_NONE ? "nothing" : "a number");
  switch (c->op) {
  case HM_OP_VIEW: return infer_shape(c, false);
  case HM_OP_RESHAPE: return infer_shape(c, true);
  case HM_OP_FLATTEN: return infer_flatten(c);
  case HM_OP_PERMUTE: return infer_permute(c);
  case HM_OP_TRANSPOSE: return infer_transpose(c);
  case HM_OP_T: return infer_t(c);
  case HM_OP_SQUEEZE: return infer_squeeze(c);
  case HM_OP_UNSQUEEZE: return infer_unsqueeze(c);
  case HM_OP_EXPAND: return infer_expand(c);
  case HM_OP_EXPAND_REDUCED: return infer_expand_reduced(c);
  case HM_OP_GRAD_CHANNELS: return infer_grad_channels(c);
  case HM_OP_NARROW: return infer_narrow(c);
  case HM_OP_SELECT: return infer_select(c);
  case HM_OP_DETACH: return hm_alias(source(c), &c->out[0]);
  default: return hm_fail(HM_ERR_INTERNAL, "%s: view.c does not know this op", op_name(c));
  }
}
