/*
 * normalize.h -- how the tensors of batch_norm and group_norm are cut into parts, for the CPU and for CUDA.
 *
 * The memory of [N, C, d...] is either rows of C channels (channels innermost) or planes of pixels, one for each sample and channel.
 * An image is what shares one set of coefficients per channel: with planes each sample; with rows each sample for group_norm, and all
 * samples together for batch_norm.  Statistics of a large image are made part by part; where parts begin depends on shapes
 * only, so that sums have one order for any number of threads.
 *
 * Also the row norms' geometry: rows of normalized elements, blocks of rows for the sums of their weights' gradients.
 * Header-only; owns nothing.
 */
#ifndef HM_CPU_NORMALIZE_H
#define HM_CPU_NORMALIZE_H

#include "../kernels.h"

typedef struct hm_channel_plan {
  bool batch;             /* batch_norm: one statistic for a channel; else one for each sample and group */
  bool rows;              /* memory is rows of channels; else planes of pixels */
  int64_t n, c, groups;   /* samples, channels, groups of channels (batch_norm: c) */
  int64_t images, pixels; /* pixels of an image */
  int64_t parts, part;    /* parts of an image, pixels of one (the last may have fewer) */
  int64_t sets;           /* sets of coefficients: 1 for batch_norm, else n */
  int64_t count;          /* numbers behind one statistic */
} hm_channel_plan;

/* Dim 1 of v is the innermost in memory. */
static inline bool hm__channels_inner(const hm_view *v) {
  int64_t expect = 1;
  for (int k = 0; k < v->ndim; k++) { /* 1, then from the last to 2, then 0 */
    const int d = k == 0 ? 1 : k == v->ndim - 1 ? 0 : v->ndim - k;
    if (v->shape[d] != 1 && v->stride[d] != expect) return false;
    expect *= v->shape[d];
  }
  return true;
}

/* A part has about `elements` numbers, at least `least` and at most `most` pixels; whole fours of them. */
static inline hm_channel_plan hm__channel_plan(const hm_view *x, int64_t groups, bool batch, int64_t elements,
                                               int64_t least, int64_t most) {
  hm_channel_plan p;
  p.batch = batch;
  p.n = x->shape[0];
  p.c = x->shape[1];
  p.pixels = 1;
  for (int d = 2; d < x->ndim; d++) p.pixels *= x->shape[d];
  p.groups = batch ? p.c : groups;
  p.count = batch ? p.n * p.pixels : (p.c / groups) * p.pixels;
  p.rows = p.c > 1 && hm__channels_inner(x);
  p.images = p.n;
  p.sets = batch ? 1 : p.n;
  if (p.rows && batch) {
    p.pixels *= p.n;
    p.images = 1;
  }
  p.part = p.pixels;
  if (p.rows) {
    p.part = elements / p.c < least ? least : elements / p.c > most ? most : elements / p.c;
    p.part = (p.part + 3) / 4 * 4;
  }
  p.parts = p.pixels > 0 ? (p.pixels + p.part - 1) / p.part : 0;
  if (!p.rows) p.parts = p.pixels > 0;
  return p;
}

/* Pixels of part k of an image. */
static inline int64_t hm__part_pixels(const hm_channel_plan *p, int64_t k) {
  return k + 1 < p->parts ? p->part : p->pixels - k * p->part;
}

typedef struct hm_row_norm_plan {
  int64_t rows, length;  /* rows of normalized elements */
  int64_t blocks, block; /* blocks of rows, rows of one */
  int lead;              /* dims before the normalized ones */
} hm_row_norm_plan;

static inline hm_row_norm_plan hm__row_norm_plan(const hm_view *x, int64_t dims) {
  hm_row_norm_plan p;
  p.rows = p.length = 1;
  p.lead = x->ndim - (int)dims;
  for (int d = 0; d < x->ndim; d++) *(d < p.lead ? &p.rows : &p.length) *= x->shape[d];
  p.block = p.rows / 64 < 16 ? 16 : p.rows / 64 > 1024 ? 1024 : p.rows / 64;
  p.blocks = (p.rows + p.block - 1) / p.block;
  return p;
}

#endif
