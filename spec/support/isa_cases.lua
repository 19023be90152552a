-- isa_cases.lua -- what has to give the same bits with every instruction set and every number of threads: all rows of the op table, those
-- that are no formula from spec/support/samples.lua, and here on long inputs; casts; the optimizers' passes.  (Matrix products and
-- convolutions come from a library that makes no such promise.)
--
-- Required by isa_spec.lua; run as a script with a path, it saves all results there:  build/halfmoon spec/support/isa_cases.lua /tmp/out

local hm = require "halfmoon"
local core = require "halfmoon.core"
local samples = require "spec.support.samples"

local M = {}

local DTYPES = {"float32", "float16", "bfloat16"}
local SPECIAL = {
  0 / 0, math.huge, -math.huge, 0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-40, -1e-40, 6e-8, -6e-8, 2.0 ^ -14, 65504.0, -65504.0,
    65520.0, 3e38, -3e38, 88.7,
  -88.7, 104.0, -104.0, 1e-20, 20.0, 20.5, math.pi, -math.pi, 1e5, 7.0, -3.0,
}

-- A small generator of our own, so that inputs depend on nothing that is under test.
local function numbers_from(seed)
  local s = seed * 2654435761 % 4294967296
  return function()
    s = (s * 1664525 + 1013904223) % 4294967296
    return s / 4294967296
  end
end

--- n values: all pairs of specials first (rotated by k), then numbers of many sizes.
local function values(n, seed)
  local next_number, list = numbers_from(seed), {}
  local m = #SPECIAL
  for i = 1, math.min(n, m * m) do
    list[i] = seed % 2 == 0 and SPECIAL[(i - 1) // m + 1] or SPECIAL[(i - 1 + (i - 1) // m) % m + 1]
  end
  for i = #list + 1, n do
    local u = next_number() * 2 - 1
    local kind = i % 4
    list[i] = kind == 0 and u or kind == 1 and u * 8 or kind == 2 and u * 2.0 ^ (math.floor(next_number() * 40) - 20)
      or math.abs(u) * 3 + 0.01
  end
  return list
end

--- Ordinary values only, for what sums.
local function tame(n, seed)
  local next_number, list = numbers_from(seed), {}
  for i = 1, n do list[i] = (next_number() * 2 - 1) * 3 end
  return list
end

local function dtype_for(op, k, dtype) return op.inputs[k].cls == "b" and "bool" or dtype end

--- One case for each elementwise row, dtype and form.
local function elementwise(add, n)
  local base = {}
  for k = 1, 8 do base[k] = values(n, k) end
  local made = {}
  local function input(k, dtype)
    local key = k .. dtype
    if not made[key] then made[key] = hm.tensor(base[k], {dtype = dtype}) end
    return made[key]
  end
  local columns = math.max(1, n // 59)
  for _, op in ipairs(core.ops()) do
    if op.family == "elementwise" then
      local settings = samples.settings(op)
      local attrs = settings[#settings]
      for _, dtype in ipairs(DTYPES) do
        local name = op.name .. " " .. dtype
        local function operands(change)
          local list = {}
          for k = 1, #op.inputs do
            local t = input(k, dtype_for(op, k, dtype))
            list[k] = change and change(t, k) or t
          end
          list[#list + 1] = attrs
          return table.unpack(list)
        end
        add(name, function() return core.call(op.name, operands()) end)
        add(name .. " strided", function()
          return core.call(op.name, operands(function(t) return t:narrow(1, 1, columns * 59):view(columns, 59):t() end))
        end)
        if #op.inputs > 1 then
          add(name .. " broadcast", function()
            return core.call(op.name, operands(function(t, k)
              t = t:narrow(1, 1, columns * 59):view(columns, 59)
              return k == 2 and t:narrow(1, 2, 1) or t
            end))
          end)
        end
      end
      if #op.inputs == 2 and op.inputs[1].cls ~= "b" then
        add(op.name .. " float16 with float32", function() return core.call(op.name, input(1, "float16"), input(2, "float32"), attrs) end)
        add(op.name .. " float16 with a number", function() return core.call(op.name, input(1, "float16"), 0.3, attrs) end)
      end
    end
  end
end

local function arrays(add, n)
  for _, dtype in ipairs(DTYPES) do
    local function case(name, fn) add(name .. " " .. dtype, fn) end
    local rows = math.max(3, n // 301)
    local x = hm.tensor(tame(rows * 301, 7), {dtype = dtype}):view(rows, 301)
    local g = hm.tensor(tame(rows * 301, 8), {dtype = dtype}):view(rows, 301)
    for _, name in ipairs {"sum", "mean", "amax", "amin", "any", "all"} do
      case(name .. " over all", function() return x[name](x) end)
      case(name .. " over rows", function() return x[name](x, 2) end)
      case(name .. " over columns", function() return x[name](x, 1) end)
      case(name .. " transposed", function() return x:t()[name](x:t(), 1) end)
    end
    for _, name in ipairs {"max", "min"} do
      case(name .. " by rows", function() return x[name](x, 2) end)
      case(name .. " by columns", function() return x[name](x, 1) end)
    end
    case("argmax", function() return x:argmax(), x:argmin(1) end)
    for _, dims in ipairs {{0}, {1}, {0, 1}} do
      local over = " over " .. table.concat(dims, " ")
      case("spread" .. over, function() return core.call("var", x, {dim = dims}), core.call("logsumexp", x, {dim = dims}) end)
      for _, p in ipairs {0, 1, 2, 3, 0.7} do
        case("norm " .. p .. over, function() return core.call("norm", x, {p = p, dim = dims}) end)
      end
    end
    case("prod", function() return x:prod(), x:prod(1), x:prod(2), core.call("prod_backward", g:prod(2), x, {dim = 1}) end)
    for _, name in ipairs {"cumsum", "cumprod", "cumsum_reverse"} do
      case(name, function() return core.call(name, x, {dim = 0}), core.call(name, x, {dim = 1}) end)
      case(name .. " of one line", function() return core.call(name, x:view(rows * 301), {dim = 0}) end)
    end
    for _, name in ipairs {"softmax", "log_softmax"} do
      for d = 1, 2 do
        case(name .. " " .. d, function()
          local y = x[name](x, d)
          return y, core.call(name .. "_backward", g, y, {dim = d - 1})
        end)
      end
    end
    for _, relu in ipairs {false, true} do
      case("batch_norm relu " .. tostring(relu), function()
        local y, mean, rstd = core.call("batch_norm", x, nil, nil, nil, nil, {relu = relu})
        return y, mean, rstd, core.call("batch_norm_backward", g, x, nil, nil, mean, rstd, {relu = relu})
      end)
    end
    case("group_norm", function()
      local planes, slope = x:unsqueeze(1), g:unsqueeze(1)
      local y, mean, rstd = core.call("group_norm", planes, nil, nil, {groups = 1})
      return y, mean, rstd, core.call("group_norm_backward", slope, planes, nil, mean, rstd, {groups = 1})
    end)
    case("layer_norm", function()
      local y, mean, rstd = core.call("layer_norm", x, nil, nil, {})
      return y, mean, rstd, core.call("layer_norm_backward", g, x, nil, mean, rstd, {})
    end)
    case("rms_norm", function()
      local y, rstd = core.call("rms_norm", x, nil, {})
      return y, rstd, core.call("rms_norm_backward", g, x, nil, rstd, {})
    end)
    local target = hm.tensor(tame(rows, 9)):mul(50):add(150):to("i64")
    for _, reduction in ipairs {"mean", "sum", "none"} do
      for _, smoothing in ipairs {0, 0.1} do
        case(("cross_entropy %s %g"):format(reduction, smoothing), function()
          local attrs = {reduction = reduction, label_smoothing = smoothing}
          local y, lse = core.call("cross_entropy", x, target, attrs)
          return y, lse, core.call("cross_entropy_backward", hm.ones(y.shape), x, target, lse, attrs)
        end)
      end
    end
    local images = math.max(1, n // 2000)
    local picture = hm.tensor(tame(images * 5 * 13 * 11, 10), {dtype = dtype}):view(images, 5, 13, 11)
    picture[{1, 1, 1, 1}] = 0 / 0
    local last = hm.tensor(tame(images * 13 * 11 * 5, 11), {dtype = dtype}):view(images, 13, 11, 5):permute(1, 4, 2, 3)
    for name, image in pairs {rows = picture, channels_last = last} do
      case("max_pool2d " .. name, function()
        local y, index = core.call("max_pool2d", image, {kernel_size = {3, 2}, stride = {2, 2}, padding = {1, 0}})
        local attrs = {shape = image.shape, kernel_size = {3, 2}, stride = {2, 2}, padding = {1, 0}}
        return y, index, core.call("max_pool2d_backward", y, index, attrs),
          core.call("max_pool2d_relu_backward", y, index, core.call("relu", y), attrs)
      end)
      case("avg_pool2d " .. name, function()
        local y = core.call("avg_pool2d", image, {kernel_size = {3, 2}, stride = {2, 1}, padding = {1, 1}, ceil_mode = true})
        return y, core.call("avg_pool2d_backward", y,
          {shape = image.shape, kernel_size = {3, 2}, stride = {2, 1}, padding = {1, 1}, ceil_mode = true})
      end)
      case("adaptive_avg_pool2d " .. name, function()
        local y = core.call("adaptive_avg_pool2d", image, {output_size = {1, 4}})
        return y, core.call("adaptive_avg_pool2d_backward", y, {shape = image.shape})
      end)
      case("adaptive_max_pool2d " .. name, function()
        local y, index = core.call("adaptive_max_pool2d", image, {output_size = {3, 4}})
        return y, index, core.call("adaptive_max_pool2d_backward", y, index, {shape = image.shape})
      end)
      case("interpolate2d " .. name, function()
        local y = core.call("interpolate2d", image, {size = {9, 17}, mode = "bilinear"})
        return y, core.call("interpolate2d_backward", y, {shape = image.shape, mode = "bilinear"})
      end)
      case("conv2d_backward_bias " .. name, function() return core.call("conv2d_backward_bias", image) end)
    end
    -- products of whole numbers are exact, in whatever order the library adds: what is left is what goes with them
    local function whole(seed, ...)
      local list = {}
      for i, v in ipairs(tame(rows * 16, seed)) do list[i] = v < 0 and v // 1 or v // 1 + 1 end
      return hm.tensor(list, {dtype = dtype}):view(...)
    end
    local up, down, bias = whole(12, rows, 16), whole(13, rows, 16), whole(14, rows * 16):narrow(1, 1, rows)
    case("linear layers", function()
      local hidden, aux = core.call("linear_relu", up, down, bias)
      local bent, pre = core.call("linear_gelu_tanh", up, down, bias)
      return hidden, bent, pre, core.call("linear_backward_input_relu", up, down:t(), hidden, aux),
        core.call("linear_backward_input_gelu_tanh", up, down:t(), pre)
    end)
    case("linear_backward_params", function() return core.call("linear_backward_params", up, down) end)
    case("linear_backward_bias", function() return core.call("linear_backward_bias", x) end)
    for _, other in ipairs {"float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"} do
      case("cast to " .. other, function() return x:abs():to(other), x:t():abs():to(other):contiguous() end)
    end
    for _, m in ipairs {1, 3, 4, 1001, n} do
      case("uniform_ " .. m, function()
        hm.manual_seed(5)
        local y = hm.empty({m}, {dtype = dtype})
        return y:uniform_(-2, 3), hm.rand({3}, {dtype = dtype})
      end)
      case("normal_ " .. m, function()
        hm.manual_seed(5)
        return hm.empty({m}, {dtype = dtype}):normal_(0.5, 2), hm.randn({3}, {dtype = dtype})
      end)
      case("random_ " .. m, function()
        hm.manual_seed(5)
        return hm.randint(-7, 1000000007, {m}), hm.rand({3}, {dtype = dtype})
      end)
    end
  end
end

-- Whose sums are the library's, or that make nothing.
local APART = {elementwise = true, matmul = true, conv = true, view = true}

--- Every sample of every row that is no formula.
local function sampled(add)
  for _, op in ipairs(core.ops()) do
    for i, sample in ipairs(APART[op.family] and {} or samples.of(op)) do
      for _, dtype in ipairs(DTYPES) do
        add(("%s, sample %d of %s"):format(op.name, i, dtype), function()
          local args = samples.arguments(op, sample, dtype)
          return table.unpack(samples.call(op, args, sample[2]))
        end)
      end
    end
  end
end

local OPTIMIZERS = {
  {"SGD", {lr = 0.1}}, {"SGD", {lr = 0.1, momentum = 0.9, weight_decay = 0.01, nesterov = true}},
  {"SGD", {lr = 0.1, momentum = 0.9, dampening = 0.1}}, {"Adam", {lr = 0.01, weight_decay = 0.1}}, {"AdamW", {lr = 0.01,
    weight_decay = 0.1}},
}

local function optimizers(add, n)
  for i, row in ipairs(OPTIMIZERS) do
    for _, clip in ipairs {false, 0.5} do
      add(("%s %d%s"):format(row[1], i, clip and " clipped" or ""), function()
        local params, sizes = {}, {n, 1, 37, 1000}
        for k, size in ipairs(sizes) do params[k] = hm.nn.Parameter(hm.tensor(tame(size, 20 + k))) end
        local opt = hm.optim[row[1]](params, row[2])
        local scaler = hm.amp.GradScaler {init_scale = 1024.0}
        for step = 1, 3 do
          opt:zero_grad()
          for k, p in ipairs(params) do p.grad = hm.tensor(tame(sizes[k], 30 * step + k)) * 1024 end
          assert(scaler:step(opt, clip and {max_norm = clip} or nil))
          scaler:update()
        end
        local out = {}
        for k, p in ipairs(params) do
          out[#out + 1] = p:detach()
          out[#out + 1] = p.grad
          out[#out + 1] = p:detach():half()
          for _, state in ipairs {"momentum_buffer", "exp_avg", "exp_avg_sq"} do
            out[#out + 1] = opt.core:state(k, state)
          end
        end
        return table.unpack(out)
      end)
    end
  end
end

--- All cases on inputs of about n elements: an array of {name, function() -> tensors}.
function M.cases(n)
  local list = {}
  local function add(name, fn) list[#list + 1] = {name, fn} end
  elementwise(add, n)
  arrays(add, n)
  sampled(add)
  optimizers(add, n)
  return list
end

--- NaN is NaN, whatever its payload: all become one.
function M.settle(t)
  if not t:is_floating_point() then return t:contiguous() end
  return hm.where(t:isnan(), 0 / 0, t):to(t.dtype):contiguous()
end

-- As a script.
if arg and arg[0] and arg[0]:find("isa_cases%.lua$") and arg[1] then
  local state = {}
  hm.no_grad(function()
    for _, case in ipairs(M.cases(1003)) do
      for i, t in ipairs {case[2]()} do
        local name = case[1] .. " #" .. i
        assert(not state[name], name)
        state[name] = M.settle(t)
      end
    end
  end)
  assert(hm.save(arg[1], state))
  print(core.features().isa)
end

return M
