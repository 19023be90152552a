/*
 * prompt.h -- between the two C files of the program `halfmoon`: main.c and prompt.c.  Not part of the module for stock Lua.
 */
#ifndef HM_PROMPT_H
#define HM_PROMPT_H

#include <lua.h>
#include <stdbool.h>

/* Calls the function below nargs arguments on the stack, as lua_pcall does, with a traceback added to errors, and so that Ctrl-C
 * raises "interrupted!" in the running Lua code.  Returns lua_pcall's status.  (main.c) */
int hm_program_call(lua_State *L, int nargs, int nresults);

/* While this is on, Ctrl-C only sets the flag that hm_program_interrupted reads and clears: a line is being edited.  (main.c) */
void hm_program_editing(bool on);
bool hm_program_interrupted(void);

/* The module "halfmoon.program": line editor, history, guarded calls, for lua/halfmoon/prompt.lua.  (prompt.c) */
int luaopen_halfmoon_program(lua_State *L);

#endif
