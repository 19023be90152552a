/*
 * idx_gzip.c -- fuzzes the IDX reader with gzip files: the input is packed, so that damage can lie behind the checksums, and one byte of what
 * comes of it is changed, so that it can lie before them.
 *
 * The first four bytes of an input: level and cut, where to change, and what to.
 */
#include <string.h>
#include <zlib.h>

#include "fuzz.h"

enum { ROOM = 1 << 16 };

/* Packs the bytes; returns how many there are then, 0 for none. */
static size_t pack(const uint8_t *data, size_t size, int level, uint8_t out[ROOM]) {
  z_stream z;
  memset(&z, 0, sizeof z);
  if (deflateInit2(&z, level, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK) return 0;
  z.next_in = (Bytef *)(uintptr_t)data;
  z.avail_in = (uInt)size;
  z.next_out = out;
  z.avail_out = ROOM;
  const int rc = deflate(&z, Z_FINISH);
  deflateEnd(&z);
  return rc == Z_STREAM_END ? ROOM - z.avail_out : 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static uint8_t packed[ROOM];
  if (size < 4) return 0;
  size_t n = pack(data + 4, size - 4, data[0] % 10, packed);
  if (n == 0) return 0;
  packed[(data[1] | data[2] << 8) % n] ^= data[3];
  if (data[0] >= 128) n -= data[0] % n;
  hm_tensor *t = NULL;
  const int status = hm_idx_read(fuzz_file(packed, n), &t);
  fuzz_check(status, t);
  return 0;
}
