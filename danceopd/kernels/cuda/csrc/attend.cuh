// Attention for rows of different lengths without padding, and for keys and values that come from a cache, which the
// libraries do slowly.  out = softmax(q k^T scale) v  over a sample's own tokens, then its cached ones; not causal.
// A sample's tokens are all of its batch row, those that a list names (padding is passed by, nothing is packed), or a
// stretch of one packed row.
//
// One block takes 64 queries of one head, a warp 16 of them, which it keeps in registers. Keys and values come by 64
// through shared memory, asynchronously: values while the scores are computed, the next keys while the values are
// used. Softmax is online (arXiv 1805.02867, as in arXiv 2307.08691): a running maximum and sum for each query, in
// fp32; products are of half types with fp32 sums. Forward only.
//
// With the prologue, q and k come as the projections left them, text and image apart. A tile is normalised and rotated
// in shared memory as soon as it is there, rounded where `qkv_prep` rounds it: queries once, keys again for every block
// of queries. Cached keys are prepared already.
#pragma once
#include "common.cuh"

#include <mma.cuh>
#include <rows.cuh>

constexpr int TILE = 64;                            // queries of a block, and keys at a time
constexpr int WARPS = 4;
constexpr int ROW = HEAD_DIM / CHUNK;               // 16-byte chunks of a row
constexpr int LANES = ROW <= 8 ? 8 : 16;            // lanes that prepare a row
constexpr int PITCH = ROW + 1;                      // of a row in shared memory: eight rows meet no bank twice
constexpr int STEPS = HEAD_DIM / 16;                // products of 16 along a head

struct At { i64 batch, token; };

struct Stream {
    const void *q, *k, *v;                          // (batch, token, head, HEAD_DIM); heads are HEAD_DIM apart
    const void *weight_q, *weight_k;                // HEAD_DIM each, or null
    const float *cos, *sin;                         // see `Rotary`; cos null: no rotation
    At q_at, k_at, v_at, rope_at;
    int tokens, first;                              // its rows in the joint sequence
    int flags, unused;
};

struct Attend {
    Stream image, text;                             // without the prologue everything is image
    const void *source_k, *source_v;                // as q; prepared
    void* out;
    const int *cu_seqlens, *tokens;                 // null: every token of a batch row; only `tokens` null: packed
    At source_k_at, source_v_at, out_at;
    int heads, length, source, unused;              // tokens of a batch row; cached tokens of a sample
    float scale, eps;                               // of the scores, times log2(e); of the norms
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

enum Which { QUERIES, KEYS, VALUES };

__device__ __forceinline__ bool is_text(const Attend& p, int place) {
    return place >= p.text.first && place < p.text.first + p.text.tokens;
}

// Where token `i` of a sample is in the joint sequence; a valid place also for one that is not there.
__device__ __forceinline__ int place_of(const int* tokens, int start, int i, bool there) {
    return start + (!there ? 0 : tokens != nullptr ? tokens[i] : i);
}

// `fetch` from the stream that each token belongs to.
template <Which which>
__device__ __forceinline__ void gather(uint4* tile, const Attend& p, int sample, int head, int start,
                                       const int* tokens, int first, int count) {
#pragma unroll
    for (int c = threadIdx.x; c < TILE * ROW; c += WARPS * 32) {
        const int row = c / ROW, column = c % ROW, i = first + row, place = place_of(tokens, start, i, i < count);
        const bool text = is_text(p, place);
        const void* base = which == QUERIES ? OF(q) : which == KEYS ? OF(k) : OF(v);
        const i64 batch = which == QUERIES ? OF(q_at.batch) : which == KEYS ? OF(k_at.batch) : OF(v_at.batch);
        const i64 step = which == QUERIES ? OF(q_at.token) : which == KEYS ? OF(k_at.token) : OF(v_at.token);
        const i64 at = sample * batch + (place - OF(first)) * step + head * HEAD_DIM + column * CHUNK;
        copy_later(tile + row * PITCH + column, base, at, i < count);
    }
}

// Norm and rotation of a tile's rows, where they lie. Rows that are not there hold zeros; what becomes of them is
// masked (keys) or not stored (queries).
template <Which which>
__device__ __forceinline__ void prepare_tile(uint4* tile, const Attend& p, int sample, int start, const int* tokens,
                                             int first, int count) {
    const int lane = threadIdx.x % LANES, column = lane < ROW ? lane * CHUNK : 0; // unused lanes read a valid address
    const uint4 nothing = {0u, 0u, 0u, 0u};
#pragma unroll 4
    for (int row = threadIdx.x / LANES; row < TILE; row += WARPS * 32 / LANES) {  // as often for every lane
        const int place = place_of(tokens, start, first + row, first + row < count);
        const bool text = is_text(p, place);
        const int t = place - OF(first), flags = OF(flags);
        const float* cos = OF(cos);
        float w[CHUNK];
        Rotary rope;
        load_weight(which == QUERIES ? OF(weight_q) : OF(weight_k), column, flags & WEIGHT_FP32, w);
        if (cos != nullptr) rope.load(cos, OF(sin), sample * OF(rope_at.batch) + t * OF(rope_at.token) + column);
        uint4* chunk = tile + row * PITCH + lane;
        const uint4 ready = prepare<LANES>(lane < ROW ? *chunk : nothing, w, !(flags & NO_NORM), flags & ROUND_FIRST,
                                           p.eps, cos != nullptr, rope);
        if (lane < ROW) *chunk = ready;
    }
    __syncthreads();
}

// Over the four lanes that share a row of scores.
__device__ __forceinline__ float highest(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL, x, 2));
}

template <bool PROLOGUE> __device__ __forceinline__ void attend(const Attend& p) {
    __shared__ uint4 keys[TILE * PITCH], values[TILE * PITCH];
    const int sample = blockIdx.y / p.heads, head = blockIdx.y % p.heads, first = blockIdx.x * TILE;
    const int begin = p.cu_seqlens == nullptr ? 0 : p.cu_seqlens[sample];
    const int own = p.cu_seqlens == nullptr ? p.length : p.cu_seqlens[sample + 1] - begin;
    if (first >= own) return;
    const int* tokens = p.tokens == nullptr ? nullptr : p.tokens + begin;
    const bool packed = p.cu_seqlens != nullptr && tokens == nullptr;
    const i64 start = packed ? begin : 0, column = head * HEAD_DIM;      // a packed row's batch stride is 0
    const i64 q_at = sample * p.image.q_at.batch + start * p.image.q_at.token + column;
    const i64 k_at = sample * p.image.k_at.batch + start * p.image.k_at.token + column;
    const i64 v_at = sample * p.image.v_at.batch + start * p.image.v_at.token + column;
    const i64 source_k_at = sample * p.source_k_at.batch + column, source_v_at = sample * p.source_v_at.batch + column;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;

    u32 q[STEPS][4];
    if (PROLOGUE)
        gather<QUERIES>(keys, p, sample, head, start, tokens, first, own);
    else
        fetch(keys, p.image.q, q_at, p.image.q_at.token, tokens, first, own);
    copies_done();
    __syncthreads();
    if (PROLOGUE) prepare_tile<QUERIES>(keys, p, sample, start, tokens, first, own);
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        load_matrices(q[i], keys + (warp * 16 + lane % 16) * PITCH + 2 * i + lane / 16);
    __syncthreads();

    const float none = __uint_as_float(0xff800000u);            // minus infinity
    float out[2 * STEPS][4] = {}, top[2] = {none, none}, sum[2] = {0.f, 0.f};
    const int own_tiles = (own + TILE - 1) / TILE, tiles = own_tiles + (p.source + TILE - 1) / TILE;
    if (PROLOGUE)
        gather<KEYS>(keys, p, sample, head, start, tokens, 0, own);
    else
        fetch(keys, p.image.k, k_at, p.image.k_at.token, tokens, 0, own);
    for (int j = 0; j < tiles; ++j) {
        const bool cached = j >= own_tiles;
        const int from = (cached ? j - own_tiles : j) * TILE, count = cached ? p.source : own;
        copies_done();
        __syncthreads();                                        // these keys are here; the last values are used
        if (cached)
            fetch(values, p.source_v, source_v_at, p.source_v_at.token, nullptr, from, count);
        else if (PROLOGUE)
            gather<VALUES>(values, p, sample, head, start, tokens, from, count);
        else
            fetch(values, p.image.v, v_at, p.image.v_at.token, tokens, from, count);
        if (PROLOGUE && !cached) prepare_tile<KEYS>(keys, p, sample, start, tokens, from, count);

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
        if (PROLOGUE && j + 1 < own_tiles)
            gather<KEYS>(keys, p, sample, head, start, tokens, from + TILE, own);
        else if (j + 1 < own_tiles)
            fetch(keys, p.image.k, k_at, p.image.k_at.token, tokens, from + TILE, own);
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
