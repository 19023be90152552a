/*
 * fault.c -- failures on purpose, for tests: the n-th allocation of the engine or of Lua.
 *
 * Lua's allocator is put behind a counting one while a failure is pending, and put back afterwards: a state never ends with a function of
 * this module as its allocator, which may be unloaded before the state's last block is freed.  Lua asks twice, with an emergency
 * collection in between, so the second question is refused as well.
 *
 * One Lua state at a time.
 */
#include "bind.h"

static struct {
  lua_Alloc inner; /* the state's own; NULL: nothing is pending */
  void *ud;
  int64_t left;           /* growing requests until the one that fails */
  int64_t refused, asked; /* requests refused and seen since the last arming */
  bool again;             /* the same request comes once more */
  const void *block;
  size_t from, to;
} fault;

static void *failing(void *ud, void *block, size_t from, size_t to) {
  (void)ud;
  const bool grows = to != 0 && (!block || to > from);
  if (!grows) return fault.inner(fault.ud, block, from, to);
  const bool same = fault.again && fault.block == block && fault.from == from && fault.to == to;
  fault.again = false;
  if (same) return NULL;
  fault.asked++;
  if (fault.left > 0 && --fault.left == 0) {
    fault.refused++;
    fault.again = true;
    fault.block = block;
    fault.from = from;
    fault.to = to;
    return NULL;
  }
  return fault.inner(fault.ud, block, from, to);
}

void hb_fault_off(lua_State *L) {
  void *ud;
  fault.left = 0;
  fault.again = false;
  if (!fault.inner || lua_getallocf(L, &ud) != failing) return;
  lua_setallocf(L, fault.inner, fault.ud);
  fault.inner = NULL;
}

/* core.alloc_fail_at(n) -> left: the n-th engine allocation from now fails; 0 switches off.  left: what was to come before the last one asked for;
 * 0: it came. */
static int l_alloc_fail_at(lua_State *L) {
  hb_enter(L);
  lua_pushinteger(L, hm_alloc_fail_at(hb_integer(L, 1, "alloc_fail_at", "n")));
  return 1;
}

/* core.lua_alloc_fail_at(n) -> refused, asked: the n-th time from now that Lua asks for memory, it gets none; 0 switches off.  Says how often it was
 * refused, and how often it asked, since the last call. */
static int l_lua_alloc_fail_at(lua_State *L) {
  hb_enter(L);
  const int64_t n = hb_integer(L, 1, "lua_alloc_fail_at", "n");
  if (n < 0) return hb_error(L, "lua_alloc_fail_at: n must not be negative, got %I", (LUAI_UACINT)n);
  hb_fault_off(L);
  lua_pushinteger(L, fault.refused);
  lua_pushinteger(L, fault.asked);
  fault.refused = fault.asked = 0;
  if (n > 0) {
    fault.inner = lua_getallocf(L, &fault.ud);
    fault.left = n;
    lua_setallocf(L, failing, NULL);
  }
  return 2;
}

/* core.host_blocks() -> blocks of host memory that the engine holds, as a difference to the first call */
static int l_host_blocks(lua_State *L) {
  lua_pushinteger(L, hm_host_blocks());
  return 1;
}

void hb_open_fault(lua_State *L) {
  static const luaL_Reg functions[] = {{"alloc_fail_at", l_alloc_fail_at},
                                       {"lua_alloc_fail_at", l_lua_alloc_fail_at},
                                       {"host_blocks", l_host_blocks},
                                       {NULL, NULL}};
  hb_functions(L, functions);
}
