/*
 * infer_index.c -- the shape rules of indexing: picking and adding at places that a tensor of ids names, sorting, triangles, padding.
 *
 * Rules as in infer.c.  The values of ids are the kernels' to check (0 <= id < size); here only shapes are.  A 0-dim tensor counts as one of a
 * single dim of size 1 wherever a dim is named.
 */
#include <stdio.h>
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

static const hm_tensor *operand(const hm_opcall *c, int i) { return c->in[i].t; }

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

static void spec_shape(hm_out_spec *s, int ndim, const int64_t *shape) {
  s->ndim = ndim;
  memcpy(s->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

/* "[2,3]" of a shape. */
static const char *shape_text(int ndim, const int64_t *shape, char buffer[160]) {
  size_t at = 1;
  strcpy(buffer, "[");
  for (int d = 0; d < ndim && at < 130; d++)
    at += (size_t)snprintf(buffer + at, 160 - at, "%s%lld", d ? "," : "", (long long)shape[d]);
  snprintf(buffer + at, 160 - at, "]");
  return buffer;
}

static bool has_shape(const hm_tensor *t, int ndim, const int64_t *shape) {
  return t->ndim == ndim && !memcmp(t->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

/* Wraps a dim of a tensor with ndim dims; a 0-dim one has dim 0. */
static int wrap(const hm_opcall *c, int64_t *dim, int ndim) {
  if (ndim == 0 && (*dim == 0 || *dim == -1)) {
    *dim = 0;
    return HM_OK;
  }
  return hm__wrap_dim(c, dim, ndim);
}

/* ====== Ids of every element: gather, scatter and kin ====== */

/* index must have as many dims as `shape`, and be no larger in any but `dim`. */
static int check_element_ids(const hm_opcall *c, const hm_tensor *index, int ndim, const int64_t *shape, int64_t dim,
                             const char *name) {
  bool fit = index->ndim == ndim;
  for (int d = 0; fit && d < ndim; d++) fit = d == dim || index->shape[d] <= shape[d];
  if (fit) return HM_OK;
  char a[160], b[160];
  return hm_fail(
      HM_ERR_SHAPE,
      "%s: index must have as many dims as %s, and be no larger except along dim %lld: index is %s, %s is %s", NAME(c),
      name, (long long)dim + 1, text_of(index, a), name, shape_text(ndim, shape, b));
}

static int infer_gather(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0), *index = operand(c, 1);
  int status = wrap(c, &c->attr[0].i, x->ndim);
  if (!status) status = check_element_ids(c, index, x->ndim, x->shape, c->attr[0].i, "x");
  if (status) return status;
  spec_shape(&c->spec[0], index->ndim, index->shape);
  return HM_OK;
}

/* Both shapes must be equal: g and index, src and index. */
static int check_same(const hm_opcall *c, const hm_tensor *t, const char *name, const hm_tensor *index) {
  if (has_shape(t, index->ndim, index->shape)) return HM_OK;
  char a[160], b[160];
  return hm_fail(HM_ERR_SHAPE, "%s: %s and index must have one shape: %s is %s, index is %s", NAME(c), name, name,
                 text_of(t, a), text_of(index, b));
}

static int infer_gather_backward(hm_opcall *c) {
  const hm_attr *shape = &c->attr[0];
  int status = wrap(c, &c->attr[1].i, shape->n);
  if (!status) status = check_same(c, operand(c, 0), "g", operand(c, 1));
  if (!status) status = check_element_ids(c, operand(c, 1), shape->n, shape->v, c->attr[1].i, "shape");
  if (status) return status;
  spec_shape(&c->spec[0], shape->n, shape->v);
  return HM_OK;
}

/* src may be larger than index: what lies beyond is not read.  Its gradient has index's shape, so then it must not want one. */
static int check_source(const hm_opcall *c, const hm_tensor *src, const hm_tensor *index) {
  bool fit = src->ndim == index->ndim;
  for (int d = 0; fit && d < src->ndim; d++) fit = src->shape[d] >= index->shape[d];
  char a[160], b[160];
  if (!fit)
    return hm_fail(HM_ERR_SHAPE,
                   "%s: src must have as many dims as index and be at least as large: src is %s, index is %s", NAME(c),
                   text_of(src, a), text_of(index, b));
  if (c->src[2].t->requires_grad && !has_shape(src, index->ndim, index->shape))
    return hm_fail(
        HM_ERR_SHAPE,
        "%s: a src that requires a gradient must have index's shape: src is %s, index is %s\n  hint: narrow src first",
        NAME(c), text_of(src, a), text_of(index, b));
  return HM_OK;
}

static int infer_scatter(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0), *index = operand(c, 1);
  int status = wrap(c, &c->attr[0].i, x->ndim);
  if (!status) status = check_element_ids(c, index, x->ndim, x->shape, c->attr[0].i, "x");
  if (!status && c->in[2].kind == HM_ARG_TENSOR) status = check_source(c, operand(c, 2), index);
  if (status) return status;
  spec_shape(&c->spec[0], x->ndim, x->shape);
  return HM_OK;
}

/* ====== Ids along a dim: index_select, index_add ====== */

static int check_list(const hm_opcall *c, const hm_tensor *index) {
  char text[160];
  if (index->ndim <= 1) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: index must be a list of ids [n], got %s\n  hint: flatten it, or use gather",
                 NAME(c), text_of(index, text));
}

static int infer_index_select(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0), *index = operand(c, 1);
  int status = wrap(c, &c->attr[0].i, x->ndim);
  if (!status) status = check_list(c, index);
  if (status) return status;
  if (x->ndim == 0 && index->numel != 1) {
    char text[160];
    return hm_fail(HM_ERR_SHAPE, "index_select: a 0-dim x has one entry to select, index is %s", text_of(index, text));
  }
  spec_shape(&c->spec[0], x->ndim, x->shape);
  if (x->ndim > 0) c->spec[0].shape[c->attr[0].i] = index->numel;
  return HM_OK;
}

/* The shape that entries for the ids have: `shape` with index's length along dim. */
static int check_entries(const hm_opcall *c, const hm_tensor *t, const char *name, int ndim, const int64_t *shape,
                         int64_t dim, const hm_tensor *index) {
  int64_t want[HM_MAX_NDIM];
  memcpy(want, shape, sizeof(int64_t) * (size_t)ndim);
  if (ndim > 0) want[dim] = index->numel;
  if (has_shape(t, ndim, want) && (ndim > 0 || index->numel == 1)) return HM_OK;
  char a[160], b[160], text[160];
  return hm_fail(HM_ERR_SHAPE, "%s: %s must be %s: one entry along dim %lld for each id of index, got %s (index is %s)",
                 NAME(c), name, shape_text(ndim, want, text), (long long)dim + 1, text_of(t, a), text_of(index, b));
}

static int infer_index_select_backward(hm_opcall *c) {
  const hm_attr *shape = &c->attr[0];
  int status = wrap(c, &c->attr[1].i, shape->n);
  if (!status) status = check_list(c, operand(c, 1));
  if (!status) status = check_entries(c, operand(c, 0), "g", shape->n, shape->v, c->attr[1].i, operand(c, 1));
  if (status) return status;
  spec_shape(&c->spec[0], shape->n, shape->v);
  return HM_OK;
}

static int infer_index_add(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0);
  int status = wrap(c, &c->attr[0].i, x->ndim);
  if (!status) status = check_list(c, operand(c, 1));
  if (!status) status = check_entries(c, operand(c, 2), "src", x->ndim, x->shape, c->attr[0].i, operand(c, 1));
  if (status) return status;
  spec_shape(&c->spec[0], x->ndim, x->shape);
  return HM_OK;
}

static int infer_flip(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0);
  uint32_t seen = 0;
  for (int k = 0; k < c->attr[0].n; k++) {
    int64_t *dim = &c->attr[0].v[k];
    const int status = wrap(c, dim, x->ndim);
    if (status) return status;
    if (seen >> *dim & 1) return hm_fail(HM_ERR_ARG, "flip: dim %lld is given twice", (long long)*dim + 1);
    seen |= 1u << *dim;
  }
  spec_shape(&c->spec[0], x->ndim, x->shape);
  c->spec[0].channels_last = x->ndim == 4 && hm_is_channels_last(x) && !hm_is_contiguous(x);
  return HM_OK;
}

int hm__infer_indexing(hm_opcall *c) {
  switch (c->op) {
  case HM_OP_GATHER: return infer_gather(c);
  case HM_OP_GATHER_BACKWARD: return infer_gather_backward(c);
  case HM_OP_INDEX_SELECT: return infer_index_select(c);
  case HM_OP_INDEX_SELECT_BACKWARD: return infer_index_select_backward(c);
  case HM_OP_INDEX_ADD: return infer_index_add(c);
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD: return infer_scatter(c);
  case HM_OP_FLIP: return infer_flip(c);
  default: return hm_fail(HM_ERR_INTERNAL, "%s: has no rule for its shapes", NAME(c));
  }
}

/* ====== Embedding, one_hot ====== */

static int check_padding(const hm_opcall *c, int64_t padding, int64_t rows) {
  if (padding >= -1 && padding < rows) return HM_OK;
  return hm_fail(HM_ERR_ARG, "%s: padding_idx must be an id from 0 to %lld, or -1 for none, got %lld", NAME(c),
                 (long long)rows - 1, (long long)padding);
}

static int infer_embedding_backward(hm_opcall *c) {
  const hm_tensor *g = operand(c, 0), *index = operand(c, 1);
  const hm_attr *shape = &c->attr[0];
  if (shape->n != 2) return hm_fail(HM_ERR_SHAPE, "%s: shape must be [V, E]", NAME(c));
  const bool fit = g->ndim == index->ndim + 1 && g->shape[index->ndim] == shape->v[1] &&
                   !memcmp(g->shape, index->shape, sizeof(int64_t) * (size_t)index->ndim);
  if (!fit) {
    char a[160], b[160];
    return hm_fail(HM_ERR_SHAPE, "%s: g must have index's shape and E = %lld at the end: g is %s, index is %s", NAME(c),
                   (long long)shape->v[1], text_of(g, a), text_of(index, b));
  }
  int status = check_padding(c, c->attr[1].i, shape->v[0]);
  if (!status) status = hm__want_contiguous(c, 0);
  if (!status) status = hm__want_contiguous(c, 1);
  if (status) return status;
  spec_shape(&c->spec[0], 2, shape->v);
  return HM_OK;
}

int hm__infer_embedding(hm_opcall *c) {
  if (c->op == HM_OP_EMBEDDING_BACKWARD) return infer_embedding_backward(c);
  const hm_tensor *weight = operand(c, 0), *index = operand(c, 1);
  char text[160];
  if (weight->ndim != 2)
    return hm_fail(HM_ERR_SHAPE, "embedding: weight must have 2 dims [V, E], got %s", text_of(weight, text));
  if (index->ndim == HM_MAX_NDIM)
    return hm_fail(HM_ERR_SHAPE, "embedding: index has %d dims; the result would have more than %d", index->ndim,
                   HM_MAX_NDIM);
  const int status = check_padding(c, c->attr[0].i, weight->shape[0]);
  if (status) return status;
  spec_shape(&c->spec[0], index->ndim, index->shape);
  c->spec[0].shape[c->spec[0].ndim++] = weight->shape[1];
  return HM_OK;
}

int hm__infer_one_hot(hm_opcall *c) {
  const hm_tensor *index = operand(c, 0);
  if (c->attr[0].i < 1)
    return hm_fail(HM_ERR_ARG, "one_hot: num_classes must be at least 1, got %lld", (long long)c->attr[0].i);
  if (index->ndim == HM_MAX_NDIM)
    return hm_fail(HM_ERR_SHAPE, "one_hot: index has %d dims; the result would have more than %d", index->ndim,
                   HM_MAX_NDIM);
  spec_shape(&c->spec[0], index->ndim, index->shape);
  c->spec[0].shape[c->spec[0].ndim++] = c->attr[0].i;
  return HM_OK;
}

/* ====== sort, topk ====== */

int hm__infer_sort(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0);
  const bool top = c->op == HM_OP_TOPK;
  int64_t *dim = &c->attr[top ? 1 : 0].i;
  const int status = wrap(c, dim, x->ndim);
  if (status) return status;
  const int64_t size = x->ndim ? x->shape[*dim] : 1, k = top ? c->attr[0].i : size;
  char text[160];
  if (k < 0 || k > size)
    return hm_fail(HM_ERR_ARG, "topk: k must lie between 0 and %lld, the size of dim %lld of %s, got %lld",
                   (long long)size, (long long)*dim + 1, text_of(x, text), (long long)k);
  if (x->ndim == 0 && k != 1)
    return hm_fail(HM_ERR_ARG, "topk: k must be 1 for a 0-dim tensor, got %lld", (long long)k);
  for (int i = 0; i < 2; i++) {
    spec_shape(&c->spec[i], x->ndim, x->shape);
    if (x->ndim) c->spec[i].shape[*dim] = k;
  }
  return HM_OK;
}

/* ====== Triangles ====== */

int hm__infer_triangle(hm_opcall *c) {
  const hm_tensor *x = operand(c, 0);
  char text[160];
  if (x->ndim < 2)
    return hm_fail(HM_ERR_SHAPE, "%s: x must have at least 2 dims [..., rows, columns], got %s", NAME(c),
                   text_of(x, text));
  spec_shape(&c->spec[0], x->ndim, x->shape);
  return HM_OK;
}

/* ====== Padding ====== */

enum { CONSTANT, REFLECT, REPLICATE, CIRCULAR };

/* What a mode other than constant asks of the two pads of a dim of that size. */
static int check_mode(const hm_opcall *c, int64_t mode, int d, int64_t size, int64_t left, int64_t right) {
  static const char *const names[] = {"constant", "reflect", "replicate", "circular"};
  if (left < 0 || right < 0)
    return hm_fail(HM_ERR_ARG, "%s: negative pads cut in constant mode only: %s was asked for {%lld, %lld} of dim %d",
                   NAME(c), names[mode], (long long)left, (long long)right, d + 1);
  const int64_t larger = left > right ? left : right;
  if (mode == REFLECT && larger >= size)
    return hm_fail(HM_ERR_ARG,
                   "%s: reflect needs pads smaller than the size: dim %d has size %lld, the pads are {%lld, %lld}",
                   NAME(c), d + 1, (long long)size, (long long)left, (long long)right);
  if (mode == CIRCULAR && larger > size)
    return hm_fail(HM_ERR_ARG,
                   "%s: circular needs pads of at most the size: dim %d has size %lld, the pads are {%lld, %lld}",
                   NAME(c), d + 1, (long long)size, (long long)left, (long long)right);
  if (mode == REPLICATE && size == 0 && larger > 0)
    return hm_fail(HM_ERR_ARG, "%s: replicate has nothing to repeat: dim %d is empty", NAME(c), d + 1);
  return HM_OK;
}

/* The padded shape of x's shape. */
static int padded(const hm_opcall *c, int ndim, const int64_t *shape, const hm_attr *pad, int64_t mode, int64_t *out) {
  char text[160];
  if (pad->n % 2 != 0)
    return hm_fail(HM_ERR_ARG, "%s: pad must be {left, right} for each dim from the last, got %d number%s", NAME(c),
                   pad->n, pad->n == 1 ? "" : "s");
  if (pad->n / 2 > ndim)
    return hm_fail(HM_ERR_SHAPE, "%s: %d pairs of pads for %d dim%s: x is %s", NAME(c), pad->n / 2, ndim,
                   ndim == 1 ? "" : "s", shape_text(ndim, shape, text));
  memcpy(out, shape, sizeof(int64_t) * (size_t)ndim);
  for (int k = 0; k < pad->n / 2; k++) {
    const int d = ndim - 1 - k;
    const int64_t left = pad->v[2 * k], right = pad->v[2 * k + 1];
    const int status = mode == CONSTANT ? HM_OK : check_mode(c, mode, d, shape[d], left, right);
    if (status) return status;
    if (__builtin_add_overflow(shape[d], left, &out[d]) || __builtin_add_overflow(out[d], right, &out[d]))
      return hm_fail(HM_ERR_ARG, "%s: pads {%lld, %lld} are too large for dim %d of x %s", NAME(c), (long long)left,
                     (long long)right, d + 1, shape_text(ndim, shape, text));
    if (out[d] < 0 || left < -shape[d] || right < -shape[d])
      return hm_fail(HM_ERR_ARG, "%s: pads {%lld, %lld} cut more than there is: dim %d of x %s", NAME(c),
                     (long long)left, (long long)right, d + 1, shape_text(ndim, shape, text));
  }
  return HM_OK;
}

static int infer_pad_backward(hm_opcall *c) {
  const hm_tensor *g = operand(c, 0);
  const hm_attr *shape = &c->attr[0];
  int64_t want[HM_MAX_NDIM];
  const int status = padded(c, shape->n, shape->v, &c->attr[1], c->attr[2].i, want);
  if (status) return status;
  if (!has_shape(g, shape->n, want)) {
    char a[160], b[160];
    return hm_fail(HM_ERR_SHAPE, "pad_backward: g must be %s, got %s", shape_text(shape->n, want, a), text_of(g, b));
  }
  spec_shape(&c->spec[0], shape->n, shape->v);
  c->spec[0].channels_last = g->ndim == 4 && hm_is_channels_last(g) && !hm_is_contiguous(g);
  return HM_OK;
}

int hm__infer_pad(hm_opcall *c) {
  if (c->op == HM_OP_PAD_BACKWARD) return infer_pad_backward(c);
  const hm_tensor *x = operand(c, 0);
  const int status = padded(c, x->ndim, x->shape, &c->attr[0], c->attr[1].i, c->spec[0].shape);
  if (status) return status;
  c->spec[0].ndim = x->ndim;
  c->spec[0].channels_last = x->ndim == 4 && hm_is_channels_last(x) && !hm_is_contiguous(x);
  return HM_OK;
}
