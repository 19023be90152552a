-- autocast.lua -- what becomes of each row inside an autocast region, after PyTorch's lists for CUDA (torch/amp,
-- "Autocast Op Reference"), written down apart from the letters of kernels/ops.def, so that a wrong letter there is
-- seen.
--
--   low       runs in the region's dtype         float32   its result is float32
--   promote   the widest of its inputs           own       no floating result, or one of a fixed dtype; or a view, a
-- copy, a fill Rows in none of the lists follow their inputs.  Gradients of rows are in a list only where they compute
-- like their row.

local M = {}

local LISTS = {
  low = [[matmul linear conv2d prelu attention
    linear_relu linear_gelu_tanh linear_backward_input_relu linear_backward_input_gelu_tanh linear_backward_params
    linear_backward_input linear_backward_weight conv2d_backward_input conv2d_backward_weight attention_backward]],
  float32 = [[exp log log2 log10 log1p expm1 pow reciprocal rsqrt tan asin acos sinh cosh softplus fake_quantize
    sum prod norm logsumexp cumsum cumsum_reverse cumprod softmax log_softmax
    squared_error absolute_error smooth_l1 bce_with_logits kl_div_term cross_entropy nll_loss
    layer_norm rms_norm group_norm interpolate2d interpolate2d_backward]],
  promote = "addcmul addcdiv atan2 scatter_add",
  own = [[max_dim min_dim argmax argmin any all one_hot sort topk cast copy_ fill_ arange_ eye_ uniform_ normal_ random_
    bernoulli_ view reshape flatten permute transpose t squeeze unsqueeze expand narrow select expand_reduced grad_channels detach]],
}

local class = {}
for name, words in pairs(LISTS) do
  for word in words:gmatch("[%w_]+") do class[word] = name end
end

--- "low", "float32", "promote", "own" or "follow".
---@param row string
---@return string
function M.class(row) return class[row] or "follow" end

--- Every name in the lists.
---@return table<string, string>
function M.all() return class end

return M
