/*
 * sort.c -- sort and topk on the CPU, and the sorting of items that index_add.c orders ids by.
 *
 * Every element becomes an unsigned key that is ordered as the values are (NaN above all else, both zeros equal; inverted where the largest comes
 * first) and the place where it stood.  Sorting is stable: short rows by insertion and merging, long ones by their bytes.  topk finds the last
 * item that belongs to the k first by a heap, and sorts those k alone.  Threads share rows.
 * Compiled once; works in the call's workspace.
 */
#include <omp.h>

#include "index.h"

enum { INSERTION = 16, BYTES_FROM = 256 };

/* ====== Items ====== */

static void insertion_sort(hm_sort_item *a, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const hm_sort_item x = a[i];
    int64_t j = i;
    for (; j > 0 && a[j - 1].key > x.key; j--) a[j] = a[j - 1];
    a[j] = x;
  }
}

/* Merges a[0, n) and b[0, m) into out; of equal keys a's come first. */
static void merge(hm_sort_item *out, const hm_sort_item *a, int64_t n, const hm_sort_item *b, int64_t m) {
  while (n > 0 && m > 0) {
    const bool second = b->key < a->key;
    *out++ = second ? *b++ : *a++;
    if (second) m--;
    else n--;
  }
  memcpy(out, n > 0 ? a : b, (size_t)(n > 0 ? n : m) * sizeof *out);
}

static hm_sort_item *merge_sort(hm_sort_item *a, hm_sort_item *spare, int64_t n) {
  for (int64_t i = 0; i < n; i += INSERTION) insertion_sort(a + i, n - i < INSERTION ? n - i : INSERTION);
  for (int64_t width = INSERTION; width < n; width *= 2) {
    for (int64_t i = 0; i < n; i += 2 * width) {
      const int64_t first = n - i < width ? n - i : width, both = n - i < 2 * width ? n - i : 2 * width;
      merge(spare + i, a + i, first, a + i + first, both - first);
    }
    hm_sort_item *const sorted = spare;
    spare = a;
    a = sorted;
  }
  return a;
}

/* By bytes from the lowest; bytes that are the same in all keys are passed over. */
static hm_sort_item *byte_sort(hm_sort_item *a, hm_sort_item *spare, int64_t n) {
  uint64_t differ = 0;
  for (int64_t i = 1; i < n; i++) differ |= a[i].key ^ a[0].key;
  for (int shift = 0; shift < 64; shift += 8) {
    if (!(differ >> shift & 255)) continue;
    int64_t count[257] = {0};
    for (int64_t i = 0; i < n; i++) count[(a[i].key >> shift & 255) + 1]++;
    for (int b = 0; b < 256; b++) count[b + 1] += count[b];
    for (int64_t i = 0; i < n; i++) spare[count[a[i].key >> shift & 255]++] = a[i];
    hm_sort_item *const sorted = spare;
    spare = a;
    a = sorted;
  }
  return a;
}

hm_sort_item *hm__cpu_sort_items(hm_sort_item *items, hm_sort_item *spare, int64_t n) {
  return n < BYTES_FROM ? merge_sort(items, spare, n) : byte_sort(items, spare, n);
}

/* ====== Keys ====== */

static inline uint64_t key_of_f32(float x) {
  uint32_t bits;
  if (x != x) return UINT32_MAX;
  x += 0.0f; /* -0 becomes 0 */
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? (uint32_t)~bits : bits | 1u << 31;
}

static inline uint64_t key_of_f64(double x) {
  uint64_t bits;
  if (x != x) return UINT64_MAX;
  x += 0.0;
  memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

/* Fills items[i] from element i of a strided row; `flip`: the largest comes first. */
static void make_items(hm_sort_item *items, const void *x, int dtype, int64_t step, int64_t n, bool flip) {
  const int as = dtype == HM_F64 ? HM_F64 : hm_dtype_is_float(dtype) ? HM_F32 : HM_I64;
  const uint64_t mask = flip ? UINT64_MAX : 0;
  for (int64_t i = 0; i < n; i += HM_RUN_TILE) {
    const int64_t m = n - i < HM_RUN_TILE ? n - i : HM_RUN_TILE;
    union {
      float f[HM_RUN_TILE];
      double d[HM_RUN_TILE];
      int64_t i[HM_RUN_TILE];
    } tile;
    hm__copy_run(&tile, as, 1, hm__at(x, i * step, dtype), dtype, step, m);
    for (int64_t j = 0; j < m; j++) {
      const uint64_t key = as == HM_F32   ? key_of_f32(tile.f[j])
                           : as == HM_F64 ? key_of_f64(tile.d[j])
                                          : (uint64_t)tile.i[j] ^ 1ull << 63;
      items[i + j] = (hm_sort_item){key ^ mask, i + j};
    }
  }
}

/* ====== The first k ====== */

static inline bool is_less(const hm_sort_item *a, const hm_sort_item *b) {
  return a->key < b->key || (a->key == b->key && a->index < b->index);
}

/* Lets x sink from the top of a heap whose largest item is on top. */
static void sink(hm_sort_item *heap, int64_t n, int64_t at, hm_sort_item x) {
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= n) break;
    if (child + 1 < n && is_less(&heap[child], &heap[child + 1])) child++;
    if (!is_less(&x, &heap[child])) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = x;
}

/* Moves the k smallest of n items to the front, in the order in which they stood. */
static void keep_first(hm_sort_item *items, hm_sort_item *heap, int64_t n, int64_t k) {
  memcpy(heap, items, (size_t)k * sizeof *heap);
  for (int64_t i = k / 2 - 1; i >= 0; i--) sink(heap, k, i, heap[i]);
  for (int64_t i = k; i < n; i++)
    if (is_less(&items[i], &heap[0])) sink(heap, k, 0, items[i]);
  const hm_sort_item last = heap[0];
  for (int64_t i = 0, to = 0; to < k; i++)
    if (!is_less(&last, &items[i])) items[to++] = items[i];
}

/* ====== Rows ====== */

/* One call; operands of the loop: values, x, index, all without the dim. */
typedef struct sorting {
  hm_loop l;
  int64_t rows, n, k;
  int64_t step[3]; /* of the dim */
  bool flip;
  const hm_view *value, *x, *index;
} sorting;

static void sort_row(const sorting *s, int64_t row, hm_sort_item *items) {
  int64_t at[3];
  hm_sort_item *spare = items + s->n;
  hm__loop_seek(&s->l, 0, row, 3, at);
  const char *x = hm__at(s->x->data, at[1], s->x->dtype);
  make_items(items, x, s->x->dtype, s->step[1], s->n, s->flip);
  int64_t n = s->n;
  if (s->k < n / 4) keep_first(items, spare, n, s->k), n = s->k;
  items = hm__cpu_sort_items(items, spare, n);
  const int size = hm_dtype_size(s->x->dtype);
  int64_t *index = (int64_t *)s->index->data + at[2];
  for (int64_t j = 0; j < s->k; j++) index[j * s->step[2]] = items[j].index;
  for (int64_t j = 0; j < s->k; j += HM_RUN_TILE) {
    const int64_t m = s->k - j < HM_RUN_TILE ? s->k - j : HM_RUN_TILE;
    uint64_t tile[HM_RUN_TILE];
    for (int64_t i = 0; i < m; i++)
      memcpy((char *)tile + i * size, x + items[j + i].index * s->step[1] * size, (size_t)size);
    hm__copy_run(hm__at(s->value->data, at[0] + j * s->step[0], s->value->dtype), s->value->dtype, s->step[0], tile,
                 s->x->dtype, 1, m);
  }
}

static void set_sorting(sorting *s, const hm_kernel_call *call) {
  const bool top = call->op == HM_OP_TOPK;
  const int dim = (int)call->attr[top ? 1 : 0].i;
  s->x = &call->in[0];
  s->value = &call->out[0];
  s->index = &call->out[1];
  s->flip = call->attr[top ? 2 : 1].i;
  s->n = s->x->ndim ? s->x->shape[dim] : 1;
  s->k = s->x->ndim ? s->value->shape[dim] : 1;
  const hm_view value = hm__without_dim(s->value, dim, &s->step[0]);
  const hm_view in[2] = {hm__without_dim(s->x, dim, &s->step[1]), hm__without_dim(s->index, dim, &s->step[2])};
  s->rows = hm__loop_make(&s->l, &value, 2, in);
}

static int sort_threads(const sorting *s) {
  const int threads = hm_cpu_threads(s->rows * s->n, 64);
  return threads < s->rows ? threads : (int)(s->rows > 0 ? s->rows : 1);
}

void hm__cpu_sort_workspace(const hm_kernel_call *call, size_t *bytes) {
  sorting s;
  set_sorting(&s, call);
  *bytes = (size_t)(sort_threads(&s) * 2 * s.n) * sizeof(hm_sort_item);
}

int hm__cpu_sort(const hm_kernel_call *call) {
  sorting s;
  set_sorting(&s, call);
  if (s.rows == 0 || s.k == 0) return HM_OK;
  const int threads = sort_threads(&s);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t first, end;
    const int thread = omp_get_thread_num();
    hm_sort_item *items = (hm_sort_item *)call->workspace + (int64_t)thread * 2 * s.n;
    hm__share(s.rows, 1, thread, omp_get_num_threads(), &first, &end);
    for (int64_t row = first; row < end; row++) sort_row(&s, row, items);
  }
  return HM_OK;
}
