/*
 * graph.h -- private to core: nodes of the autograd tape.
 *
 * A node stands for one recorded op.  Edges point from a node to the nodes that made its inputs (to an accumulator for a leaf).  Each edge
 * knows the shape and dtype that the gradient must have there; the engine sums over broadcast dims and casts to fit, so backward functions need
 * not.  A weight that autocast cast down keeps a float32 edge: its gradient is made in float32 and never rounded on the way.
 *
 * Ownership: an output tensor owns its node; a node owns its saved tensors and, through edges, the nodes below.  A saved output is kept as an
 * alias without graph, so there are no cycles.  Freeing is iterative: a chain of 100,000 nodes frees without recursion.
 */
#ifndef HM_CORE_GRAPH_H
#define HM_CORE_GRAPH_H

#include "op.h"

typedef struct hm_edge {
  hm_node *node; /* owned; NULL: this input wants no gradient */
  int32_t nr;    /* which output of node */
  int8_t dtype;  /* of the gradient */
  int8_t ndim;
  int16_t device;
  int64_t shape[HM_MAX_NDIM]; /* set for every tensor input, wanted or not */
} hm_edge;

/* Kind of an hm_saved.arg that a region keeps: arg.i is its place there (recompute.h). */
enum { HM_ARG_LATER = 64 };

typedef struct hm_saved {
  hm_arg arg;       /* tensor (owned), number, none, or HM_ARG_LATER */
  uint32_t version; /* of the tensor's storage when it was saved */
} hm_saved;

struct hm_node {
  _Atomic int32_t refs;
  int32_t op; /* enum hm_op, or HM_NODE_ACCUMULATE / HM_NODE_CUSTOM */
  uint16_t n_in, n_out;
  bool freed;               /* saved tensors are gone: a second backward is an error */
  uint16_t dtypes;          /* 1 << dtype of each input that wants a gradient, here and in the nodes below */
  uint64_t seq;             /* order of recording; the walk takes the highest first */
  struct hm_visit *visit;   /* scratch of the innermost walk that has met the node */
  hm_edge *edge;            /* n_in of them */
  hm_saved *in;             /* n_in, or NULL */
  hm_saved *out;            /* n_out, or NULL */
  hm_attr *attr;            /* the row's attributes */
  hm_hook *hooks;           /* of non-leaf outputs; see hm_hook.out_nr */
  hm_tensor *leaf;          /* accumulators: owned; the leaf only borrows its accumulator */
  bool backward_f32;        /* gradients of this op are computed in float32 (autocast's `backward` option) */
  struct hm_custom *custom; /* custom functions: owned */
  hm_region *region;        /* owned; keeps what is HM_ARG_LATER */
  bool lent;                /* stands for edge[0]: edges to it go there at once (hm__lend) */
  bool again;               /* recorded while the region was computed again: what it keeps there is not this node's */
  char *trace;              /* owned; where the op was recorded, under detect_anomaly */
};

enum { HM_NODE_ACCUMULATE = -1, HM_NODE_CUSTOM = -2 };

/* ---- for generated backward functions (build/gen/backward.c) ----
 *   grad     n_out gradients (NULL where none arrived), borrowed
 *   grad_in  n_in slots, NULL on entry; the function sets new references where hm__wants() says so */
bool hm__wants(const hm_node *n, int in);
bool hm__recording(void); /* the gradient itself is recorded (create_graph) */
hm_arg hm__saved_in(hm_node *n, int in,
                    int *status); /* borrowed for the call; under create_graph it carries its graph */
hm_arg hm__saved_out(hm_node *n, int out, int *status); /* likewise */
void hm__edge_shape(const hm_node *n, int in, hm_attr *shape);
int64_t hm__edge_size(const hm_node *n, int in, int64_t dim);
int hm__edge_dtype(const hm_node *n, int in); /* the dtype the outermost call may write at once */
void hm__inverse_dims(const hm_attr *dims, hm_attr *out);
double hm__reduced_count(const hm_node *n, int in, const hm_attr *dims);

/* ---- recording (autograd.c) ---- */
/* Makes the node of a finished call and hangs the outputs on it. */
int hm__record(hm_opcall *c);
/* True if the call must be recorded: gradients on, the op differentiable, some input wants one. */
bool hm__needs_record(const hm_opcall *c);
/* Refuses an operand that wants a gradient where the row derives by others alone: its share would be lost in silence.
 * Rows of backward functions are left out: what they do not derive by has the derivative 0 (a maximum's place) or its share comes another way (a logsumexp). */
int hm__check_derivatives(const hm_opcall *c);
/* Before an in-place write to t: refuses leaves that want a gradient and views of tensors that do. */
int hm__check_inplace(const hm_opcall *c, hm_tensor *t, bool record);
/* After an in-place write to t with gradients on: marks earlier views of it as out of date; a write that was not recorded (fill_, or copy_ of a
 * plain tensor) cuts t off from the graph, since nothing of its old value is left. */
int hm__rewritten(hm_tensor *t, bool recorded);
void hm__node_release(hm_node *n);
/* When gradients last reached this leaf: larger is later; 0 never.  The scaler sorts culprits by it. */
static inline uint64_t hm__grad_order(const hm_tensor *t) { return t->grad_order; }
/* True while this thread walks a graph backward. */
bool hm__in_backward(void);
/* The node whose backward runs; NULL outside. */
const hm_node *hm__running_node(void);
/* The node whose backward runs or whose gradients are being handed on; NULL outside. */
const hm_node *hm__walked_node(void);
/* "conv2d", the name of a custom function, or "leaf". */
const char *hm__node_name(const hm_node *n);
/* The tensors a node keeps for backward, for the op log: fills list (borrowed), returns how many. */
int hm__node_saved(const hm_node *n, hm_tensor **list, int max);

/* ---- autocast (autocast.c) ---- */
/* Chooses dtypes for the call and casts operands; afterwards in[], dtype, compute are final. */
int hm__autocast(hm_opcall *c);

/* ---- the watch on kernel calls (telemetry.c); both only while hm__watched ---- */
extern bool hm__watched;
int hm__watch_before(const hm_opcall *c);
int hm__watch_after(const hm_opcall *c);

/* ---- the watch on gradients that float16 would hold (telemetry.c); all only while hm__tapped ---- */
extern bool hm__tapped;
/* Would float16 training hold the gradient that goes along e in float16? */
bool hm__tap_wants(const hm_edge *e);
int hm__tap_gradient(const hm_edge *e, const hm_tensor *g);
/* After a recorded call. */
int hm__tap_forward(const hm_opcall *c);

#endif
