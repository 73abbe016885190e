
// --- decode: packed matrices (src/quant) to plain numbers; those of a layer, or of all its experts, in one launch. A
// warp takes a run of 1024 codes: a tile of nf4 or nvfp4, a sixteenth of one of block_fp8. Four times a thread takes 8
// neighbours: 4 bytes of codes (block_fp8: 8) and one scale, from which it makes 16 bytes of bf16 (fp32: 32), so that
// a warp reads and writes whole lines.
//
// Bytes that move for a weight, to bf16: nf4 and nvfp4 576 / 1024 + 2 = 2.56, block_fp8 1 + 2 = 3; to fp32 two more.
//
// A code times its scale is one fp32 product, rounded once to nearest even: the bits that src/quant decodes.

// Most matrices that lie one below the other, as those of q, k and v.
constexpr int LEAVES = 8;
constexpr int PACKS = 4;
constexpr int RUN = PACKS * WARP * PACK;
constexpr int CODES = 512;  // of a tile of four-bit codes, in bytes; its scales follow

// Matrices of one base: `count` leaves. The tiles of all bases lie one after another, base by base and leaf by leaf.
struct Leaves {
  unsigned count, tiles, rows, columns;
  unsigned tiles_of[LEAVES], rows_of[LEAVES];
};

// A leaf: the number of the tile in it, its rows and columns, its first row among those of all bases, and its number
// among all leaves.
struct Leaf {
  unsigned tile, rows, columns;
  long long first;
  unsigned number;
};

__device__ inline Leaf leaf_of(const Leaves &all, unsigned tile) {
  unsigned base = tile / all.tiles, inside = tile % all.tiles, row = 0, rows = all.rows_of[0], number = 0;
#pragma unroll
  for (unsigned i = 0; i + 1 < LEAVES; i++) {
    if (number == i && i + 1 < all.count && inside >= all.tiles_of[i]) {
      inside -= all.tiles_of[i];
      row += all.rows_of[i];
      rows = all.rows_of[i + 1];
      number = i + 1;
    }
  }
  return {inside, rows, all.columns, (long long)base * all.rows + row, base * all.count + number};
}

// Neighbours in a row of the leaf, the first of which is element `first` of it.
struct Neighbours {
  long long first;
  int count;
};

__device__ inline int up_to_a_pack(int count) { return count < 0 ? 0 : count < PACK ? count : PACK; }

// The pack in `place` of the flattened matrix.
__device__ inline Neighbours flat(const Leaf &leaf, unsigned place) {
  return {place, up_to_a_pack((int)(leaf.rows * leaf.columns - place))};
}

// The value of an e4m3 code: its exponent and mantissa are those of an fp32 number that is 2^120 times smaller, also
// where both are subnormal. The two NaNs give 480, as on the host.
__device__ inline float e4m3(unsigned code) {
  return __fmul_rn(__uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20), 0x1p120f);
}

__constant__ float NF4[16] = {-1.0f,        -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
                              -0.091050036f, 0.0f,         0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
                              0.44070983f,   0.562617f,    0.72295684f,  1.0f};

struct Nf4 {
  typedef unsigned Codes;
  static constexpr int BYTES = CODES + 64, RUNS = 1;
  static constexpr bool HAS_TABLE = true;

  static __device__ float scale(const unsigned char *tile, int pack, float) { return ((const float *)(tile + CODES))[pack / 8]; }
  // The first of two codes is in the high half of its byte.
  static __device__ float value(Codes codes, int k, const float *table) { return table[codes >> 4 * (k ^ 1) & 15]; }
  static __device__ Neighbours place(const Leaf &leaf, int, int pack) { return flat(leaf, leaf.tile * RUN + pack * PACK); }
};

struct NvFp4 {
  typedef unsigned Codes;
  static constexpr int BYTES = CODES + 64, RUNS = 1;
  static constexpr bool HAS_TABLE = false;

  static __device__ float scale(const unsigned char *tile, int pack, float global) {
    return __fmul_rn(global, e4m3(tile[CODES + pack / 2]));
  }
  // e2m1, as an fp32 number that is 2^126 times smaller.
  static __device__ float value(Codes codes, int k, const float *) {
    unsigned code = codes >> 4 * k;
    return __fmul_rn(__uint_as_float((code & 8) << 28 | (code & 7) << 22), 0x1p126f);
  }
  // Rows are filled to whole groups of 16.
  static __device__ Neighbours place(const Leaf &leaf, int, int pack) {
    unsigned place = leaf.tile * RUN + pack * PACK, padded = (leaf.columns + 15) / 16 * 16;
    if (padded == leaf.columns) return flat(leaf, place);
    unsigned row = place / padded, column = place % padded;
    return {(long long)row * leaf.columns + column, row < leaf.rows ? up_to_a_pack((int)(leaf.columns - column)) : 0};
  }
};

struct BlockFp8 {
  typedef uint2 Codes;
  static constexpr int SIDE = 128, BYTES = SIDE * SIDE + 64, RUNS = SIDE * SIDE / RUN;
  static constexpr bool HAS_TABLE = false;

  static __device__ float scale(const unsigned char *tile, int, float) { return *(const float *)(tile + SIDE * SIDE); }
  static __device__ float value(Codes codes, int k, const float *) { return e4m3((k < 4 ? codes.x : codes.y) >> k % 4 * 8); }
  static __device__ Neighbours place(const Leaf &leaf, int run, int pack) {
    unsigned across = (leaf.columns + SIDE - 1) / SIDE, inside = run * RUN + pack * PACK;
    unsigned row = leaf.tile / across * SIDE + inside / SIDE, column = leaf.tile % across * SIDE + inside % SIDE;
    return {(long long)row * leaf.columns + column, row < leaf.rows ? up_to_a_pack((int)(leaf.columns - column)) : 0};
  }
};

// Two bf16, the first in the low half. One instruction where there is one, which rounds as `narrow` does (its NaN has
// other bits).
__device__ inline unsigned narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return narrow(first) | narrow(second) << 16;
#endif
}

__device__ inline void store_pairs(const float *from, float *to) { store(from, to); }
__device__ inline void store_pairs(const float *from, bf16 *to) {
  unsigned words[PACK / 2];
  for (int i = 0; i < PACK / 2; i++) words[i] = narrow_pair(from[2 * i], from[2 * i + 1]);
  __stcg((uint4 *)to, make_uint4(words[0], words[1], words[2], words[3]));
}

template <class Format, class T>
__device__ inline void decode(const unsigned char *tiles, const float *scales, T *out, const Leaves &leaves, unsigned runs) {
  __shared__ float table[16];
  if (Format::HAS_TABLE) {
    if (threadIdx.x < 16) table[threadIdx.x] = NF4[threadIdx.x];
    __syncthreads();
  }
  unsigned number = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (number >= runs) return;
  unsigned tile = number / Format::RUNS;
  int run = number % Format::RUNS, lane = threadIdx.x % WARP;
  Leaf leaf = leaf_of(leaves, tile);
  const unsigned char *from = tiles + (long long)tile * Format::BYTES;
  T *to = out + leaf.first * leaf.columns;
  float global = scales ? scales[leaf.number] : 1;

  typename Format::Codes codes[PACKS];
  float factors[PACKS];
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    int pack = i * WARP + lane;
    codes[i] = ((const typename Format::Codes *)from)[run * (RUN / PACK) + pack];
    factors[i] = Format::scale(from, pack, global);
  }
#pragma unroll
  for (int i = 0; i < PACKS; i++) {
    Neighbours all = Format::place(leaf, run, i * WARP + lane);
    float values[PACK];
#pragma unroll
    for (int k = 0; k < PACK; k++) values[k] = __fmul_rn(Format::value(codes[i], k, table), factors[i]);
    T *first = to + all.first;
    if (all.count == PACK && (unsigned long long)first % 16 == 0) {
      store_pairs(values, first);
    } else {
#pragma unroll
      for (int k = 0; k < PACK; k++)
        if (k < all.count) put(values[k], first + k);
    }
  }
}

#define DECODE(name, Format, T, suffix)                                                                                \
  extern "C" __global__ void name##_##suffix(const unsigned char *__restrict__ tiles, const float *__restrict__ scales, \
                                             T *__restrict__ out, Leaves leaves, unsigned runs) {                      \
    decode<Format>(tiles, scales, out, leaves, runs);                                                                  \
  }
DECODE(decode_nf4, Nf4, bf16, bf16)
DECODE(decode_nf4, Nf4, float, f32)
DECODE(decode_block_fp8, BlockFp8, bf16, bf16)
DECODE(decode_block_fp8, BlockFp8, float, f32)
DECODE(decode_nvfp4, NvFp4, bf16, bf16)
DECODE(decode_nvfp4, NvFp4, float, f32)
