/*
 * math.h -- the mathematical functions of the op table, as C that the CPU, the GPU and the emulation share.
 *
 * Header-only; owns nothing; anything in kernels/ may include it.  Formulas in ops.def call these functions and no others.
 *
 * The float32 functions are our own.  Each is within 2 units in the last place over the whole range and right for NaN, infinities, zeros
 * and subnormals.  They contain no branch and no call, so that a loop around them vectorises, and no step that a compiler could contract or
 * reorder: built without contraction and without fast-math they give the same bits with any instruction set and on the GPU.  A function takes
 * double arithmetic inside where float32 would not carry it (sin, cos, pow, the rarer ones).  Coefficients are minimax fits or series.
 *
 * The float64 functions go to the C library: they serve gradient checks.
 */
#ifndef HM_MATH_H
#define HM_MATH_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* What stands before each function: compiled for host and device by nvcc, always inlined elsewhere. */
#ifndef HM_FN
#ifdef __CUDACC__
#define HM_FN static inline __host__ __device__
#else
#define HM_FN static inline __attribute__((always_inline, unused))
#endif
#endif

/* ====== Bits ====== */

HM_FN uint32_t hm_f32_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

HM_FN float hm_bits_f32(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

HM_FN uint64_t hm_f64_bits(double x) {
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

HM_FN double hm_bits_f64(uint64_t u) {
  double x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/* |x|, also of NaN. */
HM_FN float hm_abs_f32(float x) { return hm_bits_f32(hm_f32_bits(x) & 0x7fffffffu); }

/* c ? x : y, as masks.  A compiler turns several ?: on one condition back into a branch, and then a loop does not vectorise. */
HM_FN float hm__pick_f32(bool c, float x, float y) {
  const uint32_t m = 0 - (uint32_t)c;
  return hm_bits_f32((hm_f32_bits(x) & m) | (hm_f32_bits(y) & ~m));
}

HM_FN double hm__pick_f64(bool c, double x, double y) {
  const uint64_t m = 0 - (uint64_t)c;
  return hm_bits_f64((hm_f64_bits(x) & m) | (hm_f64_bits(y) & ~m));
}

/* Magnitude of x >= 0 with the sign of s. */
HM_FN float hm__with_sign_f32(float x, float s) { return hm_bits_f32(hm_f32_bits(x) | (hm_f32_bits(s) & 0x80000000u)); }

/* y * 2^k for k in [-300, 300], rounded once: the first product is exact unless the whole overflows. */
HM_FN float hm__scale_f32(float y, int32_t k) {
  const int32_t half = k >> 1;
  const float a = hm_bits_f32((uint32_t)(half + 127) << 23);
  const float b = hm_bits_f32((uint32_t)(k - half + 127) << 23);
  return y * a * b;
}

/* ====== Roots, rounding ====== */

/* Correctly rounded. */
HM_FN float hm_sqrt_f32(float x) { return sqrtf(x); }

/* Largest integer not above x; keeps the sign of zero.  (No SSE4.1 in the baseline: rounding goes through int32.) */
HM_FN float hm_floor_f32(float x) {
  const uint32_t bits = hm_f32_bits(x), sign = bits & 0x80000000u;
  const uint32_t fits = (uint32_t)((int32_t)((bits & 0x7fffffffu) - 0x4b000000u) >> 31); /* all ones below 2^23 */
  const float small = hm_bits_f32(bits & (fits | sign)); /* larger ones are integers already */
  const float t = (float)(int32_t)small;
  const float f = t > small ? t - 1.0f : t;
  return hm_bits_f32(((hm_f32_bits(f) | sign) & fits) | (bits & ~fits));
}

/* x - y * floor(x / y), exact: the sign is the divisor's.  NaN for y == 0 or infinite x. */
HM_FN float hm_remainder_f32(float x, float y) {
  const float r = fmodf(x, y);
  return r != 0.0f && (r < 0.0f) != (y < 0.0f) ? r + y : r;
}

/* ====== exp ====== */

/* x + more is reduced to r in [-ln2/2, ln2/2] and k, so that e^(x + more) = e^r * 2^k; returns r.  |more| << 1, |x| <= 120. */
HM_FN float hm__exp_reduce_f32(float x, float more, int32_t *k) {
  const float t = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the integer lands in the low bits */
  const float kf = t - 12582912.0f;
  *k = (int32_t)((hm_f32_bits(t) << 9) - 0x80000000u) >> 9; /* sign-extended low 23 bits of t, of any t */
  const float r = x - kf * 0.693359375f;                    /* 9 bits: the product is exact */
  return r - (kf * -2.12194440e-4f - more);
}

/* e^r - 1 for r in [-ln2/2, ln2/2]. */
HM_FN float hm__exp_tail_f32(float r) {
  float p = 1.3813160455e-3f;
  p = p * r + 8.3694187172e-3f;
  p = p * r + 4.1668456466e-2f;
  p = p * r + 1.6666514794e-1f;
  p = p * r + 4.9999993052e-1f;
  return r * r * p + r;
}

HM_FN float hm_exp_f32(float x) {
  float c = x < -104.0f ? -104.0f : x; /* below: 0; the other way round NaN would be lost */
  c = c > 89.0f ? 89.0f : c;           /* above: infinity */
  int32_t k;
  const float r = hm__exp_reduce_f32(c, 0.0f, &k);
  return hm__scale_f32(hm__exp_tail_f32(r) + 1.0f, k);
}

/* ====== log ====== */

/* log of x > 0, normal and finite, plus `more` (small against the result's last place but one). e_add goes to the exponent. */
HM_FN float hm__log_core_f32(float x, float more, float e_add) {
  const uint32_t ix = hm_f32_bits(x) - 0x3f3504f3u; /* sqrt(1/2): m lies in [sqrt(1/2), sqrt(2)) */
  const int32_t e = (int32_t)ix >> 23;
  const float f = hm_bits_f32((ix & 0x7fffffu) + 0x3f3504f3u) - 1.0f; /* exact */
  const float ef = (float)e + e_add;
  float p = 6.7475903078e-2f;
  p = p * f + -1.1676158237e-1f;
  p = p * f + 1.1887994335e-1f;
  p = p * f + -1.2405499967e-1f;
  p = p * f + 1.4219567129e-1f;
  p = p * f + -1.6668000599e-1f;
  p = p * f + 2.0002117821e-1f;
  p = p * f + -2.5000009533e-1f;
  p = p * f + 3.3333312622e-1f;
  const float ff = f * f;
  const float low = ff * (f * p) + (ef * -2.12194440e-4f + more);
  const float mid = low - 0.5f * ff;
  return ef * 0.693359375f + (f + mid);
}

HM_FN float hm_log_f32(float x) {
  const bool tiny = x < FLT_MIN;
  const float n = tiny ? x * 8388608.0f : x;
  const float y = hm__log_core_f32(n, 0.0f, tiny ? -23.0f : 0.0f);
  const float special = x == 0.0f ? -INFINITY : (x < 0.0f ? (float)NAN : x); /* +infinity and NaN stay */
  return x > 0.0f && x < INFINITY ? y : special;
}

/* log(1 + x) */
HM_FN float hm_log1p_f32(float x) {
  const float u = 1.0f + x;
  const float lost = x - (u - 1.0f); /* what the sum dropped */
  const float y = hm__log_core_f32(u, lost / u, 0.0f);
  const float special = x == -1.0f ? -INFINITY : (x < -1.0f ? (float)NAN : x);
  const float z = hm_abs_f32(x) < 2.9802322e-8f ? x : y; /* 2^-25; keeps the sign of zero */
  return hm__pick_f32((x > -1.0f) & (x < INFINITY), z, special);
}

/* ====== tanh ====== */

HM_FN float hm_tanh_f32(float x) {
  const float a = hm_abs_f32(x);
  const float z = a * a;
  float p = -5.7171514000e-3f;
  p = p * z + 2.0650743776e-2f;
  p = p * z + -5.3743570968e-2f;
  p = p * z + 1.3331492544e-1f;
  p = p * z + -3.3333283987e-1f;
  const float near_zero = a * (z * p) + a;
  const float far = 1.0f - 2.0f / (hm_exp_f32(a + a) + 1.0f);
  return hm__with_sign_f32(a < 0.625f ? near_zero : far, x);
}

/* ====== erf, erfc ====== */

/* erfc(a) for a >= 0 or NaN: e^(-a^2) R(a) / (1 + 2a), where R varies by a few percent only. */
HM_FN float hm__erfc_core_f32(float a) {
  const float c = a > 10.1f ? 10.1f : a; /* from there on 0 */
  const float q = (c - 3.0f) / (c + 3.0f);
  float p = -2.6812412416e-4f;
  p = p * q + -7.7757979117e-4f;
  p = p * q + 2.0018049714e-3f;
  p = p * q + 2.5673706426e-3f;
  p = p * q + -2.3797525819e-2f;
  p = p * q + 6.8295770974e-2f;
  p = p * q + -1.1927097655e-1f;
  p = p * q + 1.2964641392e-1f;
  p = p * q + -4.7562399289e-2f;
  p = p * q + -1.3562113928e-1f;
  const float h = hm_bits_f32(hm_f32_bits(c) & 0xfffff000u); /* 12 bits: h * h is exact */
  int32_t k;
  const float r = hm__exp_reduce_f32(-(h * h), (h - c) * (h + c), &k);
  const double top =
      1.2530080591178546 + (double)(p * q); /* in float32 the last four roundings would add up to 3 ulp */
  const double y = top / (1.0 + 2.0 * (double)c);
  return hm__scale_f32((float)(y + y * (double)hm__exp_tail_f32(r)), k);
}

/* erf(x) / x - 1 for z = x^2, x up to 0.93. */
HM_FN float hm__erf_poly_f32(float z) {
  float p = 8.3167689914e-5f;
  p = p * z + -8.1300189349e-4f;
  p = p * z + 5.1999082408e-3f;
  p = p * z + -2.6858942772e-2f;
  p = p * z + 1.1283687229e-1f;
  p = p * z + -3.7612633193e-1f;
  return p * z + 1.2837916658e-1f; /* 2/sqrt(pi) - 1 */
}

HM_FN float hm_erfc_f32(float x) {
  const float a = hm_abs_f32(x);
  const float y = hm__erfc_core_f32(a);
  const float near_zero = 1.0f - (a * hm__erf_poly_f32(a * a) + a);
  const float positive = a < 0.5f ? near_zero : y;
  return x < 0.0f ? 2.0f - positive : positive;
}

HM_FN float hm_erf_f32(float x) {
  const float a = hm_abs_f32(x);
  const float near_zero = a * hm__erf_poly_f32(a * a) + a;
  return hm__with_sign_f32(a < 0.92f ? near_zero : 1.0f - hm__erfc_core_f32(a), x);
}

/* ====== sin, cos ====== */

/* One of five numbers by the size of a. */
HM_FN double hm__sin_pick(double a, double c0, double c1, double c2, double c3, double c4) {
  const double low = hm__pick_f64(a < 0x1p26, c0, c1);
  const double mid = hm__pick_f64(a < 0x1p52, low, c2);
  const double high = hm__pick_f64(a < 0x1p78, mid, c3);
  return hm__pick_f64(a < 0x1p104, high, c4);
}

/* sin(x + quarter * pi/2) before rounding, for any float.  x * 2/pi is formed from four pieces of 2/pi that are chosen by the size of x; pieces whose
 * product is a multiple of 4 are left out.  The first three have 26 bits, so that their products are exact. */
HM_FN double hm__sin_core_f32(float x, uint64_t quarter) {
  const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer */
  const double d = (double)x;
  const double a = (double)hm_abs_f32(x);
  const double w0 = 0x1.45f3068p-1, w1 = 0x1.7272208p-27, w2 = 0x1.4a7f090p-54, w3 = 0x1.abe8fa8p-79;
  const double w4 = 0x1.a6ee060p-107, w5 = 0x1.b629590p-132;
  const double r2 = 0x1.4a7f09d5f47d5p-54, r3 = 0x1.abe8fa9a6ee07p-79, r4 = 0x1.a6ee06db14acdp-107,
               r5 = 0x1.b6295993c4390p-132;
  const double r6 = 0x1.278872083fca3p-157;
  const double c0 = hm__sin_pick(a, 0.0, w0, w1, w2, w3);
  const double c1 = hm__sin_pick(a, w0, w1, w2, w3, w4);
  const double c2 = hm__sin_pick(a, w1, w2, w3, w4, w5);
  const double c3 = hm__sin_pick(a, r2, r3, r4, r5, r6);
  const double p0 = d * c0, p1 = d * c1, p2 = d * c2, p3 = d * c3;
  const double f0 = p0 - 4.0 * ((p0 * 0.25 + magic) - magic); /* multiples of four quarter turns go */
  const double f1 = p1 - 4.0 * ((p1 * 0.25 + magic) - magic);
  const double f = f0 + f1; /* exact */
  const double s = f + p2;
  const double back = s - f;
  const double lost = (f - (s - back)) + (p2 - back);
  const double t = s + magic;
  const double r = ((s - (t - magic)) + (lost + p3)) * 1.5707963267948966;
  const double z = r * r;
  double sp = 2.7183038017389224e-6;
  sp = sp * z + -1.9839334097554536e-4;
  sp = sp * z + 8.3333293839678164e-3;
  sp = sp * z + -1.6666666641615871e-1;
  sp = sp * z * r + r;
  double cp = -2.721016896106152e-7;
  cp = cp * z + 2.4799519187733776e-5;
  cp = cp * z + -1.3888883750351474e-3;
  cp = cp * z + 4.1666666622793351e-2;
  cp = cp * z * z + (1.0 - 0.5 * z);
  const uint64_t n = hm_f64_bits(t) + quarter; /* low bits: the quadrant */
  const uint64_t odd = (uint64_t)0 - (n & 1);
  const uint64_t bits = (hm_f64_bits(cp) & odd) | (hm_f64_bits(sp) & ~odd);
  return hm_bits_f64(bits ^ ((n & 2) << 62));
}

HM_FN float hm_sin_f32(float x) {
  const float y = (float)hm__sin_core_f32(x, 0);
  return hm_abs_f32(x) < 1.2207031e-4f ? x : y; /* 2^-13; keeps the sign of zero */
}

HM_FN float hm_cos_f32(float x) { return (float)hm__sin_core_f32(x, 1); }

/* ====== pow ====== */

/* Binary logarithm of a finite positive normal double, good to 2^-44. */
HM_FN double hm__log2_f64(double x) {
  const uint64_t root_half = 0x3fe6a09e667f3bcdu, one = 0x3ff0000000000000u;
  const uint64_t bits = hm_f64_bits(x);
  const uint64_t biased = (bits - root_half + one) >> 52;
  const double m = hm_bits_f64(bits - (biased << 52) + one);                       /* in [sqrt(1/2), sqrt(2)) */
  const double e = hm_bits_f64(biased | 0x4330000000000000u) - 4503599627371519.0; /* 2^52 + 1023 */
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double p = 2.829036073983321e-1;
  p = p * z + 3.1990546873311159e-1;
  p = p * z + 4.1220925760398085e-1;
  p = p * z + 5.770779423166432e-1;
  p = p * z + 9.6179669411349576e-1;
  p = p * z + 2.8853900817778499;
  return e + s * p;
}

/* 2^x for |x| <= 300, good to 2^-34. */
HM_FN double hm__exp2_f64(double x) {
  const double magic = 6755399441055744.0;
  const double t = x + magic;
  const double r = x - (t - magic);
  double p = 1.5201920328835688e-5;
  p = p * r + 1.5469319238612241e-4;
  p = p * r + 1.3333922788557214e-3;
  p = p * r + 9.6180271672901486e-3;
  p = p * r + 5.5504103528826917e-2;
  p = p * r + 2.4022651198771571e-1;
  p = p * r + 6.931471807287182e-1;
  p = p * r + 9.9999999996163405e-1;
  return p * hm_bits_f64((hm_f64_bits(t) << 52) + 0x3ff0000000000000u);
}

/* x to the power y, special cases as C99 has them. */
HM_FN float hm_pow_f32(float x, float y) {
  const float ax = hm_abs_f32(x);
  const float ay = hm_abs_f32(y);
  const double edge =
      hm__pick_f64(ax == 0.0f, -(double)INFINITY, (double)ax); /* infinity and NaN are their own logarithm */
  const double l = hm__pick_f64((ax > 0.0f) & (ax < INFINITY), hm__log2_f64((double)ax), edge);
  double p = (double)y * l;
  p = p < -300.0 ? -300.0 : p;
  p = p > 300.0 ? 300.0 : p;
  const float r = (float)hm__exp2_f64(p);
  const uint32_t fits =
      (uint32_t)((int32_t)(hm_f32_bits(ay) - 0x4b800000u) >> 31); /* from 2^24 on y is an even integer */
  const float whole = hm_bits_f32(hm_f32_bits(y) & fits);
  const int32_t iy = (int32_t)whole;
  const float known = hm__pick_f32((x < 0.0f) & (ax < INFINITY) & ((float)iy != whole), (float)NAN, r);
  const float z = hm_bits_f32(hm_f32_bits(known) ^ (hm_f32_bits(x) & ((uint32_t)iy << 31))); /* odd y: the sign of x */
  return hm__pick_f32((y == 0.0f) | (x == 1.0f) | ((ax == 1.0f) & (ay == INFINITY)), 1.0f, z);
}

/* ====== Other logarithms and exponentials ====== */

/* Binary logarithm of any float before rounding. */
HM_FN double hm__log2_core_f32(float x) {
  const double edge = hm__pick_f64(x == 0.0f, -(double)INFINITY, (double)x); /* infinity and NaN are their own */
  const double known = hm__pick_f64((x > 0.0f) & (x < INFINITY), hm__log2_f64((double)hm_abs_f32(x)), edge);
  return hm__pick_f64(x < 0.0f, (double)NAN, known);
}

HM_FN float hm_log2_f32(float x) { return (float)hm__log2_core_f32(x); }
HM_FN float hm_log10_f32(float x) { return (float)(hm__log2_core_f32(x) * 0.30102999566398120); }

/* e^x before rounding, held inside 2^+-300: beyond what a float holds. */
HM_FN double hm__exp_core_f32(float x) {
  double p = (double)x * 1.4426950408889634;
  p = p < -300.0 ? -300.0 : p;
  p = p > 300.0 ? 300.0 : p;
  return hm__exp2_f64(p);
}

/* e^x - 1: a series where the difference would lose digits. */
HM_FN float hm_expm1_f32(float x) {
  const double d = (double)x;
  double p = 1.0 / 40320.0;
  p = p * d + 1.0 / 5040.0;
  p = p * d + 1.0 / 720.0;
  p = p * d + 1.0 / 120.0;
  p = p * d + 1.0 / 24.0;
  p = p * d + 1.0 / 6.0;
  p = p * d + 0.5;
  const double near = d + d * d * p;
  const float y = (float)hm__pick_f64(hm_abs_f32(x) < 0.3f, near, hm__exp_core_f32(x) - 1.0);
  return x == 0.0f ? x : y; /* keeps the sign of zero */
}

HM_FN float hm_sinh_f32(float x) {
  const double a = (double)hm_abs_f32(x), z = a * a, e = hm__exp_core_f32(hm_abs_f32(x));
  const double near = a * (1.0 + z * (1.0 / 6.0) * (1.0 + z * (1.0 / 20.0) * (1.0 + z * (1.0 / 42.0))));
  const float y = (float)hm__pick_f64(a < 0.3, near, 0.5 * (e - 1.0 / e));
  return hm__with_sign_f32(y, x);
}

HM_FN float hm_cosh_f32(float x) {
  const double e = hm__exp_core_f32(x);
  return (float)(0.5 * (e + 1.0 / e));
}

/* ====== tan and the inverse functions ====== */

HM_FN float hm_tan_f32(float x) {
  const float y = (float)(hm__sin_core_f32(x, 0) / hm__sin_core_f32(x, 1));
  return hm_abs_f32(x) < 1.2207031e-4f ? x : y; /* 2^-13; keeps the sign of zero */
}

/* atan of 0 <= z <= 1, good to 2^-32: above tan(pi/8) by atan(z) = pi/4 + atan((z - 1) / (z + 1)), then the series. */
HM_FN double hm__atan_unit_f64(double z) {
  const double w = hm__pick_f64(z > 0.41421356237309503, (z - 1.0) / (z + 1.0), z);
  const double t = w * w;
  double p = 1.0 / 21.0;
  p = 1.0 / 19.0 - t * p;
  p = 1.0 / 17.0 - t * p;
  p = 1.0 / 15.0 - t * p;
  p = 1.0 / 13.0 - t * p;
  p = 1.0 / 11.0 - t * p;
  p = 1.0 / 9.0 - t * p;
  p = 1.0 / 7.0 - t * p;
  p = 1.0 / 5.0 - t * p;
  p = 1.0 / 3.0 - t * p;
  const double r = w - w * t * p;
  return hm__pick_f64(z > 0.41421356237309503, 0.78539816339744831 + r, r);
}

/* atan of a >= 0, infinity included. */
HM_FN double hm__atan_core_f64(double a) {
  const double r = hm__atan_unit_f64(hm__pick_f64(a > 1.0, 1.0 / a, a));
  return hm__pick_f64(a > 1.0, 1.5707963267948966 - r, r);
}

HM_FN float hm_atan_f32(float x) { return hm__with_sign_f32((float)hm__atan_core_f64((double)hm_abs_f32(x)), x); }

HM_FN float hm_asin_f32(float x) {
  const double a = (double)hm_abs_f32(x);
  return hm__with_sign_f32((float)hm__atan_core_f64(a / sqrt((1.0 - a) * (1.0 + a))), x);
}

HM_FN float hm_acos_f32(float x) {
  const double d = (double)x;
  return (float)(2.0 * hm__atan_core_f64(sqrt((1.0 - d) / (1.0 + d))));
}

/* The angle of the point (x, y), as C99 has it: in [-pi, pi], the sign of y, also for zeros and infinities. */
HM_FN float hm_atan2_f32(float y, float x) {
  const double a = (double)hm_abs_f32(y), b = (double)hm_abs_f32(x);
  const double low = hm__pick_f64(a > b, b, a), high = hm__pick_f64(a > b, a, b);
  const double even = hm__pick_f64((a == b) & (a == (double)INFINITY), 1.0, low / high);
  const double r = hm__atan_unit_f64(hm__pick_f64(high == 0.0, 0.0, even));
  const double first = hm__pick_f64(a > b, 1.5707963267948966 - r, r);
  const double half = hm__pick_f64((hm_f32_bits(x) >> 31) != 0, 3.1415926535897931 - first, first);
  const double nan = (a + b) - (a + b); /* 0, or NaN where an operand is NaN or infinite */
  return hm__with_sign_f32((float)hm__pick_f64((y != y) | (x != x), nan, half), y);
}

/* Square root of x^2 + y^2; infinite if either is, as C99 has it. */
HM_FN float hm_hypot_f32(float x, float y) {
  const double a = (double)x, b = (double)y;
  const float r = (float)sqrt(a * a + b * b);
  return hm__pick_f32((hm_abs_f32(x) == INFINITY) | (hm_abs_f32(y) == INFINITY), (float)INFINITY, r);
}

/* ====== Rounding to integers ====== */

HM_FN float hm_ceil_f32(float x) { return -hm_floor_f32(-x); }

HM_FN float hm_trunc_f32(float x) {
  return hm_bits_f32(hm_f32_bits(hm_floor_f32(hm_abs_f32(x))) | (hm_f32_bits(x) & 0x80000000u));
}

/* Nearest integer, halves to the even one: adding 2^23 leaves no bits for a fraction. */
HM_FN float hm_round_f32(float x) {
  const float a = hm_abs_f32(x);
  const float r = (a + 8388608.0f) - 8388608.0f;
  return hm__with_sign_f32(hm__pick_f32(a < 8388608.0f, r, a), x);
}

/* ====== Rounding to the 8-bit floats of half.h, saturating: beyond the largest number, infinities too, comes that; NaN stays ====== */

/* Keeps `mantissa` bits of float32's 23; below `least`, the smallest normal number, adding `magic` rounds to subnormals. */
HM_FN float hm__round_f8_f32(float x, int mantissa, float least, float magic, float most) {
  const uint32_t u = hm_f32_bits(x) & 0x7fffffffu;
  const int drop = 23 - mantissa;
  const uint32_t half = (1u << (drop - 1)) - 1;
  const float a = hm_bits_f32(u);
  const float normal = hm_bits_f32((u + half + (u >> drop & 1u)) >> drop << drop);
  const float small = (a + magic) - magic;
  const float r = hm__pick_f32(a < least, small, normal);
  const float held = hm__pick_f32(r > most, most, r);
  return hm__with_sign_f32(hm__pick_f32(a == a, held, a), x);
}

HM_FN float hm_round_e4m3_f32(float x) { return hm__round_f8_f32(x, 3, 0.015625f, 16384.0f, 448.0f); }
HM_FN float hm_round_e5m2_f32(float x) { return hm__round_f8_f32(x, 2, 6.103515625e-5f, 128.0f, 57344.0f); }

HM_FN double hm__round_f8_f64(double x, int mantissa, double least, double magic, double most) {
  const uint64_t u = hm_f64_bits(x) & 0x7fffffffffffffffu, sign = hm_f64_bits(x) & 0x8000000000000000u;
  const int drop = 52 - mantissa;
  const uint64_t half = ((uint64_t)1 << (drop - 1)) - 1;
  const double a = hm_bits_f64(u);
  const double normal = hm_bits_f64((u + half + (u >> drop & 1u)) >> drop << drop);
  const double small = (a + magic) - magic;
  const double r = hm__pick_f64(a < least, small, normal);
  const double held = hm__pick_f64(r > most, most, r);
  return hm_bits_f64(hm_f64_bits(hm__pick_f64(a == a, held, a)) | sign);
}

/* magic: 1.0 has its last place 2^-52, so the smallest subnormal times 2^52. */
HM_FN double hm_round_e4m3_f64(double x) { return hm__round_f8_f64(x, 3, 0.015625, 8796093022208.0, 448.0); }
HM_FN double hm_round_e5m2_f64(double x) { return hm__round_f8_f64(x, 2, 6.103515625e-5, 68719476736.0, 57344.0); }

/* ====== float64: the C library's ====== */

HM_FN double hm_log2_f64(double x) { return log2(x); }
HM_FN double hm_log10_f64(double x) { return log10(x); }
HM_FN double hm_expm1_f64(double x) { return expm1(x); }
HM_FN double hm_sinh_f64(double x) { return sinh(x); }
HM_FN double hm_cosh_f64(double x) { return cosh(x); }
HM_FN double hm_tan_f64(double x) { return tan(x); }
HM_FN double hm_asin_f64(double x) { return asin(x); }
HM_FN double hm_acos_f64(double x) { return acos(x); }
HM_FN double hm_atan_f64(double x) { return atan(x); }
HM_FN double hm_atan2_f64(double x, double y) { return atan2(x, y); }
HM_FN double hm_hypot_f64(double x, double y) { return hypot(x, y); }
HM_FN double hm_ceil_f64(double x) { return ceil(x); }
HM_FN double hm_round_f64(double x) { return rint(x); }
HM_FN double hm_trunc_f64(double x) { return trunc(x); }

HM_FN double hm_abs_f64(double x) { return fabs(x); }
HM_FN double hm_sqrt_f64(double x) { return sqrt(x); }
HM_FN double hm_floor_f64(double x) { return floor(x); }
HM_FN double hm_exp_f64(double x) { return exp(x); }
HM_FN double hm_log_f64(double x) { return log(x); }
HM_FN double hm_log1p_f64(double x) { return log1p(x); }
HM_FN double hm_tanh_f64(double x) { return tanh(x); }
HM_FN double hm_erf_f64(double x) { return erf(x); }
HM_FN double hm_erfc_f64(double x) { return erfc(x); }
HM_FN double hm_sin_f64(double x) { return sin(x); }
HM_FN double hm_cos_f64(double x) { return cos(x); }
HM_FN double hm_pow_f64(double x, double y) { return pow(x, y); }

HM_FN double hm_remainder_f64(double x, double y) {
  const double r = fmod(x, y);
  return r != 0.0 && (r < 0.0) != (y < 0.0) ? r + y : r;
}

/* ====== Integers: arithmetic wraps modulo 2^64 ====== */

HM_FN int64_t hm_abs_i64(int64_t x) { return x < 0 ? (int64_t)(0 - (uint64_t)x) : x; }

/* Quotient rounded down.  The caller refuses y == 0; here it gives 0 rather than a trap. */
HM_FN int64_t hm_floordiv(int64_t x, int64_t y) {
  if (y == 0) return 0;
  if (y == -1) return (int64_t)(0 - (uint64_t)x);
  const int64_t q = x / y;
  return x % y != 0 && (x < 0) != (y < 0) ? q - 1 : q;
}

/* Remainder with the sign of y.  The caller refuses y == 0; here it gives 0. */
HM_FN int64_t hm_floormod(int64_t x, int64_t y) {
  if (y == 0 || y == -1) return 0;
  const int64_t r = x % y;
  return r != 0 && (r < 0) != (y < 0) ? r + y : r;
}

/* x to the power y.  Negative powers are whole only for 1 and -1, else 0. */
HM_FN int64_t hm_powi(int64_t x, int64_t y) {
  if (y < 0) return x == 1 ? 1 : (x == -1 ? (y & 1 ? -1 : 1) : 0);
  uint64_t base = (uint64_t)x, r = 1;
  for (uint64_t n = (uint64_t)y; n; n >>= 1) {
    if (n & 1) r *= base;
    base *= base;
  }
  return (int64_t)r;
}

/* A double as int64: truncated, held inside the range, NaN gives 0. */
HM_FN int64_t hm_saturate_i64(double x) {
  if (x != x) return 0;
  if (x >= 9223372036854775808.0) return INT64_MAX;
  if (x <= -9223372036854775808.0) return INT64_MIN;
  return (int64_t)x;
}

#endif
