// RMSNorm and interleaved rotary embedding of one row of a head, for `qkv_prep`.
#pragma once
#include "common.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif

enum Flags { WEIGHT_FP32 = 1, ROUND_FIRST = 2, NO_NORM = 4 };

// What a token needs of its stream, each field chosen apart so that no struct lands in local memory.
#define OF(field) (text ? p.text.field : p.image.field)

// Rotary factors of this thread's column pairs: cos and sin of pair i lie at 2 i of their tables (the diffusers
// FLUX layout, every value twice), or at 2 i and 2 i + 1 of one table (complex numbers).
struct Rotary {
    float c[CHUNK / 2], s[CHUNK / 2];

    __device__ __forceinline__ void load(const float* cos, const float* sin, i64 at) {
#pragma unroll
        for (int i = 0; i < CHUNK / 4; ++i) {
            const float4 a = __ldg(reinterpret_cast<const float4*>(cos + at) + i);
            c[2 * i] = a.x, c[2 * i + 1] = a.z;
            if (sin == nullptr) {
                s[2 * i] = a.y, s[2 * i + 1] = a.w;
            } else {
                const float4 b = __ldg(reinterpret_cast<const float4*>(sin + at) + i);
                s[2 * i] = b.x, s[2 * i + 1] = b.z;
            }
        }
    }
    __device__ __forceinline__ void turn(float (&f)[CHUNK]) const {
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) {
            const float x = f[2 * i], y = f[2 * i + 1];
            f[2 * i] = x * c[i] - y * s[i];
            f[2 * i + 1] = y * c[i] + x * s[i];
        }
    }
    __device__ __forceinline__ void turn_back(float (&f)[CHUNK]) const {
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) {
            const float x = f[2 * i], y = f[2 * i + 1];
            f[2 * i] = x * c[i] + y * s[i];
            f[2 * i + 1] = y * c[i] - x * s[i];
        }
    }
};

__device__ __forceinline__ float dot(const float (&a)[CHUNK], const float (&b)[CHUNK]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) sum += a[i] * b[i];
    return sum;
}

// A head's row, 16 bytes in each of LANES neighbouring lanes. Unused lanes hold zeros and take part in the sum.
template <int LANES>
__device__ __forceinline__ uint4 prepare(uint4 raw, const float (&w)[CHUNK], bool norm, bool round_first, float eps,
                                         bool rotate, const Rotary& rope) {
    float f[CHUNK];
    unpack(raw, f);
    if (norm) {
        const float r = rsqrtf(sum_lanes<LANES>(dot(f, f)) * (1.f / HEAD_DIM) + eps);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) f[i] *= r;
        if (round_first) round_chunk(f);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) f[i] *= w[i];
        if (rotate) round_chunk(f);
    }
    if (rotate) rope.turn(f);
    return pack(f);
}
