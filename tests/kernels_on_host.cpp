// src/ops/cuda/*.cu on threads of the host: the same text, with what CUDA gives it made of C++. For the tests
// beside the operations, which load it as a library and start its kernels as the driver would. A block's threads are
// threads, one block after another; a warp's exchange and __syncthreads are barriers.
#include <barrier>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __constant__ static const

struct Place {
  unsigned x;
};
static thread_local Place threadIdx, blockIdx;
static Place blockDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> static void __stcg(T *to, T value) { *to = value; }

template <class To, class From> static To same_bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
static float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }

static float __fmul_rn(float x, float y) { return x * y; }
static float __fsub_rn(float x, float y) { return x - y; }

static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static float exchanged[1024];

static void __syncthreads() { block_barrier->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float x, int apart) {
  auto &warp = *warp_barriers[threadIdx.x / 32];
  exchanged[threadIdx.x] = x;
  warp.arrive_and_wait();
  float other = exchanged[threadIdx.x ^ apart];
  warp.arrive_and_wait();
  return other;
}

#include "../src/ops/cuda/kernels.cu"
#include "../src/ops/cuda/decode.cu"

using Kernel = std::function<void(void **)>;

template <class... P, std::size_t... I> static Kernel unpacked(void (*kernel)(P...), std::index_sequence<I...>) {
  return [=](void **arguments) { kernel(*(P *)arguments[I]...); };
}
template <class... P> static Kernel unpacked(void (*kernel)(P...)) { return unpacked(kernel, std::index_sequence_for<P...>{}); }

#define NAMED(name) {#name "_bf16", unpacked(name##_bf16)}, {#name "_f32", unpacked(name##_f32)}
static const std::map<std::string, Kernel> kernels = {
    NAMED(norm_forward), NAMED(norm_recompute), NAMED(norm_backward), NAMED(rope),
    NAMED(swiglu_forward), NAMED(swiglu_backward), NAMED(gather_rows),  NAMED(combine_rows),
    NAMED(exponentials), NAMED(head_gradient), {"head_gradient_wide_bf16", unpacked(head_gradient_wide_bf16)}, NAMED(adamw),
    NAMED(decode_nf4), NAMED(decode_block_fp8), NAMED(decode_nvfp4),
};

// 0, or 1 where there is no such kernel.
extern "C" int launch(const char *name, unsigned blocks, unsigned threads, void **arguments) {
  auto kernel = kernels.find(name);
  if (kernel == kernels.end()) return 1;
  blockDim.x = threads;
  block_barrier = std::make_unique<std::barrier<>>(threads);
  warp_barriers.clear();
  for (unsigned warp = 0; warp < threads / 32; warp++) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> all;
  for (unsigned thread = 0; thread < threads; thread++) {
    all.emplace_back([=] {
      threadIdx.x = thread;
      for (unsigned block = 0; block < blocks; block++) {
        blockIdx.x = block;
        kernel->second(arguments);
        __syncthreads();
      }
    });
  }
  for (auto &thread : all) thread.join();
  return 0;
}
