// The few instructions that need inline PTX. Included by common.cuh; the tests put another file in its place to
// run the kernels on a CPU.
#pragma once

// Read once, by this thread only: keep it out of L1.
__device__ __forceinline__ uint4 load_once(const void* base, i64 element) {
    uint4 v;
    const char* p = static_cast<const char*>(base) + element * BYTES;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Two half-precision numbers in a word, to fp32 and back; rounds to nearest, ties to even.
__device__ __forceinline__ void unpack_word(u32 word, float& low, float& high) {
#if DTYPE == 1
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
#else
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(word));
#endif
}

__device__ __forceinline__ u32 pack_word(float low, float high) {
    u32 word;
#if DTYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
    return word;
}
