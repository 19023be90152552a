--- data/init.lua -- hm.data: data sets and batches, and files that data come in.

local dataset = require "halfmoon.data.dataset"
local files = require "halfmoon.data.files"

return {
  Dataset = dataset.Dataset,
  TensorDataset = dataset.TensorDataset,
  idx = dataset.idx,
  fashion_mnist = dataset.fashion_mnist,
  cifar10 = dataset.cifar10,
  npy = files.npy,
  npz = files.npz,
  csv = files.csv,
  text = files.text,
  Text = files.Text,
  DataLoader = require("halfmoon.data.loader").DataLoader,
}
