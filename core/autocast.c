/*
 * autocast.c -- which dtype an op computes in.
 *
 * Promotion (as PyTorch has it: category first, then width; 0-dim tensors and numbers do not promote dimensioned tensors of their category),
 * and autocast: inside an enabled region the row's class letters decide (kernels/ops.def).
 *   L  operands are cast to the region's dtype.  Weights (leaves that want a gradient) through a shadow of their storage, so that each
 *      version is cast once; gradients flow to the float32 original by the edge's dtype, there is no cast node to go stale.
 *   F  the kernel reads low operands as they are and writes float32: no upcast copy is made or saved.
 *   P  the widest of the operands, which is natural promotion.     T  nothing changes.
 * In a region of "fp8" the factors of products are rounded to 8 bits and computed with in float32 (fp8.c); nothing else is cast.
 * float64, integers, in-place forms and everything the backward walk runs are left alone.
 */
#include "fp8.h"
#include "graph.h"

static hm_cast_stats stats;

void hm_cast_get_stats(hm_cast_stats *out) {
  *out = stats;
  out->bytes = hm__shadow_total_bytes();
}

/* ====== Promotion ====== */

int hm_promote(int a, int b) {
  if (a == b || b == HM_NONE) return a;
  if (a == HM_NONE) return b;
  const hm_kind ka = hm_dtype_kind(a), kb = hm_dtype_kind(b);
  if (ka != kb) return ka > kb ? a : b;
  if ((a == HM_F16 && b == HM_BF16) || (a == HM_BF16 && b == HM_F16)) return HM_F32;
  return a > b ? a : b;
}

/* Joins the dtype of one rank of operands (dimensioned, 0-dim, numbers) to what higher ranks have decided. */
static int join_rank(int decided, int other) {
  if (decided == HM_NONE) return other;
  if (other == HM_NONE || hm_dtype_kind(other) <= hm_dtype_kind(decided)) return decided;
  return other;
}

static bool is_class(char cls) { return cls == 'L' || cls == 'F' || cls == 'P' || cls == 'T'; }

/* dtype of the class operands together; rows without any take their first tensor's. */
static int promoted(const hm_opcall *c) {
  int dim = HM_NONE, zero = HM_NONE, number = HM_NONE, first = HM_NONE;
  for (int i = 0; i < c->info->n_in; i++) {
    const hm_arg *a = &c->in[i];
    if (a->kind == HM_ARG_TENSOR && first == HM_NONE) first = a->t->dtype;
    if (!is_class(c->info->in[i].cls)) continue;
    if (a->kind == HM_ARG_TENSOR) {
      if (a->t->ndim > 0) dim = hm_promote(dim, a->t->dtype);
      else zero = hm_promote(zero, a->t->dtype);
    } else if (a->kind == HM_ARG_FLOAT) number = HM_F32;
    else if (a->kind == HM_ARG_INT && number == HM_NONE) number = HM_I64;
  }
  const int tensors = join_rank(dim, zero);
  if (tensors == HM_NONE) return first;
  return join_rank(tensors, number);
}

/* ====== Casting operands ====== */

/* True if t's low copy may live as a shadow: a weight that fills its storage in row-major order; or a plain alias of one (detached, kept by a
 * custom function) while the weight's shadow is there. */
static bool is_weight(const hm_tensor *t, int low) {
  return !t->node && t->dtype == HM_F32 && t->offset == 0 && hm_is_contiguous(t) &&
         (size_t)t->numel * sizeof(float) == t->storage->bytes &&
         (t->requires_grad || hm__shadow_get(t->storage, HM_SHADOW_DTYPE(low)));
}

static int cast_weight(hm_tensor *t, int low, hm_tensor **out) {
  hm_storage *shadow = hm__shadow_get(t->storage, HM_SHADOW_DTYPE(low));
  if (shadow) {
    stats.hits++;
    return hm__tensor_on(shadow, low, t->ndim, t->shape, t->stride, 0, out);
  }
  stats.misses++;
  int status =
      hm__shadow_make(t->storage, HM_SHADOW_DTYPE(low), (size_t)t->numel * (size_t)hm_dtype_size(low), &shadow);
  if (status) return status;
  hm_tensor *copy = NULL, *same = NULL;
  status = hm__tensor_on(shadow, low, t->ndim, t->shape, t->stride, 0, &copy);
  if (!status) status = hm_op_copy_(hm_t(copy), hm_t(t), &same);
  hm_tensor_release(same);
  if (!status) *out = copy;
  else { /* the shadow holds no values */ hm_tensor_release(copy);
    hm__shadow_drop_all(t->storage);
  }
  return status;
}

static int cast_operand(hm_opcall *c, int i, int low, bool cache) {
  hm_tensor *t = c->in[i].t, *copy;
  if (!hm_dtype_is_float(t->dtype) || t->dtype == HM_F64 || t->dtype == low) return HM_OK;
  int status;
  if (cache && is_weight(t, low)) {
    status = cast_weight(t, low, &copy);
  } else {
    stats.casts++;
    status = hm_call(HM_OP_CAST, (const hm_arg[]){hm_t(t)}, (const hm_attr[]){{.i = low}, {.i = 0}}, &copy);
  }
  if (status) return status;
  if (c->owned & 1u << i) hm_tensor_release(t);
  c->in[i].t = copy;
  c->owned |= 1u << i;
  return HM_OK;
}

/* ====== The decision ====== */

static char op_class(const hm_opcall *c, const hm_mode *mode, char cls) {
  return mode->cls && mode->cls[c->op] && is_class(cls) ? mode->cls[c->op] : cls;
}

static bool has_f64(const hm_opcall *c) {
  for (int i = 0; i < c->info->n_in; i++)
    if (c->in[i].kind == HM_ARG_TENSOR && is_class(c->info->in[i].cls) && c->in[i].t->dtype == HM_F64) return true;
  return false;
}

/* Are sums or products along dims asked for in a floating dtype?  Then they are made in it, of integers, too. */
static bool wants_float(const hm_opcall *c) {
  const bool family = c->info->family == HM_FAMILY_REDUCE || c->info->family == HM_FAMILY_SCAN;
  return family && c->out_dtype != HM_NONE && hm_dtype_is_float(c->out_dtype) &&
         (c->info->ints != HM_INTS_KEEP || c->info->in[0].cls == 'F');
}

/* Integer operands of an op that does not compute in integers. */
static int settle_integers(hm_opcall *c) {
  if (!hm_dtype_is_float(c->dtype) && wants_float(c)) c->dtype = HM_F32;
  if (hm_dtype_is_float(c->dtype) || c->info->ints == HM_INTS_KEEP) return HM_OK;
  if (c->info->ints == HM_INTS_NO) {
    char text[160];
    const hm_tensor *t = NULL;
    for (int i = 0; i < c->info->n_in && !t; i++)
      if (c->in[i].kind == HM_ARG_TENSOR && is_class(c->info->in[i].cls)) t = c->in[i].t;
    return hm_fail(HM_ERR_DTYPE, "%s: needs a floating dtype, came %s\n  hint: convert with :to(\"f32\")",
                   c->info->name, t ? hm_describe(t, text, sizeof text) : hm_dtype_name(c->dtype));
  }
  c->dtype = HM_F32;
  return HM_OK;
}

/* An op of the engine's own that runs for a backward function, not for a hook or a function in Lua. */
static bool runs_for_backward(void) {
  const hm_node *n = hm__running_node();
  return n && n->op >= 0;
}

/* Operands of matrix products and convolutions must agree: nothing promotes them outside autocast.  Only where an op of autocast is
 * differentiated twice, or a result in a wider dtype was asked for, wider gradients meet operands: these are widened. */
static int check_agreement(hm_opcall *c) {
  if (c->info->family != HM_FAMILY_MATMUL && c->info->family != HM_FAMILY_CONV) return HM_OK;
  for (int i = 0; i < c->info->n_in; i++) {
    const hm_in_info *in = &c->info->in[i];
    if (c->in[i].kind != HM_ARG_TENSOR || in->optional || in->cls != 'L' || c->in[i].t->dtype == c->dtype) continue;
    if (runs_for_backward() && (c->dtype == HM_F32 || c->dtype == HM_F64)) {
      const int status = cast_operand(c, i, c->dtype, false);
      if (status) return status;
      continue;
    }
    char a[160], b[160];
    return hm_fail(
        HM_ERR_DTYPE,
        "%s: dtypes differ: %s is %s, %s is %s\n  hint: convert one with :to(\"%s\"), or run inside amp.autocast",
        c->info->name, c->info->in[0].name, hm_describe(c->in[0].t, a, sizeof a), c->info->in[1].name,
        hm_describe(c->in[1].t, b, sizeof b), hm_dtype_short(c->dtype));
  }
  return HM_OK;
}

/* Low-class ops that the region's overrides make float32 or promote: their kernels read operands of one dtype only, so these are cast. */
static int cast_overridden(hm_opcall *c, const hm_mode *mode) {
  const char cls = mode->cls ? mode->cls[c->op] : 0;
  if (cls != 'F' && cls != 'P') return HM_OK;
  for (int i = 0; i < c->info->n_in; i++) {
    if (c->info->in[i].cls != 'L' || c->in[i].kind != HM_ARG_TENSOR) continue;
    const int status = cast_operand(c, i, c->dtype, false);
    if (status) return status;
  }
  return HM_OK;
}

int hm__autocast(hm_opcall *c) {
  const hm_mode *mode = hm_mode_current();
  const bool on = mode->autocast && !c->inplace && c->info->family < HM_FAMILY_COUNT && !has_f64(c);
  const bool fp8 = on && hm__fp8_on(mode);
  bool widen = false, low = false;
  for (int i = 0; on && i < c->info->n_in; i++) {
    if (c->in[i].kind != HM_ARG_TENSOR) continue;
    const char cls = op_class(c, mode, c->info->in[i].cls);
    if (cls == 'L' && fp8) {
      const int status = cast_operand(c, i, HM_F32, false);
      if (status) return status;
      low = true;
    } else if (cls == 'L') {
      int status = c->device == HM_CPU ? HM_OK : hm_device_check_low(c->device, mode->low);
      if (!status) status = cast_operand(c, i, mode->low, mode->cache);
      if (status) return status;
    }
    widen = widen || cls == 'F';
  }
  if (low) {
    const int status = hm__fp8_operands(c);
    if (status) return status;
  }
  c->dtype = promoted(c);
  if (widen && hm_dtype_is_float(c->dtype)) c->dtype = HM_F32;
  int status = on && hm_dtype_is_float(c->dtype) ? cast_overridden(c, mode) : HM_OK;
  if (!status) status = settle_integers(c);
  if (!status) status = check_agreement(c);
  if (status) return status;
  if (c->dtype == HM_F64 || c->out_dtype == HM_F64) c->compute = HM_F64;
  else c->compute = hm_dtype_is_float(c->dtype) ? HM_F32 : HM_I64;
  return HM_OK;
}
