std = "lua54"
unused_args = false
max_line_length = 140
cache = false
exclude_files = {"build/**"}
files["spec/**/*.lua"].std = "+busted"
files["kernels/ops.def"] = {std = "lua54", ignore = {"113"}}
-- Editors read it, nothing runs it: every function is empty, every argument unused.
files["lua/halfmoon/meta.lua"] = {ignore = {"111", "112", "113", "131", "212"}, max_line_length = 160}
files["lua/halfmoon/meta_ops.lua"] = {max_line_length = 160}
