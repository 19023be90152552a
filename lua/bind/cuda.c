/*
 * cuda.c -- GPUs for Lua: what there are, what they did, and kernels that a script compiles for them.
 *
 * A kernel is a userdata that owns its hm_kernel; the Lua side (halfmoon/cuda.lua) gives it its face.
 */
#include "bind.h"

#define HB_KERNEL "halfmoon.Kernel"

/* The device at idx, "cuda" when absent; raises for the CPU. */
static int cuda_device(lua_State *L, int idx, const char *who) {
  if (lua_isnoneornil(L, idx)) {
    lua_settop(L, idx);
    lua_pushliteral(L, "cuda");
    lua_replace(L, idx);
  }
  const int device = hb_device(L, idx, who);
  if (device == HM_CPU) hb_error(L, "%s: a device of CUDA is wanted, like \"cuda:0\", got \"cpu\"", who);
  return device;
}

/* ====== Devices ====== */

/* core.cuda_count() -> how many, and why there are none */
static int l_count(lua_State *L) {
  hb_enter(L);
  const int n = hm_cuda_device_count();
  lua_pushinteger(L, n);
  if (n > 0) return 1;
  lua_pushstring(L, hm_error_message());
  return 2;
}

/* core.cuda_properties([device]) */
static int l_properties(lua_State *L) {
  hb_state *st = hb_enter(L);
  const hm_device_info *info = hm_device_get_info(cuda_device(L, 1, "properties"));
  if (!info) hb_raise(L, HM_ERR_DEVICE);
  (void)st;
  lua_createtable(L, 0, 10);
  lua_pushstring(L, info->name);
  lua_setfield(L, -2, "name");
  hb_set_integer(L, "major", info->major);
  hb_set_integer(L, "minor", info->minor);
  hb_set_integer(L, "total_memory", (int64_t)info->memory_bytes);
  hb_set_integer(L, "multi_processor_count", info->multiprocessors);
  hb_set_integer(L, "max_threads_per_block", info->max_threads_per_block);
  hb_set_integer(L, "shared_memory_per_block", (int64_t)info->shared_bytes_per_block);
  lua_pushfstring(L, "%d.%d", info->driver / 1000, info->driver % 1000 / 10);
  lua_setfield(L, -2, "driver");
  lua_pushfstring(L, "%d.%d", info->runtime / 1000, info->runtime % 1000 / 10);
  lua_setfield(L, -2, "runtime");
  const int device = cuda_device(L, 1, "properties");
  const hm_backend *backend = hm_device_backend(device);
  lua_pushstring(L, backend && backend->convolution ? backend->convolution(device - 1) : "none");
  lua_setfield(L, -2, "convolution");
  return 1;
}

/* core.synchronize([device]) */
static int l_synchronize(lua_State *L) {
  hb_state *st = hb_enter(L);
  hb_check(L, st, hm_synchronize(cuda_device(L, 1, "synchronize")));
  return 0;
}

/* core.cuda_counters() -> {launches, synchronisations, copies, bytes, ...} as hm_device_counters has them; zeros without a device */
static int l_counters(lua_State *L) {
  hb_enter(L);
  hm_device_counters c = {0};
  const hm_backend *backend = hm_cuda_device_count() > 0 ? hm_device_backend(1) : NULL;
  if (backend && backend->counters) backend->counters(&c);
  lua_createtable(L, 0, 4);
  hb_set_integer(L, "launches", c.launches);
  hb_set_integer(L, "synchronisations", c.synchronisations);
  hb_set_integer(L, "copies", c.copies);
  hb_set_integer(L, "bytes", c.bytes);
  hb_set_integer(L, "cudnn_convolutions", c.cudnn_convolutions);
  hb_set_integer(L, "im2col_convolutions", c.im2col_convolutions);
  hb_set_integer(L, "cudnn_refusals", c.cudnn_refusals);
  hb_set_integer(L, "fused_linears", c.fused_linears);
  hb_set_integer(L, "stepped_linears", c.stepped_linears);
  return 1;
}

/* ====== Kernels ====== */

/* core.cuda_compile(source, name[, device]) -> kernel */
static int l_compile(lua_State *L) {
  hb_state *st = hb_enter(L);
  const char *source = hb_string(L, 1, "kernel", "the source"), *name = hb_string(L, 2, "kernel", "the name");
  const int device = cuda_device(L, 3, "kernel");
  hm_kernel **slot = lua_newuserdatauv(L, sizeof *slot, 0);
  *slot = NULL;
  luaL_setmetatable(L, HB_KERNEL);
  hb_check(L, st, hm_kernel_compile(device, source, name, slot));
  return 1;
}

/* Up to three sizes at idx: a number or an array; missing ones are 1. */
static void read_sizes(lua_State *L, int idx, const char *what, int64_t size[3]) {
  hm_attr attr;
  hb_sizes(L, idx, idx, "kernel", what, &attr);
  if (attr.n < 1 || attr.n > 3) hb_error(L, "kernel: %s must be one to three sizes, got %d", what, attr.n);
  for (int d = 0; d < 3; d++) size[d] = d < attr.n ? attr.v[d] : 1;
}

static hm_arg read_arg(lua_State *L, const hb_state *st, const hm_kernel *k, int idx, int number) {
  if (lua_isinteger(L, idx)) return hm_i(lua_tointeger(L, idx));
  if (lua_type(L, idx) == LUA_TNUMBER) return hm_f(lua_tonumber(L, idx));
  if (lua_type(L, idx) == LUA_TBOOLEAN) return hm_i(lua_toboolean(L, idx));
  hm_tensor **t = hb_test(L, st, idx);
  if (!t)
    hb_error(L, "kernel %s: argument %d must be a tensor, a number or a boolean, got %s", hm_kernel_name(k), number,
             hb_came(L, idx));
  if (!*t) hb_error(L, "kernel %s: argument %d was released", hm_kernel_name(k), number);
  return hm_t(*t);
}

/* core.cuda_launch(kernel, grid, block, shared, ...) */
static int l_launch(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_kernel **k = luaL_checkudata(L, 1, HB_KERNEL);
  int64_t grid[3], block[3];
  hm_arg in[HM_MAX_USER_ARGS];
  const int n = lua_gettop(L) - 4;
  if (!*k) return hb_error(L, "kernel: it was freed");
  read_sizes(L, 2, "grid", grid);
  read_sizes(L, 3, "block", block);
  const int64_t shared = hb_integer(L, 4, "kernel", "shared");
  if (n > HM_MAX_USER_ARGS) return hb_error(L, "kernel: at most %d arguments, got %d", (int)HM_MAX_USER_ARGS, n);
  for (int i = 0; i < n; i++) in[i] = read_arg(L, st, *k, i + 5, i + 1);
  hb_check(L, st, hm_kernel_launch(*k, grid, block, shared, in, n));
  return 0;
}

static int l_kernel_gc(lua_State *L) {
  hm_kernel **k = lua_touserdata(L, 1);
  hm_kernel_free(*k);
  *k = NULL;
  return 0;
}

void hb_open_cuda(lua_State *L, hb_state *st) {
  (void)st;
  static const luaL_Reg functions[] = {{"cuda_count", l_count},
                                       {"cuda_properties", l_properties},
                                       {"synchronize", l_synchronize},
                                       {"cuda_counters", l_counters},
                                       {"cuda_compile", l_compile},
                                       {"cuda_launch", l_launch},
                                       {NULL, NULL}};
  hb_metatable(L, HB_KERNEL, l_kernel_gc, false, NULL);
  hb_functions(L, functions);
}
