// Sixteen-byte chunks of fp32, bf16 or fp16, and sums over lanes. Needs no header, so NVRTC and nvcc both take it.
// DTYPE: 0 fp32, 1 bf16, 2 fp16. Arithmetic is fp32; `rounded` goes through the storage type and back, at the
// places where the eager model stores a tensor, so that both agree value for value.
#pragma once

#ifndef DTYPE
#define DTYPE 1
#endif

typedef long long i64;
typedef unsigned int u32;

constexpr int CHUNK = DTYPE == 0 ? 4 : 8;    // elements in 16 bytes
constexpr int BYTES = DTYPE == 0 ? 4 : 2;    // of one element
constexpr u32 FULL = 0xffffffffu;

#include <ptx.cuh>

// Read by many threads: weights, modulation, rotary tables.
__device__ __forceinline__ uint4 load_shared(const void* base, i64 element) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(base) + element * BYTES));
}

__device__ __forceinline__ void store(void* base, i64 element, uint4 v) {
    *reinterpret_cast<uint4*>(static_cast<char*>(base) + element * BYTES) = v;
}

__device__ __forceinline__ void unpack(uint4 v, float (&f)[CHUNK]) {
#if DTYPE == 0
    f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y), f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
#else
    unpack_word(v.x, f[0], f[1]), unpack_word(v.y, f[2], f[3]);
    unpack_word(v.z, f[4], f[5]), unpack_word(v.w, f[6], f[7]);
#endif
}

__device__ __forceinline__ uint4 pack(const float (&f)[CHUNK]) {
    uint4 v;
#if DTYPE == 0
    v.x = __float_as_uint(f[0]), v.y = __float_as_uint(f[1]), v.z = __float_as_uint(f[2]), v.w = __float_as_uint(f[3]);
#else
    v.x = pack_word(f[0], f[1]), v.y = pack_word(f[2], f[3]);
    v.z = pack_word(f[4], f[5]), v.w = pack_word(f[6], f[7]);
#endif
    return v;
}

__device__ __forceinline__ void round_chunk(float (&f)[CHUNK]) { unpack(pack(f), f); }

__device__ __forceinline__ float rounded(float x) {
#if DTYPE == 0
    return x;
#else
    float low, high;
    unpack_word(pack_word(x, 0.f), low, high);
    return low;
#endif
}

// CHUNK weights in the storage type, or in fp32 (`wide`); ones where there are none.
__device__ __forceinline__ void load_weight(const void* base, int element, bool wide, float (&w)[CHUNK]) {
    if (base == nullptr) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) w[i] = 1.f;
    } else if (wide) {
        const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(base) + element);
#pragma unroll
        for (int i = 0; i < CHUNK / 4; ++i) {
            const float4 v = __ldg(p + i);
            w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
        }
    } else {
        unpack(load_shared(base, element), w);
    }
}

// Sum over LANES neighbouring lanes; every one of them gets it.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL, x, offset);
    return x;
}

// Sum over the block (a multiple of 32 threads); every thread gets it. `scratch` holds 32 floats.
__device__ __forceinline__ float sum_block(float x, float* scratch) {
    x = sum_lanes<32>(x);
    __syncthreads(); // the last use of scratch is over
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    return sum_lanes<32>(lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : 0.f);
}
