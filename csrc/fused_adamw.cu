// Multi-tensor AdamW + EMA + bf16 working weights in one pass, and the gradients' norm before it.
//
// Bytes per parameter with bf16 gradients and working weights: norm 2; update 2 (gradient) + 4 x 8 (master, two moments,
// EMA, read and written) + 2 (working weights) = 38 in all.  Three kernels and a small one, no atomics, no host
// synchronisation, no device-side tables: the pointers travel as kernel parameters (CUDA 12.1 allows 32,764 bytes), so
// a launch can be captured in a CUDA graph and never reads a stale address.
#include "adamw.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace fastasync {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTensors = 512;  // per launch; XL has 412

struct Batch {
  float* master[kMaxTensors];
  const void* grad[kMaxTensors];
  float* exp_avg[kMaxTensors];
  float* exp_avg_sq[kMaxTensors];
  float* ema[kMaxTensors];
  uint16_t* working[kMaxTensors];
  int64_t numel[kMaxTensors];
  int32_t first_chunk[kMaxTensors];
  uint8_t grad_is_bf16[kMaxTensors];
  int32_t count;
};
struct StepBatch {
  float* step[kMaxTensors];
  int32_t count;
};
static_assert(sizeof(Batch) + 64 <= 32764, "kernel parameters are limited to 32,764 bytes");

// The tensor that owns this block's chunk: the last one whose first chunk is not after it (so never an empty one).
__device__ __forceinline__ int tensor_of(const Batch& batch, int chunk) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.first_chunk[middle] <= chunk) low = middle;
    else high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ bool aligned(const void* pointer, int bytes) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1)) == 0;
}

__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- norm ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float squares(float4 x, float sum) {
  return fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, sum))));
}
__device__ __forceinline__ float squares_bf16(uint4 x, float sum) {
  sum = squares(make_float4(low_half(x.x), high_half(x.x), low_half(x.y), high_half(x.y)), sum);
  return squares(make_float4(low_half(x.z), high_half(x.z), low_half(x.w), high_half(x.w)), sum);
}

// Sum over the block in a fixed order; the result is in thread 0.
template <int kBlock>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[kBlock / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < kBlock / 32; ++i) value += warps[i];
  return value;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Batch batch, double* partials) {
  const int tensor = tensor_of(batch, blockIdx.x);
  const int64_t start = int64_t(int(blockIdx.x) - batch.first_chunk[tensor]) * kChunk;
  const int64_t left = batch.numel[tensor] - start;
  const int n = int(left < kChunk ? left : kChunk);
  const bool bf16 = batch.grad_is_bf16[tensor];
  const char* grad = static_cast<const char*>(batch.grad[tensor]) + start * (bf16 ? 2 : 4);
  const int width = bf16 ? 8 : 4;  // elements in 16 bytes
  const int vectors = aligned(grad, 16) ? n / width : 0;
  const uint4* wide = reinterpret_cast<const uint4*>(grad);

  float sum = 0.0f;
  constexpr int kUnroll = 4;
  for (int base = threadIdx.x; base < vectors; base += kThreads * kUnroll) {
    uint4 x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      x[u] = base + u * kThreads < vectors ? __ldg(wide + base + u * kThreads) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      sum = bf16 ? squares_bf16(x[u], sum)
                 : squares(make_float4(__uint_as_float(x[u].x), __uint_as_float(x[u].y), __uint_as_float(x[u].z),
                                       __uint_as_float(x[u].w)),
                           sum);
  }
#pragma unroll 1
  for (int i = vectors * width + threadIdx.x; i < n; i += kThreads) {
    const float x = bf16 ? low_half(reinterpret_cast<const uint16_t*>(grad)[i]) : reinterpret_cast<const float*>(grad)[i];
    sum = fmaf(x, x, sum);
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

constexpr int kFinishThreads = 1024;

__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const double* partials, int64_t count, double grad_scale, double max_norm, float* status) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += partials[i];
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) finish_norm(sum, grad_scale, max_norm, status);
}

// ---- step ----------------------------------------------------------------------------------------------------------

// Advances the step counts and computes what depends on them once per tensor, in double, before any block needs it.
__global__ void advance_kernel(const __grid_constant__ StepBatch batch, const Hyper hyper, const float* status,
                               Factors* factors) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= batch.count || (status && status[kSkip] != 0.0f)) return;
  const float t = *batch.step[i] + 1.0f;
  *batch.step[i] = t;
  factors[i] = factors_of(hyper, t);
}

struct Chunk {
  float *master, *exp_avg, *exp_avg_sq, *ema;
  const void* grad;
  uint16_t* working;
  int n;
};

template <bool kBf16, bool kEma, bool kWorking>
__device__ __forceinline__ void update_chunk(const Chunk& chunk, float grad_factor, const Factors& f,
                                             const Coefficients& c) {
  const float* grad32 = static_cast<const float*>(chunk.grad);
  const uint16_t* grad16 = static_cast<const uint16_t*>(chunk.grad);
  bool wide = aligned(chunk.master, 16) && aligned(chunk.exp_avg, 16) && aligned(chunk.exp_avg_sq, 16) &&
              aligned(chunk.grad, kBf16 ? 8 : 16);
  if (kEma) wide = wide && aligned(chunk.ema, 16);
  if (kWorking) wide = wide && aligned(chunk.working, 8);
  const int vectors = wide ? chunk.n / 4 : 0;

  float4* master = reinterpret_cast<float4*>(chunk.master);
  float4* exp_avg = reinterpret_cast<float4*>(chunk.exp_avg);
  float4* exp_avg_sq = reinterpret_cast<float4*>(chunk.exp_avg_sq);
  float4* ema = reinterpret_cast<float4*>(chunk.ema);

  // All loads of kUnroll vectors before the first use: up to 160 bytes in flight per thread.  Everything streams
  // through once, so nothing deserves a place in the caches (__ldcs, __stcs).
  constexpr int kUnroll = 2;
  for (int base = threadIdx.x; base < vectors; base += kThreads * kUnroll) {
    float4 p[kUnroll], m[kUnroll], v[kUnroll], e[kUnroll], g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads;
      if (i < vectors) {
        if (kBf16) {
          const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(grad16) + i);
          g[u] = make_float4(low_half(bits.x), high_half(bits.x), low_half(bits.y), high_half(bits.y));
        } else {
          g[u] = __ldcs(reinterpret_cast<const float4*>(grad32) + i);
        }
        p[u] = __ldcs(master + i);
        m[u] = __ldcs(exp_avg + i);
        v[u] = __ldcs(exp_avg_sq + i);
        if (kEma) e[u] = __ldcs(ema + i);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads;
      if (i < vectors) {
        update<kEma>(g[u].x * grad_factor, p[u].x, m[u].x, v[u].x, e[u].x, f, c);
        update<kEma>(g[u].y * grad_factor, p[u].y, m[u].y, v[u].y, e[u].y, f, c);
        update<kEma>(g[u].z * grad_factor, p[u].z, m[u].z, v[u].z, e[u].z, f, c);
        update<kEma>(g[u].w * grad_factor, p[u].w, m[u].w, v[u].w, e[u].w, f, c);
        __stcs(master + i, p[u]);
        __stcs(exp_avg + i, m[u]);
        __stcs(exp_avg_sq + i, v[u]);
        if (kEma) __stcs(ema + i, e[u]);
        if (kWorking)  // the next forward pass reads it: left to the caches
          reinterpret_cast<uint2*>(chunk.working)[i] = make_uint2(pack(p[u].x, p[u].y), pack(p[u].z, p[u].w));
      }
    }
  }
#pragma unroll 1
  for (int i = vectors * 4 + threadIdx.x; i < chunk.n; i += kThreads) {
    const float g = kBf16 ? low_half(grad16[i]) : grad32[i];
    float e = kEma ? chunk.ema[i] : 0.0f;
    update<kEma>(g * grad_factor, chunk.master[i], chunk.exp_avg[i], chunk.exp_avg_sq[i], e, f, c);
    if (kEma) chunk.ema[i] = e;
    if (kWorking) chunk.working[i] = uint16_t(pack(chunk.master[i], 0.0f));
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    update_kernel(const __grid_constant__ Batch batch, const Coefficients c, float grad_scale, const float* status,
                  const Factors* factors) {
  if (status && status[kSkip] != 0.0f) return;
  const float grad_factor = status ? status[kGradFactor] : grad_scale;
  const int tensor = tensor_of(batch, blockIdx.x);
  const int64_t start = int64_t(int(blockIdx.x) - batch.first_chunk[tensor]) * kChunk;
  const int64_t left = batch.numel[tensor] - start;
  const bool bf16 = batch.grad_is_bf16[tensor];
  const bool has_ema = batch.ema[tensor] != nullptr, has_working = batch.working[tensor] != nullptr;
  const Chunk chunk = {batch.master[tensor] + start,
                       batch.exp_avg[tensor] + start,
                       batch.exp_avg_sq[tensor] + start,
                       batch.ema[tensor] + (has_ema ? start : 0),
                       static_cast<const char*>(batch.grad[tensor]) + start * (bf16 ? 2 : 4),
                       batch.working[tensor] + (has_working ? start : 0),
                       int(left < kChunk ? left : kChunk)};
  const Factors f = factors[tensor];
  // One branch for the whole block.
  if (bf16) {
    if (has_working) {
      if (has_ema) update_chunk<true, true, true>(chunk, grad_factor, f, c);
      else update_chunk<true, false, true>(chunk, grad_factor, f, c);
    } else {
      if (has_ema) update_chunk<true, true, false>(chunk, grad_factor, f, c);
      else update_chunk<true, false, false>(chunk, grad_factor, f, c);
    }
  } else {
    if (has_working) {
      if (has_ema) update_chunk<false, true, true>(chunk, grad_factor, f, c);
      else update_chunk<false, false, true>(chunk, grad_factor, f, c);
    } else {
      if (has_ema) update_chunk<false, true, false>(chunk, grad_factor, f, c);
      else update_chunk<false, false, false>(chunk, grad_factor, f, c);
    }
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

// Makes `device` current for the calls of one function and restores the caller's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && previous_ != device) {
      error = cudaSetDevice(device);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  cudaError_t error;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Entries [begin, ...) that fit one launch.  Returns the number of chunks.
int fill(const Entry* entries, int64_t begin, int64_t count, Batch* batch, StepBatch* steps) {
  const int64_t many = count - begin;
  batch->count = steps->count = int(many < kMaxTensors ? many : kMaxTensors);
  int64_t chunks = 0;
  for (int i = 0; i < batch->count; ++i) {
    const Entry& e = entries[begin + i];
    batch->master[i] = e.master;
    batch->grad[i] = e.grad;
    batch->exp_avg[i] = e.exp_avg;
    batch->exp_avg_sq[i] = e.exp_avg_sq;
    batch->ema[i] = e.ema;
    batch->working[i] = e.working;
    batch->numel[i] = e.numel;
    batch->first_chunk[i] = int32_t(chunks);
    batch->grad_is_bf16[i] = uint8_t(e.grad_is_bf16);
    steps->step[i] = e.step;
    chunks += chunks_of(e.numel);
  }
  return int(chunks);
}

}  // namespace
}  // namespace fastasync

using namespace fastasync;

int fastasync_adamw_abi() { return kAbi; }
int64_t fastasync_adamw_chunk() { return kChunk; }

int fastasync_adamw_ready() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error != cudaSuccess ? error : (devices > 0 ? cudaSuccess : cudaErrorNoDevice);
}

const char* fastasync_adamw_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

int fastasync_adamw_norm(const Entry* entries, int64_t count, double grad_scale, double max_norm, double* partials,
                         float* status, int place, void* stream) {
  const DeviceGuard guard(place);
  if (guard.error != cudaSuccess) return guard.error;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  Batch batch;
  StepBatch steps;
  int64_t done = 0;
  for (int64_t begin = 0; begin < count; begin += kMaxTensors) {
    const int chunks = fill(entries, begin, count, &batch, &steps);
    if (chunks > 0) norm_kernel<<<chunks, kThreads, 0, queue>>>(batch, partials + done);
    done += chunks;
  }
  finish_kernel<<<1, kFinishThreads, 0, queue>>>(partials, done, grad_scale, max_norm, status);
  return cudaGetLastError();
}

int fastasync_adamw_step(const Entry* entries, int64_t count, const Hyper* hyper, const float* status, Factors* factors,
                         int place, void* stream) {
  const DeviceGuard guard(place);
  if (guard.error != cudaSuccess) return guard.error;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const Coefficients c = coefficients(*hyper);
  Batch batch;
  StepBatch steps;
  for (int64_t begin = 0; begin < count; begin += kMaxTensors) {
    const int chunks = fill(entries, begin, count, &batch, &steps);
    advance_kernel<<<(batch.count + 63) / 64, 64, 0, queue>>>(steps, *hyper, status, factors + begin);
    if (chunks > 0)
      update_kernel<<<chunks, kThreads, 0, queue>>>(batch, c, float(hyper->grad_scale), status, factors + begin);
  }
  return cudaGetLastError();
}
