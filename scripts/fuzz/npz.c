/*
 * npz.c -- fuzzes the reader of NumPy's archives: the directory, and every array of one that opens.
 */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  hm_npz *z = NULL;
  const int status = hm_npz_open(fuzz_file(data, size), &z);
  if (status != HM_OK) {
    if (z || !hm_error_message()[0]) abort();
    return 0;
  }
  for (int i = 0; i < hm_npz_count(z); i++) {
    hm_tensor *t = NULL;
    if (!hm_npz_name(z, i)) abort();
    const int read = hm_npz_read(z, i, &t);
    fuzz_check(read, t);
  }
  hm_npz_close(z);
  return 0;
}
