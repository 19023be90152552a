/*
 * index.h -- private to the CPU's indexing kernels: what index.c, index_add.c, sort.c and place.c offer to each other.
 *
 *   index.c      the family's entry; picking: gather, index_select, embedding; checks of ids
 *   index_add.c  adding and writing at ids: index_add, scatter, scatter_add, and the gradients of picking
 *   sort.c       sort, topk, and the order of ids for index_add.c
 *   place.c      flip, tril, triu, pad and its gradient, one_hot
 *
 * All are compiled once: they move memory more than they compute, and convert through the chosen instruction set.
 */
#ifndef HM_CPU_INDEX_H
#define HM_CPU_INDEX_H

#include "runs.h"

/* Every id of a view must lie in [0, size); the first that does not, in row-major order, is named. */
int hm__cpu_check_ids(const hm_view *index, int64_t size, const char *name);
/* out = x converted (any strides, equal shapes), through the family copy; x NULL: zeros. */
int hm__cpu_copy_or_zero(const hm_view *out, const hm_view *x);

/* index_add.c */
int hm__cpu_index_add(const hm_kernel_call *call);
void hm__cpu_index_add_workspace(const hm_kernel_call *call, size_t *bytes);

/* sort.c */
int hm__cpu_sort(const hm_kernel_call *call);
void hm__cpu_sort_workspace(const hm_kernel_call *call, size_t *bytes);

/* One element on its way: less(a, b) by key, then by index, so that no two are equal and every way of sorting is stable. */
typedef struct hm_sort_item {
  uint64_t key;
  int64_t index;
} hm_sort_item;

/* Sorts n items; spare has room for n.  Returns where the result lies: items or spare. */
hm_sort_item *hm__cpu_sort_items(hm_sort_item *items, hm_sort_item *spare, int64_t n);

/* place.c */
int hm__cpu_place(const hm_kernel_call *call);

#endif
