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
    p[i] = p[i] - o.lr / c1 * state.m[i] / (math.sqrt(state.v[i]) / math.sqrt(c2) + o.eps)
  end
end

--- Adam and AdamW: o = {lr, betas, eps, weight_decay, maximize}.
function M.adam(p, grad, state, o) adam(p, grad, state, o, false) end
function M.adamw(p, grad, state, o) adam(p, grad, state, o, true) end

return M
