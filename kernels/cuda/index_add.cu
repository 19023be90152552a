/*
 * index_add.cu -- adding and writing at places that a tensor names: index_add, scatter, scatter_add, and the gradients
 * of gather, index_select and embedding.
 *
 * The output becomes x, or zeros, and then each place that an id names is written once, by one thread, which adds all
 * that belongs there in the order of the ids (lines.h tells of lines).  No atomics: the bits are the CPU's.
 *   few     lines of a few ids: the thread of an id looks through its line for others that name the same place
 *   sorted  longer lines: all ids are sorted by the place they name, and by their order; the first of each place adds
 *   rows    lines that share their ids (embedding, index_add): the list is sorted once, neighbouring threads take
 *           neighbouring lines
 * scatter writes what the last of several ids brings.
 */
#include "cpu/lines.h"
#include "index.h"

enum { FEW_IDS = 32, ROW_BLOCK = 128, AHEAD = 4, SIDE_BY_SIDE = 32 };

/* Operands of the walk as in hm_lines. */
struct adding {
  hm_walk<4> lines;
  void *out;
  const void *src, *index, *x; /* src NULL: a number; x NULL: zeros */
  int32_t out_dtype, src_dtype, index_dtype, x_dtype, op, number_is_int;
  int64_t step[4];
  hm_divisor inner; /* of what runs innermost, the ids of a line or the lines */
  int32_t ids_inside;
  uint32_t count; /* lines times ids */
  int64_t n, size, skip;
  double number;
  int64_t integer;
  hm_cuda_fault *fault;
};

/* Where element p of all ids lies: offsets of its line, and its number k in it. */
HM_DEV void find_element(const adding &a, uint32_t p, int64_t (&at)[4], int64_t *line, int64_t *k) {
  const uint32_t q = hm_divide(p, a.inner), r = p - q * a.inner.size;
  *line = a.ids_inside ? q : r;
  *k = a.ids_inside ? r : q;
  hm_offsets(a.lines, (uint32_t)*line, at);
}

HM_DEV int64_t id_at(const adding &a, const int64_t (&at)[4], int64_t k) {
  return hm_load<int64_t>(a.index, a.index_dtype, at[HM_LINES_INDEX] + k * a.step[HM_LINES_INDEX]);
}

/* Is the id to be used?  Tells of one outside of the range. */
HM_DEV bool is_usable(const adding &a, int64_t id) {
  if (id >= 0 && id < a.size) return id != a.skip;
  hm_fault(a.fault, HM_ERR_ARG, a.op, id, a.size);
  return false;
}

template <class T> HM_DEV T begin_sum(const adding &a, const int64_t (&at)[4], int64_t id) {
  return a.x ? hm_load<T>(a.x, a.x_dtype, at[HM_LINES_X] + id * a.step[HM_LINES_X]) : (T)0;
}

template <class T> HM_DEV T source(const adding &a, const int64_t (&at)[4], int64_t k) {
  return hm_load<T>(a.src, a.src_dtype, at[HM_LINES_SRC] + k * a.step[HM_LINES_SRC]);
}

template <class T> HM_DEV void end_sum(const adding &a, const int64_t (&at)[4], int64_t id, T sum) {
  hm_store<T>(a.out, a.out_dtype, at[HM_LINES_OUT] + id * a.step[HM_LINES_OUT], sum);
}

/* Writes src as it is. */
HM_DEV void put(const adding &a, const int64_t (&at)[4], int64_t id, int64_t k) {
  const int64_t to = at[HM_LINES_OUT] + id * a.step[HM_LINES_OUT];
  if (a.src) hm_convert(a.out, a.out_dtype, to, a.src, a.src_dtype, at[HM_LINES_SRC] + k * a.step[HM_LINES_SRC]);
  else if (a.number_is_int) hm_store<int64_t>(a.out, a.out_dtype, to, a.integer);
  else hm_store<double>(a.out, a.out_dtype, to, a.number);
}

/* ====== Lines of a few ids ====== */

template <class T> static __global__ void __launch_bounds__(HM_BLOCK, 2) add_few(adding a) {
  for (uint32_t p = hm_global_thread(); p < a.count; p += hm_global_threads()) {
    int64_t at[4], line, k;
    find_element(a, p, at, &line, &k);
    const int64_t id = id_at(a, at, k);
    bool first = is_usable(a, id);
    for (int64_t j = 0; j < k && first; j++) first = id_at(a, at, j) != id;
    if (!first) continue;
    T sum = begin_sum<T>(a, at, id);
    for (int64_t j = k; j < a.n; j++)
      if (id_at(a, at, j) == id) sum += source<T>(a, at, j);
    end_sum<T>(a, at, id, sum);
  }
}

static __global__ void __launch_bounds__(HM_BLOCK, 2) put_few(adding a) {
  for (uint32_t p = hm_global_thread(); p < a.count; p += hm_global_threads()) {
    int64_t at[4], line, k;
    find_element(a, p, at, &line, &k);
    const int64_t id = id_at(a, at, k);
    bool last = is_usable(a, id);
    for (int64_t j = k + 1; j < a.n && last; j++) last = id_at(a, at, j) != id;
    if (last) put(a, at, id, k);
  }
}

/* ====== Sorted ids ====== */

/* Items of all ids: the place they name, counted through all lines, and where the id stands. */
template <class I> static __global__ void __launch_bounds__(HM_BLOCK, 2) name_places(adding a, I *items) {
  for (uint32_t p = hm_global_thread(); p < a.count; p += hm_global_threads()) {
    int64_t at[4], line, k;
    find_element(a, p, at, &line, &k);
    const int64_t id = id_at(a, at, k);
    I item;
    const uint64_t key = is_usable(a, id) ? (uint64_t)(line * a.size + id) : hm_last_key(&item);
    hm_make_item(&item, key, p);
    items[p] = item;
  }
}

template <class T, class I> static __global__ void __launch_bounds__(HM_BLOCK, 2) add_sorted(adding a, const I *items) {
  for (uint32_t s = hm_global_thread(); s < a.count; s += hm_global_threads()) {
    const uint64_t key = hm_item_key(items[s]);
    if (key == hm_last_key(items) || (s > 0 && hm_item_key(items[s - 1]) == key)) continue;
    int64_t at[4], line, k;
    find_element(a, (uint32_t)hm_item_place(items[s]), at, &line, &k);
    const int64_t id = (int64_t)key - line * a.size;
    T sum = begin_sum<T>(a, at, id);
    for (uint32_t j = s; j < a.count && hm_item_key(items[j]) == key; j++) {
      const uint32_t p = (uint32_t)hm_item_place(items[j]), q = hm_divide(p, a.inner);
      sum += source<T>(a, at, a.ids_inside ? p - q * a.inner.size : q);
    }
    end_sum<T>(a, at, id, sum);
  }
}

template <class I> static __global__ void __launch_bounds__(HM_BLOCK, 2) put_sorted(adding a, const I *items) {
  for (uint32_t s = hm_global_thread(); s < a.count; s += hm_global_threads()) {
    const uint64_t key = hm_item_key(items[s]);
    if (key == hm_last_key(items) || (s + 1 < a.count && hm_item_key(items[s + 1]) == key)) continue;
    int64_t at[4], line, k;
    find_element(a, (uint32_t)hm_item_place(items[s]), at, &line, &k);
    put(a, at, (int64_t)key - line * a.size, k);
  }
}

/* ====== Rows ====== */

template <class I> static __global__ void __launch_bounds__(HM_BLOCK, 2) name_rows(adding a, I *items) {
  for (uint32_t k = hm_global_thread(); k < (uint32_t)a.n; k += hm_global_threads()) {
    const int64_t id = hm_load<int64_t>(a.index, a.index_dtype, k * a.step[HM_LINES_INDEX]);
    I item;
    hm_make_item(&item, is_usable(a, id) ? (uint64_t)id : hm_last_key(&item), k);
    items[k] = item;
  }
}

/* Adds what items s, s + 1 ... with one key name, AHEAD of them at a time. */
template <class T, class I>
HM_DEV T sum_items(const adding &a, const int64_t (&at)[4], const I *items, int64_t s, uint64_t key, T sum) {
  for (;;) {
    T x[AHEAD];
    int many = 0;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const bool mine = many == i && s + i < a.n && hm_item_key(items[s + i]) == key;
      x[i] = mine ? source<T>(a, at, hm_item_place(items[s + i])) : (T)0;
      many += mine;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (i < many) sum += x[i];
    if (many < AHEAD) return sum;
    s += AHEAD;
  }
}

/* Each block takes ROW_BLOCK lines of one item. */
template <class T, class I>
static __global__ void __launch_bounds__(ROW_BLOCK, 2)
    add_rows(adding a, const I *items, uint32_t chunks, uint64_t work) {
  for (uint64_t w = blockIdx.x; w < work; w += gridDim.x) {
    const int64_t s = (int64_t)(w / chunks);
    const uint32_t line = (uint32_t)(w - (uint64_t)s * chunks) * ROW_BLOCK + threadIdx.x;
    const uint64_t key = hm_item_key(items[s]);
    if (key == hm_last_key(items) || (s > 0 && hm_item_key(items[s - 1]) == key) || line >= a.lines.count) continue;
    int64_t at[4];
    hm_offsets(a.lines, line, at);
    const int64_t id = (int64_t)key;
    end_sum<T>(a, at, id, sum_items<T, I>(a, at, items, s, key, begin_sum<T>(a, at, id)));
  }
}

/* ====== Choosing ====== */

typedef enum way { FEW, SORTED, ROWS } way;

/* More ids in all lines together than are counted in 31 bits? */
static bool is_huge(const hm_lines *l) { return l->n > INT32_MAX / l->count; }

static way choose(const hm_lines *l) {
  const bool side_by_side = l->loop.stride[HM_LINES_OUT][l->loop.ndim - 1] == 1;
  if (l->shared && (l->embedding || side_by_side || l->n > FEW_IDS || is_huge(l))) return ROWS;
  return l->n <= FEW_IDS ? FEW : SORTED;
}

/* Keys of 32 bits do not hold all places? */
static bool is_wide(const hm_lines *l, way how) {
  return (how == ROWS ? l->size : (double)l->size * (double)l->count) >= 4294967295.0;
}

static int64_t items_of(const hm_lines *l, way how) { return how == FEW ? 0 : how == ROWS ? l->n : l->n * l->count; }

static void set_number(adding *a, const hm_view *src) {
  a->src = NULL;
  a->number_is_int = src->dtype == HM_I64;
  if (a->number_is_int) a->integer = src->scalar.i;
  else a->number = src->scalar.f;
}

static void set_adding(adding *a, const hm_lines *l, const hm_kernel_call *call) {
  const hm_view *v = l->view;
  memset(a, 0, sizeof *a);
  a->lines = hm_make_walk<4>(&l->loop);
  a->out = v[HM_LINES_OUT].data, a->out_dtype = v[HM_LINES_OUT].dtype;
  a->index = v[HM_LINES_INDEX].data, a->index_dtype = v[HM_LINES_INDEX].dtype;
  if (v[HM_LINES_SRC].flags & HM_VIEW_SCALAR) set_number(a, &v[HM_LINES_SRC]);
  else a->src = v[HM_LINES_SRC].data, a->src_dtype = v[HM_LINES_SRC].dtype;
  if (!(v[HM_LINES_X].flags & HM_VIEW_ABSENT)) a->x = v[HM_LINES_X].data, a->x_dtype = v[HM_LINES_X].dtype;
  for (int k = 0; k < 4; k++) a->step[k] = l->step[k];
  /* Neighbouring threads take neighbouring lines where these lie side by side. */
  a->ids_inside = l->loop.stride[HM_LINES_OUT][l->loop.ndim - 1] != 1 || l->count < SIDE_BY_SIDE;
  a->inner = hm_make_divisor(a->ids_inside ? l->n : l->count);
  a->count = (uint32_t)(l->n * l->count);
  a->n = l->n, a->size = l->size, a->skip = l->skip, a->op = call->op;
  a->fault = hm_cuda_fault_word(call->stream);
}

template <class T> static int run_few(const adding *a, const char *name, void *stream) {
  return HM_RUN(name, (add_few<T>), hm_blocks(a->count), HM_BLOCK, 0, stream, *a);
}

template <class T, class I> static int run_sorted(const adding *a, const I *items, const char *name, void *stream) {
  return HM_RUN(name, (add_sorted<T, I>), hm_blocks(a->count), HM_BLOCK, 0, stream, *a, items);
}

template <class T, class I> static int run_rows(const adding *a, const I *items, const char *name, void *stream) {
  const uint32_t chunks = (a->lines.count + ROW_BLOCK - 1) / ROW_BLOCK;
  const uint64_t work = (uint64_t)a->n * chunks;
  return HM_RUN(name, (add_rows<T, I>), hm_blocks((int64_t)work, 1), ROW_BLOCK, 0, stream, *a, items, chunks, work);
}

/* Sorts the ids into the workspace, and adds by them. */
template <class I> static int run_items(const adding *a, const hm_lines *l, way how, void *workspace, void *stream) {
  const int64_t n = items_of(l, how);
  I *items = static_cast<I *>(workspace);
  void *sorted = NULL;
  int status = how == ROWS ? HM_RUN(l->name, (name_rows<I>), hm_blocks(n), HM_BLOCK, 0, stream, *a, items)
                           : HM_RUN(l->name, (name_places<I>), hm_blocks(n), HM_BLOCK, 0, stream, *a, items);
  if (!status) status = hm_cuda_sort_items(l->name, items, items + n, n, sizeof(I) == sizeof(hm_wide), stream, &sorted);
  if (status) return status;
  const I *order = static_cast<const I *>(sorted);
  switch (l->acc) {
  case HM_F32:
    return how == ROWS ? run_rows<float, I>(a, order, l->name, stream)
                       : run_sorted<float, I>(a, order, l->name, stream);
  case HM_F64:
    return how == ROWS ? run_rows<double, I>(a, order, l->name, stream)
                       : run_sorted<double, I>(a, order, l->name, stream);
  case HM_I64:
    return how == ROWS ? run_rows<int64_t, I>(a, order, l->name, stream)
                       : run_sorted<int64_t, I>(a, order, l->name, stream);
  default: return HM_RUN(l->name, (put_sorted<I>), hm_blocks(a->count), HM_BLOCK, 0, stream, *a, order);
  }
}

static int run_lines(const adding *a, const hm_lines *l, const hm_kernel_call *call) {
  const way how = choose(l);
  if (how != FEW)
    return is_wide(l, how) ? run_items<hm_wide>(a, l, how, call->workspace, call->stream)
                           : run_items<hm_narrow>(a, l, how, call->workspace, call->stream);
  switch (l->acc) {
  case HM_F32: return run_few<float>(a, l->name, call->stream);
  case HM_F64: return run_few<double>(a, l->name, call->stream);
  case HM_I64: return run_few<int64_t>(a, l->name, call->stream);
  default: return HM_RUN(l->name, put_few, hm_blocks(a->count), HM_BLOCK, 0, call->stream, *a);
  }
}

void hm_cuda_index_add_workspace(const hm_kernel_call *call, size_t *bytes) {
  switch (call->op) {
  case HM_OP_GATHER_BACKWARD:
  case HM_OP_INDEX_SELECT_BACKWARD:
  case HM_OP_EMBEDDING_BACKWARD:
  case HM_OP_INDEX_ADD:
  case HM_OP_SCATTER:
  case HM_OP_SCATTER_ADD: break;
  default: return;
  }
  hm_lines l;
  hm__lines_make(&l, call);
  if (l.count == 0 || l.n == 0) return;
  const way how = choose(&l);
  *bytes = 2 * (size_t)items_of(&l, how) * hm_item_bytes(is_wide(&l, how));
}

int hm_cuda_index_add(const hm_kernel_call *call) {
  hm_lines l;
  hm__lines_make(&l, call);
  const hm_view *x = &l.view[HM_LINES_X];
  if (l.count > 0 && (l.shared ? l.n > INT32_MAX || l.count > INT32_MAX : is_huge(&l)))
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "%s: more than 2^31 - 1 ids at once are not taken on cuda", l.name);
  const int status = hm_copy_or_zero(&call->out[0], x->flags & HM_VIEW_ABSENT ? NULL : x, call->stream);
  if (status || l.count == 0 || l.n == 0) return status;
  adding a;
  set_adding(&a, &l, call);
  return run_lines(&a, &l, call);
}
