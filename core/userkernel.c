/*
 * userkernel.c -- kernels that a user wrote: compiled by a device's backend, launched on tensors.
 *
 * Such a kernel is outside autograd.  Core guards what it can see: tensors live on the kernel's device, lie densely, and one that the kernel writes
 * to (its pointer is not const) must not be part of a graph that is being recorded; its version goes up like after any write.
 * Mutator thread only.
 */
#include <string.h>

#include "op.h"

struct hm_kernel {
  int device;
  const hm_backend *backend; /* borrowed */
  hm_user_kernel *kernel;    /* owned */
  char name[];
};

int hm_kernel_compile(int device, const char *source, const char *name, hm_kernel **out) {
  *out = NULL;
  const hm_backend *backend = hm_device_backend(device);
  if (!backend) return HM_ERR_DEVICE;
  if (!backend->user_compile)
    return hm_fail(HM_ERR_UNSUPPORTED, "kernel %.100s: %s compiles no kernels\n  hint: they need a device of CUDA",
                   name, hm_device_name(device));
  const size_t length = strlen(name) + 1;
  hm_kernel *k = hm_alloc(sizeof *k + length);
  if (!k) return HM_ERR_MEMORY;
  *k = (hm_kernel){.device = device, .backend = backend};
  memcpy(k->name, name, length);
  const int status = backend->user_compile(device - 1, source, name, false, &k->kernel);
  if (status) hm_free(k);
  else *out = k;
  return status;
}

void hm_kernel_free(hm_kernel *k) {
  if (!k) return;
  k->backend->user_free(k->kernel);
  hm_free(k);
}

int hm_kernel_device(const hm_kernel *k) { return k->device; }

const char *hm_kernel_name(const hm_kernel *k) { return k->name; }

/* One tensor as the kernel gets it. */
static int read_tensor(const hm_kernel *k, int i, const hm_tensor *t, hm_user_arg *a) {
  char text[160];
  if (hm_tensor_device(t) != k->device)
    return hm_fail(HM_ERR_DEVICE,
                   "kernel %s: argument %d is %s, the kernel was compiled for %s\n  hint: move it with :to(\"%s\")",
                   k->name, i + 1, hm_describe(t, text, sizeof text), hm_device_name(k->device),
                   hm_device_name(k->device));
  if (!hm_is_contiguous(t))
    return hm_fail(HM_ERR_ARG,
                   "kernel %s: argument %d, %s, does not lie row by row in memory\n  hint: pass :contiguous()", k->name,
                   i + 1, hm_describe(t, text, sizeof text));
  a->kind = HM_USER_POINTER;
  a->dtype = t->dtype;
  a->data = hm_tensor_data(t);
  return HM_OK;
}

static int read_args(const hm_kernel *k, const hm_arg *in, int n, hm_user_arg *out) {
  if (n > HM_MAX_USER_ARGS)
    return hm_fail(HM_ERR_ARG, "kernel %s: at most %d arguments, came %d", k->name, (int)HM_MAX_USER_ARGS, n);
  for (int i = 0; i < n; i++) {
    out[i] = (hm_user_arg){.kind = HM_USER_INT, .dtype = HM_NONE};
    if (in[i].kind == HM_ARG_TENSOR) {
      const int status = read_tensor(k, i, in[i].t, &out[i]);
      if (status) return status;
    } else if (in[i].kind == HM_ARG_FLOAT) {
      out[i].kind = HM_USER_FLOAT;
      out[i].f = in[i].f;
    } else {
      out[i].i = in[i].i;
    }
  }
  return HM_OK;
}

/* What the kernel writes to must not want a gradient while gradients are on. */
static int check_written(const hm_kernel *k, const hm_arg *in, int n, const hm_user_arg *arg) {
  char text[160];
  for (int i = 0; i < n; i++) {
    if (in[i].kind != HM_ARG_TENSOR || !arg[i].written || !in[i].t->requires_grad || !hm_mode_current()->grad) continue;
    return hm_fail(
        HM_ERR_STATE,
        "kernel %s: it may write to argument %d, %s, which requires a gradient\n  hint: declare the pointer const if it only reads, or "
        "launch under no_grad",
        k->name, i + 1, hm_describe(in[i].t, text, sizeof text));
  }
  return HM_OK;
}

int hm_kernel_launch(hm_kernel *k, const int64_t grid[3], const int64_t block[3], int64_t shared_bytes,
                     const hm_arg *in, int n) {
  hm_user_arg arg[HM_MAX_USER_ARGS];
  int status = read_args(k, in, n, arg);
  if (!status) status = k->backend->user_check(k->kernel, arg, n);
  if (!status) status = check_written(k, in, n, arg);
  if (!status) status = k->backend->user_launch(k->kernel, grid, block, shared_bytes, arg, n);
  if (status) return status;
  for (int i = 0; i < n; i++)
    if (in[i].kind == HM_ARG_TENSOR && arg[i].written) hm__touch(in[i].t);
  return HM_OK;
}
