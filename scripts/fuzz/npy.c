/*
 * npy.c -- fuzzes the reader of NumPy's arrays.
 */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  hm_tensor *t = NULL;
  const int status = hm_npy_read(fuzz_file(data, size), &t);
  fuzz_check(status, t);
  return 0;
}
