/*
 * plugin.c -- finds and loads the plug-in for CUDA.
 *
 * HALFMOON_CUDA says where it is:
 *   unset     halfmoon-cuda.so beside the program or library that holds this code, or where `make install` puts it
 *   emu       halfmoon-cuda-emu.so at the same places: the test double, for machines without a GPU
 *   off       none
 *   else      a path
 * Without one, or without a driver, the engine runs on the CPU; why is kept and told when somebody asks for "cuda".  The plug-in is loaded the
 * first time that is (its libraries are large), by the mutator thread, and stays for the life of the process.  Called by device.c only.
 */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "alloc.h"

/* From the folder of this code: beside it; bin/ -> lib/; lib/lua/5.4/ -> lib/. */
static const char *const places[] = {"", "../lib/", "../../"};

/* The folder, with a slash, of the program or library that holds this code. */
static bool own_folder(char folder[PATH_MAX]) {
  static const char here; /* its address lies in it */
  char path[PATH_MAX];
  Dl_info info;
  const bool known =
      dladdr(&here, &info) && info.dli_fname && strchr(info.dli_fname, '/') && realpath(info.dli_fname, path);
  if (!known && !realpath("/proc/self/exe", path)) return false;
  char *slash = strrchr(path, '/');
  if (!slash) return false;
  slash[1] = '\0';
  memcpy(folder, path, strlen(path) + 1);
  return true;
}

/* The first file of that name at our places. */
static bool find_file(const char *name, char path[PATH_MAX]) {
  char folder[PATH_MAX];
  if (!own_folder(folder)) return false;
  for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
    char candidate[PATH_MAX + 64];
    const int n = snprintf(candidate, sizeof candidate, "%s%s%s", folder, places[i], name);
    if (n > 0 && n < PATH_MAX && realpath(candidate, path)) return true;
  }
  return false;
}

/* Where the plug-in is; or why there is none, as an error. */
static int locate(char path[PATH_MAX]) {
  const char *want = getenv("HALFMOON_CUDA");
  if (!want || !*want) {
    if (find_file("halfmoon-cuda.so", path)) return HM_OK;
    return hm_fail(HM_ERR_DEVICE, "the plug-in halfmoon-cuda.so is not built (it needs nvcc)");
  }
  if (strcmp(want, "off") == 0) return hm_fail(HM_ERR_DEVICE, "HALFMOON_CUDA=off switches it off");
  if (strcmp(want, "emu") == 0) {
    if (find_file("halfmoon-cuda-emu.so", path)) return HM_OK;
    return hm_fail(HM_ERR_DEVICE, "HALFMOON_CUDA=emu: the test double halfmoon-cuda-emu.so is not built");
  }
  if (realpath(want, path)) return HM_OK;
  return hm_fail(HM_ERR_DEVICE,
                 "HALFMOON_CUDA: there is no file %.200s; it should be \"emu\", \"off\" or the path of a plug-in",
                 want);
}

int hm__plugin_load(const hm_host *host, const hm_backend **out) {
  char path[PATH_MAX];
  *out = NULL;
  const int status = locate(path);
  if (status) return status;
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return hm_fail(HM_ERR_DEVICE, "the plug-in does not load: %.600s", dlerror());
  void *symbol = dlsym(library, HM_BACKEND_SYMBOL);
  if (!symbol) {
    dlclose(library);
    return hm_fail(HM_ERR_DEVICE, "%.400s is no plug-in of Halfmoon: it has no %s", path, HM_BACKEND_SYMBOL);
  }
  hm_backend_open_fn open;
  memcpy(&open, &symbol, sizeof open); /* ISO C has no cast from object to function pointer */
  *out = open(host);
  return *out ? HM_OK : HM_ERR_DEVICE;
}
