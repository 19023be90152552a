-- RNN, LSTM, GRU and their cells: gradients by differences, directions, layers, dtypes inside autocast, what is refused, short
-- trainings.  Values against PyTorch stand in nn_torch_spec.

local hm = require "halfmoon"
local devices = require "spec.support.devices"
local gradients = require "spec.support.gradients"
local fixed = require "spec.support.inputs"
local learn = require "spec.support.learning"
local numbers = require "spec.support.numbers"
local raises = require "spec.support.raises"

local nn, optim, amp = hm.nn, hm.optim, hm.amp
local F = nn.functional
local KINDS = {"RNN", "LSTM", "GRU"}
local filled = fixed.filled

--- The h of what a layer returns as its state.
local function h_of(state) return type(state) == "table" and state[1] or state end

-- ====== Values ======

describe("recurrent layers", function()
  for _, kind in ipairs(KINDS) do
    it(kind .. ": layers and directions are made of one-layer runs", function()
      hm.manual_seed(1)
      local m = nn[kind](3, 4, {num_layers = 2, bidirectional = true})
      local x = filled({5, 2, 3}, 1)
      --- One layer with the weights of one place of m.
      local function single(inputs, tail)
        local one = nn[kind](inputs, 4)
        for _, name in ipairs {"weight_ih", "weight_hh", "bias_ih", "bias_hh"} do one[name .. "_l0"] = m[name .. tail] end
        return one
      end
      local input = x
      for layer = 0, 1 do
        local tail = "_l" .. layer
        local inputs = input:size(3)
        local forth = single(inputs, tail)(input)
        local back = single(inputs, tail .. "_reverse")(input:flip(1)):flip(1)
        input = hm.cat({forth, back}, 3)
      end
      local y, state = m(x)
      numbers.assert_near(y, input, 1e-6, 1e-6)
      assert.same({4, 2, 4}, h_of(state).shape)
      numbers.assert_same(h_of(state)[3], y[5]:narrow(2, 1, 4)) -- forth ends at the last step, back at the first
      numbers.assert_same(h_of(state)[4], y[1]:narrow(2, 5, 4))
    end)

    it(kind .. ": batch_first, without a batch, and in two parts", function()
      hm.manual_seed(2)
      local m, wide = nn[kind](3, 4), nn[kind](3, 4, {batch_first = true})
      wide:load_state_dict(m:state_dict())
      local x = filled({6, 2, 3}, 2)
      local y, state = m(x)
      local turned, turned_state = wide(x:transpose(1, 2))
      numbers.assert_near(turned:transpose(1, 2), y, 1e-6, 1e-6)
      numbers.assert_near(h_of(turned_state), h_of(state), 1e-6, 1e-6)
      local alone, alone_state = wide(x:select(2, 2))
      numbers.assert_near(alone, y:select(2, 2), 1e-6, 1e-6)
      assert.same({1, 4}, h_of(alone_state).shape)
      local first, between = m(x:narrow(1, 1, 2))
      local second, last = m(x:narrow(1, 3, 4), between)
      numbers.assert_near(hm.cat({first, second}, 1), y, 1e-6, 1e-6)
      numbers.assert_near(h_of(last), h_of(state), 1e-6, 1e-6)
    end)

    it(kind .. ": gradients and second derivatives by differences", function()
      hm.manual_seed(3)
      local layers, steps = devices.pick(2, 1), devices.pick(3, 2) -- fewer on the test double, which is slow
      local m = nn[kind](2, 2, {bidirectional = true, num_layers = layers, dtype = "f64"})
      local x, h = filled({steps, 2, 2}, 3, {dtype = "f64"}), filled({2 * layers, 2, 2}, 4, {dtype = "f64"})
      local c = filled({2 * layers, 2, 2}, 5, {dtype = "f64"})
      local names, inputs = {}, {x, h, c}
      for name, p in m:named_parameters() do
        names[#names + 1] = name
        inputs[#inputs + 1] = p:detach()
      end
      --- The layer as a function of its inputs and weights.
      local function run(x_in, h_in, c_in, ...)
        for i, name in ipairs(names) do m[name] = select(i, ...) end
        local y, state
        if kind == "LSTM" then y, state = m(x_in, {h_in, c_in}) else y, state = m(x_in, h_in) end
        local all = {y:flatten(1), h_of(state):flatten(1)}
        if kind == "LSTM" then all[3] = state[2]:flatten(1) end
        return hm.cat(all, 1)
      end
      gradients.check(run, inputs, 1e-6)
      gradients.check_second(function(x_in, weight) m[names[2]] = weight return m(x_in) end, {x, inputs[5]}, 1e-5)
    end)

    it(kind .. ": results that nobody uses have no gradient", function()
      local m = nn[kind](2, 3)
      local x = filled({4, 1, 2}, 6):requires_grad_()
      local y, state = m(x)
      y[2]:sum():backward(nil, {retain_graph = true})
      numbers.assert_same(x.grad:narrow(1, 3, 2), {0, 0, 0, 0})
      assert(x.grad[1]:abs():sum():item() > 0)
      x.grad = nil
      h_of(state):sum():backward()
      assert(x.grad[4]:abs():sum():item() > 0)
    end)
  end

  it("cells make the steps of layers", function()
    hm.manual_seed(4)
    local x = filled({3, 2, 3}, 7)
    local lstm, lstm_cell, gru, gru_cell = nn.LSTM(3, 4), nn.LSTMCell(3, 4), nn.GRU(3, 4), nn.GRUCell(3, 4)
    for _, pair in ipairs {{lstm, lstm_cell}, {gru, gru_cell}} do
      for name, p in pair[2]:named_parameters() do pair[1][name .. "_l0"] = p end
    end
    local y, z = lstm(x), gru(x)
    local h, c, g
    for t = 1, 3 do
      if h then h, c = lstm_cell(x[t], {h, c}) else h, c = lstm_cell(x[t]) end
      g = gru_cell(x[t], g)
      numbers.assert_near(h, y[t], 1e-6, 1e-6)
      numbers.assert_near(g, z[t], 1e-6, 1e-6)
    end
    assert.same({4}, (lstm_cell(x[1][1])).shape)
    numbers.assert_near(gru_cell(x[1][1]), z[1][1], 1e-6, 1e-6)
    assert.equal("LSTMCell(3 -> 4, no bias)", tostring(nn.LSTMCell(3, 4, {bias = false})))
  end)

  it("dropout acts between layers, in training only", function()
    hm.manual_seed(5)
    local m = nn.LSTM(3, 4, {num_layers = 2, dropout = 0.5})
    local x = filled({5, 2, 3}, 8)
    local a, b = m(x), m(x)
    assert((a - b):abs():max():item() > 0)
    m:eval()
    numbers.assert_same(m(x), m(x))
    raises({"dropout acts between layers", "hint"}, nn.LSTM, 3, 4, {dropout = 0.5})
  end)

  it("NaN in a step spreads to later steps only", function()
    local m = nn.GRU(1, 2)
    local y = m(hm.tensor {1, 0 / 0, 1}:view(3, 1, 1))
    assert.equal(0, y[1]:isnan():sum():item())
    assert.equal(4, y:isnan():sum():item())
  end)

  it("many steps take one wide product and no wide zeros", function()
    local m = nn.LSTM(4, 4)
    local x = filled({40, 2, 4}, 9):requires_grad_()
    local linears, padded = 0, 0
    hm.nn.functional.relu(x) -- the log begins with a known op
    local core = require "halfmoon.core"
    core.op_log(function(record)
      if record.op == "linear" then linears = linears + 1 end
      if record.op == "narrow_backward" then padded = padded + 1 end
    end)
    local ok, message = pcall(function() m(x):sum():backward() end)
    core.op_log(nil)
    assert(ok, message)
    assert.equal(41, linears)
    assert(padded <= 41, padded) -- at most the cuts of the stacked results
  end)
end)

describe("the graph of a recurrent layer", function()
  it("holds what the gradients need and no more", devices.cpu_only("counts bytes of the CPU's pool", function()
    local m = nn.LSTM(8, 16)
    local x = filled({50, 8, 8}, 20)
    --- Bytes alive once what Lua has dropped is collected.
    local function live()
      collectgarbage()
      collectgarbage()
      return devices.memory.memory_stats().live
    end
    local function held()
      local before = live()
      local y = m(x)
      local bytes = live() - before
      return bytes / (y:numel() * 4)
    end
    held()
    -- Four gates, the cell, its tanh, the state, and the stacked results: eight for each state.
    local states = held()
    assert(states < 9, states)
  end))

  it("may be thousands of steps long", function()
    local m, steps = nn.RNN(1, 1), devices.pick(5003, 503)
    local x = filled({steps, 1, 1}, 21):requires_grad_()
    local y = m(x)
    y:sum():backward()
    assert.same({steps, 1, 1}, x.grad.shape)
    local last = math.max(1, steps - 2)
    local tail = x:detach():narrow(1, last, steps - last + 1):clone():requires_grad_()
    m(tail, y:detach()[last - 1]:unsqueeze(1)):sum():backward()
    numbers.assert_near(x.grad:narrow(1, last, steps - last + 1), tail.grad, 1e-5, 1e-6)
    x.grad = nil
    m(x)[3]:sum():backward() -- most steps have no gradient
    assert.equal(3, x.grad:ne(0):sum():item())
  end)
end)

-- ====== Text, names, refusals ======

describe("recurrent layers say", function()
  it("what they are, and name weights as PyTorch does", function()
    assert.equal("LSTM(3 -> 4, 2 layers, bidirectional, batch first, dropout 0.5)",
      tostring(nn.LSTM(3, 4, {num_layers = 2, bidirectional = true, batch_first = true, dropout = 0.5})))
    assert.equal("RNN(3 -> 4, relu, no bias)", tostring(nn.RNN(3, 4, {nonlinearity = "relu", bias = false})))
    local names = {}
    for name, p in nn.GRU(3, 4, {bidirectional = true}):named_parameters() do names[#names + 1] = name .. p:size(1) end
    assert.same({"weight_ih_l012", "weight_hh_l012", "bias_ih_l012", "bias_hh_l012", "weight_ih_l0_reverse12",
      "weight_hh_l0_reverse12", "bias_ih_l0_reverse12", "bias_hh_l0_reverse12"}, names)
    assert.same({12, 8}, nn.GRU(3, 4, {bidirectional = true, num_layers = 2}).weight_ih_l1.shape)
  end)

  it("what does not fit, with the path", function()
    local Net = nn.class("Net")
    function Net:init() self.rnn = nn.LSTM(3, 4) end
    function Net:forward(...) return self.rnn(...) end
    local net = Net()
    raises({"last dim must be 3", "in Net.rnn (LSTM 3 -> 4)"}, net, hm.ones {2, 2, 4})
    raises("[length, N, inputs]", net, hm.ones {2})
    raises("[N, length, inputs]", nn.GRU(3, 4, {batch_first = true}), hm.ones {3})
    raises("no steps", net, hm.ones {0, 2, 3})
    raises("must be {h, c}", net, hm.ones {2, 2, 3}, hm.ones {1, 2, 4})
    raises("initial state c must be [1,2,4]", net, hm.ones {2, 2, 3}, {hm.ones {1, 2, 4}, hm.ones {1, 2, 5}})
    raises("must be a tensor", net, hm.ones {2, 2, 3}, {1, 2})
    raises({"is f16[2,4]", "gives float32"}, nn.GRU(3, 4), hm.ones {2, 2, 3}, hm.ones({1, 2, 4}, {dtype = "f16"}))
    raises("must be a tensor", net, 3)
    raises("whole number", nn.GRU, 3)
    raises("must be one of tanh, relu", nn.RNN, 3, 4, {nonlinearity = "gelu"})
    raises("unknown option 'proj_size'", nn.LSTM, 3, 4, {proj_size = 2})
    raises({"[N, 3]", "in GRUCell"}, nn.GRUCell(3, 4), hm.ones {2, 4})
    raises("the state h must be [2,4]", nn.GRUCell(3, 4), hm.ones {2, 3}, hm.ones {2, 3})
  end)
end)

-- ====== Low dtypes ======

describe("recurrent layers in low dtypes", function()
  for _, dtype in ipairs {"float16", "bfloat16"} do
    it("inside autocast compute and answer in " .. dtype .. "; masters get float32 gradients", function()
      hm.manual_seed(6)
      for _, kind in ipairs {"RNN", "LSTM", "GRU"} do
        local m = nn[kind](3, 4)
        local x, h = filled({5, 2, 3}, 10), filled({1, 2, 4}, 11)
        local want = m(x, kind == "LSTM" and {h, h} or h)
        local y, state = amp.autocast(dtype, function() return m(x, kind == "LSTM" and {h, h} or h) end)
        assert.equal(dtype, y.dtype)
        assert.equal(dtype, h_of(state).dtype)
        if kind == "LSTM" then assert.equal(dtype, state[2].dtype) end
        numbers.assert_near(y:float(), want, 0, dtype == "float16" and 4e-3 or 3e-2)
        y:float():sum():backward()
        for name, p in m:named_parameters() do assert.equal("float32", p.grad.dtype, name) end
      end
      for _, cell in ipairs {nn.LSTMCell(3, 4), nn.GRUCell(3, 4)} do
        assert.equal(dtype, amp.autocast(dtype, function() return (cell(filled({2, 3}, 12))) end).dtype)
      end
      local wide = nn.GRU(3, 4, {dtype = "f64"})
      assert.equal("float64", amp.autocast(dtype, function() return (wide(filled({2, 2, 3}, 13, {dtype = "f64"}))) end).dtype)
    end)

    it("converted to " .. dtype .. " stay in it", function()
      for _, kind in ipairs {"RNN", "LSTM", "GRU"} do
        local m = nn[kind](3, 4, {num_layers = 2, bidirectional = true}):to(dtype)
        local y, state = m(filled({3, 2, 3}, 14, {dtype = dtype}))
        assert.equal(dtype, y.dtype)
        assert.equal(dtype, h_of(state).dtype)
        y:sum():backward()
        assert.equal(dtype, m.weight_hh_l1_reverse.grad.dtype)
      end
    end)
  end
end)

-- ====== Training ======

describe("an LSTM learns", function()
  --- Says whether the sum of a sequence is positive.  Returns first and last losses and how many steps were skipped.
  local function train(dtype, steps)
    hm.manual_seed(7)
    local Net = nn.class("Net")
    function Net:init()
      self.lstm = nn.LSTM(2, 8, {batch_first = true})
      self.head = nn.Linear(8, 2)
    end
    function Net:forward(x) return self.head((self.lstm(x)):select(2, -1)) end
    local net = Net()
    local x = filled({16, 6, 2}, 15)
    local target = x:sum({2, 3}):gt(0):long()
    local opt = optim.Adam(net:parameters(), {lr = 0.05})
    return learn(opt, dtype, steps, function() return F.cross_entropy(net(x), target) end)
  end

  for _, dtype in ipairs {"f32", "f16", "bf16"} do
    it("in 20 steps, " .. dtype, function()
      local first, last, skipped = train(dtype, 20)
      assert(last < 0.6 * first, ("%g to %g"):format(first, last))
      assert(skipped <= 3, skipped)
    end)
  end
end)
