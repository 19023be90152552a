/*
 * infer_attention.c -- the shape rules of attention and its gradients, and of the rows that draw chances (dropout).
 *
 * Rules as in infer.c.  attention sees q [B, H, T, D], k [B, G, S, D], v [B, G, S, E]; G divides H, and H / G heads of q
 * in a row share a head of k and v.  Attributes are completed for kernels and backward: the scale is spelled out, and
 * rng holds the counters that dropout takes: one for each four elements of [B, H, T, S], in row-major order, none where
 * nothing is dropped.  The mask has no derivative.
 */
#include <math.h>
#include <string.h>

#include "op.h"

#define NAME(c) ((c)->info->name)

enum { CAUSAL, SCALE, DROPOUT, RNG }; /* attributes of both rows */

static const hm_tensor *operand(const hm_opcall *c, int i) { return c->in[i].t; }

static const char *text_of(const hm_tensor *t, char buffer[160]) { return hm_describe(t, buffer, 160); }

static void spec_shape(hm_out_spec *s, int ndim, const int64_t *shape) {
  s->ndim = ndim;
  memcpy(s->shape, shape, sizeof(int64_t) * (size_t)ndim);
}

/* ====== Chances ====== */

int hm__check_chance(const hm_opcall *c, double p) {
  return p >= 0 && p <= 1 ? HM_OK : hm_fail(HM_ERR_ARG, "%s: p must be from 0 to 1, got %g", NAME(c), p);
}

int hm__infer_dropout(hm_opcall *c) {
  const int status = hm__check_chance(c, c->attr[0].f);
  return status ? status : hm__infer_elementwise(c);
}

/* ====== Attention ====== */

static int check_ranks(const hm_opcall *c, int q) {
  static const char *const meaning[] = {"[B, H, T, D]", "[B, G, S, D]", "[B, G, S, E]"};
  char text[160];
  for (int i = 0; i < 3; i++)
    if (operand(c, q + i)->ndim != 4)
      return hm_fail(HM_ERR_SHAPE, "%s: %s must have 4 dims %s, got %s\n  hint: unsqueeze(1) adds a batch of one",
                     NAME(c), c->info->in[q + i].name, meaning[i], text_of(operand(c, q + i), text));
  return HM_OK;
}

static int shapes_differ(const hm_opcall *c, int q, const char *why) {
  char a[160], b[160], d[160];
  return hm_fail(HM_ERR_SHAPE, "%s: q is %s, k is %s, v is %s\n  %s", NAME(c), text_of(operand(c, q), a),
                 text_of(operand(c, q + 1), b), text_of(operand(c, q + 2), d), why);
}

static int check_shapes(const hm_opcall *c, int at) {
  const int64_t *q = operand(c, at)->shape, *k = operand(c, at + 1)->shape, *v = operand(c, at + 2)->shape;
  if (q[0] != k[0] || q[0] != v[0]) return shapes_differ(c, at, "dim 1, the batch, must be the same for all");
  if (k[1] != v[1] || k[2] != v[2])
    return shapes_differ(c, at, "k and v must have the same heads and length (dims 2 and 3)");
  if (q[3] != k[3]) return shapes_differ(c, at, "q and k must have the same width (dim 4)");
  if (k[1] ? q[1] % k[1] != 0 : q[1] != 0)
    return shapes_differ(
        c, at,
        "the heads of k and v (dim 2) must divide those of q\n  hint: 8 heads of q go with 1, 2, 4 or 8 of k and v");
  return HM_OK;
}

static int check_dtypes(const hm_opcall *c) {
  char a[160], b[160], d[160];
  const hm_tensor *q = operand(c, 0), *k = operand(c, 1), *v = operand(c, 2);
  if (q->dtype == k->dtype && q->dtype == v->dtype) return HM_OK;
  return hm_fail(HM_ERR_DTYPE,
                 "%s: dtypes differ: q is %s, k is %s, v is %s\n  hint: convert with :to(\"%s\"), or run inside "
                 "amp.autocast",
                 NAME(c), text_of(q, a), text_of(k, b), text_of(v, d), hm_dtype_short(c->dtype));
}

/* A mask must be bool or floating and broadcast to [B, H, T, S]. */
static int check_mask(const hm_opcall *c, int i, const int64_t *q, int64_t keys) {
  if (c->in[i].kind != HM_ARG_TENSOR) return HM_OK;
  const hm_tensor *t = operand(c, i);
  char text[160];
  if (c->attr[CAUSAL].i)
    return hm_fail(HM_ERR_ARG, "%s: mask and causal do not go together\n  hint: put the triangle into the mask",
                   NAME(c));
  if (t->dtype != HM_BOOL && !hm_dtype_is_float(t->dtype))
    return hm_fail(
        HM_ERR_DTYPE,
        "%s: mask must be bool (true: take part) or floating (added to the scores), got %s\n  hint: compare, "
        "for instance mask:ne(0)",
        NAME(c), text_of(t, text));
  const int64_t full[4] = {q[0], q[1], q[2], keys};
  bool fit = t->ndim <= 4;
  for (int d = 0; fit && d < t->ndim; d++) fit = t->shape[d] == 1 || t->shape[d] == full[4 - t->ndim + d];
  if (fit) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: mask must broadcast to [B, H, T, S] = [%lld,%lld,%lld,%lld], got %s", NAME(c),
                 (long long)full[0], (long long)full[1], (long long)full[2], (long long)full[3], text_of(t, text));
}

/* Elements of the last dim side by side: rows are read as pieces of memory. */
static int want_rows(hm_opcall *c, int i) {
  const hm_tensor *t = operand(c, i);
  return t->stride[3] == 1 || t->shape[3] <= 1 ? HM_OK : hm__want_contiguous(c, i);
}

/* Spells the scale out; refuses what is no scale and no probability. */
static int complete(hm_opcall *c, int64_t width) {
  double *scale = &c->attr[SCALE].f;
  if (*scale != *scale || *scale - *scale != 0)
    return hm_fail(HM_ERR_ARG, "%s: scale must be finite, got %g\n  hint: 0 stands for 1/sqrt(D)", NAME(c), *scale);
  if (*scale == 0) *scale = width > 0 ? 1 / sqrt((double)width) : 1;
  const double p = c->attr[DROPOUT].f;
  return p >= 0 && p <= 1 ? HM_OK : hm_fail(HM_ERR_ARG, "%s: dropout must be from 0 to 1, got %g", NAME(c), p);
}

static int infer_forward(hm_opcall *c) {
  const hm_tensor *q = operand(c, 0), *k = operand(c, 1), *v = operand(c, 2);
  int status = check_ranks(c, 0);
  if (!status) status = check_shapes(c, 0);
  if (!status) status = check_dtypes(c);
  if (!status) status = check_mask(c, 3, q->shape, k->shape[2]);
  if (!status) status = complete(c, q->shape[3]);
  if (status) return status;
  const int64_t out[4] = {q->shape[0], q->shape[1], q->shape[2], v->shape[3]};
  const int64_t scores = out[0] * out[1] * out[2] * k->shape[2];
  spec_shape(&c->spec[0], 4, out);
  spec_shape(&c->spec[1], 3, out);
  for (int i = 0; i < 3 && !status; i++) status = want_rows(c, i);
  hm_attr *rng = &c->attr[RNG];
  if (status || rng->n) return status;
  if (c->attr[DROPOUT].f > 0) hm_random_take(c->device, scores, rng);
  else *rng = (hm_attr){.n = 2}; /* nothing is drawn */
  return HM_OK;
}

static int check_saved(const hm_opcall *c, int i, int ndim, const int64_t *shape) {
  const hm_tensor *t = operand(c, i);
  char a[160], b[160];
  if (t->ndim == ndim && !memcmp(t->shape, shape, sizeof(int64_t) * (size_t)ndim)) return HM_OK;
  return hm_fail(HM_ERR_SHAPE, "%s: %s does not fit q: %s and %s", NAME(c), c->info->in[i].name, text_of(t, a),
                 text_of(operand(c, 1), b));
}

static int infer_backward(hm_opcall *c) {
  const hm_tensor *q = operand(c, 1), *k = operand(c, 2), *v = operand(c, 3);
  int status = check_ranks(c, 1);
  if (!status) status = check_shapes(c, 1);
  if (!status) status = check_mask(c, 4, q->shape, k->shape[2]);
  if (!status) status = complete(c, q->shape[3]);
  if (status) return status;
  const int64_t out[4] = {q->shape[0], q->shape[1], q->shape[2], v->shape[3]};
  status = check_saved(c, 0, 4, out);
  if (!status) status = check_saved(c, 5, 4, out);
  if (!status) status = check_saved(c, 6, 3, out);
  if (!status && !c->attr[RNG].n && c->attr[DROPOUT].f > 0)
    status = hm_fail(HM_ERR_ARG, "%s: rng must be that of the forward call where dropout is not 0", NAME(c));
  for (int i = 0; i < 6 && !status; i++)
    if (i != 4) status = want_rows(c, i);
  if (!status) status = hm__want_contiguous(c, 6);
  if (status) return status;
  if (!c->attr[RNG].n) c->attr[RNG] = (hm_attr){.n = 2};
  for (int i = 0; i < 3; i++) spec_shape(&c->spec[i], 4, operand(c, 1 + i)->shape);
  return HM_OK;
}

int hm__infer_attention(hm_opcall *c) { return c->op == HM_OP_ATTENTION ? infer_forward(c) : infer_backward(c); }
