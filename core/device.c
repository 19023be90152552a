/*
 * device.c -- which devices there are: opens the backends, and turns names into ids and back.
 *
 * Ids: 0 is the CPU, 1 + i is cuda:i.  The table below borrows the backends, which live as long as the process.
 * hm_init enters the CPU, on the thread that becomes the mutator; that thread enters CUDA's devices when it first asks for one (plugin.c).
 * Afterwards the table is only read, from any thread.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "alloc.h"

static const hm_backend *backends[HM_MAX_DEVICES];
HM_FAST_TLS bool hm__mutator;

enum { REASON_BYTES = 1024 };
static bool cuda_tried;
static char cuda_reason[REASON_BYTES]; /* why there is no CUDA */

/* Backends hand their messages over as plain text. */
static int host_fail(int code, const char *message) { return hm_fail(code, "%s", message); }

static const char *host_op_name(int op) { return op >= 0 && op < HM_OP_COUNT ? hm_op_get(op)->name : "no op"; }

static const hm_host host = {HM_BACKEND_VERSION, host_fail, host_op_name};

int hm__device_register(const hm_backend *backend, int first) {
  if (backend->version != HM_BACKEND_VERSION || backend->bytes != sizeof(hm_backend))
    return hm_fail(HM_ERR_INTERNAL,
                   "backend %s: expected version %d of %zu bytes, came version %u of %u bytes\n"
                   "  hint: it was built from other sources; run make again",
                   backend->name, (int)HM_BACKEND_VERSION, sizeof(hm_backend), backend->version, backend->bytes);
  int count = backend->device_count();
  if (first < 0 || count > HM_MAX_DEVICES - first)
    return hm_fail(HM_ERR_DEVICE, "backend %s: %d devices, room for %d", backend->name, count, HM_MAX_DEVICES - first);
  for (int i = 0; i < count; i++) {
    hm__pool_open(first + i, backend, i);
    backends[first + i] = backend;
  }
  return HM_OK;
}

int hm_init(void) {
  if (backends[HM_CPU]) return HM_OK;
  hm__mutator = true;
  const int status = hm__device_register(hm_backend_cpu(&host), HM_CPU);
  if (status || backends[HM_CPU]) return status;
  return HM_ERR_ARG; /* a setting cannot be obeyed; the backend has said why */
}

/* Opens CUDA's plug-in when somebody first asks for one of its devices; keeps why there is none. */
static void open_cuda(void) {
  const hm_backend *cuda;
  if (cuda_tried || !backends[HM_CPU] || !hm__is_mutator()) return;
  cuda_tried = true;
  int status = hm__plugin_load(&host, &cuda);
  if (!status) status = hm__device_register(cuda, 1);
  if (status || !backends[1]) snprintf(cuda_reason, sizeof cuda_reason, "%s", hm_error_message());
}

const hm_backend *hm_device_backend(int device) {
  if (device > HM_CPU) open_cuda();
  if (device >= 0 && device < HM_MAX_DEVICES && backends[device]) return backends[device];
  if (!backends[HM_CPU]) {
    hm_fail(HM_ERR_STATE, "no device is open\n  hint: call hm_init first");
  } else if (device < 0 || device >= HM_MAX_DEVICES) {
    hm_fail(HM_ERR_DEVICE, "device id %d: expected 0 (cpu) to %d (%s)", device, HM_MAX_DEVICES - 1,
            hm_device_name(HM_MAX_DEVICES - 1));
  } else if (!backends[1]) {
    hm_fail(HM_ERR_DEVICE, "device %s: CUDA is not available here: %s\n  hint: use device = \"cpu\"",
            hm_device_name(device), cuda_reason);
  } else {
    int n = 1;
    while (n < HM_MAX_DEVICES && backends[n]) n++;
    hm_fail(HM_ERR_DEVICE, "device %s: there is no such device; the last is %s", hm_device_name(device),
            hm_device_name(n - 1));
  }
  return NULL;
}

int hm_cuda_device_count(void) {
  int n = 0;
  open_cuda();
  while (n + 1 < HM_MAX_DEVICES && backends[n + 1]) n++;
  if (n == 0) hm_fail(HM_ERR_DEVICE, "%s", cuda_reason);
  return n;
}

bool hm_cuda_opened(void) { return backends[1] != NULL; }

const hm_device_info *hm_device_get_info(int device) {
  static hm_device_info info[HM_MAX_DEVICES];
  static bool known[HM_MAX_DEVICES];
  const hm_backend *backend = hm_device_backend(device);
  if (!backend) return NULL;
  if (!known[device] && backend->device_info(device == HM_CPU ? 0 : device - 1, &info[device])) return NULL;
  known[device] = true;
  return &info[device];
}

int hm_device_check_low(int device, int dtype) {
  if (device == HM_CPU || dtype != HM_BF16) return HM_OK;
  const hm_device_info *info = hm_device_get_info(device);
  if (!info) return HM_ERR_DEVICE;
  if (info->major >= 8) return HM_OK;
  return hm_fail(
      HM_ERR_UNSUPPORTED,
      "autocast: %s (%s) has compute capability %d.%d; matrix products in bfloat16 need 8.0\n  hint: use float16",
      hm_device_name(device), info->name, info->major, info->minor);
}

int hm_synchronize(int device) {
  const hm_backend *backend = hm_device_backend(device);
  if (!backend) return HM_ERR_DEVICE;
  const int status = backend->synchronize(device == HM_CPU ? 0 : device - 1);
  return status == HM_ERR_DEVICE ? hm_fail(status, "synchronize: %s", hm_error_message()) : status;
}

/* The id that a name stands for, whether or not the device is there; -1 for a name that means nothing. */
static int parse_name(const char *name) {
  if (strcmp(name, "cpu") == 0) return HM_CPU;
  if (strcmp(name, "cuda") == 0) return 1;
  if (strncmp(name, "cuda:", 5) != 0) return -1;
  const char *digits = name + 5;
  size_t n = strspn(digits, "0123456789");
  if (n == 0 || n > 4 || digits[n]) return -1;
  return 1 + atoi(digits);
}

int hm_device_parse(const char *name, int *device) {
  int id = parse_name(name);
  if (id < 0) return hm_fail(HM_ERR_DEVICE, "device: expected \"cpu\", \"cuda\" or \"cuda:N\", came \"%.64s\"", name);
  if (id >= HM_MAX_DEVICES)
    return hm_fail(HM_ERR_DEVICE, "device %s: expected at most %s", name, hm_device_name(HM_MAX_DEVICES - 1));
  if (!hm_device_backend(id)) return HM_ERR_DEVICE;
  *device = id;
  return HM_OK;
}

const char *hm_device_name(int device) {
  static const char names[HM_MAX_DEVICES][8] = {"cpu",     "cuda:0",  "cuda:1",  "cuda:2",  "cuda:3", "cuda:4",
                                                "cuda:5",  "cuda:6",  "cuda:7",  "cuda:8",  "cuda:9", "cuda:10",
                                                "cuda:11", "cuda:12", "cuda:13", "cuda:14", "cuda:15"};
  return device >= 0 && device < HM_MAX_DEVICES ? names[device] : "no device";
}
