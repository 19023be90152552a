/*
 * cifar.c -- data sets that are plain bytes: CIFAR-10 in its binary form, and any file as a tensor of bytes.
 *
 * CIFAR-10 (source: the data set's own page): records of 3,073 bytes, a label from 0 to 9, then 32 x 32 pixels of red,
 * of green and of blue, row by row.  There is no header, so sizes and labels are what can be checked.
 *
 * Where the system refused (HM_ERR_IO), errno is still set when a function returns.  Mutator thread only.
 */
#include "file.h"
#include "op.h"

#include <inttypes.h>
#include <string.h>

enum {
  HM_CIFAR_PIXELS = 3 * 32 * 32,
  HM_CIFAR_RECORD = HM_CIFAR_PIXELS + 1,
  HM_CIFAR_CLASSES = 10,
  HM_CIFAR_CHUNK = 64
};

int hm_bytes_read(const char *path, hm_tensor **out) {
  hm_file f;
  hm_tensor *t = NULL;
  int rc = hm__file_open(&f, "bytes", path);
  if (rc) return rc;
  rc = hm_empty(1, &f.size, HM_U8, HM_CPU, &t);
  if (!rc) rc = hm__file_read(&f, hm_tensor_data(t), f.size, 0);
  hm__file_close(&f);
  if (rc) {
    hm_tensor_release(t);
    return rc;
  }
  *out = t;
  return HM_OK;
}

/* Opens a file of records; *n: how many it has. */
static int open_records(hm_file *f, const char *path, int64_t *n) {
  int rc = hm__file_open(f, "cifar10", path);
  if (rc) return rc;
  *n = f->size / HM_CIFAR_RECORD;
  if (f->size > 0 && f->size % HM_CIFAR_RECORD == 0) return HM_OK;
  rc = hm_fail(HM_ERR_FORMAT,
               "cifar10: %s: %" PRId64 " bytes are no whole number of records of %d bytes\n"
               "  hint: the binary version of the data set is wanted; was the file cut off?",
               path, f->size, (int)HM_CIFAR_RECORD);
  hm__file_close(f);
  return rc;
}

/* Sorts n records of a file into images and labels. */
static int read_records(const hm_file *f, int64_t n, uint8_t *pixels, int64_t *labels) {
  uint8_t *chunk = hm_alloc(HM_CIFAR_CHUNK * HM_CIFAR_RECORD);
  if (!chunk) return HM_ERR_MEMORY;
  int rc = HM_OK;
  for (int64_t at = 0; at < n && !rc; at += HM_CIFAR_CHUNK) {
    const int64_t m = n - at < HM_CIFAR_CHUNK ? n - at : HM_CIFAR_CHUNK;
    rc = hm__file_read(f, chunk, m * HM_CIFAR_RECORD, at * HM_CIFAR_RECORD);
    for (int64_t i = 0; i < m && !rc; i++) {
      const uint8_t *record = chunk + i * HM_CIFAR_RECORD;
      if (record[0] >= HM_CIFAR_CLASSES)
        rc = hm_fail(HM_ERR_FORMAT, "cifar10: %s: record %" PRId64 " has label %d: 0 to 9 were expected", f->path,
                     at + i, record[0]);
      labels[at + i] = record[0];
      memcpy(pixels + (at + i) * HM_CIFAR_PIXELS, record + 1, HM_CIFAR_PIXELS);
    }
  }
  hm_free(chunk);
  return rc;
}

/* How many records the files have together. */
static int count_records(const char *const *paths, int n_paths, int64_t *total) {
  *total = 0;
  for (int i = 0; i < n_paths; i++) {
    hm_file f;
    int64_t n;
    int rc = open_records(&f, paths[i], &n);
    if (rc) return rc;
    hm__file_close(&f);
    *total += n;
  }
  return HM_OK;
}

/* One file's records, to row `at` on; *at moves on. */
static int read_file(const char *path, int64_t rows, hm_tensor *images, hm_tensor *labels, int64_t *at) {
  hm_file f;
  int64_t n;
  int rc = open_records(&f, path, &n);
  if (rc) return rc;
  if (n > rows - *at) rc = hm_fail(HM_ERR_FORMAT, "cifar10: %s: the file grew while it was read", path);
  if (!rc)
    rc = read_records(&f, n, (uint8_t *)hm_tensor_data(images) + *at * HM_CIFAR_PIXELS,
                      (int64_t *)hm_tensor_data(labels) + *at);
  hm__file_close(&f);
  *at += n;
  return rc;
}

int hm_cifar_read(const char *const *paths, int n_paths, hm_tensor **images, hm_tensor **labels) {
  int64_t total = 0, at = 0;
  int rc = count_records(paths, n_paths, &total);
  if (rc) return rc;
  hm_tensor *x = NULL, *y = NULL;
  rc = hm_empty(4, (const int64_t[]){total, 3, 32, 32}, HM_U8, HM_CPU, &x);
  if (!rc) rc = hm_empty(1, &total, HM_I64, HM_CPU, &y);
  for (int i = 0; i < n_paths && !rc; i++) rc = read_file(paths[i], total, x, y, &at);
  if (!rc && at != total) rc = hm_fail(HM_ERR_FORMAT, "cifar10: %s: a file shrank while it was read", paths[0]);
  if (rc) {
    hm_tensor_release(x);
    hm_tensor_release(y);
    return rc;
  }
  *images = x;
  *labels = y;
  return HM_OK;
}
