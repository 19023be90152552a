/*
 * idx.c -- reads IDX files (the format of MNIST and its kin), plain or gzip-compressed, into a tensor on the CPU.
 *
 * The format: two zero bytes, a type code, the number of dims, one 32-bit size per dim, then the elements; all
 * big-endian, row-major. Reading is strict: a file that is cut off, or goes on after its data, is refused with the
 * figures.
 *
 * Where the system refused (HM_ERR_IO), errno is still set when the function returns.  Mutator thread only.
 */
#include "op.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <zlib.h>

enum { HM_IDX_CHUNK = 1 << 24, HM_IDX_BUFFER = 1 << 18 };

/* No gzip file grows by more than this when it is unpacked. */
enum { HM_DEFLATE_LIMIT = 1032 };

typedef struct hm_idx {
  gzFile file;
  const char *path;
  int dtype, ndim;
  int64_t shape[HM_MAX_NDIM];
  int64_t bytes; /* of the data */
} hm_idx;

/* A read failed: the system's reason, or the decompressor's. */
static int fail_read(const hm_idx *f) {
  int saved = errno, code = Z_OK;
  const char *text = gzerror(f->file, &code);
  if (code == Z_ERRNO) {
    hm_fail(HM_ERR_IO, "idx: %s: cannot read: %s", f->path, strerror(saved));
    errno = saved;
    return HM_ERR_IO;
  }
  const size_t n = strlen(f->path);
  if (strncmp(text, f->path, n) == 0 && text[n] == ':') text += n + 2; /* zlib puts the path first, too */
  return hm_fail(HM_ERR_FORMAT, "idx: %s: the compressed data are damaged or cut off (%s)", f->path, text);
}

/* Reads up to `bytes`; *got is less only at the end of the file. */
static int read_bytes(const hm_idx *f, void *dst, int64_t bytes, int64_t *got) {
  char *p = dst;
  *got = 0;
  while (*got < bytes) {
    int64_t left = bytes - *got;
    int n = gzread(f->file, p + *got, (unsigned)(left < HM_IDX_CHUNK ? left : HM_IDX_CHUNK));
    if (n < 0) return fail_read(f);
    if (n == 0) {
      int code = Z_OK;
      gzerror(f->file, &code);
      return code == Z_OK || code == Z_STREAM_END ? HM_OK : fail_read(f);
    }
    *got += n;
  }
  return HM_OK;
}

/* Reads exactly `bytes` of `what`. */
static int read_exactly(const hm_idx *f, void *dst, int64_t bytes, const char *what) {
  int64_t got = 0;
  int rc = read_bytes(f, dst, bytes, &got);
  if (rc || got == bytes) return rc;
  return hm_fail(HM_ERR_FORMAT,
                 "idx: %s: the file ends in its %s: %" PRId64 " bytes were expected, %" PRId64 " are there", f->path,
                 what, bytes, got);
}

static uint32_t big_endian_32(const uint8_t *p) {
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

/* Reads type, dims and sizes. */
static int read_header(hm_idx *f) {
  uint8_t magic[4], sizes[4 * HM_MAX_NDIM];
  int rc = read_exactly(f, magic, sizeof magic, "header");
  if (rc) return rc;
  f->dtype = magic[2] == 0x08   ? HM_U8
             : magic[2] == 0x0c ? HM_I32
             : magic[2] == 0x0d ? HM_F32
             : magic[2] == 0x0e ? HM_F64
                                : HM_NONE;
  f->ndim = magic[3];
  if (magic[0] != 0 || magic[1] != 0) {
    return hm_fail(HM_ERR_FORMAT,
                   "idx: %s: not an IDX file: it begins with bytes %02x %02x %02x %02x, two zeros were expected",
                   f->path, magic[0], magic[1], magic[2], magic[3]);
  }
  if (f->dtype == HM_NONE) {
    return hm_fail(HM_ERR_FORMAT,
                   "idx: %s: type code 0x%02x: 0x08 (u8), 0x0c (i32), 0x0d (f32), 0x0e (f64) are supported", f->path,
                   magic[2]);
  }
  if (f->ndim < 1 || f->ndim > HM_MAX_NDIM) {
    return hm_fail(HM_ERR_FORMAT, "idx: %s: it has %d dims: 1 to %d are supported", f->path, f->ndim, (int)HM_MAX_NDIM);
  }
  rc = read_exactly(f, sizes, 4 * f->ndim, "header");
  if (rc) return rc;
  bool empty = false, overflow = false;
  f->bytes = hm_dtype_size(f->dtype);
  for (int d = 0; d < f->ndim; d++) {
    f->shape[d] = big_endian_32(sizes + 4 * d);
    if (f->shape[d] == 0) {
      empty = true;
    } else if (!overflow) {
      overflow = __builtin_mul_overflow(f->bytes, f->shape[d], &f->bytes);
    }
  }
  if (empty) f->bytes = 0;
  return overflow && !empty
             ? hm_fail(HM_ERR_FORMAT, "idx: %s: its sizes make more elements than can be counted", f->path)
             : HM_OK;
}

/* Refuses a header that promises more than the file can hold, before memory is asked for it. */
static int check_promise(const hm_idx *f) {
  struct stat st;
  if (stat(f->path, &st) != 0 || !S_ISREG(st.st_mode)) return HM_OK;
  int64_t most = gzdirect(f->file) ? st.st_size - 4 - 4 * f->ndim : st.st_size * HM_DEFLATE_LIMIT;
  if (f->bytes <= most) return HM_OK;
  return hm_fail(HM_ERR_FORMAT,
                 "idx: %s: its header promises %" PRId64 " bytes of data, a file of %" PRId64
                 " bytes holds at most %" PRId64,
                 f->path, f->bytes, (int64_t)st.st_size, most);
}

/* Turns big-endian elements of 4 or 8 bytes into the machine's order. */
static void to_native(void *data, int64_t bytes, int width) {
  if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ || width == 1) return;
  uint8_t *p = data;
  for (int64_t i = 0; i < bytes; i += width) {
    if (width == 4) {
      uint32_t v;
      memcpy(&v, p + i, 4);
      v = __builtin_bswap32(v);
      memcpy(p + i, &v, 4);
    } else {
      uint64_t v;
      memcpy(&v, p + i, 8);
      v = __builtin_bswap64(v);
      memcpy(p + i, &v, 8);
    }
  }
}

/* Reads the data into t and makes sure that nothing follows. */
static int read_data(const hm_idx *f, hm_tensor *t) {
  int rc = read_exactly(f, hm_tensor_data(t), f->bytes, "data");
  if (rc) return rc;
  uint8_t more[4096];
  int64_t got = 0;
  rc = read_bytes(f, more, sizeof more, &got);
  if (rc) return rc;
  if (got > 0) {
    return hm_fail(HM_ERR_FORMAT, "idx: %s: the data should end after %" PRId64 " bytes, but %s%" PRId64 " more follow",
                   f->path, f->bytes, got == sizeof more ? "at least " : "", got);
  }
  to_native(hm_tensor_data(t), f->bytes, hm_dtype_size(f->dtype));
  return HM_OK;
}

int hm_idx_read(const char *path, hm_tensor **out) {
  hm_idx f = {.path = path};
  errno = 0;
  f.file = gzopen(path, "rbe");
  if (!f.file) {
    int saved = errno ? errno : ENOMEM;
    hm_fail(HM_ERR_IO, "idx: %s: cannot open: %s", path, strerror(saved));
    errno = saved;
    return HM_ERR_IO;
  }
  gzbuffer(f.file, HM_IDX_BUFFER);
  hm_tensor *t = NULL;
  int rc = read_header(&f);
  if (!rc) rc = check_promise(&f);
  if (!rc) rc = hm_empty(f.ndim, f.shape, f.dtype, HM_CPU, &t);
  if (!rc) rc = read_data(&f, t);
  int saved = errno;
  gzclose_r(f.file);
  errno = saved;
  if (rc) {
    hm_tensor_release(t);
    return rc;
  }
  *out = t;
  return HM_OK;
}
