/*
 * resample.cu -- averages over windows, adaptive averages and interpolation, with their gradients.
 *
 * All of them are weighted sums over a rectangle of the other side (window.h): one thread for each element of the result adds the
 * terms in the order of the rectangle.  Nothing is added atomically.
 */
#include "pixel.h"
#include "window.h"

struct resampling {
  hm_windows w;
  hm_pixels pixels; /* of the result */
  int64_t from_stride[4], to_stride[4];
  const void *from;
  void *to;
  int32_t from_dtype, to_dtype;
};

HM_DEV void axis_span(const hm_windows &w, const hm_axis &a, int64_t i, int64_t *from, int64_t *to, float) {
  hm_axis_span_f32(&w, &a, i, from, to);
}
HM_DEV void axis_span(const hm_windows &w, const hm_axis &a, int64_t i, int64_t *from, int64_t *to, double) {
  hm_axis_span_f64(&w, &a, i, from, to);
}
HM_DEV float axis_value(const hm_windows &w, const hm_axis &a, int64_t i, int64_t j, float) {
  return hm_axis_value_f32(&w, &a, i, j);
}
HM_DEV double axis_value(const hm_windows &w, const hm_axis &a, int64_t i, int64_t j, double) {
  return hm_axis_value_f64(&w, &a, i, j);
}
HM_DEV float weight(const hm_windows &w, float y, float x) { return hm_windows_weight_f32(&w, y, x); }
HM_DEV double weight(const hm_windows &w, double y, double x) { return hm_windows_weight_f64(&w, y, x); }

/* KIND and BACKWARD are those of p.w, known to the compiler: what the other kinds need takes no registers. */
template <class T, int KIND, bool BACKWARD>
static __global__ void __launch_bounds__(HM_BLOCK, 2) resample(resampling p) {
  hm_windows w = p.w;
  w.kind = KIND;
  w.backward = BACKWARD;
  const bool averages = !w.backward && w.kind <= HM_WINDOW_ADAPTIVE;
  for (uint32_t u = hm_global_thread(); u < p.pixels.walk.count; u += hm_global_threads()) {
    int64_t at[4], y0, y1, x0, x1;
    hm_pixel(p.pixels, u, at);
    const int64_t y = at[2], x = at[3];
    axis_span(w, w.y, y, &y0, &y1, T());
    axis_span(w, w.x, x, &x0, &x1, T());
    const bool careful = (y1 - y0) * (x1 - x0) > HM_WINDOW_CAREFUL;
    bool first = true;
    T sum = (T)0, lost = (T)0;
    for (int64_t sy = y0; sy < y1; sy++) {
      const T value = axis_value(w, w.y, y, sy, T());
      for (int64_t sx = x0; sx < x1; sx++) {
        const T by = weight(w, value, axis_value(w, w.x, x, sx, T()));
        const T term = by * hm_load<T>(p.from, p.from_dtype, hm_at(p.from_stride, at[0], at[1], sy, sx));
        if (first) {
          sum = term;
        } else if (careful) {
          const T more = term - lost, s = sum + more, l = (s - sum) - more;
          lost = l - l == (T)0 ? l : (T)0; /* infinity and NaN lose nothing */
          sum = s;
        } else {
          sum += term;
        }
        first = false;
      }
    }
    if (averages) sum = sum / (T)hm_windows_count(&w, y, x);
    hm_store<T>(p.to, p.to_dtype, hm_at(p.to_stride, at[0], at[1], y, x), sum);
  }
}

template <class T, int KIND> static int launch(const resampling &p, void *stream) {
  const unsigned blocks = hm_blocks(p.pixels.walk.count);
  if (p.w.backward) return HM_RUN("resample", (resample<T, KIND, true>), blocks, HM_BLOCK, 0, stream, p);
  return HM_RUN("resample", (resample<T, KIND, false>), blocks, HM_BLOCK, 0, stream, p);
}

template <class T> static int launch_kind(const resampling &p, void *stream) {
  switch (p.w.kind) {
  case HM_WINDOW_POOL: return launch<T, HM_WINDOW_POOL>(p, stream);
  case HM_WINDOW_ADAPTIVE: return launch<T, HM_WINDOW_ADAPTIVE>(p, stream);
  case HM_WINDOW_NEAREST: return launch<T, HM_WINDOW_NEAREST>(p, stream);
  default: return launch<T, HM_WINDOW_BILINEAR>(p, stream);
  }
}

int hm_cuda_resample(const hm_kernel_call *call) {
  const hm_view *from = &call->in[0], *to = &call->out[0];
  resampling p;
  memset(&p, 0, sizeof p);
  if (!hm_windows_make(&p.w, call))
    return hm_cuda_fail(HM_ERR_UNSUPPORTED, "the cuda backend has no pooling with op id %d", call->op);
  p.from = from->data, p.from_dtype = from->dtype;
  p.to = to->data, p.to_dtype = to->dtype;
  memcpy(p.from_stride, from->stride, sizeof p.from_stride);
  memcpy(p.to_stride, to->stride, sizeof p.to_stride);
  return hm_each_pixels(to, &p.pixels, [&]() {
    return call->compute == HM_F64 ? launch_kind<double>(p, call->stream) : launch_kind<float>(p, call->stream);
  });
}
