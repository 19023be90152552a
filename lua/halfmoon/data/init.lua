--- data/init.lua -- hm.data: data sets and batches.

local dataset = require "halfmoon.data.dataset"

return {
  Dataset = dataset.Dataset,
  TensorDataset = dataset.TensorDataset,
  idx = dataset.idx,
  fashion_mnist = dataset.fashion_mnist,
  DataLoader = require("halfmoon.data.loader").DataLoader,
}
