/*
 * memory.cpp -- device memory: an arena of addresses in which only live allocations can be touched, and only by the device.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Owns the arena, the list of allocations and the handler for memory faults.
 *
 * Every page of the arena is closed (PROT_NONE) while host code runs.  While a kernel, a copy or a matrix product runs, a block is opened where
 * it is touched: the fault comes to on_fault(), which opens some pages of that block, more each time, and lets the access go on.  All else is a violation: the host
 * touching device memory (reported, then the process dies of it, as on a machine with a GPU), or a kernel touching what is not a live
 * allocation (an illegal address; the kernel ends and the context keeps the error).
 *
 * A block ends as near to a closed page as 256-byte alignment lets it; the bytes between are filled with a pattern that is checked when the
 * block closes (AddressSanitizer, where built in, guards them to the byte).  Addresses are given out in a circle, so that freed memory stays
 * closed for as long as the arena is large.  Fresh memory is filled with 0xff: NaN in every format.
 */
#include "emu.h"

#include <algorithm>
#include <deque>
#include <map>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if HM_EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace hm_emu {

pool default_pool;

namespace {

typedef std::map<uintptr_t, block> block_map; /* by page_begin */

uintptr_t arena_begin, arena_end, cursor;
size_t page, in_use;                /* in_use: bytes that count against the device's memory */
block_map &blocks = *new block_map; /* never destroyed: memory may be released while the process ends */
block *opened;                      /* list by next_open: a handler of signals must not allocate */
auto &freed = *new std::deque<std::pair<uintptr_t, uintptr_t>>; /* the latest, to name them in reports */
int depth;                                                      /* of device_access */
pthread_t holder;
bool fenced;
struct sigaction former[2]; /* of SIGSEGV, SIGBUS */

enum { GAP = 64 << 10, ALIGN = 256, WINDOW = 64 << 10 };
const uint16_t CANARY = 0xffad;

uintptr_t round_up(uintptr_t n, uintptr_t to) { return (n + to - 1) / to * to; }

/* Opens pages of the block around an address: as many again as were open before, on the side where the address lies. */
void open_window(block *b, uintptr_t a) {
  const bool first = b->low == b->high;
  const size_t want = std::max((size_t)WINDOW, (size_t)(b->high - b->low));
  uintptr_t from = a / WINDOW * WINDOW, to = from + want;
  if (!first && a < b->low) {
    to = from + WINDOW;
    from = to - want;
  }
  from = std::max(from, b->page_begin);
  to = std::min(to, b->page_end);
  mprotect((void *)from, to - from, PROT_READ | PROT_WRITE);
  if (first) {
    b->next_open = opened;
    opened = b;
  }
  b->low = first ? from : std::min(b->low, from);
  b->high = first ? to : std::max(b->high, to);
}

void close_block(block *b) {
  mprotect((void *)b->low, b->high - b->low, PROT_NONE);
  b->low = b->high = 0;
}

/* ====== The bytes around an allocation ====== */

void fence_range(uintptr_t from, uintptr_t to, bool up) {
#if HM_EMU_ASAN
  if (up) __asan_poison_memory_region((void *)from, to - from);
  else __asan_unpoison_memory_region((void *)from, to - from);
#else
  if (up)
    for (uintptr_t a = from; a + 2 <= to; a += 2) memcpy((void *)a, &CANARY, 2);
#endif
}

/* First even-addressed byte pair in [from, to) that lost its pattern, or 0. */
uintptr_t first_damage(uintptr_t from, uintptr_t to) {
#if !HM_EMU_ASAN
  for (uintptr_t a = from; a + 2 <= to; a += 2)
    if (memcmp((const void *)a, &CANARY, 2)) return a;
#else
  (void)from, (void)to;
#endif
  return 0;
}

/* The pattern starts at an even address, whatever the size. */
uintptr_t tail_of(const block &b) { return round_up(b.end, 2); }

/* Looks where pages were opened. */
void check_fences(block *b) {
  const uintptr_t before = b->low == b->page_begin ? first_damage(b->page_begin, b->begin) : 0;
  const uintptr_t after = b->high == b->page_end ? first_damage(tail_of(*b), b->page_end) : 0;
  if (!before && !after) return;
  const uintptr_t at = after ? after : before;
  report("kernel %s: out-of-bounds global access: wrote %zu bytes %s an allocation of %zu bytes", running_kernel(),
         (size_t)(after ? at - b->end : b->begin - at), after ? "past the end of" : "before the start of",
         (size_t)(b->end - b->begin));
  set_sticky(cudaErrorIllegalAddress);
  if (before) fence_range(b->page_begin, b->begin, true);
  if (after) fence_range(tail_of(*b), b->page_end, true);
}

/* ====== Faults ====== */

bool device_side(void) { return depth > 0 && pthread_equal(holder, pthread_self()); }

block *block_on_page(uintptr_t a) {
  auto i = blocks.upper_bound(a);
  if (i == blocks.begin()) return nullptr;
  --i;
  return a < i->second.page_end ? &i->second : nullptr;
}

/* Gives the signal to whoever had it before; by default the process dies of it. */
void pass_on(int number, siginfo_t *info, void *context) {
  const struct sigaction &old = former[number == SIGBUS];
  if (old.sa_flags & SA_SIGINFO) {
    old.sa_sigaction(number, info, context);
    return;
  }
  if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) {
    old.sa_handler(number);
    return;
  }
  signal(number, SIG_DFL); /* the access is repeated when the handler returns */
}

void violate_address(const siginfo_t *info) {
  const void *const a = info->si_addr;
  const fiber *const f = running_fiber();
  if (fiber_overflowed(f, a)) violate(cudaErrorLaunchFailure, "the thread's stack overflowed");
  if (info->si_code == SI_KERNEL || (!a && info->si_code != SEGV_MAPERR && info->si_code != SEGV_ACCERR))
    violate(cudaErrorMisalignedAddress, "misaligned access, or an address that no pointer can have");
  if (!is_device(a)) violate(cudaErrorIllegalAddress, "out-of-bounds access: %p is no address of the device", a);
  violate(cudaErrorIllegalAddress, "out-of-bounds global access: %s", describe(a, 0).c_str());
}

#if HM_EMU_ASAN
__attribute__((no_sanitize_address))
#endif
void on_fault(int number, siginfo_t *info, void *context) {
  const uintptr_t a = (uintptr_t)info->si_addr;
  const bool ours = a >= arena_begin && a < arena_end;
  if (device_side()) {
    if (ours) {
      block *const b = block_on_page(a);
      if (b && fenced) {
        open_window(b, a);
        return;
      }
    }
    if (in_kernel()) violate_address(info);
  }
  if (ours) report("host access to device memory: %s; copy it with cudaMemcpy", describe(info->si_addr, 0).c_str());
  pass_on(number, info, context);
}

/* A thread that overflowed its stack cannot handle the fault on it. */
void give_signal_stack(void) {
  static thread_local bool given;
  if (given) return;
  given = true;
  stack_t now;
  if (sigaltstack(nullptr, &now) || !(now.ss_flags & SS_DISABLE)) return;
  stack_t own = {};
  own.ss_size = 256u << 10;
  own.ss_sp = mmap(nullptr, own.ss_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (own.ss_sp != MAP_FAILED) sigaltstack(&own, nullptr);
}

void catch_faults(void) {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &former[0]);
  sigaction(SIGBUS, &action, &former[1]);
}

/* ====== Addresses ====== */

bool make_arena(void) {
  if (arena_begin) return true;
  page = (size_t)sysconf(_SC_PAGESIZE);
  fenced = setting("HALFMOON_EMU_FENCE", true);
  for (size_t bytes = (size_t)256 << 30; bytes >= (size_t)1 << 30; bytes /= 2) {
    void *const m = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) continue;
    arena_begin = cursor = (uintptr_t)m;
    arena_end = arena_begin + bytes;
    catch_faults();
    return true;
  }
  return false;
}

/* Room for `bytes` between closed pages, or 0: from where the last one was found, once around. */
uintptr_t find_room(size_t bytes) {
  for (int round = 0; round < 2; round++) {
    auto next = blocks.lower_bound(cursor);
    for (; next != blocks.end(); ++next) {
      if (cursor + bytes + 2 * GAP <= next->second.page_begin) break;
      cursor = next->second.page_end;
    }
    if (next != blocks.end() || cursor + bytes + 2 * GAP <= arena_end) return cursor + GAP;
    cursor = arena_begin;
  }
  return 0;
}

} // namespace

size_t device_memory_total(void) { return (size_t)setting_number("HALFMOON_EMU_MEMORY", 4096) << 20; }

size_t device_memory_free(void) {
  const size_t held = in_use + (size_t)(default_pool.reserved - default_pool.used);
  return device_memory_total() > held ? device_memory_total() - held : 0;
}

bool is_device(const void *p) { return (uintptr_t)p >= arena_begin && (uintptr_t)p < arena_end; }

void *device_alloc(size_t bytes, pool *from) {
  if (!make_arena() || bytes > device_memory_total() || in_use + bytes > device_memory_total()) return nullptr;
  const size_t pages = round_up(round_up(bytes, ALIGN), page);
  const uintptr_t at = find_room(pages);
  if (!at) return nullptr;
  cursor = at + pages;
  block b = {};
  b.page_begin = at;
  b.page_end = at + pages;
  b.begin = b.page_end - round_up(bytes, ALIGN);
  b.end = b.begin + bytes;
  b.from = from;
  if (mprotect((void *)at, pages, PROT_READ | PROT_WRITE)) return nullptr;
#ifdef MADV_POPULATE_WRITE
  madvise((void *)at, pages, MADV_POPULATE_WRITE); /* all at once: a fault for each page costs more */
#endif
  memset((void *)b.begin, 0xff, round_up(bytes, 2));
  fence_range(b.page_begin, b.begin, true);
  fence_range(HM_EMU_ASAN ? b.end : tail_of(b), b.page_end, true);
  b.low = b.page_begin;
  b.high = b.page_end;
  if (fenced) close_block(&b);
  blocks[at] = b;
  in_use += bytes;
  stats.allocations++;
  stats.live_allocations++;
  stats.live_bytes += bytes;
  stats.peak_bytes = std::max(stats.peak_bytes, stats.live_bytes);
  if (from) {
    from->used += bytes;
    from->used_high = std::max(from->used_high, from->used);
    from->reserved = std::max(from->reserved, (uint64_t)round_up(from->used, 2u << 20));
    from->reserved_high = std::max(from->reserved_high, from->reserved);
  }
  return (void *)b.begin;
}

bool device_free(void *p) {
  block *const b = block_at(p);
  if (!b) return false;
  const size_t bytes = b->end - b->begin;
  if (!fenced) check_fences(b);
  fence_range(b->page_begin, b->page_end, false);
  madvise((void *)b->page_begin, b->page_end - b->page_begin, MADV_DONTNEED);
  mprotect((void *)b->page_begin, b->page_end - b->page_begin, PROT_NONE);
  freed.push_back({b->begin, b->end});
  if (freed.size() > 1000) freed.pop_front();
  in_use -= bytes;
  stats.frees++;
  stats.live_allocations--;
  stats.live_bytes -= bytes;
  if (b->from) b->from->used -= bytes;
  blocks.erase(b->page_begin);
  return true;
}

block *block_at(const void *p) {
  block *const b = is_device(p) ? block_on_page((uintptr_t)p) : nullptr;
  return b && b->begin == (uintptr_t)p ? b : nullptr;
}

block *block_with(const void *p, size_t bytes) {
  block *const b = is_device(p) ? block_on_page((uintptr_t)p) : nullptr;
  return b && (uintptr_t)p >= b->begin && (uintptr_t)p + bytes <= b->end ? b : nullptr;
}

std::string describe(const void *p, size_t bytes) {
  const uintptr_t a = (uintptr_t)p;
  char text[256];
  char what[64] = "address";
  if (bytes) snprintf(what, sizeof what, "%zu bytes at", bytes);
  auto i = blocks.upper_bound(a);
  const block *const after = i == blocks.end() ? nullptr : &i->second;
  const block *const before = i == blocks.begin() ? nullptr : &std::prev(i)->second;
  for (const auto &range : freed) {
    if (a < range.first || a >= range.second) continue;
    snprintf(text, sizeof text, "%s %p: in memory that was freed (%zu bytes)", what, p,
             (size_t)(range.second - range.first));
    return text;
  }
  if (before && a >= before->begin && a < before->end)
    snprintf(text, sizeof text, "%s %p: byte %zu of an allocation of %zu bytes", what, p, (size_t)(a - before->begin),
             (size_t)(before->end - before->begin));
  else if (before && a - before->end < GAP)
    snprintf(text, sizeof text, "%s %p: %zu bytes past the end of an allocation of %zu bytes", what, p,
             (size_t)(a - before->end), (size_t)(before->end - before->begin));
  else if (after && after->begin - a < GAP)
    snprintf(text, sizeof text, "%s %p: %zu bytes before an allocation of %zu bytes", what, p,
             (size_t)(after->begin - a), (size_t)(after->end - after->begin));
  else snprintf(text, sizeof text, "%s %p: no live allocation is near", what, p);
  return text;
}

/* ====== Pools: counters only; a real pool keeps what is freed up to its threshold ====== */

void pool_trim(pool *p, uint64_t keep) {
  const uint64_t least = std::max((uint64_t)round_up(p->used, 2u << 20), keep);
  p->reserved = std::min(p->reserved, least);
}

void pool_synchronised(void) { pool_trim(&default_pool, default_pool.threshold); }

/* ====== Access ====== */

device_access::device_access() {
  give_signal_stack();
  if (depth++ == 0) holder = pthread_self();
}

device_access::~device_access() {
  if (depth == 1) {
    for (; opened; opened = opened->next_open) {
      check_fences(opened);
      close_block(opened);
    }
  }
  depth--;
}

} // namespace hm_emu
