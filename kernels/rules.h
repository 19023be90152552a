/*
 * rules.h -- the optimizers' update rules for one element, as C that CPU and GPU share: the same bits on both.
 *
 * Formulas and the order of operations are PyTorch's (torch/optim, the loops over single tensors): first moments move
 * by lerp, second moments by mul and addcmul, parameters by addcdiv; Adam's eps sits outside the corrected square root.
 * Lion is program 1 of Chen and others, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), with the
 * decay of the weights made as AdamW makes it.
 *
 * A rule takes the constants of its group, a gradient g, a parameter p and its states s; it writes the states and
 * returns the new parameter.  Constants are kept in double and rounded once to the type computed in.
 *
 * Also here: rounding by chance, with words of Philox (stream 0).  Header-only; owns nothing; included by
 * kernels/cpu/multi.c and kernels/cuda/multi.cu.
 */
#ifndef HM_RULES_H
#define HM_RULES_H

#include "kernels.h"
#include "math.h"
#include "philox.h"

/* The constants of one group for one update. */
typedef struct hm_rates {
  double step;              /* what the direction is multiplied by: the rate with its sign and corrections */
  double root2;             /* Adam: the root of the second moment's correction */
  double sign;              /* of the gradient: -1 to maximize */
  double carry, keep, rest; /* SGD: shares of the buffer and of the gradient in the next one; of the gradient, later */
  double weight_decay, shrink, momentum, beta1, rest1, beta2, rest2, mean, eps;
  double lr, lr_decay;
  int64_t made; /* updates before this one that the host knows of */
  bool decay;   /* weight decay goes into the gradient */
  bool nesterov, pushes, first;
} hm_rates;

HM_FN hm_rates hm_rates_of(const hm_multi_group *h) {
  hm_rates r;
  r.step = -(h->lr / h->bias_correction1);
  r.root2 = sqrt(h->bias_correction2);
  r.sign = h->maximize ? -1 : 1;
  r.weight_decay = h->weight_decay, r.shrink = h->decoupled ? 1 - h->lr * h->weight_decay : 1;
  r.momentum = h->momentum, r.rest = 1 - h->dampening;
  r.carry = h->first ? 0 : r.momentum, r.keep = h->first ? 1 : r.rest; /* a buffer of zeros becomes the gradient */
  r.beta1 = h->beta1, r.rest1 = 1 - h->beta1, r.beta2 = h->beta2, r.rest2 = 1 - h->beta2;
  r.mean = h->centered ? r.rest2 : 0;
  r.eps = h->eps, r.lr = h->lr, r.lr_decay = h->lr_decay;
  r.made = h->step;
  r.decay = h->weight_decay != 0 && !h->decoupled;
  r.nesterov = h->nesterov, r.pushes = h->momentum != 0;
  r.first = h->first;
  return r;
}

/* What only a device knows: `done` updates more were made there than the host has counted. */
HM_FN void hm_rates_late(hm_rates *r, hm_multi_op op, int64_t done) {
  const double n = (double)(r->made + done + 1);
  if (r->first && done > 0) r->carry = r->momentum, r->keep = r->rest;
  if (op == HM_MULTI_ADAM) {
    r->root2 = sqrt(1 - pow(r->beta2, n));
    r->step = -(r->lr / (1 - pow(r->beta1, n)));
  } else if (op == HM_MULTI_ADAGRAD) {
    r->step = -(r->lr / (1 + (n - 1) * r->lr_decay));
  }
}

/* hm_<rule>_<S>: decayed is g + wd p; toward is lerp(a, b, weight). */
#define HM_DEFINE_RULES(T, S)                                                                                          \
  HM_FN T hm_decayed_##S(const hm_rates *r, T g, T p) {                                                                \
    const T d = (T)r->sign * g;                                                                                        \
    return r->decay ? d + (T)r->weight_decay * p : d;                                                                  \
  }                                                                                                                    \
  HM_FN T hm_toward_##S(T a, T b, double weight) {                                                                     \
    const T w = (T)weight;                                                                                             \
    return weight < 0.5 ? a + w * (b - a) : b - (b - a) * ((T)1 - w);                                                  \
  }                                                                                                                    \
  /* s: the momentum buffer, where there is one */                                                                     \
  HM_FN T hm_sgd_##S(const hm_rates *r, bool buffer, T g, T p, T *s) {                                                 \
    const T d = hm_decayed_##S(r, g, p), momentum = (T)r->momentum;                                                    \
    if (!buffer) return p + (T)r->step * d;                                                                            \
    const T b = s[0] * (T)r->carry + (T)r->keep * d;                                                                   \
    s[0] = b;                                                                                                          \
    return p + (T)r->step * (r->nesterov ? d + momentum * b : b);                                                      \
  }                                                                                                                    \
  /* s: both moments, and the largest second one */                                                                    \
  HM_FN T hm_adam_##S(const hm_rates *r, bool amsgrad, T g, T p, T *s) {                                               \
    const T w = p * (T)r->shrink;                                                                                      \
    const T d = hm_decayed_##S(r, g, w);                                                                               \
    const T m = hm_toward_##S(s[0], d, r->rest1), v = s[1] * (T)r->beta2 + (T)r->rest2 * d * d;                        \
    T most = v;                                                                                                        \
    s[0] = m;                                                                                                          \
    s[1] = v;                                                                                                          \
    if (amsgrad) s[2] = most = (v > s[2]) | (v != v) ? v : s[2];                                                       \
    return w + (T)r->step * m / (hm_sqrt_##S(most) / (T)r->root2 + (T)r->eps);                                         \
  }                                                                                                                    \
  /* s: the mean square, the mean, the momentum buffer */                                                              \
  HM_FN T hm_rmsprop_##S(const hm_rates *r, bool more, T g, T p, T *s) {                                               \
    const T d = hm_decayed_##S(r, g, p), v = s[0] * (T)r->beta2 + (T)r->rest2 * d * d;                                 \
    T spread = v;                                                                                                      \
    s[0] = v;                                                                                                          \
    if (more) {                                                                                                        \
      s[1] = hm_toward_##S(s[1], d, r->mean); /* stays 0 where not centered */                                         \
      spread = v - s[1] * s[1];                                                                                        \
    }                                                                                                                  \
    const T root = hm_sqrt_##S(spread) + (T)r->eps;                                                                    \
    if (!more || !r->pushes) return p + (T)r->step * d / root;                                                         \
    s[2] = s[2] * (T)r->momentum + d / root;                                                                           \
    return p + (T)r->step * s[2];                                                                                      \
  }                                                                                                                    \
  /* s: the sum of squares */                                                                                          \
  HM_FN T hm_adagrad_##S(const hm_rates *r, bool more, T g, T p, T *s) {                                               \
    const T d = hm_decayed_##S(r, g, p), sum = s[0] + d * d;                                                           \
    (void)more;                                                                                                        \
    s[0] = sum;                                                                                                        \
    return p + (T)r->step * d / (hm_sqrt_##S(sum) + (T)r->eps);                                                        \
  }                                                                                                                    \
  /* s: the mean of the gradient */                                                                                    \
  HM_FN T hm_lion_##S(const hm_rates *r, bool more, T g, T p, T *s) {                                                  \
    const T w = p * (T)r->shrink, d = (T)r->sign * g, m = s[0];                                                        \
    const T u = m * (T)r->beta1 + (T)r->rest1 * d, sign = u != u ? u : (T)((u > 0) - (u < 0));                         \
    (void)more;                                                                                                        \
    s[0] = m * (T)r->beta2 + (T)r->rest2 * d;                                                                          \
    return w + (T)r->step * sign;                                                                                      \
  }

HM_DEFINE_RULES(float, f32)
HM_DEFINE_RULES(double, f64)

/* ====== Rounding by chance ====== */

/* A neighbour of x in bfloat16 or float16: the upper one as likely as x is near it.  Infinity and NaN stay. */
HM_FN float hm_round_by_chance(float x, int dtype, uint32_t word) {
  const uint32_t bits = hm_f32_bits(x), magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return x;
  if (dtype == HM_BF16) return hm_bits_f32((bits + (word >> 16)) & 0xffff0000u);
  if (magnitude >= 0x38800000u) return hm_bits_f32((bits + (word >> 19)) & 0xffffe000u);
  /* below 2^-14 float16 has steps of 2^-24 */
  const uint32_t steps = ((uint32_t)(int32_t)(hm_bits_f32(magnitude) * 1.37438953e11f) + (word >> 19)) >> 13; /* 2^37 */
  return hm_bits_f32((bits & 0x80000000u) | hm_f32_bits((float)(int32_t)steps * 5.9604645e-8f));
}

/* What a stored value lost of x, for the next update to make up for; nothing where either is not finite. */
HM_FN float hm_lost(float x, float stored) {
  const float lost = x - stored;
  return lost - lost == 0 ? lost : 0;
}

#endif
