/*
 * index_add.c -- adding and writing at places that a tensor names: index_add, scatter, scatter_add, and the gradients of gather, index_select,
 * embedding and of a choice along a dim.
 *
 * A line is what lies along the dim at one position of the other dims; ids of a line name places of that line alone.  Values are added in the
 * order of the ids, so no result depends on who works on which line.  Sums are kept in the dtype computed in (float32, float64, int64) and
 * rounded once: in the output itself where that is its dtype, else in a line of the workspace.
 *   lines   neighbouring lines that lie side by side are worked on together
 *   rows    where all lines share their ids (embedding, index_add): the ids are sorted, then each row that is named is summed by itself
 * Compiled once; works in the call's workspace.
 */
#include <omp.h>

#include "index.h"
#include "lines.h"

enum { ACC_ELEMENTS = 16384, ROWS_FROM = 8 };

/* One call, and how it is worked on. */
typedef struct adding {
  hm_lines lines;
  bool direct;                           /* sums are kept in out */
  bool rows;                             /* all lines share their ids, and are worked on together */
  int64_t width, blocks_per_row, blocks; /* of lines */
  int threads;
  uint64_t value; /* a number as src, in out's dtype */
} adding;

/* ====== What a call means ====== */

/* A number as src: one value that repeats. */
static void set_number(adding *a) {
  hm_view *src = &a->lines.view[HM_LINES_SRC];
  if (!(src->flags & HM_VIEW_SCALAR)) return;
  const hm_view number = *src;
  const int dtype = a->lines.view[HM_LINES_OUT].dtype;
  hm_cpu_isa()->convert(&a->value, dtype, &number.scalar, number.dtype, 1);
  *src = a->lines.view[HM_LINES_INDEX];
  src->data = &a->value;
  src->dtype = (int16_t)dtype;
  for (int d = 0; d < src->ndim; d++) src->stride[d] = 0;
  a->lines.step[HM_LINES_SRC] = 0;
}

/* How lines are worked on together, and by how many threads. */
static void set_blocks(adding *a) {
  const hm_lines *l = &a->lines;
  const int last = l->loop.ndim - 1;
  const int64_t inner = l->loop.shape[last];
  const bool side_by_side = l->loop.stride[HM_LINES_OUT][last] == 1;
  a->rows = l->shared && l->acc != HM_NONE && (l->embedding || (side_by_side && inner >= ROWS_FROM));
  a->direct = l->acc == HM_NONE || l->acc == l->view[HM_LINES_OUT].dtype;
  a->width = side_by_side ? inner : 1;
  if (a->width > HM_RUN_TILE) a->width = HM_RUN_TILE;
  if (!a->direct && a->width > 1 && a->width * l->size > ACC_ELEMENTS)
    a->width = l->size < ACC_ELEMENTS ? ACC_ELEMENTS / l->size : 1;
  a->blocks_per_row = (inner + a->width - 1) / a->width;
  a->blocks = l->count / inner * a->blocks_per_row;
  a->threads = hm_cpu_threads(l->count * (l->n + (a->direct ? 0 : l->size)), 16);
  const int64_t shares = a->rows ? l->n : a->blocks;
  if (a->threads > shares) a->threads = (int)(shares > 0 ? shares : 1);
}

static void set_adding(adding *a, const hm_kernel_call *call) {
  memset(a, 0, sizeof *a);
  hm__lines_make(&a->lines, call);
  set_number(a);
  if (a->lines.count > 0) set_blocks(a);
}

/* ====== Lines ====== */

#define ADD(type)                                                                                                      \
  for (int64_t i = 0; i < n; i++) ((type *)to)[ids[i] * sd + i * si] += ((const type *)from)[i]
#define PUT(type)                                                                                                      \
  for (int64_t i = 0; i < n; i++) ((type *)to)[ids[i] * sd + i * si] = ((const type *)from)[i]

/* Value i goes to place ids[i] * sd + i * si, one after the other. */
static void apply(const adding *a, void *to, const void *from, const int64_t *ids, int64_t n, int64_t sd, int64_t si) {
  if (a->lines.acc == HM_F32) ADD(float);
  else if (a->lines.acc == HM_F64) ADD(double);
  else if (a->lines.acc == HM_I64) ADD(int64_t);
  else {
    switch (hm_dtype_size(a->lines.view[HM_LINES_OUT].dtype)) {
    case 1: PUT(uint8_t); break;
    case 2: PUT(uint16_t); break;
    case 4: PUT(uint32_t); break;
    default: PUT(uint64_t); break;
    }
  }
}

static const void *element(const adding *a, int operand, int64_t at) {
  return hm__at(a->lines.view[operand].data, at, a->lines.view[operand].dtype);
}

/* Applies n values: src and index are read from at[] on by the steps given; targets as in apply(). */
static void apply_run(const adding *a, void *to, const int64_t *at, int64_t src_step, int64_t id_step, int64_t n,
                      int64_t sd, int64_t si) {
  const int as = a->lines.acc == HM_NONE ? a->lines.view[HM_LINES_OUT].dtype : a->lines.acc;
  int64_t ids[HM_RUN_TILE];
  uint64_t values[HM_RUN_TILE];
  for (int64_t i = 0; i < n; i += HM_RUN_TILE) {
    const int64_t m = n - i < HM_RUN_TILE ? n - i : HM_RUN_TILE;
    hm__read_ids(ids, element(a, HM_LINES_INDEX, at[HM_LINES_INDEX] + i * id_step), a->lines.view[HM_LINES_INDEX].dtype,
                 id_step, m);
    hm__copy_run(values, as, 1, element(a, HM_LINES_SRC, at[HM_LINES_SRC] + i * src_step),
                 a->lines.view[HM_LINES_SRC].dtype, src_step, m);
    apply(a, (char *)to + i * si * hm_dtype_size(as), values, ids, m, sd, si);
  }
}

/* The ids of `width` neighbouring lines, in their order. */
static void apply_block(const adding *a, void *to, const int64_t *at, int64_t width, int64_t sd, int64_t si) {
  const int last = a->lines.loop.ndim - 1;
  if (width == 1) {
    apply_run(a, to, at, a->lines.step[HM_LINES_SRC], a->lines.step[HM_LINES_INDEX], a->lines.n, sd, 0);
    return;
  }
  int64_t place[HM_LINES_OPERANDS];
  memcpy(place, at, sizeof place);
  for (int64_t k = 0; k < a->lines.n; k++) {
    apply_run(a, to, place, a->lines.loop.stride[HM_LINES_SRC][last], a->lines.loop.stride[HM_LINES_INDEX][last], width,
              sd, si);
    place[HM_LINES_SRC] += a->lines.step[HM_LINES_SRC];
    place[HM_LINES_INDEX] += a->lines.step[HM_LINES_INDEX];
  }
}

/* Sums kept beside the output: read from x, added to, written once. */
static void add_aside(const adding *a, char *acc, const int64_t *at, int64_t width) {
  const int last = a->lines.loop.ndim - 1, bytes = hm_dtype_size(a->lines.acc);
  const hm_view *x = &a->lines.view[HM_LINES_X], *out = &a->lines.view[HM_LINES_OUT];
  const bool one = width == 1;
  const int64_t runs = one ? 1 : a->lines.size, n = one ? a->lines.size : width;
  if (x->flags & HM_VIEW_ABSENT) memset(acc, 0, (size_t)(a->lines.size * width * bytes));
  for (int64_t d = 0; d < runs && !(x->flags & HM_VIEW_ABSENT); d++)
    hm__copy_run(acc + d * width * bytes, a->lines.acc, 1,
                 element(a, HM_LINES_X, at[HM_LINES_X] + d * a->lines.step[HM_LINES_X]), x->dtype,
                 one ? a->lines.step[HM_LINES_X] : a->lines.loop.stride[HM_LINES_X][last], n);
  apply_block(a, acc, at, width, width, 1);
  for (int64_t d = 0; d < runs; d++)
    hm__copy_run((void *)(uintptr_t)element(a, HM_LINES_OUT, at[HM_LINES_OUT] + d * a->lines.step[HM_LINES_OUT]),
                 out->dtype, one ? a->lines.step[HM_LINES_OUT] : a->lines.loop.stride[HM_LINES_OUT][last],
                 acc + d * width * bytes, a->lines.acc, 1, n);
}

static void add_block(const adding *a, char *acc, int64_t block) {
  const int last = a->lines.loop.ndim - 1;
  const int64_t i = block % a->blocks_per_row * a->width, left = a->lines.loop.shape[last] - i;
  const int64_t width = left < a->width ? left : a->width;
  int64_t at[HM_LINES_OPERANDS];
  hm__loop_seek(&a->lines.loop, 1, block / a->blocks_per_row, HM_LINES_OPERANDS, at);
  for (int k = 0; k < HM_LINES_OPERANDS; k++) at[k] += i * a->lines.loop.stride[k][last];
  if (!a->direct) {
    add_aside(a, acc, at, width);
    return;
  }
  apply_block(a, (void *)(uintptr_t)element(a, HM_LINES_OUT, at[HM_LINES_OUT]), at, width, a->lines.step[HM_LINES_OUT],
              a->lines.loop.stride[HM_LINES_OUT][last]);
}

static int64_t acc_bytes(const adding *a) { return (a->lines.size * a->width * 8 + 63) / 64 * 64; }

static void add_lines(const adding *a, char *workspace) {
  const int threads = a->threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t first, end;
    const int thread = omp_get_thread_num();
    char *acc = a->direct ? NULL : workspace + thread * acc_bytes(a);
    hm__share(a->blocks, 1, thread, omp_get_num_threads(), &first, &end);
    for (int64_t b = first; b < end; b++) add_block(a, acc, b);
  }
}

/* ====== Rows ====== */

static void add_values(int acc, void *to, const void *from, int64_t n) {
#define ADD_VALUES(type)                                                                                               \
  for (int64_t i = 0; i < n; i++) ((type *)to)[i] += ((const type *)from)[i]
  if (acc == HM_F32) ADD_VALUES(float);
  else if (acc == HM_F64) ADD_VALUES(double);
  else ADD_VALUES(int64_t);
#undef ADD_VALUES
}

/* n elements, side by side, of the row that `count` items name; at: where they begin in row 0 of each operand. */
static void sum_run(const adding *a, const hm_sort_item *item, int64_t count, const int64_t *at, int64_t n) {
  const int last = a->lines.loop.ndim - 1;
  const int64_t id = (int64_t)item->key, src_step = a->lines.loop.stride[HM_LINES_SRC][last];
  const hm_view *src = &a->lines.view[HM_LINES_SRC], *x = &a->lines.view[HM_LINES_X],
                *out = &a->lines.view[HM_LINES_OUT];
  uint64_t sum[HM_RUN_TILE], values[HM_RUN_TILE];
  if (x->flags & HM_VIEW_ABSENT) memset(sum, 0, sizeof sum);
  else
    hm__copy_run(sum, a->lines.acc, 1, element(a, HM_LINES_X, at[HM_LINES_X] + id * a->lines.step[HM_LINES_X]),
                 x->dtype, a->lines.loop.stride[HM_LINES_X][last], n);
  for (int64_t j = 0; j < count; j++) {
    const void *from = element(a, HM_LINES_SRC, at[HM_LINES_SRC] + item[j].index * a->lines.step[HM_LINES_SRC]);
    if (src->dtype != a->lines.acc || src_step != 1) {
      hm__copy_run(values, a->lines.acc, 1, from, src->dtype, src_step, n);
      from = values;
    }
    add_values(a->lines.acc, sum, from, n);
  }
  hm__copy_run((void *)(uintptr_t)element(a, HM_LINES_OUT, at[HM_LINES_OUT] + id * a->lines.step[HM_LINES_OUT]),
               out->dtype, a->lines.loop.stride[HM_LINES_OUT][last], sum, a->lines.acc, 1, n);
}

static void sum_row(const adding *a, const hm_sort_item *item, int64_t count) {
  const int last = a->lines.loop.ndim - 1;
  const int64_t inner = a->lines.loop.shape[last];
  for (int64_t row = 0; row < a->lines.count / inner; row++) {
    int64_t at[HM_LINES_OPERANDS];
    hm__loop_seek(&a->lines.loop, 1, row, HM_LINES_OPERANDS, at);
    for (int64_t i = 0; i < inner; i += HM_RUN_TILE) {
      sum_run(a, item, count, at, inner - i < HM_RUN_TILE ? inner - i : HM_RUN_TILE);
      for (int k = 0; k < HM_LINES_OPERANDS; k++) at[k] += HM_RUN_TILE * a->lines.loop.stride[k][last];
    }
  }
}

/* The ids that count, sorted; *n: how many. */
static hm_sort_item *sorted_ids(const adding *a, hm_sort_item *items, int64_t *n) {
  int64_t ids[HM_RUN_TILE], kept = 0;
  for (int64_t i = 0; i < a->lines.n; i += HM_RUN_TILE) {
    const int64_t m = a->lines.n - i < HM_RUN_TILE ? a->lines.n - i : HM_RUN_TILE;
    hm__read_ids(ids, element(a, HM_LINES_INDEX, i * a->lines.step[HM_LINES_INDEX]),
                 a->lines.view[HM_LINES_INDEX].dtype, a->lines.step[HM_LINES_INDEX], m);
    for (int64_t j = 0; j < m; j++)
      if (ids[j] != a->lines.skip) items[kept++] = (hm_sort_item){(uint64_t)ids[j], i + j};
  }
  *n = kept;
  return hm__cpu_sort_items(items, items + a->lines.n, kept);
}

static void add_rows(const adding *a, hm_sort_item *workspace) {
  int64_t n;
  const hm_sort_item *items = sorted_ids(a, workspace, &n);
  const int threads = a->threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t first, end;
    hm__share(n, 1, omp_get_thread_num(), omp_get_num_threads(), &first, &end);
    while (first > 0 && first < end && items[first].key == items[first - 1].key) first++; /* begun by another */
    while (first < end) {
      int64_t next = first + 1;
      while (next < n && items[next].key == items[first].key) next++;
      sum_row(a, items + first, next - first);
      first = next;
    }
  }
}

/* ====== The entry ====== */

void hm__cpu_index_add_workspace(const hm_kernel_call *call, size_t *bytes) {
  adding a;
  *bytes = 0;
  set_adding(&a, call);
  if (a.lines.count == 0) return;
  if (a.rows) *bytes = (size_t)(2 * a.lines.n) * sizeof(hm_sort_item);
  else if (!a.direct) *bytes = (size_t)(a.threads * acc_bytes(&a));
}

int hm__cpu_index_add(const hm_kernel_call *call) {
  adding a;
  set_adding(&a, call);
  const hm_view *x = &a.lines.view[HM_LINES_X];
  int status = hm__cpu_check_ids(&call->in[1], a.lines.size, a.lines.name);
  if (!status) status = hm__cpu_copy_or_zero(&call->out[0], x->flags & HM_VIEW_ABSENT ? NULL : x);
  if (status || a.lines.count == 0 || a.lines.n == 0) return status;
  if (a.rows) add_rows(&a, call->workspace);
  else add_lines(&a, call->workspace);
  return HM_OK;
}
