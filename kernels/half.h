/*
 * half.h -- float16 and bfloat16, one number at a time, by integer arithmetic alone.
 *
 * The yardstick for every faster conversion, and what the GPU code and core use for single numbers.  Rounds to nearest, ties to even, with
 * subnormals and infinities; a NaN that is narrowed becomes quiet and keeps the top bits of its payload.  float64 and int64 are rounded
 * once, directly.  Header-only; owns nothing; may be included by kernels/ and core/.
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

/* A finite or infinite double, or a NaN, as sign, exponent and mantissa bits of a format of at most 16 bits. */
HM_FN uint16_t hm__narrow(uint64_t u, int mantissa, int bias) {
  const uint16_t sign = (uint16_t)((u >> 63) << 15);
  const uint64_t a = u & 0x7fffffffffffffffu;
  const uint16_t infinity = (uint16_t)(0x7fffu >> mantissa << mantissa);
  if (a > 0x7ff0000000000000u) /* NaN: quiet bit, and the top of the payload */
    return (uint16_t)(sign | infinity | (1u << (mantissa - 1)) | (uint16_t)((a & 0xfffffffffffffu) >> (52 - mantissa)));
  const int e = (int)(a >> 52) - 1023 + bias; /* exponent in the new format */
  if (a == 0x7ff0000000000000u || e >= (0x7fff >> mantissa)) return (uint16_t)(sign | infinity);
  if (e < -mantissa) return sign; /* below half of the smallest number */
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
  kept += rest > tie || (rest == tie && (kept & 1)); /* a carry runs into the exponent, up to infinity */
  return (uint16_t)(sign | kept);
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
