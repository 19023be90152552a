/*
 * exec.cpp -- runs one kernel: blocks in turn, the threads of a block on fibers.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Called by stream.cpp (run_kernel) and by device code through the table of
 * services (emu_device.h).
 *
 * A thread runs until it waits: at a barrier, for all threads of its block; at a warp operation, for the lanes of its mask.  One that never
 * waits costs no switch: its fiber goes on with the next thread.  Whoever waits picks what runs next: a thread that may go on, else the next
 * one that has not started, else the host's stack, which then sees whether all have ended.  The order in which threads start and wake, and
 * that of the blocks, is ascending, descending or random: a kernel that is right gives the same result in all of them.
 *
 * Violations (violate) end the kernel: the host's stack takes over, the fibers are rewound, and the context keeps the error.
 */
#include "emu.h"

#include <algorithm>
#include <cstdarg>
#include <map>
#include <vector>
#include <stdlib.h>
#include <sys/mman.h>

#if HM_EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif
#if HM_EMU_TSAN
extern "C" {
void __tsan_acquire(void *);
void __tsan_release(void *);
}
#else
static inline void __tsan_acquire(void *) {}
static inline void __tsan_release(void *) {}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
uint64_t hm_emu_epoch;

namespace hm_emu {

namespace {

enum state : uint8_t { FRESH, READY, AT_BARRIER, AT_WARP, DONE };

struct thread {
  uint3 index;
  state now;
  fiber *on;
  const char *file, *what; /* where it waits */
  int line, id;
  uint32_t mask;
};

enum { REDZONE = 64 };
const uint16_t CANARY = 0xffad; /* a NaN in every floating format, and different from the fill */

struct array { /* a shared array of the running block */
  size_t offset, bytes;
  const char *name;
};

/* The running kernel. */
struct execution {
  const launch *what;
  const indices *where;
  std::vector<thread> threads;
  std::vector<int> start; /* order in which threads start */
  std::vector<int> ready; /* ring: threads that may go on */
  size_t ready_head, n_ready;
  std::vector<std::vector<rendezvous *>> meetings; /* by warp: not complete yet */
  int n, next, done, at_barrier, current;
  vote collecting, result;
  unsigned phase;
  order how;
  uint64_t random;
  fiber host;
  fiber *running;
  bool aborted;
  std::vector<array> arrays;
  size_t shared_top, shared_bytes;
};
execution &K = *new execution(); /* like the rest, never destroyed */

auto &idle = *new std::vector<fiber *>, &all_fibers = *new std::vector<fiber *>;
auto &spare_meetings = *new std::vector<rendezvous *>;
unsigned char *shared_base; /* SHARED_BYTES between guard pages */
const size_t SHARED_BYTES = 512u << 10;
auto &opted_in = *new std::map<const void *, size_t>;
char start_point, end_point, barrier_point[2]; /* ThreadSanitizer's names for what orders threads */

const indices own_indices = {&threadIdx, &blockIdx, &blockDim, &gridDim, &hm_emu_epoch};

uint64_t next_random(void) {
  K.random ^= K.random << 13;
  K.random ^= K.random >> 7;
  K.random ^= K.random << 17;
  return K.random;
}

template <class T> void shuffle_list(T *list, size_t n) {
  for (size_t i = n; i > 1; i--) std::swap(list[i - 1], list[next_random() % i]);
}

/* ====== Choosing who runs ====== */

void wake(int t) {
  K.threads[t].now = READY;
  K.ready[(K.ready_head + K.n_ready++) % K.n] = t;
}

/* The thread to run next, or -1.  Those that have started go first, so that a warp runs as far ahead as it can. */
int choose(void) {
  const bool fresh = K.next < K.n;
  if (K.n_ready && !(fresh && K.how.kind == RANDOM && (next_random() & 1))) {
    if (K.how.kind == RANDOM)
      std::swap(K.ready[K.ready_head], K.ready[(K.ready_head + next_random() % K.n_ready) % K.n]);
    const int t = K.ready[K.ready_head];
    K.ready_head = (K.ready_head + 1) % K.n;
    K.n_ready--;
    return t;
  }
  return fresh ? K.start[K.next++] : -1;
}

void set_current(int t) {
  K.current = t;
  *K.where->thread = K.threads[t].index;
}

void thread_loop(void);

fiber *take_fiber(void) {
  if (idle.empty()) {
    fiber *const f = fiber_new(thread_loop);
    if (!f) violate(cudaErrorLaunchOutOfResources, "no memory for the stacks of the block's threads");
    all_fibers.push_back(f);
    return f;
  }
  fiber *const f = idle.back();
  idle.pop_back();
  return f;
}

void switch_to(fiber *to, bool dying = false) {
  fiber *const from = K.running;
  K.running = to;
  fiber_switch(from, to, dying);
}

/* Runs somebody else until the calling thread may go on. */
void wait(void) {
  const int me = K.current;
  const int t = choose();
  if (t == me) {
    K.threads[me].now = READY;
    return;
  }
  if (t < 0) {
    switch_to(&K.host);
  } else {
    thread &other = K.threads[t];
    if (other.now == FRESH) other.on = take_fiber();
    set_current(t);
    switch_to(other.on);
  }
  set_current(me);
}

/* ====== Shared memory ====== */

/* memset, unseen by ThreadSanitizer: what the scheduler writes is no access of the thread on whose fiber it runs. */
void fill(unsigned char *p, unsigned char byte, size_t bytes) {
#if HM_EMU_TSAN
  for (size_t i = 0; i < bytes; i++) ((volatile unsigned char *)p)[i] = byte;
#else
  memset(p, byte, bytes);
#endif
}

void fill_canary(unsigned char *p, size_t bytes) {
  for (size_t i = 0; i + 2 <= bytes; i += 2) *(volatile uint16_t *)(p + i) = CANARY;
#if HM_EMU_ASAN
  __asan_poison_memory_region(p, bytes);
#endif
}

const unsigned char *redzone_image(void) {
  static unsigned char image[REDZONE];
  if (!image[0]) {
    for (size_t i = 0; i < REDZONE; i += 2) memcpy(image + i, &CANARY, 2);
  }
  return image;
}

/* Lays an array of `bytes` down behind the others, filled with NaN, with a redzone after it. */
unsigned char *lay_array(size_t bytes, size_t align, const char *name) {
  const size_t offset =
      (K.shared_top + std::max(align, (size_t)16) - 1) / std::max(align, (size_t)16) * std::max(align, (size_t)16);
  unsigned char *const p = shared_base + offset;
#if HM_EMU_ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
  fill(p, 0xff, bytes);
  fill_canary(p + bytes, REDZONE);
  K.arrays.push_back({offset, bytes, name});
  K.shared_top = offset + bytes + REDZONE;
  return p;
}

void lay_first_redzone(void) {
#if HM_EMU_ASAN
  if (K.shared_top) __asan_unpoison_memory_region(shared_base, K.shared_top);
#endif
  K.arrays.clear();
  fill_canary(shared_base, REDZONE);
  K.shared_top = REDZONE;
}

/* Has the running thread, or one before it, written past a shared array? */
void check_redzones(void) {
  if (HM_EMU_ASAN || HM_EMU_TSAN || K.arrays.empty()) return;
  const unsigned char *const image = redzone_image();
  bool bad = memcmp(shared_base, image, REDZONE) != 0;
  for (const array &a : K.arrays) bad |= memcmp(shared_base + a.offset + a.bytes, image, REDZONE) != 0;
  if (!bad) return;
  for (const array &a : K.arrays) {
    const unsigned char *const end = shared_base + a.offset + a.bytes;
    for (size_t i = 0; i < REDZONE; i++)
      if (end[i] != image[i])
        violate(cudaErrorIllegalAddress,
                "out-of-bounds shared access: wrote %zu bytes past the end of '%s' (%zu bytes)", i & ~(size_t)1, a.name,
                a.bytes);
  }
  violate(cudaErrorIllegalAddress, "out-of-bounds shared access: wrote before the first shared array, '%s'",
          K.arrays[0].name);
}

void make_shared(slot *s, const char *name) {
  K.shared_bytes += s->bytes;
  const size_t fixed = K.shared_bytes - K.what->dynamic;
  if (fixed > SHARED_STATIC_LIMIT)
    violate(cudaErrorLaunchFailure, "%zu bytes of static shared memory with '%s': 48 KiB is the limit", fixed, name);
  if (K.shared_bytes > std::max((size_t)SHARED_STATIC_LIMIT, allowed_dynamic(K.what->kernel)))
    violate(cudaErrorLaunchFailure, "%zu bytes of shared memory with '%s': more than 48 KiB needs cudaFuncSetAttribute",
            K.shared_bytes, name);
  s->data = lay_array(s->bytes, s->align, name);
  s->epoch = *K.where->epoch;
  __tsan_release(s);
}

unsigned char *dynamic_shared(void) {
  if (!K.what->dynamic) violate(cudaErrorIllegalAddress, "dynamic shared memory is used, but the launch gave none");
  return shared_base + K.arrays[0].offset;
}

/* ====== Barriers ====== */

void release_barrier(void) {
  K.result = K.collecting;
  K.collecting = {0, 1, 0};
  K.at_barrier = 0;
  K.phase++;
  for (int i = 0; i < K.n; i++) {
    const int t = K.how.kind == DESCENDING ? K.n - 1 - i : i;
    if (K.threads[t].now == AT_BARRIER) wake(t);
  }
}

const thread *first_at_barrier(void) {
  for (const thread &t : K.threads)
    if (t.now == AT_BARRIER) return &t;
  return nullptr;
}

const vote *barrier(int id, const char *file, int line, int predicate) {
  check_redzones();
  if (K.at_barrier) {
    const thread *const other = first_at_barrier();
    if (other->id != id || other->line != line || (other->file != file && strcmp(other->file, file) != 0))
      violate(cudaErrorLaunchFailure, "divergent barrier: this thread waits at %s:%d, thread (%u,%u,%u) at %s:%d", file,
              line, other->index.x, other->index.y, other->index.z, other->file, other->line);
  }
  if (K.done)
    violate(cudaErrorLaunchFailure, "return before barrier: %d threads of the block ended before the barrier at %s:%d",
            K.done, file, line);
  thread &me = K.threads[K.current];
  me.now = AT_BARRIER;
  me.id = id;
  me.file = file;
  me.line = line;
  K.collecting.any |= predicate;
  K.collecting.all &= predicate;
  K.collecting.count += predicate;
  char *const point = &barrier_point[K.phase & 1]; /* two of them: a late waker must not see who arrives at the next */
  __tsan_release(point);
  if (++K.at_barrier == K.n) release_barrier();
  wait();
  __tsan_acquire(point);
  return &K.result;
}

/* ====== Warp operations ====== */

rendezvous *open_meeting(int warp, uint32_t mask, const char *what, int id, const char *file, int line) {
  for (const rendezvous *r : K.meetings[warp])
    if (r->mask & mask)
      violate(cudaErrorLaunchFailure, "%s at %s:%d: its mask %08x overlaps mask %08x of lanes that wait at %s:%d", what,
              file, line, mask, r->mask, r->file, r->line);
  rendezvous *r;
  if (spare_meetings.empty()) {
    r = new rendezvous;
  } else {
    r = spare_meetings.back();
    spare_meetings.pop_back();
  }
  r->mask = mask;
  r->arrived = 0;
  r->left = 0;
  r->id = id;
  r->line = line;
  r->file = file;
  r->what = what;
  K.meetings[warp].push_back(r);
  return r;
}

/* Lanes of the mask that do not exist or have ended cannot come. */
void check_lanes(int warp, uint32_t mask, const char *what, const char *file, int line) {
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1u)) continue;
    const int t = warp * 32 + i;
    if (t >= K.n)
      violate(cudaErrorLaunchFailure,
              "missing lane: %s at %s:%d has lane %d in its mask %08x, but the block has %d threads", what, file, line,
              i, mask, K.n);
    if (K.threads[t].now == DONE)
      violate(cudaErrorLaunchFailure, "missing lane: %s at %s:%d waits for lane %d of mask %08x, which has ended", what,
              file, line, i, mask);
  }
}

rendezvous *meet(uint32_t mask, uint64_t value, const char *what, int id, const char *file, int line) {
  const int warp = K.current >> 5, lane_id = K.current & 31;
  if (!(mask >> lane_id & 1u))
    violate(cudaErrorLaunchFailure, "%s at %s:%d: lane %d calls with mask %08x, which leaves it out", what, file, line,
            lane_id, mask);
  rendezvous *r = nullptr;
  for (rendezvous *other : K.meetings[warp])
    if (other->mask == mask) r = other;
  if (!r) {
    check_lanes(warp, mask, what, file, line);
    r = open_meeting(warp, mask, what, id, file, line);
  } else if (r->id != id || r->line != line) {
    violate(cudaErrorLaunchFailure,
            "%s at %s:%d meets %s at %s:%d: all lanes of a mask must execute the same operation", what, file, line,
            r->what, r->file, r->line);
  }
  r->value[lane_id] = value;
  r->arrived |= 1u << lane_id;
  r->left++;
  thread &me = K.threads[K.current];
  me.now = AT_WARP;
  me.file = file;
  me.line = line;
  me.what = what;
  me.mask = mask;
  __tsan_release(r);
  if (r->arrived == mask) {
    std::vector<rendezvous *> &open = K.meetings[warp];
    *std::find(open.begin(), open.end(), r) = open.back();
    open.pop_back();
    for (int i = 0; i < 32; i++) {
      const int k = K.how.kind == DESCENDING ? 31 - i : i;
      if (mask >> k & 1u) wake(warp * 32 + k);
    }
  }
  wait();
  __tsan_acquire(r);
  return r;
}

void leave(rendezvous *r) {
  if (--r->left == 0 && !HM_EMU_TSAN) spare_meetings.push_back(r);
}

void complain(cudaError_t code, const char *what, const char *file, int line) {
  violate(code, "%s (%s:%d)", what, file, line);
}

const services own_services = {barrier, meet, leave, make_shared, dynamic_shared, complain};

/* ====== Threads and blocks ====== */

/* What others wait for can no longer come true once this thread has ended. */
void check_end(void) {
  check_redzones();
  K.threads[K.current].now = DONE;
  K.done++;
  if (K.at_barrier) {
    const thread *const other = first_at_barrier();
    violate(cudaErrorLaunchFailure,
            "return before barrier: this thread ended while %d threads wait at the barrier at %s:%d", K.at_barrier,
            other->file, other->line);
  }
  for (const rendezvous *r : K.meetings[K.current >> 5])
    if (r->mask >> (K.current & 31) & 1u)
      violate(cudaErrorLaunchFailure,
              "missing lane: this thread ended while %s at %s:%d waits for lane %d of mask %08x", r->what, r->file,
              r->line, K.current & 31, r->mask);
}

/* A fiber's life: runs threads one after the other. */
void thread_loop(void) {
  fiber_entered();
  for (;;) {
    fiber *const me = K.running;
    int t = K.current;
    while (t >= 0) {
      thread &mine = K.threads[t];
      if (mine.now != FRESH) break;
      mine.on = me;
      mine.now = READY;
      set_current(t);
      __tsan_acquire(&start_point);
      K.what->call(K.what->frame.get());
      __tsan_release(&end_point);
      check_end();
      t = choose();
      if (HM_EMU_TSAN) break; /* a fiber for each thread, or the order of a program would hide races */
    }
    if (!HM_EMU_TSAN) idle.push_back(me);
    if (t < 0) {
      switch_to(&K.host);
    } else {
      if (K.threads[t].now == FRESH) K.threads[t].on = take_fiber();
      set_current(t);
      switch_to(K.threads[t].on);
    }
  }
}

/* All that can run has run: those that are left wait for ever. */
void check_deadlock(void) {
  if (K.done == K.n) return;
  const thread *stuck = nullptr;
  for (const thread &t : K.threads)
    if (t.now == AT_WARP || (t.now == AT_BARRIER && !stuck)) {
      stuck = &t;
      if (t.now == AT_WARP) break;
    }
  set_current((int)(stuck - K.threads.data()));
  if (stuck->now == AT_WARP) {
    const int warp = K.current >> 5;
    for (int i = 0; i < 32; i++) {
      if (!(stuck->mask >> i & 1u)) continue;
      const thread &lane_thread = K.threads[warp * 32 + i];
      if (lane_thread.now != AT_WARP || lane_thread.mask != stuck->mask)
        violate(cudaErrorLaunchFailure,
                "missing lane: %s at %s:%d waits for lane %d of mask %08x, which waits at %s:%d", stuck->what,
                stuck->file, stuck->line, i, stuck->mask, lane_thread.file, lane_thread.line);
    }
  }
  violate(cudaErrorLaunchFailure, "deadlock: %d of %d threads wait for ever, this one at %s:%d", K.n - K.done, K.n,
          stuck->file, stuck->line);
}

void begin_block(uint64_t which) {
  const dim3 &g = K.what->grid;
  *K.where->block = uint3{(unsigned)(which % g.x), (unsigned)(which / g.x % g.y), (unsigned)(which / g.x / g.y)};
  hm_emu_epoch++;
  *K.where->epoch = hm_emu_epoch;
  for (thread &t : K.threads) t.now = FRESH;
  K.next = K.done = K.at_barrier = 0;
  K.ready_head = K.n_ready = 0;
  K.collecting = {0, 1, 0};
  for (auto &m : K.meetings) m.clear();
  if (HM_EMU_TSAN) { /* fresh memory, or the last block's accesses would look like races; leaked, on purpose, until the process ends */
    shared_base = (unsigned char *)malloc(SHARED_BYTES);
    for (fiber *f : all_fibers) fiber_rewind(f, thread_loop);
    idle = all_fibers;
  }
  lay_first_redzone();
  K.shared_bytes = K.what->dynamic;
  if (K.what->dynamic) lay_array(K.what->dynamic, 16, "dynamic shared memory");
  if (K.what->raw_begin) memset(K.what->raw_begin, 0xff, (size_t)(K.what->raw_end - K.what->raw_begin));
  if (K.how.kind == RANDOM) shuffle_list(K.start.data(), K.start.size());
  __tsan_release(&start_point);
}

/* Runs one block; false after a violation. */
bool run_block(uint64_t which) {
  begin_block(which);
  for (int t = choose(); t >= 0; t = choose()) {
    if (K.threads[t].now == FRESH) K.threads[t].on = take_fiber();
    set_current(t);
    switch_to(K.threads[t].on);
    if (K.aborted) return false;
  }
  check_deadlock();
  return !K.aborted;
}

/* Threads and orders of a launch. */
void prepare(const launch &what) {
  K.what = &what;
  K.where = what.where ? what.where : &own_indices;
  K.n = (int)(what.block.x * what.block.y * what.block.z);
  K.threads.assign((size_t)K.n, thread{});
  K.start.resize((size_t)K.n);
  K.ready.resize((size_t)K.n);
  K.meetings.resize((size_t)(K.n + 31) / 32);
  for (int i = 0; i < K.n; i++) {
    const unsigned u = (unsigned)i;
    K.threads[i].index = uint3{u % what.block.x, u / what.block.x % what.block.y, u / what.block.x / what.block.y};
    K.start[i] = K.how.kind == DESCENDING ? K.n - 1 - i : i;
  }
  for (auto &m : K.meetings)
    m.reserve(32); /* nothing is to be moved while fibers run: ThreadSanitizer would take it for theirs */
  K.arrays.reserve(256);
  idle.reserve(1024);
  all_fibers.reserve(1024);
  *K.where->block_dim = what.block;
  *K.where->grid_dim = what.grid;
  K.host = fiber{};
  K.running = &K.host;
  K.aborted = false;
  if (!shared_base) {
    const size_t guard = 65536;
    void *const m = mmap(nullptr, SHARED_BYTES + 2 * guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    shared_base = (unsigned char *)m + guard;
    mprotect(shared_base, SHARED_BYTES, PROT_READ | PROT_WRITE);
  }
}

/* After a violation the fibers hold what nobody will resume. */
void drop_fibers(void) {
  idle.clear();
  for (fiber *f : all_fibers) {
    fiber_rewind(f, thread_loop);
    idle.push_back(f);
  }
}

/* A host pointer among the arguments would fault on a GPU. */
bool pointers_are_devices(const launch &what) {
  for (int i = 0; i < what.n_pointers; i++) {
    const void *const p = what.pointers[i].value;
    if (!p || is_device(p) || is_pinned(p, 1)) continue;
    report("kernel %s: argument %d is a host pointer (%p), which the device cannot reach", what.name,
           what.pointers[i].index + 1, p);
    set_sticky(cudaErrorIllegalAddress);
    return false;
  }
  return true;
}

} // namespace

const services *const table = &own_services;

order current_order(void) {
  const char *const text = getenv("HALFMOON_EMU_ORDER");
  order o = {ASCENDING, 1};
  if (!text) return o;
  if (!strcmp(text, "descending")) o.kind = DESCENDING;
  if (!strncmp(text, "random", 6)) {
    o.kind = RANDOM;
    if (text[6] == ':') o.seed = strtoull(text + 7, nullptr, 10);
  }
  return o;
}

bool in_kernel(void) { return K.what && K.running && K.running != &K.host; }

const char *running_kernel(void) { return K.what ? K.what->name : "(no kernel)"; }

const fiber *running_fiber(void) { return in_kernel() ? K.running : nullptr; }

void violate(cudaError_t code, const char *format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  const uint3 b = *K.where->block, t = K.threads.empty() ? uint3{} : K.threads[(size_t)K.current].index;
  report("kernel %s: block (%u,%u,%u) thread (%u,%u,%u): %s", K.what->name, b.x, b.y, b.z, t.x, t.y, t.z, text);
  set_sticky(code);
  K.aborted = true;
  if (in_kernel()) switch_to(&K.host, true);
  throw false; /* on the host's stack: run_kernel catches it */
}

cudaError_t check_launch(const launch &w) {
  const dim3 g = w.grid, b = w.block;
  const uint64_t threads = (uint64_t)b.x * b.y * b.z;
  if (!threads || threads > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64) {
    report("kernel %s: a block of %ux%ux%u threads: at most 1024 in all, 1024 by 1024 by 64", w.name, b.x, b.y, b.z);
    return cudaErrorInvalidConfiguration;
  }
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    report("kernel %s: a grid of %ux%ux%u blocks: from 1 to 2147483647 by 65535 by 65535", w.name, g.x, g.y, g.z);
    return cudaErrorInvalidConfiguration;
  }
  if (w.dynamic > std::max((size_t)SHARED_STATIC_LIMIT, allowed_dynamic(w.kernel))) {
    report(
        "kernel %s: %zu bytes of dynamic shared memory: more than 48 KiB needs cudaFuncSetAttribute, 227 KiB is the end",
        w.name, w.dynamic);
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

void run_kernel(const launch &what) {
  if (sticky() || !pointers_are_devices(what)) return;
  K.how = current_order();
  K.random = 88172645463325252ull ^ (K.how.seed * 0x9e3779b97f4a7c15ull + 1);
  prepare(what);
  try {
    device_access access;
    const uint64_t blocks = (uint64_t)what.grid.x * what.grid.y * what.grid.z;
    uint64_t step = 1, first = 0;
    if (K.how.kind == RANDOM &&
        blocks > 1) { /* a walk with a step that has no factor in common with the number of blocks */
      first = next_random() % blocks;
      for (step = next_random() % blocks | 1; std::__gcd(step, blocks) != 1;) step++;
    }
    for (uint64_t i = 0, which = first; i < blocks; i++, which = (which + step) % blocks)
      if (!run_block(K.how.kind == DESCENDING ? blocks - 1 - i : which)) break;
    __tsan_acquire(&end_point);
  } catch (bool) {}
  if (K.aborted) drop_fibers();
  K.what = nullptr;
  K.running = nullptr;
}

void allow_dynamic(const void *kernel, size_t bytes) { opted_in[kernel] = bytes; }

size_t allowed_dynamic(const void *kernel) {
  const auto i = opted_in.find(kernel);
  return i == opted_in.end() ? 0 : i->second;
}

} // namespace hm_emu
