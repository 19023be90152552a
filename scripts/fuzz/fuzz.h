/*
 * fuzz.h -- what the fuzzers of the file readers share: a file in memory with a path, and a look at every byte that was read.
 *
 * A harness is one C file that includes this and hands libFuzzer's bytes to one reader.  A reader must give a tensor whose bytes may all be
 * read, or a status with a message and no tensor; the sanitizers watch the rest.
 */
#ifndef HM_FUZZ_H
#define HM_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "halfmoon.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Writes the bytes to this process's file in memory; returns its path. */
static inline const char *fuzz_file(const uint8_t *data, size_t size) {
  static char path[64];
  static int fd = -1;
  if (fd < 0) {
    if (hm_init() != HM_OK) abort();
    fd = memfd_create("fuzz", 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  }
  if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size) abort();
  return path;
}

/* A reader's answer: reads every byte of the tensor and lets it go, or wants a message. */
static inline void fuzz_check(int status, hm_tensor *t) {
  if (status != HM_OK) {
    if (t || !hm_error_message()[0]) abort();
    return;
  }
  if (!t || !hm_is_contiguous(t)) abort();
  const uint8_t *p = hm_tensor_data(t);
  uint8_t sum = 0;
  for (int64_t i = 0, n = t->numel * hm_dtype_size(t->dtype); i < n; i++) sum = (uint8_t)(sum + p[i]);
  *(volatile uint8_t *)&sum = sum;
  hm_tensor_release(t);
}

#endif
