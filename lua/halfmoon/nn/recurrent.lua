--- nn/recurrent.lua -- RNN, LSTM, GRU over whole sequences, and LSTMCell, GRUCell for one step.
--
-- Names and layouts of weights are PyTorch's: weight_ih_l0 [gates * H, in], weight_hh_l0 [gates * H, H], bias_ih_l0 and
-- bias_hh_l0 [gates * H], with _reverse behind the name for the direction from the end.  Gates stand in the order input,
-- forget, cell, output (LSTM) and reset, update, new (GRU).
--
-- One matrix product computes what the inputs of all steps give; each step adds what the state before gives.  Inside autocast
-- the products and so the states are in the low dtype.

local core = require "halfmoon.core"
local class = require "halfmoon.nn.class"
local common = require "halfmoon.nn.common"
local errors = require "halfmoon.errors"
local options = require "halfmoon.options"
local F = require "halfmoon.nn.functional"

local raise, describe = errors.raise, errors.describe
local want_size, pieces = common.want_size, common.pieces

local layers = {}

-- ====== One step ======

-- Each takes what the input gives, what the state gives and the states before; it returns the states after.

local function rnn_step(activation)
  return function(from_input, from_state) return activation(from_input + from_state) end
end

local function lstm_step(from_input, from_state, _, c)
  local i, f, g, o = pieces(from_input + from_state, 4, 2)
  c = f:sigmoid() * c + i:sigmoid() * g:tanh()
  return o:sigmoid() * c:tanh(), c
end

local function gru_step(from_input, from_state, h)
  local reset_in, update_in, new_in = pieces(from_input, 3, 2)
  local reset_state, update_state, new_state = pieces(from_state, 3, 2)
  local new = (new_in + (reset_in + reset_state):sigmoid() * new_state):tanh()
  return new + (update_in + update_state):sigmoid() * (h - new)
end

-- ====== States ======

--- A state in the dtype of what the input gives.  Inside autocast it is cast, elsewhere it must have it.
local function fit_state(where, name, state, like)
  if state.dtype == like.dtype then return state end
  if core.autocast_state().enabled and state:is_floating_point() and state.dtype ~= "float64" then
    return state:to(like.dtype)
  end
  raise("%s: %s is %s, the input gives %s", where, name, describe(state), like.dtype)
end

--- Raises unless a state has a shape.
local function want_state(where, name, state, shape)
  if not core.is_tensor(state) then raise("%s: %s must be a tensor, not %s", where, name, describe(state)) end
  if table.concat(state.shape, ",") ~= table.concat(shape, ",") then
    raise("%s: %s must be [%s], came %s", where, name, table.concat(shape, ","), describe(state))
  end
end

--- {h} or {h, c} of what a caller gave: a table, or one or two tensors; nil where nothing was given.
local function read_states(where, count, first, second)
  if first == nil then
    if second ~= nil then raise("%s: the first state is missing", where) end
    return nil
  end
  local states = first
  if core.is_tensor(first) then states = {first, second} end
  if type(states) ~= "table" or #states ~= count then
    raise("%s: the initial state must be %s, not %s", where, count == 1 and "a tensor h" or "{h, c}", describe(first))
  end
  return states
end

-- ====== Layers ======

-- What RNN, LSTM and GRU have in common; each of them has _step.
---@class RNNBase: Module
local RNNBase = class.class("RNNBase")

local recurrent_spec = common.with_factory {
  num_layers = {"integer", 1, options.at_least(1)}, bias = {"boolean", true}, batch_first = {"boolean", false},
  dropout = {"number", 0.0, require("halfmoon.arguments").share}, bidirectional = {"boolean", false},
}

--- Checks arguments and makes the weights of all layers and directions, uniform within 1 / sqrt(hidden).
---@param where string
---@param inputs integer
---@param hidden integer
---@param gates integer how many gates the kind has
---@param opts table
function RNNBase:build(where, inputs, hidden, gates, opts)
  self.input_size = want_size(where, "the number of inputs", inputs)
  self.hidden_size = want_size(where, "the hidden size", hidden)
  self.num_layers, self.batch_first, self.bidirectional = opts.num_layers, opts.batch_first, opts.bidirectional
  self.has_bias, self.dropout = opts.bias, opts.dropout
  self.suffixes = opts.bidirectional and {"", "_reverse"} or {""}
  local bound = 1 / math.sqrt(self.hidden_size)
  for layer = 0, self.num_layers - 1 do
    local size = layer == 0 and self.input_size or self.hidden_size * #self.suffixes
    for _, suffix in ipairs(self.suffixes) do
      local tail = ("_l%d%s"):format(layer, suffix)
      self["weight_ih" .. tail] = common.uniform({gates * self.hidden_size, size}, bound, opts)
      self["weight_hh" .. tail] = common.uniform({gates * self.hidden_size, self.hidden_size}, bound, opts)
      if opts.bias then
        self["bias_ih" .. tail] = common.uniform({gates * self.hidden_size}, bound, opts)
        self["bias_hh" .. tail] = common.uniform({gates * self.hidden_size}, bound, opts)
      end
    end
  end
end

--- One direction of one layer.  x is [T, N, in] (time = 1) or [N, T, in] (time = 2); states [N, H] or nil.  Returns the
--- outputs along the same dim and the last states.
local function run_direction(self, x, tail, reverse, time, states)
  local from_input = F.linear(x, self["weight_ih" .. tail], self["bias_ih" .. tail])
  local weight, bias = self["weight_hh" .. tail], self["bias_hh" .. tail]
  local h, c
  if states then
    h = fit_state(self.__class, "the initial state h", states[1], from_input)
    c = states[2] and fit_state(self.__class, "the initial state c", states[2], from_input)
  else
    local shape = {x:size(3 - time), self.hidden_size}
    h = core.zeros(shape, {dtype = from_input.dtype, device = x.device})
    c = h
  end
  local steps, outputs, step = common.steps(from_input, time), {}, self._step
  local first, last, by = 1, #steps, 1
  if reverse then first, last, by = #steps, 1, -1 end
  for t = first, last, by do
    h, c = step(steps[t], F.linear(h, weight, bias), h, c)
    outputs[t] = h
  end
  return core.stack(outputs, time), h, c
end

--- Shapes of the input and the states; returns x as a batch, states by layer and direction, whether a batch was made.
local function read_input(self, x, states)
  local where = self.__class
  if not core.is_tensor(x) then raise("%s: the input must be a tensor, not %s", where, describe(x)) end
  local dims = x:dim()
  if dims ~= 3 and dims ~= 2 then
    raise("%s: the input must be %s or [length, inputs], came %s", where,
      self.batch_first and "[N, length, inputs]" or "[length, N, inputs]", describe(x))
  end
  if x:size(dims) ~= self.input_size then
    raise("%s: the input is %s, its last dim must be %d", where, describe(x), self.input_size)
  end
  local alone = dims == 2
  local time = self.batch_first and not alone and 2 or 1
  if x:size(time) == 0 then raise("%s: the sequence has no steps: the input is %s", where, describe(x)) end
  local shape = {self.num_layers * #self.suffixes, self.hidden_size}
  if not alone then table.insert(shape, 2, x:size(3 - time)) end
  local by_layer
  if states then
    by_layer = {}
    for k, state in ipairs(states) do
      want_state(where, k == 1 and "the initial state h" or "the initial state c", state, shape)
      by_layer[k] = (alone and state:unsqueeze(2) or state):unbind(1)
    end
  end
  return alone and x:unsqueeze(2) or x, by_layer, alone, time
end

--- Runs all layers.  Returns the outputs of the last one and arrays of the last states by layer and direction.
function RNNBase:run(x, states)
  local by_layer, alone, time
  x, by_layer, alone, time = read_input(self, x, states)
  local last_h, last_c = {}, {}
  for layer = 0, self.num_layers - 1 do
    local outputs = {}
    for direction, suffix in ipairs(self.suffixes) do
      local place = layer * #self.suffixes + direction
      local given = by_layer and {by_layer[1][place], by_layer[2] and by_layer[2][place]}
      outputs[direction], last_h[place], last_c[place] =
        run_direction(self, x, ("_l%d%s"):format(layer, suffix), direction == 2, time, given)
    end
    x = #outputs == 1 and outputs[1] or core.cat(outputs, 3)
    if self.dropout > 0 and layer < self.num_layers - 1 then x = F.dropout(x, self.dropout, self.training) end
  end
  local h, c = core.stack(last_h, 1), #last_c > 0 and core.stack(last_c, 1) or nil
  if alone then return x:squeeze(2), h:squeeze(2), c and c:squeeze(2) end
  return x, h, c
end

function RNNBase:extra()
  return ("%d -> %d%s%s%s%s%s%s"):format(self.input_size, self.hidden_size,
    self.nonlinearity == "relu" and ", relu" or "", self.num_layers > 1 and (", %d layers"):format(self.num_layers) or "",
    self.bidirectional and ", bidirectional" or "", self.batch_first and ", batch first" or "",
    self.dropout > 0 and (", dropout %g"):format(self.dropout) or "", self.has_bias and "" or ", no bias")
end

layers.RNNBase = RNNBase

--- Checks the options all kinds have.
local function check_options(where, opts, spec)
  opts = options.check(where, opts, spec)
  if opts.dropout > 0 and opts.num_layers == 1 then
    raise("%s: dropout acts between layers, and there is one\n  hint: num_layers = 2, or nn.Dropout behind it", where)
  end
  return opts
end

---@class RNN: RNNBase
local RNN = class.class("RNN", RNNBase)
local rnn_spec = {nonlinearity = {"string", "tanh", options.one_of("tanh", "relu")}}
for key, value in pairs(recurrent_spec) do rnn_spec[key] = value end

--- nn.RNN(inputs, hidden, {num_layers = 1, nonlinearity = "tanh"|"relu", bias = true, batch_first = false, dropout = 0,
--- bidirectional = false}): h' = tanh(W x + b + U h + d) for each step.
---@param inputs integer
---@param hidden integer
---@param opts table?
function RNN:init(inputs, hidden, opts)
  opts = check_options("nn.RNN", opts, rnn_spec)
  self.nonlinearity = opts.nonlinearity
  self._step = rnn_step(opts.nonlinearity == "relu" and F.relu or F.tanh)
  self:build("nn.RNN", inputs, hidden, 1, opts)
end

--- x [T, N, inputs] (batch_first: [N, T, inputs]; without a batch [T, inputs]) and the initial state, zeros unless given.
---@param x Tensor
---@param h Tensor? [layers * directions, N, hidden]
---@return Tensor y [T, N, directions * hidden], the states of the last layer
---@return Tensor h the last states of all layers
function RNN:forward(x, h)
  local y, last = self:run(x, read_states("RNN", 1, h))
  return y, last
end

layers.RNN = RNN

---@class LSTM: RNNBase
local LSTM = class.class("LSTM", RNNBase)
LSTM._step = lstm_step

--- nn.LSTM(inputs, hidden, {num_layers = 1, bias = true, batch_first = false, dropout = 0, bidirectional = false}): long
--- short-term memory.  y, {h, c} = lstm(x [, {h, c}]).
---@param inputs integer
---@param hidden integer
---@param opts table?
function LSTM:init(inputs, hidden, opts)
  self:build("nn.LSTM", inputs, hidden, 4, check_options("nn.LSTM", opts, recurrent_spec))
end

--- x [T, N, inputs] (batch_first: [N, T, inputs]; without a batch [T, inputs]) and the initial states, zeros unless given.
---@param x Tensor
---@param h {[1]: Tensor, [2]: Tensor}|Tensor? {h, c}, or h and c as two arguments: each [layers * directions, N, hidden]
---@param c Tensor?
---@return Tensor y [T, N, directions * hidden], the states of the last layer
---@return {[1]: Tensor, [2]: Tensor} states {h, c}, the last states of all layers
function LSTM:forward(x, h, c)
  local y, last_h, last_c = self:run(x, read_states("LSTM", 2, h, c))
  return y, {last_h, last_c}
end

layers.LSTM = LSTM

---@class GRU: RNNBase
local GRU = class.class("GRU", RNNBase)
GRU._step = gru_step

--- nn.GRU(inputs, hidden, {num_layers = 1, bias = true, batch_first = false, dropout = 0, bidirectional = false}): gated
--- recurrent unit.  y, h = gru(x [, h]).
---@param inputs integer
---@param hidden integer
---@param opts table?
function GRU:init(inputs, hidden, opts)
  self:build("nn.GRU", inputs, hidden, 3, check_options("nn.GRU", opts, recurrent_spec))
end

--- x [T, N, inputs] (batch_first: [N, T, inputs]; without a batch [T, inputs]) and the initial state, zeros unless given.
---@param x Tensor
---@param h Tensor? [layers * directions, N, hidden]
---@return Tensor y [T, N, directions * hidden], the states of the last layer
---@return Tensor h the last states of all layers
function GRU:forward(x, h)
  local y, last = self:run(x, read_states("GRU", 1, h))
  return y, last
end

layers.GRU = GRU

-- ====== Cells ======

local cell_spec = common.with_factory {bias = {"boolean", true}}

--- Weights of a cell.
local function build_cell(self, where, inputs, hidden, gates, opts)
  opts = options.check(where, opts, cell_spec)
  self.input_size = want_size(where, "the number of inputs", inputs)
  self.hidden_size = want_size(where, "the hidden size", hidden)
  local bound, rows = 1 / math.sqrt(self.hidden_size), gates * self.hidden_size
  self.weight_ih = common.uniform({rows, self.input_size}, bound, opts)
  self.weight_hh = common.uniform({rows, self.hidden_size}, bound, opts)
  if opts.bias then
    self.bias_ih = common.uniform({rows}, bound, opts)
    self.bias_hh = common.uniform({rows}, bound, opts)
  end
end

--- One step of a cell: the states after.
local function run_cell(self, x, step, states, count)
  local where = self.__class
  if not core.is_tensor(x) or x:dim() > 2 or x:dim() < 1 or x:size(-1) ~= self.input_size then
    raise("%s: the input must be [N, %d] or [%d], came %s", where, self.input_size, self.input_size, describe(x))
  end
  local alone = x:dim() == 1
  if alone then x = x:unsqueeze(1) end
  local from_input = F.linear(x, self.weight_ih, self.bias_ih)
  local h, c
  if states then
    local shape = alone and {self.hidden_size} or {x:size(1), self.hidden_size}
    for k, name in ipairs {"the state h", count == 2 and "the state c" or nil} do
      want_state(where, name, states[k], shape)
      local state = fit_state(where, name, states[k], from_input)
      if alone then state = state:unsqueeze(1) end
      if k == 1 then h = state else c = state end
    end
  else
    h = core.zeros({x:size(1), self.hidden_size}, {dtype = from_input.dtype, device = x.device})
    c = h
  end
  h, c = step(from_input, F.linear(h, self.weight_hh, self.bias_hh), h, c)
  if alone then return h:squeeze(1), c and c:squeeze(1) end
  return h, c
end

local function cell_text(self)
  return ("%d -> %d%s"):format(self.input_size, self.hidden_size, self.bias_ih and "" or ", no bias")
end

---@class LSTMCell: Module
local LSTMCell = class.class("LSTMCell")

--- nn.LSTMCell(inputs, hidden, {bias = true}): one step of an LSTM.  h, c = cell(x [, {h, c}]).
---@param inputs integer
---@param hidden integer
---@param opts table?
function LSTMCell:init(inputs, hidden, opts) build_cell(self, "nn.LSTMCell", inputs, hidden, 4, opts) end

--- x [N, inputs] or [inputs] and the states before, zeros unless given.
---@param x Tensor
---@param h {[1]: Tensor, [2]: Tensor}|Tensor? {h, c}, or h and c as two arguments: each [N, hidden]
---@param c Tensor?
---@return Tensor h
---@return Tensor c
function LSTMCell:forward(x, h, c)
  return run_cell(self, x, lstm_step, read_states("LSTMCell", 2, h, c), 2)
end

LSTMCell.extra = cell_text
layers.LSTMCell = LSTMCell

---@class GRUCell: Module
local GRUCell = class.class("GRUCell")

--- nn.GRUCell(inputs, hidden, {bias = true}): one step of a GRU.  h = cell(x [, h]).
---@param inputs integer
---@param hidden integer
---@param opts table?
function GRUCell:init(inputs, hidden, opts) build_cell(self, "nn.GRUCell", inputs, hidden, 3, opts) end

--- x [N, inputs] or [inputs] and the state before, zeros unless given.
---@param x Tensor
---@param h Tensor? [N, hidden]
---@return Tensor h
function GRUCell:forward(x, h) return (run_cell(self, x, gru_step, read_states("GRUCell", 1, h), 1)) end

GRUCell.extra = cell_text
layers.GRUCell = GRUCell

return layers
