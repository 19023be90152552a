/*
 * convert.c -- contiguous elements from one dtype to another, for every pair.
 *
 * Compiled once per instruction set.  Called through hm_isa.convert, and by the other kernels of the same variant; runs on the calling
 * thread, allocates nothing.  float16 goes through the processor's conversion instructions where the variant has them, bfloat16
 * through integer arithmetic; both match half.h to the bit.  What is rare goes through a block of float32 in L1, never rounding twice.
 */
#include "../half.h"
#include "isa.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { CHUNK = 512 }; /* elements of a block that passes through float32 */

typedef void (*convert_fn)(void *dst, const void *src, int64_t n);

/* ====== Plain numbers: one loop per pair ====== */

#define TO_BOOL(x) ((uint8_t)((x) != 0))
#define AS_IS(x) (x)
#define PAIR(name, to, from, expr)                                                                                     \
  static void name(void *dst, const void *src, int64_t n) {                                                            \
    to *const d = dst;                                                                                                 \
    const from *const s = src;                                                                                         \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) d[i] = (to)expr(s[i]);                                        \
  }

PAIR(bool_u8, uint8_t, uint8_t, TO_BOOL)
PAIR(bool_i32, int32_t, uint8_t, TO_BOOL)
PAIR(bool_i64, int64_t, uint8_t, TO_BOOL)
PAIR(bool_f32, float, uint8_t, TO_BOOL)
PAIR(bool_f64, double, uint8_t, TO_BOOL)
PAIR(u8_bool, uint8_t, uint8_t, TO_BOOL)
PAIR(u8_i32, int32_t, uint8_t, AS_IS)
PAIR(u8_i64, int64_t, uint8_t, AS_IS)
PAIR(u8_f32, float, uint8_t, AS_IS)
PAIR(u8_f64, double, uint8_t, AS_IS)
PAIR(i32_bool, uint8_t, int32_t, TO_BOOL)
PAIR(i32_u8, uint8_t, int32_t, AS_IS)
PAIR(i32_i64, int64_t, int32_t, AS_IS)
PAIR(i32_f32, float, int32_t, AS_IS)
PAIR(i32_f64, double, int32_t, AS_IS)
PAIR(i64_bool, uint8_t, int64_t, TO_BOOL)
PAIR(i64_u8, uint8_t, int64_t, AS_IS)
PAIR(i64_i32, int32_t, int64_t, AS_IS)
PAIR(i64_f32, float, int64_t, AS_IS)
PAIR(i64_f64, double, int64_t, AS_IS)
PAIR(f32_bool, uint8_t, float, TO_BOOL)
PAIR(f32_u8, uint8_t, float, hm_f32_to_u8)
PAIR(f32_i32, int32_t, float, hm_f32_to_i32)
PAIR(f32_i64, int64_t, float, hm_f32_to_i64)
PAIR(f32_f64, double, float, AS_IS)
PAIR(f64_bool, uint8_t, double, TO_BOOL)
PAIR(f64_u8, uint8_t, double, hm_f64_to_u8)
PAIR(f64_i32, int32_t, double, hm_f64_to_i32)
PAIR(f64_i64, int64_t, double, hm_f64_to_i64)
PAIR(f64_f32, float, double, AS_IS)

/* Wider than float32 into a half type: one rounding, so not by way of float32. */
PAIR(i64_f16, uint16_t, int64_t, hm_i64_to_f16)
PAIR(i64_bf16, uint16_t, int64_t, hm_i64_to_bf16)
PAIR(i32_f16, uint16_t, int32_t, hm_f64_to_f16)
PAIR(i32_bf16, uint16_t, int32_t, hm_f64_to_bf16)
PAIR(f64_f16, uint16_t, double, hm_f64_to_f16)
PAIR(f64_bf16, uint16_t, double, hm_f64_to_bf16)

/* ====== float32 and the half types: the hot four ====== */

PAIR(bf16_f32, float, uint16_t, hm_bf16_to_f32)

#if defined(__AVX2__) && !defined(__AVX512F__)

/* hm_f32_to_bf16 of eight numbers, one in each 32 bits. */
static inline __m256i round_bf16(const float *s) {
  const __m256i u = _mm256_loadu_si256((const __m256i *)s);
  const __m256i high = _mm256_srli_epi32(u, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
  const __m256i nan =
      _mm256_cmpgt_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f800000));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}

/* Sixteen at a time: the compiler's own loop packs less well. */
static void f32_bf16(void *dst, const void *src, int64_t n) {
  uint16_t *const d = dst;
  const float *const s = src;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i both = _mm256_packus_epi32(round_bf16(s + i), round_bf16(s + i + 8)); /* by halves of the registers */
    _mm256_storeu_si256((__m256i *)(d + i), _mm256_permute4x64_epi64(both, 0xd8));
  }
  for (; i < n; i++) d[i] = hm_f32_to_bf16(s[i]);
}

#else

/* hm_f32_to_bf16 without its branch. */
static void f32_bf16(void *dst, const void *src, int64_t n) {
  uint16_t *const d = dst;
  const float *const s = src;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const uint32_t u = hm_f32_bits(s[i]);
    const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16, nan = u >> 16 | 0x40u;
    d[i] = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
}

#endif

#if defined(__AVX512F__)

static void f16_f32(void *dst, const void *src, int64_t n) {
  float *const d = dst;
  const uint16_t *const s = src;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(d + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(s + i))));
  for (; i < n; i++) d[i] = _cvtsh_ss(s[i]);
}

static void f32_f16(void *dst, const void *src, int64_t n) {
  uint16_t *const d = dst;
  const float *const s = src;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256((__m256i *)(d + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(s + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; i++) d[i] = _cvtss_sh(s[i], _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(__F16C__)

static void f16_f32(void *dst, const void *src, int64_t n) {
  float *const d = dst;
  const uint16_t *const s = src;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(d + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(s + i))));
  for (; i < n; i++) d[i] = _cvtsh_ss(s[i]);
}

static void f32_f16(void *dst, const void *src, int64_t n) {
  uint16_t *const d = dst;
  const float *const s = src;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i *)(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(s + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; i++) d[i] = _cvtss_sh(s[i], _MM_FROUND_TO_NEAREST_INT);
}

#else

/* Without branches, so that it vectorises with the baseline's instructions.  A subnormal is its mantissa times 2^-24. */
static void f16_f32(void *dst, const void *src, int64_t n) {
  float *const d = dst;
  const uint16_t *const s = src;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const uint32_t h = s[i], a = (h & 0x7fffu) << 13;
    const uint32_t sub = hm_f32_bits((float)(int32_t)(h & 0x3ffu) * 5.9604645e-8f);
    const uint32_t top = a | 0x7f800000u | (a > 0x0f800000u ? 0x400000u : 0); /* infinity, NaN made quiet */
    const uint32_t finite = a < 0x00800000u ? sub : a + 0x38000000u;
    d[i] = hm_bits_f32((h & 0x8000u) << 16 | (a >= 0x0f800000u ? top : finite));
  }
}

/* Rounding: of a normal number by integer addition; of a subnormal by adding 1/2, whose last place is float16's smallest number. */
static void f32_f16(void *dst, const void *src, int64_t n) {
  uint16_t *const d = dst;
  const float *const s = src;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const uint32_t u = hm_f32_bits(s[i]), a = u & 0x7fffffffu;
    const uint32_t normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
    const uint32_t sub = hm_f32_bits(hm_bits_f32(a) + 0.5f) - 0x3f000000u;
    const uint32_t nan = 0x7e00u | (a >> 13 & 0x3ffu);
    const uint32_t finite = a < 0x38800000u ? sub : normal;
    const uint32_t top = a > 0x7f800000u ? nan : 0x7c00u;
    d[i] = (uint16_t)((u >> 16 & 0x8000u) | (a >= 0x477ff000u ? top : finite));
  }
}

#endif

/* ====== The 8-bit floats: half.h without its branches ====== */

static inline float wide_e4m3(uint8_t h) {
  const uint32_t a = h & 0x7fu, sub = hm_f32_bits((float)(int32_t)a * 0.001953125f); /* 2^-9 */
  const uint32_t finite = a < 8 ? sub : (a << 20) + 0x3c000000u;
  return hm_bits_f32((uint32_t)(h & 0x80u) << 24 | (a == 0x7fu ? 0x7fc00000u : finite));
}

static inline float wide_e5m2(uint8_t h) {
  const uint32_t a = h & 0x7fu, sub = hm_f32_bits((float)(int32_t)a * 1.52587890625e-5f); /* 2^-16 */
  const uint32_t top = a << 21 | 0x7f800000u | (a > 0x7cu ? 0x400000u : 0);
  const uint32_t finite = a < 4 ? sub : (a << 21) + 0x38000000u;
  return hm_bits_f32((uint32_t)(h & 0x80u) << 24 | (a >= 0x7cu ? top : finite));
}

/* As float16's in baseline code: normal numbers by integer addition, subnormals by adding a number whose last place is the smallest. */
static inline uint8_t narrow_e4m3(float x) {
  const uint32_t u = hm_f32_bits(x), a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x3c000000u + 0x7ffffu + (a >> 20 & 1u)) >> 20;
  const uint32_t sub = hm_f32_bits(hm_bits_f32(a) + 16384.0f) - 0x46800000u;
  const uint32_t finite = a < 0x3c800000u ? sub : normal;
  return (uint8_t)((u >> 24 & 0x80u) | (a > 0x43e80000u ? 0x7fu : finite)); /* 464: half way to 480 */
}

static inline uint8_t narrow_e5m2(float x) {
  const uint32_t u = hm_f32_bits(x), a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffffu + (a >> 21 & 1u)) >> 21;
  const uint32_t sub = hm_f32_bits(hm_bits_f32(a) + 128.0f) - 0x43000000u;
  const uint32_t finite = a < 0x38800000u ? sub : normal;
  const uint32_t top = a > 0x7f800000u ? 0x7eu | (a >> 21 & 1u) : 0x7cu;
  return (uint8_t)((u >> 24 & 0x80u) | (a >= 0x47700000u ? top : finite)); /* 61440: half way to 65536 */
}

PAIR(e4m3_f32, float, uint8_t, wide_e4m3)
PAIR(e5m2_f32, float, uint8_t, wide_e5m2)
PAIR(f32_e4m3, uint8_t, float, narrow_e4m3)
PAIR(f32_e5m2, uint8_t, float, narrow_e5m2)
PAIR(f64_e4m3, uint8_t, double, hm_f64_to_e4m3)
PAIR(f64_e5m2, uint8_t, double, hm_f64_to_e5m2)
PAIR(i64_e4m3, uint8_t, int64_t, hm_i64_to_e4m3)
PAIR(i64_e5m2, uint8_t, int64_t, hm_i64_to_e5m2)
PAIR(i32_e4m3, uint8_t, int32_t, hm_f64_to_e4m3)
PAIR(i32_e5m2, uint8_t, int32_t, hm_f64_to_e5m2)

/* ====== Pairs that pass through float32, in blocks ====== */

/* Exact on the way in, so the one rounding is that of the way out. */
#define VIA_F32(name, first, second, to_size, from_size)                                                               \
  static void name(void *dst, const void *src, int64_t n) {                                                            \
    float block[CHUNK];                                                                                                \
    char *d = dst;                                                                                                     \
    const char *s = src;                                                                                               \
    for (; n > 0; n -= CHUNK, d += CHUNK * (to_size), s += CHUNK * (from_size)) {                                      \
      const int64_t m = n < CHUNK ? n : CHUNK;                                                                         \
      first(block, s, m);                                                                                              \
      second(d, block, m);                                                                                             \
    }                                                                                                                  \
  }

VIA_F32(f16_bool, f16_f32, f32_bool, 1, 2)
VIA_F32(f16_u8, f16_f32, f32_u8, 1, 2)
VIA_F32(f16_i32, f16_f32, f32_i32, 4, 2)
VIA_F32(f16_i64, f16_f32, f32_i64, 8, 2)
VIA_F32(f16_bf16, f16_f32, f32_bf16, 2, 2)
VIA_F32(f16_f64, f16_f32, f32_f64, 8, 2)
VIA_F32(bf16_bool, bf16_f32, f32_bool, 1, 2)
VIA_F32(bf16_u8, bf16_f32, f32_u8, 1, 2)
VIA_F32(bf16_i32, bf16_f32, f32_i32, 4, 2)
VIA_F32(bf16_i64, bf16_f32, f32_i64, 8, 2)
VIA_F32(bf16_f16, bf16_f32, f32_f16, 2, 2)
VIA_F32(bf16_f64, bf16_f32, f32_f64, 8, 2)
VIA_F32(bool_f16, bool_f32, f32_f16, 2, 1)
VIA_F32(bool_bf16, bool_f32, f32_bf16, 2, 1)
VIA_F32(u8_f16, u8_f32, f32_f16, 2, 1)
VIA_F32(u8_bf16, u8_f32, f32_bf16, 2, 1)

/* ====== The table ====== */

/* [from][to]; NULL on the diagonal: bytes are copied; elsewhere, with an 8-bit float on one side: by way of float32, exact on the way in. */
static const convert_fn table[HM_DTYPE_COUNT][HM_DTYPE_COUNT] = {
    [HM_BOOL] = {NULL, bool_u8, bool_i32, bool_i64, bool_f16, bool_bf16, bool_f32, bool_f64},
    [HM_U8] = {u8_bool, NULL, u8_i32, u8_i64, u8_f16, u8_bf16, u8_f32, u8_f64},
    [HM_I32] = {i32_bool, i32_u8, NULL, i32_i64, i32_f16, i32_bf16, i32_f32, i32_f64, i32_e4m3, i32_e5m2},
    [HM_I64] = {i64_bool, i64_u8, i64_i32, NULL, i64_f16, i64_bf16, i64_f32, i64_f64, i64_e4m3, i64_e5m2},
    [HM_F16] = {f16_bool, f16_u8, f16_i32, f16_i64, NULL, f16_bf16, f16_f32, f16_f64},
    [HM_BF16] = {bf16_bool, bf16_u8, bf16_i32, bf16_i64, bf16_f16, NULL, bf16_f32, bf16_f64},
    [HM_F32] = {f32_bool, f32_u8, f32_i32, f32_i64, f32_f16, f32_bf16, NULL, f32_f64, f32_e4m3, f32_e5m2},
    [HM_F64] = {f64_bool, f64_u8, f64_i32, f64_i64, f64_f16, f64_bf16, f64_f32, NULL, f64_e4m3, f64_e5m2},
    [HM_F8_E4M3] = {[HM_F32] = e4m3_f32},
    [HM_F8_E5M2] = {[HM_F32] = e5m2_f32},
};

/* A pair without a loop of its own. */
static void by_f32(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n) {
  float block[CHUNK];
  char *d = dst;
  const char *s = src;
  for (; n > 0; n -= CHUNK, d += CHUNK * hm_dtype_size(dst_dtype), s += CHUNK * hm_dtype_size(src_dtype)) {
    const int64_t m = n < CHUNK ? n : CHUNK;
    table[src_dtype][HM_F32](block, s, m);
    table[HM_F32][dst_dtype](d, block, m);
  }
}

void HM_ISA_FN(hm_cpu_convert)(void *dst, int dst_dtype, const void *src, int src_dtype, int64_t n) {
  const convert_fn fn = table[src_dtype][dst_dtype];
  if (fn) fn(dst, src, n);
  else if (dst_dtype != src_dtype) by_f32(dst, dst_dtype, src, src_dtype, n);
  else if (dst != src) memcpy(dst, src, (size_t)n * (size_t)hm_dtype_size(dst_dtype));
}
