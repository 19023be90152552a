/*
 * stream.cpp -- streams as queues of work, events, and the order in which queued work runs.
 *
 * Test double: it shows no speed, no memory model, no real cuBLAS.  Owns streams and events.  Work normally runs when it is queued.  With
 * HALFMOON_EMU_DEFER=1 nothing runs before somebody waits for it, and then only what that wait demands: a missing synchronisation or a
 * missing event shows as stale or unset data.  Where several streams could go on, HALFMOON_EMU_ORDER chooses.
 *
 * The default stream is the legacy one: it waits for what blocking streams were given before, and they wait for it.
 */
#include "emu.h"

#include <algorithm>
#include <deque>
#include <set>
#include <vector>

struct item {
  uint64_t number; /* in order of queueing, over all streams */
  std::function<void()> work;
};

struct CUstream_st {
  std::deque<item> queue;
  bool blocking;
  int serial;
};

struct CUevent_st {
  CUstream_st *on;  /* NULL: never recorded */
  uint64_t pending; /* number of the recording that has not run; 0: complete */
  uint64_t stamp;   /* counts completed recordings: elapsed "time" */
  bool timing;
};

namespace hm_emu {

namespace {

CUstream_st &null_stream = *new CUstream_st{{}, true, 0};
auto &streams = *new std::vector<CUstream_st *>{&null_stream};
auto &events = *new std::set<CUevent_st *>; /* nothing here is destroyed before the process is gone */
uint64_t next_number = 1, clock_ticks;
int next_serial = 1;
uint64_t random_state = 1;

CUstream_st *find(cudaStream_t s) {
  if (!s || s == cudaStreamLegacy || s == cudaStreamPerThread) return &null_stream;
  return std::find(streams.begin(), streams.end(), s) != streams.end() ? s : nullptr;
}

void drain_until(CUstream_st *s, uint64_t number);

/* What an item on `s` waits for by the rules of the default stream. */
void wait_for_default(CUstream_st *s, uint64_t number) {
  if (s == &null_stream) {
    const std::vector<CUstream_st *> all = streams;
    for (CUstream_st *other : all)
      if (other != s && other->blocking) drain_until(other, number);
  } else if (s->blocking) {
    drain_until(&null_stream, number);
  }
}

void step(CUstream_st *s) {
  item one = std::move(s->queue.front());
  s->queue.pop_front();
  wait_for_default(s, one.number);
  one.work();
}

/* Runs what was queued on s before `number`. */
void drain_until(CUstream_st *s, uint64_t number) {
  while (!s->queue.empty() && s->queue.front().number < number) step(s);
}

CUstream_st *pick_busy(void) {
  std::vector<CUstream_st *> busy;
  for (CUstream_st *s : streams)
    if (!s->queue.empty()) busy.push_back(s);
  if (busy.empty()) return nullptr;
  const order how = current_order();
  if (how.kind == ASCENDING) return busy.front();
  if (how.kind == DESCENDING) return busy.back();
  random_state = random_state * 6364136223846793005ull + how.seed * 2 + 1;
  return busy[(random_state >> 33) % busy.size()];
}

bool deferred(void) { return setting("HALFMOON_EMU_DEFER", false); }

cudaError_t create(cudaStream_t *out, bool blocking) {
  if (!out) return note(cudaErrorInvalidValue);
  CUstream_st *const s = new CUstream_st{{}, blocking, next_serial++};
  streams.push_back(s);
  stats.live_objects++;
  *out = s;
  return cudaSuccess;
}

/* Runs the event's latest recording, and what its stream was given before. */
void reach(CUevent_st *e) {
  if (e->pending) drain_until(e->on, e->pending + 1);
}

bool known(cudaEvent_t e) { return events.count(e) != 0; }

} // namespace

bool push(cudaStream_t stream, std::function<void()> work) {
  CUstream_st *const s = find(stream);
  if (!s) return false;
  s->queue.push_back({next_number++, std::move(work)});
  if (!deferred()) {
    while (!s->queue.empty()) step(s);
  }
  return true;
}

bool stream_exists(cudaStream_t stream) { return find(stream) != nullptr; }

void drain(cudaStream_t stream) {
  CUstream_st *const s = find(stream);
  if (!s) return;
  if (s == &null_stream)
    wait_for_default(s, next_number); /* waiting for the default stream is waiting for what it waits for */
  while (!s->queue.empty()) step(s);
}

void drain_all(void) {
  while (CUstream_st *const s = pick_busy()) step(s);
}

void forget_streams(void) {
  for (CUstream_st *s : streams) s->queue.clear();
  for (CUevent_st *e : events) e->pending = 0;
}

} // namespace hm_emu

using namespace hm_emu;

#define ENTER(name)                                                                                                    \
  call entered(name);                                                                                                  \
  if (entered.error) return entered.error

/* ====== Streams ====== */

cudaError_t cudaStreamCreate(cudaStream_t *pStream) {
  ENTER("cudaStreamCreate");
  return create(pStream, true);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *pStream, unsigned int flags) {
  ENTER("cudaStreamCreateWithFlags");
  if (flags > cudaStreamNonBlocking) return note(cudaErrorInvalidValue);
  return create(pStream, flags == cudaStreamDefault);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *pStream, unsigned int flags, int) {
  ENTER("cudaStreamCreateWithPriority");
  if (flags > cudaStreamNonBlocking) return note(cudaErrorInvalidValue);
  return create(pStream, flags == cudaStreamDefault);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *leastPriority, int *greatestPriority) {
  ENTER("cudaDeviceGetStreamPriorityRange");
  if (leastPriority) *leastPriority = 0;
  if (greatestPriority) *greatestPriority = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  call entered("cudaStreamDestroy");
  CUstream_st *const s = find(stream);
  if (!s || s == &null_stream) return note(cudaErrorInvalidResourceHandle);
  drain(stream);
  for (CUevent_st *e : events)
    if (e->on == s) e->on = nullptr, e->pending = 0;
  streams.erase(std::find(streams.begin(), streams.end(), s));
  stats.live_objects--;
  delete s;
  return entered.error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER("cudaStreamSynchronize");
  if (!find(stream)) return note(cudaErrorInvalidResourceHandle);
  stats.synchronisations++;
  drain(stream);
  pool_synchronised();
  return note(sticky());
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  ENTER("cudaStreamQuery");
  const CUstream_st *const s = find(stream);
  if (!s) return note(cudaErrorInvalidResourceHandle);
  return s->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t fn, void *userData) {
  ENTER("cudaLaunchHostFunc");
  if (!fn) return note(cudaErrorInvalidValue);
  return push(stream, [=] { fn(userData); }) ? cudaSuccess : note(cudaErrorInvalidResourceHandle);
}

/* ====== Events ====== */

static cudaError_t create_event(cudaEvent_t *event, unsigned flags) {
  if (!event || flags > 7) return note(cudaErrorInvalidValue);
  *event = new CUevent_st{nullptr, 0, 0, !(flags & cudaEventDisableTiming)};
  events.insert(*event);
  stats.live_objects++;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
  ENTER("cudaEventCreate");
  return create_event(event, cudaEventDefault);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags) {
  ENTER("cudaEventCreateWithFlags");
  return create_event(event, flags);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  call entered("cudaEventDestroy");
  if (!known(event)) return note(cudaErrorInvalidResourceHandle);
  events.erase(event); /* who was told to wait for it still does */
  stats.live_objects--;
  delete event;
  return entered.error;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  ENTER("cudaEventRecord");
  CUstream_st *const s = find(stream);
  if (!known(event) || !s) return note(cudaErrorInvalidResourceHandle);
  const uint64_t number = next_number;
  event->on = s;
  event->pending = number;
  push(stream, [=] {
    if (!known(event)) return;
    event->stamp = ++clock_ticks;
    if (event->pending == number) event->pending = 0;
  });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER("cudaEventQuery");
  if (!known(event)) return note(cudaErrorInvalidResourceHandle);
  return event->pending ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER("cudaEventSynchronize");
  if (!known(event)) return note(cudaErrorInvalidResourceHandle);
  stats.synchronisations++;
  reach(event);
  pool_synchronised();
  return note(sticky());
}

/* Counts the recordings in between as milliseconds: the double knows no time. */
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  ENTER("cudaEventElapsedTime");
  if (!known(start) || !known(end) || !start->timing || !end->timing) return note(cudaErrorInvalidResourceHandle);
  if (!ms || !start->on || !end->on) return note(cudaErrorInvalidResourceHandle);
  if (start->pending || end->pending) return note(cudaErrorNotReady);
  *ms = (float)((double)end->stamp - (double)start->stamp);
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
  ENTER("cudaStreamWaitEvent");
  if (flags) return note(cudaErrorInvalidValue);
  if (!known(event) || !find(stream)) return note(cudaErrorInvalidResourceHandle);
  const uint64_t number = event->pending;
  if (!number) return cudaSuccess; /* nothing to wait for */
  CUstream_st *const on = event->on;
  push(stream, [=] {
    if (find(on)) drain_until(on, number + 1);
  });
  return cudaSuccess;
}
