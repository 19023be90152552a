# cuda.mk -- builds the plug-ins for CUDA.  Included by the Makefile; BUILD, OUT, GEN, SANITIZE, Q and say are its own, the EMU_ names emu.mk's.
#
#   cuda         build/halfmoon-cuda.so by nvcc: PTX for compute capability 7.5, code for 8.0 and 9.0
#   cuda-all     the same with code for every capability that nvcc knows, up to 12.0
#   cuda-report  registers, shared memory and spills of every kernel; fails on a spill
#   cuda-emu     halfmoon-cuda-emu.so by g++ alone: the same sources on the test double
#
# `make` builds the first where nvcc is found; `make demo` and `make test` do not wait for it.  CUDA=/path says where the toolkit is,
# CUDA=0 leaves it out.  Nothing here is needed by the program itself.

CUDA ?= $(patsubst %/bin/nvcc,%,$(firstword $(wildcard $(dir $(shell command -v nvcc 2>/dev/null))nvcc /usr/local/cuda/bin/nvcc)))
NVCC := $(if $(filter-out 0,$(CUDA)),$(wildcard $(CUDA)/bin/nvcc))

CUDA_CU := $(sort $(wildcard kernels/cuda/*.cu))
CUDA_PLUGIN := $(OUT)/halfmoon-cuda.so
CUDA_EMU    := $(OUT)/halfmoon-cuda-emu.so

# ====== The real one ======

CUDA_OUT := $(OUT)/cuda
CUDA_O   := $(CUDA_CU:kernels/cuda/%.cu=$(CUDA_OUT)/%.o)
CUDA_INCLUDES := -Xcompiler -iquote,kernels,-iquote,kernels/cuda,-iquote,$(GEN)
# No contraction of a multiplication and an addition: elementwise results are the CPU's to the bit, the others the test double's.
CUDA_FLAGS := -std=c++17 -O3 -g -fmad=false -Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden -Xptxas -warn-spills -diag-suppress 177
# A third of the size, where this nvcc can.
CUDA_PACK = $(if $(findstring compress-mode,$(shell $(NVCC) --help 2>/dev/null)),--compress-mode=size)
CUDA_ARCHS := -gencode arch=compute_75,code=compute_75 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
# What `cuda-all` adds: every other real architecture that this nvcc has.
CUDA_MORE = $(foreach a,$(filter-out 80 90,$(patsubst sm_%,%,$(filter sm_75 sm_86 sm_87 sm_88 sm_89 sm_100 sm_103 sm_110 sm_120,$(shell $(NVCC) --list-gpu-code 2>/dev/null)))),-gencode arch=compute_$(a),code=sm_$(a))
# What cuda-report compiles for.
REPORT_ARCH ?= sm_90
CUDA_PTXAS = $(CUDA_CU:kernels/cuda/%.cu=$(CUDA_OUT)/%.$(REPORT_ARCH).ptxas)
CUDA_LIBDIR = $(firstword $(wildcard $(CUDA)/lib64 $(CUDA)/lib))
CUDA_LINK   = -L$(CUDA_LIBDIR) -lcublas -lcublasLt -lnvrtc -Xlinker -rpath,$(CUDA_LIBDIR) -Xlinker --no-undefined

.PHONY: plug-in cuda cuda-all cuda-report cuda-emu
ifneq ($(NVCC),)

# nvcc takes long: the files side by side, also where make was called without -j.
plug-in cuda: | $(GEN)/stamp
	@$(MAKE) $(jobs) $(CUDA_PLUGIN)
cuda: ## the CUDA plug-in, build/halfmoon-cuda.so, where nvcc is found (minutes)

cuda-all: ## the CUDA plug-in with code for every GPU up to compute capability 12.0
	@$(MAKE) cuda CUDA_ARCHS='$(CUDA_ARCHS) $(CUDA_MORE)'

# Changes when flags do, so that objects follow.
CUDA_NOW = $(NVCC) $(CUDA_FLAGS) $(CUDA_PACK) $(CUDA_ARCHS)
$(CUDA_OUT)/flags: FORCE
	@mkdir -p $(CUDA_OUT)
	@echo '$(CUDA_NOW)' | cmp -s - $@ || echo '$(CUDA_NOW)' > $@

$(CUDA_OUT)/%.o: kernels/cuda/%.cu $(CUDA_OUT)/flags | $(GEN)/stamp
	$(call say,NVCC,$(@:$(BUILD)/%=%))
	$(Q)$(NVCC) $(CUDA_FLAGS) $(CUDA_PACK) $(CUDA_ARCHS) $(CUDA_INCLUDES) \
	  -DHM_CUDA_INCLUDE='"$(CUDA)/include"' -MMD -MP -c $< -o $@

$(CUDA_PLUGIN): $(CUDA_O)
	$(call say,LD,$@)
	$(Q)$(NVCC) -shared -cudart shared -o $@ $(CUDA_O) $(CUDA_LINK)

# One line for each kernel: registers, shared memory, stack, spills.
cuda-report: | $(GEN)/stamp ## registers, shared memory and spills of every CUDA kernel
	@$(MAKE) $(jobs) $(CUDA_PTXAS)
	$(Q)scripts/cuda-report $(CUDA_PTXAS)
$(CUDA_OUT)/%.$(REPORT_ARCH).ptxas: kernels/cuda/%.cu $(wildcard kernels/*.h kernels/cuda/*.h) $(GEN)/stamp $(CUDA_OUT)/flags
	$(call say,PTXAS,$(@:$(BUILD)/%=%))
	$(Q)$(NVCC) $(CUDA_FLAGS) -arch=$(REPORT_ARCH) $(CUDA_INCLUDES) -DHM_CUDA_INCLUDE='"$(CUDA)/include"' -Xptxas -v -cubin $< -o $@.cubin > $@.log 2>&1 \
	  || { cat $@.log; exit 1; }
	$(Q)rm -f $@.cubin && mv $@.log $@

-include $(CUDA_O:.o=.d)

else

plug-in:
	@printf '  → %-18s %s\n' CUDA '$(if $(filter 0,$(CUDA)),left out: CUDA=0,no nvcc: the plug-in for CUDA is left out (make CUDA=/path says where the toolkit is))'
cuda cuda-all cuda-report:
	@echo 'no nvcc was found: install the CUDA toolkit, or say where it is (make $@ CUDA=/path)'; exit 1

endif

# ====== On the test double ======

EMU_CU_OUT := $(OUT)/cuda-emu
EMU_CU_O   := $(CUDA_CU:kernels/cuda/%.cu=$(EMU_CU_OUT)/%.o)

cuda-emu: $(CUDA_EMU) ## the CUDA backend on the test double, for the specs (HALFMOON_CUDA=emu)

$(EMU_CU_OUT)/%.o: kernels/cuda/%.cu | $(GEN)/stamp
	@mkdir -p $(@D)
	$(call say,CXX,$(@:$(BUILD)/%=%))
	$(Q)$(CXX) -x c++ $(EMU_CXXFLAGS) $(EMU_SANITIZE) -O2 -fwrapv -Wno-unknown-pragmas -fvisibility=hidden -iquote kernels/cuda -iquote $(GEN) \
	  $(CPPFLAGS) -MMD -MP -c $< -o $@

$(CUDA_EMU): $(EMU_CU_O) $(EMU_LIB)
	$(call say,LD,$@)
	$(Q)$(CXX) -shared $(EMU_SANITIZE) $(LDFLAGS) -o $@ $(EMU_CU_O) -Wl,--whole-archive $(EMU_LIB) -Wl,--no-whole-archive $(EMU_LIBS) \
	  $(if $(SANITIZE),,-Wl$(comma)--no-undefined)

-include $(EMU_CU_O:.o=.d)
