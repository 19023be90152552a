/*
 * index.c -- t[i], t[{...}] and their assignment; narrow, select, split, chunk.  All are views made of the rows
 * `select` and `narrow`.
 *
 * A key is read completely into a plan before the first view is made, so that a bad key costs nothing.  Positions count
 * from 1, ranges include both ends.
 */
#include "bind.h"

typedef struct step {
  bool narrow;   /* else select */
  int64_t start; /* 0-based */
  int64_t length;
} step;

/* One entry for each dim that the key names, in order. */
typedef struct plan {
  int n;
  step step[HM_MAX_NDIM];
} plan;

/* Bounds of a range {a}, {a, b} or {} at idx, for dim d. */
static void read_range(lua_State *L, int idx, const hm_tensor *t, int d, step *s, const char *who) {
  const int64_t size = t->shape[d];
  const lua_Unsigned n = lua_rawlen(L, idx);
  *s = (step){true, 0, size};
  if (n == 0) return;
  if (n > 2)
    hb_error(L, "%s: a range has two ends, {from, to}, both included; the one for dim %d has %d numbers", who, d + 1,
             (int)n);
  lua_rawgeti(L, idx, 1);
  lua_rawgeti(L, idx, (lua_Integer)n);
  int64_t from = hb_integer(L, -2, who, "the start of a range"), to = hb_integer(L, -1, who, "the end of a range");
  lua_pop(L, 2);
  from = hb_position(L, from, size, d, who);
  to = hb_position(L, to, size, d, who);
  if (to < from)
    hb_error(L, "%s: range {%I, %I} for dim %d runs backwards", who, (LUAI_UACINT)(from + 1), (LUAI_UACINT)(to + 1),
             d + 1);
  s->start = from;
  s->length = to - from + 1;
}

/* Reads the key at idx. */
static void read_key(lua_State *L, hb_state *st, int idx, const hm_tensor *t, plan *p, const char *who) {
  p->n = 0;
  if (lua_type(L, idx) == LUA_TNUMBER) {
    if (t->ndim == 0) hb_error(L, "%s: a 0-dim tensor has no positions\n  hint: t:item() gives its value", who);
    p->step[p->n++] = (step){false, hb_position(L, hb_integer(L, idx, who, "a position"), t->shape[0], 0, who), 1};
    return;
  }
  if (lua_type(L, idx) != LUA_TTABLE)
    hb_error(L, "%s: a key must be a position or a table of positions and ranges, got %s%s", who, hb_came(L, idx),
             hb_test(L, st, idx) ? "\n  hint: where(mask, a, b) selects by a mask" : "");
  const lua_Unsigned n = lua_rawlen(L, idx);
  if (n > (lua_Unsigned)t->ndim)
    hb_error(L, "%s: the key has %d entries, the tensor %d dims", who, (int)n, (int)t->ndim);
  for (int d = 0; d < (int)n; d++) {
    const int type = lua_rawgeti(L, idx, d + 1);
    step *s = &p->step[p->n++];
    if (type == LUA_TNUMBER)
      *s = (step){false, hb_position(L, hb_integer(L, -1, who, "a position"), t->shape[d], d, who), 1};
    else if (type == LUA_TTABLE) read_range(L, lua_gettop(L), t, d, s, who);
    else
      hb_error(L, "%s: entry %d of the key must be a position or a range {from, to}, got %s", who, d + 1,
               hb_came(L, -1));
    lua_pop(L, 1);
  }
}

/* Makes the view that a plan describes.  *out: new reference.  No Lua in here. */
static int apply(hm_tensor *t, const plan *p, hm_tensor **out) {
  hm_tensor *now = hm_tensor_retain(t);
  int dim = 0, status = HM_OK;
  for (int i = 0; i < p->n && !status; i++) {
    const step *s = &p->step[i];
    if (s->narrow && s->start == 0 && s->length == now->shape[dim] && i + 1 < p->n) {
      dim++;
      continue;
    }
    hm_tensor *next = NULL;
    status = s->narrow ? hm_op_narrow(hm_t(now), dim, s->start, s->length, &next)
                       : hm_op_select(hm_t(now), dim, s->start, &next);
    dim += s->narrow;
    hm_tensor_release(now);
    now = next;
  }
  if (!status && now == t) { /* t[{}]: a view of everything */
    hm_tensor_release(now);
    return t->ndim > 0 ? hm_op_narrow(hm_t(t), 0, 0, t->shape[0], out) : hm_op_view(hm_t(t), 0, NULL, out);
  }
  *out = now;
  return status;
}

/* t[key]: t at 1, key at 2. */
int hb_index(lua_State *L, hb_state *st) {
  hm_tensor *t = hb_tensor(L, st, 1, "index", "self");
  plan p;
  read_key(L, st, 2, t, &p, "index");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, apply(t, &p, slot));
  return 1;
}

/* t[key] = value: value at 3 is a number, a boolean, a tensor, or a nested table of numbers. */
int hb_newindex(lua_State *L, hb_state *st) {
  hm_tensor *t = hb_tensor(L, st, 1, "index", "self");
  lua_settop(L, 3);
  plan p;
  read_key(L, st, 2, t, &p, "index");
  hm_arg value;
  switch (lua_type(L, 3)) {
  case LUA_TNUMBER: value = lua_isinteger(L, 3) ? hm_i(lua_tointeger(L, 3)) : hm_f(lua_tonumber(L, 3)); break;
  case LUA_TBOOLEAN: value = hm_i(lua_toboolean(L, 3)); break;
  case LUA_TTABLE:
    hb_table_to_tensor(L, st, 3, t->dtype, hm_tensor_device(t), "index");
    lua_replace(L, 3);
    value = hm_t(hb_tensor(L, st, 3, "index", "the value"));
    break;
  default: value = hm_t(hb_tensor(L, st, 3, "index", "the value"));
  }
  hm_tensor **view = hb_shell(L, st), **same = hb_shell(L, st);
  int status = apply(t, &p, view);
  if (!status)
    status =
        value.kind == HM_ARG_TENSOR ? hm_op_copy_(hm_t(*view), value, same) : hm_op_fill_(hm_t(*view), value, same);
  hm_tensor_release(*same); /* the view itself, once more */
  *same = NULL;
  hm_tensor_release(*view);
  *view = NULL;
  hb_check(L, st, status);
  return 0;
}

/* ====== narrow, select, split, chunk ====== */

static hm_tensor *self(lua_State *L, hb_state *st, const char *who) {
  hm_tensor *t = hb_tensor(L, st, 1, who, "self");
  if (t->ndim == 0) hb_error(L, "%s: a 0-dim tensor has no dims", who);
  return t;
}

/* t:narrow(dim, start, length) */
static int l_narrow(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = self(L, st, "narrow");
  const int64_t d = hb_dim(L, 2, t->ndim, "narrow", "the dim"), length = hb_integer(L, 4, "narrow", "the length");
  int64_t start = hb_integer(L, 3, "narrow", "the start");
  if (!(length == 0 && start == t->shape[d] + 1)) start = hb_position(L, start, t->shape[d], (int)d, "narrow");
  else start--;
  if (length < 0 || length > t->shape[d] - start)
    return hb_error(L, "narrow: length %I from position %I does not fit in dim %d of size %I", (LUAI_UACINT)length,
                    (LUAI_UACINT)(start + 1), (int)d + 1, (LUAI_UACINT)t->shape[d]);
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_op_narrow(hm_t(t), d, start, length, slot));
  return 1;
}

/* t:select(dim, index) */
static int l_select(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = self(L, st, "select");
  const int64_t d = hb_dim(L, 2, t->ndim, "select", "the dim");
  const int64_t i = hb_position(L, hb_integer(L, 3, "select", "the index"), t->shape[d], (int)d, "select");
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_op_select(hm_t(t), d, i, slot));
  return 1;
}

/* Appends narrow(d, start, length) to the table on top, as entry k. */
static void append_piece(lua_State *L, hb_state *st, hm_tensor *t, int64_t d, int64_t start, int64_t length,
                         int64_t k) {
  hm_tensor **slot = hb_shell(L, st);
  hb_check(L, st, hm_op_narrow(hm_t(t), d, start, length, slot));
  lua_rawseti(L, -2, k);
}

/* Pieces of `size` along d (the last may be smaller), at least one. */
static int push_pieces(lua_State *L, hb_state *st, hm_tensor *t, int64_t d, int64_t size) {
  const int64_t total = t->shape[d];
  lua_newtable(L);
  int64_t k = 0, start = 0;
  do {
    const int64_t length = size < total - start ? size : total - start;
    append_piece(L, st, t, d, start, length, ++k);
    start += length;
  } while (start < total);
  return 1;
}

static int64_t optional_dim(lua_State *L, int idx, const hm_tensor *t, const char *who) {
  return lua_isnoneornil(L, idx) ? 0 : hb_dim(L, idx, t->ndim, who, "the dim");
}

/* t:split(size or {sizes}[, dim = 1]) -> array of views */
static int l_split(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = self(L, st, "split");
  const int64_t d = optional_dim(L, 3, t, "split"), total = t->shape[d];
  if (lua_type(L, 2) != LUA_TTABLE) {
    const int64_t size = hb_integer(L, 2, "split", "the size");
    if (size < 1) return hb_error(L, "split: the size must be at least 1, got %I", (LUAI_UACINT)size);
    return push_pieces(L, st, t, d, size);
  }
  const int n = (int)lua_rawlen(L, 2);
  int64_t sum = 0;
  for (int k = 1; k <= n; k++) {
    lua_rawgeti(L, 2, k);
    const int64_t size = hb_integer(L, -1, "split", "a size");
    if (size < 0 || size > total - sum)
      return hb_error(L, "split: the sizes must add up to %I, the size of dim %d", (LUAI_UACINT)total, (int)d + 1);
    sum += size;
    lua_pop(L, 1);
  }
  if (sum != total)
    return hb_error(L, "split: the sizes add up to %I, but dim %d has size %I", (LUAI_UACINT)sum, (int)d + 1,
                    (LUAI_UACINT)total);
  lua_createtable(L, n, 0);
  int64_t start = 0;
  for (int k = 1; k <= n; k++) {
    lua_rawgeti(L, 2, k);
    const int64_t size = lua_tointeger(L, -1);
    lua_pop(L, 1);
    append_piece(L, st, t, d, start, size, k);
    start += size;
  }
  return 1;
}

/* t:chunk(n[, dim = 1]) -> array of at most n views of equal size (the last may be smaller) */
static int l_chunk(lua_State *L) {
  hb_state *st = hb_enter(L);
  hm_tensor *t = self(L, st, "chunk");
  const int64_t n = hb_integer(L, 2, "chunk", "the number of chunks"), d = optional_dim(L, 3, t, "chunk");
  if (n < 1) return hb_error(L, "chunk: the number of chunks must be at least 1, got %I", (LUAI_UACINT)n);
  const int64_t size = t->shape[d] / n + (t->shape[d] % n != 0);
  return push_pieces(L, st, t, d, size > 0 ? size : 1);
}

void hb_open_index(lua_State *L, hb_state *st) {
  static const luaL_Reg methods[] = {
      {"narrow", l_narrow}, {"select", l_select}, {"split", l_split}, {"chunk", l_chunk}, {NULL, NULL}};
  hb_methods(L, st, methods);
}
