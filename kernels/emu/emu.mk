# emu.mk -- builds the CUDA test double, build/emu/libemu.a.  Included by the Makefile; BUILD, OUT, SANITIZE, Q and say are its own.
#
# EMU_CXXFLAGS is also what code that runs on the double is compiled with (with -x c++ for a .cu file), EMU_LIBS what it is linked with.
# gemm.cpp is never built with sanitizers: its loops are not what is tested.

CXX ?= g++
ifeq ($(origin CXX),default)
CXX := g++
endif

EMU_OUT  := $(OUT)/emu
EMU_CPP  := $(sort $(wildcard kernels/emu/*.cpp))
EMU_O    := $(EMU_CPP:kernels/emu/%.cpp=$(EMU_OUT)/%.o)
EMU_LIB  := $(EMU_OUT)/libemu.a
EMU_LIBS := -ldl -lpthread
EMU_WARN := -Wall -Wextra -Wshadow -Wpointer-arith
EMU_SANITIZE := $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
EMU_CXXFLAGS := -std=c++17 -fPIC -g $(EMU_WARN) -Ikernels/emu/include -iquote kernels -ffp-contract=off -fno-math-errno -fno-trapping-math
EMU_DEFINES  := -DHM_EMU_INCLUDE='"$(abspath kernels/emu/include)"' -DHM_EMU_CXX='"$(CXX)"'

.PHONY: emu
emu: $(EMU_LIB)

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

-include $(EMU_O:.o=.d)
