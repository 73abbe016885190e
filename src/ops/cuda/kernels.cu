// The operations of src/ops on NVIDIA GPUs, for bf16 and fp32: each is one pass over its rows, or two where a row's sum
// comes first, computes in fp32 and rounds once. Formulas and shapes are in the operations' own files. Compiled at run
// time by NVRTC, which has no headers: all that is used is CUDA's own language, so that tests can run the same text on
// host threads.

struct bf16 {
  unsigned short bits;
};

// Columns that a thread takes at a time: rows are whole packs, which begin where 16 bytes do.
constexpr int PACK = 8;
constexpr int WARP = 32;

__device__ inline float wide(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float wide(float x) { return x; }

// The bits of a bf16: to nearest, ties to even.
__device__ inline unsigned narrow(float x) {
  unsigned bits = __float_as_uint(x);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

__device__ inline void load(const bf16 *from, float *to) {
  uint4 four = *(const uint4 *)from;
  unsigned words[] = {four.x, four.y, four.z, four.w};
  for (int i = 0; i < PACK / 2; i++) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
  }
}

__device__ inline void load(const float *from, float *to) {
  for (int i = 0; i < PACK; i += 4) {
    float4 four = *(const float4 *)(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// Stores say where to, or the compiler makes four of one.
__device__ inline void store(const float *from, bf16 *to) {
  unsigned words[PACK / 2];
  for (int i = 0; i < PACK / 2; i++) words[i] = narrow(from[2 * i]) | narrow(from[2 * i + 1]) << 16;
  __stcg((uint4 *)to, make_uint4(words[0], words[1], words[2], words[3]));
}

__device__ inline void store(const float *from, float *to) {
  for (int i = 0; i < PACK; i += 4) __stcg((float4 *)(to + i), make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
}

__device__ inline void put(float x, bf16 *to) { to->bits = narrow(x); }
__device__ inline void put(float x, float *to) { *to = x; }

// The rows of a tensor whose columns are dense: after `inner` rows `outer_stride` counts from the first of them.
struct Rows {
  void *first;
  long long stride, inner, outer_stride;
};

template <class T> __device__ inline T *row_of(Rows rows, long long i) {
  return (T *)rows.first + i / rows.inner * rows.outer_stride + i % rows.inner * rows.stride;
}

__device__ inline float warp_sum(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int apart = WARP / 2; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, apart));
  return x;
}

// Over all threads of the block; `box` has a place for each warp.
template <float over_warp(float)> __device__ inline float over_block(float x, float *box, float none) {
  x = over_warp(x);
  int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
  if (lane == 0) box[threadIdx.x / WARP] = x;
  __syncthreads();
  x = over_warp(lane < warps ? box[lane] : none);
  __syncthreads();
  return x;
}

// The row of this warp, and the columns of this thread.
__device__ inline long long warp_row() { return ((long long)blockIdx.x * blockDim.x + threadIdx.x) / WARP; }
#define MY_COLUMNS(i, n) for (int i = threadIdx.x % WARP * PACK; i < n; i += WARP * PACK)

// --- norm: a warp for each row

template <class T> __device__ inline void normalise(const T *x, const float *w, float r, T *y, int n) {
  MY_COLUMNS(i, n) {
    float v[PACK];
    load(x + i, v);
    for (int k = 0; k < PACK; k++) v[k] = v[k] * r * w[i + k];
    store(v, y + i);
  }
}

template <class T> __device__ inline void norm_forward(Rows x, const float *w, Rows y, float *r, long long rows, int n, float eps) {
  long long row = warp_row();
  if (row >= rows) return;
  const T *from = row_of<T>(x, row);
  float squares = 0;
  MY_COLUMNS(i, n) {
    float v[PACK];
    load(from + i, v);
    for (int k = 0; k < PACK; k++) squares += v[k] * v[k];
  }
  float statistic = 1 / sqrtf(warp_sum(squares) / n + eps);
  if (threadIdx.x % WARP == 0) r[row] = statistic;
  normalise(from, w, statistic, row_of<T>(y, row), n);
}

template <class T> __device__ inline void norm_recompute(Rows x, const float *w, Rows y, const float *r, long long rows, int n) {
  long long row = warp_row();
  if (row < rows) normalise(row_of<T>(x, row), w, r[row], row_of<T>(y, row), n);
}

// d becomes dx, plus `add` where has_add.
template <class T>
__device__ inline void norm_backward(Rows d, Rows x, const float *w, const float *r, Rows add, int has_add, long long rows, int n) {
  long long row = warp_row();
  if (row >= rows) return;
  T *to = row_of<T>(d, row);
  const T *from = row_of<T>(x, row), *more = has_add ? row_of<T>(add, row) : from;
  float statistic = r[row], dot = 0;
  MY_COLUMNS(i, n) {
    float v[PACK], g[PACK];
    load(from + i, v);
    load(to + i, g);
    for (int k = 0; k < PACK; k++) dot += g[k] * w[i + k] * v[k];
  }
  float c = statistic * statistic * statistic * warp_sum(dot) / n;
  MY_COLUMNS(i, n) {
    float v[PACK], g[PACK], a[PACK] = {};
    load(from + i, v);
    load(to + i, g);
    if (has_add) load(more + i, a);
    for (int k = 0; k < PACK; k++) g[k] = g[k] * w[i + k] * statistic - v[k] * c + (has_add ? a[k] : 0);
    store(g, to + i);
  }
}

// --- rope: a thread for each pack of the first half of a head's rotated columns, with its partner in the second

template <class T>
__device__ inline void rope(Rows x, const float *cos, const float *sin, float direction, long long rows, int heads, int dim,
                            int half) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  int packs = half / PACK;
  long long row = i / packs / heads;
  if (row >= rows) return;
  int column = i % packs * PACK, head = i / packs % heads;
  T *first = row_of<T>(x, row) + head * dim + column, *second = first + half;
  float a[PACK], b[PACK];
  load(first, a);
  load(second, b);
  for (int k = 0; k < PACK; k++) {
    float u = a[k], v = b[k], c = cos[row * half + column + k], s = sin[row * half + column + k] * direction;
    a[k] = u * c - v * s;
    b[k] = v * c + u * s;
  }
  store(a, first);
  store(b, second);
}

// --- swiglu: a warp for each row

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <class T> __device__ inline void swiglu_forward(Rows gate_up, const float *scale, Rows y, long long rows, int n) {
  long long row = warp_row();
  if (row >= rows) return;
  const T *gate = row_of<T>(gate_up, row), *up = gate + n;
  T *to = row_of<T>(y, row);
  float c = scale ? scale[row] : 1;
  MY_COLUMNS(i, n) {
    float g[PACK], u[PACK];
    load(gate + i, g);
    load(up + i, u);
    for (int k = 0; k < PACK; k++) g[k] = g[k] * sigmoid(g[k]) * u[k] * c;
    store(g, to + i);
  }
}

// gate, up and d become their gradients and y; dc where there is a scale.
template <class T>
__device__ inline void swiglu_backward(Rows d, Rows gate_up, const float *scale, float *d_scale, long long rows, int n) {
  long long row = warp_row();
  if (row >= rows) return;
  T *gate = row_of<T>(gate_up, row), *up = gate + n, *to = row_of<T>(d, row);
  float c = scale ? scale[row] : 1, sum = 0;
  MY_COLUMNS(i, n) {
    float g[PACK], u[PACK], dy[PACK];
    load(gate + i, g);
    load(up + i, u);
    load(to + i, dy);
    for (int k = 0; k < PACK; k++) {
      float s = sigmoid(g[k]), silu = g[k] * s, scaled = dy[k] * c, y = silu * u[k];
      sum += dy[k] * y;
      g[k] = scaled * u[k] * (s + silu * (1 - s));
      u[k] = scaled * silu;
      dy[k] = y * c;
    }
    store(g, gate + i);
    store(u, up + i);
    store(dy, to + i);
  }
  if (!scale) return;
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) d_scale[row] = sum;
}

// --- dispatch: a warp for each row that is written

// Row i is row at[i] of x, or zeros where that is negative.
template <class T> __device__ inline void gather_rows(Rows x, const long long *at, Rows out, long long rows, int n) {
  long long row = warp_row();
  if (row >= rows) return;
  long long source = at[row];
  const T *from = row_of<T>(x, source < 0 ? 0 : source);
  T *to = row_of<T>(out, row);
  MY_COLUMNS(i, n) {
    float v[PACK] = {};
    if (source >= 0) load(from + i, v);
    store(v, to + i);
  }
}

// Row i is the sum of the k rows at[i * k ..] of x, and of `add` where has_add.
template <class T>
__device__ inline void combine_rows(Rows x, const long long *at, int k, Rows add, int has_add, Rows out, long long rows, int n) {
  long long row = warp_row();
  if (row >= rows) return;
  const T *more = row_of<T>(add, has_add ? row : 0);
  T *to = row_of<T>(out, row);
  MY_COLUMNS(i, n) {
    float sum[PACK] = {}, v[PACK];
    if (has_add) load(more + i, sum);
    for (int choice = 0; choice < k; choice++) {
      load(row_of<T>(x, at[row * k + choice]) + i, v);
      for (int j = 0; j < PACK; j++) sum[j] += v[j];
    }
    store(sum, to + i);
  }
}

// --- cross entropy

// Logits become p; the running sums m, s and l_t take them in; e. A block for each row of logits. A row has `width`
// targets, those outside of the chunk are not in 0..n.
template <class T>
__device__ inline void exponentials(Rows logits, const long long *targets, int width, float *m, float *s, float *target_logits,
                                    float *rescale, int n) {
  __shared__ float box[WARP];
  long long row = blockIdx.x;
  T *l = row_of<T>(logits, row);
  const float none = __uint_as_float(0xff800000);  // minus infinity
  float before = m[row], maximum = before;
  for (long long k = row * width + threadIdx.x; k < (row + 1) * width; k += blockDim.x) {
    long long target = targets[k];
    if (target >= 0 && target < n) target_logits[k] = wide(l[target]);
  }
  int first = threadIdx.x * PACK, step = blockDim.x * PACK;
  for (int i = first; i < n; i += step) {
    float v[PACK];
    load(l + i, v);
    for (int k = 0; k < PACK; k++) maximum = fmaxf(maximum, v[k]);
  }
  maximum = over_block<warp_max>(maximum, box, none);
  // The maximum has taken in the targets. From here on their exponentials are 0.
  for (long long k = row * width + threadIdx.x; k < (row + 1) * width; k += blockDim.x) {
    long long target = targets[k];
    if (target >= 0 && target < n) put(none, l + target);
  }
  __syncthreads();
  float sum = 0;
  for (int i = first; i < n; i += step) {
    float v[PACK];
    load(l + i, v);
    for (int k = 0; k < PACK; k++) {
      v[k] = expf(v[k] - maximum);
      sum += v[k];
    }
    store(v, l + i);
  }
  sum = over_block<warp_sum>(sum, box, 0);
  if (threadIdx.x != 0) return;
  float e = expf(before - maximum);
  rescale[row] = e;
  s[row] = s[row] * e + sum;
  m[row] = maximum;
}

// a becomes (share * a - the sum over targets of target * w) * scale, each operation rounded. A warp for each row; row
// i has the rows offsets[i] .. offsets[i + 1] of w, the values target[i * width ..] for them, and share and scale at
// factors[2 * i].
template <class A, class T>
__device__ inline void head_gradient(Rows a, Rows w, const long long *offsets, const float *target, int width, const float *factors,
                                     long long rows, int n) {
  long long row = warp_row();
  if (row >= rows) return;
  A *to = row_of<A>(a, row);
  long long begin = offsets[row];
  int own = offsets[row + 1] - begin;
  float share = factors[2 * row], scale = factors[2 * row + 1];
  MY_COLUMNS(i, n) {
    float v[PACK], u[PACK];
    load(to + i, v);
    for (int k = 0; k < PACK; k++) v[k] = __fmul_rn(v[k], share);
    for (int t = 0; t < own; t++) {
      load(row_of<T>(w, begin + t) + i, u);
      for (int k = 0; k < PACK; k++) v[k] = __fsub_rn(v[k], __fmul_rn(u[k], target[row * width + t]));
    }
    for (int k = 0; k < PACK; k++) v[k] = __fmul_rn(v[k], scale);
    store(v, to + i);
  }
}

// --- adamw: a thread for each pack of a flat piece

// As the host's kernel has them.
struct Factors {
  float coefficient, decay, keep_m, keep_v, take_m, take_v, root, eps, rate;
};

// p, m and v move against g; compute becomes p.
template <class T> __device__ inline void adamw(const float *g, float *p, float *m, float *v, T *compute, Factors f, long long n) {
  long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
  if (first >= n) return;
  float gradient[PACK], master[PACK], mean[PACK], square[PACK];
  load(g + first, gradient);
  load(p + first, master);
  load(m + first, mean);
  load(v + first, square);
  for (int k = 0; k < PACK; k++) {
    float x = gradient[k] * f.coefficient;
    mean[k] = mean[k] * f.keep_m + x * f.take_m;
    square[k] = square[k] * f.keep_v + x * x * f.take_v;
    master[k] = master[k] * f.decay - mean[k] / (sqrtf(square[k]) / f.root + f.eps) * f.rate;
  }
  store(master, p + first);
  store(mean, m + first);
  store(square, v + first);
  store(master, compute + first);
}

#define BOTH(name, parameters, arguments)                                                  \
  extern "C" __global__ void name##_bf16 parameters { name<bf16> arguments; }              \
  extern "C" __global__ void name##_f32 parameters { name<float> arguments; }

BOTH(norm_forward, (Rows x, const float *w, Rows y, float *r, long long rows, int n, float eps), (x, w, y, r, rows, n, eps))
BOTH(norm_recompute, (Rows x, const float *w, Rows y, const float *r, long long rows, int n), (x, w, y, r, rows, n))
BOTH(norm_backward, (Rows d, Rows x, const float *w, const float *r, Rows add, int has_add, long long rows, int n),
     (d, x, w, r, add, has_add, rows, n))
BOTH(rope,
     (Rows x, const float *cos, const float *sin, float direction, long long rows, int heads, int dim, int half),
     (x, cos, sin, direction, rows, heads, dim, half))
BOTH(swiglu_forward, (Rows gate_up, const float *scale, Rows y, long long rows, int n), (gate_up, scale, y, rows, n))
BOTH(swiglu_backward, (Rows d, Rows gate_up, const float *scale, float *d_scale, long long rows, int n),
     (d, gate_up, scale, d_scale, rows, n))
BOTH(gather_rows, (Rows x, const long long *at, Rows out, long long rows, int n), (x, at, out, rows, n))
BOTH(combine_rows, (Rows x, const long long *at, int k, Rows add, int has_add, Rows out, long long rows, int n),
     (x, at, k, add, has_add, out, rows, n))
BOTH(exponentials,
     (Rows logits, const long long *targets, int width, float *m, float *s, float *target_logits, float *rescale, int n),
     (logits, targets, width, m, s, target_logits, rescale, n))
#define HEAD_GRADIENT(name, A, T)                                                                                       \
  extern "C" __global__ void name(Rows a, Rows w, const long long *offsets, const float *target, int width,             \
                                  const float *factors, long long rows, int n) {                                        \
    head_gradient<A, T>(a, w, offsets, target, width, factors, rows, n);                                                \
  }
HEAD_GRADIENT(head_gradient_bf16, bf16, bf16)
HEAD_GRADIENT(head_gradient_f32, float, float)
HEAD_GRADIENT(head_gradient_wide_bf16, float, bf16)
extern "C" __global__ void adamw_bf16(const float *g, float *p, float *m, float *v, bf16 *compute, Factors f, long long n) {
  adamw(g, p, m, v, compute, f, n);
}
extern "C" __global__ void adamw_f32(const float *g, float *p, float *m, float *v, float *compute, Factors f, long long n) {
  adamw(g, p, m, v, compute, f, n);
}
