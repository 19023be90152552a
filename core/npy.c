/*
 * npy.c -- arrays in NumPy's format: .npy files, and .npz archives of them.
 *
 * The format: 6 bytes "\x93NUMPY", a major and a minor version, the header's size (16 bits in version 1, 32 bits in 2
 * and 3, little-endian), the header, the elements.  The header is the text of a Python dict with exactly the keys
 * descr ('<f4': byte order, kind, bytes), fortran_order and shape.  (Source: NumPy's documentation of
 * numpy.lib.format.)
 *
 * Reading is strict: the header may not promise more than there is, and nothing may follow the data.  Big-endian
 * elements are swapped, arrays in Fortran order put into rows.  Integers that there is no dtype for become the next
 * wider one: int8, int16 and uint16 become int32, uint32 and uint64 (where they fit) int64.  Objects (pickles) are
 * refused: nothing in a file is executed.
 *
 * Writing gives the bytes that NumPy gives.  There is no bfloat16.
 */
#include "file.h"
#include "op.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { HM_NPY_MAX_HEADER = 1 << 20, HM_NPY_ALIGN = 64, HM_NPY_MAGIC = 8, HM_NPY_GROWTH = 21, HM_NPY_CHUNK = 1 << 14 };

/* What a file can hold: kind and bytes of descr, the dtype it becomes.  Where `widened` is set, elements change. */
typedef struct hm_npy_type {
  char kind;
  int bytes;
  int dtype;
  bool widened;
} hm_npy_type;

static const hm_npy_type types[] = {
    {'f', 2, HM_F16, false}, {'f', 4, HM_F32, false}, {'f', 8, HM_F64, false},  {'i', 4, HM_I32, false},
    {'i', 8, HM_I64, false}, {'u', 1, HM_U8, false},  {'b', 1, HM_BOOL, false}, {'i', 1, HM_I32, true},
    {'i', 2, HM_I32, true},  {'u', 2, HM_I32, true},  {'u', 4, HM_I64, true},   {'u', 8, HM_I64, true},
};
enum { HM_NPY_TYPES = sizeof types / sizeof *types };

typedef struct hm_npy_head {
  const hm_npy_type *type;
  bool swapped; /* big-endian elements of more than one byte */
  bool fortran;
  int ndim;
  int64_t shape[HM_MAX_NDIM];
  int64_t numel, bytes; /* of the data in the file */
} hm_npy_head;

/* ====== The header: a small part of Python's syntax ====== */

typedef struct hm_npy_text {
  const char *at, *end;
  const char *path;
} hm_npy_text;

static int bad_header(const hm_npy_text *t, const char *expected) {
  const int left = (int)(t->end - t->at < 24 ? t->end - t->at : 24);
  return hm_fail(HM_ERR_FORMAT, "npy: %s: the header is damaged: expected %s, found \"%.*s\"", t->path, expected, left,
                 t->at);
}

static char peek(hm_npy_text *t) {
  while (t->at < t->end && (*t->at == ' ' || *t->at == '\n' || *t->at == '\t' || *t->at == '\r')) t->at++;
  return t->at < t->end ? *t->at : 0;
}

static bool take(hm_npy_text *t, char c) {
  if (peek(t) != c || c == 0) return false;
  t->at++;
  return true;
}

static bool take_word(hm_npy_text *t, const char *word) {
  const size_t n = strlen(word);
  peek(t);
  if ((size_t)(t->end - t->at) < n || memcmp(t->at, word, n) != 0) return false;
  t->at += n;
  return true;
}

/* A string in either kind of quotes, without escapes; *n: its length. */
static bool take_string(hm_npy_text *t, const char **text, int *n) {
  const char quote = peek(t);
  if (quote != '\'' && quote != '"') return false;
  const char *end = memchr(t->at + 1, quote, (size_t)(t->end - t->at - 1));
  if (!end || end - t->at > 256) return false;
  *text = t->at + 1;
  *n = (int)(end - *text);
  t->at = end + 1;
  return memchr(*text, '\\', (size_t)*n) == NULL;
}

/* A number from 0 to 2^63 - 1; Python 2 wrote an L behind it. */
static bool take_size(hm_npy_text *t, int64_t *out) {
  int digits = 0;
  *out = 0;
  for (peek(t); t->at < t->end && *t->at >= '0' && *t->at <= '9'; t->at++, digits++) {
    if (__builtin_mul_overflow(*out, 10, out) || __builtin_add_overflow(*out, *t->at - '0', out)) return false;
  }
  if (digits > 0 && t->at < t->end && *t->at == 'L') t->at++;
  return digits > 0;
}

static int no_such_type(const hm_npy_text *t, const char *descr, int n) {
  const char kind = n > 1 ? descr[1] : 0;
  const char *hint = kind == 'O'
                         ? "these are Python objects (a pickle), which are never executed: save an array of numbers"
                     : kind == 'c' ? "save the real and the imaginary part"
                     : kind == 'V' ? "save the fields one by one, bfloat16 as float32 or as safetensors"
                                   : "convert it in NumPy: a.astype(\"float32\")";
  return hm_fail(HM_ERR_FORMAT,
                 "npy: %s: elements of type '%.*s' cannot be read: float16 to float64, integers and bool can\n"
                 "  hint: %s",
                 t->path, n, descr, hint);
}

static int parse_descr(hm_npy_text *t, hm_npy_head *h) {
  const char *descr;
  int n;
  if (peek(t) == '[') {
    return hm_fail(HM_ERR_FORMAT,
                   "npy: %s: it holds a structured array: one number for each element was expected\n"
                   "  hint: save its fields one by one",
                   t->path);
  }
  if (!take_string(t, &descr, &n)) return bad_header(t, "a type such as '<f4'");
  if (n < 3 || !strchr("<>|=", descr[0])) return no_such_type(t, descr, n);
  int bytes = 0;
  for (int i = 2; i < n; i++) {
    if (descr[i] < '0' || descr[i] > '9' || bytes > 100) return no_such_type(t, descr, n);
    bytes = bytes * 10 + descr[i] - '0';
  }
  for (int i = 0; i < HM_NPY_TYPES; i++) {
    if (types[i].kind == descr[1] && types[i].bytes == bytes) h->type = &types[i];
  }
  if (!h->type || (bytes > 1 && descr[0] == '|')) return no_such_type(t, descr, n);
  h->swapped = bytes > 1 && descr[0] == '>';
  return HM_OK;
}

static int parse_shape(hm_npy_text *t, hm_npy_head *h) {
  if (!take(t, '(')) return bad_header(t, "a tuple");
  while (!take(t, ')')) {
    if (h->ndim == HM_MAX_NDIM)
      return hm_fail(HM_ERR_FORMAT, "npy: %s: it has more than %d dims", t->path, (int)HM_MAX_NDIM);
    if (!take_size(t, &h->shape[h->ndim])) return bad_header(t, "a size from 0 to 2^63 - 1");
    h->ndim++;
    if (!take(t, ',') && peek(t) != ')') return bad_header(t, "',' or ')'");
  }
  return HM_OK;
}

static int parse_fortran(hm_npy_text *t, hm_npy_head *h) {
  h->fortran = take_word(t, "True");
  return h->fortran || take_word(t, "False") ? HM_OK : bad_header(t, "True or False");
}

/* The dict; each key must be there once. */
static int parse_header(hm_npy_text *t, hm_npy_head *h) {
  static const char *const keys[] = {"descr", "fortran_order", "shape"};
  static int (*const parse[])(hm_npy_text *, hm_npy_head *) = {parse_descr, parse_fortran, parse_shape};
  int seen = 0;
  if (!take(t, '{')) return bad_header(t, "'{'");
  while (!take(t, '}')) {
    const char *key;
    int n, which = -1;
    if (!take_string(t, &key, &n)) return bad_header(t, "a key");
    for (int i = 0; i < 3; i++) {
      if (strlen(keys[i]) == (size_t)n && memcmp(keys[i], key, (size_t)n) == 0) which = i;
    }
    if (which < 0 || seen >> which & 1)
      return hm_fail(HM_ERR_FORMAT, "npy: %s: the header has %s key '%.*s'", t->path,
                     which < 0 ? "an unknown" : "twice the", n, key);
    if (!take(t, ':')) return bad_header(t, "':'");
    int rc = parse[which](t, h);
    if (rc) return rc;
    seen |= 1 << which;
    if (!take(t, ',') && peek(t) != '}') return bad_header(t, "',' or '}'");
  }
  for (int i = 0; i < 3; i++) {
    if (!(seen >> i & 1)) return hm_fail(HM_ERR_FORMAT, "npy: %s: the header has no '%s'", t->path, keys[i]);
  }
  return peek(t) == 0 && t->at == t->end ? HM_OK : bad_header(t, "its end");
}

/* Number of elements and bytes, and whether so many can be there: `left` bytes are. */
static int check_promise(hm_npy_head *h, int64_t left, const char *path) {
  bool empty = false, overflow = false;
  h->numel = 1;
  for (int d = 0; d < h->ndim; d++) {
    if (h->shape[d] == 0) empty = true;
    else if (!overflow) overflow = __builtin_mul_overflow(h->numel, h->shape[d], &h->numel);
  }
  if (!overflow) overflow = __builtin_mul_overflow(h->numel, 8, &h->bytes); /* the widest element, also in memory */
  if (overflow) return hm_fail(HM_ERR_FORMAT, "npy: %s: its shape has more elements than can be counted", path);
  if (empty) h->numel = 0;
  h->bytes = h->numel * h->type->bytes;
  if (h->bytes == left) return HM_OK;
  return hm_fail(HM_ERR_FORMAT, "npy: %s: its header promises %" PRId64 " bytes of data, %" PRId64 " are there%s", path,
                 h->bytes, left,
                 h->bytes > left ? "\n  hint: it may have been cut off" : "\n  hint: a file should hold one array");
}

/* Magic, version, header. */
static int read_head(const hm_npy_source *s, hm_npy_head *h) {
  uint8_t start[HM_NPY_MAGIC + 4] = {0};
  if (s->bytes < HM_NPY_MAGIC + 2)
    return hm_fail(HM_ERR_FORMAT, "npy: %s: %" PRId64 " bytes are too few for any array", s->path, s->bytes);
  int rc = s->read(s->ud, start, HM_NPY_MAGIC);
  if (rc) return rc;
  if (memcmp(start, "\x93NUMPY", 6) != 0)
    return hm_fail(HM_ERR_FORMAT, "npy: %s: it should begin with \"\\x93NUMPY\"\n  hint: is it an npy file?", s->path);
  if (start[6] < 1 || start[6] > 3 || start[7] != 0)
    return hm_fail(HM_ERR_FORMAT, "npy: %s: format version %d.%d: 1.0, 2.0 and 3.0 are supported", s->path, start[6],
                   start[7]);
  const int width = start[6] == 1 ? 2 : 4;
  if (s->bytes < HM_NPY_MAGIC + width) return hm_fail(HM_ERR_FORMAT, "npy: %s: it ends in its header", s->path);
  rc = s->read(s->ud, start + HM_NPY_MAGIC, width);
  if (rc) return rc;
  const int64_t n = (int64_t)start[8] | (int64_t)start[9] << 8 | (int64_t)start[10] << 16 | (int64_t)start[11] << 24;
  const int64_t left = s->bytes - HM_NPY_MAGIC - width;
  if (n > left || n > HM_NPY_MAX_HEADER) {
    return hm_fail(HM_ERR_FORMAT,
                   "npy: %s: the header claims %" PRId64 " bytes: at most %d were expected, %" PRId64 " are left",
                   s->path, n, (int)HM_NPY_MAX_HEADER, left);
  }
  char *text = hm_alloc((size_t)n + 1);
  if (!text) return HM_ERR_MEMORY;
  rc = s->read(s->ud, text, n);
  hm_npy_text t = {text, text + n, s->path};
  if (!rc) rc = parse_header(&t, h);
  if (!rc) rc = check_promise(h, left - n, s->path);
  hm_free(text);
  return rc;
}

/* ====== The data ====== */

static void swap(uint8_t *p, int64_t n, int width) {
  for (int64_t i = 0; i < n; i++, p += width) {
    for (int k = 0; k < width / 2; k++) {
      const uint8_t held = p[k];
      p[k] = p[width - 1 - k];
      p[width - 1 - k] = held;
    }
  }
}

/* Integers that grow: n of them from src into the dtype that they become.  *bad: one does not fit. */
static void widen(const hm_npy_type *type, const uint8_t *src, int64_t n, void *dst, bool *bad) {
#define WIDEN(from, to)                                                                                                \
  for (int64_t i = 0; i < n; i++) {                                                                                    \
    from v;                                                                                                            \
    memcpy(&v, src + i * (int64_t)sizeof v, sizeof v);                                                                 \
    ((to *)dst)[i] = (to)v;                                                                                            \
    if (type->bytes == 8 && ((to *)dst)[i] < 0) *bad = true;                                                           \
  }                                                                                                                    \
  break
  switch (type->kind << 4 | type->bytes) {
  case 'i' << 4 | 1: WIDEN(int8_t, int32_t);
  case 'i' << 4 | 2: WIDEN(int16_t, int32_t);
  case 'u' << 4 | 2: WIDEN(uint16_t, int32_t);
  case 'u' << 4 | 4: WIDEN(uint32_t, int64_t);
  default: WIDEN(uint64_t, int64_t);
  }
#undef WIDEN
}

static int read_widened(const hm_npy_source *s, const hm_npy_head *h, char *dst) {
  uint8_t raw[HM_NPY_CHUNK];
  const int64_t most = HM_NPY_CHUNK / h->type->bytes;
  bool bad = false;
  for (int64_t at = 0; at < h->numel;) {
    const int64_t n = h->numel - at < most ? h->numel - at : most;
    int rc = s->read(s->ud, raw, n * h->type->bytes);
    if (rc) return rc;
    if (h->swapped) swap(raw, n, h->type->bytes);
    widen(h->type, raw, n, dst + at * hm_dtype_size(h->type->dtype), &bad);
    at += n;
  }
  return bad ? hm_fail(HM_ERR_FORMAT, "npy: %s: an unsigned integer is too large for int64", s->path) : HM_OK;
}

static int read_data(const hm_npy_source *s, const hm_npy_head *h, hm_tensor *t) {
  uint8_t *data = hm_tensor_data(t);
  if (h->type->widened) return read_widened(s, h, (char *)data);
  int rc = s->read(s->ud, data, h->bytes);
  if (rc) return rc;
  if (h->swapped) swap(data, h->numel, h->type->bytes);
  if (h->type->dtype != HM_BOOL) return HM_OK;
  for (int64_t i = 0; i < h->numel; i++) { /* kernels rely on it */
    if (data[i] > 1)
      return hm_fail(HM_ERR_FORMAT, "npy: %s: element %" PRId64 " is %d: a bool should be 0 or 1", s->path, i, data[i]);
  }
  return HM_OK;
}

/* An array whose sizes are read backwards, as rows. */
static int from_fortran(hm_tensor **t) {
  int64_t dims[HM_MAX_NDIM];
  const int n = (*t)->ndim;
  hm_tensor *turned = NULL, *rows = NULL;
  for (int d = 0; d < n; d++) dims[d] = n - 1 - d;
  int rc = hm_op_permute(hm_t(*t), n, dims, &turned);
  if (!rc) rc = hm_contiguous(turned, &rows);
  hm_tensor_release(turned);
  if (rc) return rc;
  hm_tensor_release(*t);
  *t = rows;
  return HM_OK;
}

int hm__npy_read(const hm_npy_source *s, hm_tensor **out) {
  hm_npy_head h = {0};
  int rc = read_head(s, &h);
  if (rc) return rc;
  const bool turn = h.fortran && h.ndim > 1;
  int64_t shape[HM_MAX_NDIM];
  for (int d = 0; d < h.ndim; d++) shape[d] = h.shape[turn ? h.ndim - 1 - d : d];
  hm_tensor *t = NULL;
  rc = hm_empty(h.ndim, shape, h.type->dtype, HM_CPU, &t);
  if (!rc) rc = read_data(s, &h, t);
  if (!rc && turn) rc = from_fortran(&t);
  if (rc) {
    hm_tensor_release(t);
    return rc;
  }
  *out = t;
  return HM_OK;
}

/* ====== Files ====== */

typedef struct hm_npy_place {
  hm_file file;
  int64_t at;
} hm_npy_place;

static int read_file(void *ud, void *dst, int64_t bytes) {
  hm_npy_place *p = ud;
  int rc = hm__file_read(&p->file, dst, bytes, p->at);
  p->at += bytes;
  return rc;
}

int hm_npy_read(const char *path, hm_tensor **out) {
  hm_npy_place p = {.at = 0};
  int rc = hm__file_open(&p.file, "npy", path);
  if (rc) return rc;
  const hm_npy_source source = {read_file, &p, p.file.size, path};
  rc = hm__npy_read(&source, out);
  hm__file_close(&p.file);
  return rc;
}

int hm__npy_header(const hm_tensor *t, const char *path, char text[HM_NPY_HEADER]) {
  const hm_npy_type *type = NULL;
  for (int i = 0; i < HM_NPY_TYPES; i++) {
    if (types[i].dtype == t->dtype && !types[i].widened) type = &types[i];
  }
  if (!type) {
    hm_fail(HM_ERR_DTYPE, "npy: %s: the format has no %s\n  hint: save t:float(), or a safetensors file", path,
            hm_dtype_name(t->dtype));
    return 0;
  }
  char first[HM_NPY_GROWTH + 1] = "";
  int n = HM_NPY_MAGIC + 2;
  n += snprintf(text + n, (size_t)(HM_NPY_HEADER - n), "{'descr': '%c%c%d', 'fortran_order': False, 'shape': (",
                type->bytes == 1 ? '|' : '<', type->kind, type->bytes);
  for (int d = 0; d < t->ndim; d++)
    n += snprintf(text + n, (size_t)(HM_NPY_HEADER - n), d == 0 ? "%" PRId64 : ", %" PRId64, t->shape[d]);
  n += snprintf(text + n, (size_t)(HM_NPY_HEADER - n), t->ndim == 1 ? ",), }" : "), }");
  /* NumPy leaves room for the first size to grow, then one to 64 spaces */
  if (t->ndim > 0) n += HM_NPY_GROWTH - snprintf(first, sizeof first, "%" PRId64, t->shape[0]);
  const int padded = n + 1 + HM_NPY_ALIGN - (n + 1) % HM_NPY_ALIGN;
  for (int i = (int)strlen(text + HM_NPY_MAGIC + 2) + HM_NPY_MAGIC + 2; i < padded - 1; i++) text[i] = ' ';
  text[padded - 1] = '\n';
  const int size = padded - HM_NPY_MAGIC - 2;
  const char start[] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0, (char)(size & 0xff), (char)(size >> 8)};
  memcpy(text, start, sizeof start);
  return padded;
}

/* One array on its way into a file or an archive. */
typedef struct hm_npy_job {
  const char *header;
  int header_bytes;
  const void *data;
  size_t bytes;
} hm_npy_job;

static int write_npy(hm_file *f, void *ud) {
  const hm_npy_job *job = ud;
  int rc = hm__file_write(f, job->header, (size_t)job->header_bytes);
  return rc ? rc : hm__file_write(f, job->data, job->bytes);
}

/* Fills in a job; header: its text.  owned: hm_free. */
static int prepare(const hm_tensor *t, const char *path, char header[HM_NPY_HEADER], hm_npy_job *job, void **owned) {
  *owned = NULL;
  job->header = header;
  job->header_bytes = hm__npy_header(t, path, header);
  job->bytes = (size_t)t->numel * (size_t)hm_dtype_size(t->dtype);
  return job->header_bytes ? hm__file_rows(t, &job->data, owned) : HM_ERR_DTYPE;
}

int hm_npy_save(const char *path, hm_tensor *t) {
  char header[HM_NPY_HEADER];
  hm_npy_job job;
  void *owned;
  int rc = prepare(t, path, header, &job, &owned);
  if (!rc) rc = hm__file_replace("npy", path, write_npy, &job);
  hm_free(owned);
  return rc;
}

/* ====== Archives ====== */

struct hm_npz {
  hm_zip zip;
  char *path;
};

int hm_npz_open(const char *path, hm_npz **out) {
  hm_npz *z = hm_calloc(sizeof *z);
  if (!z) return HM_ERR_MEMORY;
  z->zip.file.fd = -1;
  z->path = hm__copy_string(path);
  int rc = z->path ? hm__zip_open(&z->zip, "npz", z->path) : HM_ERR_MEMORY;
  for (int i = 0; i < z->zip.n && !rc; i++) {
    char *name = z->zip.entry[i].name;
    const size_t n = strlen(name);
    if (n > 4 && strcmp(name + n - 4, ".npy") == 0) name[n - 4] = 0;
    else
      rc = hm_fail(HM_ERR_FORMAT, "npz: %s: the entry \"%s\" is no array: a name with .npy was expected", path, name);
  }
  if (rc) {
    hm_npz_close(z);
    return rc;
  }
  *out = z;
  return HM_OK;
}

void hm_npz_close(hm_npz *z) {
  if (!z) return;
  hm__zip_close(&z->zip);
  hm_free(z->path);
  hm_free(z);
}

int hm_npz_count(const hm_npz *z) { return z->zip.n; }

const char *hm_npz_name(const hm_npz *z, int index) {
  return index >= 0 && index < z->zip.n ? z->zip.entry[index].name : NULL;
}

static int read_entry(void *ud, void *dst, int64_t bytes) { return hm__zip_read(ud, dst, bytes); }

int hm_npz_read(const hm_npz *z, int index, hm_tensor **out) {
  if (index < 0 || index >= z->zip.n)
    return hm_fail(HM_ERR_ARG, "npz: %s: there is no array %d, only %d of them", z->path, index, z->zip.n);
  const hm_zip_entry *e = &z->zip.entry[index];
  char place[512];
  snprintf(place, sizeof place, "%s: \"%s\"", z->path, e->name);
  hm_zip_stream *stream = NULL;
  hm_tensor *t = NULL;
  int rc = hm__zip_begin(&z->zip, index, &stream);
  if (rc) return rc;
  const hm_npy_source source = {read_entry, stream, e->bytes, place};
  rc = hm__zip_end(stream, hm__npy_read(&source, &t));
  if (rc) {
    hm_tensor_release(t);
    return rc;
  }
  *out = t;
  return HM_OK;
}

typedef struct hm_npz_job {
  const hm_named *list;
  int n;
} hm_npz_job;

static int write_entry(hm_zip_writer *w, const hm_named *e) {
  char header[HM_NPY_HEADER], name[HM_NPY_HEADER];
  hm_npy_job job;
  void *owned;
  if (snprintf(name, sizeof name, "%s.npy", e->name) >= (int)sizeof name)
    return hm_fail(HM_ERR_ARG, "npz: %s: the name \"%.64s...\" is too long", w->file->path, e->name);
  int rc = prepare(e->tensor, w->file->path, header, &job, &owned);
  if (!rc) rc = hm__zip_add(w, name, header, (size_t)job.header_bytes, job.data, job.bytes);
  hm_free(owned);
  return rc;
}

static int write_npz(hm_file *f, void *ud) {
  const hm_npz_job *job = ud;
  hm_zip_writer w = {f, hm_calloc(((size_t)job->n + 1) * sizeof *w.entry), job->n, 0};
  if (!w.entry) return HM_ERR_MEMORY;
  int rc = HM_OK;
  for (int i = 0; i < job->n && !rc; i++) rc = write_entry(&w, &job->list[i]);
  if (!rc) rc = hm__zip_finish(&w);
  for (int i = 0; i < w.n; i++) hm_free(w.entry[i].name);
  hm_free(w.entry);
  return rc;
}

int hm_npz_save(const char *path, const hm_named *entries, int n) {
  char header[HM_NPY_HEADER];
  for (int i = 0; i < n; i++) { /* what cannot be written is told before anything is */
    if (hm__npy_header(entries[i].tensor, path, header) == 0) return HM_ERR_DTYPE;
    for (int k = 0; k < i; k++) {
      if (strcmp(entries[i].name, entries[k].name) == 0)
        return hm_fail(HM_ERR_ARG, "npz: %s: the name \"%s\" comes twice", path, entries[i].name);
    }
  }
  hm_npz_job job = {entries, n};
  return hm__file_replace("npz", path, write_npz, &job);
}
