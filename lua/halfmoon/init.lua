--- init.lua -- what require "halfmoon" returns: tensors and functions from the C module, and nn, optim, amp, data,
--- autograd, cpu, cuda.
--
--     local hm = require "halfmoon"
--     local x = hm.randn({2, 3}, {dtype = "f16"})
--
-- Requiring it changes no global.  The submodules are loaded when they are first used.

local core = require "halfmoon.core"
local checkpoint = require "halfmoon.checkpoint"
require "halfmoon.print"         -- sets how tensors print
require "halfmoon.nn.functional" -- gives tensors max_pool2d, cross_entropy, ...

local hm = {}

-- Parts of the C module that belong to the library's own files and stay out of `hm`.
local private = {}
for name in ([[
  ops call op_log grad record_custom custom_saved region_new region_run detect_anomaly get_name set_name set_path_provider
  fp8_new fp8_default fp8_recipe
  optim_new optim_kind grad_norm grad_scale grad_clip grad_clamp scaler_new sandbox autocast autocast_state
  autocast_splits cast_stats
  safetensors_save safetensors_load npy_save npy_load npz_save npz_load idx loader_new
  csv_open bytes cifar random_states set_random_states
  now isatty mtime term_width exists census op_watch gradient_watch
  cuda_count cuda_properties cuda_counters cuda_compile cuda_launch synchronize
  expression_steps expression_new expression_call expression_version
  features devices graph_has_dtype graph_parts on_backward lua_release memory_stats reset_peak trim collect_stats pause alloc_fail_at
  lua_alloc_fail_at host_blocks
]]):gmatch("%S+") do
  private[name] = true
end
for name, value in pairs(core) do
  if not private[name] then hm[name] = value end
end
for name, value in pairs(require "halfmoon.tensor") do hm[name] = value end -- also gives tensors more methods

--- The version, as text.
hm.version = core.version
--- hm.save(path, obj): a state dict, a module, or a whole training state, as a safetensors file; a tensor as .npy, a
--- table of tensors as .npz -> true | nil, message, code
hm.save = checkpoint.save
--- hm.load(path [, {device =, into =}]) -> what was saved, metadata | nil, message, code
hm.load = checkpoint.load

--- hm.checkpoint([options,] fn, ...) -> what fn returns: keeps nothing for backward, which runs fn again
hm.checkpoint = require "halfmoon.recompute"

--- hm.elementwise(formula [, {inputs, params, grad, cast, name}]) -> a function of tensors, made of a formula
hm.elementwise = require "halfmoon.elementwise"

local submodules = {nn = true, optim = true, amp = true, data = true, autograd = true, cpu = true, cuda = true}

return setmetatable(hm, {
  __index = function(self, name)
    if not submodules[name] then return nil end
    local module = require("halfmoon." .. name)
    rawset(self, name, module)
    return module
  end,
  __name = "halfmoon",
  __lazy = submodules, -- for completion and help
})
