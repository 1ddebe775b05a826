/* The kernels of nerf.py: hash-grid encoding, ray marching, compositing, the field's small network.

Each body is written once, as a struct with an operator(): a plain C++ compiler makes loops over
the cores of it, nvcc a CUDA kernel as well. nerf.py says what is computed, this file how:

  encoding   a point reads 8 corners on 16 levels, 128 rows of 8 bytes at random: cache transactions
             bound it, not bytes. So neighbours along x come as one 16-byte word where they share
             one (hashed too: even x and x + 1 differ in bit 0), and blocks walk the levels
             in groups of four, whose tables (16 MB) stay in the L2 cache.
  scatter    the transpose, 128 atomic adds a point: the L2's atomic units bound it. Neighbours
             on a ray share coarse cells: a thread sums a run of points and adds once a cell.
             On the CPU one thread owns a level: no atomics.
  marching   a thread a ray tests every step, some instructions and one cached byte each.
  composite  a thread a ray, front to back: bound by reading and writing each sample once.
  network    32 -> 128 -> 4, bfloat16 on tensor cores, fp32 sums; the hidden layer never leaves the
             registers, forward or backward: bound by the features, 128 bytes a sample.

Letters: N points, L levels, T rows of a level, R rays, u place in a cell, v direction. */
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HD inline
#define UNROLL _Pragma("GCC unroll 8")
#endif

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
constexpr int MAX_LEVELS = 32, GROUP = 4;        // a CUDA thread walks a group of levels
constexpr float EARLY_STOP = 1e-4f;              // a ray ends where less of its light is left

// ---- Running a body over items x groups ----

#ifdef __CUDACC__
template <class Body> __global__ void kernel(int64_t items, Body body) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i < items) body(i, blockIdx.y);
}
#endif

template <class Body> void launch(const Tensor& where, int64_t items, int groups, Body body) {
  const c10::DeviceGuard guard(where.device());
  if (items == 0) return;
#ifdef __CUDACC__
  if (where.is_cuda()) {
    const dim3 blocks((unsigned)((items + 255) / 256), groups);
    kernel<<<blocks, 256, 0, c10::cuda::getCurrentCUDAStream()>>>(items, body);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
#endif
  const int hands = items > 1 ? 1 : at::get_num_threads();     // one item: share out its groups
  at::parallel_for(0, items > 1 ? items : hands, items > 1 ? 64 : 1, [&](int64_t i, int64_t to) {
    for (; i < to; i++)
      for (int g = items > 1 ? 0 : i; g < groups; g += hands) body(items > 1 ? i : 0, g);
  });
}

float* out(const Tensor& x) { return x.defined() ? x.mutable_data_ptr<float>() : nullptr; }
const float* in(const Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }
Tensor plain(const Tensor& x) { return x.to(at::kFloat).contiguous(); }
Tensor plain(const MaybeTensor& x) { return x ? plain(*x) : Tensor(); }

// ---- Geometry of the grid ----

struct Grid {
  int L;
  uint32_t T;
  const float *points, *directions;              // directions: null, or differentiate along them
  int vertices[MAX_LEVELS] = {};                 // per axis, of each level

  Grid(const Tensor& x, const Tensor& v, at::IntArrayRef r, int64_t T)
      : L(r.size()), T(T), points(in(x)), directions(in(v)) {
    TORCH_CHECK(L <= MAX_LEVELS, "hash_encode: at most ", MAX_LEVELS, " levels");
    std::copy(r.begin(), r.end(), vertices);
  }
  HD const float* direction(int64_t n) const { return directions ? directions + 3 * n : nullptr; }
};

struct Cell {
  uint32_t row[8];                               // of the corners: bit 0 of a number is x, 1 y, 2 z
  float u[3], slope[3];                          // place in the cell, its derivative by the point

  HD Cell(const Grid& grid, int level, int64_t n) {
    const int r = grid.vertices[level];
    const float scale = r - 1;
    uint32_t low[3];
    UNROLL for (int a = 0; a < 3; a++) {
      const float x = grid.points[3 * n + a], p = x > 0 ? x < 1 ? x : 1 : 0;
      int cell = (int)(p * scale);
      cell -= fmaf(p, scale, -(float)cell) < 0;  // the product was rounded up into the next cell
      cell = cell < r - 2 ? cell : r - 2;
      u[a] = fmaf(p, scale, -(float)cell);       // one rounding only, also at 4096 vertices
      slope[a] = x >= 0 && x <= 1 ? scale : 0;
      low[a] = cell;
    }
    const bool dense = (uint64_t)r * r * r <= grid.T;
    const uint32_t py = dense ? r : 2654435761u, pz = dense ? (uint32_t)r * r : 805459861u;
    UNROLL for (int c = 0; c < 8; c++) {
      const uint32_t x = low[0] + (c & 1), y = (low[1] + (c >> 1 & 1)) * py;
      const uint32_t z = (low[2] + (c >> 2)) * pz;
      row[c] = dense ? x + y + z : (x ^ y ^ z) & (grid.T - 1);
    }
  }
  // A corner's trilinear weight, differentiated once by each axis of the bit mask `by`.
  HD float weight(int corner, int by) const {
    float w = 1;
    UNROLL for (int a = 0; a < 3; a++) {
      const bool up = corner >> a & 1;
      w *= by >> a & 1 ? (up ? slope[a] : -slope[a]) : (up ? u[a] : 1 - u[a]);
    }
    return w;
  }
  HD float weight(int c, const float* v) const {               // or its derivative along v
    return v ? v[0] * weight(c, 1) + v[1] * weight(c, 2) + v[2] * weight(c, 4) : weight(c, 0);
  }
};

template <class S> struct alignas(2 * sizeof(S)) Row { S x, y; };
template <class S> struct alignas(4 * sizeof(S)) Pair { Row<S> low, high; };

// Corners c and c + 1, neighbours along x: a wide read serves both where they share a pair.
template <class S> HD void read(const Row<S>* level, const Cell& cell, int c, Row<S>* to) {
  const uint32_t i = cell.row[c], j = cell.row[c + 1];
#ifdef __CUDA_ARCH__
  const Pair<S> pair = ((const Pair<S>*)level)[i >> 1];
  to[0] = i & 1 ? pair.high : pair.low;
  to[1] = i & 1 ? pair.low : pair.high;
  if ((i ^ j) != 1) to[1] = level[j];
#else
  to[0] = level[i], to[1] = level[j];
#endif
}

template <int W> HD void add(float* to, const float* x) {      // atomically on the GPU
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 900
  if constexpr (W == 4) atomicAdd((float4*)to, float4{x[0], x[1], x[2], x[3]});
  if constexpr (W == 2) atomicAdd((float2*)to, float2{x[0], x[1]});
  constexpr int rest = W % 2 ? W : 0;
#else
  constexpr int rest = W;
#endif
  UNROLL for (int i = 0; i < rest; i++) atomicAdd(to + i, x[i]);
#else
  UNROLL for (int i = 0; i < W; i++) to[i] += x[i];
#endif
}

// ---- Encoding and its two transposes ----

template <class S> struct Gather {               // encoded[n, l] = sum over corners of weight x row
  Grid grid;
  const Row<S>* table;
  float* encoded;

  HD void operator()(int64_t n, int group) const {
    alignas(16) float sum[2 * GROUP] = {};
    UNROLL for (int i = 0; i < GROUP; i++) {
      const int l = group * GROUP + i;
      if (l >= grid.L) break;
      const Cell cell(grid, l, n);
      UNROLL for (int c = 0; c < 8; c += 2) {
        Row<S> row[2];
        read(table + (int64_t)l * grid.T, cell, c, row);
        UNROLL for (int k = 0; k < 2; k++) {
          const float w = cell.weight(c + k, grid.direction(n));
          sum[2 * i] += w * (float)row[k].x, sum[2 * i + 1] += w * (float)row[k].y;
        }
      }
    }
    Pair<float>* to = (Pair<float>*)(encoded + 2 * (n * grid.L + group * GROUP));
    if (grid.L % GROUP == 0) to[0] = *(Pair<float>*)sum, to[1] = *(Pair<float>*)(sum + 4);
    else for (int i = 0; i < 2 * GROUP && group * GROUP + i / 2 < grid.L; i++)
      ((float*)to)[i] = sum[i];
  }
};

struct Scatter {                                 // table[l, row] += weight x grad[n, l]
  Grid grid;
  const Row<float>* grad;
  float* table;
  int64_t N, run;                                // points per item,
  int levels;                                    // and levels per group

  HD void flush(float* level, const uint32_t* row, const float (*sum)[2]) const {
    UNROLL for (int c = 0; c < 8; c += 2) {
#ifdef __CUDA_ARCH__
      if ((row[c] ^ row[c + 1]) == 1) {          // one wide addition for the pair
        const bool odd = row[c] & 1;
        const float pair[4] = {odd ? sum[c + 1][0] : sum[c][0], odd ? sum[c + 1][1] : sum[c][1],
                               odd ? sum[c][0] : sum[c + 1][0], odd ? sum[c][1] : sum[c + 1][1]};
        add<4>(level + 2 * (row[c] & ~1u), pair);
        continue;
      }
#endif
      add<2>(level + 2 * row[c], sum[c]), add<2>(level + 2 * row[c + 1], sum[c + 1]);
    }
  }
  HD void operator()(int64_t item, int group) const {
    for (int l = group * levels; l < grid.L && l < (group + 1) * levels; l++) {
      float* level = table + 2 * (int64_t)l * grid.T;
      float sum[8][2] = {};
      uint32_t row[8] = {};
      bool any = false;
      for (int64_t n = item * run; n < N && n < (item + 1) * run; n++) {
        const Row<float> g = grad[n * grid.L + l];
        if (g.x == 0 && g.y == 0) continue;      // hidden behind the surface: nothing to learn
        const Cell cell(grid, l, n);
        bool same = any;
        UNROLL for (int c = 0; c < 8; c++) same = same && row[c] == cell.row[c];
        if (any && !same) flush(level, row, sum);
        UNROLL for (int c = 0; c < 8; c++) {
          const float w = cell.weight(c, grid.direction(n));
          sum[c][0] = (same ? sum[c][0] : 0) + w * g.x;
          sum[c][1] = (same ? sum[c][1] : 0) + w * g.y;
          row[c] = cell.row[c];
        }
        any = true;
      }
      if (any) flush(level, row, sum);
    }
  }
};

template <class S> struct Pull {                 // pulled[n] = sum of weight' x (grad[n, l] . row)
  Grid grid;
  const Row<S>* table;
  const Row<float>* grad;
  float* pulled;

  HD void operator()(int64_t n, int group) const {
    const float* v = grid.direction(n);
    float sum[3] = {};
    for (int l = group * GROUP; l < grid.L && l < (group + 1) * GROUP; l++) {
      const Row<float> g = grad[n * grid.L + l];
      const Cell cell(grid, l, n);
      UNROLL for (int c = 0; c < 8; c += 2) {
        Row<S> row[2];
        read(table + (int64_t)l * grid.T, cell, c, row);
        UNROLL for (int k = c; k < c + 2; k++) {
          const float dot = g.x * (float)row[k - c].x + g.y * (float)row[k - c].y;
          UNROLL for (int a = 0; a < 3; a++) {   // along v: the mixed derivatives; the pure are 0
            const int b = (a + 1) % 3, d = (a + 2) % 3;
            sum[a] += dot * (!v ? cell.weight(k, 1 << a) : v[b] * cell.weight(k, 1 << a | 1 << b) +
                                                           v[d] * cell.weight(k, 1 << a | 1 << d));
          }
        }
      }
    }
    add<3>(pulled + 3 * n, sum);                 // where the groups meet
  }
};

// ---- Marching and compositing, a ray an item ----

struct March {
  const float *origins, *directions, *shift;
  const bool* occupied;
  int G;
  float delta;
  int32_t* counts;                               // first pass: count the samples; null: write them
  const int64_t* offsets;
  float *t, *points;

  HD void operator()(int64_t ray, int) const {
    const float *o = origins + 3 * ray, *d = directions + 3 * ray;
    float near = 0, far = INFINITY, x[3];
    UNROLL for (int a = 0; a < 3; a++) {
      const float inverse = 1 / (fabsf(d[a]) < 1e-9f ? 1e-9f : d[a]);
      const float one = (-1 - o[a]) * inverse, two = (1 - o[a]) * inverse;
      near = fmaxf(near, fminf(one, two)), far = fminf(far, fmaxf(one, two));
    }
    int64_t n = counts ? 0 : offsets[ray];
    const int64_t end = counts ? INT32_MAX : offsets[ray + 1];
    for (int k = 0; n < end; k++) {
      const float s = near + (k + shift[ray]) * delta;
      if (!(s < far)) break;
      int cell = 0;
      UNROLL for (int a = 0; a < 3; a++) {
        x[a] = o[a] + s * d[a];
        const int i = (int)((x[a] + 1) * (0.5f * G));
        cell = cell * G + (i < 0 ? 0 : i < G ? i : G - 1);
      }
      if (!occupied[cell]) continue;
      if (!counts) {
        t[n] = s;
        UNROLL for (int a = 0; a < 3; a++) points[3 * n + a] = x[a];
      }
      n++;
    }
    if (counts) counts[ray] = (int32_t)n;
  }
};

template <int C, bool BACKWARD> struct Composite {             // sums[ray] = sum of w [values, 1, t]
  const float *sigma, *values, *t;
  const int64_t* offsets;
  float delta;
  const float *grad, *sums_before;               // backward: of sums, and sums
  float *first, *second;                         // sums and w; backward: gradients of sigma, values

  HD void operator()(int64_t ray, int) const {
    float light = 1, sum[C + 2] = {}, up[C + 2], behind = 0;
    UNROLL for (int c = 0; c < C + 2 && BACKWARD; c++) {
      up[c] = grad[ray * (C + 2) + c];
      behind += up[c] * sums_before[ray * (C + 2) + c];
    }
    for (int64_t n = offsets[ray]; n < offsets[ray + 1] && light > EARLY_STOP; n++) {
      const float w = light * -expm1f(-sigma[n] * delta);
      light -= w;
      if constexpr (BACKWARD) {
        float g = up[C] + up[C + 1] * t[n];      // grad . [values, 1, t]
        UNROLL for (int c = 0; c < C; c++) {
          g += up[c] * values[n * C + c];
          second[n * C + c] = up[c] * w;
        }
        behind -= w * g;                         // the sum of w g over the samples behind n
        first[n] = delta * (light * g - behind);
      } else {
        UNROLL for (int c = 0; c < C; c++) sum[c] += w * values[n * C + c];
        sum[C] += w, sum[C + 1] += w * t[n];
        second[n] = w;
      }
    }
    UNROLL for (int c = 0; c < C + 2 && !BACKWARD; c++) first[ray * (C + 2) + c] = sum[c];
  }
};

// ---- The network W2 relu(W1 x), two heads of 64 side by side, on tensor cores ----

#ifdef __CUDACC__
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
// those and then the same at columns + 8; of b rows 2q, 2q + 1, then + 8, at column g. So two c side
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
    UNROLL for (int i = 0; i < 2 && BACKWARD; i++)
      up[i] = pack(grad + n[i] * OUT + 2 * q, n[i] < N && q < 2);
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
      const bf16* w = w2[g] + k + 2 * q;
      if (!BACKWARD) multiply(forth, h[0], h[1], h[2], h[3], word(w), word(w + 8));
      if (!BACKWARD) continue;
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
    UNROLL for (int i = 0; i < 2; i++) {
      if (n[i] >= N) continue;
      if (!BACKWARD && q < 2) *(float2*)(y + n[i] * OUT + 2 * q) = {forth[2 * i], forth[2 * i + 1]};
      UNROLL for (int f = 0; f < IN / 8 && BACKWARD; f++)
        *(float2*)(x_grad + n[i] * IN + 8 * f + 2 * q) = {back[f][2 * i], back[f][2 * i + 1]};
    }
  }
  UNROLL for (int i = 0; i < HIDDEN / 4 && BACKWARD; i++) {
    const int row = i / 4 * 16 + g + i / 2 % 2 * 8, column = 2 * q + i % 2;
    UNROLL for (int f = 0; f < IN / 8; f++)
      atomicAdd(W1_grad + row * IN + 8 * f + column, sum1[i / 4][f][i % 4]);
    if (q < 2) atomicAdd(W2_grad + column * HIDDEN + row, sum2[i / 4][i % 4]);
  }
}
#endif

// ---- The operators: nerf.py has checked the arguments; allocate and launch ----

template <class Body> void with_rows(const Tensor& table, Body body) {
  if (table.scalar_type() == at::kHalf) body((const Row<at::Half>*)table.const_data_ptr<at::Half>());
  else body((const Row<float>*)in(table));
}

Tensor gather(const Tensor& points, const Tensor& table, at::IntArrayRef vertices, MaybeTensor along) {
  const Tensor x = plain(points), v = plain(along), rows_ = table.contiguous();
  const Grid grid(x, v, vertices, table.size(1));
  const Tensor encoded = at::empty({x.size(0), 2 * grid.L}, x.options());
  with_rows(rows_, [&](auto* rows) {
    launch(x, x.size(0), (grid.L + GROUP - 1) / GROUP, Gather{grid, rows, out(encoded)});
  });
  return encoded;
}

Tensor pull(const Tensor& points, const Tensor& table, const Tensor& grad, at::IntArrayRef vertices,
            MaybeTensor along) {
  const Tensor x = plain(points), v = plain(along), rows_ = table.contiguous(), g = plain(grad);
  const Grid grid(x, v, vertices, table.size(1));
  const Tensor pulled = at::zeros_like(x);
  with_rows(rows_, [&](auto* rows) {
    launch(x, x.size(0), (grid.L + GROUP - 1) / GROUP,
           Pull{grid, rows, (const Row<float>*)in(g), out(pulled)});
  });
  return pulled;
}

Tensor scatter(const Tensor& points, const Tensor& grad, at::IntArrayRef vertices, int64_t T,
               MaybeTensor along) {
  const Tensor x = plain(points), v = plain(along), g = plain(grad);
  const Grid grid(x, v, vertices, T);
  const Tensor table = at::zeros({grid.L, T, 2}, x.options());
  const int64_t N = x.size(0), run = x.is_cuda() ? 8 : std::max<int64_t>(N, 1);
  const int levels = x.is_cuda() ? GROUP : 1;
  launch(x, (N + run - 1) / run, (grid.L + levels - 1) / levels,
         Scatter{grid, (const Row<float>*)in(g), out(table), N, run, levels});
  return table;
}

// capacity < 0: room for exactly what there is, which waits for the device. Else no waiting: room for
// so many samples; the last rays are cut short where there are more.
std::tuple<Tensor, Tensor, Tensor, Tensor> march(
    const Tensor& origins, const Tensor& directions, const Tensor& occupied, const Tensor& shift,
    double delta, int64_t capacity) {
  const Tensor o = plain(origins), d = plain(directions), s = plain(shift), cells = occupied.contiguous();
  const Tensor counts = at::zeros({o.size(0) + 1}, o.options().dtype(at::kInt));
  March body{in(o), in(d), in(s), cells.const_data_ptr<bool>(), (int)cells.size(0), (float)delta,
             counts.mutable_data_ptr<int32_t>() + 1, nullptr, nullptr, nullptr};
  launch(o, o.size(0), 1, body);
  Tensor offsets = counts.cumsum(0);
  const Tensor total = offsets[-1].clone();
  const int64_t room = capacity < 0 ? total.item<int64_t>() : capacity;
  offsets.clamp_max_(room);
  const Tensor t = at::zeros({room}, o.options()), points = at::zeros({room, 3}, o.options());
  body.counts = nullptr, body.offsets = offsets.const_data_ptr<int64_t>();
  body.t = out(t), body.points = out(points);
  launch(o, o.size(0), 1, body);
  return {offsets, t, points, total};
}

// -> sums, w; and with grad and sums given: the gradients of sigma and values.
std::tuple<Tensor, Tensor> composite(
    const Tensor& sigma, const Tensor& values, const Tensor& t, const Tensor& offsets, double delta,
    MaybeTensor grad, MaybeTensor sums) {
  const Tensor s = plain(sigma), c = plain(values), t_ = plain(t), g = plain(grad), y = plain(sums);
  const int64_t C = c.size(1), R = offsets.size(0) - 1;
  TORCH_CHECK(C == 3 || C == 6, "composite: 3 or 6 channels, not ", C);
  const Tensor first = grad ? at::zeros_like(s) : at::empty({R, C + 2}, s.options());
  const Tensor second = at::zeros_like(grad ? c : s);
  const auto run = [&](auto C, auto backward) {
    launch(s, R, 1, Composite<C, backward>{in(s), in(c), in(t_), offsets.const_data_ptr<int64_t>(),
                                           (float)delta, in(g), in(y), out(first), out(second)});
  };
  const auto pick = [&](auto C) { grad ? run(C, std::true_type()) : run(C, std::false_type()); };
  C == 3 ? pick(std::integral_constant<int, 3>()) : pick(std::integral_constant<int, 6>());
  return {first, second};
}

#ifdef __CUDACC__
// -> y; and with grad given: the gradients of x, W1, W2.
std::tuple<Tensor, Tensor, Tensor> network_(const Tensor& x, const Tensor& W1, const Tensor& W2,
                                            MaybeTensor grad) {
  const c10::DeviceGuard guard(x.device());
  const Tensor a = plain(x), w1 = plain(W1), w2 = plain(W2), g = plain(grad);
  const Tensor first = grad ? at::empty_like(a) : at::empty({x.size(0), OUT}, a.options());
  const Tensor second = at::zeros({grad ? HIDDEN : 0, x.size(1)}, a.options());
  const Tensor third = at::zeros({grad ? OUT : 0, HIDDEN}, a.options());
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device()));
  const int blocks = std::min<int64_t>(x.size(0) / 64 + 1, (grad ? 2 : 8) * processors);
  const auto run = x.size(1) == 16 ? (grad ? network<16, true> : network<16, false>)
                                   : (grad ? network<32, true> : network<32, false>);
  run<<<blocks, 32 * WARPS, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.size(0), in(a), in(w1), in(w2), in(g), out(first), out(first), out(second), out(third));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {first, second, third};
}
#endif

TORCH_LIBRARY(hashgrid, m) {
  m.def("gather(Tensor points, Tensor table, int[] vertices, Tensor? along) -> Tensor");
  m.def("pull(Tensor points, Tensor table, Tensor grad, int[] vertices, Tensor? along) -> Tensor");
  m.def("scatter(Tensor points, Tensor grad, int[] vertices, int T, Tensor? along) -> Tensor");
  m.def("march(Tensor origins, Tensor directions, Tensor occupied, Tensor shift, float delta,"
        " int capacity) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite(Tensor sigma, Tensor values, Tensor t, Tensor offsets, float delta,"
        " Tensor? grad, Tensor? sums) -> (Tensor, Tensor)");
  m.def("network(Tensor x, Tensor W1, Tensor W2, Tensor? grad) -> (Tensor, Tensor, Tensor)");
}
void implement(torch::Library& m) {
  m.impl("gather", gather), m.impl("pull", pull), m.impl("scatter", scatter);
  m.impl("march", march), m.impl("composite", composite);
}
TORCH_LIBRARY_IMPL(hashgrid, CPU, m) { implement(m); }
#ifdef __CUDACC__
TORCH_LIBRARY_IMPL(hashgrid, CUDA, m) { implement(m), m.impl("network", network_); }
#endif
