/* The field's network y = W2 relu(W1 x) on CUDA's tensor cores, forward and backward.

Two heads of 64 hidden units, density and colour, lie side by side: x (N, 16 or 32), W1 (128, 16 or
32), W2 (4, 128). bfloat16 products, fp32 sums. A warp takes 16 samples through both layers without
the hidden layer leaving its registers; backward computes it again. So reading and writing x bounds
it, 128 bytes a sample each way, not the 2 x 128 x 36 products (0.1 ms for ten million samples). */
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <torch/library.h>

#define UNROLL _Pragma("unroll")
using at::Tensor;
using In = const Tensor&;
constexpr int HIDDEN = 128, OUT = 4, WARPS = 4;
using bf16 = __nv_bfloat16;

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *(const uint32_t*)&two;
}
__device__ uint32_t pack(const float* two, bool inside) {
  return inside ? pack(two[0], two[1]) : 0;
}
__device__ uint32_t word(const bf16* x) { return *(const uint32_t*)x; }
__device__ uint32_t transposed(uint32_t x) {     // an 8x8 tile, of which a lane holds two numbers
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// c (16x8) += a (16x16) b (16x8). Lane 4 g + q holds of c rows g, g + 8 at columns 2q, 2q + 1; of a
// those, then the same at columns + 8; of b rows 2q, 2q + 1, then + 8, at column g. So two c's side
// by side are the next product's a, and transposed tiles of a are a b, or the transpose's a.
__device__ void multiply(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Forward fills y; backward, given grad of y, the gradients of x, W1 and W2.
template <int IN, bool BACKWARD> __global__ void __launch_bounds__(32 * WARPS, 2) network(
    int64_t N, const float* x, const float* W1, const float* W2, const float* grad, float* y,
    float* x_grad, float* W1_grad, float* W2_grad) {
  // Weights and their transposes in shared memory; rows padded against bank conflicts.
  __shared__ bf16 w1[HIDDEN][IN + 8], w1t[IN][HIDDEN + 8], w2[8][HIDDEN + 8], w2t[HIDDEN][8];
  for (int i = threadIdx.x; i < HIDDEN * IN; i += blockDim.x)
    w1[i / IN][i % IN] = w1t[i % IN][i / IN] = __float2bfloat16(W1[i]);
  for (int i = threadIdx.x; i < HIDDEN * 8; i += blockDim.x)
    w2[i / HIDDEN][i % HIDDEN] = w2t[i % HIDDEN][i / HIDDEN] =
        __float2bfloat16(i < HIDDEN * OUT ? W2[i] : 0.f);
  __syncthreads();

  const int g = threadIdx.x / 4 % 8, q = threadIdx.x % 4;
  float sum1[HIDDEN / 16][IN / 8][4] = {}, sum2[HIDDEN / 16][4] = {};      // the warp's W gradients
  for (int tile = blockIdx.x * WARPS + threadIdx.x / 32; tile < (N + 15) / 16;
       tile += gridDim.x * WARPS) {              // 16 samples a warp
    const int64_t n[2] = {tile * 16ll + g, tile * 16ll + g + 8};
    float back[IN / 8][4] = {}, forth[4] = {};
    uint32_t a[IN / 4], up[2] = {};
    UNROLL for (int i = 0; i < IN / 4; i++)
      a[i] = pack(x + n[i % 2] * IN + i / 2 * 8 + 2 * q, n[i % 2] < N);
    UNROLL for (int i = 0; i < 2; i++)
      if (BACKWARD) up[i] = pack(grad + n[i] * OUT + 2 * q, n[i] < N && q < 2);
    const bool hidden = BACKWARD && !__any_sync(~0u, (up[0] | up[1]) & 0x7fff7fff);   // no gradient
    UNROLL for (int k = 0; k < HIDDEN; k += 16) {                       // 16 hidden units at a time
      if (hidden) break;
      uint32_t h[4], e[4];                                              // they, and their gradient
      UNROLL for (int j = 0; j < 2; j++) {
        float c[4] = {}, d[4] = {};
        const bf16* w = w1[k + 8 * j + g] + 2 * q;
        UNROLL for (int i = 0; i < IN / 4; i += 4)
          multiply(c, a[i], a[i + 1], a[i + 2], a[i + 3], word(w + 4 * i), word(w + 4 * i + 8));
        if (BACKWARD) multiply(d, up[0], up[1], 0, 0, word(w2t[k + 8 * j + g] + 2 * q), 0);
        UNROLL for (int i = 0; i < 4; i += 2) {
          h[2 * j + i / 2] = pack(fmaxf(c[i], 0), fmaxf(c[i + 1], 0));
          e[2 * j + i / 2] = pack(c[i] > 0 ? d[i] : 0, c[i + 1] > 0 ? d[i + 1] : 0);
        }
      }
      if constexpr (!BACKWARD) {
        const bf16* w = w2[g] + k + 2 * q;
        multiply(forth, h[0], h[1], h[2], h[3], word(w), word(w + 8));
      } else {
        UNROLL for (int f = 0; f < IN / 8; f++) {
          const bf16* w = w1t[8 * f + g] + k + 2 * q;
          multiply(back[f], e[0], e[1], e[2], e[3], word(w), word(w + 8));
        }
        UNROLL for (int i = 0; i < 4; i++) h[i] = transposed(h[i]), e[i] = transposed(e[i]);
        UNROLL for (int f = 0; f < IN / 8; f++)
          multiply(sum1[k / 16][f], e[0], e[2], e[1], e[3], transposed(a[2 * f]),
                   transposed(a[2 * f + 1]));
        multiply(sum2[k / 16], h[0], h[2], h[1], h[3], transposed(up[0]), transposed(up[1]));
      }
    }
    UNROLL for (int i = 0; i < 2; i++) {
      if (n[i] >= N) continue;
      if constexpr (BACKWARD) {
        UNROLL for (int f = 0; f < IN / 8; f++)
          *(float2*)(x_grad + n[i] * IN + 8 * f + 2 * q) = {back[f][2 * i], back[f][2 * i + 1]};
      } else if (q < 2) {
        *(float2*)(y + n[i] * OUT + 2 * q) = {forth[2 * i], forth[2 * i + 1]};
      }
    }
  }
  if constexpr (BACKWARD) {
    UNROLL for (int i = 0; i < HIDDEN / 4; i++) {
      const int row = i / 4 * 16 + g + i / 2 % 2 * 8, column = 2 * q + i % 2;
      UNROLL for (int f = 0; f < IN / 8; f++)
        atomicAdd(W1_grad + row * IN + 8 * f + column, sum1[i / 4][f][i % 4]);
      if (q < 2) atomicAdd(W2_grad + column * HIDDEN + row, sum2[i / 4][i % 4]);
    }
  }
}

// ---- The operator ----

static const float* in(In x) { return x.const_data_ptr<float>(); }
static float* out(In x) { return x.mutable_data_ptr<float>(); }
static Tensor aligned(In x) {                           // for reads of 8 bytes
  const Tensor y = x.to(at::kFloat).contiguous();
  return (uintptr_t)y.const_data_ptr() % 16 ? y.clone() : y;
}

// -> y; and with grad given: the gradients of x, W1, W2.
std::tuple<Tensor, Tensor, Tensor> network_(In x, In W1, In W2,
                                            const std::optional<Tensor>& grad) {
  const c10::DeviceGuard guard(x.device());
  const Tensor a = aligned(x), w1 = aligned(W1), w2 = aligned(W2);
  const Tensor g = grad ? aligned(*grad) : Tensor();
  const Tensor first = grad ? at::empty_like(a) : at::empty({x.size(0), OUT}, a.options());
  const Tensor second = at::zeros({grad ? HIDDEN : 0, x.size(1)}, a.options());
  const Tensor third = at::zeros({grad ? OUT : 0, HIDDEN}, a.options());
  int processors = 0;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device());
  const int blocks = std::min<int64_t>(x.size(0) / 64 + 1, (grad ? 2 : 8) * processors);
  const auto run = x.size(1) == 16 ? (grad ? network<16, true> : network<16, false>)
                                   : (grad ? network<32, true> : network<32, false>);
  run<<<blocks, 32 * WARPS, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.size(0), in(a), in(w1), in(w2), grad ? in(g) : nullptr, out(first), out(first), out(second),
      out(third));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {first, second, third};
}

TORCH_LIBRARY_FRAGMENT(hashgrid, m) {
  m.def("network(Tensor x, Tensor W1, Tensor W2, Tensor? grad) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(hashgrid, CUDA, m) { m.impl("network", network_); }
