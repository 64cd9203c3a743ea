// Attention for what the libraries serve badly: rows of different lengths without padding, and keys and values that
// come from a cache. out = softmax(q k^T scale) v over a sample's own tokens and then over its cached ones; not causal.
// A sample's tokens are all of its batch row, those that a list names (padding is passed by, nothing is packed), or a
// stretch of one packed row.
//
// One block takes 64 queries of one head, a warp 16 of them, which it keeps in registers. Keys and values come by 64
// through shared memory, asynchronously: values while the scores are computed, the next keys while the values are
// used. Softmax is online (arXiv 1805.02867, as in arXiv 2307.08691): a running maximum and sum for each query, in
// fp32; products are of half types with fp32 sums. Forward only.
#include "common.cuh"

#include <mma.cuh>

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif

constexpr int TILE = 64;                            // queries of a block, and keys at a time
constexpr int WARPS = 4;
constexpr int ROW = HEAD_DIM / CHUNK;               // 16-byte chunks of a row
constexpr int PITCH = ROW + 1;                      // of a row in shared memory: eight rows meet no bank twice
constexpr int STEPS = HEAD_DIM / 16;                // products of 16 along a head

struct At { i64 batch, token; };

struct Attend {
    const void *q, *k, *v, *source_k, *source_v;    // (batch, token, head, HEAD_DIM); heads are HEAD_DIM apart
    void* out;
    const int *cumulative, *tokens;                 // null: every token of a batch row; only `tokens` null: packed
    At q_at, k_at, v_at, source_k_at, source_v_at, out_at;
    int heads, length, source, unused;              // tokens of a batch row; cached tokens of a sample
    float scale;                                    // of the scores, times log2(e)
    int unused2;
};

// Tokens `first` and on of one head into a tile; zeros from `count` on.
__device__ __forceinline__ void fetch(uint4* tile, const void* base, i64 at, i64 step, const int* tokens, int first,
                                      int count) {
#pragma unroll
    for (int c = threadIdx.x; c < TILE * ROW; c += WARPS * 32) {
        const int row = c / ROW, column = c % ROW, i = first + row;
        const bool there = i < count;
        const i64 token = !there ? 0 : tokens != nullptr ? tokens[i] : i;
        copy_later(tile + row * PITCH + column, base, at + token * step + column * CHUNK, there);
    }
}

// Over the four lanes that share a row of scores.
__device__ __forceinline__ float highest(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) ragged_attention(const __grid_constant__ Attend p) {
    __shared__ uint4 keys[TILE * PITCH], values[TILE * PITCH];
    const int sample = blockIdx.y / p.heads, head = blockIdx.y % p.heads, first = blockIdx.x * TILE;
    const int begin = p.cumulative == nullptr ? 0 : p.cumulative[sample];
    const int own = p.cumulative == nullptr ? p.length : p.cumulative[sample + 1] - begin;
    if (first >= own) return;
    const int* tokens = p.tokens == nullptr ? nullptr : p.tokens + begin;
    const bool packed = p.cumulative != nullptr && tokens == nullptr;
    const i64 start = packed ? begin : 0, column = head * HEAD_DIM;      // a packed row's batch stride is 0
    const i64 q_at = sample * p.q_at.batch + start * p.q_at.token + column;
    const i64 k_at = sample * p.k_at.batch + start * p.k_at.token + column;
    const i64 v_at = sample * p.v_at.batch + start * p.v_at.token + column;
    const i64 source_k_at = sample * p.source_k_at.batch + column, source_v_at = sample * p.source_v_at.batch + column;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;

    u32 q[STEPS][4];
    fetch(keys, p.q, q_at, p.q_at.token, tokens, first, own);
    copies_done();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        load_matrices(q[i], keys + (warp * 16 + lane % 16) * PITCH + 2 * i + lane / 16);
    __syncthreads();

    const float none = __uint_as_float(0xff800000u);            // minus infinity
    float out[2 * STEPS][4] = {}, top[2] = {none, none}, sum[2] = {0.f, 0.f};
    const int own_tiles = (own + TILE - 1) / TILE, tiles = own_tiles + (p.source + TILE - 1) / TILE;
    fetch(keys, p.k, k_at, p.k_at.token, tokens, 0, own);
    for (int j = 0; j < tiles; ++j) {
        const bool cached = j >= own_tiles;
        const int from = (cached ? j - own_tiles : j) * TILE, count = cached ? p.source : own;
        copies_done();
        __syncthreads();                                        // these keys are here; the last values are used
        if (cached)
            fetch(values, p.source_v, source_v_at, p.source_v_at.token, nullptr, from, count);
        else
            fetch(values, p.v, v_at, p.v_at.token, tokens, from, count);

        float s[TILE / 8][4] = {};
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
#pragma unroll
            for (int n = 0; n < TILE / 16; ++n) {
                u32 b[4];
                load_matrices(b, keys + (n * 16 + lane / 16 * 8 + lane % 8) * PITCH + 2 * i + lane / 8 % 2);
                multiply_add(s[2 * n], q[i], b[0], b[1]);
                multiply_add(s[2 * n + 1], q[i], b[2], b[3]);
            }
        if (from + TILE > count) {
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (from + n * 8 + 2 * quad + i % 2 >= count) s[n][i] = none;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {                  // rows g and g + 8 of the warp's sixteen
            float now = top[half];
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) now = fmaxf(now, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            now = highest(now);                                 // finite: a tile has a token
            const float shrink = exp2f((top[half] - now) * p.scale);
            top[half] = now;
            sum[half] *= shrink;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    s[n][i] = exp2f((s[n][i] - now) * p.scale);
                    sum[half] += s[n][i];
                }
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
        }

        copies_done();
        __syncthreads();                                        // these values are here; the keys are used
        if (j + 1 < own_tiles)
            fetch(keys, p.k, k_at, p.k_at.token, tokens, from + TILE, own);
        else if (j + 1 < tiles)
            fetch(keys, p.source_k, source_k_at, p.source_k_at.token, nullptr, cached ? from + TILE : 0, p.source);
#pragma unroll
        for (int n = 0; n < TILE / 16; ++n) {
            const u32 a[4] = {pack_word(s[2 * n][0], s[2 * n][1]), pack_word(s[2 * n][2], s[2 * n][3]),
                              pack_word(s[2 * n + 1][0], s[2 * n + 1][1]), pack_word(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
            for (int i = 0; i < STEPS; ++i) {
                u32 b[4];
                load_transposed(b, values + (n * 16 + lane % 16) * PITCH + 2 * i + lane / 16);
                multiply_add(out[2 * i], a, b[0], b[1]);
                multiply_add(out[2 * i + 1], a, b[2], b[3]);
            }
        }
    }

    // through shared memory, so that rows leave sixteen bytes at a time
    u32* words = reinterpret_cast<u32*>(keys) + (warp * 16 + lane / 4) * PITCH * 4 + quad;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sum[half] += __shfl_xor_sync(FULL, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL, sum[half], 2);
        const float inverse = 1.f / sum[half];
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n)
            words[half * 8 * PITCH * 4 + n * 4] = pack_word(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
    }
    __syncthreads();
    const i64 out_at = sample * p.out_at.batch + start * p.out_at.token + column;
#pragma unroll
    for (int c = threadIdx.x; c < TILE * ROW; c += WARPS * 32) {
        const int i = first + c / ROW;
        if (i < own) {
            const i64 token = tokens != nullptr ? tokens[i] : i;
            store(p.out, out_at + token * p.out_at.token + c % ROW * CHUNK, keys[c / ROW * PITCH + c % ROW]);
        }
    }
}
