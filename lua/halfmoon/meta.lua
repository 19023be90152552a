---@meta

-- meta.lua -- what the C module provides beside the op table's rows, described for editors and for `? name`.  Nothing loads this file.

---@class Tensor
---@field shape integer[] sizes, a fresh table
---@field dtype string "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8" or "bool"
---@field device string "cpu" or "cuda:0"
---@field grad Tensor? the gradient; can be assigned
---@field requires_grad boolean whether a gradient is wanted; can be assigned on leaves of floating dtype
---@field is_leaf boolean not made by an op that was recorded
---@field ndim integer how many dims
local Tensor = {}

---@class halfmoon
local hm = {}

-- ====== Making tensors ======

--- A tensor from nested tables of numbers, or a number.  float32 unless a dtype is given, also for integers.
---@param values table|number|boolean
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.tensor(values, opts) end

--- A tensor with undefined contents.
---@param shape integer[]
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.empty(shape, opts) end

--- A tensor of zeros.
---@param shape integer[]
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.zeros(shape, opts) end

--- A tensor of ones.
---@param shape integer[]
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.ones(shape, opts) end

--- A tensor filled with one value.
---@param shape integer[]
---@param value number
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.full(shape, value, opts) end

--- Random numbers, uniform in [0, 1).
---@param shape integer[]
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.rand(shape, opts) end

--- Random numbers, normal with mean 0 and deviation 1.
---@param shape integer[]
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.randn(shape, opts) end

--- Random integers from low to high - 1.
---@param low integer
---@param high integer excluded
---@param shape integer[]
---@param opts {dtype: string?, device: string?}? int64 unless a dtype is given
---@return Tensor
function hm.randint(low, high, shape, opts) end

--- start, start + step, ... below stop.  int64 if all arguments are Lua integers, else float32.
---@param start number? default 0
---@param stop number excluded
---@param step number? default 1
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.arange(start, stop, step, opts) end

--- n numbers from start to stop, both included, at equal distances.
---@param start number
---@param stop number
---@param n integer
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.linspace(start, stop, n, opts) end

--- The n x n identity matrix.
---@param n integer
---@param opts {dtype: string?, device: string?, requires_grad: boolean?}?
---@return Tensor
function hm.eye(n, opts) end

--- Tensors joined along a dim they have.
---@param list Tensor[]
---@param dim integer? default 1
---@return Tensor
function hm.cat(list, dim) end

--- Tensors of one shape joined along a new dim.
---@param list Tensor[]
---@param dim integer? default 1
---@return Tensor
function hm.stack(list, dim) end

-- ====== Scopes and settings ======

--- No gradients are recorded inside: `local _ <close> = hm.no_grad()`, or hm.no_grad(fn, ...), which returns what fn returns.
---@param fn function?
---@param ... any arguments for fn
function hm.no_grad(fn, ...) end

--- Gradients are recorded inside, also within no_grad.
---@param fn function?
---@param ... any arguments for fn
function hm.enable_grad(fn, ...) end

--- Whether ops are recorded here.
---@return boolean
function hm.is_grad_enabled() end

--- Seeds the random numbers of every device.
---@param seed integer
function hm.manual_seed(seed) end

--- Where the random numbers stand: {seed =, offset =}.
---@return table
function hm.rng_state() end

--- Puts the random numbers back to where rng_state() found them.
---@param state table
function hm.set_rng_state(state) end

--- Sets how many threads ops use.
---@param n integer
function hm.set_num_threads(n) end

--- How many threads ops use.
---@return integer
function hm.get_num_threads() end

--- Whether a value is a tensor.
---@param value any
---@return boolean
function hm.is_tensor(value) end

-- ====== Tensors: reading ======

--- All sizes as a table, or one as an integer.
---@param dim integer? from 1, negative from the end
---@return integer[]|integer
function Tensor:size(dim) end

--- How many dims the tensor has.
---@return integer
function Tensor:dim() end

--- How many elements the tensor has.
---@return integer
function Tensor:numel() end

--- The steps between neighbours, in elements: all as a table, or one.
---@param dim integer?
---@return integer[]|integer
function Tensor:stride(dim) end

--- The value of a tensor with one element: an integer, a float or a boolean, by dtype.
---@return number|boolean
function Tensor:item() end

--- All elements as nested tables.
---@return table
function Tensor:totable() end

--- Whether the dtype is a floating one.
---@return boolean
function Tensor:is_floating_point() end

--- Bytes of one element.
---@return integer
function Tensor:element_size() end

--- The address of the first element, to tell whether two tensors share memory.
---@return integer
function Tensor:data_ptr() end

--- How often the tensor's memory was written to by in-place ops; its views share the count.
---@return integer
function Tensor:version() end

--- Whether elements lie row-major without gaps.
---@return boolean
function Tensor:is_contiguous() end

-- ====== Tensors: copies and conversions ======

--- The tensor in another dtype or on another device; itself if there is nothing to do.  to("f16"), to("cpu"), to{dtype =, device =}.
---@param target string|{dtype: string?, device: string?, copy: boolean?}
---@return Tensor
function Tensor:to(target) end

--- to("float32").
---@return Tensor
function Tensor:float() end

--- to("float16").
---@return Tensor
function Tensor:half() end

--- to("bfloat16").
---@return Tensor
function Tensor:bfloat16() end

--- to("float64").
---@return Tensor
function Tensor:double() end

--- to("int64").
---@return Tensor
function Tensor:long() end

--- to("int32").
---@return Tensor
function Tensor:int() end

--- to("uint8").
---@return Tensor
function Tensor:byte() end

--- to("bool"): what is not zero becomes true.
---@return Tensor
function Tensor:bool() end

--- to("cpu").
---@return Tensor
function Tensor:cpu() end

--- to("cuda:index").
---@param index integer? from 0
---@return Tensor
function Tensor:cuda(index) end

--- A copy with memory of its own; gradients flow through it.
---@return Tensor
function Tensor:clone() end

--- The tensor with its elements row-major; itself if they are.
---@return Tensor
function Tensor:contiguous() end

--- Fills the tensor with zeros.
---@return Tensor self
function Tensor:zero_() end

--- The tensor cut into pieces of a size, or of given sizes, along a dim: an array of views.
---@param size integer|integer[]
---@param dim integer? default 1
---@return Tensor[]
function Tensor:split(size, dim) end

--- The tensor cut into n pieces along a dim: an array of views.
---@param n integer
---@param dim integer? default 1
---@return Tensor[]
function Tensor:chunk(n, dim) end

--- The largest element; with a dim: the largest along it, and where they are (from 0).
---@param dim integer?
---@param keepdim boolean?
---@return Tensor values
---@return Tensor? indices
function Tensor:max(dim, keepdim) end

--- The smallest element; with a dim: the smallest along it, and where they are (from 0).
---@param dim integer?
---@param keepdim boolean?
---@return Tensor values
---@return Tensor? indices
function Tensor:min(dim, keepdim) end

--- The slice at one position of a dim, which goes: a view.
---@param dim integer
---@param index integer from 1, negative from the end
---@return Tensor
function Tensor:select(dim, index) end

--- A range of a dim: a view.
---@param dim integer
---@param start integer first position, from 1
---@param length integer
---@return Tensor
function Tensor:narrow(dim, start, length) end

-- ====== Tensors: gradients ======

--- Adds the gradient of this tensor into .grad of every leaf that it was computed from.
---@param gradient Tensor? of this tensor; ones where it has one element
---@param opts {retain_graph: boolean?, create_graph: boolean?}?
function Tensor:backward(gradient, opts) end

--- Keeps .grad of a tensor that is no leaf.
function Tensor:retain_grad() end

--- Says whether a gradient is wanted.
---@param on boolean? default true
---@return Tensor self
function Tensor:requires_grad_(on) end

--- Calls fn(gradient) when a gradient reaches this tensor; what fn returns, if anything, takes its place.
---@param fn fun(gradient: Tensor): Tensor?
---@return table handle handle:remove() takes the hook away
function Tensor:register_hook(fn) end

--- Gives the memory back now instead of when the collector comes by.  Using the tensor afterwards is an error; its views keep theirs.
function Tensor:release() end

return hm, Tensor
