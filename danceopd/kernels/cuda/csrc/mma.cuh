// Matrix products of half types in fp32 by a warp, and the ways in and out of shared memory that they need. Apart
// from ptx.cuh because fp32 kernels have no use for it; the tests put another file in its place, too.
#pragma once

// d += a b: a is 16 x 16, b 16 x 8. Lane 4 g + t holds of a rows g, g + 8 (a[0], a[1]) and the same eight columns on
// (a[2], a[3]), columns 2 t, 2 t + 1; of b rows 2 t, 2 t + 1 (b0) and eight on (b1), column g; of d rows g (d[0], d[1])
// and g + 8 (d[2], d[3]), columns 2 t, 2 t + 1.
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if DTYPE == 1
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of half types: lane 8 m + r names row r of matrix m; lane 4 g + t gets of each the elements
// 2 t, 2 t + 1 of row g.
__device__ __forceinline__ void load_matrices(u32 (&out)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_transposed(u32 (&out)[4], const uint4* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(row)) : "memory");
}

// Sixteen bytes on their way to shared memory, or zeros; there after `copies_done` and a barrier.
__device__ __forceinline__ void copy_later(uint4* to, const void* base, i64 element, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(shared_address(to)), "l"(static_cast<const char*>(base) + element * BYTES), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
