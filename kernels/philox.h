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

/* The four words of a counter: ten rounds with the seed as key. */
HM_FN void hm_philox_words(uint32_t words[4], uint64_t seed, uint64_t counter, uint32_t stream) {
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = stream, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#ifdef __CUDA_ARCH__ /* the device pass of nvcc; the host compiler knows no such pragma */
#pragma unroll
#endif
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)c0 * 0xd2511f53u, b = (uint64_t)c2 * 0xcd9e8d57u;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)a;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/* A word below this says yes, with probability p in [0, 1]: exactly never for 0, always for 1. */
HM_FN uint64_t hm_philox_threshold(double p) { return (uint64_t)ceil(p * 4294967296.0); }

#endif
