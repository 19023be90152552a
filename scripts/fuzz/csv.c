/*
 * csv.c -- fuzzes the reader of tables: with a header, without, and looking for one; every column as float32 and as int64.
 */
#include "fuzz.h"

static void read_table(const char *path, const hm_csv_options *options) {
  hm_csv *c = NULL;
  const int status = hm_csv_open(path, options, &c);
  if (status != HM_OK) {
    if (c || !hm_error_message()[0]) abort();
    return;
  }
  for (int i = 0; i < hm_csv_columns(c); i++) {
    hm_tensor *t = NULL;
    const int floats = hm_csv_read(c, &i, 1, HM_F32, &t);
    fuzz_check(floats, t);
    t = NULL;
    const int integers = hm_csv_read(c, &i, 1, HM_I64, &t);
    fuzz_check(integers, t);
  }
  hm_csv_close(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const char *path = fuzz_file(data, size);
  for (int header = -1; header <= 1; header++) {
    const hm_csv_options options = {.delimiter = ',', .header = header};
    read_table(path, &options);
  }
  return 0;
}
