/*
 * bind.h -- private to lua/bind: what the files of the module halfmoon.core share.
 *
 * How the binding works
 *   - One hb_state for each lua_State (a userdata in its registry).  `hb_now` says which coroutine entered the engine
 *   last; every C function that runs ops begins with hb_enter(L), which costs one comparison unless the coroutine
 *   changed, and then makes that coroutine's modes current.
 *   - A tensor in Lua is a userdata with one pointer (a reference of its own), NULL after release.  Results are written
 *   into a userdata made beforehand (hb_shell), so that a Lua error never loses a reference.
 *   - A tensor that core keeps and may hand out again (a parameter, a gradient) is entered in a weak map from pointer
 *   to userdata (hb_publish), so that it comes back as the same Lua object.  Fresh results are not entered: only this
 *   userdata knows them.
 *   - A status of core becomes a Lua error in hb_raise alone, when nothing is held.  Callbacks from core into Lua go
 *   through hb_protected: no Lua error ever jumps over core.
 *   - Lua's collector may run finalizers at any allocation: __gc functions only release, and never run ops or change
 *   the current coroutine.
 *
 * Names: hb_ is the binding, shared by its files; l_ is a function that Lua calls.  Included by lua/bind only.
 */
#ifndef HM_BIND_H
#define HM_BIND_H

#include <lauxlib.h>
#include <lua.h>

#include "halfmoon.h"

#define HB_TENSOR "halfmoon.Tensor"
#define HB_OPTIM "halfmoon.Optim"
#define HB_SCALER "halfmoon.Scaler"

#define HB_COLD __attribute__((noinline, cold))

struct hb_callback;
struct hb_scaler;
struct hb_mode;

/* Places in the registry, by name; refs[] of hb_state holds their keys. */
enum {
  HB_REF_MODULE,    /* halfmoon.core itself */
  HB_REF_METATABLE, /* of tensors */
  HB_REF_METHODS,   /* core.Tensor */
  HB_REF_MAP,       /* tensor pointer -> userdata, weak values */
  HB_REF_MODES,     /* coroutine -> mode userdata, weak keys */
  HB_REF_THREAD,    /* the current coroutine, so that its address stays its own */
  HB_REF_NAMES,     /* tensor -> name, weak keys */
  HB_REF_HOOKS,     /* tensor -> {[hook] = function}, weak keys */
  HB_REF_OPS,       /* op name -> id */
  HB_REF_PATH,      /* function that tells the module path, or false */
  HB_REF_LOG,       /* function that hears of every op, or false */
  HB_REF_ERROR,     /* error value of a callback on its way out */
  HB_REF_COUNT
};

typedef struct hb_state {
  lua_State *main;       /* main coroutine of this Lua state */
  const void *metatable; /* identity of the tensors' metatable */
  int refs[HB_REF_COUNT];
  bool failed;               /* refs[HB_REF_ERROR] holds an error to raise */
  bool logging;              /* inside the op log's function */
  struct hb_callback *dead;  /* callbacks that core dropped; their registry places are given back later */
  struct hb_scaler *scalers; /* live scalers: they hear when an optimizer goes */
  char library[512];         /* source prefix of the Lua library, which error positions skip; "" when unknown */
} hb_state;

/* Who runs: the coroutine and state that entered last.  L stays alive while it stands here. */
typedef struct hb_running {
  lua_State *L;
  hb_state *state;
} hb_running;
extern hb_running hb_now;

/* ====== module.c: states, coroutines, errors, callbacks ====== */

/* The slow part of hb_enter: makes L current, and its modes with it.  May raise (memory). */
hb_state *hb_enter_other(lua_State *L);
/* First line of every C function that runs ops or needs the state. */
static inline hb_state *hb_enter(lua_State *L) { return hb_now.L == L ? hb_now.state : hb_enter_other(L); }

/* Pushes a registry place. */
static inline int hb_push_ref(lua_State *L, const hb_state *st, int which) {
  return lua_rawgeti(L, LUA_REGISTRYINDEX, st->refs[which]);
}
/* Pops a value into a registry place. */
static inline void hb_set_ref(lua_State *L, const hb_state *st, int which) {
  lua_rawseti(L, LUA_REGISTRYINDEX, st->refs[which]);
}

/* Raises "file:line: message", then the module path.  Format as lua_pushfstring. */
int hb_error(lua_State *L, const char *format, ...) HB_COLD;
/* Pushes "file:line" of the innermost Lua function outside the Lua library, and the module path on a line of its own. */
void hb_push_place(lua_State *L, hb_state *st);
/* The one door from a status to a Lua error: raises the thread's message, or the error value that a callback left.
 * Call it holding nothing. */
int hb_raise(lua_State *L, int status) HB_COLD;
/* Raises unless all is well. */
static inline void hb_check(lua_State *L, const hb_state *st, int status) {
  if (__builtin_expect(status != HM_OK || st->failed, 0)) hb_raise(L, status);
}
/* "nil, message, code" when the world refused (a file missing, damaged); raises for anything else.  saved_errno: errno
 * after the call. */
int hb_refused(lua_State *L, int status, int saved_errno);
/* A C function of the form (path) -> tensor | nil, message, code (files.c). */
int hb_read_tensor(lua_State *L, const char *who, int (*read)(const char *path, hm_tensor **out));

/* Runs fn from inside a callback of core, on the current coroutine L, protected.  fn finds `argument` as a light
 * userdata at 1 and the `extra` values that were on top of the stack (popped) from 2 on.  Afterwards the coroutine and
 * its modes are current again.  Returns HM_OK, or
 * HM_ERR_CALLBACK with core's message filled; keep: the error value itself waits for hb_raise. */
int hb_protected(lua_State *L, lua_CFunction fn, void *argument, int extra, bool keep);

/* A Lua function that core may call, kept in the registry.  drop is fit for core's `drop(ud)`: it may be called
 * anywhere, also in a finalizer. */
typedef struct hb_callback {
  hb_state *state;
  int ref;         /* registry place of the function; LUA_NOREF for hooks on leaves, see autograd.c */
  hm_tensor *leaf; /* such a hook's tensor; borrowed */
  struct hb_callback *next;
} hb_callback;
/* Takes the function at idx.  May raise. */
hb_callback *hb_callback_new(lua_State *L, hb_state *st, int idx);
void hb_callback_drop(void *ud);
/* Gives the registry places of dropped callbacks back. */
void hb_callbacks_sweep(lua_State *L, hb_state *st);

/* ====== tensor.c: userdata and identity ====== */

/* The tensor at idx as a place that holds the pointer; NULL if it is none. */
static inline hm_tensor **hb_test(lua_State *L, const hb_state *st, int idx) {
  if (lua_type(L, idx) != LUA_TUSERDATA || !lua_getmetatable(L, idx)) return NULL;
  const bool mine = lua_topointer(L, -1) == st->metatable;
  lua_pop(L, 1);
  return mine ? (hm_tensor **)lua_touserdata(L, idx) : NULL;
}

/* The live tensor at idx (borrowed); raises "who: what must be a tensor, got ..." */
hm_tensor *hb_tensor(lua_State *L, const hb_state *st, int idx, const char *who, const char *what);
/* Pushes an empty tensor userdata; the place to write a new reference to. */
hm_tensor **hb_shell(lua_State *L, const hb_state *st);
/* After a new reference was written into the shell at idx: if Lua has this tensor already, the shell is replaced by
 * that object. */
void hb_settle(lua_State *L, hb_state *st, int idx);
static inline void hb_settle_shared(lua_State *L, hb_state *st, int idx, const hm_tensor *t) {
  if (t->refs > 1) hb_settle(L, st, idx);
}
/* Enters the tensor userdata at idx in the identity map: core keeps the tensor and may hand it out again. */
void hb_publish(lua_State *L, hb_state *st, int idx);
/* Pushes a borrowed tensor as its Lua object (nil for NULL). */
void hb_push(lua_State *L, hb_state *st, hm_tensor *t);
/* An array table of tensors at idx -> borrowed pointers in a buffer that lies on the stack (pushed).  *n: how many.
 * publish: see above. */
hm_tensor **hb_tensor_list(lua_State *L, hb_state *st, int idx, const char *who, const char *what, bool publish,
                           int *n);
/* Name given to the tensor, pushed as a string or nil. */
void hb_push_name(lua_State *L, hb_state *st, int idx);
void hb_open_tensor(lua_State *L, hb_state *st);

/* ====== Fields of the table on top of the stack ====== */

static inline void hb_set_integer(lua_State *L, const char *key, int64_t value) {
  lua_pushinteger(L, value);
  lua_setfield(L, -2, key);
}

static inline void hb_set_number(lua_State *L, const char *key, double value) {
  lua_pushnumber(L, value);
  lua_setfield(L, -2, key);
}

static inline void hb_set_string(lua_State *L, const char *key, const char *value) {
  lua_pushstring(L, value);
  lua_setfield(L, -2, key);
}

static inline void hb_set_bool(lua_State *L, const char *key, bool value) {
  lua_pushboolean(L, value);
  lua_setfield(L, -2, key);
}

/* ====== args.c: options and small arguments ====== */

typedef enum hb_option_type {
  HB_BOOL,   /* bool */
  HB_INT,    /* int64_t */
  HB_NUMBER, /* double */
  HB_DTYPE,  /* int */
  HB_DEVICE, /* int */
  HB_ANY     /* known, but read by the caller */
} hb_option_type;

typedef struct hb_option {
  const char *name;
  hb_option_type type;
  void *value; /* written when the key is there */
} hb_option;

/* True for a table whose keys are strings. */
bool hb_is_options(lua_State *L, int idx);
/* Reads the table at idx (nil and none: nothing) into the list, which ends with a NULL name.  An unknown key is an
 * error that names the closest known one. */
void hb_options(lua_State *L, int idx, const char *who, const hb_option *list);
/* The entry of a NULL-terminated list that is nearest to a mistyped name, or NULL. */
const char *hb_closest(const char *name, const char *const *list);
/* Pushes "; did you mean ...?" or "; known: a, b, c" for an unknown name. */
const char *hb_push_suggestion(lua_State *L, const char *name, const char *const *list);
/* dtype by long or short name; raises with the known names. */
int hb_dtype(lua_State *L, int idx, const char *who);
/* Same without raising: HM_NONE if the string names none. */
int hb_dtype_by_name(const char *name);
/* Device id by name; raises. */
int hb_device(lua_State *L, int idx, const char *who);
/* An integer argument (a float with an exact integer value will do); raises "who: what must be an integer, got ...". */
int64_t hb_integer(lua_State *L, int idx, const char *who, const char *what);
double hb_number(lua_State *L, int idx, const char *who, const char *what);
bool hb_bool(lua_State *L, int idx, const char *who, const char *what, bool absent);
const char *hb_string(lua_State *L, int idx, const char *who, const char *what);
/* One array table, or the numbers from idx up to last: sizes into attr->v.  Returns the index after what was read. */
int hb_sizes(lua_State *L, int idx, int last, const char *who, const char *what, hm_attr *attr);
/* A 1-based dim -> 0-based and not negative; n: how many dims there are. */
int64_t hb_dim_value(lua_State *L, int64_t dim, int n, const char *who);
int64_t hb_dim(lua_State *L, int idx, int n, const char *who, const char *what);
/* A 1-based position in a dim of given size -> 0-based. */
int64_t hb_position(lua_State *L, int64_t i, int64_t size, int dim, const char *who);
/* Pushes a table of n integers. */
void hb_push_ints(lua_State *L, int n, const int64_t *v);
/* "a number", "a table", "halfmoon.Tensor": what came, for messages. */
const char *hb_came(lua_State *L, int idx);

/* ====== modes.c ====== */

/* The mode userdata of coroutine L: pushed.  Makes it when L is new. */
hm_mode *hb_push_mode(lua_State *L, hb_state *st);
/* hb_protected without extra arguments, for callbacks from the middle of a call into core (hooks in a backward walk):
 * the coroutine takes on the mode that core is in, so that scopes opened by the callback act on it, and has its own
 * back afterwards, whatever coroutines ran meanwhile. */
int hb_protected_inside(lua_State *L, lua_CFunction fn, void *argument);
/* With a region's userdata at 1, a function at 2 and its arguments behind: runs it as the region's forward; its results are what it returns. */
int hb_inside_region(lua_State *L, hb_state *st, hm_region *r);

/* parts.c: calls the function that hears of walks, if there is one, with the root or roots at an index and the inputs (0: none); pushes its
 * result, or something that is no function. */
void hb_walk_begin(lua_State *L, int root, int inputs);
/* After the walk, whether it failed or not: calls the function at an index, if it is one.  Leaves the error of the walk as it is. */
void hb_walk_end(lua_State *L, int end);

/* ====== pressure.c ====== */
void hb_pressure_install(void);
/* Before a backward walk: a young collection, for the forward pass's temporaries, once memory has run short before. */
void hb_pressure_backward(lua_State *L);
/* The same where a loader is asked for its next batch (batch), or a model is called that is no part of another. */
void hb_pressure_pause(lua_State *L, bool batch);
/* The peak begins anew: what lived where counts no more. */
void hb_pressure_forget(void);
void hb_pressure_stats(int64_t *count, double *seconds);
/* Monotonic seconds. */
double hb_clock(void);

/* ====== what each file adds to the module table, which is on top of the stack ====== */
int hb_index(lua_State *L, hb_state *st);    /* index.c: t[key] for a number or table; key at 2, pushes the view */
int hb_newindex(lua_State *L, hb_state *st); /* index.c: t[key] = value */
int hb_default_device(void);                 /* factory.c: where factories make tensors when no device is given */
void hb_table_to_tensor(lua_State *L, hb_state *st, int idx, int dtype, int device,
                        const char *who); /* factory.c: pushes a tensor */
void hb_open_index(lua_State *L, hb_state *st);
void hb_open_factory(lua_State *L, hb_state *st);
void hb_open_ops(lua_State *L, hb_state *st);
void hb_open_autograd(lua_State *L, hb_state *st);
void hb_open_recompute(lua_State *L); /* by hb_open_autograd */
void hb_open_parts(lua_State *L);     /* by hb_open_autograd */
void hb_open_modes(lua_State *L, hb_state *st);
void hb_open_fp8(lua_State *L); /* by hb_open_modes */
/* The recipe at idx, or NULL; and the one that plain "fp8" regions use, pushed.  Borrowed. */
hm_fp8_recipe *hb_fp8_test(lua_State *L, int idx);
hm_fp8_recipe *hb_fp8_default(lua_State *L, hb_state *st);
void hb_open_optim(lua_State *L, hb_state *st);
void hb_open_scaler(lua_State *L, hb_state *st);
void hb_open_sandbox(lua_State *L, hb_state *st);
void hb_open_files(lua_State *L, hb_state *st);
void hb_open_tables(lua_State *L); /* by hb_open_files */
void hb_open_sys(lua_State *L, hb_state *st);
void hb_open_fault(lua_State *L);     /* by hb_open_sys */
void hb_open_telemetry(lua_State *L); /* by hb_open_sys */
/* fault.c: Lua's own allocator is back in its place; nothing fails on purpose from here on. */
void hb_fault_off(lua_State *L);
void hb_open_cuda(lua_State *L, hb_state *st);
void hb_open_expression(lua_State *L, hb_state *st);
/* The optimizer at idx of a scaler's call. */
hm_optim *hb_optim(lua_State *L, int idx, const char *who);
/* Every live scaler forgets an optimizer that is about to go (called in its finalizer). */
void hb_scalers_forget(hb_state *st, const hm_optim *o);

/* Makes the metatable of a userdata type: its finalizer (also __close, where `close`), and its methods or NULL. */
void hb_metatable(lua_State *L, const char *name, lua_CFunction gc, bool close, const luaL_Reg *methods);
/* Adds C functions to the table at the top of the stack. */
void hb_functions(lua_State *L, const luaL_Reg *list);
/* Adds C functions to core.Tensor. */
void hb_methods(lua_State *L, hb_state *st, const luaL_Reg *list);

/* The module.  Returns 1. */
int luaopen_halfmoon_core(lua_State *L);

#endif
