# Makefile -- builds and checks Halfmoon.  `make help` lists what it can do.
#
# Everything is built below $(BUILD); the source tree stays clean.  Objects of the sanitizer build have a folder of their own, so
# that both builds live side by side.  Safe with any -j.

# ====== Settings (make CC=clang, make test FILTER=matmul, ...) ======

BUILD    ?= build
PREFIX   ?= /usr/local
DESTDIR  ?=
CC        = gcc
OPT      ?= -O2
CPPFLAGS ?=
CFLAGS   ?=
LDFLAGS  ?=
PKG_CONFIG ?= pkg-config
LUA      ?= lua5.4
# Name of Lua 5.4 for pkg-config; found by trying the usual ones.
LUA_PC   ?= $(firstword $(foreach n,lua5.4 lua-5.4 lua54 lua,$(shell $(PKG_CONFIG) --exists $(n) 2>/dev/null && echo $(n))))
# What `make demo` runs.
DEMO     ?= examples/demo.lua
# One spec file, and a Lua pattern on the names of its tests.
SPEC     ?=
FILTER   ?=
# Set by `make asan`.
SANITIZE ?=
JOBS     ?= $(shell nproc 2>/dev/null || echo 2)

# ====== What there is ======

comma := ,
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

GEN := $(BUILD)/gen
ifeq ($(SANITIZE),)
  OUT := $(BUILD)
else
  OUT := $(BUILD)/asan
endif
OBJ := $(OUT)/obj

GEN_C   := $(addprefix $(GEN)/,optable.c ops_api.c backward.c)
GEN_H   := $(addprefix $(GEN)/,ops.h ops_api.h tiles_hot.h tiles_cold.h)

# Kernels that are compiled once for each instruction set.
ISA_NAMES := isa attention convert elementwise expression copy fill reduce spread norm normalize rownorm loss pool resample multi
ifneq ($(filter x86_64% amd64%,$(shell $(CC) -dumpmachine 2>/dev/null)),)
  ISAS := baseline avx2 avx512
else
  ISAS := baseline
endif

CORE_C   := $(sort $(wildcard core/*.c))
CPU_C    := $(sort $(wildcard kernels/cpu/*.c))
CPU_HOT  := $(filter $(addprefix kernels/cpu/,$(addsuffix .c,$(ISA_NAMES))),$(CPU_C))
CPU_ONCE := $(filter-out $(CPU_HOT),$(CPU_C))
BIND_C   := $(sort $(filter-out lua/bind/main.c lua/bind/prompt.c,$(wildcard lua/bind/*.c)))
PROG_C   := $(sort $(wildcard lua/bind/main.c lua/bind/prompt.c))

LIB_O  := $(CORE_C:%.c=$(OBJ)/%.o) $(GEN_C:$(GEN)/%.c=$(OBJ)/gen/%.o) $(CPU_ONCE:%.c=$(OBJ)/%.o) \
          $(foreach isa,$(ISAS),$(CPU_HOT:%.c=$(OBJ)/%.$(isa).o))
BIND_O := $(BIND_C:%.c=$(OBJ)/%.o)
PROG_O := $(PROG_C:%.c=$(OBJ)/%.o)

LIB     := $(OUT)/libhalfmoon.a
PROGRAM := $(OUT)/halfmoon
MODULE  := $(OUT)/halfmoon.so

# ====== Flags ======

WARN := -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes
BASE := -std=gnu11 -fPIC -g $(WARN) -iquote core -iquote kernels -iquote $(GEN)
ifneq ($(SANITIZE),)
  BASE    += -fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize-recover=undefined -Wno-maybe-uninitialized
  LINK    := -fsanitize=$(SANITIZE)
endif
# No fused multiply-add, and NaN stays NaN: every instruction set gives the same bits.
KERNEL_FLAGS := -O3 -fwrapv -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp
# oneDNN declares sizes as arrays of 12, and reads as many as there are dims.
ONEDNN_FLAGS := -Wno-stringop-overread
FLAGS_baseline :=
FLAGS_avx2     := -mavx2 -mf16c
FLAGS_avx512   := -mavx512f -mavx512bw -mavx512vl -mavx512dq -mf16c -mprefer-vector-width=512

LUA_CFLAGS := $(if $(LUA_PC),$(shell $(PKG_CONFIG) --cflags $(LUA_PC)))
LUA_LIBDIR := $(if $(LUA_PC),$(shell $(PKG_CONFIG) --variable=libdir $(LUA_PC)))
LUA_LIBS   := $(if $(LUA_PC),$(shell $(PKG_CONFIG) --libs $(LUA_PC)))
# The program carries the whole of Lua and exports it: C modules written for Lua take its API from their host.
LUA_ARCHIVE := $(firstword $(wildcard $(LUA_LIBDIR)/lib$(patsubst -l%,%,$(filter -l%,$(LUA_LIBS))).a))
LUA_LINK := $(if $(LUA_ARCHIVE),-Wl$(comma)--whole-archive $(LUA_ARCHIVE) -Wl$(comma)--no-whole-archive,$(LUA_LIBS))
LIBS := -ldnnl -lz -ljansson -lgomp -lm -lpthread -ldl

# ====== Quiet lines; V=1 shows commands ======

V ?=
ifeq ($(V),)
  Q := @
  say = @printf '  %-6s %s\n' $(1) $(2);
else
  Q :=
  say =
endif

# ====== Targets ======

.PHONY: help all base gen demo test audit test-io test-emu test-emu-full test-oom asan valgrind coverage lint fmt bench bundle env install clean probe run-demo run-test

help: ## this list
	@printf 'Halfmoon.  Targets:\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(filter %akefile %.mk,$(MAKEFILE_LIST)) | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'
	@printf 'Settings: V=1 (show commands), SPEC=spec/x_spec.lua FILTER=name (one test), PREFIX=, BUILD=, CC=, OPT=-O0\n'

all: base plug-in ## the program, the module for stock Lua, the C library, and where nvcc is found the plug-in for CUDA
base: $(PROGRAM) $(MODULE) $(LIB)

gen: $(GEN)/stamp ## expand the op table into build/gen

demo: ## install what is missing, build, train a CNN in f32, bf16 and f16
	@scripts/bootstrap demo
	@$(MAKE) $(jobs) base
	@$(MAKE) run-demo
run-demo:
	$(Q)$(PROGRAM) $(DEMO)

test: ## install what is missing, build, run every check
	@scripts/bootstrap test
	@$(MAKE) $(jobs) base cuda-emu emu-spec emu-tsan $(BUILD)/io-shim.so
	@$(MAKE) run-test
run-test:
	$(Q)SPEC='$(SPEC)' FILTER='$(FILTER)' BUILD='$(BUILD)' LUA='$(LUA)' CC='$(CC)' LIBS='$(LIBS)' KERNEL_FLAGS='$(KERNEL_FLAGS)' JOBS='$(JOBS)' scripts/test

# Fails, or kills the program at, the n-th call on a folder's files; specs put it before the C library.
$(BUILD)/io-shim.so: spec/support/io_shim.c
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(CC) -std=gnu11 -O1 $(WARN) -shared -fPIC -o $@ $< -ldl

test-io: ## saves killed at each system call, every read and write failing once (part of make test)
	@scripts/bootstrap test
	@$(MAKE) $(jobs) base $(BUILD)/io-shim.so
	$(Q)SPEC=spec/crash_spec.lua FILTER='$(FILTER)' BUILD='$(BUILD)' LUA='$(LUA)' JOBS='$(JOBS)' scripts/test

test-emu: ## the specs on the CUDA test double in several wake orders and with deferred streams (part of make test)
	@scripts/bootstrap test
	@$(MAKE) $(jobs) base cuda-emu
	$(Q)SPEC='$(SPEC)' FILTER='$(FILTER)' BUILD='$(BUILD)' JOBS='$(JOBS)' scripts/test-emu

test-emu-full: ## the whole suite on the double in more orders, and everything on it under the sanitizers (long)
	@scripts/bootstrap test
	@$(MAKE) $(jobs) base cuda-emu emu-spec emu-tsan
	@$(MAKE) $(jobs) SANITIZE=address,undefined OPT=-O1 base cuda-emu emu-spec
	$(Q)SPEC='$(SPEC)' FILTER='$(FILTER)' BUILD='$(BUILD)' JOBS='$(JOBS)' scripts/test-emu full

test-oom: base ## memory that runs out, at every allocation in turn (in part in make test)
	$(Q)BUILD='$(BUILD)' scripts/test-oom

asan: ## the specs under the address and undefined-behaviour sanitizers
	@scripts/bootstrap test
	@rm -f '$(BUILD)/asan/halfmoon-cuda-emu.so' # what test-emu-full left, of other sources; the double has that target
	@$(MAKE) $(jobs) SANITIZE=address,undefined OPT=-O1 base
	$(Q)SPEC='$(SPEC)' FILTER='$(FILTER)' BUILD='$(BUILD)/asan' scripts/test asan

audit: ## every op, module, optimizer and function: bound, documented, annotated, proved; and planted faults are seen
	@scripts/bootstrap test
	@$(MAKE) $(jobs) base
	$(Q)BUILD='$(BUILD)' LUA='$(LUA)' CC='$(CC)' LIBS='$(LIBS)' KERNEL_FLAGS='$(KERNEL_FLAGS)' scripts/audit

# GOMP_SPINCOUNT is set so that the program does not start itself once more, outside valgrind.
valgrind: base ## two training steps in float32 and float16 under memcheck (needs valgrind)
	@command -v valgrind >/dev/null || { echo 'valgrind is missing: apt install valgrind' >&2; exit 1; }
	$(Q)GOMP_SPINCOUNT=0 HALFMOON_THREADS=1 HALFMOON_CUDA=off valgrind --quiet --error-exitcode=1 --leak-check=full \
	  --show-leak-kinds=definite --errors-for-leak-kinds=definite --suppressions=scripts/valgrind.supp \
	  $(PROGRAM) scripts/valgrind.lua

coverage: ## lines of core and kernels/cpu that the specs reach (gcov)
	@$(MAKE) $(jobs) BUILD='$(BUILD)/coverage' CUDA=0 OPT=-O1 CFLAGS='-O1 --coverage -fprofile-update=atomic' LDFLAGS=--coverage base
	@$(MAKE) $(jobs) cuda-emu # its own lines are not counted; core's for CUDA are reached through it
	$(Q)cp -p '$(BUILD)/halfmoon-cuda-emu.so' '$(BUILD)/coverage/'
	$(Q)SPEC='$(SPEC)' BUILD='$(BUILD)/coverage' scripts/coverage

lint: ## style and layering: luacheck, clang-format, shellcheck, arrows between folders
	@scripts/bootstrap lint
	$(Q)scripts/lint

fmt: ## format the C sources
	@scripts/bootstrap lint
	$(Q)clang-format -i $(wildcard core/*.[ch] kernels/*.h kernels/cpu/*.[ch] lua/bind/*.[ch])

bench: base ## speed and memory against the machine's limits (and PyTorch where there is one)
	$(Q)$(PROGRAM) scripts/bench/run.lua $(BENCH)

bundle: ## pack the sources and what a bare machine may lack into build/halfmoon-bundle.tar.gz, for scripts/gpu-check.sh
	@scripts/bootstrap test
	$(Q)CC='$(CC)' LUA='$(LUA)' PKG_CONFIG='$(PKG_CONFIG)' scripts/bundle '$(BUILD)/halfmoon-bundle.tar.gz'

env: ## export lines that let stock Lua find the library: eval "$(make -s env)"
	@printf 'export LUA_PATH="%s/lua/?.lua;%s/lua/?/init.lua;;"\n' '$(CURDIR)' '$(CURDIR)'
	@printf 'export LUA_CPATH="%s/?.so;;"\n' '$(abspath $(OUT))'

install: all ## copy to $(PREFIX): bin, lib, include, share
	$(call say,INST,$(DESTDIR)$(PREFIX))
	$(Q)install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/lib/lua/5.4' '$(DESTDIR)$(PREFIX)/include/halfmoon' \
	  '$(DESTDIR)$(PREFIX)/share/halfmoon/lua' '$(DESTDIR)$(PREFIX)/share/lua/5.4'
	$(Q)install $(PROGRAM) '$(DESTDIR)$(PREFIX)/bin/halfmoon'
	$(Q)install -m 644 $(LIB) '$(DESTDIR)$(PREFIX)/lib/libhalfmoon.a'
	$(Q)install -m 644 $(MODULE) '$(DESTDIR)$(PREFIX)/lib/lua/5.4/halfmoon.so'
	$(Q)install -m 644 core/halfmoon.h kernels/kernels.h kernels/expression.h kernels/layout.h $(GEN)/ops.h $(GEN)/ops_api.h '$(DESTDIR)$(PREFIX)/include/halfmoon'
	$(Q)if [ -f $(CUDA_PLUGIN) ]; then install $(CUDA_PLUGIN) '$(DESTDIR)$(PREFIX)/lib/lua/5.4/halfmoon-cuda.so'; fi
	$(Q)rm -rf '$(DESTDIR)$(PREFIX)/share/halfmoon/lua/halfmoon'
	$(Q)cp -R lua/halfmoon '$(DESTDIR)$(PREFIX)/share/halfmoon/lua/'
	$(Q)ln -sfn ../../halfmoon/lua/halfmoon '$(DESTDIR)$(PREFIX)/share/lua/5.4/halfmoon'

clean: ## remove what was built
	$(call say,CLEAN,$(BUILD))
	$(Q)rm -rf $(BUILD)

# A -j given by the caller is kept; else all cores.
jobs = $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(JOBS))

# ====== Rules ======

# Looks for every dependency once, says what it found and what to do; run again with `make probe`.
$(BUILD)/probed: scripts/probe
	@mkdir -p $(@D)
	@CC='$(CC)' PKG_CONFIG='$(PKG_CONFIG)' LUA='$(LUA)' LUA_PC='$(LUA_PC)' LUA_ARCHIVE='$(LUA_ARCHIVE)' NVCC='$(NVCC)' scripts/probe
	@touch $@
probe: ## look for the dependencies and say what to do about missing ones
	@rm -f $(BUILD)/probed
	@$(MAKE) $(BUILD)/probed

$(GEN)/stamp: kernels/ops.def kernels/math.h kernels/half.h scripts/genops.lua $(wildcard scripts/gen/*.lua) lua/halfmoon/expr.lua | $(BUILD)/probed
	@mkdir -p $(GEN)
	$(call say,GEN,$(GEN))
	$(Q)$(LUA) scripts/genops.lua $(GEN)
	@touch $@
$(GEN_C) $(GEN_H): $(GEN)/stamp
	@:

# Changes when flags do, so that objects follow.
FLAGS_NOW := $(CC) $(OPT) $(BASE) $(KERNEL_FLAGS) $(CPPFLAGS) $(CFLAGS) $(LUA_CFLAGS)
$(OBJ)/flags: FORCE
	@mkdir -p $(OBJ)
	@echo '$(FLAGS_NOW)' | cmp -s - $@ || echo '$(FLAGS_NOW)' > $@
.PHONY: FORCE
FORCE:

compile = $(CC) $(BASE) $(1) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c $< -o $@

$(LIB_O) $(BIND_O) $(PROG_O): $(OBJ)/flags | $(GEN)/stamp $(BUILD)/probed

$(OBJ)/core/%.o: core/%.c
	@mkdir -p $(@D)
	$(call say,CC,$(@:$(BUILD)/%=%))
	$(Q)$(call compile,$(OPT))
$(OBJ)/gen/%.o: $(GEN)/%.c
	@mkdir -p $(@D)
	$(call say,CC,$(@:$(BUILD)/%=%))
	$(Q)$(call compile,$(OPT))
$(OBJ)/lua/bind/%.o: lua/bind/%.c
	@mkdir -p $(@D)
	$(call say,CC,$(@:$(BUILD)/%=%))
	$(Q)$(call compile,$(OPT) $(LUA_CFLAGS))
$(OBJ)/kernels/cpu/%.o: kernels/cpu/%.c
	@mkdir -p $(@D)
	$(call say,CC,$(@:$(BUILD)/%=%))
	$(Q)$(call compile,$(KERNEL_FLAGS) $(ONEDNN_FLAGS))
define isa_rule
$(OBJ)/kernels/cpu/%.$(1).o: kernels/cpu/%.c
	@mkdir -p $$(@D)
	$$(call say,CC,$$(@:$(BUILD)/%=%))
	$$(Q)$$(call compile,$$(KERNEL_FLAGS) $$(FLAGS_$(1)) -DHM_ISA=$(1))
endef
$(foreach isa,$(ISAS),$(eval $(call isa_rule,$(isa))))

$(LIB): $(LIB_O)
	$(call say,AR,$@)
	$(Q)rm -f $@ && $(AR) rcs $@ $(LIB_O)

# The engine lies in the module, once: the program brings Lua and the prompt, and finds the module beside itself or where it is installed.
$(PROGRAM): $(PROG_O) $(MODULE)
	$(call say,LD,$@)
	$(Q)$(CC) $(LINK) $(LDFLAGS) -Wl,-E -Wl,-rpath,'$$ORIGIN:$$ORIGIN/../lib/lua/5.4' -o $@ $(PROG_O) $(MODULE) $(LUA_LINK) -ledit -lm -lpthread -ldl

# Only the entry point is visible (and the binding's state, for the prompt); Lua comes from the program that loads the module.
$(MODULE): $(BIND_O) $(LIB)
	$(call say,LD,$@)
	@echo '{ global: luaopen_halfmoon_core; hb_now; local: *; };' > $(OBJ)/module.map
	$(Q)$(CC) $(LINK) $(LDFLAGS) -shared -Wl,-soname,halfmoon.so -Wl,--version-script=$(OBJ)/module.map -o $@ $(BIND_O) $(LIB) $(LIBS)

# The CUDA backend: a plug-in of its own (make cuda), and the same sources on a test double (make cuda-emu), which the specs run.
include kernels/emu/emu.mk
include kernels/cuda/cuda.mk
# Development only: fuzzers of the file readers (make fuzz).
include scripts/fuzz/fuzz.mk

-include $(LIB_O:.o=.d) $(BIND_O:.o=.d) $(PROG_O:.o=.d)
