/*
 * zip.c -- zip archives, as far as npz files need them: entries stored or deflated are read, stored ones are written.
 *
 * The format (source: PKWARE's APPNOTE): for each entry a local header and its data; then the directory, a record for
 * each entry with sizes, checksum and the place of the local header; last the end record, which tells where the
 * directory lies.  Numbers are little-endian.  The directory is what is believed; it is checked as a whole when an
 * archive is opened.  An entry may not promise more than deflate can make of its packed bytes, and the entries together
 * may not be packed in more bytes than the file has, so that no archive asks for memory that its size does not warrant.
 *
 * Archives of 4 GB and more (zip64), in several parts, or encrypted are refused with a message.  Mutator thread only.
 */
#include "file.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum {
  HM_ZIP_LOCAL = 30, /* bytes of a local header, a directory record and the end record, without names */
  HM_ZIP_RECORD = 46,
  HM_ZIP_END = 22,
  HM_ZIP_COMMENT = 65535,
  HM_ZIP_BUFFER = 1 << 16,
  HM_ZIP_ENTRIES = 65535,
  HM_DEFLATE_LIMIT = 1032, /* no deflated data grow by more than this */
};
#define HM_ZIP_SMALL INT64_C(0xffffffff) /* sizes and places are below */

static const uint8_t local_magic[4] = "PK\3\4", record_magic[4] = "PK\1\2", end_magic[4] = "PK\5\6";

static uint32_t get16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

static uint32_t get32(const uint8_t *p) { return get16(p) | get16(p + 2) << 16; }

static void put16(uint8_t *p, uint32_t v) {
  p[0] = (uint8_t)v;
  p[1] = (uint8_t)(v >> 8);
}

static void put32(uint8_t *p, uint32_t v) {
  put16(p, v);
  put16(p + 2, v >> 16);
}

/* ====== The directory ====== */

static int damaged(const hm_zip *z, const char *what) {
  return hm_fail(HM_ERR_FORMAT, "%s: %s: the archive is damaged: %s", z->file.format, z->file.path, what);
}

static int refuse_zip64(const hm_zip *z) {
  return hm_fail(HM_ERR_FORMAT,
                 "%s: %s: archives of 4 GB and more (zip64) are not supported\n"
                 "  hint: save the arrays in several files, or as safetensors",
                 z->file.format, z->file.path);
}

/* Finds the end record: the last one whose comment reaches to the end of the file. */
static int find_end(const hm_zip *z, uint8_t end[HM_ZIP_END], int64_t *place) {
  const int64_t most = HM_ZIP_END + HM_ZIP_COMMENT, n = z->file.size < most ? z->file.size : most;
  if (n < HM_ZIP_END) return damaged(z, "it is too short\n  hint: is it a zip file?");
  uint8_t *tail = hm_alloc((size_t)n);
  if (!tail) return HM_ERR_MEMORY;
  int rc = hm__file_read(&z->file, tail, n, z->file.size - n);
  int64_t at = n - HM_ZIP_END;
  for (; at >= 0 && !rc; at--) {
    if (memcmp(tail + at, end_magic, 4) == 0 && at + HM_ZIP_END + get16(tail + at + 20) == n) break;
  }
  if (!rc && at < 0) rc = damaged(z, "it has no directory\n  hint: is it a zip file, or was it cut off?");
  if (!rc) {
    memcpy(end, tail + at, HM_ZIP_END);
    *place = z->file.size - n + at;
  }
  hm_free(tail);
  return rc;
}

/* One directory record; `left` bytes are there.  *used: its size. */
static int parse_record(hm_zip *z, const uint8_t *p, int64_t left, int64_t directory, int64_t *used) {
  if (left < HM_ZIP_RECORD || memcmp(p, record_magic, 4) != 0) return damaged(z, "its directory ends too early");
  const uint32_t flags = get16(p + 8), name_bytes = get16(p + 28);
  *used = HM_ZIP_RECORD + (int64_t)name_bytes + get16(p + 30) + get16(p + 32);
  if (left < *used) return damaged(z, "its directory ends too early");
  hm_zip_entry *e = &z->entry[z->n];
  *e = (hm_zip_entry){NULL, (int)get16(p + 10), get32(p + 16), get32(p + 20), get32(p + 24), get32(p + 42)};
  if (memchr(p + HM_ZIP_RECORD, 0, name_bytes) || name_bytes == 0) return damaged(z, "an entry has no proper name");
  e->name = hm_alloc((size_t)name_bytes + 1);
  if (!e->name) return HM_ERR_MEMORY;
  memcpy(e->name, p + HM_ZIP_RECORD, name_bytes);
  e->name[name_bytes] = 0;
  z->n++;
  if (e->packed == HM_ZIP_SMALL || e->bytes == HM_ZIP_SMALL || e->header == HM_ZIP_SMALL) return refuse_zip64(z);
  if (flags & 1) return hm_fail(HM_ERR_FORMAT, "%s: %s: \"%s\" is encrypted", z->file.format, z->file.path, e->name);
  if (e->method != 0 && e->method != 8)
    return hm_fail(HM_ERR_FORMAT, "%s: %s: \"%s\" is packed by method %d: 0 (stored) and 8 (deflate) are supported",
                   z->file.format, z->file.path, e->name, e->method);
  const int64_t most = e->method == 0 ? e->packed : e->packed * HM_DEFLATE_LIMIT;
  if (e->bytes > most || (e->method == 0 && e->bytes < most))
    return hm_fail(HM_ERR_FORMAT,
                   "%s: %s: \"%s\" promises %" PRId64 " bytes, its %" PRId64 " packed bytes make at most %" PRId64,
                   z->file.format, z->file.path, e->name, e->bytes, e->packed, most);
  if (e->header + HM_ZIP_LOCAL + e->packed > directory)
    return hm_fail(HM_ERR_FORMAT, "%s: %s: \"%s\" does not lie before the directory", z->file.format, z->file.path,
                   e->name);
  return HM_OK;
}

static int compare_names(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* No name twice, and no bytes of the file used for several entries. */
static int check_entries(const hm_zip *z) {
  int64_t packed = 0;
  const char **names = hm_alloc(((size_t)z->n + 1) * sizeof *names);
  if (!names) return HM_ERR_MEMORY;
  for (int i = 0; i < z->n; i++) {
    names[i] = z->entry[i].name;
    packed += HM_ZIP_LOCAL + z->entry[i].packed;
  }
  if (z->n > 1) qsort(names, (size_t)z->n, sizeof *names, compare_names);
  int rc = packed > z->file.size ? damaged(z, "its entries overlap") : HM_OK;
  for (int i = 1; i < z->n && !rc; i++) {
    if (strcmp(names[i - 1], names[i]) == 0)
      rc = hm_fail(HM_ERR_FORMAT, "%s: %s: \"%s\" is there twice", z->file.format, z->file.path, names[i]);
  }
  hm_free(names);
  return rc;
}

static int parse_directory(hm_zip *z, const uint8_t *directory, int64_t bytes, int64_t place, int count) {
  z->entry = hm_calloc(((size_t)count + 1) * sizeof *z->entry);
  if (!z->entry) return HM_ERR_MEMORY;
  int64_t at = 0, used = 0;
  for (int i = 0; i < count; i++, at += used) {
    int rc = parse_record(z, directory + at, bytes - at, place, &used);
    if (rc) return rc;
  }
  return at == bytes ? check_entries(z) : damaged(z, "its directory has bytes of no entry");
}

int hm__zip_open(hm_zip *z, const char *format, const char *path) {
  uint8_t end[HM_ZIP_END] = {0};
  int64_t place = 0;
  int rc = hm__file_open(&z->file, format, path);
  if (!rc) rc = find_end(z, end, &place);
  if (rc) return rc;
  const int64_t count = get16(end + 10), bytes = get32(end + 12), start = get32(end + 16);
  if (count == HM_ZIP_ENTRIES || bytes == HM_ZIP_SMALL || start == HM_ZIP_SMALL) return refuse_zip64(z);
  if (get16(end + 4) != 0 || get16(end + 6) != 0 || get16(end + 8) != count)
    return damaged(z, "it is a part of several");
  if (start + bytes != place) return damaged(z, "its directory is not where it should be");
  uint8_t *directory = hm_alloc((size_t)bytes + 1);
  if (!directory) return HM_ERR_MEMORY;
  rc = hm__file_read(&z->file, directory, bytes, start);
  if (!rc) rc = parse_directory(z, directory, bytes, start, (int)count);
  hm_free(directory);
  return rc;
}

void hm__zip_close(hm_zip *z) {
  hm__file_close(&z->file);
  for (int i = 0; i < z->n; i++) hm_free(z->entry[i].name);
  hm_free(z->entry);
  z->entry = NULL;
  z->n = 0;
}

/* ====== Reading an entry ====== */

struct hm_zip_stream {
  const hm_zip *zip;
  const hm_zip_entry *entry;
  int64_t at, packed_left; /* place in the file of what comes next, and how much of it there is */
  int64_t left;            /* unpacked bytes not yet read */
  uint32_t crc;
  bool inflating, ended;
  z_stream z;
  uint8_t buffer[HM_ZIP_BUFFER];
};

static int entry_fail(const hm_zip_stream *s, const char *what) {
  return hm_fail(HM_ERR_FORMAT, "%s: %s: \"%s\": %s", s->zip->file.format, s->zip->file.path, s->entry->name, what);
}

/* zlib's own memory comes from the system: a few kilobytes for each stream. */
static int start_inflating(hm_zip_stream *s) {
  if (inflateInit2(&s->z, -MAX_WBITS) != Z_OK)
    return hm_fail(HM_ERR_MEMORY, "%s: %s: out of memory", s->zip->file.format, s->zip->file.path);
  s->inflating = true;
  return HM_OK;
}

int hm__zip_begin(const hm_zip *z, int index, hm_zip_stream **out) {
  uint8_t local[HM_ZIP_LOCAL];
  hm_zip_stream *s = hm_alloc(sizeof *s);
  if (!s) return HM_ERR_MEMORY;
  memset(s, 0, offsetof(hm_zip_stream, buffer));
  s->zip = z;
  s->entry = &z->entry[index];
  s->packed_left = s->entry->packed;
  s->left = s->entry->bytes;
  int rc = hm__file_read(&z->file, local, sizeof local, s->entry->header);
  if (!rc && memcmp(local, local_magic, 4) != 0) rc = entry_fail(s, "its data are not where the directory says");
  if (!rc && get16(local + 8) != (uint32_t)s->entry->method) rc = entry_fail(s, "it contradicts the directory");
  if (!rc) {
    s->at = s->entry->header + HM_ZIP_LOCAL + get16(local + 26) + get16(local + 28);
    if (s->at + s->packed_left > z->file.size) rc = entry_fail(s, "its data reach beyond the end of the file");
  }
  if (!rc && s->entry->method == 8) rc = start_inflating(s);
  if (rc) return hm__zip_end(s, rc);
  *out = s;
  return HM_OK;
}

/* Hands the next packed bytes to zlib. */
static int refill(hm_zip_stream *s) {
  const int64_t n = s->packed_left < HM_ZIP_BUFFER ? s->packed_left : HM_ZIP_BUFFER;
  if (n == 0) return entry_fail(s, "its packed data end too early");
  int rc = hm__file_read(&s->zip->file, s->buffer, n, s->at);
  if (rc) return rc;
  s->at += n;
  s->packed_left -= n;
  s->z.next_in = s->buffer;
  s->z.avail_in = (unsigned)n;
  return HM_OK;
}

/* Unpacks exactly `bytes`, below 4 GB. */
static int unpack(hm_zip_stream *s, void *dst, int64_t bytes) {
  s->z.next_out = dst;
  s->z.avail_out = (unsigned)bytes;
  while (s->z.avail_out > 0) {
    if (s->ended) return entry_fail(s, "its packed data make fewer bytes than it promises");
    if (s->z.avail_in == 0) {
      int rc = refill(s);
      if (rc) return rc;
    }
    const int code = inflate(&s->z, Z_NO_FLUSH);
    if (code == Z_MEM_ERROR)
      return hm_fail(HM_ERR_MEMORY, "%s: %s: out of memory", s->zip->file.format, s->zip->file.path);
    if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR)
      return entry_fail(s, "its packed data are damaged");
    s->ended = code == Z_STREAM_END;
  }
  return HM_OK;
}

int hm__zip_read(hm_zip_stream *s, void *dst, int64_t bytes) {
  if (bytes > s->left) return entry_fail(s, "it ends too early");
  if (bytes == 0) return HM_OK; /* zlib would take no memory for no checksum */
  int rc = HM_OK;
  if (s->inflating) {
    rc = unpack(s, dst, bytes);
  } else {
    rc = hm__file_read(&s->zip->file, dst, bytes, s->at);
    s->at += bytes;
    s->packed_left -= bytes;
  }
  if (rc) return rc;
  s->left -= bytes;
  s->crc = (uint32_t)crc32_z(s->crc, dst, (size_t)bytes);
  return HM_OK;
}

/* Nothing may be left, and the checksum must agree. */
static int check_end(hm_zip_stream *s) {
  if (s->left > 0) return entry_fail(s, "it is longer than its array");
  uint8_t more;
  while (s->inflating && !s->ended) { /* the mark of the end may be still to come */
    s->z.next_out = &more;
    s->z.avail_out = 1;
    int rc = s->z.avail_in == 0 ? refill(s) : HM_OK;
    if (rc) return rc;
    const int code = inflate(&s->z, Z_NO_FLUSH);
    if (s->z.avail_out == 0) return entry_fail(s, "its packed data make more bytes than it promises");
    if (code != Z_OK && code != Z_STREAM_END && code != Z_BUF_ERROR)
      return entry_fail(s, "its packed data are damaged");
    s->ended = code == Z_STREAM_END;
  }
  if (s->crc == s->entry->crc) return HM_OK;
  return entry_fail(s, "its checksum does not agree: the data are damaged");
}

int hm__zip_end(hm_zip_stream *s, int rc) {
  if (!s) return rc;
  if (!rc) rc = check_end(s);
  int saved = errno;
  if (s->inflating) inflateEnd(&s->z);
  hm_free(s);
  errno = saved;
  return rc;
}

/* ====== Writing ====== */

static int too_large(const hm_zip_writer *w) {
  return hm_fail(HM_ERR_ARG,
                 "%s: %s: it would be larger than 4 GB, or have more than %d entries\n"
                 "  hint: save several files, or one as safetensors",
                 w->file->format, w->file->path, (int)HM_ZIP_ENTRIES - 1);
}

/* The fields from "version needed" to the sizes, which both headers share: 24 bytes, and the length of the name. */
static void put_common(uint8_t *p, const hm_zip_entry *e) {
  put16(p, 20);
  put16(p + 2, 1 << 11); /* names are UTF-8 */
  put16(p + 4, 0);       /* stored */
  put16(p + 6, 0);       /* 1 January 1980, midnight: the same data, the same bytes */
  put16(p + 8, (1 << 5) | 1);
  put32(p + 10, e->crc);
  put32(p + 14, (uint32_t)e->packed);
  put32(p + 18, (uint32_t)e->bytes);
  put16(p + 22, (uint32_t)strlen(e->name));
}

int hm__zip_add(hm_zip_writer *w, const char *name, const void *head, size_t head_bytes, const void *body,
                size_t body_bytes) {
  const size_t length = strlen(name);
  if (w->at >= HM_ZIP_ENTRIES - 1 || body_bytes >= (size_t)HM_ZIP_SMALL ||
      w->file->size + (int64_t)(head_bytes + body_bytes + length) >= HM_ZIP_SMALL)
    return too_large(w);
  hm_zip_entry *e = &w->entry[w->at++];
  *e = (hm_zip_entry){.header = w->file->size, .bytes = (int64_t)(head_bytes + body_bytes)};
  e->packed = e->bytes;
  e->crc = (uint32_t)crc32_z(crc32_z(0, head, head_bytes), body_bytes ? body : (const void *)"", body_bytes);
  e->name = hm__copy_string(name);
  if (!e->name) return HM_ERR_MEMORY;
  uint8_t local[HM_ZIP_LOCAL] = {0};
  memcpy(local, local_magic, 4);
  put_common(local + 4, e);
  int rc = hm__file_write(w->file, local, sizeof local);
  if (!rc) rc = hm__file_write(w->file, name, length);
  if (!rc) rc = hm__file_write(w->file, head, head_bytes);
  return rc ? rc : hm__file_write(w->file, body, body_bytes);
}

int hm__zip_finish(hm_zip_writer *w) {
  const int64_t start = w->file->size;
  int rc = HM_OK;
  for (int i = 0; i < w->at && !rc; i++) {
    const hm_zip_entry *e = &w->entry[i];
    uint8_t record[HM_ZIP_RECORD] = {0};
    memcpy(record, record_magic, 4);
    put16(record + 4, 20);
    put_common(record + 6, e);
    put32(record + 42, (uint32_t)e->header);
    rc = hm__file_write(w->file, record, sizeof record);
    if (!rc) rc = hm__file_write(w->file, e->name, strlen(e->name));
  }
  if (rc) return rc;
  if (w->file->size >= HM_ZIP_SMALL) return too_large(w);
  uint8_t end[HM_ZIP_END] = {0};
  memcpy(end, end_magic, 4);
  put16(end + 8, (uint32_t)w->at);
  put16(end + 10, (uint32_t)w->at);
  put32(end + 12, (uint32_t)(w->file->size - start));
  put32(end + 16, (uint32_t)start);
  return hm__file_write(w->file, end, sizeof end);
}
