/*
 * philox.h -- Philox4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3"), for CPU and GPU.
 *
 * One call turns a counter into four words of 32 bits.  The key is the seed (low word first); the counter's low 64 bits
 * are an op's offset plus the number of the group of four elements, its third word the stream, its fourth 0.  Who takes
 * which word is told by the kernels (cpu/fill.c).
 *
 * Header-only; owns nothing; anything in kernels/ may include it.
 */
#ifndef HM_PHILOX_H
#define HM_PHILOX_H

#include "math.h"

/* Ten rounds over counter (c) with key (k0, k1), in place. */
HM_FN void hm_philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)c[0] * 0xd2511f53u, b = (uint64_t)c[2] * 0xcd9e8d57u;
    const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
    c[0] = n0;
    c[1] = (uint32_t)b;
    c[2] = n2;
    c[3] = (uint32_t)a;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

/* The four words of a counter. */
HM_FN void hm_philox_words(uint32_t words[4], uint64_t seed, uint64_t counter, uint32_t stream) {
  words[0] = (uint32_t)counter;
  words[1] = (uint32_t)(counter >> 32);
  words[2] = stream;
  words[3] = 0;
  hm_philox(words, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* A word below this says yes, with probability p in [0, 1]: exactly never for 0, always for 1. */
HM_FN uint64_t hm_philox_threshold(double p) { return (uint64_t)ceil(p * 4294967296.0); }

#endif
