/*
 * index.h -- private to the indexing kernels of this folder: what index.cu, index_add.cu, sort.cu and place.cu offer to
 * each other.
 *
 *   index.cu      the family's entry; picking (gather, index_select, embedding), select_backward, flip
 *   index_add.cu  adding and writing at ids: index_add, scatter, scatter_add, and the gradients of picking
 *   sort.cu       sort, topk, and the sorting of ids
 *   place.cu      tril, triu, pad and its gradient, one_hot
 *
 * Items: what is sorted is a key and a place, one number where both fit into 32 bits each.  No two items of a list are
 * equal, so that any way of sorting them is stable.
 */
#ifndef HM_CUDA_INDEX_H
#define HM_CUDA_INDEX_H

#include "view.h"

/* ====== Items ====== */

typedef uint64_t hm_narrow; /* key above, place below */
struct hm_wide {
  uint64_t high, low;
};

HM_DEV void hm_make_item(hm_narrow *item, uint64_t key, uint64_t place) { *item = key << 32 | (uint32_t)place; }
HM_DEV void hm_make_item(hm_wide *item, uint64_t key, uint64_t place) { item->high = key, item->low = place; }
HM_DEV uint64_t hm_item_key(hm_narrow item) { return item >> 32; }
HM_DEV uint64_t hm_item_key(const hm_wide &item) { return item.high; }
HM_DEV int64_t hm_item_place(hm_narrow item) { return (int64_t)(item & 0xffffffffu); }
HM_DEV int64_t hm_item_place(const hm_wide &item) { return (int64_t)item.low; }
HM_DEV bool hm_item_less(hm_narrow a, hm_narrow b) { return a < b; }
HM_DEV bool hm_item_less(const hm_wide &a, const hm_wide &b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

/* The key behind all others: of what does not count. */
HM_DEV uint64_t hm_last_key(const hm_narrow *) { return 0xffffffffu; }
HM_DEV uint64_t hm_last_key(const hm_wide *) { return ~(uint64_t)0; }

static inline size_t hm_item_bytes(bool wide) { return wide ? sizeof(hm_wide) : sizeof(hm_narrow); }

/* Sorts n items (below 2^31); spare has room for as many.  *sorted: which of the two holds the result. */
int hm_cuda_sort_items(const char *name, void *items, void *spare, int64_t n, bool wide, void *stream, void **sorted);

/* ====== The files ====== */

int hm_cuda_index_add(const hm_kernel_call *call);
void hm_cuda_index_add_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_sort(const hm_kernel_call *call);
void hm_cuda_sort_workspace(const hm_kernel_call *call, size_t *bytes);
int hm_cuda_place(const hm_kernel_call *call);

/* out = x converted, any strides; x NULL: zeros. */
static inline int hm_copy_or_zero(const hm_view *out, const hm_view *x, void *stream) {
  if (!x) return hm_cuda_fill_number(out, 0, 0, stream);
  hm_kernel_call call;
  memset(&call, 0, sizeof call);
  call.op = HM_OP_CAST;
  call.n_in = call.n_out = 1;
  call.stream = stream;
  call.in[0] = *x;
  call.out[0] = *out;
  return hm_cuda_copy(&call);
}

#endif
