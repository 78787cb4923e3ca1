// AdamW + EMA + bf16 working weights: the arithmetic and the C interface, shared by the CUDA kernels (fused_adamw.cu) and
// by their CPU twin (fused_adamw.cpp).  The tests run the twin, so that what a GPU computes is checked without one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTASYNC_HD __host__ __device__ __forceinline__
#else
#define FASTASYNC_HD inline
#endif

namespace fastasync {

constexpr int kAbi = 1;             // raise with any change of the interface below; Python refuses another number
constexpr int64_t kChunk = 16384;   // elements that one block (CUDA) or one loop body (CPU) handles

// One parameter tensor.  All buffers are dense and hold their elements in the same order.  Nine 8-byte fields.
struct Entry {
  float* master;         // float32 weights, updated in place
  const void* grad;      // float32 or bf16, read only
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;            // null: no EMA
  uint16_t* working;     // bf16 weights written after the update; null: none
  float* step;           // updates done so far; advanced by one unless the step is skipped
  int64_t numel;
  int64_t grad_is_bf16;
};

// One parameter group.  Doubles: 1 - 0.999 must not be computed in float32.
struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, ema_decay;
  double grad_scale;         // multiplies the gradient when there is no status (status carries it otherwise)
  const float* lr_tensor;    // on the parameters' device, instead of lr; null: lr
};

// Status of a step, float32 [3], on the parameters' device: written by norm, read by step.
enum StatusField { kNorm = 0, kGradFactor = 1, kSkip = 2, kStatusFields = 3 };

// What depends on the step count of a tensor.
struct alignas(16) Factors {
  float step_size;    // lr / (1 - beta1^t)
  float correction;   // 1 / sqrt(1 - beta2^t)
  float keep;         // 1 - lr weight_decay
  float unused;
};

// What does not.
struct Coefficients {
  float one_minus_beta1, beta2, one_minus_beta2, eps, one_minus_ema;
};

inline Coefficients coefficients(const Hyper& h) {
  return {float(1.0 - h.beta1), float(h.beta2), float(1.0 - h.beta2), float(h.eps), float(1.0 - h.ema_decay)};
}

FASTASYNC_HD Factors factors_of(const Hyper& h, double t) {
  const double lr = h.lr_tensor ? double(*h.lr_tensor) : h.lr;
  return {float(lr / (1.0 - pow(h.beta1, t))), float(1.0 / sqrt(1.0 - pow(h.beta2, t))),
          float(1.0 - lr * h.weight_decay), 0.0f};
}

// AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2), then the EMA.
template <bool kEma>
FASTASYNC_HD void update(float grad, float& master, float& exp_avg, float& exp_avg_sq, float& ema, const Factors& f,
                         const Coefficients& c) {
  exp_avg += c.one_minus_beta1 * (grad - exp_avg);
  exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;
  const float denominator = sqrtf(exp_avg_sq) * f.correction + c.eps;
  master = master * f.keep - f.step_size * (exp_avg / denominator);
  if (kEma) ema += c.one_minus_ema * (master - ema);
}

// From the sum of squares: the norm of grad_scale * gradient, and what the step multiplies the gradient by.  A norm
// that is not finite (a NaN, an infinity, or a sum beyond float32) skips the step.
FASTASYNC_HD void finish_norm(double sum_of_squares, double grad_scale, double max_norm, float* status) {
  const float norm = float(fabs(grad_scale) * sqrt(sum_of_squares));
  const bool finite = fabsf(norm) <= 3.402823466e+38f;
  const double clip = max_norm / (double(norm) + 1e-6);
  status[kNorm] = norm;
  status[kGradFactor] = finite ? float(grad_scale * (clip < 1.0 ? clip : 1.0)) : 0.0f;
  status[kSkip] = finite ? 0.0f : 1.0f;
}

FASTASYNC_HD int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

}  // namespace fastasync

// Every function returns 0 or an error code that fastasync_adamw_error explains.  `place` is the device's ordinal (CUDA)
// or the number of threads (CPU); `stream` is a cudaStream_t (CUDA) or ignored (CPU).  No call waits for the device.
extern "C" {
int fastasync_adamw_abi();
int64_t fastasync_adamw_chunk();
int fastasync_adamw_ready();
const char* fastasync_adamw_error(int code);

// The gradients' norm in two deterministic stages.  partials: one double per chunk, in the order of the entries.
int fastasync_adamw_norm(const fastasync::Entry* entries, int64_t count, double grad_scale, double max_norm,
                         double* partials, float* status, int place, void* stream);

// One step of one parameter group.  status: from norm, or null.  factors: one per entry, scratch.
int fastasync_adamw_step(const fastasync::Entry* entries, int64_t count, const fastasync::Hyper* hyper,
                         const float* status, fastasync::Factors* factors, int place, void* stream);
}
