// The functions of csrc/ptx.cuh in plain C++. A load that is not aligned to 16 bytes ends the program.
#pragma once

__device__ __forceinline__ uint4 load_once(const void* base, i64 element) {
    const char* p = static_cast<const char*>(base) + element * BYTES;
    if (reinterpret_cast<unsigned long long>(p) % 16) abort();
    uint4 v;
    memcpy(&v, p, 16);
    return v;
}

__device__ __forceinline__ void unpack_word(u32 word, float& low, float& high) {
#if DTYPE == 1
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
#else
    _Float16 halves[2];
    memcpy(halves, &word, 4);
    low = halves[0], high = halves[1];
#endif
}

__device__ __forceinline__ u32 to_bf16(float x) {
    const u32 u = __float_as_uint(x);
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ u32 pack_word(float low, float high) {
#if DTYPE == 1
    return to_bf16(low) | to_bf16(high) << 16;
#else
    const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    u32 word;
    memcpy(&word, halves, 4);
    return word;
#endif
}
