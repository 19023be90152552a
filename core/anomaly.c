/*
 * anomaly.c -- which op's backward made the first NaN: the checks that a walk makes under detect_anomaly.
 *
 * tape.c notes for each node where it was recorded (hm_set_trace); autograd.c asks here before and after each backward function.
 */
#include <stdio.h>

#include "tape.h"

/* How many elements an op (isnan, isinf) finds in t. */
static int count(int op, hm_tensor *t, int64_t *n) {
  hm_tensor *found, *sum;
  *n = 0;
  if (!hm_dtype_is_float(t->dtype) || t->numel == 0) return HM_OK;
  int status = hm_call(op, (const hm_arg[]){hm_t(t)}, NULL, &found);
  if (status) return status;
  status = hm_op_sum(hm_t(found), 0, NULL, false, &sum);
  hm_tensor_release(found);
  if (status) return status;
  status = hm_item(sum, NULL, n);
  hm_tensor_release(sum);
  return status;
}

/* Does t hold what is looked for?  Writes "2 nan" or "2 nan and 1 inf" to text then. */
static int look(hm_tensor *t, bool *found, char *text, size_t size) {
  int64_t nan, inf = 0;
  *found = false;
  int status = count(HM_OP_ISNAN, t, &nan);
  if (!status && hm_mode_current()->anomaly == HM_ANOMALY_INF) status = count(HM_OP_ISINF, t, &inf);
  if (status || (nan == 0 && inf == 0)) return status;
  *found = true;
  if (inf == 0) snprintf(text, size, "%lld nan", (long long)nan);
  else if (nan == 0) snprintf(text, size, "%lld inf", (long long)inf);
  else snprintf(text, size, "%lld nan and %lld inf", (long long)nan, (long long)inf);
  return HM_OK;
}

/* "\n  its operand x held 1 nan in the forward", if one that the node keeps did; else "". */
static void blame_forward(const hm_node *n, char *text, size_t size) {
  text[0] = '\0';
  if (n->op < 0) return;
  const hm_op_info *info = hm_op_get(n->op);
  for (int i = 0; i < n->n_in + n->n_out; i++) {
    const bool in = i < n->n_in;
    const hm_saved *s = in ? n->in ? &n->in[i] : NULL : n->out ? &n->out[i - n->n_in] : NULL;
    bool found = false;
    char what[64];
    if (!s || s->arg.kind != HM_ARG_TENSOR || look(s->arg.t, &found, what, sizeof what) || !found) continue;
    snprintf(text, size, "\n  its %s %s held %s in the forward already", in ? "operand" : "result",
             in ? info->in[i].name : info->out[i - n->n_in].name, what);
    return;
  }
}

static int report(hm_node *n, bool made, int i, hm_tensor *grad, const char *what) {
  char text[160], forward[160], which[64];
  const char *place = n->trace ? n->trace : "not known\n  hint: run the forward inside detect_anomaly, too";
  if (n->op >= 0)
    snprintf(which, sizeof which, "%s", made ? hm_op_get(n->op)->in[i].name : hm_op_get(n->op)->out[i].name);
  else snprintf(which, sizeof which, "%s %d", made ? "input" : "output", i + 1);
  hm_describe(grad, text, sizeof text);
  blame_forward(n, forward, sizeof forward);
  if (!made)
    return hm_fail(
        HM_ERR_STATE,
        "detect_anomaly: the gradient that came in to %s (of its %s, %s) holds %s, which no backward made: a hook, a sum of gradients, or what backward began with\n  recorded at %s",
        hm__node_name(n), which, text, what, place);
  return hm_fail(HM_ERR_STATE,
                 "detect_anomaly: the backward of %s made the gradient of its %s, %s, hold %s%s\n  recorded at %s",
                 hm__node_name(n), which, text, what, forward, place);
}

int hm__anomaly_check(hm_node *n, bool made, int n_grads, hm_tensor *const *grad) {
  hm_mode *mode = hm_mode_current();
  const bool recording = mode->grad;
  mode->grad = false;
  int status = HM_OK;
  for (int i = 0; i < n_grads && !status; i++) {
    bool found = false;
    char what[64];
    if (!grad[i]) continue;
    status = look(grad[i], &found, what, sizeof what);
    if (found) status = report(n, made, i, grad[i], what);
  }
  mode->grad = recording;
  return status;
}
