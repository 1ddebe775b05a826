/* The kernels of the NeRF: hash-grid encoding, ray marching, compositing.

Each body is written once, as a struct with an operator(): a plain C++ compiler makes loops over
the cores of it, nvcc a CUDA kernel as well. hashgrid.py says what is computed, this file how:

  encoding   a point reads 8 corners on 16 levels, 128 rows of 8 bytes at random: bound by how
             many 32-byte sectors the L2 cache serves. So neighbours along x come as one 16-byte
             word where they share one (hashed too: even x and x + 1 differ in bit 0); blocks walk
             the levels in groups of four, whose tables (16 MB) stay in that cache.
  scatter    the transpose, 128 atomic adds a point: bound by the L2's atomic units. Neighbours on a
             ray share coarse cells: a thread sums a run of points and adds once a cell.
             On the CPU one thread owns a level: no atomics.
  march      a thread a ray tests every step, some instructions and one cached byte each.
  composite  a warp a ray, front to back: bound by memory. Of a sample sigma, t, colour are read,
             w written: 24 bytes; backward reads those 20 again, writes 16. Ten million samples: at
             3.35 TB/s 0.18 ms both ways. Rays of 40 samples fill two thirds of their lanes.

Letters: N points, L levels, T rows of a level, R rays, u place in a cell, v direction. */
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#define HD __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define HD inline
#define UNROLL _Pragma("GCC unroll 8")
#endif

using at::Tensor;
using In = const Tensor&;
using MaybeIn = const std::optional<Tensor>&;
using Ints = at::IntArrayRef;
constexpr int MAX_LEVELS = 32, GROUP = 4;        // a CUDA thread walks a group of levels
constexpr float DARK = 9.2103404f;               // a ray ends where only exp(-DARK) = 1e-4 is left

// ---- Running a body over items x groups ----

#ifdef __CUDACC__
template <class Body> __global__ void kernel(int64_t items, Body body) {
  const int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i < items) body(i, blockIdx.y);
}
#endif

// On the CPU a thread takes items; with `share`, where groups never meet, groups of the one item.
template <class Body>
void launch(In where, int64_t items, int groups, Body body, bool share = false) {
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
  const int hands = share ? at::get_num_threads() : 1;
  at::parallel_for(0, share ? hands : items, share ? 1 : 64, [&](int64_t i, int64_t to) {
    for (; i < to; i++)
      for (int g = share ? i : 0; g < groups; g += hands) body(share ? 0 : i, g);
  });
}

#ifdef __CUDA_ARCH__
constexpr int LANES = 32;
HD float last(float x) { return __shfl_sync(~0u, x, LANES - 1); }
HD float before(float x) {                       // its sum over the warp's lanes before this one
  const int lane = threadIdx.x % LANES;
  x = __shfl_up_sync(~0u, x, 1), x = lane ? x : 0;
  UNROLL for (int i = 1; i < LANES; i *= 2) {
    const float y = __shfl_up_sync(~0u, x, i);
    x += lane >= i ? y : 0;
  }
  return x;
}
#else
constexpr int LANES = 1;
HD float last(float x) { return x; }
HD float before(float) { return 0; }
#endif

static float* out(In x) { return x.defined() ? x.mutable_data_ptr<float>() : nullptr; }
static const float* in(In x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }
static Tensor plain(In x) {
  const Tensor y = x.to(at::kFloat).contiguous();
  return (uintptr_t)y.const_data_ptr() % 16 ? y.clone() : y;           // for reads of 16 bytes
}
static Tensor plain(MaybeIn x) { return x ? plain(*x) : Tensor(); }

// ---- Geometry of the grid ----

struct Grid {
  int L;
  uint32_t T;
  const float *points, *directions;              // directions: null, or differentiate along them
  int vertices[MAX_LEVELS] = {};                 // per axis, of each level

  Grid(In x, In v, Ints r, int64_t T)
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

constexpr bool PAIRS = LANES > 1;                // the CPU's cache lines pair them anyway
struct alignas(8) Row { float x, y; };
struct alignas(16) Pair { Row low, high; };

// Corners c and c + 1, neighbours along x: a wide read serves both where they share a pair.
HD void read(const Row* level, const Cell& cell, int c, Row* to) {
  const uint32_t i = cell.row[c], j = cell.row[c + 1];
  if (PAIRS) {
    const Pair pair = ((const Pair*)level)[i >> 1];
    to[0] = i & 1 ? pair.high : pair.low;
    to[1] = i & 1 ? pair.low : pair.high;
  }
  if (!PAIRS) to[0] = level[i];
  if (!PAIRS || (i ^ j) != 1) to[1] = level[j];
}

template <int W> HD void add(float* to, const float* x) {      // atomically on the GPU
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (W == 4) atomicAdd((float4*)to, float4{x[0], x[1], x[2], x[3]});
  if constexpr (W == 2) atomicAdd((float2*)to, float2{x[0], x[1]});
  UNROLL for (int i = 0; i < W && W == 3; i++) atomicAdd(to + i, x[i]);
#elif defined(__CUDA_ARCH__)
  UNROLL for (int i = 0; i < W; i++) atomicAdd(to + i, x[i]);
#else
  UNROLL for (int i = 0; i < W; i++) to[i] += x[i];
#endif
}

// ---- Encoding and its two transposes ----

struct Gather {                                  // encoded[n, l] = sum over corners of weight x row
  Grid grid;
  const Row* table;
  float* encoded;

  HD void operator()(int64_t n, int group) const {
    alignas(16) float sum[2 * GROUP] = {};
    UNROLL for (int i = 0; i < GROUP; i++) {
      const int l = group * GROUP + i;
      if (l >= grid.L) break;
      const Cell cell(grid, l, n);
      UNROLL for (int c = 0; c < 8; c += 2) {
        Row row[2];
        read(table + (int64_t)l * grid.T, cell, c, row);
        UNROLL for (int k = 0; k < 2; k++) {
          const float w = cell.weight(c + k, grid.direction(n));
          sum[2 * i] += w * row[k].x, sum[2 * i + 1] += w * row[k].y;
        }
      }
    }
    Pair* to = (Pair*)(encoded + 2 * (n * grid.L + group * GROUP));
    UNROLL for (int i = 0; i < GROUP / 2; i++) {
      if (grid.L % GROUP == 0) to[i] = ((Pair*)sum)[i];
      else for (int j = 4 * i; j < 4 * i + 4 && 2 * group * GROUP + j < 2 * grid.L; j++)
        ((float*)to)[j] = sum[j];
    }
  }
};

struct Scatter {                                 // table[l, row] += weight x grad[n, l]
  Grid grid;                                     //                 + weight along v x turned[n, l]
  const Row *grad, *turned;                      // null: none
  float* table;
  int64_t N, run;                                // points per item

  HD void flush(float* level, const uint32_t* row, const float (*sum)[2]) const {
    UNROLL for (int c = 0; c < 8; c += 2) {
      if (PAIRS && (row[c] ^ row[c + 1]) == 1) { // one wide addition for the pair
        const float *low = sum[c], *high = sum[c + 1];
        const bool swap = row[c] & 1;
        const float pair[4] = {swap ? high[0] : low[0], swap ? high[1] : low[1],
                               swap ? low[0] : high[0], swap ? low[1] : high[1]};
        add<4>(level + 2 * (row[c] & ~1u), pair);
      } else {
        add<2>(level + 2 * row[c], sum[c]), add<2>(level + 2 * row[c + 1], sum[c + 1]);
      }
    }
  }
  HD void operator()(int64_t item, int l) const {              // a level is a group
    float* level = table + 2 * (int64_t)l * grid.T;
    float sum[8][2] = {};
    uint32_t row[8] = {};
    bool any = false;
    for (int64_t n = item * run; n < N && n < (item + 1) * run; n++) {
      Row g{}, h{};
      if (grad) g = grad[n * grid.L + l];
      if (turned) h = turned[n * grid.L + l];
      const float* v = grid.direction(n);
      if (v && v[0] == 0 && v[1] == 0 && v[2] == 0) h = {};    // room that no ray has filled
      if (g.x == 0 && g.y == 0 && h.x == 0 && h.y == 0) continue;     // hidden: nothing to learn
      const Cell cell(grid, l, n);
      bool same = any;
      UNROLL for (int c = 0; c < 8; c++) same = same && row[c] == cell.row[c];
      if (any && !same) flush(level, row, sum);
      UNROLL for (int c = 0; c < 8; c++) {
        const float w = cell.weight(c, 0), w_v = v ? cell.weight(c, v) : 0;
        sum[c][0] = (same ? sum[c][0] : 0) + w * g.x + w_v * h.x;
        sum[c][1] = (same ? sum[c][1] : 0) + w * g.y + w_v * h.y;
        row[c] = cell.row[c];
      }
      any = true;
    }
    if (any) flush(level, row, sum);
  }
};

struct Pull {                                    // pulled[n] = sum of weight' x (grad[n, l] . row)
  Grid grid;
  const Row* table;
  const Row* grad;
  float* pulled;

  HD void operator()(int64_t n, int group) const {
    const float* v = grid.direction(n);
    float sum[3] = {};
    for (int l = group * GROUP; l < grid.L && l < (group + 1) * GROUP; l++) {
      const Row g = grad[n * grid.L + l];
      const Cell cell(grid, l, n);
      UNROLL for (int c = 0; c < 8; c += 2) {
        Row row[2];
        read(table + (int64_t)l * grid.T, cell, c, row);
        UNROLL for (int k = c; k < c + 2; k++) {
          const float dot = g.x * row[k - c].x + g.y * row[k - c].y;
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
    const int most = (int)ceilf(2 * sqrtf(3.f) / delta) + 1;   // the box's diagonal; a NaN ray ends
    for (int k = 0; k < most && n < end; k++) {
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

// CUDA: a warp shares a ray, a lane takes each 32nd of its samples. The CPU: one lane takes all.
template <int C, bool BACKWARD> struct Composite {     // sums[ray] = sum of w [values, 1, t]
  const float *sigma, *values, *t;
  const int64_t* offsets;
  int64_t R, N;
  float delta;
  const float *grad, *sums_before;               // backward: of sums, and sums
  float *first, *second;                         // sums and w; backward: gradients of sigma, values

  HD void operator()(int64_t item, int) const {
    const int64_t ray = item / LANES, lane = item % LANES, end = offsets[ray + 1];
    float up[C + 2], sum[C + 2] = {}, depth = 0, behind = 0;   // depth: optical, before the chunk
    UNROLL for (int c = 0; c < C + 2 && BACKWARD; c++) {
      up[c] = grad[ray * (C + 2) + c];
      behind += up[c] * sums_before[ray * (C + 2) + c];
    }
    for (int64_t n = offsets[ray] + lane; n - lane < end; n += LANES) {
      const float tau = n < end && depth < DARK ? sigma[n] * delta : 0;
      const float over = depth + before(tau), light = over < DARK ? expf(-over) : 0;
      const float w = light * -expm1f(-tau);
      const bool lit = n < end && over < DARK;
      depth = last(over + tau);
      if constexpr (BACKWARD) {
        float g = lit ? up[C] + up[C + 1] * t[n] : 0;          // grad . [values, 1, t]
        UNROLL for (int c = 0; c < C; c++) {
          if (lit) g += up[c] * values[n * C + c];
          if (n < end) second[n * C + c] = up[c] * w;
        }
        behind -= before(w * g) + w * g;         // the sum of w g over the samples behind n
        if (n < end) first[n] = lit ? delta * ((light - w) * g - behind) : 0;
        behind = last(behind);
      } else {
        UNROLL for (int c = 0; c < C; c++) sum[c] += lit ? w * values[n * C + c] : 0;
        sum[C] += w, sum[C + 1] += lit ? w * t[n] : 0;
        if (n < end) second[n] = w;
      }
    }
    UNROLL for (int c = 0; c < C + 2 && !BACKWARD; c++) {
      const float all = last(before(sum[c]) + sum[c]);
      if (lane == 0) first[ray * (C + 2) + c] = all;
    }
    for (int64_t n = offsets[R] + item; n < N; n += R * LANES) {     // room that no ray has filled
      (BACKWARD ? first : second)[n] = 0;
      UNROLL for (int c = 0; c < C && BACKWARD; c++) second[n * C + c] = 0;
    }
  }
};

// ---- The operators: NeRFConfig or hash_encode has checked the arguments; allocate and launch ----

Tensor gather(In points, In table, Ints vertices, MaybeIn along) {
  const Tensor x = plain(points), v = plain(along), rows = plain(table);
  const Grid grid(x, v, vertices, table.size(1));
  const Tensor encoded = at::empty({x.size(0), 2 * grid.L}, x.options());
  launch(x, x.size(0), (grid.L + GROUP - 1) / GROUP,
         Gather{grid, (const Row*)in(rows), out(encoded)});
  return encoded;
}

Tensor pull(In points, In table, In grad, Ints vertices, MaybeIn along) {
  const Tensor x = plain(points), v = plain(along), rows = plain(table), g = plain(grad);
  const Grid grid(x, v, vertices, table.size(1));
  const Tensor pulled = at::zeros_like(x);
  launch(x, x.size(0), (grid.L + GROUP - 1) / GROUP,
         Pull{grid, (const Row*)in(rows), (const Row*)in(g), out(pulled)});
  return pulled;
}

Tensor scatter_both(In points, MaybeIn grad, MaybeIn turned, Ints vertices, int64_t T,
                    MaybeIn along) {
  const Tensor x = plain(points), v = plain(along), g = plain(grad), h = plain(turned);
  const Grid grid(x, v, vertices, T);
  const Tensor table = at::zeros({grid.L, T, 2}, x.options());
  const int64_t N = x.size(0), run = x.is_cuda() ? 8 : std::max<int64_t>(N, 1);
  launch(x, (N + run - 1) / run, grid.L,
         Scatter{grid, (const Row*)in(g), (const Row*)in(h), out(table), N, run}, !x.is_cuda());
  return table;
}

Tensor scatter(In points, In grad, Ints vertices, int64_t T, MaybeIn along) {
  const std::optional<Tensor> g = grad, none;
  return scatter_both(points, along ? none : g, along ? g : none, vertices, T, along);
}

// capacity < 0: room for exactly the samples there are, which waits for the device to count them.
// Else no waiting: room for so many, and the last rays are cut short where there are more.
std::tuple<Tensor, Tensor, Tensor, Tensor> march(In origins, In directions, In occupied, In shift,
                                                 double delta, int64_t capacity) {
  const Tensor o = plain(origins), d = plain(directions), s = plain(shift);
  const Tensor cells = occupied.contiguous();
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
std::tuple<Tensor, Tensor> composite(In sigma, In values, In t, In offsets, double delta,
                                     MaybeIn grad, MaybeIn sums) {
  const Tensor s = plain(sigma), c = plain(values), t_ = plain(t), g = plain(grad), y = plain(sums);
  const int64_t C = c.size(1), R = offsets.size(0) - 1, N = s.size(0);
  TORCH_CHECK(C == 3 || C == 6, "composite: 3 or 6 channels, not ", C);
  const auto blank = [&](In x) { return R ? at::empty_like(x) : at::zeros_like(x); };
  const Tensor first = grad ? blank(s) : at::empty({R, C + 2}, s.options());
  const Tensor second = blank(grad ? c : s);
  const auto run = [&](auto C, auto backward) {
    launch(s, s.is_cuda() ? 32 * R : R, 1, Composite<C, backward>{
        in(s), in(c), in(t_), offsets.const_data_ptr<int64_t>(), R, N, (float)delta, in(g), in(y),
        out(first), out(second)});
  };
  const auto pick = [&](auto C) { grad ? run(C, std::true_type()) : run(C, std::false_type()); };
  C == 3 ? pick(std::integral_constant<int, 3>()) : pick(std::integral_constant<int, 6>());
  return {first, second};
}

TORCH_LIBRARY(hashgrid, m) {
  m.def("gather(Tensor points, Tensor table, int[] vertices, Tensor? along) -> Tensor");
  m.def("pull(Tensor points, Tensor table, Tensor grad, int[] vertices, Tensor? along) -> Tensor");
  m.def("scatter(Tensor points, Tensor grad, int[] vertices, int T, Tensor? along) -> Tensor");
  m.def("scatter_both(Tensor points, Tensor? grad, Tensor? turned, int[] vertices, int T,"
        " Tensor? along) -> Tensor");
  m.def("march(Tensor origins, Tensor directions, Tensor occupied, Tensor shift, float delta,"
        " int capacity) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite(Tensor sigma, Tensor values, Tensor t, Tensor offsets, float delta,"
        " Tensor? grad, Tensor? sums) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(hashgrid, CompositeExplicitAutograd, m) {           // the CPU and CUDA alike
  m.impl("gather", gather), m.impl("pull", pull), m.impl("scatter", scatter);
  m.impl("scatter_both", scatter_both), m.impl("march", march), m.impl("composite", composite);
}
