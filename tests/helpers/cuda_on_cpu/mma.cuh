// The functions of csrc/mma.cuh in plain C++. A copy to shared memory lands when its thread waits for it, not before;
// a row that is not aligned to 16 bytes ends the program.
#pragma once

static float half_at(u32 word, int i) {
    float low, high;
    unpack_word(word, low, high);
    return i ? high : low;
}

__device__ __forceinline__ void multiply_add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Parts { u32 a[4], b[2]; } all[32], mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    exchange(mine, all);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            const Parts &left = all[row % 8 * 4 + k % 8 / 2], &right = all[column * 4 + k % 8 / 2];
            d[i] += half_at(left.a[row / 8 + k / 8 * 2], k % 2) * half_at(right.b[k / 8], k % 2);
        }
}

static void load_matrices(u32 (&out)[4], const uint4* row, bool transposed) {
    const uint4* all[32];
    exchange(row, all);
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int m = 0; m < 4; ++m) {
        unsigned short pair[2];
        for (int i = 0; i < 2; ++i) {
            const int from = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
            if (reinterpret_cast<unsigned long long>(all[8 * m + from]) % 16) abort();
            pair[i] = reinterpret_cast<const unsigned short*>(all[8 * m + from])[column];
        }
        memcpy(&out[m], pair, 4);
    }
}

__device__ __forceinline__ void load_matrices(u32 (&out)[4], const uint4* row) { load_matrices(out, row, false); }

__device__ __forceinline__ void load_transposed(u32 (&out)[4], const uint4* row) { load_matrices(out, row, true); }

struct Copy { uint4* to; const char* from; };
static std::vector<Copy> copies[1024];

__device__ __forceinline__ void copy_later(uint4* to, const void* base, i64 element, bool there) {
    const char* from = static_cast<const char*>(base) + element * BYTES;
    if (reinterpret_cast<unsigned long long>(from) % 16 || reinterpret_cast<unsigned long long>(to) % 16) abort();
    memset(to, 0xff, 16); // NaN until it lands
    copies[threadIdx.x].push_back({to, there ? from : nullptr});
}

__device__ __forceinline__ void copies_done() {
    for (const Copy& copy : copies[threadIdx.x])
        if (copy.from) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    copies[threadIdx.x].clear();
}
