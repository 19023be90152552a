#!/bin/sh
# gpu-check.sh -- one command for a machine with a GPU: builds, runs every spec on the device, the benchmark, and compute-sanitizer on a part
# of the specs, and writes a report.
#
#   scripts/gpu-check.sh [--report FILE] [--append] [--limit SECONDS] [--time SECONDS] [STEP...]
#
#   STEP      build, specs, bench, sanitizer, kernels, cost; default: all of them in this order, what is worth most first
#   --report  default: build/gpu-check.txt; --append keeps what stands there, of steps that ran before
#   --limit   the longest a command may take; default 1800
#   --time    the longest that all of it may take: what does not fit is named under `not run`; default: no limit
#
# Where the machine is lent for ten minutes at a time: `gpu-check.sh --time 580 build specs`, then `gpu-check.sh --time 580 --append bench sanitizer`.
# The plug-in is built for this machine's GPU alone.  A signal ends the run with the report of what was done.
#
# Needs gcc, g++, make and nvcc (CUDA=/path says where the toolkit is), and no network.  Lua, oneDNN, jansson, zlib, libedit, busted and
# the data set come from the file that `make bundle` made on another machine, where this one lacks them: unpacked (this script lies in
# it), as build/halfmoon-bundle.tar.gz, or where HALFMOON_BUNDLE says.  PYTHON names a Python with torch to compare with.
#
# HALFMOON_CUDA=emu scripts/gpu-check.sh runs the same steps on the test double (kernels/emu), without nvcc.  That shows that this script
# works, and nothing about a GPU; the report says so.  Ends with `N passed, N failed`; what was not run, and why, stands above it.
# shellcheck disable=SC2317 # functions are called through step
set -u

cd "$(dirname "$0")/.." || exit 1
root=$PWD
BUILD=${BUILD:-build}
report=
limit=1800
deadline=
append=
steps=
while [ $# -gt 0 ]; do
  case $1 in
    --report) report=${2:?--report needs a file} && shift ;;
    --append) append=yes ;;
    --limit) limit=${2:?--limit needs seconds} && shift ;;
    --time) deadline=$(($(date +%s) + ${2:?--time needs seconds})) && shift ;;
    build | specs | bench | sanitizer | kernels | cost) steps="$steps $1" ;;
    *)
      sed -n '2,19s/^# \{0,1\}//p' "$0"
      exit 2
      ;;
  esac
  shift
done
steps=${steps:-build specs bench sanitizer kernels cost}
report=${report:-$BUILD/gpu-check.txt}
JOBS=${JOBS:-$(nproc 2>/dev/null || echo 2)}
mkdir -p "$BUILD" "$(dirname "$report")" || exit 1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
passed=0
failed=0
not_run=0
emulated=
if [ "${HALFMOON_CUDA:-}" = emu ]; then emulated=yes; fi
export HALFMOON_HISTORY=
[ -n "$append" ] || : >"$report"

# ====== The report ======

say() { printf '%s\n' "$*" | tee -a "$report"; }
title() { say "" && say "== $*"; }
pass() {
  say "  ✓ $*"
  passed=$((passed + 1))
}
fail() {
  say "  ✗ $*"
  failed=$((failed + 1))
}
# skip WHAT WHY
skip() {
  say "  - NOT RUN: $1: $2"
  printf '  - %s: %s\n' "$1" "$2" >>"$scratch/skipped"
  not_run=$((not_run + 1))
}

notice() {
  if [ -n "$emulated" ]; then
    say "THIS IS NO GPU RUN: it ran on the test double (kernels/emu).  It shows that the script works, and nothing about a GPU."
  fi
}

# fits WHAT: is there time left for it?  Else it is named as not run.
fits() {
  allowed=$limit
  [ -n "$deadline" ] || return 0
  left=$((deadline - $(date +%s)))
  if [ "$left" -lt 5 ]; then
    skip "$1" "the time that --time gives is used up"
    return 1
  fi
  if [ "$left" -lt "$allowed" ]; then allowed=$left; fi
}

# timed COMMAND...: runs it within what fits() allowed, output to $scratch/log; sets status and seconds.  In the background, so that a
# signal is heard at once.
timed() {
  started=$(date +%s)
  timeout -k 20 "$allowed" "$@" >"$scratch/log" 2>&1 </dev/null &
  running=$!
  wait "$running"
  status=$?
  running=
  seconds=$(($(date +%s) - started))
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then echo "stopped after $allowed s, the limit" >>"$scratch/log"; fi
}

# log_tail LINES: what the last command said, indented.
log_tail() { tail -n "$1" "$scratch/log" | sed 's/^/      /' | tee -a "$report"; }

# check WHAT COMMAND...: one check.
check() {
  what=$1
  shift
  fits "$what" || return 1
  timed "$@"
  if [ "$status" = 0 ]; then
    pass "$what ($seconds s)"
  else
    fail "$what: exit status $status ($seconds s)"
    log_tail 40
    return 1
  fi
}

# specs WHAT PREFIX OPTIONS...: one run of busted; PREFIX is a command to run it under, in words.
specs() {
  what=$1
  prefix=$2
  shift 2
  fits "$what" || return 0
  rm -f "$scratch/counts" "$scratch/counts.now"
  # shellcheck disable=SC2086 # the prefix is words
  timed env HALFMOON_COUNTS="$scratch/counts" HALFMOON_PROGRAM="$program" $prefix "$program" spec/run.lua "$@"
  ok=0
  bad=0
  left=0
  if [ -s "$scratch/counts" ]; then read -r ok bad left <"$scratch/counts"; fi
  if [ "$seconds" -ge "$allowed" ] && [ "$allowed" -lt "$limit" ] && [ ! -s "$scratch/counts" ] && ! grep -q '✗' "$scratch/log"; then
    skip "$what" "stopped after $seconds s by --time, with no failure so far, in: $(cat "$scratch/counts.now" 2>/dev/null)"
    return 0
  fi
  if [ "$bad" = 0 ] && { [ "$status" != 0 ] || [ "$ok" = 0 ]; }; then bad=1; fi
  passed=$((passed + ok))
  failed=$((failed + bad))
  say "  $(if [ "$bad" = 0 ]; then echo ✓; else echo ✗; fi) $what: $ok passed, $bad failed, ${left:-0} skipped, $seconds s"
  if [ "$bad" = 0 ]; then
    grep -E '^ +[0-9]+ skipped|slowest' "$scratch/log" | sed 's/^/    /' | tee -a "$report"
    return 0
  fi
  [ -s "$scratch/counts" ] || say "      ended without a result, exit status $status, in: $(cat "$scratch/counts.now" 2>/dev/null)"
  say "      command: HALFMOON_CUDA=${HALFMOON_CUDA:-} $prefix $program spec/run.lua $*"
  grep -v '✓' "$scratch/log" >"$scratch/short"
  mv "$scratch/short" "$scratch/log"
  log_tail 200
}

# ====== What the machine has, and what the bundle must give ======

# links HEADER FLAG: can the compiler use this library?
links() { printf '#include <stdio.h>\n#include <%s>\nint main(void) { return 0; }\n' "$1" | gcc -x c - -o /dev/null "$2" >/dev/null 2>&1; }

has() {
  case $1 in
    lua) command -v lua5.4 && "${PKG_CONFIG:-pkg-config}" --exists lua5.4 ;;
    dnnl) links dnnl.h -ldnnl ;;
    jansson) links jansson.h -ljansson ;;
    zlib) links zlib.h -lz ;;
    libedit) links editline/readline.h -ledit ;;
    busted) lua5.4 -e 'require "busted"' ;;
    data) [ -f "${HALFMOON_DATA:-/usr/share/datasets/fashion-mnist}/train-images-idx3-ubyte.gz" ] ;;
  esac >/dev/null 2>&1
}

# take PART: uses what the bundle carries.
take() {
  place=$bundle/$1
  case $1 in
    lua)
      PATH=$place/bin:$PATH
      PKG_CONFIG=$bundle/bin/pkg-config
      export PATH PKG_CONFIG
      ;;
    busted)
      LUA_PATH="$place/share/?.lua;$place/share/?/init.lua;${LUA_PATH:-;}"
      LUA_CPATH="$place/lib/?.so;${LUA_CPATH:-;}"
      export LUA_PATH LUA_CPATH
      ;;
    data)
      HALFMOON_DATA=$place
      export HALFMOON_DATA
      ;;
    *)
      CPATH=$place/include${CPATH:+:$CPATH}
      LIBRARY_PATH=$place/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
      LD_LIBRARY_PATH=$place/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
      export CPATH LIBRARY_PATH LD_LIBRARY_PATH
      ;;
  esac
}

find_bundle() {
  for place in "${HALFMOON_BUNDLE:-}" "$root/../carried" "$root/$BUILD/halfmoon-bundle/carried"; do
    if [ -n "$place" ] && [ -d "$place/lua" ]; then bundle=$(cd "$place" && pwd) && return; fi
  done
  if [ -f "$BUILD/halfmoon-bundle.tar.gz" ]; then
    tar -xzf "$BUILD/halfmoon-bundle.tar.gz" -C "$BUILD" && bundle=$root/$BUILD/halfmoon-bundle/carried && return
  fi
  return 1
}

dependencies() {
  here=
  from_bundle=
  missing=
  bundle=
  for part in lua dnnl jansson zlib libedit busted data; do
    if has $part; then
      here="$here $part"
    elif { [ -n "$bundle" ] || find_bundle; } && [ -d "$bundle/$part" ] && take $part && has $part; then
      from_bundle="$from_bundle $part"
    else
      missing="$missing $part"
    fi
  done
  say "  this machine has:${here:- none};  from the bundle:${from_bundle:- none};  missing:${missing:- none}"
  [ -z "$bundle" ] || say "  bundle: $bundle"
  case " $missing " in *" data "*) skip "specs and examples that train on the data set" "it is not here (HALFMOON_DATA=folder)" ;; esac
  for part in $missing; do
    if [ "$part" != data ]; then
      fail "without $part nothing can be built or run: \`make bundle\` on a machine that has it, then carry build/halfmoon-bundle.tar.gz here"
      return 1
    fi
  done
}

find_toolkit() {
  for place in "${CUDA:-}" "$(dirname "$(dirname "$(command -v nvcc 2>/dev/null || echo /none/none/none)")")" /usr/local/cuda /opt/cuda; do
    if [ -n "$place" ] && [ -x "$place/bin/nvcc" ]; then toolkit=$place && return; fi
  done
  return 1
}

# Where the system and the toolkit have no cuDNN, PyTorch's may lie among Python's packages.
find_cudnn() {
  if [ -n "${HALFMOON_CUDNN:-}$emulated" ] || [ -z "$python" ]; then return; fi
  if [ -e "$toolkit/lib64/libcudnn.so.9" ] || ldconfig -p 2>/dev/null | grep -q 'libcudnn\.so\.9'; then return; fi
  found=$("$python" -c 'import glob, os, sys
print(([f for p in sys.path for f in glob.glob(os.path.join(p, "nvidia", "*", "lib", "libcudnn.so.9"))] + [""])[0])' 2>/dev/null)
  if [ -n "$found" ]; then
    say "  cuDNN      $found"
    HALFMOON_CUDNN=$found
    export HALFMOON_CUDNN
  fi
}

machine() {
  title "Machine"
  say "  date       $(date -u '+%Y-%m-%d %H:%M UTC')"
  say "  system     $(uname -srm); $(sed -n 's/^PRETTY_NAME="\(.*\)"/\1/p' /etc/os-release 2>/dev/null)"
  say "  processor  $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) threads, $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
  say "  compiler   $(gcc --version | head -n 1); $(ldd --version 2>&1 | head -n 1)"
  say "  sources    $(cat VERSION.txt 2>/dev/null || git log -1 --format='commit %H' 2>/dev/null || echo unknown)"
  toolkit=
  if find_toolkit; then say "  nvcc       $toolkit: $("$toolkit/bin/nvcc" --version | tail -n 2 | head -n 1)"; else say "  nvcc       none"; fi
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.sm,clocks.mem --format=csv,noheader 2>&1 | sed 's/^/  GPU        /' | tee -a "$report"
  else
    say "  GPU        no nvidia-smi here"
  fi
  python=
  for candidate in "${PYTHON:-}" python3 /usr/bin/python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import torch' >/dev/null 2>&1; then
      python=$candidate
      say "  PyTorch    $("$python" -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda, "available:", torch.cuda.is_available())' 2>/dev/null)"
      break
    fi
  done
  [ -n "$python" ] || say "  PyTorch    none"
  find_cudnn
  dependencies
}

# ====== Steps ======

# The compilers' options for this machine's GPU alone; nothing where it is not known.
this_gpu() {
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd 0-9)
  if [ -n "$capability" ] && "$toolkit/bin/nvcc" --list-gpu-code 2>/dev/null | grep -q "^sm_$capability\$"; then
    echo "-gencode arch=compute_$capability,code=sm_$capability"
  fi
}

step_build() {
  title "Build"
  check "program and library" make -j"$JOBS" CUDA=0 BUILD="$BUILD" base || return 1
  if [ -n "$emulated" ]; then
    check "test double" make -j"$JOBS" CUDA=0 BUILD="$BUILD" cuda-emu || return 1
    skip "the plug-in by nvcc" "this run is on the test double"
    return 0
  fi
  if [ -z "$toolkit" ] && [ -f "$BUILD/halfmoon-cuda.so" ]; then
    skip "the plug-in by nvcc" "there is no nvcc (CUDA=/path); $BUILD/halfmoon-cuda.so is used as it is"
    return 0
  fi
  if [ -z "$toolkit" ]; then
    fail "there is no nvcc: CUDA=/path says where the toolkit is"
    return 1
  fi
  archs=$(this_gpu)
  check "plug-in by nvcc" make -j"$JOBS" CUDA="$toolkit" BUILD="$BUILD" ${archs:+CUDA_ARCHS="$archs"} cuda || return 1
  say "      $(wc -c <"$BUILD/halfmoon-cuda.so") bytes, for ${archs:-the default GPUs}"
}

step_kernels() {
  title "Registers and spills of the kernels"
  if [ -n "$emulated" ] || [ -z "$toolkit" ]; then
    skip "registers and spills of the kernels" "$(if [ -n "$emulated" ]; then echo "this run is on the test double"; else echo "there is no nvcc"; fi)"
    return
  fi
  if check "no kernel spills" make -j"$JOBS" CUDA="$toolkit" BUILD="$BUILD" cuda-report; then log_tail 1; fi
}

# A device must answer before anything runs on it.
device_answers() {
  title "Device"
  fits "a device answers" || return 1
  timed "$program" -e 'local ok, why = hm.cuda.is_available()
    if not ok then print(why) os.exit(1) end
    local p, keys = hm.cuda.properties(), {}
    for name in pairs(p) do keys[#keys + 1] = name end
    table.sort(keys)
    for _, name in ipairs(keys) do print(("%-24s %s"):format(name, p[name])) end
    local x = hm.ones({1000}, {device = "cuda"})
    assert((x + x):sum():item() == 2000)'
  log_tail 20
  if [ "$status" = 0 ]; then pass "a device answers"; else fail "no device answers"; fi
  return "$status"
}

# Which of cublasLt's epilogues are right here, as the counts of linears in one pass and in two.
which_epilogues() {
  fits "linear with an activation" || return
  timed "$program" spec/support/linear_cases.lua
  log_tail 20
  if [ "$status" = 0 ]; then pass "linear with an activation"; else fail "linear with an activation: exit status $status"; fi
}

step_specs() {
  title "Specs on the device"
  specs "parity with the CPU, each op waited for" "env HALFMOON_CUDA_SYNC=1" spec/cuda_parity_spec.lua
  specs "the device" "" spec/cuda_spec.lua
  which_epilogues
  specs "the whole suite, default device cuda" "" --device=cuda
}

step_sanitizer() {
  title "compute-sanitizer"
  if [ -n "$emulated" ]; then
    skip "compute-sanitizer" "it needs a GPU; the test double's own checks are make test-emu-full"
    return
  fi
  tool=$(command -v compute-sanitizer || echo "$toolkit/bin/compute-sanitizer")
  if [ ! -x "$tool" ]; then
    skip "compute-sanitizer" "the program is not on the PATH and not in $toolkit/bin"
    return
  fi
  options="--error-exitcode 9 --print-limit 20"
  # Memory: every op in one half type and in float32.  Races and barriers: the kernels with shared memory.
  specs "memcheck: every op in float16" "$tool --tool memcheck $options" --filter=': float16' spec/cuda_parity_spec.lua
  specs "memcheck: every op in float32" "$tool --tool memcheck $options" --filter=': float32' spec/cuda_parity_spec.lua
  set --
  for pattern in ' sum: float' ' mean: float' ' amax: float' ' max_dim: float' ' var: float' ' prod: float' ' logsumexp: float' softmax \
    cross_entropy nll_loss norm pool conv2d attention ' cumsum: float' ' cumprod: float' ' sort: float' ' topk: float' index_add embedding; do
    set -- "$@" "--filter=$pattern"
  done
  for name in racecheck synccheck; do
    specs "$name: the kernels with shared memory" "$tool --tool $name $options" "$@" spec/cuda_parity_spec.lua
  done
  specs "memcheck: training, scaler, optimizers" "$tool --tool memcheck $options" --filter='train' spec/cuda_spec.lua
}

step_bench() {
  title "Benchmark${emulated:+ (on the test double: the times mean nothing)}"
  fits "benchmark" || return
  timed "$program" scripts/bench/gpu.lua ${emulated:+--quick}
  log_tail 40
  if [ "$status" = 0 ]; then pass "benchmark ($seconds s)"; else fail "benchmark: exit status $status"; fi
  if [ -z "$python" ]; then
    skip "PyTorch's times" "no Python with torch here"
  elif [ -n "$emulated" ]; then
    skip "PyTorch's times" "this run is on the test double"
  elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
    skip "PyTorch's times" "its torch sees no GPU"
  elif fits "PyTorch's times"; then
    timed "$python" scripts/bench/gpu_peer.py
    log_tail 40
    if [ "$status" = 0 ]; then pass "PyTorch's times ($seconds s)"; else fail "PyTorch's times: exit status $status"; fi
  fi
}

step_cost() {
  title "Cost model (counts on the test double)"
  check "test double" make -j"$JOBS" CUDA=0 BUILD="$BUILD" cuda-emu || return
  for workload in cnn mlp; do
    fits "cost model, $workload" || return
    timed env HALFMOON_CUDA=emu "$program" scripts/gpu_cost.lua --workload "$workload"
    log_tail 60
    if [ "$status" = 0 ]; then pass "cost model, $workload"; else fail "cost model, $workload: exit status $status"; fi
  done
}

finish() {
  title "Result"
  notice
  if [ -s "$scratch/skipped" ]; then
    say "not run:"
    tee -a "$report" <"$scratch/skipped"
  fi
  say "report: $report"
  say "$passed passed, $failed failed, $not_run skipped"
  [ "$failed" = 0 ]
  exit
}

# The report of what was done, also where somebody ends the run.
stopped() {
  trap '' INT TERM HUP
  [ -z "${running:-}" ] || kill "$running" 2>/dev/null
  fail "stopped by a signal, in step ${name:-machine}"
  finish
}
trap stopped INT TERM HUP

program=$BUILD/halfmoon
say "Halfmoon on a GPU: build, specs, sanitizer, benchmark"
notice
machine || finish
if [ -n "$emulated" ]; then
  HALFMOON_CUDA=emu
else
  case $BUILD in /*) HALFMOON_CUDA=$BUILD/halfmoon-cuda.so ;; *) HALFMOON_CUDA=$root/$BUILD/halfmoon-cuda.so ;; esac
fi
ready=
for name in $steps; do
  if [ "$name" = build ]; then
    step_build || finish
    continue
  fi
  export HALFMOON_CUDA
  if [ -z "$ready" ]; then
    device_answers || finish
    ready=yes
  fi
  "step_$name"
done
finish
