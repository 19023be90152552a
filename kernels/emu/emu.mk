# emu.mk -- builds the CUDA test double, $(OUT)/emu/libemu.a, and the programs of its spec.
#
# Included by the Makefile, whose BUILD, OUT, SANITIZE, Q and say it uses; also good alone: make -f kernels/emu/emu.mk emu.
# EMU_CXXFLAGS is what code that runs on the double is compiled with (with -x c++ for a .cu file), EMU_LIBS what it is linked with.
# gemm.cpp is never built with sanitizers: its loops are not what is tested.

BUILD ?= build
OUT   ?= $(BUILD)
ifeq ($(origin CXX),default)
CXX := g++
endif
ifeq ($(origin Q),undefined)
Q := @
say = @printf '  %-6s %s\n' $(1) $(2);
endif

EMU_OUT  := $(OUT)/emu
EMU_CPP  := $(sort $(wildcard kernels/emu/*.cpp))
EMU_O    := $(EMU_CPP:kernels/emu/%.cpp=$(EMU_OUT)/%.o)
EMU_LIB  := $(EMU_OUT)/libemu.a
EMU_LIBS := -ldl -lpthread
EMU_WARN := -Wall -Wextra -Wshadow -Wpointer-arith
EMU_SANITIZE := $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize-recover=undefined -Wno-maybe-uninitialized)
EMU_CXXFLAGS := -std=c++17 -fPIC -g $(EMU_WARN) -Ikernels/emu/include -iquote kernels -iquote kernels/cuda \
                -ffp-contract=off -fno-math-errno -fno-trapping-math
EMU_DEFINES  := -DHM_EMU_INCLUDE='"$(abspath kernels/emu/include)"' -DHM_EMU_CXX='"$(CXX)"'

EMU_SPEC_OUT := $(OUT)/emu-spec
EMU_SPECS    := $(patsubst spec/emu/%.cu,$(EMU_SPEC_OUT)/%,$(filter-out spec/emu/races.cu,$(sort $(wildcard spec/emu/*.cu))))
# ThreadSanitizer sees the kernels; the two files that switch threads are built for it, but not with it.
EMU_TSAN_O   := $(EMU_SPEC_OUT)/tsan-exec.o $(EMU_SPEC_OUT)/tsan-fiber.o

.PHONY: emu emu-spec emu-tsan
emu: $(EMU_LIB)
emu-spec: $(EMU_SPECS)
emu-tsan: $(EMU_SPEC_OUT)/races

$(EMU_OUT)/gemm.o: kernels/emu/gemm.cpp
	@mkdir -p $(@D)
	$(call say,CXX,$(@:$(BUILD)/%=%))
	$(Q)$(CXX) $(EMU_CXXFLAGS) -O3 $(CPPFLAGS) -MMD -MP -c $< -o $@

$(EMU_OUT)/%.o: kernels/emu/%.cpp
	@mkdir -p $(@D)
	$(call say,CXX,$(@:$(BUILD)/%=%))
	$(Q)$(CXX) $(EMU_CXXFLAGS) $(EMU_DEFINES) $(EMU_SANITIZE) -O2 $(CPPFLAGS) -MMD -MP -c $< -o $@

$(EMU_LIB): $(EMU_O)
	$(call say,AR,$(@:$(BUILD)/%=%))
	$(Q)rm -f $@ && $(AR) rcs $@ $(EMU_O)

$(EMU_SPEC_OUT)/%: spec/emu/%.cu $(EMU_LIB)
	@mkdir -p $(@D)
	$(call say,CXX,$(@:$(BUILD)/%=%))
	$(Q)$(CXX) $(EMU_CXXFLAGS) $(EMU_SANITIZE) -O1 $(CPPFLAGS) -MMD -MP -MF $@.d -x c++ $< -x none $(EMU_LIB) -o $@ $(EMU_LIBS)

$(EMU_SPEC_OUT)/tsan-%.o: kernels/emu/%.cpp
	@mkdir -p $(@D)
	$(call say,CXX,$(@:$(BUILD)/%=%))
	$(Q)$(CXX) $(EMU_CXXFLAGS) -DHM_EMU_TSAN=1 -O2 $(CPPFLAGS) -MMD -MP -c $< -o $@

$(EMU_SPEC_OUT)/races: spec/emu/races.cu $(EMU_TSAN_O) $(EMU_LIB)
	$(call say,CXX,$(@:$(BUILD)/%=%))
	$(Q)$(CXX) $(EMU_CXXFLAGS) -fsanitize=thread -O1 $(CPPFLAGS) -MMD -MP -MF $@.d -x c++ $< -x none $(EMU_TSAN_O) $(EMU_LIB) -o $@ $(EMU_LIBS)

-include $(EMU_O:.o=.d) $(EMU_SPECS:=.d) $(EMU_TSAN_O:.o=.d) $(EMU_SPEC_OUT)/races.d
