--- cuda.lua -- hm.cuda: what GPUs there are, what they did, and kernels that a script brings along.
--
--     local k = hm.cuda.kernel([[
--       __global__ void axpy(int n, float a, const float *x, float *y) {
--         int i = blockIdx.x * blockDim.x + threadIdx.x;
--         if (i < n) y[i] += a * x[i];
--       }
--     ]], "axpy")
--     k{grid = (n + 255) // 256, block = 256}(n, 2.5, x, y)

local core = require "halfmoon.core"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local cuda = {}

--- hm.cuda.is_available() -> true | false, why not
---@return boolean
---@return string?
function cuda.is_available()
  local n, why = core.cuda_count()
  return n > 0, why
end

--- hm.cuda.device_count() -> how many GPUs there are; 0 without a driver
---@return integer
function cuda.device_count() return (core.cuda_count()) end

--- hm.cuda.get_device_capability([device]) -> major, minor
---@param device string?
---@return integer major
---@return integer minor
function cuda.get_device_capability(device)
  local p = core.cuda_properties(device)
  return p.major, p.minor
end

--- hm.cuda.properties([device]) -> {name, major, minor, total_memory, multi_processor_count, max_threads_per_block,
--- shared_memory_per_block, driver, runtime, convolution}; convolution tells what does them: "cudnn 9.19.0", or
--- "im2col + cublas" and why
---@param device string?
---@return table
function cuda.properties(device) return core.cuda_properties(device) end

--- hm.cuda.synchronize([device]): waits until the device has done all that was asked; raises what went wrong in it
---@param device string?
function cuda.synchronize(device) core.synchronize(device) end

--- hm.cuda.memory_stats([device]) -> {live, peak, cached, reserved, allocs, system_allocs, layout_copies,
--- shadow_bytes, pinned}, in bytes; pinned: host memory that loaders hold to copy from
---@param device string?
---@return table
function cuda.memory_stats(device) return core.memory_stats(device or "cuda") end

--- hm.cuda.reset_peak([device]): collects garbage; the peak starts again from what is live then
---@param device string?
function cuda.reset_peak(device) core.reset_peak(device or "cuda") end

--- hm.cuda.trim([device]): gives cached memory back to the system
---@param device string?
function cuda.trim(device) core.trim(device or "cuda") end

local base = {}

--- hm.cuda.stats() -> {launches, synchronisations, copies, bytes, cudnn_convolutions, im2col_convolutions,
--- cudnn_refusals, fused_linears, stepped_linears} since the last reset_stats(), all GPUs together.  A refusal is a
--- convolution that cuDNN was asked for and that went through im2col; windows of one pixel are plain matrix products and
--- counted in neither.  Linears with an activation, their gradients, and gradients of weight and bias together are fused
--- where cublasLt does them in one product, else stepped.
---@return table<string, integer>
function cuda.stats()
  local now = core.cuda_counters()
  for name, value in pairs(now) do now[name] = value - (base[name] or 0) end
  return now
end

--- hm.cuda.reset_stats(): stats() counts from here
function cuda.reset_stats() base = core.cuda_counters() end

---@class Kernel
---@field name string
---@field device string
local Kernel = {__name = "halfmoon.cuda.Kernel"}
Kernel.__index = Kernel

local launch_spec = {
  grid = {"integer|table"},
  block = {"integer|table"},
  shared = {"integer", 0},
}

--- k{grid =, block =, shared = 0} -> a function that launches the kernel on tensors and numbers, behind all work asked
--- for before.  grid and block are a number or up to three.  It does not wait.
---@param opts {grid: integer|integer[], block: integer|integer[], shared: integer?}
---@return fun(...)
function Kernel:__call(opts)
  local where = "kernel " .. self.name
  opts = options.check(where, opts, launch_spec)
  for _, name in ipairs {"grid", "block"} do
    if not opts[name] then errors.raise("%s: option '%s' is missing: k{grid =, block =}(...)", where, name) end
  end
  return function(...) core.cuda_launch(self.handle, opts.grid, opts.block, opts.shared, ...) end
end

function Kernel:__tostring() return ("kernel %s on %s"):format(self.name, self.device) end

--- hm.cuda.kernel(source, name [, {device = "cuda"}]) -> a kernel, compiled now.  Numbers are converted to the types
--- that the source declares; tensors must have the dtype that their pointer names; what a pointer that is not const
--- points at counts as written.  An int64 tensor is a `long long *`: NVRTC has no <stdint.h>, and so may not know int64_t.
---@param source string CUDA C++ with a function `__global__ void name(...)`
---@param name string
---@param opts {device: string?}?
---@return Kernel
function cuda.kernel(source, name, opts)
  opts = options.check("hm.cuda.kernel", opts, {device = {"string", "cuda:0"}})
  local handle = core.cuda_compile(source, name, opts.device)
  return setmetatable({handle = handle, name = name, device = opts.device}, Kernel)
end

return cuda
