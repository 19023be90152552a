/*
 * pairs.c -- pairs of nodes whose backward runs as one, called by the walk (autograd.c) for each node that it comes to.
 *
 * relu after max_pool2d, where the backend wants it: relu hands its gradient down as it came, and the pool's backward applies relu's as it reads
 * (max_pool2d_relu_backward).
 *
 * linear after linear_relu or linear_gelu_tanh, always: the product that makes the gradient of linear's input applies the activation's of the
 * layer below on its way out (linear_backward_input_relu and _gelu_tanh).  The layer below then runs as a plain linear.  Where a backend keeps
 * relu's bits (aux_bytes), these may stop a gradient whose place in the result is NaN, while relu's derivative lets it through; there the upper
 * weight must want its gradient, too, which is NaN then, so that nobody takes the step for a good one.
 *
 * In either pair nothing may come between the two: nobody else sends a gradient to the lower node, and nobody looks at what passes (hooks, gradients
 * that were asked for, watches, graphs of gradients).
 */
#include "walk.h"

/* ====== What both pairs need ====== */

/* True if v alone sends a gradient to `below`, the node of its first input, and nobody looks at it: what is still to run was recorded before. */
static bool is_alone(const walk *w, const hm_visit *v, const hm_node *below) {
  const hm_node *n = v->node;
  if (below->hooks || n->backward_f32 || below->backward_f32) return false;
  if (w->create_graph || hm__tapped || hm_mode_current()->anomaly || hm__is_asked_for(w, below)) return false;
  if (w->heap_n > 0 && w->heap[0]->node->seq > below->seq) return false;
  for (int i = 1; i < n->n_in; i++)
    if (n->edge[i].node && n->edge[i].node->seq >= below->seq) return false;
  const hm_visit *met = hm__visit_of(w, below);
  return met ? !met->queued : !w->restricted;
}

/* ====== relu after max_pool2d ====== */

/* The max_pool2d that relu's gradient may be left to, or NULL. */
static hm_node *pool_below(const walk *w, const hm_visit *v) {
  const hm_node *n = v->node;
  hm_node *pool = n->op == HM_OP_RELU ? n->edge[0].node : NULL;
  if (!pool || pool->op != HM_OP_MAX_POOL2D || v->grad[0]->dtype != n->edge[0].dtype) return NULL;
  if (!hm_device_backend(hm_tensor_device(v->grad[0]))->fuses_relu_backward) return NULL;
  return is_alone(w, v, pool) ? pool : NULL;
}

/* Hands v's gradient to the pool as it is, with relu's result. */
static int leave_relu(walk *w, hm_visit *v, hm_node *pool) {
  hm_visit *below = hm__visit_make(w, pool);
  if (!below) return HM_ERR_MEMORY;
  int status = HM_OK;
  const hm_arg out = hm__saved_out(v->node, 0, &status);
  if (status) return status;
  below->relu = hm_tensor_retain(out.t);
  below->grad[0] = v->grad[0];
  v->grad[0] = NULL;
  return hm__visit_queue(w, below);
}

/* Backward of max_pool2d and of the relu after it. */
static int backward_of_both(hm_visit *v, hm_tensor **grad_in) {
  hm_node *n = v->node;
  int status = HM_OK;
  const hm_arg index = hm__saved_out(n, 1, &status);
  if (status) return status;
  hm_attr shape = {.n = 0};
  hm__edge_shape(n, 0, &shape);
  return hm_call_as(HM_OP_MAX_POOL2D_RELU_BACKWARD, (const hm_arg[]){hm_t(v->grad[0]), index, hm_t(v->relu)},
                    (const hm_attr[]){shape, n->attr[0], n->attr[1], n->attr[2], n->attr[3], n->attr[4]},
                    hm__edge_dtype(n, 0), &grad_in[0]);
}

/* ====== linear after linear with an activation ====== */

static bool has_activation(const hm_node *n) { return n->op == HM_OP_LINEAR_RELU || n->op == HM_OP_LINEAR_GELU_TANH; }

/* The layer below, whose activation the gradient of v's input may go through at once, or NULL. */
static hm_node *layer_below(const walk *w, const hm_visit *v) {
  const hm_node *n = v->node;
  if ((n->op != HM_OP_LINEAR && !has_activation(n)) || !v->grad[0]) return NULL;
  hm_node *below = n->edge[0].node;
  if (!below || !has_activation(below) || n->edge[0].nr != 0) return NULL;
  const bool bits = below->op == HM_OP_LINEAR_RELU && hm_device_backend(hm_tensor_device(v->grad[0]))->aux_bytes;
  if (bits && !hm__wants(n, 1)) return NULL;
  return is_alone(w, v, below) ? below : NULL;
}

/* Applies the activation's derivative to v's gradient: what comes next is plain linear's. */
static int go_through(hm_visit *v) {
  const bool relu = v->node->op == HM_OP_LINEAR_RELU;
  int status = HM_OK;
  hm_tensor *g;
  const hm_arg kept = hm__saved_out(v->node, relu ? 0 : 1, &status);
  if (!status)
    status = hm_call(relu ? HM_OP_RELU_BACKWARD : HM_OP_GELU_TANH_BACKWARD, (const hm_arg[]){hm_t(v->grad[0]), kept},
                     NULL, &g);
  if (status) return status;
  hm_tensor_release(v->grad[0]);
  v->grad[0] = g;
  v->through = true;
  return HM_OK;
}

/* The gradient of v's input, through the activation of the layer below. */
static int input_through(const hm_visit *v, hm_node *below, hm_tensor **grad_in) {
  hm_node *n = v->node;
  int status = HM_OK;
  const hm_arg weight = hm__saved_in(n, 1, &status);
  const bool relu = below->op == HM_OP_LINEAR_RELU;
  hm_arg in[4] = {hm_t(v->grad[0]), weight};
  if (!status) in[2] = hm__saved_out(below, relu ? 0 : 1, &status);
  if (!status && relu) in[3] = hm__saved_out(below, 1, &status);
  if (status) return status;
  return hm_call_as(relu ? HM_OP_LINEAR_BACKWARD_INPUT_RELU : HM_OP_LINEAR_BACKWARD_INPUT_GELU_TANH, in, NULL,
                    hm__edge_dtype(n, 0), grad_in);
}

/* What is left of v behind the activation. */
static int backward_of_plain(walk *w, hm_visit *v, hm_tensor **grad_in) {
  if (v->through && !w->retain) hm__node_free_results(v->node); /* before gradients take as much again */
  return hm_op_get(HM_OP_LINEAR)->backward(v->node, v->grad, grad_in);
}

static int backward_of_linear(walk *w, hm_visit *v, hm_node *below, hm_tensor **grad_in) {
  hm_visit *lower = hm__visit_make(w, below);
  if (!lower) return HM_ERR_MEMORY;
  int status = has_activation(v->node) && !v->through ? go_through(v) : HM_OK;
  w->apart = v->node;
  if (!status) status = backward_of_plain(w, v, grad_in);
  w->apart = NULL;
  if (!status) status = input_through(v, below, grad_in);
  lower->through = !status;
  return status;
}

/* ====== The walk's question ====== */

bool hm__run_pair(walk *w, hm_visit *v, hm_tensor **grad_in, int *status) {
  hm_node *below;
  if (v->relu) *status = backward_of_both(v, grad_in);
  else if ((below = pool_below(w, v)) != NULL) *status = leave_relu(w, v, below);
  else if ((below = layer_below(w, v)) != NULL) *status = backward_of_linear(w, v, below, grad_in);
  else if (v->through) *status = backward_of_plain(w, v, grad_in);
  else return false;
  return true;
}
