/*
 * half.h -- float16, bfloat16 and the 8-bit floats, one number at a time, by integer arithmetic alone.
 *
 * The yardstick for every faster conversion, and what the GPU code and core use for single numbers.  Rounds to nearest, ties to even, with
 * subnormals and infinities; a NaN that is narrowed becomes quiet and keeps the top bits of its payload.  float64 and int64 are rounded
 * once, directly.  Header-only; owns nothing; may be included by kernels/ and core/.
 *
 * The 8-bit formats are those of the Open Compute Project (OCP 8-bit floating point specification, 1.0).  e4m3: bias 7, largest number 448, no
 * infinities, NaN is 0x7f and 0xff; what is too large becomes NaN.  e5m2: bias 15, largest number 57344, infinities and NaN as in float16, of which
 * it is the upper byte.  A conversion that saturates is a clamp to the largest number before one of these.
 */
#ifndef HM_HALF_H
#define HM_HALF_H

#include "math.h"

/* A floating format narrower than double, for hm__narrow: mantissa bits kept, and the exponent bias. */
enum { HM_F16_MANTISSA = 10, HM_F16_BIAS = 15, HM_BF16_MANTISSA = 7, HM_BF16_BIAS = 127 };

/* ====== Widening: exact ====== */

HM_FN float hm_bf16_to_f32(uint16_t h) { return hm_bits_f32((uint32_t)h << 16); }

/* A signalling NaN comes out quiet, as the processors' instructions have it. */
HM_FN float hm_f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  const uint32_t e = (h >> 10) & 31u;
  uint32_t m = h & 0x3ffu;
  if (e == 31) return hm_bits_f32(sign | 0x7f800000u | (m << 13) | (m ? 0x400000u : 0));
  if (e) return hm_bits_f32(sign | ((e + 112) << 23) | (m << 13));
  if (!m) return hm_bits_f32(sign);
  uint32_t shift = 0;
  for (; !(m & 0x400u); m <<= 1) shift++;
  return hm_bits_f32(sign | ((113 - shift) << 23) | ((m & 0x3ffu) << 13));
}

/* ====== Narrowing: one rounding ====== */

/* Magnitude bits a of a finite double in a format with an exponent of its own, e (below its largest): one rounding.  A carry runs into the
 * exponent, up to infinity. */
HM_FN uint64_t hm__narrow_magnitude(uint64_t a, int e, int mantissa) {
  if (e < -mantissa) return 0; /* below half of the smallest number */
  uint64_t m = a & 0xfffffffffffffu;
  int drop = 52 - mantissa;
  uint64_t kept = 0;
  if (e <= 0) { /* subnormal: the leading 1 is written out */
    m |= (uint64_t)1 << 52;
    drop += 1 - e;
  } else {
    kept = (uint64_t)e << mantissa;
  }
  kept += m >> drop;
  const uint64_t rest = m & (((uint64_t)1 << drop) - 1), tie = (uint64_t)1 << (drop - 1);
  return kept + (rest > tie || (rest == tie && (kept & 1)));
}

/* A finite or infinite double, or a NaN, as sign, exponent and mantissa bits of a format of at most 16 bits. */
HM_FN uint16_t hm__narrow(uint64_t u, int mantissa, int bias) {
  const uint16_t sign = (uint16_t)((u >> 63) << 15);
  const uint64_t a = u & 0x7fffffffffffffffu;
  const uint16_t infinity = (uint16_t)(0x7fffu >> mantissa << mantissa);
  if (a > 0x7ff0000000000000u) /* NaN: quiet bit, and the top of the payload */
    return (uint16_t)(sign | infinity | (1u << (mantissa - 1)) | (uint16_t)((a & 0xfffffffffffffu) >> (52 - mantissa)));
  const int e = (int)(a >> 52) - 1023 + bias; /* exponent in the new format */
  if (a == 0x7ff0000000000000u || e >= (0x7fff >> mantissa)) return (uint16_t)(sign | infinity);
  return (uint16_t)(sign | hm__narrow_magnitude(a, e, mantissa));
}

HM_FN uint16_t hm_f64_to_f16(double x) { return hm__narrow(hm_f64_bits(x), HM_F16_MANTISSA, HM_F16_BIAS); }
HM_FN uint16_t hm_f64_to_bf16(double x) { return hm__narrow(hm_f64_bits(x), HM_BF16_MANTISSA, HM_BF16_BIAS); }

/* The bits of x as a double: exact, and the NaN's payload shifted as it is. */
HM_FN uint64_t hm__f32_as_f64_bits(float x) {
  const uint32_t u = hm_f32_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return (uint64_t)(u & 0x80000000u) << 32 | 0x7ff0000000000000u | (uint64_t)(u & 0x7fffffu) << 29;
  return hm_f64_bits((double)x);
}

HM_FN uint16_t hm_f32_to_f16(float x) { return hm__narrow(hm__f32_as_f64_bits(x), HM_F16_MANTISSA, HM_F16_BIAS); }

HM_FN uint16_t hm_f32_to_bf16(float x) {
  const uint32_t u = hm_f32_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
  return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* An int64 as a double that still rounds the same way to any format of at most 50 bits: what falls off is kept as one sticky bit. */
HM_FN double hm__i64_sticky(int64_t x) {
  const uint64_t a = x < 0 ? 0 - (uint64_t)x : (uint64_t)x;
  const double d = a >> 53 ? (double)(int64_t)(a >> 11 | ((a & 0x7ffu) != 0)) * 2048.0 : (double)(int64_t)a;
  return x < 0 ? -d : d;
}

HM_FN uint16_t hm_i64_to_f16(int64_t x) { return hm_f64_to_f16(hm__i64_sticky(x)); }
HM_FN uint16_t hm_i64_to_bf16(int64_t x) { return hm_f64_to_bf16(hm__i64_sticky(x)); }

/* ====== The 8-bit floats ====== */

enum { HM_E4M3_MANTISSA = 3, HM_E4M3_BIAS = 7, HM_E5M2_MANTISSA = 2, HM_E5M2_BIAS = 15 };
#define HM_E4M3_MAX 448.0f
#define HM_E5M2_MAX 57344.0f

HM_FN float hm_e4m3_to_f32(uint8_t h) {
  const uint32_t sign = (uint32_t)(h & 0x80u) << 24, e = (h >> 3) & 15u, m = h & 7u;
  if ((h & 0x7fu) == 0x7fu) return hm_bits_f32(sign | 0x7fc00000u);
  if (e) return hm_bits_f32(sign | ((e + 120) << 23) | (m << 20));
  return hm_bits_f32(sign | hm_f32_bits((float)m * 0.001953125f)); /* 2^-9 */
}

HM_FN float hm_e5m2_to_f32(uint8_t h) { return hm_f16_to_f32((uint16_t)(h << 8)); }

/* A double that is no NaN as magnitude bits of a format of one byte; top: the first code that is not finite. */
HM_FN uint8_t hm__narrow8(uint64_t u, int mantissa, int bias, uint32_t top) {
  const uint64_t a = u & 0x7fffffffffffffffu;
  const int e = (int)(a >> 52) - 1023 + bias;
  if (e > 31) return (uint8_t)top;
  const uint64_t kept = hm__narrow_magnitude(a, e, mantissa);
  return (uint8_t)(kept < top ? kept : top);
}

HM_FN uint8_t hm__bits_to_e4m3(uint64_t u) {
  const uint8_t sign = (uint8_t)(u >> 56 & 0x80u);
  if ((u & 0x7fffffffffffffffu) > 0x7ff0000000000000u) return sign | 0x7fu;
  return (uint8_t)(sign | hm__narrow8(u, HM_E4M3_MANTISSA, HM_E4M3_BIAS, 0x7fu));
}

HM_FN uint8_t hm__bits_to_e5m2(uint64_t u) {
  const uint8_t sign = (uint8_t)(u >> 56 & 0x80u);
  if ((u & 0x7fffffffffffffffu) > 0x7ff0000000000000u) return (uint8_t)(sign | 0x7eu | (u >> 50 & 1u));
  return (uint8_t)(sign | hm__narrow8(u, HM_E5M2_MANTISSA, HM_E5M2_BIAS, 0x7cu));
}

HM_FN uint8_t hm_f64_to_e4m3(double x) { return hm__bits_to_e4m3(hm_f64_bits(x)); }
HM_FN uint8_t hm_f64_to_e5m2(double x) { return hm__bits_to_e5m2(hm_f64_bits(x)); }
HM_FN uint8_t hm_f32_to_e4m3(float x) { return hm__bits_to_e4m3(hm__f32_as_f64_bits(x)); }
HM_FN uint8_t hm_f32_to_e5m2(float x) { return hm__bits_to_e5m2(hm__f32_as_f64_bits(x)); }
HM_FN uint8_t hm_i64_to_e4m3(int64_t x) { return hm_f64_to_e4m3(hm__i64_sticky(x)); }
HM_FN uint8_t hm_i64_to_e5m2(int64_t x) { return hm_f64_to_e5m2(hm__i64_sticky(x)); }

/* ====== Floats to integers: truncated; out of range and NaN give the smallest integer, as on x86 ====== */

HM_FN int32_t hm_f32_to_i32(float x) { return x >= -2147483648.0f && x < 2147483648.0f ? (int32_t)x : INT32_MIN; }
HM_FN int64_t hm_f32_to_i64(float x) {
  return x >= -9223372036854775808.0f && x < 9223372036854775808.0f ? (int64_t)x : INT64_MIN;
}
HM_FN int32_t hm_f64_to_i32(double x) { return x > -2147483649.0 && x < 2147483648.0 ? (int32_t)x : INT32_MIN; }
HM_FN int64_t hm_f64_to_i64(double x) {
  return x >= -9223372036854775808.0 && x < 9223372036854775808.0 ? (int64_t)x : INT64_MIN;
}
/* uint8: the low eight bits of the int32. */
HM_FN uint8_t hm_f32_to_u8(float x) { return (uint8_t)hm_f32_to_i32(x); }
HM_FN uint8_t hm_f64_to_u8(double x) { return (uint8_t)hm_f64_to_i32(x); }

#endif
