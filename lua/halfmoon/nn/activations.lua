--- nn/activations.lua -- activations as modules, for Sequential.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local activations = {}

-- ====== Without options ======

-- A module that calls a function of one tensor.
local function simple(name, fn)
  local new = class.class(name)
  function new:init(...)
    if select("#", ...) > 0 and (...) ~= nil then
      errors.raise("nn.%s takes no arguments, came %s", name, errors.describe((...)))
    end
  end
  function new:forward(x) return fn(x) end -- luacheck: ignore 212
  activations[name] = new
end

--- nn.ReLU(): x where positive, else 0.  As a function: ? nn.functional.relu
simple("ReLU", F.relu)
--- nn.ReLU6(): x limited to [0, 6].  As a function: ? nn.functional.relu6
simple("ReLU6", F.relu6)
--- nn.Tanh(): hyperbolic tangent.  As a function: ? nn.functional.tanh
simple("Tanh", F.tanh)
--- nn.Sigmoid(): 1 / (1 + e^-x).  As a function: ? nn.functional.sigmoid
simple("Sigmoid", F.sigmoid)
--- nn.LogSigmoid(): logarithm of sigmoid(x), without overflow.  As a function: ? nn.functional.logsigmoid
simple("LogSigmoid", F.logsigmoid)
--- nn.SiLU(): x times sigmoid(x).  As a function: ? nn.functional.silu
simple("SiLU", F.silu)
--- nn.Mish(): x times tanh(softplus(x)).  As a function: ? nn.functional.mish
simple("Mish", F.mish)
--- nn.Softsign(): x / (1 + |x|).  As a function: ? nn.functional.softsign
simple("Softsign", F.softsign)
--- nn.SELU(): scaled exponential linear unit.  As a function: ? nn.functional.selu
simple("SELU", F.selu)
--- nn.Hardsigmoid(): a sigmoid of straight lines.  As a function: ? nn.functional.hardsigmoid
simple("Hardsigmoid", F.hardsigmoid)
--- nn.Hardswish(): x times hardsigmoid(x).  As a function: ? nn.functional.hardswish
simple("Hardswish", F.hardswish)

-- ====== With options ======

local function number_text(value) return type(value) == "number" and ("%g"):format(value) or tostring(value) end

-- A module that calls a function of (x, options).  `order` names the options: for the text, and the first of them may be
-- given as a bare value.
local function with_options(name, fn, spec, order, check)
  local new = class.class(name)
  local where = "nn." .. name
  function new:init(opts)
    if opts ~= nil and type(opts) ~= "table" then opts = {[order[1]] = opts} end
    self.options = options.check(where, opts, spec)
    if check then check(where, self.options) end
  end
  function new:forward(x) return fn(x, self.options) end
  function new:extra()
    local parts = {}
    for _, key in ipairs(order) do
      if self.options[key] ~= spec[key][2] then parts[#parts + 1] = key .. " " .. number_text(self.options[key]) end
    end
    return table.concat(parts, ", ")
  end
  activations[name] = new
end

--- nn.GELU{approximate = "none"|"tanh"}: Gaussian error linear unit.  As a function: ? nn.functional.gelu
with_options("GELU", F.gelu, {approximate = {"string", "none", options.one_of("none", "tanh")}}, {"approximate"})

--- nn.Softplus{beta = 1, threshold = 20}: log(1 + e^(beta x)) / beta.  As a function: ? nn.functional.softplus
with_options("Softplus", F.softplus, {beta = {"number", 1.0}, threshold = {"number", 20.0}}, {"beta", "threshold"})

--- nn.ELU{alpha = 1}: x where positive, else alpha * (e^x - 1).  As a function: ? nn.functional.elu
with_options("ELU", F.elu, {alpha = {"number", 1.0}}, {"alpha"})

--- nn.LeakyReLU{negative_slope = 0.01}: x where positive, else x times the slope.  As a function: ? nn.functional.leaky_relu
with_options("LeakyReLU", F.leaky_relu, {negative_slope = {"number", 0.01}}, {"negative_slope"})

--- nn.Hardtanh{min_val = -1, max_val = 1}: x limited to [min_val, max_val].  As a function: ? nn.functional.hardtanh
with_options("Hardtanh", F.hardtanh, {min_val = {"number", -1.0}, max_val = {"number", 1.0}}, {"min_val", "max_val"},
  function(where, o)
    if o.min_val > o.max_val then
      errors.raise("%s: min_val %g is above max_val %g", where, o.min_val, o.max_val)
    end
  end)

-- ====== PReLU ======

local prelu_spec = common.with_factory {num_parameters = {"integer", 1, options.at_least(1)}, init = {"number", 0.25}}

---@class PReLU: Module
---@field weight Tensor [num_parameters]
local PReLU = class.class("PReLU")

--- nn.PReLU{num_parameters = 1, init = 0.25}: leaky_relu with slopes that are learnt, one or one for each channel (dim 2).
---@param opts {num_parameters: integer, init: number, dtype: string, device: string}?
function PReLU:init(opts)
  if math.tointeger(opts) then opts = {num_parameters = opts} end
  opts = options.check("nn.PReLU", opts, prelu_spec)
  self.num_parameters = opts.num_parameters
  self.weight = common.filled({opts.num_parameters}, opts.init, opts)
end

--- x where positive, else x times its channel's slope.
---@param x Tensor
---@return Tensor
function PReLU:forward(x) return F.prelu(x, self.weight) end

function PReLU:extra() return tostring(self.num_parameters) end

activations.PReLU = PReLU

-- ====== Along a dim ======

-- A module that calls a function of (x, dim).
local function along(name, fn, default)
  local new = class.class(name)
  local where = "nn." .. name
  function new:init(dim)
    if type(dim) == "table" then dim = options.check(where, dim, {dim = {"integer"}}).dim end
    if dim == nil then dim = default end
    if dim == nil then errors.raise("%s: the dim is missing, e.g. %s(2)", where, where) end
    self.dim = math.tointeger(dim)
    if not self.dim or self.dim == 0 then
      errors.raise("%s: the dim must be a whole number from 1, or from -1 at the end, not %s", where, errors.describe(dim))
    end
  end
  function new:forward(x)
    if not core.is_tensor(x) then errors.raise("%s: expected a tensor, not %s", where, errors.describe(x)) end
    return fn(x, self.dim)
  end
  function new:extra() return ("dim %d"):format(self.dim) end
  activations[name] = new
end

--- nn.Softmax(dim): e^x divided by its sum along a dim.  As a function: ? nn.functional.softmax
along("Softmax", F.softmax)
--- nn.LogSoftmax(dim): logarithm of softmax.  As a function: ? nn.functional.log_softmax
along("LogSoftmax", F.log_softmax)
--- nn.Softmin(dim): softmax of -x.  As a function: ? nn.functional.softmin
along("Softmin", F.softmin)
--- nn.GLU(dim = -1): the first half along a dim times the sigmoid of the second.  As a function: ? nn.functional.glu
along("GLU", F.glu, -1)

return activations
