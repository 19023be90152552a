/*
 * nll.c -- nll_loss and its gradients.
 *
 * Compiled once.  Called by loss.c, which the backend's table names for the family.
 *
 * A position is one target.  The loss picks one log probability at each, times its class's weight; the gradient writes one number at each into
 * zeros; the gradient of that picks again.  Sums are made in float64, position by position within a piece, piece by piece; pieces depend
 * on the number of positions only.
 */
#include <stdio.h>
#include <string.h>

#include "../half.h"
#include "isa.h"

enum { MEAN, SUM, NONE };
enum { MAX_PIECES = 256, LEAST_PIECE = 2048 };

typedef struct work {
  const char *name;
  const hm_view *target, *weight; /* weight: NULL for ones */
  const hm_view *x;               /* picked from; by_g: the gradient that came */
  const hm_view *dx;              /* backward: written to */
  const hm_view *g, *loss;        /* by position, or one number */
  int reduction;
  int64_t ignore, classes, positions;
  double divisor; /* of a mean, where it is known */
} work;

typedef struct sums {
  double loss, weight;
} sums;

/* Offset of position i, counted row-major, in a view of the targets' shape; skip: dim of the view that is left out. */
static int64_t offset_of(const work *w, const hm_view *v, int skip, int64_t i) {
  int64_t offset = 0;
  for (int d = w->target->ndim - 1; d >= 0; d--) {
    offset += i % w->target->shape[d] * v->stride[d >= skip ? d + 1 : d];
    i /= w->target->shape[d];
  }
  return offset;
}

static int64_t target_at(const work *w, int64_t i) {
  const int64_t at = offset_of(w, w->target, HM_MAX_NDIM, i);
  switch (w->target->dtype) {
  case HM_I64: return ((const int64_t *)w->target->data)[at];
  case HM_I32: return ((const int32_t *)w->target->data)[at];
  default: return ((const uint8_t *)w->target->data)[at];
  }
}

static double number_at(const hm_view *v, int64_t at) {
  switch (v->dtype) {
  case HM_F32: return (double)((const float *)v->data)[at];
  case HM_F64: return ((const double *)v->data)[at];
  case HM_F16: return (double)hm_f16_to_f32(((const uint16_t *)v->data)[at]);
  default: return (double)hm_bf16_to_f32(((const uint16_t *)v->data)[at]);
  }
}

static void put(const hm_view *v, int64_t at, double value) {
  switch (v->dtype) {
  case HM_F32: ((float *)v->data)[at] = (float)value; break;
  case HM_F64: ((double *)v->data)[at] = value; break;
  case HM_F16: ((uint16_t *)v->data)[at] = hm_f64_to_f16(value); break;
  default: ((uint16_t *)v->data)[at] = hm_f64_to_bf16(value); break;
  }
}

static double weight_of(const work *w, int64_t class) { return w->weight ? number_at(w->weight, class) : 1; }

/* ====== Pieces: fixed ranges of positions ====== */

/* Picks at positions [begin, end); returns the sums. */
static sums pick_piece(const work *w, int64_t begin, int64_t end) {
  sums s = {0, 0};
  for (int64_t i = begin; i < end; i++) {
    const int64_t t = target_at(w, i);
    double loss = 0;
    if (t != w->ignore) {
      const double weight = weight_of(w, t);
      loss = -number_at(w->x, offset_of(w, w->x, 1, i) + t * w->x->stride[1]) * weight;
      s.weight += weight;
    }
    if (w->reduction == NONE) put(w->loss, offset_of(w, w->loss, HM_MAX_NDIM, i), loss);
    s.loss += loss;
  }
  return s;
}

static void write_piece(const work *w, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t t = target_at(w, i);
    if (t == w->ignore) continue;
    const double g = number_at(w->g, w->reduction == NONE ? offset_of(w, w->g, HM_MAX_NDIM, i) : 0);
    put(w->dx, offset_of(w, w->dx, 1, i) + t * w->dx->stride[1], -g * weight_of(w, t) / w->divisor);
  }
}

static int64_t piece_size(const work *w) {
  const int64_t piece = (w->positions + MAX_PIECES - 1) / MAX_PIECES;
  return piece < LEAST_PIECE ? LEAST_PIECE : piece;
}

static sums pick_all(const work *w) {
  const int64_t piece = piece_size(w), pieces = (w->positions + piece - 1) / piece;
  const int threads = hm_cpu_threads(w->positions, 64);
  sums part[MAX_PIECES], all = {0, 0};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < pieces; p++)
    part[p] = pick_piece(w, p * piece, p * piece + piece < w->positions ? p * piece + piece : w->positions);
  for (int64_t p = 0; p < pieces; p++) {
    all.loss += part[p].loss;
    all.weight += part[p].weight;
  }
  return all;
}

static void write_all(const work *w) {
  const int64_t piece = piece_size(w), pieces = (w->positions + piece - 1) / piece;
  const int threads = hm_cpu_threads(w->positions, 64);
  memset(w->dx->data, 0, (size_t)(w->positions * w->classes * hm_dtype_size(w->dx->dtype)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t p = 0; p < pieces; p++)
    write_piece(w, p * piece, p * piece + piece < w->positions ? p * piece + piece : w->positions);
}

/* ====== Entry ====== */

const char *hm_cpu_position_text(const hm_view *v, int64_t i, char text[HM_POSITION_TEXT]) {
  const size_t size = HM_POSITION_TEXT;
  int64_t at[HM_MAX_NDIM] = {0};
  for (int d = v->ndim - 1; d >= 0; d--) {
    at[d] = i % v->shape[d];
    i /= v->shape[d];
  }
  size_t used = (size_t)snprintf(text, size, "[");
  for (int d = 0; d < v->ndim; d++)
    used += (size_t)snprintf(text + used, size - used, "%s%lld", d ? ", " : "", (long long)at[d]);
  snprintf(text + used, size - used, "]");
  return text;
}

static int check_targets(const work *w) {
  for (int64_t i = 0; i < w->positions; i++) {
    const int64_t t = target_at(w, i);
    if (t == w->ignore || (t >= 0 && t < w->classes)) continue;
    char at[HM_POSITION_TEXT];
    return hm_cpu_fail(HM_ERR_ARG,
                       "%s: target %lld at index %s (from 0) is not a class: there are C = %lld classes, 0 to %lld\n"
                       "  hint: class labels count from 0; ignore_index is %lld",
                       w->name, (long long)t, hm_cpu_position_text(w->target, i, at), (long long)w->classes,
                       (long long)w->classes - 1, (long long)w->ignore);
  }
  return HM_OK;
}

static void set_work(work *w, const hm_kernel_call *call) {
  const bool backward = call->op == HM_OP_NLL_LOSS_BACKWARD;
  const hm_attr *attr = &call->attr[backward ? 1 : 0];
  const hm_view *classes = backward ? &call->out[0] : &call->in[0];
  *w = (work){.name = backward                     ? "nll_loss_backward"
                      : call->op == HM_OP_NLL_LOSS ? "nll_loss"
                                                   : "nll_loss_backward_by_g",
              .target = &call->in[1],
              .weight = call->in[2].flags & HM_VIEW_ABSENT ? NULL : &call->in[2],
              .x = &call->in[0],
              .dx = &call->out[0],
              .g = &call->in[0],
              .loss = &call->out[0],
              .reduction = (int)attr[0].i,
              .ignore = attr[1].i,
              .classes = classes->shape[1],
              .positions = 1,
              .divisor = 1};
  for (int d = 0; d < w->target->ndim; d++) w->positions *= w->target->shape[d];
  if (call->op != HM_OP_NLL_LOSS && w->reduction == MEAN) w->divisor = number_at(&call->in[3], 0);
}

int hm_cpu_nll(const hm_kernel_call *call) {
  if (call->op != HM_OP_NLL_LOSS && call->op != HM_OP_NLL_LOSS_BACKWARD && call->op != HM_OP_NLL_LOSS_BACKWARD_BY_G)
    return hm_cpu_fail(HM_ERR_UNSUPPORTED, "the cpu backend has no loss with op id %d", call->op);
  work w;
  set_work(&w, call);
  const int status = check_targets(&w);
  if (status != HM_OK) return status;
  if (call->op == HM_OP_NLL_LOSS_BACKWARD) {
    write_all(&w);
    return HM_OK;
  }
  const sums s = pick_all(&w);
  if (call->op == HM_OP_NLL_LOSS) {
    w.divisor = s.weight;
    put(&call->out[1], 0, s.weight);
  }
  if (w.reduction != NONE) put(w.loss, 0, w.reduction == MEAN ? s.loss / w.divisor : s.loss);
  return HM_OK;
}
