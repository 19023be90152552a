/*
 * sort.cu -- sort and topk, and the sorting of ids for index_add.cu.
 *
 * Every element becomes an item (index.h): a key that is ordered as the values are (NaN above all else, both zeros
 * equal; inverted where the largest comes first) and its place.  A block sorts 1024 items in shared memory by a bitonic
 * network: one tile of a long row, or several short rows.  Rows of one tile are read and written by that one kernel.
 * Tiles of longer rows go to the workspace and are merged, two and two; for topk with a small k only the first k of
 * each tile live on, and are sorted as a new, shorter row.
 */
#include "index.h"

enum {
  TILE = 1024,     /* items of a block */
  MERGE = 8,       /* items that a thread merges */
  BATCH = 1 << 22, /* items in the workspace at a time, unless one row has more */
  FEW = TILE / 2   /* k up to here is found by shortening rows */
};

/* Rows, and where they lie.  Operands of the walk: values, x, index, all without the dim. */
struct sorting {
  hm_walk<3> walk;
  void *value;
  const void *x;
  int64_t *index;
  int64_t step[3]; /* of the dim */
  int32_t value_dtype, x_dtype;
  uint32_t first, rows; /* of the batch */
  int64_t k;            /* entries of a result */
  int32_t flip;
};

/* ====== Keys ====== */

HM_DEV uint64_t key_of_float(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? (uint32_t)~bits : bits | 0x80000000u;
}

HM_DEV uint64_t key_of_double(double x) {
  if (x != x) return ~(uint64_t)0;
  const double y = x == 0.0 ? 0.0 : x;
  uint64_t bits;
  memcpy(&bits, &y, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t)1 << 63;
}

HM_DEV void item_of(hm_narrow *item, const sorting &s, int64_t at, int64_t i) {
  const uint64_t key = s.x_dtype >= HM_F16 ? key_of_float(hm_load<float>(s.x, s.x_dtype, at))
                                           : (uint32_t)hm_load<int64_t>(s.x, s.x_dtype, at) ^ 0x80000000u;
  hm_make_item(item, s.flip ? (uint32_t)~key : key, (uint64_t)i);
}

HM_DEV void item_of(hm_wide *item, const sorting &s, int64_t at, int64_t i) {
  const uint64_t key = s.x_dtype == HM_F64 ? key_of_double(static_cast<const double *>(s.x)[at])
                                           : (uint64_t) static_cast<const int64_t *>(s.x)[at] ^ (uint64_t)1 << 63;
  hm_make_item(item, s.flip ? ~key : key, (uint64_t)i);
}

/* Writes entry j of a row's result. */
template <class I> HM_DEV void put_entry(const sorting &s, const int64_t (&at)[3], int64_t j, const I &item) {
  const int64_t place = hm_item_place(item);
  s.index[at[2] + j * s.step[2]] = place;
  hm_convert(s.value, s.value_dtype, at[0] + j * s.step[0], s.x, s.x_dtype, at[1] + place * s.step[1]);
}

/* ====== Tiles ====== */

/* One pass over rows of n items each. */
struct tiles {
  const void *from; /* items, row after row; NULL: the rows of x */
  void *to;         /* items, `pitch` to a row; NULL: the result */
  int64_t n, pitch;
  int64_t keep;                        /* of each tile, how many go to `to` */
  uint32_t segments, per_row, segment; /* tiles in all, in a row; items of each, a power of two */
};

HM_DEV void order(hm_narrow *a, hm_narrow *b, bool up) {
  const hm_narrow x = *a, y = *b;
  if ((y < x) == up) *a = y, *b = x;
}
HM_DEV void order(hm_wide *a, hm_wide *b, bool up) {
  const hm_wide x = *a, y = *b;
  if (hm_item_less(y, x) == up) *a = y, *b = x;
}

/* Sorts the segments of a tile, each by itself. */
template <class I> HM_DEV void sort_tile(I *tile, unsigned segment) {
  for (unsigned size = 2; size <= segment; size *= 2)
    for (unsigned j = size / 2; j > 0; j /= 2) {
      HM_BARRIER();
      for (unsigned t = threadIdx.x; t < TILE / 2; t += HM_BLOCK) {
        const unsigned i = 2 * t - (t & (j - 1));
        order(&tile[i], &tile[i + j], ((i & (segment - 1)) & size) == 0);
      }
    }
  HM_BARRIER();
}

template <class I> static __global__ void __launch_bounds__(HM_BLOCK, 2) sort_tiles(sorting s, tiles t) {
  HM_SHARED(I, tile, [TILE]);
  const unsigned together = TILE / t.segment;
  for (uint32_t first = blockIdx.x * together; first < t.segments; first += gridDim.x * together) {
    for (unsigned e = threadIdx.x; e < TILE; e += HM_BLOCK) {
      const uint32_t segment = first + e / t.segment, row = segment / t.per_row;
      const int64_t i = (int64_t)(segment - row * t.per_row) * TILE + (e & (t.segment - 1));
      I item;
      hm_make_item(&item, hm_last_key(&item), ~(uint64_t)0);
      if (segment < t.segments && i < t.n) {
        if (t.from) {
          item = static_cast<const I *>(t.from)[row * t.n + i];
        } else {
          int64_t at[3];
          hm_offsets(s.walk, s.first + row, at);
          item_of(&item, s, at[1] + i * s.step[1], i);
        }
      }
      tile[e] = item;
    }
    sort_tile(tile, t.segment);
    for (unsigned e = threadIdx.x; e < TILE; e += HM_BLOCK) {
      const uint32_t segment = first + e / t.segment, row = segment / t.per_row;
      const int64_t j = e & (t.segment - 1), i = (int64_t)(segment - row * t.per_row) * t.keep + j;
      if (segment >= t.segments || j >= t.keep) continue;
      if (t.to) {
        if (i < t.pitch) static_cast<I *>(t.to)[row * t.pitch + i] = tile[e];
      } else if (j < s.k) {
        int64_t at[3];
        hm_offsets(s.walk, s.first + row, at);
        put_entry(s, at, j, tile[e]);
      }
    }
    HM_BARRIER();
  }
}

/* ====== Merging ====== */

struct merging {
  const void *from;
  void *to;
  int64_t n, width; /* of a row; of the lists that are merged */
  uint32_t chunks, count;
};

/* Merges neighbouring lists of `width` items; each thread writes MERGE of them. */
template <class I> static __global__ void __launch_bounds__(HM_BLOCK, 2) merge_lists(merging m) {
  for (uint32_t c = hm_global_thread(); c < m.count; c += hm_global_threads()) {
    const uint32_t row = c / m.chunks;
    const int64_t d = (int64_t)(c - row * m.chunks) * MERGE, start = d / (2 * m.width) * 2 * m.width, skip = d - start;
    const int64_t left = m.n - start, na = left < m.width ? left : m.width;
    const int64_t nb = left - na < m.width ? left - na : m.width;
    const I *a = static_cast<const I *>(m.from) + row * m.n + start, *b = a + na;
    I *to = static_cast<I *>(m.to) + row * m.n + d;
    int64_t low = skip > nb ? skip - nb : 0, high = skip < na ? skip : na;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (hm_item_less(a[middle], b[skip - 1 - middle])) low = middle + 1;
      else high = middle;
    }
    int64_t i = low, j = skip - low;
    for (int64_t k = 0; k < MERGE && skip + k < na + nb; k++) {
      const bool first = j >= nb || (i < na && hm_item_less(a[i], b[j]));
      to[k] = first ? a[i++] : b[j++];
    }
  }
}

template <class I>
static __global__ void __launch_bounds__(HM_BLOCK, 2) put_entries(sorting s, const I *items, int64_t n) {
  for (uint32_t i = hm_global_thread(); i < s.rows * (uint64_t)s.k; i += hm_global_threads()) {
    const uint32_t row = (uint32_t)(i / s.k);
    const int64_t j = i - row * s.k;
    int64_t at[3];
    hm_offsets(s.walk, s.first + row, at);
    put_entry(s, at, j, items[row * n + j]);
  }
}

/* ====== Passes ====== */

static int run_tiles(const char *name, const sorting *s, tiles t, uint32_t rows, bool wide, void *stream) {
  t.segment = 1;
  while (t.segment < t.n && t.segment < TILE) t.segment *= 2;
  if (t.segment < 2) t.segment = 2;
  t.per_row = (uint32_t)((t.n + TILE - 1) / TILE);
  t.segments = rows * t.per_row;
  const unsigned blocks = hm_blocks(t.segments, TILE / t.segment);
  if (wide) return HM_RUN(name, (sort_tiles<hm_wide>), blocks, HM_BLOCK, 0, stream, *s, t);
  return HM_RUN(name, (sort_tiles<hm_narrow>), blocks, HM_BLOCK, 0, stream, *s, t);
}

/* Merges the sorted tiles of rows until each row is one list; *items and *spare change places. */
static int run_merges(const char *name, uint32_t rows, int64_t n, bool wide, void *stream, void **items, void **spare) {
  for (int64_t width = TILE; width < n; width *= 2) {
    merging m;
    m.from = *items, m.to = *spare;
    m.n = n, m.width = width;
    m.chunks = (uint32_t)((n + MERGE - 1) / MERGE);
    m.count = rows * m.chunks;
    const unsigned blocks = hm_blocks(m.count);
    const int status = wide ? HM_RUN(name, (merge_lists<hm_wide>), blocks, HM_BLOCK, 0, stream, m)
                            : HM_RUN(name, (merge_lists<hm_narrow>), blocks, HM_BLOCK, 0, stream, m);
    if (status) return status;
    void *const sorted = *spare;
    *spare = *items;
    *items = sorted;
  }
  return HM_OK;
}

int hm_cuda_sort_items(const char *name, void *items, void *spare, int64_t n, bool wide, void *stream, void **sorted) {
  sorting s;
  tiles t;
  memset(&s, 0, sizeof s);
  memset(&t, 0, sizeof t);
  t.from = items, t.to = spare;
  t.n = t.pitch = n;
  t.keep = TILE;
  int status = run_tiles(name, &s, t, 1, wide, stream);
  if (!status) status = run_merges(name, 1, n, wide, stream, &spare, &items);
  *sorted = spare;
  return status;
}

/* ====== sort and topk ====== */

typedef struct plan {
  int dim;
  int64_t n, k, rows;
  bool wide, few;
  int64_t pitch; /* items of a row in the workspace; 0: none are needed */
  int64_t batch; /* rows */
} plan;

static plan make_plan(const hm_kernel_call *call) {
  const bool top = call->op == HM_OP_TOPK;
  const hm_view *x = &call->in[0];
  plan p;
  p.dim = (int)call->attr[top ? 1 : 0].i;
  p.n = x->ndim ? x->shape[p.dim] : 1;
  p.k = x->ndim ? call->out[0].shape[p.dim] : 1;
  p.rows = 1;
  for (int d = 0; d < x->ndim; d++)
    if (d != p.dim) p.rows *= x->shape[d];
  p.wide = x->dtype == HM_F64 || x->dtype == HM_I64;
  p.few = p.k <= FEW && p.n > TILE;
  p.pitch = p.n <= TILE ? 0 : p.few ? (p.n + TILE - 1) / TILE * p.k : p.n;
  /* Counts of threads and segments stay below 2^31. */
  p.batch = p.pitch ? BATCH / p.n : (int64_t)1 << 30;
  if (p.batch < 1) p.batch = 1;
  if (p.batch > p.rows) p.batch = p.rows;
  return p;
}

/* Rows s->first ... of a batch. */
static int run_batch(const plan *p, sorting *s, const char *name, void *items, void *spare, void *stream) {
  tiles t;
  memset(&t, 0, sizeof t);
  t.n = p->n;
  if (!p->pitch) {
    t.keep = TILE;
    return run_tiles(name, s, t, s->rows, p->wide, stream);
  }
  while (p->few && t.n > TILE) { /* the first k of each tile are a new row */
    t.keep = p->k;
    t.pitch = (t.n + TILE - 1) / TILE * p->k;
    t.to = items;
    const int status = run_tiles(name, s, t, s->rows, p->wide, stream);
    if (status) return status;
    t.from = items;
    items = spare, spare = const_cast<void *>(t.from);
    t.n = t.pitch;
  }
  if (p->few) {
    t.keep = TILE, t.to = NULL;
    return run_tiles(name, s, t, s->rows, p->wide, stream);
  }
  t.keep = TILE, t.pitch = t.n, t.to = items;
  int status = run_tiles(name, s, t, s->rows, p->wide, stream);
  if (!status) status = run_merges(name, s->rows, p->n, p->wide, stream, &items, &spare);
  if (status) return status;
  const unsigned blocks = hm_blocks(s->rows * p->k);
  if (p->wide)
    return HM_RUN(name, (put_entries<hm_wide>), blocks, HM_BLOCK, 0, stream, *s, static_cast<const hm_wide *>(items),
                  p->n);
  return HM_RUN(name, (put_entries<hm_narrow>), blocks, HM_BLOCK, 0, stream, *s, static_cast<const hm_narrow *>(items),
                p->n);
}

void hm_cuda_sort_workspace(const hm_kernel_call *call, size_t *bytes) {
  const plan p = make_plan(call);
  *bytes = 2 * (size_t)(p.batch * p.pitch) * hm_item_bytes(p.wide);
}

int hm_cuda_sort(const hm_kernel_call *call) {
  const plan p = make_plan(call);
  const bool top = call->op == HM_OP_TOPK;
  const char *name = top ? "topk" : "sort";
  if (p.n > INT32_MAX)
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: rows of more than 2^31 - 1 entries are not sorted on cuda", name);
  if (p.k == 0) return HM_OK;
  const hm_view value = hm_without_dim(&call->out[0], p.dim);
  const hm_view in[2] = {hm_without_dim(&call->in[0], p.dim), hm_without_dim(&call->out[1], p.dim)};
  hm_loop loop;
  if (hm__loop_make(&loop, &value, 2, in) == 0) return HM_OK;
  char *items = static_cast<char *>(call->workspace),
       *spare = items + (size_t)(p.batch * p.pitch) * hm_item_bytes(p.wide);
  int64_t base[3] = {0, 0, 0};
  return hm_each_piece(&loop, 3, base, [&](const hm_loop &l, const int64_t *at) {
    sorting s;
    memset(&s, 0, sizeof s);
    s.walk = hm_make_walk<3>(&l);
    s.value = hm_element(value.data, at[0], value.dtype);
    s.x = hm_element(in[0].data, at[1], in[0].dtype);
    s.index = static_cast<int64_t *>(in[1].data) + at[2];
    s.value_dtype = value.dtype, s.x_dtype = in[0].dtype;
    const hm_view *views[3] = {&call->out[0], &call->in[0], &call->out[1]};
    for (int k = 0; k < 3; k++) s.step[k] = views[k]->ndim ? views[k]->stride[p.dim] : 0;
    s.k = p.k;
    s.flip = (int32_t)call->attr[top ? 2 : 1].i;
    int status = HM_OK;
    for (int64_t first = 0; first < s.walk.count && !status; first += p.batch) {
      s.first = (uint32_t)first;
      s.rows = (uint32_t)(s.walk.count - first < p.batch ? s.walk.count - first : p.batch);
      status = run_batch(&p, &s, name, items, spare, call->stream);
    }
    return status;
  });
}
