--- nn/observers.lua -- modules that watch the range of what passes and say which integers it needs: MinMaxObserver,
--- MovingAverageMinMaxObserver, and the same for each channel.
--
-- An observer is an identity that keeps min_val and max_val as float32 buffers.  It watches in training mode only, and
-- not while hm.checkpoint runs a forward again.  Where the range of a batch is not finite (an activation overflowed in
-- float16, NaN) that batch is left out, for each channel by itself, so that one bad batch does not spoil the range for
-- good.  All of it is done by tensor ops: nothing waits for a GPU.
--
-- Rules of scale and zero point: PyTorch's torch.ao.quantization.observer (affine and symmetric).

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local inf = math.huge

local layers = {}

local EPS = 2.0 ^ -23 -- the distance from 1 to the next float32

local function share(value)
  if not (value > 0 and value <= 1) then return "must be above 0 and at most 1" end
end

--- Options that all observers take.
local function observer_spec(more)
  local spec = {
    quant_min = {"integer", -128}, quant_max = {"integer", 127}, symmetric = {"boolean", false},
    eps = {"number", EPS, options.above(0)}, device = {"string"},
  }
  for name, value in pairs(more) do spec[name] = value end
  return spec
end

--- Checks that a grid has at least two points, and 0 among them.
local function check_grid(where, opts)
  if opts.quant_min >= opts.quant_max or opts.quant_min > 0 or opts.quant_max < 0 then
    raise("%s: quant_min must be below quant_max, and 0 among them, came %d and %d", where, opts.quant_min,
      opts.quant_max)
  end
end

-- ====== What all have ======

---@class Observer: Module
---@field min_val Tensor float32
---@field max_val Tensor float32
---@field quant_min integer
---@field quant_max integer
---@field symmetric boolean
---@field eps number the least scale
---@field channels integer|false how many ranges it keeps
---@field axis integer|false the dim of the channels
local Observer = class.class("Observer")

Observer._wide_buffers = true

--- Sets the fields of an observer; channels is nil for one range.
local function set(self, where, channels, opts)
  check_grid(where, opts)
  self.quant_min, self.quant_max, self.symmetric, self.eps = opts.quant_min, opts.quant_max, opts.symmetric, opts.eps
  self.averaging_constant = opts.averaging_constant or false
  self.channels, self.axis = channels or false, channels and opts.axis or false
  local shape, place = channels and {channels} or {}, {dtype = "float32", device = opts.device}
  self:register_buffer("min_val", core.full(shape, inf, place))
  self:register_buffer("max_val", core.full(shape, -inf, place))
end

--- The smallest and the largest value of x, for each channel if the observer has some; float32.
local function range(self, x)
  local low, high
  if self.axis then
    local axis, dims = self.axis > 0 and self.axis or self.axis + x:dim() + 1, {}
    if x:dim() < axis or axis < 1 or x:size(axis) ~= self.channels then
      raise("%s: made for %d channels in dim %d, x is %s", self.__class, self.channels, self.axis, describe(x))
    end
    for d = 1, x:dim() do
      if d ~= axis then dims[#dims + 1] = d end
    end
    if #dims == 0 then low, high = x, x else low, high = x:amin(dims), x:amax(dims) end
  else
    low, high = x:amin(), x:amax()
  end
  return low:to("float32"), high:to("float32")
end

--- Watches x, in training mode and not while hm.checkpoint runs it again.
---@param x Tensor
---@return Tensor x as it came
function Observer:forward(x)
  if not core.is_tensor(x) then raise("%s: expected a tensor, not %s", self.__class, describe(x)) end
  if not self.training or core.is_recomputing() or x:numel() == 0 then return x end
  local _ <close> = core.no_grad()
  local low, high = range(self, x:detach())
  local fits = (high - low):isfinite() -- false where either is NaN or infinite
  local old_low, old_high = self.min_val, self.max_val
  local new_low, new_high
  if self.averaging_constant then
    local begun, share_of_new = old_low:le(old_high), self.averaging_constant
    new_low = core.where(begun, old_low + (low - old_low) * share_of_new, low)
    new_high = core.where(begun, old_high + (high - old_high) * share_of_new, high)
  else
    new_low, new_high = core.minimum(old_low, low), core.maximum(old_high, high)
  end
  old_low:copy_(core.where(fits, new_low, old_low))
  old_high:copy_(core.where(fits, new_high, old_high))
  return x
end

--- The scale (float32) and zero point (int32) for the range so far.  0 is always a point of the grid.  Symmetric: 0
--- lies in its middle, and the scale is the largest magnitude by half the grid's width.  Where nothing has been seen:
--- 1 and 0.
---@return Tensor scale
---@return Tensor zero_point
function Observer:calculate_qparams()
  local _ <close> = core.no_grad()
  local seen = self.min_val:le(self.max_val)
  local low, high, width = self.min_val:clamp(-inf, 0), self.max_val:clamp(0, inf), self.quant_max - self.quant_min
  local scale, zero_point
  if self.symmetric then
    scale = (core.maximum(-low, high) / (width / 2)):clamp(self.eps, inf)
    local middle = self.quant_min < 0 and 0 or (self.quant_min + self.quant_max + 1) // 2
    zero_point = core.full(scale.shape, middle, {dtype = "float32", device = scale.device})
  else
    scale = ((high - low) / width):clamp(self.eps, inf)
    zero_point = (self.quant_min - (low / scale):round()):clamp(self.quant_min, self.quant_max)
    zero_point = core.where(seen, zero_point, 0)
  end
  return core.where(seen, scale, 1), zero_point:to("int32")
end

--- Forgets the range.
function Observer:reset_min_max_vals()
  local _ <close> = core.no_grad()
  self.min_val:fill_(inf)
  self.max_val:fill_(-inf)
end

function Observer:extra()
  return ("%s%d to %d%s%s"):format(self.channels and ("%d channels, "):format(self.channels) or "", self.quant_min,
    self.quant_max, self.symmetric and ", symmetric" or "",
    self.averaging_constant and (", average %g"):format(self.averaging_constant) or "")
end

-- ====== The kinds ======

local averaged = {averaging_constant = {"number", 0.01, share}}
local min_max_spec, moving_spec = observer_spec {}, observer_spec(averaged)
local channel_spec = observer_spec {axis = {"integer", 1}}
local moving_channel_spec = observer_spec {axis = {"integer", 1}, averaging_constant = averaged.averaging_constant}

---@class MinMaxObserver: Observer
local MinMaxObserver = class.class("MinMaxObserver", Observer)

--- nn.MinMaxObserver{quant_min = -128, quant_max = 127, symmetric = false, eps = 2^-23, device =}: the range of all
--- that it has seen.
---@param opts table?
function MinMaxObserver:init(opts)
  set(self, "nn.MinMaxObserver", nil, options.check("nn.MinMaxObserver", opts, min_max_spec))
end

layers.MinMaxObserver = MinMaxObserver

---@class MovingAverageMinMaxObserver: Observer
local MovingAverageMinMaxObserver = class.class("MovingAverageMinMaxObserver", Observer)

--- nn.MovingAverageMinMaxObserver{averaging_constant = 0.01, ...}: a range that moves towards that of each batch by
--- this share; options as nn.MinMaxObserver.
---@param opts table?
function MovingAverageMinMaxObserver:init(opts)
  local where = "nn.MovingAverageMinMaxObserver"
  set(self, where, nil, options.check(where, opts, moving_spec))
end

layers.MovingAverageMinMaxObserver = MovingAverageMinMaxObserver

--- The init of a kind that has a range for each entry of a dim.
local function set_channels(self, where, channels, opts, spec)
  opts = options.check(where, opts, spec)
  set(self, where, common.want_size(where, "the number of channels", channels), opts)
end

---@class PerChannelMinMaxObserver: Observer
local PerChannelMinMaxObserver = class.class("PerChannelMinMaxObserver", Observer)

--- nn.PerChannelMinMaxObserver(channels, {axis = 1, ...}): the range of all that it has seen, for each entry of a dim;
--- options as nn.MinMaxObserver.
---@param channels integer
---@param opts table?
function PerChannelMinMaxObserver:init(channels, opts)
  set_channels(self, "nn.PerChannelMinMaxObserver", channels, opts, channel_spec)
end

layers.PerChannelMinMaxObserver = PerChannelMinMaxObserver

---@class MovingAveragePerChannelMinMaxObserver: Observer
local MovingAveragePerChannelMinMaxObserver = class.class("MovingAveragePerChannelMinMaxObserver", Observer)

--- nn.MovingAveragePerChannelMinMaxObserver(channels, {axis = 1, averaging_constant = 0.01, ...}): ranges of the
--- entries of a dim that move towards those of each batch; options as nn.MinMaxObserver.
---@param channels integer
---@param opts table?
function MovingAveragePerChannelMinMaxObserver:init(channels, opts)
  set_channels(self, "nn.MovingAveragePerChannelMinMaxObserver", channels, opts, moving_channel_spec)
end

layers.MovingAveragePerChannelMinMaxObserver = MovingAveragePerChannelMinMaxObserver

return layers
