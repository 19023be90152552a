# fuzz.mk -- fuzzers of the file readers (libFuzzer: clang).  Part of the Makefile; for development, not part of make test.
#
# core is compiled once more, by clang with its sanitizers and its eyes; the kernels come as they are from the library.

FUZZ_CC      ?= clang
FUZZ_SECONDS ?= 60
FUZZ_DIR     := $(BUILD)/fuzz
FUZZ_NAMES   := $(patsubst scripts/fuzz/%.c,%,$(wildcard scripts/fuzz/*.c))
# One of them only: make fuzz FUZZ=idx
FUZZ         ?= $(FUZZ_NAMES)
FUZZ_FLAGS   := -g -O1 -std=gnu11 -Wall -Wextra -fno-sanitize-recover=undefined -fno-omit-frame-pointer -D__SANITIZE_ADDRESS__ \
                -D_GNU_SOURCE= -Wno-bitwise-instead-of-logical \
                -iquote core -iquote kernels -iquote $(GEN)
FUZZ_O       := $(patsubst %.c,$(FUZZ_DIR)/%.o,$(CORE_C)) $(GEN_C:$(GEN)/%.c=$(FUZZ_DIR)/gen/%.o)

.PHONY: fuzz fuzz-build fuzz-run
.SECONDARY: $(FUZZ_O)
fuzz: ## fuzz the file readers, FUZZ_SECONDS=60 each (needs clang)
	@command -v $(FUZZ_CC) >/dev/null || { echo 'fuzz: $(FUZZ_CC) is missing: apt install clang (or FUZZ_CC=...)' >&2; exit 1; }
	@$(MAKE) $(jobs) fuzz-build
	@$(MAKE) fuzz-run
fuzz-build: $(FUZZ:%=$(FUZZ_DIR)/fuzz-%)
fuzz-run:
	$(Q)DIR='$(FUZZ_DIR)' SECONDS_EACH='$(FUZZ_SECONDS)' scripts/fuzz/run $(FUZZ)

$(FUZZ_DIR)/core/%.o: core/%.c | $(GEN)/stamp
	@mkdir -p $(@D)
	$(call say,CC,$(@:$(BUILD)/%=%))
	$(Q)$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link,address,undefined -MMD -MP -c $< -o $@
$(FUZZ_DIR)/gen/%.o: $(GEN)/%.c | $(GEN)/stamp
	@mkdir -p $(@D)
	$(call say,CC,$(@:$(BUILD)/%=%))
	$(Q)$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link,address,undefined -MMD -MP -c $< -o $@
$(FUZZ_DIR)/fuzz-%: scripts/fuzz/%.c scripts/fuzz/fuzz.h $(FUZZ_O) $(LIB)
	$(call say,LD,$(@:$(BUILD)/%=%))
	$(Q)$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer,address,undefined -o $@ $< $(FUZZ_O) $(LIB) $(LIBS)

-include $(FUZZ_O:.o=.d)
