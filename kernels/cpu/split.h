/*
 * split.h -- a tensor's dims split into those that a reduction keeps and those that it reduces.
 *
 * Each kind is ordered by stride, and what lies together is joined.  Then an op runs one of two loops:
 *   rows      each output is a run (or a gather) of elements
 *   columns   the innermost kept dim is dense: rows of a tile of columns are taken one after the other
 * Reduced elements are cut into chunks of about 65,536.  All of it depends on shapes and strides only.
 *
 * Included by reduce.c and spread.c, each compiled once per instruction set; everything here is static.
 */
#ifndef HM_CPU_SPLIT_H
#define HM_CPU_SPLIT_H

#include "vec.h"

enum { HM_CHUNK = 65536, HM_SPLIT_ROWS = 32, HM_SPLIT_COLS = 512, HM_SPLIT_TILE = 2048 };

typedef struct hm_split {
  const hm_kernel_call *call;
  const void *op; /* the including file's own */
  const char *x;
  int dtype, type;                          /* of x; computed in */
  int nk, nr;                               /* kept and reduced dims, outermost first */
  int64_t kn[HM_MAX_NDIM], ks[HM_MAX_NDIM]; /* kept: size, stride in x */
  int64_t ko[HM_MAX_NDIM];                  /* kept: stride in the outputs (two lie alike), in their elements */
  int64_t rn[HM_MAX_NDIM], rs[HM_MAX_NDIM]; /* reduced */
  int64_t n_keep, n_red;
  bool columns;
  int64_t cols, width, outer; /* columns: size of the inner kept dim, of a tile; product of the other kept dims */
  int64_t chunk, n_chunks;    /* reduced elements (rows) to a chunk */
} hm_split;

typedef struct hm_split_dim {
  int64_t n, stride, out;
} hm_split_dim;

/* Larger strides outside; repeated dims (stride 0) outermost. */
static inline bool hm__dim_before(const hm_split_dim *a, const hm_split_dim *b) {
  return b->stride != 0 && (a->stride == 0 || a->stride > b->stride);
}

static inline void hm__sort_dims(hm_split_dim *d, int n) {
  for (int i = 1; i < n; i++) {
    const hm_split_dim x = d[i];
    int j = i;
    for (; j > 0 && hm__dim_before(&x, &d[j - 1]); j--) d[j] = d[j - 1];
    d[j] = x;
  }
}

/* Joins dims that lie together in x and in the output; returns how many are left. */
static inline int hm__join_dims(hm_split_dim *d, int n) {
  int m = 0;
  for (int i = 0; i < n; i++) {
    if (m > 0 && d[m - 1].stride == d[i].stride * d[i].n && d[m - 1].out == d[i].out * d[i].n) {
      d[m - 1] = (hm_split_dim){d[m - 1].n * d[i].n, d[i].stride, d[i].out};
    } else {
      d[m++] = d[i];
    }
  }
  return m;
}

/* Cuts the reduced elements into chunks. */
static inline void hm_split_chunks(hm_split *p) {
  const int64_t inner_red = p->nr ? p->rs[p->nr - 1] : 0;
  p->columns = p->nk > 0 && p->ks[p->nk - 1] == 1 && inner_red != 1;
  p->chunk = HM_CHUNK;
  if (p->columns) {
    p->cols = p->kn[p->nk - 1];
    p->width = p->cols < HM_SPLIT_COLS ? p->cols : HM_SPLIT_COLS;
    p->outer = p->n_keep / p->cols;
    const int64_t rows = HM_CHUNK / p->width / HM_SPLIT_ROWS * HM_SPLIT_ROWS;
    p->chunk = rows < HM_SPLIT_ROWS ? HM_SPLIT_ROWS : rows;
  }
  p->n_chunks = (p->n_red + p->chunk - 1) / p->chunk;
}

/* Splits the dims of in[0]: those in mask are reduced; keep: the outputs keep them with size 1.  sort: in any order. */
static inline void hm_split_make(hm_split *p, const hm_kernel_call *call, uint32_t mask, bool keep, bool sort) {
  const hm_view *x = &call->in[0], *out = &call->out[0];
  hm_split_dim kept[HM_MAX_NDIM], red[HM_MAX_NDIM];
  int nk = 0, nr = 0, at = 0;
  *p = (hm_split){.call = call, .x = x->data, .dtype = x->dtype, .n_keep = 1, .n_red = 1};
  for (int d = 0; d < x->ndim; d++) {
    const bool reduced = mask >> d & 1;
    const int64_t n = x->shape[d], stride = x->stride[d], to = reduced ? 0 : out->stride[keep ? d : at];
    if (reduced) p->n_red *= n;
    else p->n_keep *= n, at++;
    if (n == 1) continue;
    if (reduced) red[nr++] = (hm_split_dim){n, stride, 0};
    else kept[nk++] = (hm_split_dim){n, stride, to};
  }
  hm__sort_dims(kept, nk);
  if (sort) hm__sort_dims(red, nr);
  p->nk = hm__join_dims(kept, nk);
  p->nr = hm__join_dims(red, nr);
  for (int i = 0; i < p->nk; i++) p->kn[i] = kept[i].n, p->ks[i] = kept[i].stride, p->ko[i] = kept[i].out;
  for (int i = 0; i < p->nr; i++) p->rn[i] = red[i].n, p->rs[i] = red[i].stride;
  if (p->n_keep > 0 && p->n_red > 0) hm_split_chunks(p);
}

/* Offset of flat index i over n dims of sizes `size` and strides `stride`. */
static inline int64_t hm_split_offset(int n, const int64_t *size, const int64_t *stride, int64_t i) {
  int64_t offset = 0;
  for (int d = n - 1; d > 0; d--) {
    offset += i % size[d] * stride[d];
    i /= size[d];
  }
  return n ? offset + i * stride[0] : 0;
}

/* Reduced elements [i, i + n) of the output whose elements begin at `base`, dense: where they lie or in tile. */
static inline const void *hm_split_run(const hm_split *p, int64_t base, int64_t i, int64_t n, void *tile) {
  const int type = p->type;
  if (p->nr <= 1) {
    const int64_t stride = p->nr ? p->rs[0] : 1;
    return hm_tile_in(tile, type, hm_at(p->x, base + i * stride, p->dtype), p->dtype, n, stride);
  }
  const int64_t inner = p->rn[p->nr - 1], stride = p->rs[p->nr - 1];
  for (int64_t done = 0; done < n;) {
    const int64_t left = inner - (i + done) % inner, run = left < n - done ? left : n - done;
    const char *src = hm_at(p->x, base + hm_split_offset(p->nr, p->rn, p->rs, i + done), p->dtype);
    hm_tile_fill(hm_at_mut(tile, done, type), type, src, p->dtype, run, stride);
    done += run;
  }
  return tile;
}

/* n results, those of outputs from k on in the plan's order, into out[which]. */
static inline void hm_split_store(const hm_split *p, int which, int64_t k, int64_t n, const void *values, int type) {
  const hm_view *out = &p->call->out[which];
  const int64_t inner = p->nk ? p->kn[p->nk - 1] : 1, step = p->nk ? p->ko[p->nk - 1] : 1;
  for (int64_t done = 0; done < n;) {
    const int64_t left = inner - (k + done) % inner, run = left < n - done ? left : n - done;
    const int64_t to = hm_split_offset(p->nk, p->kn, p->ko, k + done);
    hm_tile_out(hm_at_mut(out->data, to, out->dtype), out->dtype, run == 1 ? 1 : step, hm_at(values, done, type), type,
                run);
    done += run;
  }
}

/* Rows [r, r + rows) of a tile of columns, dense or where they lie: returns the first, *ld is their distance.  At most
 * HM_SPLIT_TILE elements where they must be moved: *rows says how many came. */
static inline const void *hm_split_rows(const hm_split *p, int64_t base, int64_t r, int64_t *rows, int64_t width,
                                        void *tile, int64_t *ld) {
  const int type = p->type;
  const int64_t most = HM_SPLIT_TILE / width / 4 * 4;
  if (p->nr <= 1) {
    const int64_t stride = p->nr ? p->rs[0] : width;
    const char *src = hm_at(p->x, base + r * stride, p->dtype);
    if (p->dtype == type) {
      *ld = stride;
      return src;
    }
    if (*rows > most) *rows = most;
    *ld = width;
    if (stride == width) return hm_tile_in(tile, type, src, p->dtype, *rows * width, 1);
  }
  if (*rows > most) *rows = most;
  *ld = width;
  for (int64_t i = 0; i < *rows; i++) {
    const int64_t at = base + hm_split_offset(p->nr, p->rn, p->rs, r + i);
    hm_tile_fill(hm_at_mut(tile, i * width, type), type, hm_at(p->x, at, p->dtype), p->dtype, width, 1);
  }
  return tile;
}

/* Work unit u of a column plan: which tile of which outer index, first column, width. */
typedef struct hm_split_unit {
  int64_t k, width, base, chunk;
} hm_split_unit;

static inline hm_split_unit hm_split_unit_of(const hm_split *p, int64_t u) {
  const int64_t tiles = (p->cols + p->width - 1) / p->width;
  const int64_t chunk = u % p->n_chunks, tile = u / p->n_chunks % tiles, outer = u / p->n_chunks / tiles;
  const int64_t first = tile * p->width, left = p->cols - first;
  const int64_t k = outer * p->cols + first;
  return (hm_split_unit){k, left < p->width ? left : p->width, hm_split_offset(p->nk, p->kn, p->ks, k), chunk};
}

static inline int64_t hm_split_units(const hm_split *p) {
  return p->outer * ((p->cols + p->width - 1) / p->width) * p->n_chunks;
}

#endif
