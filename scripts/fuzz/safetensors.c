/*
 * safetensors.c -- fuzzes the safetensors reader: the header, and every tensor and metadata entry of a file that opens.
 */
#include <string.h>

#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  hm_safetensors *f = NULL;
  const int status = hm_safetensors_open(fuzz_file(data, size), &f);
  if (status != HM_OK) {
    if (f || !hm_error_message()[0]) abort();
    return 0;
  }
  for (int i = 0; i < hm_safetensors_count(f); i++) {
    hm_tensor *t = NULL;
    if (!hm_safetensors_name(f, i)) abort();
    const int read = hm_safetensors_read(f, i, HM_CPU, &t);
    fuzz_check(read, t);
  }
  size_t length = 0;
  for (int i = 0; i < hm_safetensors_metadata_count(f); i++) {
    const hm_pair pair = hm_safetensors_metadata(f, i);
    length += strlen(pair.key) + strlen(pair.value);
  }
  hm_safetensors_close(f);
  return length > size * 8 ? abort(), 1 : 0;
}
