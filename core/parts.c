/*
 * parts.c -- the parts into which functions of one name cut a graph, for scales that belong to parts of it (amp.layer_scale).
 *
 * All gradients of one part are added, in the walk, without passing a cut: so they must be made with one scale.  Nodes that an edge
 * joins lie in one part (so two that lead to one leaf do); a cut has one part above it and one below.  Read only: nothing is
 * run, nodes are not marked.  Found by one pass over the nodes with disjoint sets.
 *
 * Ownership: the result's arrays are the caller's (hm_parts_free); the ud pointers in it are borrowed from the graph.
 */
#include <string.h>

#include "tape.h"

/* ====== Nodes and their numbers ====== */

typedef struct node_set {
  hm_node **at; /* in the order they were met */
  int n, max;
  int *slot; /* 1 + number by hash; n_slots of them, a power of two */
  int n_slots;
} node_set;

static int place_of(const node_set *s, const hm_node *n) {
  uint64_t h = (uint64_t)(uintptr_t)n * 0x9e3779b97f4a7c15u;
  int i = (int)(h >> 33) & (s->n_slots - 1);
  while (s->slot[i] != 0 && s->at[s->slot[i] - 1] != n) i = (i + 1) & (s->n_slots - 1);
  return i;
}

/* The node's number, or -1. */
static int number_of(const node_set *s, const hm_node *n) {
  return n && s->n_slots > 0 ? s->slot[place_of(s, n)] - 1 : -1;
}

static int grow(node_set *s) {
  const int max = s->max ? 2 * s->max : 128;
  hm_node **at = hm_realloc(s->at, sizeof *at * (size_t)max);
  if (!at) return HM_ERR_MEMORY;
  s->at = at;
  int *slot = hm_calloc(sizeof *slot * 2 * (size_t)max);
  if (!slot) return HM_ERR_MEMORY;
  hm_free(s->slot);
  s->slot = slot;
  s->n_slots = 2 * max;
  s->max = max;
  for (int i = 0; i < s->n; i++) slot[place_of(s, s->at[i])] = i + 1;
  return HM_OK;
}

static int add(node_set *s, hm_node *n) {
  if (!n || number_of(s, n) >= 0) return HM_OK;
  if (s->n == s->max) {
    const int status = grow(s);
    if (status) return status;
  }
  s->at[s->n++] = n;
  s->slot[place_of(s, n)] = s->n;
  return HM_OK;
}

static hm_node *node_of(const hm_tensor *t) { return t->node ? t->node : t->accumulator; }

/* Every node that the roots lead to. */
static int gather(node_set *s, hm_tensor *const *roots, int n_roots) {
  int status = HM_OK;
  for (int i = 0; i < n_roots && !status; i++) status = add(s, node_of(roots[i]));
  for (int next = 0; next < s->n && !status; next++)
    for (int e = 0; e < s->at[next]->n_in && !status; e++) status = add(s, s->at[next]->edge[e].node);
  return status;
}

/* ====== Disjoint sets ====== */

/* Member 2i is what lies above node i, 2i + 1 what lies below it; the same set unless the node is a cut. */
static int find(int *parent, int x) {
  while (parent[x] != x) {
    parent[x] = parent[parent[x]];
    x = parent[x];
  }
  return x;
}

static void join(int *parent, int x, int y) {
  x = find(parent, x);
  y = find(parent, y);
  if (x < y) parent[y] = x;
  else parent[x] = y;
}

static bool is_cut(const hm_node *n, const char *name) {
  return n->op == HM_NODE_CUSTOM && !strcmp(n->custom->name, name);
}

static void join_all(const node_set *s, const char *name, int *parent) {
  for (int i = 0; i < 2 * s->n; i++) parent[i] = i;
  for (int i = 0; i < s->n; i++) {
    const hm_node *n = s->at[i];
    if (!is_cut(n, name)) join(parent, 2 * i, 2 * i + 1);
    for (int e = 0; e < n->n_in; e++)
      if (n->edge[e].node) join(parent, 2 * i + 1, 2 * number_of(s, n->edge[e].node));
  }
}

/* ====== The result ====== */

/* Numbers the parts from 1, and writes the cuts; number[]: of each set, by its representative.  A cut that a backward has freed has given up
 * its ud, and no gradient passes it: it cuts, but is not listed. */
static void fill_cuts(const node_set *s, const char *name, int *parent, int *number, hm_parts *out) {
  for (int i = 0; i < 2 * s->n; i++) {
    const int root = find(parent, i);
    if (number[root] == 0) number[root] = ++out->n_parts;
  }
  for (int i = 0; i < s->n; i++)
    if (is_cut(s->at[i], name) && !s->at[i]->freed)
      out->cut[out->n_cuts++] =
          (hm_cut){s->at[i]->custom->ud, number[find(parent, 2 * i)], number[find(parent, 2 * i + 1)]};
}

/* Writes the parts of tensors, and of leaves that are not among them. */
static void fill_tensors(const node_set *s, int *parent, const int *number, hm_tensor *const *asked, int n_asked,
                         bool *met, hm_parts *out) {
  for (int i = 0; i < n_asked; i++) {
    const int at = asked[i] ? number_of(s, node_of(asked[i])) : -1;
    out->asked[i] = at < 0 ? 0 : number[find(parent, 2 * at)];
    if (at >= 0) met[at] = true;
  }
  for (int i = 0; i < s->n; i++)
    if (s->at[i]->op == HM_NODE_ACCUMULATE && !met[i]) out->leaf[out->n_leaves++] = number[find(parent, 2 * i)];
}

int hm_graph_parts(hm_tensor *const *roots, int n_roots, const char *name, hm_tensor *const *asked, int n_asked,
                   hm_parts *out) {
  node_set s = {0};
  *out = (hm_parts){0};
  int status = gather(&s, roots, n_roots);
  const size_t n = (size_t)s.n;
  int *parent = status ? NULL : hm_calloc(sizeof *parent * (2 * n + 1)),
      *number = status ? NULL : hm_calloc(sizeof *number * (2 * n + 1));
  bool *met = status ? NULL : hm_calloc(n + 1);
  if (!status) {
    out->cut = hm_calloc(sizeof *out->cut * (n + 1));
    out->leaf = hm_calloc(sizeof *out->leaf * (n + 1));
    out->asked = hm_calloc(sizeof *out->asked * (size_t)(n_asked + 1));
    if (!parent || !number || !met || !out->cut || !out->leaf || !out->asked) status = HM_ERR_MEMORY;
  }
  if (!status) {
    join_all(&s, name, parent);
    fill_cuts(&s, name, parent, number, out);
    fill_tensors(&s, parent, number, asked, n_asked, met, out);
  } else {
    hm_parts_free(out);
  }
  hm_free(parent);
  hm_free(number);
  hm_free(met);
  hm_free(s.at);
  hm_free(s.slot);
  return status;
}

void hm_parts_free(hm_parts *p) {
  hm_free(p->cut);
  hm_free(p->leaf);
  hm_free(p->asked);
  *p = (hm_parts){0};
}
