/*
 * safetensors.c -- named tensors in a file: 8 bytes of header size (little-endian), a JSON header, then raw row-major
 * data.
 *
 * Reading is strict.  The header is checked as a whole when the file is opened: known dtypes, ranks and sizes that fit,
 * data ranges that lie in the file, do not overlap and leave no hole.  Data are read on demand, straight into the
 * tensor's memory.
 *
 * Writing replaces the target as a whole (file.c): a crash at any moment leaves the old file or the new one.  Tensors
 * are ordered by falling element size, so that every one is aligned; the header is padded to 8 bytes.
 *
 * Where the system refused (HM_ERR_IO), errno is still set when the function returns.  Anything wrong with a file's
 * contents is HM_ERR_FORMAT. An open file (hm_safetensors) owns its descriptor and its table; close it with
 * hm_safetensors_close.  Mutator thread only.
 */
#include "file.h"
#include "op.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "the format is little-endian, and data are copied as they are");

enum { HM_MAX_HEADER = 100 * 1000 * 1000, HM_CHUNK = 1 << 22 };

/* X(dtype, name in files).  Grep HM_DTYPE_MAP when a dtype is added. */
#define HM_ST_DTYPES(X)                                                                                                \
  X(BOOL, "BOOL")                                                                                                      \
  X(U8, "U8")                                                                                                          \
  X(I32, "I32")                                                                                                        \
  X(I64, "I64")                                                                                                        \
  X(F16, "F16")                                                                                                        \
  X(BF16, "BF16")                                                                                                      \
  X(F32, "F32")                                                                                                        \
  X(F64, "F64")                                                                                                        \
  X(F8_E4M3, "F8_E4M3")                                                                                                \
  X(F8_E5M2, "F8_E5M2")

static const char *file_dtype(int dtype) {
  switch (dtype) {
#define X(id, name)                                                                                                    \
  case HM_##id: return name;
    HM_ST_DTYPES(X)
#undef X
  default: return NULL;
  }
}

/* dtype of a file's name for it, or HM_NONE. */
static int parse_dtype(const char *name) {
#define X(id, text)                                                                                                    \
  if (strcmp(name, text) == 0) return HM_##id;
  HM_ST_DTYPES(X)
#undef X
  return HM_NONE;
}

/* ====== Reading ====== */

typedef struct hm_st_entry {
  const char *name; /* borrowed from the header */
  int dtype, ndim;
  int64_t shape[HM_MAX_NDIM];
  int64_t begin, end; /* relative to the data */
  int order;          /* place in the header */
} hm_st_entry;

struct hm_safetensors {
  hm_file file;
  char *path;
  json_t *root;        /* the header; names and metadata point into it */
  int64_t data_offset; /* of the data, in the file */
  int64_t data_bytes;
  hm_st_entry *entry; /* in the order of their data */
  int n;
  hm_pair *meta;
  int n_meta;
};

/* An integer >= 0 from the header. */
static bool get_size(const json_t *value, int64_t *out) {
  if (!json_is_integer(value)) return false;
  *out = json_integer_value(value);
  return *out >= 0;
}

/* The kind of a JSON value, for messages. */
static const char *json_kind(const json_t *value) {
  if (!value) return "nothing";
  switch (json_typeof(value)) {
  case JSON_OBJECT: return "an object";
  case JSON_ARRAY: return "an array";
  case JSON_STRING: return "a string";
  case JSON_INTEGER: return "an integer";
  case JSON_REAL: return "a fraction";
  case JSON_NULL: return "null";
  default: return "a boolean";
  }
}

static int entry_fail(const hm_safetensors *f, const char *name, const char *field, const char *expected,
                      const json_t *value) {
  return hm_fail(HM_ERR_FORMAT, "safetensors: %s: tensor \"%s\": %s should be %s, found %s", f->path, name, field,
                 expected, json_kind(value));
}

/* Reads a tensor's shape; *bytes is the size of its data. */
static int parse_shape(const hm_safetensors *f, const json_t *shape, hm_st_entry *e, int64_t *bytes) {
  if (!json_is_array(shape)) return entry_fail(f, e->name, "shape", "an array", shape);
  size_t n = json_array_size(shape);
  if (n > HM_MAX_NDIM) {
    return hm_fail(HM_ERR_FORMAT, "safetensors: %s: tensor \"%s\" has %zu dims: at most %d are supported", f->path,
                   e->name, n, (int)HM_MAX_NDIM);
  }
  e->ndim = (int)n;
  bool empty = false, overflow = false;
  *bytes = hm_dtype_size(e->dtype);
  for (int d = 0; d < e->ndim; d++) {
    const json_t *size = json_array_get(shape, (size_t)d);
    if (!get_size(size, &e->shape[d])) return entry_fail(f, e->name, "a size in shape", "an integer >= 0", size);
    if (e->shape[d] == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(*bytes, e->shape[d], bytes)) {
      overflow = true;
      *bytes = 1;
    }
  }
  if (overflow)
    return hm_fail(HM_ERR_FORMAT, "safetensors: %s: tensor \"%s\": its shape has more elements than can be counted",
                   f->path, e->name);
  if (empty) *bytes = 0;
  return HM_OK;
}

/* Reads a tensor's data_offsets and holds them against its size and the file's. */
static int parse_offsets(const hm_safetensors *f, const json_t *offsets, int64_t bytes, hm_st_entry *e) {
  if (json_array_size(offsets) != 2) return entry_fail(f, e->name, "data_offsets", "an array of 2 integers", offsets);
  const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
  if (!get_size(begin, &e->begin)) return entry_fail(f, e->name, "data_offsets[0]", "an integer >= 0", begin);
  if (!get_size(end, &e->end)) return entry_fail(f, e->name, "data_offsets[1]", "an integer >= 0", end);
  if (e->end < e->begin || e->end > f->data_bytes) {
    return hm_fail(HM_ERR_FORMAT,
                   "safetensors: %s: tensor \"%s\": data_offsets [%" PRId64 ", %" PRId64
                   "] do not lie in the data, which are %" PRId64 " bytes long\n  hint: the file may have been cut off",
                   f->path, e->name, e->begin, e->end, f->data_bytes);
  }
  if (e->end - e->begin != bytes) {
    return hm_fail(HM_ERR_FORMAT,
                   "safetensors: %s: tensor \"%s\": its dtype and shape make %" PRId64
                   " bytes, its data_offsets [%" PRId64 ", %" PRId64 "] %" PRId64,
                   f->path, e->name, bytes, e->begin, e->end, e->end - e->begin);
  }
  return HM_OK;
}

static int parse_entry(const hm_safetensors *f, const char *name, const json_t *value, hm_st_entry *e) {
  e->name = name;
  if (!json_is_object(value)) return entry_fail(f, name, "its entry", "an object", value);
  const char *key;
  json_t *item;
  json_object_foreach((json_t *)value, key, item) {
    if (strcmp(key, "dtype") != 0 && strcmp(key, "shape") != 0 && strcmp(key, "data_offsets") != 0) {
      return hm_fail(HM_ERR_FORMAT, "safetensors: %s: tensor \"%s\": unknown field \"%s\"", f->path, name, key);
    }
  }
  const json_t *dtype = json_object_get(value, "dtype");
  if (!json_is_string(dtype)) return entry_fail(f, name, "dtype", "a string", dtype);
  e->dtype = parse_dtype(json_string_value(dtype));
  if (e->dtype == HM_NONE) {
    return hm_fail(
        HM_ERR_FORMAT,
        "safetensors: %s: tensor \"%s\" has dtype %s: BOOL U8 I32 I64 F8_E4M3 F8_E5M2 F16 BF16 F32 F64 are supported",
        f->path, name, json_string_value(dtype));
  }
  int64_t bytes = 0;
  int rc = parse_shape(f, json_object_get(value, "shape"), e, &bytes);
  return rc ? rc : parse_offsets(f, json_object_get(value, "data_offsets"), bytes, e);
}

static int parse_metadata(hm_safetensors *f, json_t *object) {
  if (!json_is_object(object)) {
    return hm_fail(HM_ERR_FORMAT, "safetensors: %s: __metadata__ should be an object, found %s", f->path,
                   json_kind(object));
  }
  f->meta = hm_alloc((json_object_size(object) + 1) * sizeof *f->meta);
  if (!f->meta) return HM_ERR_MEMORY;
  const char *key;
  json_t *value;
  json_object_foreach(object, key, value) {
    if (!json_is_string(value)) {
      return hm_fail(HM_ERR_FORMAT, "safetensors: %s: __metadata__ \"%s\" should be a string, found %s", f->path, key,
                     json_kind(value));
    }
    f->meta[f->n_meta++] = (hm_pair){key, json_string_value(value)};
  }
  return HM_OK;
}

static int compare_entries(const void *a, const void *b) {
  const hm_st_entry *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->end != y->end) return x->end < y->end ? -1 : 1;
  return (x->order > y->order) - (x->order < y->order);
}

/* Sorts the entries by place; their ranges must cover the data exactly. */
static int check_cover(hm_safetensors *f) {
  if (f->n > 1) qsort(f->entry, (size_t)f->n, sizeof *f->entry, compare_entries);
  int64_t at = 0;
  for (int i = 0; i < f->n; i++) {
    const hm_st_entry *e = &f->entry[i];
    if (e->begin < at) {
      return hm_fail(HM_ERR_FORMAT,
                     "safetensors: %s: tensor \"%s\" begins at %" PRId64
                     ", inside tensor \"%s\", which ends at %" PRId64,
                     f->path, e->name, e->begin, f->entry[i - 1].name, at);
    }
    if (e->begin > at) {
      return hm_fail(HM_ERR_FORMAT,
                     "safetensors: %s: bytes %" PRId64 " to %" PRId64
                     " of the data, before tensor \"%s\", belong to no tensor",
                     f->path, at, e->begin, e->name);
    }
    at = e->end;
  }
  if (at == f->data_bytes) return HM_OK;
  return hm_fail(HM_ERR_FORMAT,
                 "safetensors: %s: the tensors end at byte %" PRId64 " of the data, the file has %" PRId64, f->path, at,
                 f->data_bytes);
}

/* Fills the tables from the parsed header. */
static int parse_header(hm_safetensors *f) {
  if (!json_is_object(f->root)) {
    return hm_fail(HM_ERR_FORMAT, "safetensors: %s: the header should be a JSON object, found %s", f->path,
                   json_kind(f->root));
  }
  f->entry = hm_calloc((json_object_size(f->root) + 1) * sizeof *f->entry);
  if (!f->entry) return HM_ERR_MEMORY;
  const char *key;
  json_t *value;
  json_object_foreach(f->root, key, value) {
    bool meta = strcmp(key, "__metadata__") == 0;
    int rc = meta ? parse_metadata(f, value) : parse_entry(f, key, value, &f->entry[f->n]);
    if (rc) return rc;
    if (meta) continue;
    f->entry[f->n].order = f->n;
    f->n++;
  }
  return check_cover(f);
}

/* Reads and parses the JSON text of `bytes` bytes. */
static int read_header(hm_safetensors *f, int64_t bytes) {
  char *text = hm_alloc((size_t)bytes);
  if (!text) return HM_ERR_MEMORY;
  int rc = hm__file_read(&f->file, text, bytes, 8);
  if (!rc && text[0] != '{') {
    rc = hm_fail(
        HM_ERR_FORMAT,
        "safetensors: %s: the header should begin with '{', found byte 0x%02x\n  hint: is it a safetensors file?",
        f->path, (unsigned char)text[0]);
  }
  if (!rc) {
    json_error_t error;
    f->root = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &error);
    if (!f->root) {
      rc = hm_fail(HM_ERR_FORMAT, "safetensors: %s: the header is not valid JSON: %s (byte %d of %" PRId64 ")", f->path,
                   error.text, error.position, bytes);
    }
  }
  hm_free(text);
  return rc ? rc : parse_header(f);
}

/* Checks sizes, then the header. */
static int check_file(hm_safetensors *f) {
  int64_t size = f->file.size;
  if (size < 10) {
    return hm_fail(HM_ERR_FORMAT, "safetensors: %s: the file is %" PRId64 " bytes long, too short for any header",
                   f->path, size);
  }
  uint64_t header = 0;
  int rc = hm__file_read(&f->file, &header, 8, 0);
  if (rc) return rc;
  if (header > HM_MAX_HEADER || header < 2 || (int64_t)header > size - 8) {
    return hm_fail(HM_ERR_FORMAT,
                   "safetensors: %s: the header claims %" PRIu64
                   " bytes: 2 to %d were expected, and the file has %" PRId64
                   " after the size\n  hint: is it a safetensors file, or was it cut off?",
                   f->path, header, (int)HM_MAX_HEADER, size - 8);
  }
  f->data_offset = 8 + (int64_t)header;
  f->data_bytes = size - f->data_offset;
  return read_header(f, (int64_t)header);
}

int hm_safetensors_open(const char *path, hm_safetensors **out) {
  hm_safetensors *f = hm_calloc(sizeof *f);
  if (!f) return HM_ERR_MEMORY;
  f->file.fd = -1;
  f->path = hm__copy_string(path);
  int rc = f->path ? hm__file_open(&f->file, "safetensors", f->path) : HM_ERR_MEMORY;
  if (!rc) rc = check_file(f);
  if (rc) {
    int saved = errno;
    hm_safetensors_close(f);
    errno = saved;
    return rc;
  }
  *out = f;
  return HM_OK;
}

void hm_safetensors_close(hm_safetensors *f) {
  if (!f) return;
  hm__file_close(&f->file);
  json_decref(f->root);
  hm_free(f->entry);
  hm_free(f->meta);
  hm_free(f->path);
  hm_free(f);
}

int hm_safetensors_count(const hm_safetensors *f) { return f->n; }

const char *hm_safetensors_name(const hm_safetensors *f, int index) {
  return index >= 0 && index < f->n ? f->entry[index].name : NULL;
}

int hm_safetensors_metadata_count(const hm_safetensors *f) { return f->n_meta; }

hm_pair hm_safetensors_metadata(const hm_safetensors *f, int index) {
  return index >= 0 && index < f->n_meta ? f->meta[index] : (hm_pair){NULL, NULL};
}

/* Data for a device that the system cannot read into: through a buffer. */
static int read_to_device(const hm_safetensors *f, const hm_st_entry *e, hm_tensor *t) {
  const hm_backend *backend = hm_device_backend(hm_tensor_device(t));
  if (!backend) return HM_ERR_DEVICE;
  void *buffer = hm_alloc(HM_CHUNK);
  if (!buffer) return HM_ERR_MEMORY;
  int rc = HM_OK;
  for (int64_t at = e->begin; at < e->end && !rc;) {
    int64_t bytes = e->end - at < HM_CHUNK ? e->end - at : HM_CHUNK;
    rc = hm__file_read(&f->file, buffer, bytes, f->data_offset + at);
    if (!rc) rc = backend->mem_from_host((char *)hm_tensor_data(t) + (at - e->begin), buffer, (size_t)bytes, NULL);
    at += bytes;
  }
  hm_free(buffer);
  return rc;
}

/* Kernels rely on bools being 0 or 1. */
static int check_bools(const hm_safetensors *f, const hm_st_entry *e, const uint8_t *data) {
  for (int64_t i = 0; i < e->end - e->begin; i++) {
    if (data[i] <= 1) continue;
    return hm_fail(HM_ERR_FORMAT, "safetensors: %s: tensor \"%s\": element %" PRId64 " is %d: a BOOL should be 0 or 1",
                   f->path, e->name, i, data[i]);
  }
  return HM_OK;
}

int hm_safetensors_read(hm_safetensors *f, int index, int device, hm_tensor **out) {
  if (index < 0 || index >= f->n) {
    return hm_fail(HM_ERR_ARG, "safetensors: %s: there is no tensor %d, only %d of them", f->path, index, f->n);
  }
  const hm_st_entry *e = &f->entry[index];
  bool through_cpu = device != HM_CPU && e->dtype == HM_BOOL;
  hm_tensor *t = NULL;
  int rc = hm_empty(e->ndim, e->shape, e->dtype, through_cpu ? HM_CPU : device, &t);
  if (rc) return rc;
  if (hm_tensor_device(t) == HM_CPU) {
    rc = hm__file_read(&f->file, hm_tensor_data(t), e->end - e->begin, f->data_offset + e->begin);
    if (!rc && e->dtype == HM_BOOL) rc = check_bools(f, e, hm_tensor_data(t));
  } else {
    rc = read_to_device(f, e, t);
  }
  if (!rc && through_cpu) {
    hm_tensor *there = NULL;
    rc = hm_to(t, HM_NONE, device, false, &there);
    hm_tensor_release(t);
    t = there;
  }
  if (rc) {
    hm_tensor_release(t);
    return rc;
  }
  *out = t;
  return HM_OK;
}

/* ====== Writing ====== */

typedef struct hm_st_plan {
  hm_tensor *tensor; /* borrowed */
  const char *name;
  int order;
} hm_st_plan;

static int64_t tensor_bytes(const hm_tensor *t) { return t->numel * hm_dtype_size(t->dtype); }

/* Wider elements first, then as given. */
static int compare_plans(const void *a, const void *b) {
  const hm_st_plan *x = a, *y = b;
  int bx = hm_dtype_size(x->tensor->dtype), by = hm_dtype_size(y->tensor->dtype);
  if (bx != by) return bx > by ? -1 : 1;
  return (x->order > y->order) - (x->order < y->order);
}

/* One more member of an object: takes value over. */
static int put(json_t *object, const char *path, const char *what, const char *key, json_t *value) {
  json_t *text = json_string(key);
  bool valid = text != NULL;
  json_decref(text);
  if (!valid) {
    json_decref(value);
    return hm_fail(HM_ERR_ARG, "safetensors: %s: the %s \"%s\" is not valid UTF-8", path, what, key);
  }
  if (json_object_get(object, key)) {
    json_decref(value);
    return hm_fail(HM_ERR_ARG, "safetensors: %s: the %s \"%s\" comes twice", path, what, key);
  }
  if (!value || json_object_set_new(object, key, value) != 0)
    return hm_fail(HM_ERR_MEMORY, "safetensors: %s: out of memory", path);
  return HM_OK;
}

static int describe_metadata(json_t *root, const char *path, const hm_pair *metadata, int n) {
  if (n == 0) return HM_OK;
  json_t *object = json_object();
  int rc = put(root, path, "tensor name", "__metadata__", object);
  for (int i = 0; i < n && !rc; i++) {
    json_t *value = json_string(metadata[i].value);
    if (!value)
      return hm_fail(HM_ERR_ARG, "safetensors: %s: the metadata of \"%s\" is not valid UTF-8", path, metadata[i].key);
    rc = put(object, path, "metadata key", metadata[i].key, value);
  }
  return rc;
}

static int describe_tensor(json_t *root, const char *path, const hm_st_plan *p, int64_t begin) {
  if (strcmp(p->name, "__metadata__") == 0)
    return hm_fail(HM_ERR_ARG, "safetensors: %s: no tensor may be called __metadata__", path);
  json_t *shape = json_array();
  for (int d = 0; d < p->tensor->ndim; d++) json_array_append_new(shape, json_integer(p->tensor->shape[d]));
  json_int_t end = begin + tensor_bytes(p->tensor);
  json_t *value = json_pack("{s:s, s:o, s:[I, I]}", "dtype", file_dtype(p->tensor->dtype), "shape", shape,
                            "data_offsets", (json_int_t)begin, end);
  return put(root, path, "tensor name", p->name, value);
}

/* The header's JSON text, padded with spaces so that the data begin at a multiple of 8. */
static int header_text(const char *path, const hm_st_plan *plan, int n, const hm_pair *metadata, int n_metadata,
                       char **text, size_t *bytes) {
  json_t *root = json_object();
  if (!root) return hm_fail(HM_ERR_MEMORY, "safetensors: %s: out of memory", path);
  int64_t at = 0;
  int rc = describe_metadata(root, path, metadata, n_metadata);
  for (int i = 0; i < n && !rc; i++) {
    rc = describe_tensor(root, path, &plan[i], at);
    at += tensor_bytes(plan[i].tensor);
  }
  size_t length = rc ? 0 : json_dumpb(root, NULL, 0, JSON_COMPACT);
  size_t padded = (length + 7) / 8 * 8;
  if (!rc && padded > HM_MAX_HEADER) {
    rc = hm_fail(HM_ERR_ARG, "safetensors: %s: the header would be %zu bytes long, at most %d are allowed", path,
                 padded, (int)HM_MAX_HEADER);
  }
  char *buffer = NULL;
  if (!rc) {
    buffer = length ? hm_alloc(padded) : NULL;
    if (!buffer || json_dumpb(root, buffer, length, JSON_COMPACT) != length)
      rc = hm_fail(HM_ERR_MEMORY, "safetensors: %s: out of memory", path);
  }
  json_decref(root);
  if (rc) {
    hm_free(buffer);
    return rc;
  }
  memset(buffer + length, ' ', padded - length);
  *text = buffer;
  *bytes = padded;
  return HM_OK;
}

/* What is to be written. */
typedef struct hm_st_job {
  const char *header;
  size_t header_bytes;
  const hm_st_plan *plan;
  int n;
} hm_st_job;

/* Writes a tensor's elements in row-major order. */
static int write_tensor(hm_file *f, const hm_tensor *t) {
  const void *data;
  void *owned;
  int rc = hm__file_rows(t, &data, &owned);
  if (!rc) rc = hm__file_write(f, data, (size_t)tensor_bytes(t));
  hm_free(owned);
  return rc;
}

static int write_all(hm_file *f, void *ud) {
  const hm_st_job *job = ud;
  uint64_t size = job->header_bytes;
  int rc = hm__file_write(f, &size, sizeof size);
  if (!rc) rc = hm__file_write(f, job->header, job->header_bytes);
  for (int i = 0; i < job->n && !rc; i++) rc = write_tensor(f, job->plan[i].tensor);
  return rc;
}

int hm_safetensors_save(const char *path, const hm_named *entries, int n, const hm_pair *metadata, int n_metadata) {
  hm_st_plan *plan = hm_alloc(((size_t)n + 1) * sizeof *plan);
  if (!plan) return HM_ERR_MEMORY;
  for (int i = 0; i < n; i++) plan[i] = (hm_st_plan){entries[i].tensor, entries[i].name, i};
  if (n > 1) qsort(plan, (size_t)n, sizeof *plan, compare_plans);
  char *header = NULL;
  size_t header_bytes = 0;
  int rc = header_text(path, plan, n, metadata, n_metadata, &header, &header_bytes);
  if (!rc) {
    hm_st_job job = {header, header_bytes, plan, n};
    rc = hm__file_replace("safetensors", path, write_all, &job);
  }
  hm_free(header);
  hm_free(plan);
  return rc;
}
