/*
 * csv.c -- tables as text: numbers in columns, with or without a line of names.
 *
 * A line ends with LF or CR LF.  A field may stand in double quotes, and then hold the delimiter, line ends, and quotes
 * written twice (RFC 4180).  Spaces around numbers do not matter; lines with nothing in them are passed over; a
 * byte-order mark at the beginning is, too.  All other lines must have as many fields as the first.
 *
 * Numbers are read as in C, whatever the locale: decimal or scientific, "nan" and "inf"; straight to float32 or float64,
 * integers exactly.  An empty field is NaN; in integer dtypes it is an error.  Errors tell line and column.
 *
 * An open table owns its text; close it with hm_csv_close.  Mutator thread only.
 */
#define _GNU_SOURCE /* strtof_l, strtod_l */
#include "file.h"
#include "op.h"

#include <errno.h>
#include <inttypes.h>
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"

enum { HM_CSV_COLUMNS = 1 << 16, HM_CSV_SHOWN = 40 };

struct hm_csv {
  char *path;
  char *text; /* zero-ended; names are decoded in place */
  int64_t size;
  locale_t locale;
  char delimiter;
  char **name; /* of each column; NULL without a header */
  int columns;
  int64_t body, body_line; /* where the rows begin */
};

/* A place in the text. */
typedef struct hm_csv_cursor {
  char *at;
  int64_t line, field_line; /* of the place, and of the last field's beginning */
} hm_csv_cursor;

/* A field: its text, in quotes or not, without them. */
typedef struct hm_csv_field {
  char *begin, *end;
  bool quoted, last; /* last in its line */
} hm_csv_field;

static int broken(const hm_csv *c, int64_t line, const char *what) {
  return hm_fail(HM_ERR_FORMAT, "csv: %s:%" PRId64 ": %s", c->path, line, what);
}

/* ====== Fields ====== */

/* Passes over lines with nothing in them; false at the end of the text. */
static bool to_row(const hm_csv *c, hm_csv_cursor *p) {
  while (*p->at == '\n' || (*p->at == '\r' && p->at[1] == '\n')) {
    p->at += *p->at == '\r' ? 2 : 1;
    p->line++;
  }
  return p->at < c->text + c->size;
}

/* Behind a field: the delimiter, or the line's end. */
static int end_field(const hm_csv *c, hm_csv_cursor *p, hm_csv_field *f) {
  if (*p->at == c->delimiter && p->at < c->text + c->size) {
    p->at++;
    f->last = false;
    return HM_OK;
  }
  f->last = true;
  if (*p->at == '\r' && p->at[1] == '\n') p->at++;
  if (*p->at == '\n') {
    p->at++;
    p->line++;
    return HM_OK;
  }
  return p->at == c->text + c->size ? HM_OK : broken(c, p->line, "text behind a quoted field");
}

static int next_field(const hm_csv *c, hm_csv_cursor *p, hm_csv_field *f) {
  p->field_line = p->line;
  f->quoted = *p->at == '"';
  if (!f->quoted) {
    f->begin = p->at;
    while (*p->at != c->delimiter && *p->at != '\n' && p->at < c->text + c->size) p->at++;
    f->end = p->at;
    if (*p->at == '\n' && f->end > f->begin && f->end[-1] == '\r') p->at = --f->end;
    return end_field(c, p, f);
  }
  f->begin = ++p->at;
  for (;; p->at++) {
    if (p->at == c->text + c->size) return broken(c, p->field_line, "a quoted field has no end");
    if (*p->at == '\n') p->line++;
    if (*p->at != '"') continue;
    if (p->at[1] != '"') break;
    p->at++;
  }
  f->end = p->at++;
  return end_field(c, p, f);
}

static void trim(hm_csv_field *f) {
  while (f->begin < f->end && (*f->begin == ' ' || *f->begin == '\t')) f->begin++;
  while (f->begin < f->end && (f->end[-1] == ' ' || f->end[-1] == '\t')) f->end--;
}

/* A float field's value; false if it is no number.  The character behind it ends it, whatever it is. */
static bool parse_float(const hm_csv *c, hm_csv_field f, bool single, double *value) {
  trim(&f);
  *value = NAN;
  if (f.begin == f.end) return true;
  if (f.end - f.begin > 1 &&
      (memchr(f.begin, 'x', (size_t)(f.end - f.begin)) || memchr(f.begin, 'X', (size_t)(f.end - f.begin))))
    return false; /* C would take it for hexadecimal */
  char *stop;
  const char held = *f.end;
  *f.end = 0;
  *value = single ? (double)strtof_l(f.begin, &stop, c->locale) : strtod_l(f.begin, &stop, c->locale);
  *f.end = held;
  return stop == f.end;
}

static bool parse_integer(hm_csv_field f, int64_t low, int64_t high, int64_t *value) {
  trim(&f);
  if (f.begin == f.end || *f.begin == '\n' || *f.begin == '\r') return false;
  char *stop;
  const char held = *f.end;
  *f.end = 0;
  errno = 0;
  *value = strtoll(f.begin, &stop, 10);
  *f.end = held;
  return errno == 0 && stop == f.end && *value >= low && *value <= high;
}

/* ====== The header ====== */

/* A name: quotes written twice become one; zero-ended. */
static char *decode(hm_csv_field *f) {
  char *out = f->begin;
  if (!f->quoted) trim(f);
  char *name = out = f->begin;
  for (const char *in = f->begin; in < f->end; in++) {
    *out++ = *in;
    if (f->quoted && *in == '"') in++;
  }
  *out = 0; /* the closing quote, delimiter or line end, which was read */
  return name;
}

/* Counts the first line's fields; *numbers: all of them are numbers. */
static int look(hm_csv *c, hm_csv_cursor p, bool *numbers) {
  hm_csv_field f = {.last = false};
  *numbers = true;
  for (c->columns = 0; !f.last; c->columns++) {
    int rc = next_field(c, &p, &f);
    if (rc) return rc;
    if (c->columns == HM_CSV_COLUMNS) return broken(c, p.line, "more than 65,536 columns");
    double value;
    if (*numbers) *numbers = parse_float(c, f, false, &value);
  }
  return HM_OK;
}

static int read_names(hm_csv *c, hm_csv_cursor *p) {
  c->name = hm_calloc((size_t)c->columns * sizeof *c->name);
  if (!c->name) return HM_ERR_MEMORY;
  for (int i = 0; i < c->columns; i++) {
    hm_csv_field f;
    int rc = next_field(c, p, &f);
    if (rc) return rc;
    c->name[i] = decode(&f);
  }
  return HM_OK;
}

static int open_text(hm_csv *c, const hm_csv_options *o) {
  if (o->delimiter == '"' || o->delimiter == '\n' || o->delimiter == '\r' || o->delimiter == 0)
    return hm_fail(HM_ERR_ARG, "csv: %s: the delimiter may not be a quote, a line end or a zero", c->path);
  c->delimiter = o->delimiter;
  c->locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
  if (!c->locale) return hm_fail(HM_ERR_MEMORY, "csv: %s: out of memory", c->path);
  hm_csv_cursor p = {c->text, 1, 1};
  if (strncmp(c->text, "\xef\xbb\xbf", 3) == 0) p.at += 3;
  if (!to_row(c, &p)) return hm_fail(HM_ERR_FORMAT, "csv: %s: there is nothing in it", c->path);
  bool numbers;
  int rc = look(c, p, &numbers);
  if (!rc && (o->header > 0 || (o->header < 0 && !numbers))) rc = read_names(c, &p);
  c->body = p.at - c->text;
  c->body_line = p.line;
  return rc;
}

int hm_csv_open(const char *path, const hm_csv_options *options, hm_csv **out) {
  hm_file f;
  int rc = hm__file_open(&f, "csv", path);
  if (rc) return rc;
  hm_csv *c = hm_calloc(sizeof *c);
  rc = c ? hm__file_slurp(&f, &c->text) : HM_ERR_MEMORY;
  hm__file_close(&f);
  if (!rc) {
    c->size = f.size;
    c->path = hm__copy_string(path);
    rc = c->path ? open_text(c, options) : HM_ERR_MEMORY;
  }
  if (rc) {
    int saved = errno;
    hm_csv_close(c);
    errno = saved;
    return rc;
  }
  *out = c;
  return HM_OK;
}

void hm_csv_close(hm_csv *c) {
  if (!c) return;
  if (c->locale) freelocale(c->locale);
  hm_free(c->name);
  hm_free(c->text);
  hm_free(c->path);
  hm_free(c);
}

int hm_csv_columns(const hm_csv *c) { return c->columns; }

const char *hm_csv_name(const hm_csv *c, int column) {
  return c->name && column >= 0 && column < c->columns ? c->name[column] : NULL;
}

/* ====== The rows ====== */

/* Where a column's value goes in its row. */
typedef struct hm_csv_target {
  const int *first; /* of each column: its first place in a row, or -1 */
  const int *next;  /* of each place: the next one of the same column, or -1 */
  int n, dtype;
  char *data;
} hm_csv_target;

static void range_of(int dtype, int64_t *low, int64_t *high) {
  *low = dtype == HM_I64 ? INT64_MIN : dtype == HM_I32 ? INT32_MIN : 0;
  *high = dtype == HM_I64 ? INT64_MAX : dtype == HM_I32 ? INT32_MAX : dtype == HM_U8 ? 255 : 1;
}

static void put_float(double value, int dtype, void *out) {
  switch (dtype) {
  case HM_F64: *(double *)out = value; break;
  case HM_F32: *(float *)out = (float)value; break;
  case HM_F16: *(uint16_t *)out = hm_f64_to_f16(value); break;
  case HM_BF16: *(uint16_t *)out = hm_f64_to_bf16(value); break;
  case HM_F8_E4M3: *(uint8_t *)out = hm_f64_to_e4m3(value); break;
  default: *(uint8_t *)out = hm_f64_to_e5m2(value); break;
  }
}

/* The value of a field in its dtype's bytes; false if it has none. */
static bool parse_value(const hm_csv *c, const hm_csv_field *f, int dtype, void *out) {
  if (hm_dtype_is_float(dtype)) {
    double value;
    if (!parse_float(c, *f, dtype == HM_F32, &value)) return false;
    put_float(value, dtype, out);
    return true;
  }
  int64_t value, low, high;
  range_of(dtype, &low, &high);
  if (!parse_integer(*f, low, high, &value)) return false;
  if (dtype == HM_I64) *(int64_t *)out = value;
  else if (dtype == HM_I32) *(int32_t *)out = (int32_t)value;
  else *(uint8_t *)out = (uint8_t)value;
  return true;
}

static int no_number(const hm_csv *c, const hm_csv_field *f, int64_t line, int column, int dtype) {
  const int n = (int)(f->end - f->begin < HM_CSV_SHOWN ? f->end - f->begin : HM_CSV_SHOWN);
  const char *name = hm_csv_name(c, column);
  return hm_fail(HM_ERR_FORMAT,
                 "csv: %s:%" PRId64 ": column %d%s%s%s: \"%.*s\" is no %s number\n"
                 "  hint: choose the columns that hold numbers: columns = {...}",
                 c->path, line, column + 1, name ? " (" : "", name ? name : "", name ? ")" : "", n, f->begin,
                 hm_dtype_name(dtype));
}

/* One row into the target's row `row`. */
static int read_row(const hm_csv *c, hm_csv_cursor *p, const hm_csv_target *t, int64_t row) {
  const int size = hm_dtype_size(t->dtype);
  const int64_t line = p->line;
  hm_csv_field f = {.last = false};
  int k = 0;
  for (; !f.last; k++) {
    int rc = next_field(c, p, &f);
    if (rc) return rc;
    if (k >= c->columns) continue;
    for (int place = t->first[k]; place >= 0; place = t->next[place]) {
      if (!parse_value(c, &f, t->dtype, t->data + (row * t->n + place) * size))
        return no_number(c, &f, p->field_line, k, t->dtype);
    }
  }
  if (k == c->columns) return HM_OK;
  return hm_fail(HM_ERR_FORMAT, "csv: %s:%" PRId64 ": the line has %d field%s, the first one %d", c->path, line, k,
                 k == 1 ? "" : "s", c->columns);
}

static int count_rows(const hm_csv *c, int64_t *rows) {
  hm_csv_cursor p = {c->text + c->body, c->body_line, 0};
  for (*rows = 0; to_row(c, &p); ++*rows) {
    hm_csv_field f = {.last = false};
    while (!f.last) {
      int rc = next_field(c, &p, &f);
      if (rc) return rc;
    }
  }
  return HM_OK;
}

static int read_rows(const hm_csv *c, const hm_csv_target *t, int64_t rows) {
  hm_csv_cursor p = {c->text + c->body, c->body_line, 0};
  for (int64_t row = 0; row < rows; row++) {
    to_row(c, &p);
    int rc = read_row(c, &p, t, row);
    if (rc) return rc;
  }
  return HM_OK;
}

int hm_csv_read(hm_csv *c, const int *columns, int n, int dtype, hm_tensor **out) {
  int64_t rows = 0;
  int rc = count_rows(c, &rows);
  if (rc) return rc;
  int *first = hm_alloc(((size_t)c->columns + (size_t)n + 1) * sizeof *first);
  if (!first) return HM_ERR_MEMORY;
  int *next = first + c->columns;
  for (int i = 0; i < c->columns; i++) first[i] = -1;
  for (int i = n - 1; i >= 0 && !rc; i--) {
    if (columns[i] < 0 || columns[i] >= c->columns) {
      rc = hm_fail(HM_ERR_ARG, "csv: %s: there is no column %d, only %d of them", c->path, columns[i] + 1, c->columns);
    } else {
      next[i] = first[columns[i]];
      first[columns[i]] = i;
    }
  }
  hm_tensor *t = NULL;
  if (!rc) rc = hm_empty(2, (const int64_t[]){rows, n}, dtype, HM_CPU, &t);
  if (!rc) {
    const hm_csv_target target = {first, next, n, dtype, hm_tensor_data(t)};
    rc = read_rows(c, &target, rows);
  }
  hm_free(first);
  if (rc) {
    hm_tensor_release(t);
    return rc;
  }
  *out = t;
  return HM_OK;
}
