/*
 * idx.c -- fuzzes the IDX reader with whatever comes: plain files, and gzip files as they are.
 */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  hm_tensor *t = NULL;
  const int status = hm_idx_read(fuzz_file(data, size), &t);
  fuzz_check(status, t);
  return 0;
}
