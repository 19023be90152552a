-- optim.lua -- PyTorch's update rules for one parameter, on arrays of doubles.

local M = {}

--- SGD: o = {lr, momentum, dampening, weight_decay, nesterov, maximize}; state is a table that starts empty.
function M.sgd(p, grad, state, o)
  for i = 1, #p do
    local g = (o.maximize and -1 or 1) * grad[i] + (o.weight_decay or 0) * p[i]
    local momentum = o.momentum or 0
    if momentum ~= 0 then
      local buffer = state[i] and momentum * state[i] + (1 - (o.dampening or 0)) * g or g
      state[i] = buffer
      g = o.nesterov and g + momentum * buffer or buffer
    end
    p[i] = p[i] - o.lr * g
  end
end

local function adam(p, grad, state, o, decoupled)
  state.step = (state.step or 0) + 1
  state.m, state.v = state.m or {}, state.v or {}
  local b1, b2 = o.betas[1], o.betas[2]
  local c1, c2 = 1 - b1 ^ state.step, 1 - b2 ^ state.step
  for i = 1, #p do
    local g = (o.maximize and -1 or 1) * grad[i]
    if decoupled then p[i] = p[i] * (1 - o.lr * o.weight_decay) else g = g + o.weight_decay * p[i] end
    state.m[i] = b1 * (state.m[i] or 0) + (1 - b1) * g
    state.v[i] = b2 * (state.v[i] or 0) + (1 - b2) * g * g
    local v = state.v[i]
    if o.amsgrad then
      state.most = state.most or {}
      v = math.max(state.most[i] or 0, v)
      state.most[i] = v
    end
    p[i] = p[i] - o.lr / c1 * state.m[i] / (math.sqrt(v) / math.sqrt(c2) + o.eps)
  end
end

--- Adam and AdamW: o = {lr, betas, eps, weight_decay, amsgrad, maximize}.
function M.adam(p, grad, state, o) adam(p, grad, state, o, false) end
function M.adamw(p, grad, state, o) adam(p, grad, state, o, true) end

--- RMSprop: o = {lr, alpha, eps, weight_decay, momentum, centered, maximize}.
function M.rmsprop(p, grad, state, o)
  state.v, state.mean, state.buffer = state.v or {}, state.mean or {}, state.buffer or {}
  for i = 1, #p do
    local g = (o.maximize and -1 or 1) * grad[i] + (o.weight_decay or 0) * p[i]
    local v = o.alpha * (state.v[i] or 0) + (1 - o.alpha) * g * g
    state.v[i] = v
    if o.centered then
      state.mean[i] = o.alpha * (state.mean[i] or 0) + (1 - o.alpha) * g
      v = v - state.mean[i] ^ 2
    end
    local d = g / (math.sqrt(v) + o.eps)
    if (o.momentum or 0) > 0 then
      state.buffer[i] = o.momentum * (state.buffer[i] or 0) + d
      d = state.buffer[i]
    end
    p[i] = p[i] - o.lr * d
  end
end

--- Adagrad: o = {lr, lr_decay, eps, weight_decay, initial_accumulator_value, maximize}.
function M.adagrad(p, grad, state, o)
  state.step = (state.step or 0) + 1
  for i = 1, #p do
    local g = (o.maximize and -1 or 1) * grad[i] + (o.weight_decay or 0) * p[i]
    state[i] = (state[i] or o.initial_accumulator_value or 0) + g * g
    p[i] = p[i] - o.lr / (1 + (state.step - 1) * (o.lr_decay or 0)) * g / (math.sqrt(state[i]) + o.eps)
  end
end

--- Lion (arXiv 2302.06675, program 1): o = {lr, betas, weight_decay, maximize}.
function M.lion(p, grad, state, o)
  for i = 1, #p do
    local g, m = (o.maximize and -1 or 1) * grad[i], state[i] or 0
    local u = o.betas[1] * m + (1 - o.betas[1]) * g
    p[i] = p[i] - o.lr * ((u > 0 and 1 or u < 0 and -1 or 0) + (o.weight_decay or 0) * p[i])
    state[i] = o.betas[2] * m + (1 - o.betas[2]) * g
  end
end

return M
