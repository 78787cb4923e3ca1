// CPU twin of fused_adamw.cu: same interface, same arithmetic (adamw.h), same chunks, OpenMP over the chunks.
// The chunks' partial sums are added in order, so no result depends on the number of threads.
#include "adamw.h"

#include <algorithm>
#include <vector>

namespace fastasync {
namespace {

inline float load(const float* source, int64_t i) { return source[i]; }

inline float load(const uint16_t* source, int64_t i) {
  const uint32_t bits = uint32_t(source[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);  // a NaN stays one
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                  // to nearest, ties to even
}

struct Chunk {
  int64_t entry, begin, end;
};

std::vector<Chunk> chunks_in_order(const Entry* entries, int64_t count) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t begin = 0; begin < entries[i].numel; begin += kChunk)
      chunks.push_back({i, begin, std::min(begin + kChunk, entries[i].numel)});
  return chunks;
}

template <class Grad>
double sum_of_squares(const Grad* grad, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double value = load(grad, i);
    sum += value * value;
  }
  return sum;
}

template <class Grad, bool kEma>
void update_chunk(const Entry& e, int64_t begin, int64_t end, float grad_factor, const Factors& f,
                  const Coefficients& c) {
  const Grad* __restrict__ grad = static_cast<const Grad*>(e.grad);
  float* __restrict__ master = e.master;
  float* __restrict__ exp_avg = e.exp_avg;
  float* __restrict__ exp_avg_sq = e.exp_avg_sq;
  float* __restrict__ ema = e.ema;
  for (int64_t i = begin; i < end; ++i) {
    float average = kEma ? ema[i] : 0.0f;
    update<kEma>(load(grad, i) * grad_factor, master[i], exp_avg[i], exp_avg_sq[i], average, f, c);
    if (kEma) ema[i] = average;
  }
  if (e.working)
    for (int64_t i = begin; i < end; ++i) e.working[i] = to_bf16(master[i]);
}

}  // namespace
}  // namespace fastasync

using namespace fastasync;

int fastasync_adamw_abi() { return kAbi; }
int64_t fastasync_adamw_chunk() { return kChunk; }
int fastasync_adamw_ready() { return 0; }
const char* fastasync_adamw_error(int) { return "unknown error"; }

int fastasync_adamw_norm(const Entry* entries, int64_t count, double grad_scale, double max_norm, double* partials,
                         float* status, int place, void*) {
  const std::vector<Chunk> chunks = chunks_in_order(entries, count);
  const int64_t total = int64_t(chunks.size());
#pragma omp parallel for schedule(static) num_threads(place)
  for (int64_t i = 0; i < total; ++i) {
    const Entry& e = entries[chunks[i].entry];
    partials[i] = e.grad_is_bf16
                      ? sum_of_squares(static_cast<const uint16_t*>(e.grad), chunks[i].begin, chunks[i].end)
                      : sum_of_squares(static_cast<const float*>(e.grad), chunks[i].begin, chunks[i].end);
  }
  double sum = 0;
  for (int64_t i = 0; i < total; ++i) sum += partials[i];
  finish_norm(sum, grad_scale, max_norm, status);
  return 0;
}

int fastasync_adamw_step(const Entry* entries, int64_t count, const Hyper* hyper, const float* status, Factors* factors,
                         int place, void*) {
  if (status && status[kSkip] != 0.0f) return 0;
  const float grad_factor = status ? status[kGradFactor] : float(hyper->grad_scale);
  const Coefficients c = coefficients(*hyper);
  for (int64_t i = 0; i < count; ++i) {
    *entries[i].step += 1.0f;
    factors[i] = factors_of(*hyper, *entries[i].step);
  }
  const std::vector<Chunk> chunks = chunks_in_order(entries, count);
  const int64_t total = int64_t(chunks.size());
#pragma omp parallel for schedule(static) num_threads(place)
  for (int64_t i = 0; i < total; ++i) {
    const Entry& e = entries[chunks[i].entry];
    const auto run = e.grad_is_bf16 ? (e.ema ? update_chunk<uint16_t, true> : update_chunk<uint16_t, false>)
                                    : (e.ema ? update_chunk<float, true> : update_chunk<float, false>);
    run(e, chunks[i].begin, chunks[i].end, grad_factor, factors[chunks[i].entry], c);
  }
  return 0;
}
