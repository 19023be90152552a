/*
 * fp8.c -- amp.autocast("fp8"): products of operands that are rounded to 8 bits, with delayed scaling per tensor.
 * An emulation.
 *
 * Inside such a region the factors of matrix products, convolutions and attention are rounded to e4m3 (kernels/half.h)
 * and computed with in float32; the gradient that arrives at a product is rounded to e5m2.  So results and gradients are
 * those of 8-bit tensor cores that add in float32, but nothing is faster or smaller.  Biases, which are added, not
 * multiplied, stay as they are; so does float64.
 *
 * Delayed scaling: a tensor is rounded with a scale that was found in earlier steps.  A recipe has a site for each
 * product and in it a slot for each factor and one for the gradient.  A slot notes the largest magnitude of the step;
 * when the next step begins (hm_fp8_begin) that goes into its history, and the new scale is the format's largest number
 * by the history's largest (or newest), divided by 2^margin.
 *
 * A site is known by its weight, the second operand where it is a leaf that wants a gradient, and else by the product's
 * place among those without such a weight in the outermost region (hm_mode.fp8_position).
 *
 * Ownership: the binding, open regions and regions of checkpoints hold a recipe; a recipe holds its sites and their
 * weights; the nodes of a graph hold their site, which may have left the recipe by then.  A weight that nobody else
 * holds is let go when the next step begins.  Mutator thread only.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "fp8.h"
#include "graph.h"

struct hm_fp8_recipe {
  _Atomic int32_t refs;
  hm_fp8_options options;
  hm_fp8_site **site; /* in the order in which they first came by */
  int n, max;
  int next;               /* where the search begins: steps repeat the order */
  hm_fp8_site **expected; /* loaded sites that have not come by yet */
  int n_expected, max_expected;
};

/* ====== Life ====== */

/* Names and formats of a site's slots: the factors, then the gradient. */
static void name_slots(const hm_fp8_options *o, hm_fp8_site *s) {
  const hm_op_info *info = hm_op_get(s->op);
  for (int k = 0; k < s->n_slots - 1; k++) s->slot[k].name = info->in[k].name;
  s->slot[s->n_slots - 1].name = "gradient";
  s->slot[s->n_slots - 1].e5m2 = o->hybrid;
}

static hm_fp8_site *site_new(const hm_fp8_recipe *r, int op, int n_slots) {
  const size_t length = (size_t)r->options.history;
  hm_fp8_site *s = hm_calloc(sizeof *s + sizeof(float) * length * (size_t)n_slots);
  if (!s) return NULL;
  float *history = (float *)(s + 1);
  s->refs = 1;
  s->op = op;
  s->n_slots = n_slots;
  for (int k = 0; k < n_slots; k++) {
    s->slot[k].scale = 1;
    s->slot[k].history = history + length * (size_t)k;
  }
  name_slots(&r->options, s);
  return s;
}

void hm__fp8_site_release(hm_fp8_site *s) {
  if (!s || --s->refs) return;
  hm_tensor_release(s->weight);
  hm_free(s);
}

static void drop_list(hm_fp8_site **list, int n) {
  for (int i = 0; i < n; i++) hm__fp8_site_release(list[i]);
}

/* Appends s, which is taken over, also when this fails. */
static int append(hm_fp8_site ***list, int *n, int *max, hm_fp8_site *s) {
  if (*n == *max) {
    const int more = *max ? 2 * *max : 16;
    hm_fp8_site **grown = hm_realloc(*list, sizeof **list * (size_t)more);
    if (!grown) {
      hm__fp8_site_release(s);
      return HM_ERR_MEMORY;
    }
    *list = grown;
    *max = more;
  }
  (*list)[(*n)++] = s;
  return HM_OK;
}

int hm_fp8_recipe_new(const hm_fp8_options *options, hm_fp8_recipe **out) {
  *out = NULL;
  if (options->history < 1 || options->history > HM_FP8_MAX_HISTORY)
    return hm_fail(HM_ERR_ARG, "DelayedScaling: amax_history_len must be 1 to %d, got %d", HM_FP8_MAX_HISTORY,
                   options->history);
  if (options->margin < -64 || options->margin > 64)
    return hm_fail(HM_ERR_ARG, "DelayedScaling: margin must be -64 to 64, got %d", options->margin);
  hm_fp8_recipe *r = hm_calloc(sizeof *r);
  if (!r) return HM_ERR_MEMORY;
  atomic_init(&r->refs, 1);
  r->options = *options;
  *out = r;
  return HM_OK;
}

hm_fp8_recipe *hm_fp8_recipe_retain(hm_fp8_recipe *r) {
  if (r) atomic_fetch_add_explicit(&r->refs, 1, memory_order_relaxed);
  return r;
}

void hm_fp8_recipe_release(hm_fp8_recipe *r) {
  if (!r || atomic_fetch_sub_explicit(&r->refs, 1, memory_order_acq_rel) != 1) return;
  drop_list(r->site, r->n);
  drop_list(r->expected, r->n_expected);
  hm_free(r->site);
  hm_free(r->expected);
  hm_free(r);
}

const hm_fp8_options *hm_fp8_recipe_options(const hm_fp8_recipe *r) { return &r->options; }

int hm_fp8_site_count(const hm_fp8_recipe *r) { return r->n + r->n_expected; }

const hm_fp8_site *hm_fp8_site_get(const hm_fp8_recipe *r, int index) {
  return index < r->n ? r->site[index] : r->expected[index - r->n];
}

/* ====== A step begins ====== */

/* The new scale of a slot whose history has just grown; what is zero or not finite leaves the scale. */
static void rescale(const hm_fp8_options *o, hm_fp8_slot *s) {
  float amax = s->history[0];
  for (int i = 1; i < s->n && !o->most_recent; i++) amax = s->history[i] > amax ? s->history[i] : amax;
  if (!(amax > 0) || amax == INFINITY) return;
  const float most = s->e5m2 ? 57344.0f : 448.0f;
  const float scale = (float)((double)(most / amax) / ldexp(1, o->margin));
  s->scale = scale > 3.4028234664e38f ? 3.4028234664e38f : scale > 0 ? scale : s->scale;
}

static void roll(const hm_fp8_options *o, hm_fp8_slot *s) {
  if (!s->recorded) return;
  s->recorded = false;
  if (!(s->amax > 0) || s->amax == INFINITY)
    return; /* an overflow would hold the scale for as long as the history remembers */
  if (s->n < o->history) s->n++;
  memmove(s->history + 1, s->history, sizeof(float) * (size_t)(s->n - 1));
  s->history[0] = s->amax;
  rescale(o, s);
}

/* Has the weight of site i gone, but for the holds of the recipe's sites (one for each op that it is used in)?  Sites from `kept` up to i are
 * no longer the recipe's. */
static bool is_orphan(const hm_fp8_recipe *r, int i, int kept) {
  const hm_tensor *weight = r->site[i]->weight;
  if (!weight) return false;
  int others = atomic_load_explicit(&weight->refs, memory_order_acquire);
  for (int k = 0; k < r->n && others > 0; k++) others -= (k < kept || k >= i) && r->site[k]->weight == weight;
  return others <= 0;
}

void hm_fp8_begin(hm_fp8_recipe *r) {
  int kept = 0;
  for (int i = 0; i < r->n; i++) {
    hm_fp8_site *s = r->site[i];
    if (is_orphan(r, i, kept)) {
      hm__fp8_site_release(s);
      continue;
    }
    for (int k = 0; k < s->n_slots; k++) roll(&r->options, &s->slot[k]);
    r->site[kept++] = s;
  }
  r->n = kept;
  r->next = 0;
  for (int i = 0; i < r->n_expected; i++)
    for (int k = 0; k < r->expected[i]->n_slots; k++) roll(&r->options, &r->expected[i]->slot[k]);
}

/* ====== Checkpoints ====== */

void hm_fp8_forget(hm_fp8_recipe *r) {
  drop_list(r->site, r->n);
  drop_list(r->expected, r->n_expected);
  r->n = r->n_expected = r->next = 0;
}

int hm_fp8_expect(hm_fp8_recipe *r, const hm_fp8_site *like) {
  hm_fp8_site *s = site_new(r, like->op, like->n_slots);
  if (!s) return HM_ERR_MEMORY;
  s->weighted = like->weighted;
  s->position = like->position;
  for (int k = 0; k < s->n_slots; k++) {
    hm_fp8_slot *to = &s->slot[k];
    const hm_fp8_slot *from = &like->slot[k];
    to->scale = from->scale;
    to->amax = from->amax;
    to->recorded = from->recorded;
    to->n = from->n < r->options.history ? from->n : r->options.history;
    if (to->n) memcpy(to->history, from->history, sizeof(float) * (size_t)to->n);
  }
  return append(&r->expected, &r->n_expected, &r->max_expected, s);
}

/* ====== Sites ====== */

/* Is operand i a factor: rounded, and with a slot? */
static bool is_factor(const hm_op_info *info, int i) { return info->in[i].cls == 'L' && !info->in[i].optional; }

/* Are the factors float32?  Integers stay what they are: the call will be refused, and makes no site. */
static bool has_factors(const hm_opcall *c) {
  for (int i = 0; i < c->info->n_in; i++)
    if (is_factor(c->info, i) && c->in[i].t->dtype != HM_F32) return false;
  return true;
}

/* The weight that a product is known by, or NULL. */
static hm_tensor *weight_of(const hm_opcall *c) {
  if (c->info->family == HM_FAMILY_ATTENTION) return NULL;
  hm_tensor *t = c->src[1].t;
  return t->requires_grad && !t->node ? t : NULL;
}

static bool is_site_of(const hm_fp8_site *s, const hm_opcall *c, const hm_tensor *weight, int32_t position) {
  return s->op == c->op && s->weight == weight && (weight || s->position == position);
}

/* A loaded site for a product that comes by for the first time, taken out of the list; else a blank one.  NULL: out of
 * memory. */
static hm_fp8_site *expected_site(hm_fp8_recipe *r, const hm_opcall *c, bool weighted, int32_t position, int n_slots) {
  for (int i = 0; i < r->n_expected; i++) {
    hm_fp8_site *s = r->expected[i];
    if (s->op != c->op || s->weighted != weighted || s->n_slots != n_slots) continue;
    if (!weighted && s->position != position) continue;
    r->n_expected--;
    memmove(&r->expected[i], &r->expected[i + 1], sizeof s * (size_t)(r->n_expected - i));
    return s;
  }
  return site_new(r, c->op, n_slots);
}

static int add_site(hm_fp8_recipe *r, const hm_opcall *c, hm_tensor *weight, int32_t position, hm_fp8_site **out) {
  int n_slots = 1;
  for (int i = 0; i < c->info->n_in; i++) n_slots += is_factor(c->info, i);
  hm_fp8_site *s = expected_site(r, c, weight != NULL, position, n_slots);
  if (!s) return HM_ERR_MEMORY;
  s->weight = hm_tensor_retain(weight);
  s->weighted = weight != NULL;
  s->position = position;
  *out = s;
  return append(&r->site, &r->n, &r->max, s);
}

/* The site of a product, found or made; borrowed. */
static int find_site(hm_fp8_recipe *r, const hm_opcall *c, hm_mode *mode, hm_fp8_site **out) {
  hm_tensor *weight = weight_of(c);
  const int32_t position = weight ? -1 : mode->fp8_position++;
  for (int k = 0; k < r->n; k++) {
    const int i = (r->next + k) % r->n;
    if (!is_site_of(r->site[i], c, weight, position)) continue;
    r->next = i + 1;
    *out = r->site[i];
    return HM_OK;
  }
  return add_site(r, c, weight, position, out);
}

/* ====== Rounding ====== */

/* The largest of n magnitudes as bits, which order as the magnitudes do, NaN last. */
static int32_t largest(const float *x, int64_t n, int64_t stride) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i * stride, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

/* The largest magnitude of a float32 tensor on the CPU; NaN if it holds one. */
static float amax_of(const hm_tensor *t) {
  const float *const x = hm_tensor_data(t);
  int32_t most = 0;
  const int last = t->ndim - 1;
  if (t->numel == 0) return 0;
  if (hm_is_contiguous(t) || hm_is_channels_last(t)) {
    most = largest(x, t->numel, 1);
  } else {
    const int64_t cols = t->shape[last];
    for (int64_t row = 0; row < t->numel / cols; row++) {
      int64_t rest = row, at = 0;
      for (int d = last - 1; d >= 0; d--) {
        at += rest % t->shape[d] * t->stride[d];
        rest /= t->shape[d];
      }
      const int32_t here = largest(x + at, cols, t->stride[last]);
      most = here > most ? here : most;
    }
  }
  float amax;
  memcpy(&amax, &most, sizeof amax);
  return amax;
}

/* Joins a magnitude to those of the step; what is not finite stays. */
static void record(hm_fp8_slot *s, float amax) {
  if (!s->recorded || !(amax <= s->amax)) s->amax = s->recorded && s->amax != s->amax ? s->amax : amax;
  s->recorded = true;
}

static int round_by(hm_fp8_slot *s, hm_tensor *t, bool watch, hm_tensor **out) {
  if (watch) record(s, amax_of(t));
  return hm_op_fp8_round(hm_t(t), (double)s->scale, s->e5m2, out);
}

int hm__fp8_operands(hm_opcall *c) {
  const int family = c->info->family;
  if (family != HM_FAMILY_MATMUL && family != HM_FAMILY_CONV && family != HM_FAMILY_ATTENTION) return HM_OK;
  char text[160];
  if (c->device != HM_CPU)
    return hm_fail(HM_ERR_UNSUPPORTED,
                   "%s: amp.autocast(\"fp8\") is an emulation on the cpu, and %s is %s\n"
                   "  hint: on a GPU use amp.autocast(\"bf16\") or \"f16\"",
                   c->info->name, c->info->in[0].name, hm_describe(c->in[0].t, text, sizeof text));
  if (!has_factors(c)) return HM_OK;
  hm_mode *mode = hm_mode_current();
  if (!mode->fp8)
    return hm_fail(HM_ERR_STATE, "%s: the mode asks for 8-bit products, but has no recipe", c->info->name);
  int status = find_site(mode->fp8, c, mode, &c->fp8);
  if (status) {
    c->fp8 = NULL;
    return status;
  }
  c->fp8->refs++;
  const bool watch = c->grad && !hm_region_recomputing();
  int k = 0;
  for (int i = 0; i < c->info->n_in && !status; i++) {
    if (!is_factor(c->info, i)) continue;
    hm_tensor *rounded;
    status = round_by(&c->fp8->slot[k++], c->in[i].t, watch, &rounded);
    if (!status) hm__replace_operand(c, i, rounded);
  }
  return status;
}

/* ====== The gradient ====== */

static int gradient_backward(void *ud, int n_out, hm_tensor *const *grad, int n_in, hm_tensor **grad_in) {
  hm_fp8_site *s = ud;
  hm_tensor *g;
  (void)n_out, (void)n_in;
  if (!grad[0]) return HM_OK;
  int status =
      hm_to(grad[0], HM_F32, -1, false, &g); /* a result in a dtype that was asked for has its gradient in it */
  if (status) return status;
  status = round_by(&s->slot[s->n_slots - 1], g, true, &grad_in[0]);
  hm_tensor_release(g);
  return status;
}

static void gradient_drop(void *ud) { hm__fp8_site_release(ud); }

int hm__fp8_gradient(hm_opcall *c) {
  hm_tensor *out;
  int status = hm_alias(c->out[0], &out);
  if (status) return status;
  c->fp8->refs++;
  status = hm_record_custom("fp8_gradient", &c->out[0], 1, &out, 1, gradient_backward, c->fp8, gradient_drop);
  if (status) {
    hm_tensor_release(out);
    return status;
  }
  hm_tensor_release(c->out[0]);
  c->out[0] = out;
  return HM_OK;
}
