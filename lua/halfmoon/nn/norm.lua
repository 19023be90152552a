--- nn/norm.lua -- normalization layers: by batch (BatchNorm1d, BatchNorm2d, InstanceNorm2d), by row (LayerNorm,
--- RMSNorm), by group of channels (GroupNorm).
--
-- Weights begin as ones, biases as zeros, running means as zeros and running variances as ones.  Running statistics are
-- float32 (float64 for float64 layers), also where weights are half.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise, describe = errors.raise, errors.describe
local filled = common.filled

local layers = {}

-- ====== Running statistics ======

local not_negative = options.at_least(0)

local function share_or_false(value)
  if value == false or (value ~= true and value >= 0 and value <= 1) then return end
  return "must lie between 0 and 1, or be false for the mean of all batches"
end

local function batch_spec(affine, track)
  return common.with_factory {
    eps = {"number", 1e-5, not_negative}, momentum = {"number|boolean", 0.1, share_or_false},
    affine = {"boolean", affine}, track_running_stats = {"boolean", track},
  }
end

--- Sizes, weights and buffers of a layer with running statistics.
local function set_batch(self, where, features, opts)
  self.num_features = common.want_size(where, "the number of channels", features)
  self.eps, self.affine, self.track_running_stats = opts.eps, opts.affine, opts.track_running_stats
  self.momentum = opts.momentum or nil
  if opts.affine then
    self.weight = filled({self.num_features}, 1, opts)
    self.bias = filled({self.num_features}, 0, opts)
  end
  if opts.track_running_stats then
    local place = {dtype = errors.long_dtype[opts.dtype] == "float64" and "float64" or "float32", device = opts.device}
    self:register_buffer("running_mean", core.zeros({self.num_features}, place))
    self:register_buffer("running_var", core.ones({self.num_features}, place))
    self:register_buffer("num_batches_tracked", core.zeros({}, {dtype = "int64", device = opts.device}))
  end
end

--- Counts a batch and gives the share that it has in the running statistics.
local function next_momentum(self)
  if core.is_recomputing() then return self.momentum or 0 end -- hm.checkpoint: this batch has been counted
  local _ <close> = core.no_grad()
  self.num_batches_tracked:add_(1)
  return self.momentum or 1 / self.num_batches_tracked:item()
end

--- Puts the running statistics back to where they began.
local function reset_running_stats(self)
  if not self.track_running_stats then return end
  local _ <close> = core.no_grad()
  self.running_mean:fill_(0)
  self.running_var:fill_(1)
  self.num_batches_tracked:fill_(0)
end

local function batch_text(self)
  return ("%d%s%s%s%s"):format(self.num_features, self.eps ~= 1e-5 and (", eps %g"):format(self.eps) or "",
    self.momentum == nil and ", cumulative" or self.momentum ~= 0.1 and (", momentum %g"):format(self.momentum) or "",
    self.affine and "" or ", no weight", self.track_running_stats and "" or ", no running statistics")
end

-- ====== BatchNorm ======

--- A BatchNorm class for inputs of certain dims.
local function batch_norm(name, fits, wanted)
  local new = class.class(name)
  local where, spec = "nn." .. name, batch_spec(true, true)
  function new:init(features, opts) set_batch(self, where, features, options.check(where, opts, spec)) end
  function new:forward(x)
    if not core.is_tensor(x) then raise("%s: expected a tensor, not %s", where, describe(x)) end
    if not fits[x:dim()] then raise("%s: x must be %s, came %s", where, wanted, describe(x)) end
    local by_batch = self.training or not self.track_running_stats
    local momentum = 0.0
    if self.training and self.track_running_stats then momentum = next_momentum(self) end
    return F.batch_norm(x, self.running_mean, self.running_var, {
      weight = self.weight, bias = self.bias, training = by_batch, momentum = momentum, eps = self.eps,
    })
  end
  new._wide_buffers = true
  new.reset_running_stats = reset_running_stats
  new.extra = batch_text
  layers[name] = new
end

--- nn.BatchNorm1d(channels, {eps = 1e-5, momentum = 0.1, affine = true, track_running_stats = true}): [N, C] or [N, C, L] less
--- its mean, by its standard deviation, channel by channel.  momentum = false makes the running statistics the plain mean
--- of all batches.
batch_norm("BatchNorm1d", {[2] = true, [3] = true}, "[N, C] or [N, C, L]")
--- nn.BatchNorm2d(channels, {eps = 1e-5, momentum = 0.1, affine = true, track_running_stats = true}): [N, C, H, W] less its
--- mean, by its standard deviation, channel by channel; options as nn.BatchNorm1d.
batch_norm("BatchNorm2d", {[4] = true}, "[N, C, H, W]")

-- ====== InstanceNorm ======

---@class InstanceNorm2d: Module
local InstanceNorm2d = class.class("InstanceNorm2d")
local instance_spec = batch_spec(false, false)

--- nn.InstanceNorm2d(channels, {eps = 1e-5, momentum = 0.1, affine = false, track_running_stats = false}):
--- [N, C, H, W] less its mean, by its standard deviation, over each channel of each sample.
---@param features integer
---@param opts table?
function InstanceNorm2d:init(features, opts)
  set_batch(self, "nn.InstanceNorm2d", features, options.check("nn.InstanceNorm2d", opts, instance_spec))
end

--- x [N, C, H, W], normalized.
---@param x Tensor
---@return Tensor
function InstanceNorm2d:forward(x)
  if not core.is_tensor(x) or x:dim() ~= 4 then
    raise("nn.InstanceNorm2d: x must be [N, C, H, W], came %s", describe(x))
  end
  if x:size(2) ~= self.num_features then
    raise("nn.InstanceNorm2d: made for %d channels, x is %s", self.num_features, describe(x))
  end
  local momentum = 0.0
  if self.training and self.track_running_stats then momentum = next_momentum(self) end
  return F.instance_norm(x, {
    running_mean = self.running_mean, running_var = self.running_var, weight = self.weight, bias = self.bias,
    use_input_stats = self.training or not self.track_running_stats, momentum = momentum, eps = self.eps,
  })
end

InstanceNorm2d._wide_buffers = true
InstanceNorm2d.reset_running_stats = reset_running_stats
InstanceNorm2d.extra = batch_text

layers.InstanceNorm2d = InstanceNorm2d

-- ====== By row ======

--- The normalized shape as an array of sizes.
local function row_shape(where, shape)
  if math.tointeger(shape) then shape = {shape} end
  if type(shape) ~= "table" or #shape == 0 then
    raise("%s: the normalized shape must be a number or an array of sizes, not %s", where, describe(shape))
  end
  local sizes = {}
  for i, size in ipairs(shape) do sizes[i] = common.want_size(where, "a size", size) end
  return sizes
end

local layer_norm_spec = common.with_factory {
  eps = {"number", 1e-5, not_negative}, elementwise_affine = {"boolean", true}, bias = {"boolean", true},
}

---@class LayerNorm: Module
---@field weight Tensor?
---@field bias Tensor?
local LayerNorm = class.class("LayerNorm")

--- nn.LayerNorm(shape, {eps = 1e-5, elementwise_affine = true, bias = true}): the last dims, which have this shape, less their
--- mean, by their standard deviation.
---@param shape integer|integer[]
---@param opts table?
function LayerNorm:init(shape, opts)
  opts = options.check("nn.LayerNorm", opts, layer_norm_spec)
  self.normalized_shape, self.eps = row_shape("nn.LayerNorm", shape), opts.eps
  if opts.elementwise_affine then
    self.weight = filled(self.normalized_shape, 1, opts)
    if opts.bias then self.bias = filled(self.normalized_shape, 0, opts) end
  end
end

--- x [..., shape], normalized.
---@param x Tensor
---@return Tensor
function LayerNorm:forward(x) return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps) end

function LayerNorm:extra()
  return ("%s%s%s"):format(common.by(self.normalized_shape), self.eps ~= 1e-5 and (", eps %g"):format(self.eps) or "",
    self.bias and "" or self.weight and ", no bias" or ", no weight")
end

layers.LayerNorm = LayerNorm

local rms_norm_spec = common.with_factory {eps = {"number", nil, not_negative}, elementwise_affine = {"boolean", true}}

---@class RMSNorm: Module
---@field weight Tensor?
local RMSNorm = class.class("RMSNorm")

--- nn.RMSNorm(shape, {eps =, elementwise_affine = true}): the last dims, which have this shape, by the root of their mean
--- square.  eps is the distance from 1 to the next float32 unless given.
---@param shape integer|integer[]
---@param opts table?
function RMSNorm:init(shape, opts)
  opts = options.check("nn.RMSNorm", opts, rms_norm_spec)
  self.normalized_shape, self.eps = row_shape("nn.RMSNorm", shape), opts.eps
  if opts.elementwise_affine then self.weight = filled(self.normalized_shape, 1, opts) end
end

--- x [..., shape], normalized.
---@param x Tensor
---@return Tensor
function RMSNorm:forward(x) return F.rms_norm(x, self.normalized_shape, self.weight, self.eps) end

function RMSNorm:extra()
  return ("%s%s%s"):format(common.by(self.normalized_shape), self.eps and (", eps %g"):format(self.eps) or "",
    self.weight and "" or ", no weight")
end

layers.RMSNorm = RMSNorm

-- ====== By group ======

local group_norm_spec = common.with_factory {eps = {"number", 1e-5, not_negative}, affine = {"boolean", true}}

---@class GroupNorm: Module
---@field weight Tensor?
---@field bias Tensor?
local GroupNorm = class.class("GroupNorm")

--- nn.GroupNorm(groups, channels, {eps = 1e-5, affine = true}): [N, C, ...] less its mean, by its standard deviation, over
--- each group of channels of each sample.
---@param groups integer
---@param channels integer
---@param opts table?
function GroupNorm:init(groups, channels, opts)
  opts = options.check("nn.GroupNorm", opts, group_norm_spec)
  self.num_groups = common.want_size("nn.GroupNorm", "the number of groups", groups)
  self.num_channels = common.want_size("nn.GroupNorm", "the number of channels", channels)
  if self.num_channels % self.num_groups ~= 0 then
    raise("nn.GroupNorm: %d channels cannot be split into %d groups", self.num_channels, self.num_groups)
  end
  self.eps = opts.eps
  if opts.affine then
    self.weight = filled({self.num_channels}, 1, opts)
    self.bias = filled({self.num_channels}, 0, opts)
  end
end

--- x [N, C, ...], normalized.
---@param x Tensor
---@return Tensor
function GroupNorm:forward(x) return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps) end

function GroupNorm:extra()
  return ("%d in %d groups%s%s"):format(self.num_channels, self.num_groups,
    self.eps ~= 1e-5 and (", eps %g"):format(self.eps) or "", self.weight and "" or ", no weight")
end

layers.GroupNorm = GroupNorm

return layers
