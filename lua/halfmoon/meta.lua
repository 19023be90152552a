---@meta

-- meta.lua -- what the C module provides beside the op table's rows, described for editors and for `? name`.  Nothing loads this file.

---@class Tensor
---@field shape integer[] sizes, a fresh table
---@field dtype string "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3" or "float8_e5m2"
---@field device string "cpu" or "cuda:0"
---@field grad Tensor? the gradient; can be assigned
---@field requires_grad boolean whether a gradient is wanted; can be assigned on leaves of floating dtype
---@field is_leaf boolean not made by an op that was recorded
---@field ndim integer how many dims
---@field grad_fn string? the op or Function that made the tensor, where it was recorded
local Tensor = {}

---@class halfmoon
---@field nn halfmoon.nn
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

--- Gradients are recorded inside, or not: no_grad and enable_grad by a value.
---@param on boolean
---@param fn function?
---@param ... any arguments for fn
function hm.set_grad_enabled(on, fn, ...) end

--- True while hm.checkpoint runs a function again for backward: what forward counts must not be counted twice.
---@return boolean
function hm.is_recomputing() end

--- Where tensors are made when no device is given: by the factories above, and so the parameters of modules.  One setting for the
--- process, "cpu" at first.  hm.tensor(t) of a tensor, ops, files (hm.load) and data sets do not look at it: a result lies where its
--- inputs lie, and what is read from a file lies on the CPU unless told otherwise.
---@param device string "cpu", "cuda" or "cuda:N"
function hm.set_default_device(device) end

--- The device that set_default_device() set: "cpu" or "cuda:0".
---@return string
function hm.get_default_device() end

--- Seeds the random numbers of every device.
---@param seed integer
function hm.manual_seed(seed) end

--- Where the random numbers of a device stand: {seed =, offset =}.
---@param device string? the default device when left out
---@return table
function hm.rng_state(device) end

--- Puts the random numbers back to where rng_state() found them.
---@param state table
---@param device string? the default device when left out
function hm.set_rng_state(state, device) end

--- Makes matrix products and weight gradients of convolutions the same to the bit for any number of threads, on the CPU: they are
--- computed in pieces that depend on shapes alone, in float32, which costs time. Our own kernels are so anyway.
---@param on boolean? true when left out
function hm.use_deterministic(on) end

--- True after use_deterministic(true).
---@return boolean
function hm.is_deterministic() end

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
--- saturate: to 8-bit floats; what is too large becomes the largest number, not NaN or infinity.
---@param target string|{dtype: string?, device: string?, copy: boolean?, saturate: boolean?}
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

-- ====== Tensors: methods that are also functions of hm, and layers as methods ======

--- Matrix product of x [n, k] and y [k, m].
---@param y Tensor
---@return Tensor
function Tensor:mm(y) end

--- Matrix products of two batches: x [b, n, k] and y [b, k, m].
---@param y Tensor
---@return Tensor
function Tensor:bmm(y) end

--- Product of the matrix x [n, k] and the vector y [k].
---@param y Tensor
---@return Tensor
function Tensor:mv(y) end

--- Sum of the products of two vectors.
---@param y Tensor
---@return Tensor
function Tensor:dot(y) end

--- All products of an element of the vector x and one of y: [n, m].
---@param y Tensor
---@return Tensor
function Tensor:outer(y) end

--- beta * x + alpha * (a times b): a is [n, k], b [k, m], x broadcasts to [n, m].
---@param a Tensor
---@param b Tensor
---@param opts {beta: number, alpha: number}? 1 and 1 unless given
---@return Tensor
function Tensor:addmm(a, b, opts) end

--- beta * x + alpha * (a times b): a is a matrix [n, k], b a vector [k], x broadcasts to [n].
---@param a Tensor
---@param b Tensor
---@param opts {beta: number, alpha: number}? 1 and 1 unless given
---@return Tensor
function Tensor:addmv(a, b, opts) end

--- beta * x + alpha * (a times b), batch by batch: a is [b, n, k], b [b, k, m], x broadcasts to [b, n, m].
---@param a Tensor
---@param b Tensor
---@param opts {beta: number, alpha: number}? 1 and 1 unless given
---@return Tensor
function Tensor:baddbmm(a, b, opts) end

--- Sum of products over dims of x paired with dims of y: the last n of x with the first n of y, or those named.
---@param y Tensor
---@param dims integer|integer[][]? n, or {dims of x, dims of y}; 2 when left out
---@return Tensor
function Tensor:tensordot(y, dims) end

--- Kronecker product: every element of x times the whole of y, side by side.
---@param y Tensor
---@return Tensor
function Tensor:kron(y) end

--- p-norm over dims (all when none is given): (sum of |x|^p)^(1/p).  p may be infinite (the largest |x|), minus
--- infinite (the smallest), 0 (how many are not zero) or "fro", which is 2.
---@param p number|string|table? default 2; {p =, dim =, keepdim =} may stand here
---@param dim integer|integer[]?
---@param keepdim boolean?
---@return Tensor
function Tensor:norm(p, dim, keepdim) end

--- The diagonal of two dims, as a new last dim (a copy).  offset > 0 lies above the main diagonal, < 0 below it.
---@param offset integer? default 0
---@param dim1 integer? default 1
---@param dim2 integer? default 2
---@return Tensor
function Tensor:diagonal(offset, dim1, dim2) end

--- A vector as the diagonal of a matrix that is zero elsewhere, or the diagonal of a matrix as a vector.
---@param offset integer? default 0; above the main diagonal where > 0
---@return Tensor
function Tensor:diag(offset) end

--- Sum of the main diagonal of a matrix.
---@return Tensor
function Tensor:trace() end

--- Each entry along a dim less the one before it, n times over.
---@param n integer|table? default 1; options {n =, dim =, prepend =, append =} may stand here
---@param dim integer? default -1
---@return Tensor
function Tensor:diff(n, dim) end

--- Dims moved to other places, the rest in their order: a view.
---@param source integer|integer[]
---@param target integer|integer[] where they go
---@return Tensor
function Tensor:movedim(source, target) end

--- Two dims exchanged, as transpose: a view.
---@param dim0 integer
---@param dim1 integer
---@return Tensor
function Tensor:swapaxes(dim0, dim1) end

--- A dim split into several: a view.  One size may be -1.
---@param dim integer
---@param sizes integer[]
---@return Tensor
function Tensor:unflatten(dim, sizes) end

--- The entries along a dim as an array of views, without that dim.
---@param dim integer? default 1
---@return Tensor[]
function Tensor:unbind(dim) end

--- x expanded to the shape of y.
---@param y Tensor
---@return Tensor
function Tensor:expand_as(y) end

--- x viewed in the shape of y.
---@param y Tensor
---@return Tensor
function Tensor:view_as(y) end

--- Entries moved along dims, those that fall off the end come in at the front.  Without dims x counts as flat.
---@param shifts integer|integer[]
---@param dims integer|integer[]?
---@return Tensor
function Tensor:roll(shifts, dims) end

--- x repeated along its dims, as often as the numbers say (PyTorch's tile and repeat).  Missing dims count in front.
---@param times integer|integer[]
---@param ... integer
---@return Tensor
function Tensor:tile(times, ...) end

--- Each entry along a dim repeated in place; without a dim x counts as flat.
---@param repeats integer|integer[]|Tensor for all entries, or one number for each
---@param dim integer?
---@return Tensor
function Tensor:repeat_interleave(repeats, dim) end

--- x with values written at ids: x[indices[1]][indices[2]]... = values, with accumulate added.  The indices broadcast
--- together, values to what they select; of several values for one place the last stays.
---@param indices Tensor[] ids from 0, for the first dims of x
---@param values Tensor|number
---@param accumulate boolean|table? default false; {accumulate =} too
---@return Tensor
function Tensor:index_put(indices, values, accumulate) end

--- x with the entries of src along a dim written at index [n].
---@param dim integer
---@param index Tensor ids from 0
---@param src Tensor
---@return Tensor
function Tensor:index_copy(dim, index, src) end

--- x with a number written at index [n] along a dim.
---@param dim integer
---@param index Tensor ids from 0
---@param value number
---@return Tensor
function Tensor:index_fill(dim, index, value) end

--- 1 at each id and 0 elsewhere, in a new last dim of num_classes (the largest id + 1 when left out); int64.
---@param num_classes integer?
---@return Tensor
function Tensor:one_hot(num_classes) end

--- 0-based places of the entries in their order along a dim; equal ones keep their order.
---@param dim integer? default -1
---@param descending boolean? default false
---@return Tensor
function Tensor:argsort(dim, descending) end

--- The entries where a mask holds, as a vector.
---@param mask Tensor bool; broadcasts with x
---@return Tensor
function Tensor:masked_select(mask) end

--- Places of the entries that are not zero: [n, dims], ids from 0.
---@return Tensor
function Tensor:nonzero() end

--- x:index_put(indices, values, accumulate), written into x.
---@param indices Tensor[] ids from 0, for the first dims of x
---@param values Tensor|number
---@param accumulate boolean|table? default false; {accumulate =} too
---@return Tensor x
function Tensor:index_put_(indices, values, accumulate) end

--- x:index_copy(dim, index, src), written into x.
---@param dim integer
---@param index Tensor
---@param src Tensor
---@return Tensor x
function Tensor:index_copy_(dim, index, src) end

--- x:index_fill(dim, index, value), written into x.
---@param dim integer
---@param index Tensor
---@param value number
---@return Tensor x
function Tensor:index_fill_(dim, index, value) end

--- x:index_add(dim, index, src), written into x.
---@param dim integer
---@param index Tensor
---@param src Tensor
---@return Tensor x
function Tensor:index_add_(dim, index, src) end

--- x:scatter(dim, index, src), written into x.
---@param dim integer
---@param index Tensor
---@param src Tensor|number
---@return Tensor x
function Tensor:scatter_(dim, index, src) end

--- x:scatter_add(dim, index, src), written into x.
---@param dim integer
---@param index Tensor
---@param src Tensor
---@return Tensor x
function Tensor:scatter_add_(dim, index, src) end

--- x:tril(diagonal), written into x.
---@param diagonal integer? default 0
---@return Tensor x
function Tensor:tril_(diagonal) end

--- x:triu(diagonal), written into x.
---@param diagonal integer? default 0
---@return Tensor x
function Tensor:triu_(diagonal) end

--- True where |x - y| <= atol + rtol * |y|; equal infinities are close, NaN to NaN only with equal_nan.
---@param y Tensor|number
---@param opts {rtol: number, atol: number, equal_nan: boolean}? 1e-5 and 1e-8 unless given
---@return Tensor
function Tensor:isclose(y, opts) end

--- Whether all entries are close (isclose).
---@param y Tensor|number
---@param opts {rtol: number, atol: number, equal_nan: boolean}?
---@return boolean
function Tensor:allclose(y, opts) end

--- Whether two tensors have one shape and equal entries.
---@param y Tensor
---@return boolean
function Tensor:equal(y) end

--- x limited to [min, max]: clamp.
---@param min number?
---@param max number?
---@return Tensor
function Tensor:clip(min, max) end

--- Logarithm of e^x + e^y, without overflow.
---@param y Tensor|number
---@return Tensor
function Tensor:logaddexp(y) end

--- Variance and mean over dims (all when none is given).
---@param dim integer|integer[]?
---@param opts {dim: integer|integer[], correction: number, keepdim: boolean}?
---@return Tensor var
---@return Tensor mean
function Tensor:var_mean(dim, opts) end

--- Standard deviation and mean over dims (all when none is given).
---@param dim integer|integer[]?
---@param opts {dim: integer|integer[], correction: number, keepdim: boolean}?
---@return Tensor std
---@return Tensor mean
function Tensor:std_mean(dim, opts) end

--- The tensor in the dtype and on the device of y; itself if there is nothing to do.
---@param y Tensor
---@return Tensor
function Tensor:type_as(y) end

--- 1 with the probability that stands in x, else 0; of x's shape and dtype.
---@return Tensor
function Tensor:bernoulli() end

--- x times the transpose of weight, plus bias: x is [..., in], weight [out, in], bias [out] or nil.  An activation is applied by
--- the same op.
---@param weight Tensor
---@param bias Tensor?
---@param opts {activation: "relu"|"gelu_tanh"}? or the activation alone
---@return Tensor
function Tensor:linear(weight, bias, opts) end

--- Convolution of x [N, C, H, W] with weight [out, C / groups, kH, kW].
---@param weight Tensor
---@param bias Tensor?
---@param opts ConvOptions?
---@return Tensor
function Tensor:conv2d(weight, bias, opts) end

--- The largest value in each window of x [N, C, H, W]; NaN wins.  With return_indices also where it stood: h * W + w.
---@param kernel_size integer|integer[]
---@param opts MaxPoolOptions?
---@return Tensor
---@return Tensor? indices
function Tensor:max_pool2d(kernel_size, opts) end

--- The mean of each window of x [N, C, H, W].
---@param kernel_size integer|integer[]
---@param opts AvgPoolOptions?
---@return Tensor
function Tensor:avg_pool2d(kernel_size, opts) end

--- Means of x [N, C, H, W] over windows that divide it into size: a number or {height, width}.
---@param size integer|integer[]
---@return Tensor
function Tensor:adaptive_avg_pool2d(size) end

--- Gaussian error linear unit.
---@param opts {approximate: "none"|"tanh"}?
---@return Tensor
function Tensor:gelu(opts) end

--- The first half along a dim times the sigmoid of the second.
---@param dim integer? default -1
---@return Tensor
function Tensor:glu(dim) end

--- Softmax and cross entropy in one pass.  The class dim is dim 2; target holds class ids from 0 as int64.
---@param target Tensor [N] or [N, ...]
---@param opts {weight: Tensor, reduction: "mean"|"sum"|"none", ignore_index: integer, label_smoothing: number}?
---@return Tensor
function Tensor:cross_entropy(target, opts) end

--- Mean of the squared differences.
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none"}?
---@return Tensor
function Tensor:mse_loss(target, opts) end

--- Mean of the absolute differences.
---@param target Tensor
---@param opts {reduction: "mean"|"sum"|"none"}?
---@return Tensor
function Tensor:l1_loss(target, opts) end

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

-- ====== Modules ======

-- Classes are called to make an instance; `? nn.Linear` tells their options.
---@class halfmoon.nn
---@field class fun(name: string, base: table?): table
---@field Module Module
---@field Parameter fun(t: Tensor, requires_grad: boolean?): Tensor
---@field is_module fun(x: any): boolean
---@field is_parameter fun(x: any): boolean
---@field functional halfmoon.functional
---@field init table
---@field utils table
---@field Linear fun(inputs: integer, outputs: integer, opts: table?): Linear
---@field Embedding fun(ids: integer, size: integer, opts: table?): Embedding
---@field Identity fun(): Identity
---@field Flatten fun(first: integer?, last: integer?): Flatten
---@field Unflatten fun(dim: integer, sizes: integer[]): Unflatten
---@field Dropout fun(p: number?): Module
---@field Dropout2d fun(p: number?): Module
---@field Conv1d fun(inputs: integer, outputs: integer, kernel: integer, opts: table?): Conv1d
---@field Conv2d fun(inputs: integer, outputs: integer, kernel: integer|integer[], opts: table?): Conv2d
---@field ConvTranspose2d fun(inputs: integer, outputs: integer, kernel: integer|integer[], opts: table?): ConvTranspose2d
---@field Upsample fun(opts: table): Upsample
---@field MaxPool1d fun(kernel: integer, opts: table?): Module
---@field MaxPool2d fun(kernel: integer|integer[], opts: table?): MaxPool2d
---@field AvgPool1d fun(kernel: integer, opts: table?): Module
---@field AvgPool2d fun(kernel: integer|integer[], opts: table?): AvgPool2d
---@field AdaptiveAvgPool2d fun(size: integer|integer[]): Module
---@field AdaptiveMaxPool2d fun(size: integer|integer[], opts: table?): Module
---@field BatchNorm1d fun(channels: integer, opts: table?): Module
---@field BatchNorm2d fun(channels: integer, opts: table?): Module
---@field InstanceNorm2d fun(channels: integer, opts: table?): InstanceNorm2d
---@field LayerNorm fun(shape: integer|integer[], opts: table?): LayerNorm
---@field RMSNorm fun(shape: integer|integer[], opts: table?): RMSNorm
---@field GroupNorm fun(groups: integer, channels: integer, opts: table?): GroupNorm
---@field ReLU fun(): Module
---@field ReLU6 fun(): Module
---@field Tanh fun(): Module
---@field Sigmoid fun(): Module
---@field LogSigmoid fun(): Module
---@field SiLU fun(): Module
---@field Mish fun(): Module
---@field Softsign fun(): Module
---@field SELU fun(): Module
---@field Hardsigmoid fun(): Module
---@field Hardswish fun(): Module
---@field GELU fun(opts: table?): Module
---@field Softplus fun(opts: table?): Module
---@field ELU fun(opts: table|number?): Module
---@field LeakyReLU fun(opts: table|number?): Module
---@field Hardtanh fun(opts: table?): Module
---@field PReLU fun(opts: table|integer?): PReLU
---@field Softmax fun(dim: integer): Module
---@field LogSoftmax fun(dim: integer): Module
---@field Softmin fun(dim: integer): Module
---@field GLU fun(dim: integer?): Module
---@field RNNBase Module
---@field RNN fun(inputs: integer, hidden: integer, opts: table?): RNN
---@field LSTM fun(inputs: integer, hidden: integer, opts: table?): LSTM
---@field GRU fun(inputs: integer, hidden: integer, opts: table?): GRU
---@field LSTMCell fun(inputs: integer, hidden: integer, opts: table?): LSTMCell
---@field GRUCell fun(inputs: integer, hidden: integer, opts: table?): GRUCell
---@field MultiheadAttention fun(size: integer, heads: integer, opts: table?): MultiheadAttention
---@field TransformerEncoderLayer fun(size: integer, heads: integer, opts: table?): TransformerEncoderLayer
---@field TransformerEncoder fun(layer: Module, count: integer, opts: table?): TransformerEncoder
---@field Sequential fun(...: Module): Sequential
---@field ModuleList fun(...: Module): ModuleList
---@field ModuleDict fun(entries: table?): Module
---@field ParameterList fun(list: Tensor[]?): ParameterList
---@field ParameterDict fun(entries: table?): Module
---@field MinMaxObserver fun(opts: table?): Observer
---@field MovingAverageMinMaxObserver fun(opts: table?): Observer
---@field PerChannelMinMaxObserver fun(channels: integer, opts: table?): Observer
---@field MovingAveragePerChannelMinMaxObserver fun(channels: integer, opts: table?): Observer
---@field FakeQuantize fun(opts: table?): FakeQuantize
---@field QATLinear fun(layer: Linear, opts: table?): QATLinear
---@field QATConv2d fun(layer: Conv2d, opts: table?): QATConv2d
---@field quantize halfmoon.quantize
---@field CrossEntropyLoss fun(opts: table?): Module
---@field NLLLoss fun(opts: table?): Module
---@field MSELoss fun(opts: table?): Module
---@field L1Loss fun(opts: table?): Module
---@field SmoothL1Loss fun(opts: table?): Module
---@field HuberLoss fun(opts: table?): Module
---@field BCELoss fun(opts: table?): Module
---@field BCEWithLogitsLoss fun(opts: table?): Module
---@field KLDivLoss fun(opts: table?): Module

--- Says whether ops are recorded, inside fn or until the guard is closed: `local _ <close> = hm.set_grad_enabled(training)`.
---@param on boolean
---@param fn function?
---@param ... any arguments for fn
function hm.set_grad_enabled(on, fn, ...) end

--- Whether hm.checkpoint runs a function again at this moment, in backward.
---@return boolean
function hm.is_recomputing() end

-- ====== Parts of the library that come from the C module ======

-- `? amp.initialize` and so on tell options; the functions and classes are annotated where they stand, in lua/halfmoon/amp.
---@class halfmoon.amp
---@field GradScaler fun(options: table?): GradScaler|GroupedGradScaler the latter with `groups`
---@field custom_fwd fun(forward: function, opts: {cast_inputs: string?}?): function
---@field custom_bwd fun(backward: function): function
---@field half_function fun(fn: function): function
---@field float_function fun(fn: function): function
---@field promote_function fun(fn: function): function
---@field register_half_function fun(where: table, name: string)
---@field register_float_function fun(where: table, name: string)
---@field register_promote_function fun(where: table, name: string)
---@field disable_casts fun(fn: function?, ...: any): ...: any
---@field initialize fun(models: Module|Module[], optimizers: Optimizer|Optimizer[]|nil, opts: table?): any, any
---@field scale_loss fun(loss: Tensor, optimizers: Optimizer|Optimizer[], opts: table|function|nil, fn: function?): ...: any
---@field master_params fun(optimizer: Optimizer): Tensor[]
---@field state_dict fun(): table
---@field load_state_dict fun(saved: table)
---@field LossScaleOptimizer fun(optimizer: Optimizer, opts: table|string|number|nil): LossScaleOptimizer
---@field layer_scale fun(model: Module, rule: string|LayerRule, opts: table?): LayerScale
---@field layer_rules table<string, LayerRule> layerwise, adaptive; and names()
---@field DelayedScaling fun(opts: table?): DelayedScaling a recipe for autocast{dtype = "fp8", recipe = }
---@field default_recipe fun(): DelayedScaling the one that autocast("fp8") uses
---@field Policy fun(name: string|DtypePolicy): DtypePolicy
---@field set_policy fun(module: Module, name: string|DtypePolicy): Module
---@field get_policy fun(module: Module): DtypePolicy?
---@field set_global_policy fun(name: string|DtypePolicy)
---@field global_policy fun(): DtypePolicy
local amp = {}

--- A scope in which ops compute in a half dtype where that is safe, and in float32 where it is not; a guard, or a call of fn.
--- "fp8" is an emulation on the CPU: products on factors rounded to 8 bits, scaled by the recipe.  ops = {exp = "low"} gives ops
--- another class (low, f32, promote, follow); what it says of linear counts for linear_relu and linear_gelu_tanh, too.
---@param opts string|{dtype: string?, enabled: boolean?, cache_enabled: boolean?, backward: string?, ops: table?, recipe: DelayedScaling?}|function|nil
---@param fn function?
---@param ... any arguments for fn
function amp.autocast(opts, fn, ...) end

--- What autocast does here: {enabled, dtype, cache_enabled}.
---@return table
function amp.autocast_state() end

--- Counters of the casts that autocast has made.
---@return table
function amp.cast_stats() end

--- Records the gradients that float16 training would hold, for amp.simulate; a recording, or with fn a call of it.
---@param path string
---@param source Module|Optimizer
---@param opts {per_tensor: boolean?}|function|nil
---@param fn function?
---@param ... any further arguments of fn
---@return GradientRecorder|any ...
function amp.record_gradients(path, source, opts, fn, ...) end

--- The steps of a recording, as its lines have them.
---@param path string
---@return table[]
function amp.read_gradients(path) end

--- Replays a recorded run through loss-scale policies.
---@param trace string|table[] a file of amp.record_gradients, or its steps
---@param policies (string|table)[]|string|nil names, tables, files, or {name, growth_interval = 50, label = "..."}; all if left out
---@param opts {first: integer?, last: integer?}?
---@return Simulation
function amp.simulate(trace, policies, opts) end

---@class halfmoon.autograd
local autograd = {}

--- Gradients of outputs by inputs, without touching .grad.
---@param outputs Tensor|Tensor[]
---@param inputs Tensor|Tensor[]
---@param opts {grad_outputs: Tensor[]?, retain_graph: boolean?, create_graph: boolean?, allow_unused: boolean?}?
---@return Tensor[]
function autograd.grad(outputs, inputs, opts) end

--- A scope in which backward() raises at the first NaN that it makes, naming the line whose op it belongs to.
---@param opts {inf: boolean?}|function|nil
---@param fn function?
---@param ... any arguments for fn
function autograd.detect_anomaly(opts, fn, ...) end

---@class halfmoon.cpu
local cpu = {}

--- What the processor can do and what is used of it: isa, avx2, f16c, avx512, avx512_bf16, threads, onednn, ...
---@return table
function cpu.features() end

hm.amp, hm.autograd, hm.cpu = amp, autograd, cpu

return hm, Tensor
