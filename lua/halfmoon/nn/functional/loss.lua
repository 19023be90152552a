--- nn/functional/loss.lua -- losses.  Inside autocast they read low tensors as float32.

local core = require "halfmoon.core"
local arguments = require "halfmoon.arguments"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"

local raise, describe = errors.raise, errors.describe
local want_tensor, attempt = arguments.want_tensor, arguments.attempt
local reductions = arguments.reductions

---@class halfmoon.functional
local F = {}

local function reduced(loss, reduction)
  if reduction == "none" then return loss end
  return reduction == "sum" and loss:sum() or loss:mean()
end

-- ====== Classes ======

--- Raises for operands that are not scores [N, C, ...] and class ids [N, ...].
local function explain_classes(op, scores_name, logits, target)
  want_tensor(op, scores_name, logits)
  want_tensor(op, "target", target)
  local dims, target_dims = logits:dim(), target:dim()
  if dims < 2 then
    raise("%s: %s must be [N, classes] or [N, classes, ...], came %s%s", op, scores_name, describe(logits), dims == 1
      and ("\n  hint: %s:unsqueeze(1) and target:reshape(1) make a batch of one"):format(scores_name) or "")
  end
  if target.dtype ~= "int64" then
    local hint = target.dtype:find("float", 1, true) and target_dims == dims
      and "hint: rows of probabilities become class ids with target:argmax(2)" or "hint: target:to('int64')"
    raise("%s: target must hold class ids as int64, came %s\n  %s", op, describe(target), hint)
  end
  local fits = target_dims == dims - 1 and target:size(1) == logits:size(1)
  for d = 3, fits and dims or 0 do
    if logits:size(d) ~= target:size(d - 1) then fits = false break end
  end
  if not fits then
    local shape = logits.shape
    table.remove(shape, 2)
    local hint = ""
    if target_dims == dims and target:size(2) == 1 then
      hint = "\n  hint: target:squeeze(2)"
    elseif target_dims == 1 and dims == 2 then
      hint = ("\n  hint: %s and target come from batches of different sizes"):format(scores_name)
    end
    raise("%s: shapes differ: %s is %s, target is %s\n  target must be [%s], the shape of %s "
      .. "without dim 2 (the classes)%s", op, scores_name, describe(logits), describe(target),
      table.concat(shape, ","), scores_name, hint)
  end
end

local function explain_weight(op, scores, weight)
  if weight and (weight:dim() ~= 1 or weight:size(1) ~= scores:size(2)) then
    raise("%s: weight must be [%d], one number for each class, came %s", op, scores:size(2), describe(weight))
  end
end

local cross_entropy_spec = {
  weight = {"tensor"}, reduction = {"string", "mean", reductions}, ignore_index = {"integer", -100},
  label_smoothing = {"number", 0.0, arguments.share},
}

--- Checks the options of cross_entropy, for callers that use them again and again.
function F._cross_entropy_options(opts) return options.check("cross_entropy", opts, cross_entropy_spec) end

local cross_entropy_defaults = F._cross_entropy_options()

local function explain_cross_entropy(logits, target) explain_classes("cross_entropy", "logits", logits, target) end

--- cross_entropy with a weight for each class: log_softmax and nll_loss, and the smoothing beside them.
local function weighted_cross_entropy(logits, target, attrs)
  local smoothing, reduction = attrs.label_smoothing, attrs.reduction
  explain_cross_entropy(logits, target)
  explain_weight("cross_entropy", logits, attrs.weight)
  local scores = core.log_softmax(logits, 2)
  local weight = attrs.weight:to(scores.dtype)
  local nll, total = core.call("nll_loss", scores, target, weight,
    {reduction = reduction, ignore_index = attrs.ignore_index})
  if smoothing == 0 then return nll end
  local shape = {1, weight:size(1)}
  for d = 3, scores:dim() do shape[d] = 1 end
  local smooth = -(scores * weight:reshape(shape)):sum(2)
  smooth = smooth:masked_fill(target:eq(attrs.ignore_index), 0)
  if reduction ~= "none" then smooth = smooth:sum() end
  if reduction == "mean" then smooth = smooth / total:detach():reshape({}) end
  return nll * (1 - smoothing) + smooth * (smoothing / weight:size(1))
end

--- cross_entropy with options that were checked before.
function F._cross_entropy(logits, target, attrs)
  if attrs.weight then return weighted_cross_entropy(logits, target, attrs) end
  return (attempt(explain_cross_entropy, "cross_entropy", logits, target, attrs))
end

--- Softmax and cross entropy in one pass.  The class dim is dim 2; target holds class ids from 0 as int64.
---@param logits Tensor [N, C] or [N, C, ...]
---@param target Tensor [N] or [N, ...]
---@param opts {weight: Tensor, reduction: "mean"|"sum"|"none", ignore_index: integer, label_smoothing: number}?
---@return Tensor
function F.cross_entropy(logits, target, opts)
  return F._cross_entropy(logits, target, opts == nil and cross_entropy_defaults or F._cross_entropy_options(opts))
end

local nll_spec = {
  weight = {"tensor"}, reduction = {"string", "mean", reductions}, ignore_index = {"integer", -100},
}

local function explain_nll(x, target, weight)
  explain_classes("nll_loss", "input", x, target)
  explain_weight("nll_loss", x, weight)
end

--- Negative log likelihood of log probabilities [N, C] or [N, C, ...]; target holds class ids from 0 as int64.
---@param x Tensor
---@param target Tensor [N] or [N, ...]
---@param opts {weight: Tensor, reduction: "mean"|"sum"|"none", ignore_index: integer}?
---@return Tensor
function F.nll_loss(x, target, opts)
  opts = options.check("nll_loss", opts, nll_spec)
  return (attempt(explain_nll, "nll_loss", x, target, opts.weight,
    {reduction = opts.reduction, ignore_index = opts.ignore_index}))
end

-- ====== Differences ======

local loss_spec = {reduction = {"string", "mean", reductions}}

local function same_shapes(op, x, target)
  want_tensor(op, "input", x)
  want_tensor(op, "target", target)
  if not arguments.same_shape(x, target) then
    raise("%s: shapes differ: input is %s, target is %s\n"
      .. "  hint: a shape that differs by a dim of 1 would broadcast to a wrong mean; use reshape",
      op, describe(x), describe(target))
  end
end

--- Mean of the squared differences.
---@param x Tensor
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none"}?
---@return Tensor
function F.mse_loss(x, target, opts)
  local reduction = options.check("mse_loss", opts, loss_spec).reduction
  same_shapes("mse_loss", x, target)
  return reduced(core.call("squared_error", x, target), reduction)
end

--- Mean of the absolute differences.
---@param x Tensor
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none"}?
---@return Tensor
function F.l1_loss(x, target, opts)
  local reduction = options.check("l1_loss", opts, loss_spec).reduction
  same_shapes("l1_loss", x, target)
  return reduced(core.call("absolute_error", x, target), reduction)
end

local smooth_l1_spec = {reduction = {"string", "mean", reductions}, beta = {"number", 1.0, options.at_least(0)}}

--- Mean of the squared differences (by 2 beta) where they are below beta, of the absolute ones less beta / 2 elsewhere.
---@param x Tensor
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none", beta: number}?
---@return Tensor
function F.smooth_l1_loss(x, target, opts)
  opts = options.check("smooth_l1_loss", opts, smooth_l1_spec)
  same_shapes("smooth_l1_loss", x, target)
  if opts.beta == 0 then return reduced(core.call("absolute_error", x, target), opts.reduction) end
  return reduced(core.call("smooth_l1", x, target, {beta = opts.beta}), opts.reduction)
end

local huber_spec = {reduction = {"string", "mean", reductions}, delta = {"number", 1.0, options.above(0)}}

--- smooth_l1_loss times delta: half the squared difference where it is below delta, a straight line elsewhere.
---@param x Tensor
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none", delta: number}?
---@return Tensor
function F.huber_loss(x, target, opts)
  opts = options.check("huber_loss", opts, huber_spec)
  same_shapes("huber_loss", x, target)
  return reduced(core.call("smooth_l1", x, target, {beta = opts.delta}) * opts.delta, opts.reduction)
end

-- ====== Probabilities ======

local bce_logits_spec = {
  weight = {"tensor"}, pos_weight = {"tensor"}, reduction = {"string", "mean", reductions},
}

--- Binary cross entropy of sigmoid(x), without overflow.  weight and pos_weight broadcast to x.
---@param x Tensor logits
---@param target Tensor between 0 and 1
---@param opts {weight: Tensor, pos_weight: Tensor, reduction: "mean"|"sum"|"none"}?
---@return Tensor
function F.binary_cross_entropy_with_logits(x, target, opts)
  local op = "binary_cross_entropy_with_logits"
  opts = options.check(op, opts, bce_logits_spec)
  same_shapes(op, x, target)
  local loss = core.call("bce_with_logits", x, target, opts.pos_weight or 1.0)
  if opts.weight then loss = loss * arguments.wide(opts.weight) end
  if not arguments.same_shape(loss, x) then
    raise("%s: weight and pos_weight must broadcast to %s", op, describe(x))
  end
  return reduced(loss, opts.reduction)
end

local bce_spec = {weight = {"tensor"}, reduction = {"string", "mean", reductions}}

-- The terms of binary_cross_entropy: logarithms are taken for at least -100, and their quotients for at most 1e12, so
-- that probabilities of 0 and 1 have finite losses and gradients.  Made at the first call.
local bce_terms

local function make_bce_terms()
  return require("halfmoon.autograd").Function("binary_cross_entropy", {
    forward = function(ctx, x, target)
      ctx:save_for_backward(x, target)
      local yes, no = x:log():clamp(-100), (-x):log1p():clamp(-100)
      return (target - 1) * no - target * yes
    end,
    backward = function(ctx, g)
      local x, target = ctx:saved()
      return g * ((x - target) / ((1 - x) * x):clamp(1e-12)),
        ctx.needs_input_grad[2] and g * ((-x):log1p():clamp(-100) - x:log():clamp(-100)) or nil
    end,
  })
end

--- Binary cross entropy of probabilities x.  Inside autocast use binary_cross_entropy_with_logits.
---@param x Tensor probabilities
---@param target Tensor between 0 and 1
---@param opts {weight: Tensor, reduction: "mean"|"sum"|"none"}?
---@return Tensor
function F.binary_cross_entropy(x, target, opts)
  local op = "binary_cross_entropy"
  if core.autocast_state().enabled then
    raise("binary_cross_entropy: is unsafe inside autocast: its gradient overflows float16\n"
      .. "  hint: take the sigmoid away and call binary_cross_entropy_with_logits, which is safe there,\n"
      .. "  or leave autocast for this call: amp.autocast({enabled = false})")
  end
  opts = options.check(op, opts, bce_spec)
  same_shapes(op, x, target)
  if not x:is_floating_point() or not target:is_floating_point() then
    raise("%s: needs floating dtypes, came %s and %s", op, describe(x), describe(target))
  end
  local outside = core.no_grad(function() return x:lt(0):logical_or(x:gt(1)):any():item() end)
  if outside then
    raise("%s: x must hold probabilities between 0 and 1\n  hint: binary_cross_entropy_with_logits takes logits", op)
  end
  bce_terms = bce_terms or make_bce_terms()
  local loss = bce_terms(x, target)
  if opts.weight then loss = loss * opts.weight end
  if not arguments.same_shape(loss, x) then raise("%s: weight must broadcast to %s", op, describe(x)) end
  return reduced(loss, opts.reduction)
end

local kl_spec = {
  reduction = {"string", "mean", options.one_of("mean", "batchmean", "sum", "none")}, log_target = {"boolean", false},
}

--- Kullback-Leibler divergence: target * (log(target) - x), x being log probabilities.  "batchmean" divides the sum by
--- the size of dim 1, which is what the formula says; "mean" divides by the number of elements.
---@param x Tensor log probabilities
---@param target Tensor probabilities, or their logarithms with log_target
---@param opts {reduction: "mean"|"batchmean"|"sum"|"none", log_target: boolean}?
---@return Tensor
function F.kl_div(x, target, opts)
  opts = options.check("kl_div", opts, kl_spec)
  same_shapes("kl_div", x, target)
  local terms = core.call("kl_div_term", x, target, {log_target = opts.log_target})
  if opts.reduction ~= "batchmean" then return reduced(terms, opts.reduction) end
  return terms:sum() / (x:dim() > 0 and x:size(1) or 1)
end

return F
