/*
 * attention_tiles.h -- attention by blocks of 64 queries and 64 keys, for one type: HM_T (float or double), HM_S (its
 * suffix) and HM_DT (its dtype).
 *
 * Included twice by attention.c; everything here is static.
 *
 * A tile holds the scores of 64 x 64 pairs.  One side, `across`, lies along the tile's lines: its block is transposed
 * once and stays.  The other, `down`, comes block by block and is read where it lies if it can be.  For the output and
 * dq queries lie across and keys come down; for dk and dv it is the other way round.  All products are one function,
 * which sums each element over its terms in order: the bits depend neither on the width of vectors nor on the number of
 * threads.
 */
#define HM_N(name) HM_ISA_JOIN(name, HM_S)
#define HM_V HM_N(hm_v)
#define HM_U HM_N(hm_u)

/* ====== Products ====== */

/* c[4 or fewer rows][n vectors] = or += sum over k of a[row * rs + k * cs] * b[k * ldb + ...]. */
static inline __attribute__((always_inline)) void HM_N(micro)(int rows, int n, int64_t depth, const HM_T *a, int64_t rs,
                                                              int64_t cs, const HM_T *b, int64_t ldb, HM_T *c,
                                                              int64_t ldc, bool add) {
  enum { V = HM_VBYTES / sizeof(HM_T) };
  HM_V sum[4][2];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < n; v++) sum[r][v] = (HM_V){0};
  for (int64_t k = 0; k < depth; k++) {
    HM_V x[2];
    for (int v = 0; v < n; v++) x[v] = *(const HM_U *)(b + k * ldb + v * V);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      const HM_T y = a[r * rs + k * cs];
      for (int v = 0; v < n; v++) sum[r][v] += y * x[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < n; v++) {
      HM_U *const to = (HM_U *)(c + r * ldc + v * V);
      if (add) *to += sum[r][v];
      else *to = sum[r][v];
    }
}

/* C [m, n] = or += A [m, depth] B [depth, n]; n is a multiple of 16, C and B are row-major, A has any strides. */
HM_ATT_OWN static void HM_N(product)(int64_t m, int64_t n, int64_t depth, const HM_T *a, int64_t rs, int64_t cs,
                                     const HM_T *b, int64_t ldb, HM_T *c, int64_t ldc, bool add) {
  enum { V = HM_VBYTES / sizeof(HM_T) };
  for (int64_t j = 0; j < n;) {
    const bool two = j + 2 * V <= n;
    int64_t i = 0;
    for (; two && i + 4 <= m; i += 4)
      HM_N(micro)(4, 2, depth, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; two && i < m; i++) HM_N(micro)(1, 2, depth, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; i < m; i++) HM_N(micro)(1, 1, depth, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    j += two ? 2 * V : V;
  }
}

/* ====== Blocks of operands ====== */

/* A block of rows as HM_T, `ld` elements apart. */
typedef struct HM_N(rows) {
  const HM_T *at;
  int64_t ld;
} HM_N(rows);

static const char *HM_N(row_at)(const hm_att_rows *r, int64_t b, int64_t h, int64_t row) {
  return hm_at(r->data, b * r->batch + h * r->head + row * r->step, r->dtype);
}

/* Rows [first, first + n) of `width`: where they lie, or in `buffer`, padded with zeros to a multiple of 16. */
HM_ATT_OWN static HM_N(rows)
    HM_N(read_rows)(const hm_att_rows *r, int64_t b, int64_t h, int64_t first, int64_t n, int64_t width, HM_T *buffer) {
  const char *from = HM_N(row_at)(r, b, h, first);
  const int64_t ld = padded(width), step = r->step * hm_dtype_size(r->dtype);
  if (r->dtype == HM_DT && ld == width) return (HM_N(rows)){(const HM_T *)from, r->step};
  for (int64_t i = 0; i < n; i++) {
    hm_tile_fill(buffer + i * ld, HM_DT, from + i * step, r->dtype, width, 1);
    for (int64_t k = width; k < ld; k++) buffer[i * ld + k] = 0;
  }
  return (HM_N(rows)){buffer, ld};
}

/* The same block transposed to [width][64], zeros where there are no rows.  scratch: room for the rows. */
HM_ATT_OWN static void HM_N(read_across)(const hm_att_rows *r, int64_t b, int64_t h, int64_t first, int64_t n,
                                         int64_t width, HM_T *scratch, HM_T *to) {
  const HM_N(rows) x = HM_N(read_rows)(r, b, h, first, n, width, scratch);
  for (int64_t k = 0; k < width; k++)
    for (int64_t i = 0; i < BLOCK; i++) to[k * BLOCK + i] = i < n ? x.at[i * x.ld + k] : 0;
}

HM_ATT_OWN static void HM_N(write_rows)(const hm_att_rows *r, int64_t b, int64_t h, int64_t first, int64_t n,
                                        int64_t width, const HM_T *from) {
  char *to = (char *)r->data + (b * r->batch + h * r->head + first * r->step) * hm_dtype_size(r->dtype);
  for (int64_t i = 0; i < n; i++)
    hm_tile_out(to + i * r->step * hm_dtype_size(r->dtype), r->dtype, 1, from + i * padded(width), HM_DT, width);
}

/* ====== A tile of pairs ====== */

/* Scratch memory of a thread, and the pairs of the tile at hand. */
typedef struct HM_N(work) {
  const hm_att_plan *p;
  HM_T *across_a, *across_b, *down_a, *down_b, *acc_a, *acc_b; /* [BLOCK][width] each, one way or the other */
  HM_T *tile, *other, *drop;                                   /* [BLOCK][BLOCK] */
  HM_T *top, *sum, *factor;                                    /* [BLOCK], by query */
  int64_t b, h, q, nq, k, nk;                                  /* queries [q, q + nq), keys [k, k + nk) */
  int64_t iq, ik; /* steps in a tile from one query, one key to the next: 1 and BLOCK, or BLOCK and 1 */
} HM_N(work);

static void HM_N(set_work)(HM_N(work) * w, const hm_att_plan *p, void *memory) {
  HM_T *at = memory;
  const int64_t d = padded(p->d) * BLOCK, e = padded(p->e) * BLOCK, wider = d > e ? d : e;
  *w = (HM_N(work)){.p = p};
  w->across_a = at, at += d;
  w->down_a = at, at += d;
  w->acc_a = at, at += d;
  w->across_b = at, at += e;
  w->down_b = at, at += e;
  w->acc_b = at, at += wider;
  w->tile = at, at += BLOCK * BLOCK;
  w->other = at, at += BLOCK * BLOCK;
  w->drop = at, at += BLOCK * BLOCK;
  w->top = at, at += BLOCK;
  w->sum = at, at += BLOCK;
  w->factor = at;
}

/* Scores become -infinity or more by the mask. */
static void HM_N(apply_mask)(const HM_N(work) * w) {
  const hm_att_plan *p = w->p;
  const int64_t *step = p->mask_stride;
  const bool is_bool = p->mask_dtype == HM_BOOL;
  const int size = hm_dtype_size(p->mask_dtype);
  const char *from = (const char *)p->mask + (w->b * step[0] + w->h * step[1] + w->q * step[2] + w->k * step[3]) * size;
  HM_T row[BLOCK];
  for (int64_t i = 0; i < w->nq; i++) {
    HM_T *const tile = w->tile + i * w->iq;
    if (i == 0 || step[2]) hm_tile_fill(row, HM_DT, from + i * step[2] * size, p->mask_dtype, w->nk, step[3]);
    if (is_bool)
      for (int64_t j = 0; j < w->nk; j++) tile[j * w->ik] = row[j] != 0 ? tile[j * w->ik] : -(HM_T)INFINITY;
    else
      for (int64_t j = 0; j < w->nk; j++) tile[j * w->ik] += row[j];
  }
}

/* Scores of the tile, `rows` lines of it: products times scale, mask, triangle. */
HM_ATT_OWN static void HM_N(finish_scores)(const HM_N(work) * w, int64_t rows) {
  const HM_T scale = (HM_T)w->p->scale;
  for (int64_t x = 0; x < rows * BLOCK; x++) w->tile[x] *= scale;
  if (w->p->mask) HM_N(apply_mask)(w);
  if (!w->p->causal || w->k + w->nk - 1 <= w->q) return;
  for (int64_t i = 0; i < w->nq; i++)
    for (int64_t j = w->q + i - w->k + 1 > 0 ? w->q + i - w->k + 1 : 0; j < w->nk; j++)
      w->tile[i * w->iq + j * w->ik] = -(HM_T)INFINITY;
}

/* What weights are multiplied by: 0 or 1 / (1 - p), by the number of the pair. */
HM_ATT_OWN static void HM_N(draw)(const HM_N(work) * w) {
  const hm_att_plan *p = w->p;
  const HM_T keep = (HM_T)p->keep;
  const int64_t line = (w->b * p->h + w->h) * p->t + w->q;
  uint32_t buffer[BLOCK + 8];
  for (int64_t i = 0; i < w->nq; i++) {
    const uint32_t *const words = draw_words(p, (line + i) * p->s + w->k, w->nk, buffer);
    for (int64_t j = 0; j < w->nk; j++) w->drop[i * w->iq + j * w->ik] = words[j] < p->threshold ? 0 : keep;
  }
}

/* ====== Output ====== */

/* Scores of a tile with keys down become weights; maxima, sums and the output so far follow. */
HM_ATT_OWN static void HM_N(soften)(const HM_N(work) * w) {
  HM_T *const top = w->top, *const factor = w->factor, *const sum = w->sum;
  HM_T more[BLOCK], safe[BLOCK];
  for (int i = 0; i < BLOCK; i++) factor[i] = top[i], more[i] = 0;
  for (int64_t j = 0; j < w->nk; j++) {
    const HM_T *const s = w->tile + j * BLOCK;
    for (int i = 0; i < BLOCK; i++) top[i] = s[i] > top[i] ? s[i] : top[i];
  }
  for (int i = 0; i < BLOCK; i++) {
    safe[i] = top[i] == -(HM_T)INFINITY ? 0 : top[i]; /* no key yet: nothing minus nothing */
    factor[i] = HM_N(hm_exp)(factor[i] - safe[i]);
  }
  for (int64_t j = 0; j < w->nk; j++) {
    HM_T *const s = w->tile + j * BLOCK;
    for (int i = 0; i < BLOCK; i++) s[i] = HM_N(hm_exp)(s[i] - safe[i]);
    for (int i = 0; i < BLOCK; i++) more[i] += s[i];
  }
  for (int i = 0; i < BLOCK; i++) sum[i] = sum[i] * factor[i] + more[i];
}

static void HM_N(finish_output)(const HM_N(work) * w) {
  const hm_att_plan *p = w->p;
  const int64_t ld = padded(p->e);
  HM_T lse[BLOCK];
  for (int64_t i = 0; i < w->nq; i++) {
    HM_T *const y = w->acc_b + i * ld;
    const HM_T sum = w->sum[i];
    lse[i] = sum == 0 ? -(HM_T)INFINITY : w->top[i] + HM_N(hm_log)(sum);
    for (int64_t k = 0; k < ld; k++) y[k] = sum == 0 ? 0 : y[k] / sum;
  }
  HM_N(write_rows)(&p->out, w->b, w->h, w->q, w->nq, p->e, w->acc_b);
  const int64_t at = w->b * p->lse.batch + w->h * p->lse.head + w->q;
  hm_tile_out(hm_at_mut(p->lse.data, at, p->lse.dtype), p->lse.dtype, 1, lse, HM_DT, w->nq);
}

/* Queries from w->q on of one head. */
static void HM_N(forward)(HM_N(work) * w) {
  const hm_att_plan *p = w->p;
  const int64_t head = w->h / hm__att_group(p), ld = padded(p->e), end = keys_before(p, w->q + w->nq);
  w->iq = 1, w->ik = BLOCK;
  HM_N(read_across)(&p->q, w->b, w->h, w->q, w->nq, p->d, w->down_a, w->across_a);
  for (int64_t x = 0; x < BLOCK * ld; x++) w->acc_b[x] = 0;
  for (int i = 0; i < BLOCK; i++) w->top[i] = -(HM_T)INFINITY, w->sum[i] = 0;
  for (w->k = 0; w->k < end; w->k += BLOCK) {
    w->nk = p->s - w->k < BLOCK ? p->s - w->k : BLOCK;
    const HM_N(rows) k = HM_N(read_rows)(&p->k, w->b, head, w->k, w->nk, p->d, w->down_a);
    const HM_N(rows) v = HM_N(read_rows)(&p->v, w->b, head, w->k, w->nk, p->e, w->down_b);
    HM_N(product)(w->nk, BLOCK, p->d, k.at, k.ld, 1, w->across_a, BLOCK, w->tile, BLOCK, false);
    HM_N(finish_scores)(w, w->nk);
    HM_N(soften)(w);
    if (p->drops) {
      HM_N(draw)(w);
      for (int64_t x = 0; x < w->nk * BLOCK; x++) w->tile[x] *= w->drop[x];
    }
    for (int64_t i = 0; i < w->nq; i++)
      for (int64_t e = 0; e < ld; e++) w->acc_b[i * ld + e] *= w->factor[i];
    HM_N(product)(w->nq, ld, w->nk, w->tile, 1, BLOCK, v.at, v.ld, w->acc_b, ld, true);
  }
  HM_N(finish_output)(w);
}

/* ====== Gradients ====== */

/* top[] = lse and sum[] = delta of the tile's queries; queries that see nothing get weights of 0. */
HM_ATT_OWN static void HM_N(read_queries)(const HM_N(work) * w, const HM_T *delta) {
  const hm_att_plan *p = w->p;
  const int64_t at = w->b * p->lse.batch + w->h * p->lse.head + w->q;
  hm_tile_fill(w->top, HM_DT, hm_at(p->lse.data, at, p->lse.dtype), p->lse.dtype, w->nq, 1);
  for (int64_t i = 0; i < BLOCK; i++) {
    if (i >= w->nq || w->top[i] == -(HM_T)INFINITY) w->top[i] = (HM_T)INFINITY;
    w->sum[i] = i < w->nq ? delta[(w->b * p->h + w->h) * p->t + w->q + i] : 0;
  }
}

/* What dropout does to one of the tiles. */
static void HM_N(multiply_by_drop)(const HM_N(work) * w, HM_T *tile) {
  for (int64_t i = 0; i < w->nq; i++)
    for (int64_t j = 0; j < w->nk; j++) tile[i * w->iq + j * w->ik] *= w->drop[i * w->iq + j * w->ik];
}

/* Queries across.  tile: scores -> weights; other: g v^T -> weights times what it is above delta, summed in factor[]. */
HM_ATT_OWN static void HM_N(differentiate_across)(const HM_N(work) * w) {
  HM_T more[BLOCK] = {0};
  if (w->p->drops) {
    HM_N(draw)(w);
    HM_N(multiply_by_drop)(w, w->other);
  }
  for (int64_t j = 0; j < w->nk; j++) {
    HM_T *const s = w->tile + j * BLOCK, *const o = w->other + j * BLOCK;
    for (int i = 0; i < BLOCK; i++) s[i] = HM_N(hm_exp)(s[i] - w->top[i]);
    for (int i = 0; i < BLOCK; i++) o[i] = s[i] * (o[i] - w->sum[i]);
    for (int i = 0; i < BLOCK; i++) more[i] += o[i];
  }
  for (int i = 0; i < BLOCK; i++) w->factor[i] += more[i];
}

/* Queries down.  tile: scores -> weights after dropout; other: g v^T -> gradients of the products q k^T. */
HM_ATT_OWN static void HM_N(differentiate_down)(const HM_N(work) * w) {
  const HM_T scale = (HM_T)w->p->scale;
  if (w->p->drops) {
    HM_N(draw)(w);
    HM_N(multiply_by_drop)(w, w->other);
  }
  for (int64_t i = 0; i < w->nq; i++) {
    HM_T *const s = w->tile + i * BLOCK, *const o = w->other + i * BLOCK;
    const HM_T lse = w->top[i], delta = w->sum[i];
    for (int j = 0; j < BLOCK; j++) s[j] = HM_N(hm_exp)(s[j] - lse);
    for (int j = 0; j < BLOCK; j++) o[j] = s[j] * (o[j] - delta) * scale;
  }
  if (w->p->drops) HM_N(multiply_by_drop)(w, w->tile);
}

/* delta as it is before by_queries: sums of g * out, row by row of one head. */
static void HM_N(dot_rows)(HM_N(work) * w, HM_T *delta) {
  const hm_att_plan *p = w->p;
  for (w->q = 0; w->q < p->t; w->q += BLOCK) {
    w->nq = p->t - w->q < BLOCK ? p->t - w->q : BLOCK;
    const HM_N(rows) g = HM_N(read_rows)(&p->grad, w->b, w->h, w->q, w->nq, p->e, w->down_b);
    const HM_N(rows) y = HM_N(read_rows)(&p->out, w->b, w->h, w->q, w->nq, p->e, w->acc_b);
    for (int64_t i = 0; i < w->nq; i++) {
      HM_T lane[16] = {0};
      for (int64_t e = 0; e < padded(p->e); e += 16)
        for (int l = 0; l < 16; l++) lane[l] += g.at[i * g.ld + e + l] * y.at[i * y.ld + e + l];
      for (int half = 8; half > 0; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
      delta[(w->b * p->h + w->h) * p->t + w->q + i] = lane[0];
    }
  }
}

/* Takes what delta lacked out of dq (the sums are in acc_a, those of weight * key in acc_b), and adds it to delta. */
static void HM_N(settle_delta)(const HM_N(work) * w, HM_T *delta) {
  const int64_t ld = padded(w->p->d);
  for (int64_t i = 0; i < w->nq; i++) {
    const HM_T more = w->factor[i], scale = (HM_T)w->p->scale;
    HM_T *const a = w->acc_a + i * ld, *const b = w->acc_b + i * ld;
    for (int64_t k = 0; k < ld; k++) a[k] = (a[k] - more * b[k]) * scale;
    delta[(w->b * w->p->h + w->h) * w->p->t + w->q + i] += more;
  }
}

/* dq of the queries from w->q on of one head. */
static void HM_N(by_queries)(HM_N(work) * w, HM_T *delta) {
  const hm_att_plan *p = w->p;
  const int64_t head = w->h / hm__att_group(p), ld = padded(p->d), end = keys_before(p, w->q + w->nq);
  w->iq = 1, w->ik = BLOCK;
  HM_N(read_across)(&p->q, w->b, w->h, w->q, w->nq, p->d, w->down_a, w->across_a);
  HM_N(read_across)(&p->grad, w->b, w->h, w->q, w->nq, p->e, w->down_b, w->across_b);
  HM_N(read_queries)(w, delta);
  for (int i = 0; i < BLOCK; i++) w->factor[i] = 0;
  for (int64_t x = 0; x < BLOCK * ld; x++) w->acc_a[x] = w->acc_b[x] = 0;
  for (w->k = 0; w->k < end; w->k += BLOCK) {
    w->nk = p->s - w->k < BLOCK ? p->s - w->k : BLOCK;
    const HM_N(rows) k = HM_N(read_rows)(&p->k, w->b, head, w->k, w->nk, p->d, w->down_a);
    const HM_N(rows) v = HM_N(read_rows)(&p->v, w->b, head, w->k, w->nk, p->e, w->down_b);
    HM_N(product)(w->nk, BLOCK, p->d, k.at, k.ld, 1, w->across_a, BLOCK, w->tile, BLOCK, false);
    HM_N(product)(w->nk, BLOCK, p->e, v.at, v.ld, 1, w->across_b, BLOCK, w->other, BLOCK, false);
    HM_N(finish_scores)(w, w->nk);
    HM_N(differentiate_across)(w);
    HM_N(product)(w->nq, ld, w->nk, w->other, 1, BLOCK, k.at, k.ld, w->acc_a, ld, true);
    HM_N(product)(w->nq, ld, w->nk, w->tile, 1, BLOCK, k.at, k.ld, w->acc_b, ld, true);
  }
  HM_N(settle_delta)(w, delta);
  HM_N(write_rows)(&p->dq, w->b, w->h, w->q, w->nq, p->d, w->acc_a);
}

/* What the queries of head w->h add to dk and dv of the keys from w->k on. */
static void HM_N(add_head)(HM_N(work) * w, const HM_T *delta) {
  const hm_att_plan *p = w->p;
  const int64_t d = padded(p->d), e = padded(p->e);
  for (w->q = p->causal ? w->k / BLOCK * BLOCK : 0; w->q < p->t; w->q += BLOCK) {
    w->nq = p->t - w->q < BLOCK ? p->t - w->q : BLOCK;
    const HM_N(rows) q = HM_N(read_rows)(&p->q, w->b, w->h, w->q, w->nq, p->d, w->down_a);
    const HM_N(rows) g = HM_N(read_rows)(&p->grad, w->b, w->h, w->q, w->nq, p->e, w->down_b);
    HM_N(read_queries)(w, delta);
    HM_N(product)(w->nq, BLOCK, p->d, q.at, q.ld, 1, w->across_a, BLOCK, w->tile, BLOCK, false);
    HM_N(product)(w->nq, BLOCK, p->e, g.at, g.ld, 1, w->across_b, BLOCK, w->other, BLOCK, false);
    HM_N(finish_scores)(w, w->nq);
    HM_N(differentiate_down)(w);
    HM_N(product)(w->nk, e, w->nq, w->tile, 1, BLOCK, g.at, g.ld, w->acc_b, e, true);
    HM_N(product)(w->nk, d, w->nq, w->other, 1, BLOCK, q.at, q.ld, w->acc_a, d, true);
  }
}

/* dk and dv of the keys from w->k on of one head of k and v. */
static void HM_N(by_keys)(HM_N(work) * w, int64_t head, const HM_T *delta) {
  const hm_att_plan *p = w->p;
  const int64_t group = hm__att_group(p), d = padded(p->d), e = padded(p->e);
  w->iq = BLOCK, w->ik = 1;
  HM_N(read_across)(&p->k, w->b, head, w->k, w->nk, p->d, w->down_a, w->across_a);
  HM_N(read_across)(&p->v, w->b, head, w->k, w->nk, p->e, w->down_b, w->across_b);
  for (int64_t x = 0; x < BLOCK * d; x++) w->acc_a[x] = 0;
  for (int64_t x = 0; x < BLOCK * e; x++) w->acc_b[x] = 0;
  for (w->h = head * group; w->h < (head + 1) * group; w->h++) HM_N(add_head)(w, delta);
  HM_N(write_rows)(&p->dk, w->b, head, w->k, w->nk, p->d, w->acc_a);
  HM_N(write_rows)(&p->dv, w->b, head, w->k, w->nk, p->e, w->acc_b);
}

/* ====== Units of work ====== */

/* One unit of a pass: FORWARD and QUERIES a block of queries, DELTAS a head, KEYS a block of keys of a head of k and v. */
static void HM_N(unit)(HM_N(work) * w, int pass, int64_t unit, void *delta) {
  const hm_att_plan *p = w->p;
  const int64_t blocks = blocks_of(p, pass), block = blocks - 1 - unit % blocks, rest = unit / blocks;
  const int64_t heads = pass == KEYS ? p->g : p->h, head = rest % heads;
  w->b = rest / heads;
  w->h = head;
  if (pass == DELTAS) {
    HM_N(dot_rows)(w, delta);
    return;
  }
  if (pass == KEYS) {
    w->k = block * BLOCK;
    w->nk = p->s - w->k < BLOCK ? p->s - w->k : BLOCK;
    HM_N(by_keys)(w, head, delta);
    return;
  }
  w->q = block * BLOCK;
  w->nq = p->t - w->q < BLOCK ? p->t - w->q : BLOCK;
  if (pass == FORWARD) HM_N(forward)(w);
  else HM_N(by_queries)(w, delta);
}

static void HM_N(take_units)(const hm_att_plan *p, int pass, void *memory, void *delta) {
  HM_N(work) w;
  HM_N(set_work)(&w, p, memory);
  const int64_t units = units_of(p, pass);
#pragma omp for schedule(dynamic)
  for (int64_t u = 0; u < units; u++) HM_N(unit)(&w, pass, u, delta); /* each is done alone, whoever takes it */
}

/* All passes of a call, in order. */
static int HM_N(run)(const hm_kernel_call *call) {
  const hm_att_plan p = hm__att_plan(call);
  const bool back = call->op == HM_OP_ATTENTION_BACKWARD;
  char *const delta = call->workspace, *const memory = delta + delta_bytes(&p, back, sizeof(HM_T));
  const size_t own = thread_bytes(&p, sizeof(HM_T));
  for (int pass = back ? DELTAS : FORWARD; pass <= (back ? KEYS : FORWARD); pass++) {
    if (units_of(&p, pass) == 0) continue;
    const int threads = threads_for(&p, pass);
#pragma omp parallel num_threads(threads) if (threads > 1)
    HM_N(take_units)(&p, pass, memory + own * (size_t)omp_get_thread_num(), delta);
  }
  return HM_OK;
}

#undef HM_N
#undef HM_V
#undef HM_U
