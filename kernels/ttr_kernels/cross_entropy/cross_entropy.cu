// Cross-entropy of rows of logits: a row is read once for its loss; for the gradient what registers could not hold of it
// is read once more, latest first, while a cache still has it.
//
// Rows may begin anywhere (those of 50257 classes do). What lies between multiples of 16 bytes is worked on tile by tile,
// of which each thread holds ITEMS vectors; of the few elements before and after, each is one thread's, its `edge`.
#include "rows.cuh"

typedef TTR_T T;
#if TTR_INDEX_BYTES == 8
typedef long long Index;
#else
typedef int Index;
#endif

constexpr int TILE = ROW_THREADS * ITEMS * VECTOR, NO_CLASS = 0x7fffffff;
constexpr float LOWEST = -3.402823466e38f, LOG2_E = 1.44269504f;
// Targets that are no class: one that is to be ignored, and one outside the vocabulary, which makes its row NaN.
constexpr int IGNORED = -1, WRONG = -2;

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

__device__ __forceinline__ int target_of(
    const Index* targets, long long stride, long long row, long long ignore_index, int width) {
  const long long target = targets[row * stride];
  if (target == ignore_index) return IGNORED;
  return target >= 0 && target < width ? int(target) : WRONG;
}

// Where a row's vectors begin and end, and which element outside them is this thread's: -1 if none is.
struct Span {
  int begin, end, edge;
};
__device__ __forceinline__ int elements_to_vector(const T* row) {
  return int((0 - reinterpret_cast<unsigned long long>(row)) % 16 / sizeof(T));
}
__device__ __forceinline__ Span span_of(const T* row, int width) {
  Span span;
  span.begin = min(elements_to_vector(row), width);
  span.end = span.begin + (width - span.begin) / VECTOR * VECTOR;
  const int before = place_in_row(), after = span.end + place_in_row() - VECTOR;
  span.edge = before < span.begin ? before : before >= VECTOR && after < width ? after : -1;
  return span;
}

// The tile that begins at element `first`; −∞ behind the last vector.
__device__ __forceinline__ Row load_tile(const T* x, const Span& span, int first) {
  Row tile;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int at = first + element_of(i);
    if (at < span.end) {
      load_vec(x + at, tile.v[i]);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) tile.v[i][j] = -INFINITY;
    }
  }
  return tile;
}
__device__ __forceinline__ float load_edge(const T* x, const Span& span) {
  return span.edge >= 0 ? to_float(x[span.edge]) : -INFINITY;
}

// `aligned` says that y's vectors lie where x's do.
__device__ __forceinline__ void store_tile(T* y, const Span& span, int first, bool aligned, const Row& tile) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int at = first + element_of(i);
    if (at >= span.end) continue;
    if (aligned) {
      store_vec(y + at, tile.v[i]);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) y[at + j] = from_float<T>(tile.v[i][j]);
    }
  }
}

// Of some of a row's logits: the largest, Σ exp(logit − largest), Σ (hit − logit), and the first that is the largest.
struct Statistics {
  float largest, total, above;
  int best;
};
__device__ __forceinline__ Statistics of_nothing() { return Statistics{LOWEST, 0.0f, 0.0f, NO_CLASS}; }

template <bool BEST>
__device__ __forceinline__ void add_tile(
    Statistics& s, const Row& tile, int first, const Span& span, float hit, float smoothing) {
  float largest = s.largest;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) largest = fmaxf(largest, tile.v[i][j]);
  if (BEST && largest > s.largest) {
#pragma unroll
    for (int i = ITEMS - 1; i >= 0; --i)
#pragma unroll
      for (int j = VECTOR - 1; j >= 0; --j)
        if (tile.v[i][j] == largest) s.best = first + element_of(i) + j;
  }
  s.total *= exp_fast(s.largest - largest);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) s.total += exp_fast(tile.v[i][j] - largest);
  s.largest = largest;
  if (smoothing > 0.0f) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (first + element_of(i) < span.end) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) s.above += hit - tile.v[i][j];
      }
  }
}
// Once, after all tiles.
__device__ __forceinline__ void add_edge(Statistics& s, float edge, const Span& span, float hit) {
  if (span.edge < 0) return;
  const float largest = fmaxf(s.largest, edge);
  if (edge > s.largest) s.best = span.edge;
  else if (edge == s.largest) s.best = min(s.best, span.edge);
  s.total = s.total * exp_fast(s.largest - largest) + exp_fast(edge - largest);
  s.above += hit - edge;
  s.largest = largest;
}

__device__ __forceinline__ Statistics over_warp(Statistics s) {
  const float largest = warp_max(s.largest);
  s.best = __reduce_min_sync(FULL_WARP, s.largest == largest ? s.best : NO_CLASS);
  s.total = warp_sum(s.total * exp_fast(s.largest - largest));
  s.above = warp_sum(s.above);
  s.largest = largest;
  return s;
}

// Over the threads of a row, the same bits in all of them. What they read of the row before, any may overwrite after.
__device__ __forceinline__ Statistics over_row(Statistics s, Statistics* places) {
  s = over_warp(s);
  if (ROW_THREADS == 32) {
    __syncwarp();
    return s;
  }
  const int lane = threadIdx.x % 32;
  if (lane == 0) places[threadIdx.x / 32] = s;
  __syncthreads();
  s = of_nothing();
  if (lane < ROW_THREADS / 32) s = places[lane];
  return over_warp(s);
}

__device__ __forceinline__ float loss_of(
    const Statistics& s, int target, float hit, int width, float smoothing, float z) {
  if (target == IGNORED) return 0.0f;
  const float log_total = logf(s.total), lse = s.largest + log_total;
  // Both terms are small where the loss is; lse − hit would round to the logits' magnitude first.
  float loss = log_total - (hit - s.largest) + z * lse * lse;
  if (smoothing > 0.0f) loss += smoothing * (s.above / float(width));
  return loss;
}

// A logit's gradient is exp(logit − largest) · factor − share, less `hit` at the target, and 0 where that is ignored:
// only where all are is `count` 0.
struct Slope {
  float largest, factor, share, hit;
  int target;
};
__device__ __forceinline__ Slope slope_of(
    float largest, float total, int target, float dloss, int count, int width, float smoothing, float z) {
  const float scale = target == WRONG ? not_a_number() : dloss / float(count);
  const float factor = scale * (1.0f + 2.0f * z * (largest + logf(total))) / total;
  return Slope{largest, factor, scale * (smoothing / float(width)), scale * (1.0f - smoothing), target};
}
__device__ __forceinline__ float gradient_of(float logit, int at, const Slope& slope) {
  float gradient = exp_fast(logit - slope.largest) * slope.factor - slope.share;
  if (at == slope.target) gradient -= slope.hit;
  return slope.target == IGNORED ? 0.0f : gradient;
}
__device__ __forceinline__ void to_gradient(Row& tile, int first, const Slope& slope) {
#pragma unroll
  for (int i = 0; i < ITEMS; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j)
      tile.v[i][j] = gradient_of(tile.v[i][j], first + element_of(i) + j, slope);
}

// losses (rows), and normalizer (2, rows): each row's largest logit, and Σ exp(logit − largest).
extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_forward(
    const T* logits, long long stride, long long rows, long long width_, const Index* targets, long long target_stride,
    long long ignore_index, float smoothing, float z, float* losses, float* normalizer) {
  TTR_SHARED(Statistics, places, 32);
  const int width = int(width_);
  const long long row = (long long)blockIdx.x * BLOCK_ROWS + row_in_block();
  if (row >= rows) return;
  const T* x = logits + row * stride;
  const int target = target_of(targets, target_stride, row, ignore_index, width);
  const float hit = target >= 0 ? to_float(x[target]) : not_a_number();
  const Span span = span_of(x, width);
  const float edge = load_edge(x, span);
  Statistics s = of_nothing();
#pragma unroll 1
  for (int first = span.begin; first < span.end; first += TILE)
    add_tile<false>(s, load_tile(x, span, first), first, span, hit, smoothing);
  add_edge(s, edge, span, hit);
  s = over_row(s, places);
  if (place_in_row() > 0) return;
  losses[row] = loss_of(s, target, hit, width, smoothing, z);
  normalizer[row] = s.largest;
  normalizer[rows + row] = s.total;
}

// The gradient of the mean loss, times *dloss_at, or dloss if that is null. dlogits may be logits.
extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_backward(
    const T* logits, long long stride, long long rows, long long width_, const Index* targets, long long target_stride,
    long long ignore_index, float smoothing, float z, const float* normalizer, const int* count, const float* dloss_at,
    float dloss, T* dlogits, long long dlogits_stride) {
  const int width = int(width_);
  const long long row = (long long)blockIdx.x * BLOCK_ROWS + row_in_block();
  if (row >= rows) return;
  const T* x = logits + row * stride;
  T* dx = dlogits + row * dlogits_stride;
  const int target = target_of(targets, target_stride, row, ignore_index, width);
  const bool aligned = elements_to_vector(dx) == elements_to_vector(x);
  const Span span = span_of(x, width);
  const Slope slope = slope_of(normalizer[row], normalizer[rows + row], target, dloss_at ? *dloss_at : dloss, *count,
                               width, smoothing, z);
#pragma unroll 1
  for (int first = span.begin; first < span.end; first += TILE) {
    Row tile = {};
    if (target != IGNORED) tile = load_tile(x, span, first);
    to_gradient(tile, first, slope);
    store_tile(dx, span, first, aligned, tile);
  }
  if (span.edge >= 0) dx[span.edge] = from_float<T>(gradient_of(load_edge(x, span), span.edge, slope));
}

// Losses, most probable classes, and (with `gradient`) the gradient of the mean loss in place of the logits.
extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_in_place(
    T* logits, long long stride, long long rows, long long width_, const Index* targets, long long target_stride,
    long long ignore_index, float smoothing, float z, const int* count, float* losses, int* best, long long gradient) {
  TTR_SHARED(Statistics, places, 32);
  const int width = int(width_);
  const long long row = (long long)blockIdx.x * BLOCK_ROWS + row_in_block();
  if (row >= rows) return;
  T* x = logits + row * stride;
  const int target = target_of(targets, target_stride, row, ignore_index, width);
  const float hit = target >= 0 ? to_float(x[target]) : not_a_number();
  const Span span = span_of(x, width);
  const float edge = load_edge(x, span);
  Statistics s = of_nothing();
  Row tile;
  int first = span.begin;
#pragma unroll 1
  while (true) {
    tile = load_tile(x, span, first);
    add_tile<true>(s, tile, first, span, hit, smoothing);
    if (first + TILE >= span.end) break;
    first += TILE;
  }
  add_edge(s, edge, span, hit);
  s = over_row(s, places);
  if (place_in_row() == 0) {
    losses[row] = loss_of(s, target, hit, width, smoothing, z);
    best[row] = s.best < width ? s.best : 0;
  }
  if (!gradient) return;
  const Slope slope = slope_of(s.largest, s.total, target, 1.0f, *count, width, smoothing, z);
  if (span.edge >= 0) x[span.edge] = from_float<T>(gradient_of(edge, span.edge, slope));
#pragma unroll 1
  while (true) {
    to_gradient(tile, first, slope);
    store_tile(x, span, first, true, tile);
    if (first == span.begin) break;
    first -= TILE;
    if (target != IGNORED) tile = load_tile(x, span, first);
  }
}
