-- samples.lua -- inputs for every row of the op table that does not simply take tensors of one shape: the one place
-- from which op_audit_spec, autocast_spec, cuda_parity_spec and isa_cases draw.  A row that is neither elementwise nor
-- has a sample here fails in each of them.
--
-- A sample is {shapes by input, attributes}: "-" leaves an optional input out, a number is a number, a shape's kind says
-- what a mask is made of ("bool" or "float") or which values are negative (SIGNS), a function makes the tensor.  A
-- third entry says why differences do not apply.  The first sample of a row is small and holds every optional input;
-- those under SMALL elements are also held against differences and plain loops.

local hm = require "halfmoon"
local core = require "halfmoon.core"

local M = {}

-- ====== Values ======

-- By the row's domain.  Beside ordinary ones: ties, zeros of both signs, small and large ones.
M.DOMAIN = {
  real = {-3.7, -2.31, -1.05, -0.51, -0.13, 0.0, 0.07, 0.43, 0.99, 1.61, 2.72, 3.9, 11.5, -19.0, 88.0, -0.0, 1e-3,
    -100.0, 100.0},
  positive = {0.11, 0.27, 0.5, 0.73, 1.0, 1.31, 1.77, 2.19, 2.9, 3.3, 3.75, 4.2, 17.0},
  nonzero = {-3.9, -2.6, -1.7, -1.1, -0.6, -0.23, 0.31, 0.8, 1.3, 1.9, 2.4, 3.5, -7.25},
  integer = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 7},
  unit = {0.02, 0.1, 0.21, 0.33, 0.4, 0.52, 0.6, 0.68, 0.77, 0.85, 0.93, 0.98, 0.5},
}

local count = require("spec.support.inputs").count
M.count = count

local function is_integer(dtype) return not dtype:find("float", 1, true) end
M.is_integer = is_integer

--- A CPU tensor of that shape from a list of values taken round and round.
function M.tensor(list, dtype, shape, start)
  local out = {}
  for i = 1, count(shape) do
    local v = list[(i - 1 + (start or 0)) % #list + 1]
    if dtype == "bool" then v = i * 7 % 3 ~= 0 end
    out[i] = v
  end
  return hm.tensor(out, {dtype = dtype, device = "cpu"}):view(table.move(shape, 1, #shape, 1, {}))
end

--- Positive numbers of one size, none of which a half type holds exactly and no two alike: sums of them lose nothing
--- to cancellation.
function M.filled(shape, dtype, seed)
  local list = {}
  for i = 1, count(shape) do list[i] = is_integer(dtype) and i * 7 % 11
    or 1 + (i * 0.61803398875 + seed * 0.377) % 1 end
  if dtype == "bool" then for i = 1, #list do list[i] = list[i] % 2 == 1 end end
  return hm.tensor(list, {dtype = dtype, device = "cpu"}):view(table.move(shape, 1, #shape, 1, {}))
end

-- Attribute settings of elementwise rows beyond the defaults; rows made from their derivatives use the same.
local SETTINGS = {
  clamp = {{}, {min = -1}, {max = 1.5}, {min = -1.25, max = 2}},
  fake_quantize = {{}, {quant_min = 0, quant_max = 5}, {quant_min = -3, quant_max = 2}},
  fp8_round = {{}, {scale = 4, format = "e5m2"}, {scale = 0.125}},
  softplus = {{}, {beta = 2, threshold = 3}},
  addcmul = {{}, {value = -0.75}}, addcdiv = {{}, {value = -0.75}},
  leaky_relu = {{}, {negative_slope = 0.3}}, elu = {{}, {alpha = 1.7}}, hardtanh = {{}, {min_val = -2.5,
    max_val = 0.5}},
  smooth_l1 = {{}, {beta = 0.3}}, kl_div_term = {{}, {log_target = true}}, norm_grad = {{}, {p = 1}, {p = 3}, {p = 0}},
}

--- The settings of an elementwise row: at least {{}}.
function M.settings(op)
  local list = SETTINGS[op.name] or SETTINGS[op.name:match("^(.-)_backward") or ""]
  if not list or #op.attrs == 0 then return {{}} end
  return list
end

-- ====== Samples ======

-- {shapes by input ("-" leaves an optional one out, a number is a number), attributes}; several for a row.
local MATMUL = {{{{5, 7}, {7, 3}}}, {{{33, 65}, {65, 40}}}, {{{2, 3, 4}, {2, 4, 5}}}, {{{3, 1, 4, 6}, {2, 6, 5}}},
  {{{7}, {7}}}, {{{4, 7}, {7}}},
  {{{7}, {7, 4}}}, {{{3, 4, 5}, {5, 2}}}, {{{2, 0}, {0, 3}}}}
local REDUCE = {
  {{{5, 7}}, {dim = {1}}}, {{{5, 7}}, {dim = {0}}}, {{{5, 7}}, {dim = {0, 1}, keepdim = true}}, {{{5, 7}}},
  {{{3, 4, 5}}, {dim = {1}, keepdim = true}},
  {{{3, 4, 5}}, {dim = {0, 2}}}, {{{2, 1500}}, {dim = {1}}}, {{{700, 3}}, {dim = {0}}}, {{{2600}}},
  {{{1, 9000}}, {dim = {1}}},
}
local PICK = {{{{5, 7}}, {dim = 0}}, {{{5, 7}}, {dim = 1, keepdim = true}}, {{{3, 4, 5}}, {dim = 1}},
  {{{2, 1500}}, {dim = 1}}}
local ROWS_OF = {{{{5, 7}}, {dim = 1}}, {{{5, 7}}, {dim = 0}}, {{{3, 4, 5}}, {dim = 1}}, {{{3, 300}}, {dim = 1}},
  {{{2, 1500}}, {dim = 1}}}

local function doubled(list)
  local out = {}
  for i, s in ipairs(list) do out[i] = {{s[1][1], s[1][1]}, s[2]} end
  return out
end

local SAMPLES = {
  sum = REDUCE, mean = REDUCE, amax = REDUCE, amin = REDUCE, any = REDUCE, all = REDUCE,
  max_dim = PICK, min_dim = PICK, argmax = {{{{5, 7}}}, table.unpack(PICK)}, argmin = {{{{5, 7}}}, table.unpack(PICK)},
  select_backward = {{{{7}, {7}}, {shape = {5, 7}, dim = 0}},
    {{{5, 1}, {5, 1}}, {shape = {5, 7}, dim = 1, keepdim = true}}},
  select_pick = {{{{5, 7}, {7}}, {dim = 0}}, {{{5, 7}, {5, 1}}, {dim = 1, keepdim = true}}},
  softmax = ROWS_OF, log_softmax = ROWS_OF, softmax_backward = doubled(ROWS_OF),
    log_softmax_backward = doubled(ROWS_OF),
  batch_norm = {{{{6, 5}, {5}, {5}, "-", "-"}, {}}, {{{3, 4, 5, 6}, {4}, {4}, "-", "-"}, {relu = true}},
    {{{2, 3, 40}, "-", "-", "-", "-"}, {}}, {{{300, 36}, {36}, "-", "-", "-"}, {}}},
  layer_norm = {{{{5, 7}, {7}, {7}}, {}}, {{{3, 4, 5}, {4, 5}, "-"}, {dims = 2}}, {{{3, 300}, {300}, {300}}, {}},
    {{{2, 1500}, "-", "-"}, {}}},
  rms_norm = {{{{5, 7}, {7}}, {}}, {{{3, 4, 5}, {4, 5}}, {dims = 2}}, {{{2, 1500}, "-"}, {}}},
  group_norm = {{{{2, 6, 5}, {6}, {6}}, {groups = 3}}, {{{3, 4, 5, 6}, {4}, {4}}, {groups = 2}}},
  batch_norm_backward = {{{{6, 5}, {6, 5}, {5}, {5}, {5}, {5}}, {}},
    {{{3, 4, 5, 6}, {3, 4, 5, 6}, {4}, {4}, {4}, {4}}, {relu = true}}},
  layer_norm_backward = {{{{5, 7}, {5, 7}, {7}, {5}, {5}}, {}}, {{{40, 40}, {40, 40}, {40}, {40}, {40}}, {}}},
  rms_norm_backward = {{{{5, 7}, {5, 7}, {7}, {5}}, {}}, {{{40, 40}, {40, 40}, {40}, {40}}, {}}},
  group_norm_backward = {{{{2, 6, 5}, {2, 6, 5}, {6}, {2, 3}, {2, 3}}, {groups = 3}},
    {{{3, 4, 5, 6}, {3, 4, 5, 6}, {4}, {3, 2}, {3, 2}}, {groups = 2}}},
  cross_entropy = {
    {{{6, 5}, {6}}, {}}, {{{6, 5}, {6}}, {reduction = "sum"}},
    {{{6, 5}, {6}}, {reduction = "none", label_smoothing = 0.1}},
    {{{6, 5}, {6}}, {ignore_index = 2}}, {{{3, 300}, {3}}, {label_smoothing = 0.2}}, {{{300, 4}, {300}}, {}},
  },
  cross_entropy_backward = {
    {{{}, {6, 5}, {6}, {6}}, {}}, {{{}, {6, 5}, {6}, {6}}, {reduction = "sum", label_smoothing = 0.1}},
    {{{6}, {6, 5}, {6}, {6}}, {reduction = "none"}},
    {{{}, {6, 5}, {6}, {6}}, {ignore_index = 2}},
  },
  matmul = MATMUL,
  linear = {{{{5, 7}, {4, 7}, {4}}}, {{{5, 7}, {4, 7}, "-"}}, {{{2, 3, 7}, {4, 7}, {4}}}, {{{33, 65}, {40, 65}, {40}}},
    {{{7}, {4, 7}, {4}}}},
  linear_backward_input = {{{{5, 4}, {4, 7}}}, {{{2, 3, 4}, {4, 7}}}},
  linear_backward_weight = {{{{5, 4}, {5, 7}}}, {{{2, 3, 4}, {2, 3, 7}}}},
  linear_backward_bias = {{{{5, 4}}}, {{{300, 4}}}, {{{2, 3, 4}}}},
  linear_backward_params = {{{{5, 4}, {5, 7}}}, {{{2, 3, 4}, {2, 3, 7}}}, {{{300, 4}, {300, 3}}}, {{{4}, {7}}}},
  conv2d = {
    {{{2, 3, 5, 6}, {4, 3, 3, 3}, {4}}, {}}, {{{2, 3, 5, 6}, {4, 3, 3, 3}, "-"}, {padding = {1}}},
    {{{1, 4, 7, 7}, {6, 2, 3, 3}, {6}}, {stride = {2}, padding = {1}, groups = 2}},
    {{{2, 2, 8, 7}, {3, 2, 3, 2}, {3}}, {dilation = {2, 1}, stride = {1, 2}}},
    {{{2, 1, 9, 9}, {4, 1, 3, 3}, {4}}, {padding = {1}}},
    {{{2, 3, 4, 4}, {5, 3, 1, 1}, {5}}, {}},
  },
  conv2d_backward_input = {
    {{{2, 4, 3, 4}, {4, 3, 3, 3}}, {shape = {2, 3, 5, 6}}},
    {{{1, 6, 4, 4}, {6, 2, 3, 3}}, {shape = {1, 4, 7, 7}, stride = {2}, padding = {1}, groups = 2}},
    {{{2, 3, 4, 3}, {3, 2, 3, 2}}, {shape = {2, 2, 8, 7}, dilation = {2, 1}, stride = {1, 2}}},
  },
  conv2d_backward_weight = {
    {{{1, 2, 3, 4}, {1, 3, 5, 6}}, {shape = {2, 3, 3, 3}}},
    {{{2, 4, 3, 4}, {2, 3, 5, 6}}, {shape = {4, 3, 3, 3}}},
    {{{1, 6, 4, 4}, {1, 4, 7, 7}}, {shape = {6, 2, 3, 3}, stride = {2}, padding = {1}, groups = 2}},
    {{{2, 3, 4, 3}, {2, 2, 8, 7}}, {shape = {3, 2, 3, 2}, dilation = {2, 1}, stride = {1, 2}}},
  },
  conv2d_backward_bias = {{{{2, 4, 3, 3}}}, {{{3, 5, 17, 16}}}},
  max_pool2d = {
    {{{2, 3, 4, 6}}, {kernel_size = {2}}}, {{{1, 2, 7, 7}}, {kernel_size = {3, 2}, stride = {2}, padding = {1}}},
    {{{1, 2, 6, 6}}, {kernel_size = {3}, stride = {1}}},
  },
  max_pool2d_backward = {
    {{{2, 3, 2, 3}, {2, 3, 2, 3}}, {kernel_size = {2}, shape = {2, 3, 4, 6}}},
    {{{1, 2, 4, 4}, {1, 2, 4, 4}}, {kernel_size = {3}, stride = {1}, shape = {1, 2, 6, 6}}},
  },
  max_pool2d_relu_backward = {
    {{{2, 3, 2, 3}, {2, 3, 2, 3}, {2, 3, 2, 3}}, {kernel_size = {2}, shape = {2, 3, 4, 6}}},
    {{{1, 2, 4, 4}, {1, 2, 4, 4}, {1, 2, 4, 4}}, {kernel_size = {3}, stride = {1}, shape = {1, 2, 6, 6}}},
  },
  cast = {},
  copy_ = {{{{5, 7}, {5, 7}}}, {{{5, 7}, {7}}}, {{{5, 7}, {}}}, {{{3, 700}, {3, 1}}}},
  fill_ = {{{{5, 7}, 1.5}}, {{{1500}, 3}}}, arange_ = {{{{37}, 1, 2}}, {{{1500}, 0, 1}}},
    eye_ = {{{{5, 5}}}, {{{3, 7}}}},
  uniform_ = {{{{1}}}, {{{3}}}, {{{5, 7}}, {low = -2, high = 3}}, {{{1501}}}},
    normal_ = {{{{1}}}, {{{3}}}, {{{5, 7}}, {mean = 0.5, std = 2}}, {{{1501}}}},
  random_ = {{{{3}}, {low = 0, high = 2}}, {{{5, 7}}, {low = -7, high = 100}}, {{{1501}}, {low = 0, high = 250}}},
}
for _, dtype in ipairs {"float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"} do
  table.insert(SAMPLES.cast, {{{5, 7}}, {dtype = dtype}})
end
table.insert(SAMPLES.cast, {{{2, 3, 4, 5}}, {layout = "channels_last"}})
table.insert(SAMPLES.cast, {{{2, 3, 4, 5}}, {dtype = "float16", layout = "channels_last"}})

-- Linear layers with an activation, with the signs that SIGNS says.  aux, which a backend keeps for itself, may always be
-- empty.
local function rows(shape) return {kind = "rows", table.unpack(shape)} end
local function nothing() return hm.zeros({0}, {dtype = "uint8", device = "cpu"}) end
local LAYERS = {{{{5, 7}, rows {4, 7}, rows {4}}}, {{{5, 7}, rows {4, 7}, "-"}}, {{{2, 3, 7}, rows {4, 7}, rows {4}}},
  {{{2, 3, 7}, rows {6, 7}, "-"}}, {{{7}, rows {4, 7}, rows {4}}}, {{{33, 65}, rows {40, 65}, rows {40}}}}
for name, list in pairs {
  linear_relu = LAYERS, linear_gelu_tanh = LAYERS,
  linear_backward_input_relu = {{{{5, 4}, {4, 7}, {5, 7, kind = "relu"}, nothing}},
    {{{2, 3, 4}, {4, 7}, {2, 3, 7, kind = "relu"}, nothing}}, {{{4}, {4, 7}, {7, kind = "relu"}, nothing}},
    {{{33, 40}, {40, 65}, {33, 65, kind = "relu"}, nothing}}},
  linear_backward_input_gelu_tanh = {{{{5, 4}, {4, 7}, {5, 7, kind = "columns"}}},
    {{{2, 3, 4}, {4, 7}, {2, 3, 7, kind = "columns"}}}, {{{4}, {4, 7}, {7, kind = "columns"}}},
    {{{33, 40}, {40, 65}, {33, 65, kind = "columns"}}}},
} do SAMPLES[name] = list end

-- Indices.
local AGAIN = "an id that comes again hides what was written before, but the derivative is that of each"
local PADDING = "rows of padding_idx get no gradient"
for name, list in pairs {
  gather = {{{{5, 7}, {5, 9}}, {dim = 1}}, {{{5, 7}, {9, 6}}, {dim = 0}}, {{{}, {}}, {dim = 0}}},
  gather_backward = {{{{5, 9}, {5, 9}}, {shape = {5, 7}, dim = 1}}, {{{40, 6}, {40, 6}}, {shape = {5, 7}, dim = 0}}},
  index_select = {{{{5, 7}, {9}}, {dim = 0}}, {{{3, 4, 5}, {6}}, {dim = 2}}, {{{5, 32}, {9}}, {dim = 0}}},
  index_select_backward = {{{{9, 7}, {9}}, {shape = {5, 7}, dim = 0}}, {{{3, 40, 5}, {40}}, {shape = {3, 4, 5},
    dim = 1}}},
  index_add = {{{{5, 7}, {9}, {9, 7}}, {dim = 0}}, {{{5, 7}, {40}, {5, 40}}, {dim = 1}}},
  scatter = {{{{5, 7}, {5, 7}, {5, 7}}, {dim = 1}}, {{{5, 7}, {5, 9}, {5, 9}}, {dim = 1}, AGAIN},
    {{{5, 7}, {40, 6}, {40, 6}}, {dim = 0}, AGAIN}, {{{5, 7}, {5, 2}, 2}, {dim = 1}}},
  scatter_add = {{{{5, 7}, {5, 9}, {5, 9}}, {dim = 1}}, {{{5, 7}, {40, 6}, {40, 6}}, {dim = 0}}},
  embedding = {{{{5, 7}, {3, 4}}, {}}, {{{5, 7}, {3, 4}}, {padding_idx = 1}, PADDING}, {{{5, 32}, {6}},
    {padding_idx = 2, zero_padding = true}}},
  embedding_backward = {{{{3, 4, 7}, {3, 4}}, {shape = {5, 7}, padding_idx = 1}}, {{{40, 300}, {40}}, {shape = {5,
    300}}}},
  one_hot = {{{{3, 4}}, {num_classes = 6}}},
  sort = {{{{5, 7}}, {dim = 1}}, {{{5, 7}}, {dim = 0, descending = true}}, {{{2, 1500}}, {dim = 1}}, {{{}}, {}}},
  topk = {{{{5, 7}}, {dim = 1, k = 3}}, {{{2, 1500}}, {dim = 1, k = 5, largest = false}}, {{{2, 1500}}, {k = 700}}},
  flip = {{{{5, 7}}, {dims = {0, 1}}}, {{{3, 4, 5}}, {dims = {1}}}},
  tril = {{{{5, 7}}, {}}, {{{3, 4, 5}}, {diagonal = -1}}}, triu = {{{{5, 7}}, {}}, {{{3, 4, 5}}, {diagonal = 2}}},
  pad = {{{{5, 7}}, {pad = {1, -2, 3, 0}, value = 2}}, {{{5, 7}}, {pad = {6, 2, 1, 4}, mode = "reflect"}},
    {{{5, 7}}, {pad = {3, 9}, mode = "replicate"}}, {{{5, 7}}, {pad = {7, 2, 1, 5}, mode = "circular"}}},
  pad_backward = {{{{8, 6}}, {shape = {5, 7}, pad = {1, -2, 3, 0}}},
    {{{10, 15}}, {shape = {5, 7}, pad = {6, 2, 1, 4}, mode = "reflect"}},
    {{{5, 19}}, {shape = {5, 7}, pad = {3, 9}, mode = "replicate"}},
    {{{11, 16}}, {shape = {5, 7}, pad = {7, 2, 1, 5}, mode = "circular"}}},
} do SAMPLES[name] = list end

-- The largest values of input 2 of amax_backward.
local function largest(dtype, op, sample, args)
  return core.call("amax", args[2] or M.argument(op, 2, sample, dtype), sample[2])
end

-- Reductions and scans of products and spreads.
local SPREAD = {{{{5, 7}}, {dim = {1}}}, {{{5, 7}}, {}}, {{{3, 4, 5}}, {dim = {0, 2}, correction = 0, keepdim = true}},
  {{{2, 1500}}, {dim = {1}}}, {{{700, 3}}, {dim = {0}}}}
local LINES = {{{{5, 7}}, {dim = 1}}, {{{5, 7}}, {dim = 0}}, {{{3, 4, 5}}, {dim = 1}}, {{{2, 1500}}, {dim = 1}}}
local SHORT_LINES = {{{{5, 7}}, {dim = 1}}, {{{5, 7}}, {dim = 0}}, {{{3, 4, 5}}, {dim = 1}}, {{{130, 8}}, {dim = 1}}}
for name, list in pairs {
  var = SPREAD, std = SPREAD, cumsum = LINES, cumsum_reverse = LINES, cumprod = SHORT_LINES,
  prod = {{{{5, 7}}, {dim = 1}}, {{{5, 7}}, {dim = 0, keepdim = true}}, {{{4, 6}}}, {{{3, 4, 5}}, {dim = 1}}, {{{130,
    8}}, {dim = 1}}},
  prod_backward = {{{{5}, {5, 7}}, {dim = 1}}, {{{1, 7}, {5, 7}}, {dim = 0, keepdim = true}}, {{{}, {3, 4}}}},
  cumprod_backward = {{{{5, 7}, {5, 7}, {5, 7}}, {dim = 1}}, {{{3, 4, 5}, {3, 4, 5}, {3, 4, 5}}, {dim = 1}}},
  prod_backward_backward = {{{{5, 7}, {5}, {5, 7}}, {dim = 1}}, {{{5, 7}, {1, 7}, {5, 7}}, {dim = 0, keepdim = true}},
    {{{3, 4}, {}, {3, 4}}}},
  cumprod_backward_backward = {{{{5, 7}, {5, 7}, {5, 7}}, {dim = 1}}, {{{3, 4, 5}, {3, 4, 5}, {3, 4, 5}}, {dim = 1}}},
  norm = {{{{5, 7}}, {dim = {1}}}, {{{5, 7}}, {}}, {{{3, 4, 5}}, {dim = {0, 2}, p = 1, keepdim = true}},
    {{{5, 7}}, {dim = {0}, p = 3}}, {{{5, 7}}, {dim = {1}, p = 0}}, {{{2, 1500}}, {dim = {1}}}},
  logsumexp = {{{{5, 7}}, {dim = {1}}}, {{{3, 4, 5}}, {dim = {0, 2}, keepdim = true}}, {{{2, 1500}}, {dim = {1}}}},
  amax_backward = {{{{5}, {5, 7}, largest}, {dim = {1}}}, {{{1, 7}, {5, 7}, largest}, {dim = {0}, keepdim = true}}},
} do SAMPLES[name] = list end

-- Losses.
for name, list in pairs {
  cross_entropy_backward_by_g = {{{{6, 5}, {6, 5}, {6}, {6}}, {}}, {{{6, 5}, {6, 5}, {6}, {6}}, {reduction = "none",
    label_smoothing = 0.1}}},
  cross_entropy_backward_by_x = {{{{6, 5}, {}, {6, 5}, {6}, {6}}, {}}, {{{6, 5}, {6}, {6, 5}, {6}, {6}},
    {reduction = "none"}}},
  nll_loss = {{{{6, 5}, {6}, {5}}, {}}, {{{6, 5}, {6}, "-"}, {reduction = "sum"}}, {{{6, 5}, {6}, {5}},
    {reduction = "none"}},
    {{{2, 3, 4}, {2, 4}, {3}}, {ignore_index = 1}}, {{{300, 4}, {300}, "-"}, {}}},
  nll_loss_backward = {{{{}, {6}, {5}, {}}, {shape = {6, 5}}}, {{{6}, {6}, "-", {}}, {shape = {6, 5},
    reduction = "none"}},
    {{{}, {2, 4}, {3}, {}}, {shape = {2, 3, 4}, reduction = "sum", ignore_index = 1}}},
  nll_loss_backward_by_g = {{{{6, 5}, {6}, {5}, {}}, {}}, {{{6, 5}, {6}, "-", {}}, {reduction = "none"}}},
} do SAMPLES[name] = list end

-- Where the largest values of an image stand.
local function places(shape, size)
  return function() return (select(2, core.call("adaptive_max_pool2d", M.filled(shape, "float32", 1),
    {output_size = size}))) end
end

-- Pooling and interpolation.
for name, list in pairs {
  max_pool2d_pick = {{{{2, 3, 4, 6}, {2, 3, 2, 3}}, {kernel_size = {2}}},
    {{{1, 2, 6, 6}, {1, 2, 4, 4}}, {kernel_size = {3}, stride = {1}}}},
  avg_pool2d = {{{{2, 3, 4, 6}}, {kernel_size = {2}}}, {{{1, 2, 7, 7}}, {kernel_size = {3, 2}, stride = {2},
    padding = {1}}},
    {{{1, 2, 7, 7}}, {kernel_size = {3}, stride = {2}, padding = {1}, ceil_mode = true, count_include_pad = false}},
    {{{1, 2, 6, 6}}, {kernel_size = {3}, stride = {3}, divisor_override = 5}}, {{{2, 20, 17, 16}}, {kernel_size = {3},
      stride = {2}}}},
  avg_pool2d_backward = {{{{2, 3, 2, 3}}, {shape = {2, 3, 4, 6}, kernel_size = {2}}},
    {{{1, 2, 4, 4}}, {shape = {1, 2, 7, 7}, kernel_size = {3}, stride = {2}, padding = {1}, count_include_pad = false}},
    {{{2, 20, 8, 7}}, {shape = {2, 20, 17, 16}, kernel_size = {3}, stride = {2}}}},
  adaptive_avg_pool2d = {{{{2, 3, 5, 6}}, {output_size = {2, 3}}}, {{{1, 2, 5, 7}}, {output_size = {1, 1}}},
    {{{1, 2, 3, 4}}, {output_size = {5, 6}}}, {{{2, 20, 9, 8}}, {output_size = {4, 3}}}},
  adaptive_avg_pool2d_backward = {{{{2, 3, 2, 3}}, {shape = {2, 3, 5, 6}}}, {{{1, 2, 5, 6}}, {shape = {1, 2, 3, 4}}}},
  adaptive_max_pool2d = {{{{2, 3, 5, 6}}, {output_size = {2, 3}}}, {{{1, 2, 5, 7}}, {output_size = {1, 1}}},
    {{{1, 2, 3, 4}}, {output_size = {5, 6}}}},
  adaptive_max_pool2d_backward = {{{{2, 3, 2, 3}, places({2, 3, 5, 6}, {2, 3})}, {shape = {2, 3, 5, 6}}},
    {{{1, 2, 5, 6}, places({1, 2, 3, 4}, {5, 6})}, {shape = {1, 2, 3, 4}}}},
  interpolate2d = {{{{2, 2, 3, 4}}, {size = {5, 6}}}, {{{2, 2, 3, 4}}, {size = {5, 6}, mode = "bilinear"}},
    {{{1, 2, 5, 6}}, {size = {3, 2}, mode = "bilinear", align_corners = true}},
    {{{1, 2, 4, 5}}, {size = {6, 7}, mode = "bilinear", scale_h = 1.5, scale_w = 1.5}}, {{{1, 2, 5, 6}}, {size = {3,
      2}}}},
  interpolate2d_backward = {{{{2, 2, 5, 6}}, {shape = {2, 2, 3, 4}}}, {{{2, 2, 5, 6}}, {shape = {2, 2, 3, 4},
    mode = "bilinear"}},
    {{{1, 2, 3, 2}}, {shape = {1, 2, 5, 6}, mode = "bilinear", align_corners = true}}},
} do SAMPLES[name] = list end

-- The result of attention, or its lse, for the other inputs of a sample of attention_backward.
local function attended(which)
  return function(dtype, op, sample, args)
    local input = {}
    for k = 2, 5 do input[k] = args[k] or M.argument(op, k, sample, dtype) end
    if is_integer(dtype) then for k = 2, 4 do input[k] = input[k]:float() end end -- the rows refuse them, not the sample
    local out = select(which, core.call("attention", input[2], input[3], input[4], input[5], sample[2]))
    return is_integer(dtype) and out:to(dtype) or out
  end
end

--- {q, k, v, mask} as inputs of attention_backward.
local function backwards(q, k, v, mask)
  return {{q[1], q[2], q[3], v[4]}, q, k, v, mask, attended(1), attended(2)}
end

-- Attention: heads that share keys, masks of both kinds, more keys than one block holds.
local MASK = {1, 1, 3, 5, kind = "bool"}
for name, list in pairs {
  attention = {
    {{{1, 2, 3, 4}, {1, 2, 5, 4}, {1, 2, 5, 3}, MASK}, {}},
    {{{1, 2, 4, 4}, {1, 2, 4, 4}, {1, 2, 4, 4}, "-"}, {causal = true}},
    {{{1, 4, 3, 4}, {1, 2, 5, 4}, {1, 2, 5, 3}, {3, 5}}, {scale = 0.3}},
    {{{1, 2, 3, 4}, {1, 2, 5, 4}, {1, 2, 5, 3}, "-"}, {dropout = 0.3}},
    {{{1, 2, 70, 8}, {1, 1, 150, 8}, {1, 1, 150, 8}, "-"}, {}},
  },
  attention_backward = {
    {backwards({1, 2, 3, 4}, {1, 2, 5, 4}, {1, 2, 5, 3}, MASK), {}},
    {backwards({1, 2, 4, 4}, {1, 2, 4, 4}, {1, 2, 4, 4}, "-"), {causal = true}},
    {backwards({1, 2, 70, 8}, {1, 1, 150, 8}, {1, 1, 150, 8}, "-"), {}},
  },
} do SAMPLES[name] = list end

-- Chances.
SAMPLES.bernoulli_ = {{{{5, 7}}, {}}, {{{3}}, {p = 0.25}}, {{{1501}}, {p = 0.9}}}
SAMPLES.dropout = {{{{5, 7}}, {}}, {{{3}}, {p = 0.25}}, {{{1501}}, {p = 0.1}}}

-- Views.
for name, list in pairs {
  view = {{{{2, 3}}, {shape = {6}}}, {{{4, 6}}, {shape = {2, -1, 3}}}}, reshape = {{{{2, 3}}, {shape = {6}}}, {{{4, 6}},
    {shape = {3, -1}}}},
  flatten = {{{{2, 3}}, {}}, {{{2, 3, 4}}, {start_dim = 1}}, {{{2, 3, 4}}, {end_dim = 1}}},
  permute = {{{{2, 3}}, {dims = {1, 0}}}, {{{2, 3, 4}}, {dims = {2, 0, 1}}}}, transpose = {{{{2, 3}}, {dim0 = 0,
    dim1 = 1}}, {{{2, 3, 4}}, {dim0 = -1, dim1 = 0}}},
  t = {{{{2, 3}}, {}}, {{{4}}, {}}}, squeeze = {{{{4, 1}}, {}}, {{{1, 2, 1}}, {dim = {0}}}}, unsqueeze = {{{{2, 3}},
    {dim = 0}}, {{{2, 3}}, {dim = -1}}},
  expand = {{{{2, 1}}, {shape = {2, 3}}}, {{{3}}, {shape = {2, -1}}}}, narrow = {{{{4, 3}}, {dim = 0, start = 1,
    length = 2}}},
  select = {{{{4, 3}}, {dim = 0, index = 1}}, {{{2, 4, 3}}, {dim = 2, index = 2}}},
  expand_reduced = {{{{3}}, {shape = {2, 3}, dim = {0}}}, {{{2, 1}}, {shape = {2, 3}, dim = {1}, keepdim = true}}},
  grad_channels = {{{{3}}, {shape = {2, 3, 2, 2}}}}, detach = {{{{2, 3}}, {}}},
  narrow_backward = {{{{2, 3}}, {shape = {4, 3}, dim = 0, start = 1}}, {{{2, 3}}, {shape = {2, 5}, dim = 1,
    start = 2}}},
} do SAMPLES[name] = list end

-- ====== What inputs hold ======

-- Numbers kept in float32 whatever the other inputs are (float64 beside float64).
local STATISTICS = {mean = true, rstd = true, lse = true, total = true}
local LIKE_LOSS = {cross_entropy_backward = "g", cross_entropy_backward_by_x = "g"}

-- How many ids there are: classes, positions.
local function along_dim(shapes, attrs) return shapes[1][attrs.dim + 1] or 1 end
local function along_shape(_, attrs) return attrs.shape[attrs.dim + 1] end
local LIMIT = {
  cross_entropy = function(shapes) return shapes[1][2] end,
  cross_entropy_backward = function(shapes) return shapes[2][2] end,
  cross_entropy_backward_by_g = function(shapes) return shapes[2][2] end,
  cross_entropy_backward_by_x = function(shapes) return shapes[3][2] end,
  nll_loss = function(shapes) return shapes[1][2] end,
  nll_loss_backward = function(_, attrs) return attrs.shape[2] end,
  nll_loss_backward_by_g = function(shapes) return shapes[1][2] end,
  select_backward = along_shape, gather_backward = along_shape, index_select_backward = along_shape,
  select_pick = along_dim,
  gather = along_dim, index_select = along_dim, index_add = along_dim, scatter = along_dim, scatter_add = along_dim,
  embedding = function(shapes) return shapes[1][1] end,
  embedding_backward = function(_, attrs) return attrs.shape[1] end,
  one_hot = function(_, attrs) return attrs.num_classes end,
  adaptive_max_pool2d_backward = function(_, attrs) return attrs.shape[3] * attrs.shape[4] end,
}

--- How many ids a sample's integer input may name; nil where the row has none.
function M.limit(op, sample)
  return LIMIT[op.name] and LIMIT[op.name](sample[1], sample[2] or {})
end

--- The dtype of input k when the row is tried in `dtype`.
function M.input_dtype(op, k, dtype, shape)
  local input = op.inputs[k]
  if input.name == "index" and input.cls == "t" then return "uint8" end
  if input.cls == "i" then return "int64" end
  if input.cls == "b" then return "bool" end
  if type(shape) == "table" and shape.kind == "bool" then return "bool" end
  if (STATISTICS[input.name] and input.cls == "t") or LIKE_LOSS[op.name] == input.name then
    return dtype == "float64" and dtype or "float32"
  end
  return dtype
end

-- Inputs that must be above zero, or that are sums of many: no shift towards negative ones.
local POSITIVE = {rstd = true, total = true, lse = true, running_var = true}
local UNSIGNED = {softmax_backward = true, log_softmax_backward = true, prod = true, cumprod = true, index_add = true,
  scatter_add = true,
  gather_backward = true, index_select_backward = true}
local SIGNED_FAMILY = {norm = true, loss = true, pool = true, copy = true, attention = true}

-- Kinds of which every other row, or column, is negative (relu: 0): an activation stops some, and yet no terms of both
-- signs meet in a sum.  Quarters of the usual size, where gelu bends.
local SIGNS = {rows = -1, columns = -1, relu = 0}

local function alternating(t, shape)
  local sign, width, list = SIGNS[shape.kind], shape[#shape], t:flatten():totable()
  for i, v in ipairs(list) do
    local line = (shape.kind == "rows" and #shape > 1) and (i - 1) // width or i - 1
    list[i] = v / 4 * (line % 2 == 0 and 1 or sign)
  end
  return hm.tensor(list, {dtype = t.dtype, device = "cpu"}):view(table.move(shape, 1, #shape, 1, {}))
end

--- Input k of a sample, on the CPU: a tensor, a number or nil.  args: other inputs, for one that is made from them.
function M.argument(op, k, sample, dtype, args)
  local shape = sample[1][k]
  if shape == nil or shape == "-" then return nil end
  if type(shape) == "number" then return shape end
  if type(shape) == "function" then return shape(dtype, op, sample, args or {}) end
  local own, input = M.input_dtype(op, k, dtype, shape), op.inputs[k]
  if own == "uint8" and input.name == "index" and input.cls == "t" then return M.tensor({0, 3, 1, 2}, own, shape) end
  if own == "int64" and input.cls == "i" then
    local limit, list = M.limit(op, sample), {}
    for i = 1, count(shape) do list[i] = limit > 0 and i * 5 % limit or 0 end
    return hm.tensor(list, {dtype = own, device = "cpu"}):view(table.move(shape, 1, #shape, 1, {}))
  end
  local t = M.filled(shape, own, k)
  if SIGNS[shape.kind] and not is_integer(own) then return alternating(t, shape) end
  -- negative ones too, where nothing is summed: maxima, pooling, copies, and logits
  local signed = (SIGNED_FAMILY[op.family] or op.ulp == 0) and not UNSIGNED[op.name] and not POSITIVE[input.name]
  if signed and not is_integer(own) then t = (t - 1.5) * 4 end
  return t
end

-- Rows whose sums lose digits because terms of both signs meet, and the size of such terms in the samples.
local CANCELS = {
  batch_norm = 2, layer_norm = 2, rms_norm = 2, group_norm = 2, interpolate2d = 2, attention = 2, avg_pool2d = 2,
    adaptive_avg_pool2d = 2,
  uniform_ = 2, normal_ = 2, cross_entropy_backward_by_x = 0.5,
}

--- The size of terms that cancel in a row's sums; nil where none do.
function M.cancels(op) return CANCELS[op.name] or CANCELS[op.name:match("^(.-)_backward") or ""] end

--- All inputs of a sample.
function M.arguments(op, sample, dtype)
  local args = {}
  for k = 1, #op.inputs do args[k] = M.argument(op, k, sample, dtype, args) end
  return args
end

--- The same inputs in float64; those that are made from others are made again.
function M.widened(op, sample, args)
  local out = {}
  for k = 1, #op.inputs do
    local t = args[k]
    out[k] = core.is_tensor(t) and t:is_floating_point() and t:double() or t
  end
  for k, shape in pairs(sample[1]) do
    if type(shape) == "function" and core.is_tensor(args[k]) and args[k]:is_floating_point() then
      out[k] = shape("float64", op, sample, out)
    end
  end
  return out
end

--- The samples of a row that is not elementwise; raises where there are none.
function M.of(op)
  return SAMPLES[op.name] or error(("%s has no sample: add one to spec/support/samples.lua"):format(op.name), 0)
end

function M.has(op) return op.family == "elementwise" or SAMPLES[op.name] ~= nil end

local SMALL = 260

--- Whether plain loops and differences can afford a sample.
function M.is_small(sample)
  local n = 0
  for _, shape in pairs(sample[1]) do if type(shape) == "table" then n = n + count(shape) end end
  return n <= SMALL
end

--- Rows that call() has run since somebody emptied it: views and composites are not in the engine's log.
M.called = {}

--- Runs a row on inputs by number, with attributes; random numbers start from one seed each time.  Returns all
--- outputs, packed.
function M.call(op, args, attrs)
  local list = table.move(args, 1, #op.inputs, 1, {})
  local copy = {}
  for name, value in pairs(attrs or {}) do copy[name] = value end
  list[#op.inputs + 1] = copy
  hm.manual_seed(5)
  local out = table.pack(core.call(op.name, table.unpack(list, 1, #op.inputs + 1)))
  M.called[op.name] = true
  return out
end

return M
