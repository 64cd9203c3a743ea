// From the projections to the tensors that attention reads, in one pass: per-head RMSNorm of q and k, interleaved
// rotary embedding, both streams joined. Bytes: each of q, k, v read once and written once; 4 instead of the
// 20 to 60 bytes an element that separate kernels move. Backward reads q, k and the three gradients, writes the
// gradient of the projection; the norm is recomputed, nothing but the projection is kept.
//
// One block a token of the joint sequence. ROW neighbouring lanes hold one head's row, 16 bytes each; a thread stays
// in its column of the head, so it loads its norm weights and rotary factors once and loops over the heads.
#include "common.cuh"

#include <rows.cuh>

constexpr int USED = HEAD_DIM / CHUNK;                                     // lanes of a row that hold data
constexpr int ROW = USED <= 8 ? 8 : USED <= 16 ? 16 : 32;                  // lanes of a row
constexpr int HEADS_AHEAD = 2;                                             // heads loaded before the first is used
constexpr int THREADS = 192;                                               // at most; three blocks leave 96 registers

struct Strides { i64 batch, token; };               // in elements; heads are HEAD_DIM apart
struct Strides4 { i64 batch, token, head; };

struct Stream {
    const void *q, *k, *v;                          // v null: attention reads it where it is
    const void *weight_q, *weight_k;                // HEAD_DIM each, or null
    const float *cos, *sin;                         // see `Rotary`; cos null: no rotation
    void *dq, *dk, *dv;                             // backward: gradients of q, k, v
    float* partial;                                 // backward: tokens x 2 x HEAD_DIM weight gradients, or null
    Strides q_at, k_at, v_at, rope_at, dq_at, dk_at, dv_at;
    int tokens, first;                              // its rows in the joint sequence
    int flags, unused;
};

struct Prep {
    Stream image, text;
    void *q, *k, *v;                                // forward: joint outputs (batch, tokens, heads, HEAD_DIM)
    const void *grad_q, *grad_k, *grad_v;           // backward: their gradients
    Strides4 grad_q_at, grad_k_at, grad_v_at;
    int heads, tokens;
    float eps;
    int unused;
};

// One row, backward: with n = x r, r = 1 / sqrt(mean x^2 + eps) and u = R^T(grad) w,
// dx = r (u - n mean(u n)); the gradient of w gathers R^T(grad) n.
__device__ __forceinline__ uint4 retrace(uint4 raw, uint4 grad, const float (&w)[CHUNK], bool norm, float eps,
                                         bool rotate, const Rotary& rope, float (&dw)[CHUNK], bool gather) {
    float x[CHUNK], u[CHUNK];
    unpack(grad, u);
    if (rotate) rope.turn_back(u);
    if (!norm) return pack(u);
    unpack(raw, x);
    const float r = rsqrtf(sum_lanes<ROW>(dot(x, x)) * (1.f / HEAD_DIM) + eps);
    if (gather) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) dw[i] += u[i] * x[i] * r;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) u[i] *= w[i];
    const float along = sum_lanes<ROW>(dot(u, x)) * (1.f / HEAD_DIM) * r * r;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) u[i] = r * (u[i] - x[i] * along);
    return pack(u);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) qkv_prep_forward(const __grid_constant__ Prep p) {
    const int s = blockIdx.x, b = blockIdx.y;
    const bool text = s >= p.text.first && s < p.text.first + p.text.tokens;
    const int t = s - OF(first), flags = OF(flags);
    const int lane = threadIdx.x % ROW, group = threadIdx.x / ROW, groups = blockDim.x / ROW, column = lane * CHUNK;
    const bool holds = lane < USED;
    const void *q = OF(q), *k = OF(k), *v = OF(v), *weight_q = OF(weight_q), *weight_k = OF(weight_k);
    const i64 q_at = b * OF(q_at.batch) + t * OF(q_at.token) + column;
    const i64 k_at = b * OF(k_at.batch) + t * OF(k_at.token) + column;
    const i64 v_at = b * OF(v_at.batch) + t * OF(v_at.token) + column;
    const i64 out_at = (static_cast<i64>(b) * p.tokens + s) * p.heads * HEAD_DIM + column;
    const float* cos = OF(cos);
    const bool rotate = cos != nullptr, has_v = v != nullptr;

    uint4 raw_q[HEADS_AHEAD], raw_k[HEADS_AHEAD], raw_v[HEADS_AHEAD];
    const uint4 nothing = {0u, 0u, 0u, 0u};
    auto fetch = [&](int h0) {
#pragma unroll
        for (int i = 0; i < HEADS_AHEAD; ++i) {
            const int h = h0 + i * groups + group;
            const bool there = holds && h < p.heads;
            raw_q[i] = there ? load_once(q, q_at + h * HEAD_DIM) : nothing;
            raw_k[i] = there ? load_once(k, k_at + h * HEAD_DIM) : nothing;
            if (has_v) raw_v[i] = there ? load_once(v, v_at + h * HEAD_DIM) : nothing;
        }
    };
    fetch(0);
    float wq[CHUNK], wk[CHUNK];
    Rotary rope;
    const int safe = holds ? column : 0; // unused lanes read a valid address and store nothing
    load_weight(weight_q, safe, flags & WEIGHT_FP32, wq);
    load_weight(weight_k, safe, flags & WEIGHT_FP32, wk);
    if (rotate) rope.load(cos, OF(sin), b * OF(rope_at.batch) + t * OF(rope_at.token) + safe);

    const bool norm = !(flags & NO_NORM), round_first = flags & ROUND_FIRST;
    for (int h0 = 0; h0 < p.heads; h0 += groups * HEADS_AHEAD) { // the same count for every lane: sums need them all
        if (h0 > 0) fetch(h0);
#pragma unroll
        for (int i = 0; i < HEADS_AHEAD; ++i) {
            const int h = h0 + i * groups + group;
            const uint4 new_q = prepare<ROW>(raw_q[i], wq, norm, round_first, p.eps, rotate, rope);
            const uint4 new_k = prepare<ROW>(raw_k[i], wk, norm, round_first, p.eps, rotate, rope);
            if (holds && h < p.heads) {
                store(p.q, out_at + h * HEAD_DIM, new_q);
                store(p.k, out_at + h * HEAD_DIM, new_k);
                if (has_v) store(p.v, out_at + h * HEAD_DIM, raw_v[i]);
            }
        }
    }
}

// Sum of dw over the groups of the block, one row of HEAD_DIM floats.
__device__ __forceinline__ void gather_weight(float (&dw)[CHUNK], float* row, float* scratch, int lane, int group) {
    __syncthreads();
    if (lane < USED) {
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) scratch[group * HEAD_DIM + lane * CHUNK + i] = dw[i];
    }
    __syncthreads();
    const int groups = blockDim.x / ROW;
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        float sum = 0.f;
        for (int g = 0; g < groups; ++g) sum += scratch[g * HEAD_DIM + d];
        row[d] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) qkv_prep_backward(const __grid_constant__ Prep p) {
    __shared__ float scratch[THREADS / ROW * HEAD_DIM];
    const int s = blockIdx.x, b = blockIdx.y;
    const bool text = s >= p.text.first && s < p.text.first + p.text.tokens;
    const int t = s - OF(first), flags = OF(flags);
    const int lane = threadIdx.x % ROW, group = threadIdx.x / ROW, groups = blockDim.x / ROW, column = lane * CHUNK;
    const bool holds = lane < USED;
    const void *q = OF(q), *k = OF(k);
    void *dq = OF(dq), *dk = OF(dk), *dv = OF(dv);
    const i64 q_at = b * OF(q_at.batch) + t * OF(q_at.token) + column;
    const i64 k_at = b * OF(k_at.batch) + t * OF(k_at.token) + column;
    const i64 dq_at = b * OF(dq_at.batch) + t * OF(dq_at.token) + column;
    const i64 dk_at = b * OF(dk_at.batch) + t * OF(dk_at.token) + column;
    const i64 dv_at = b * OF(dv_at.batch) + t * OF(dv_at.token) + column;
    const i64 gq_at = b * p.grad_q_at.batch + s * p.grad_q_at.token + column;
    const i64 gk_at = b * p.grad_k_at.batch + s * p.grad_k_at.token + column;
    const i64 gv_at = b * p.grad_v_at.batch + s * p.grad_v_at.token + column;
    const float* cos = OF(cos);
    const bool rotate = cos != nullptr, norm = !(flags & NO_NORM);
    float* partial = OF(partial);
    const bool gather = partial != nullptr;

    float wq[CHUNK], wk[CHUNK], dwq[CHUNK] = {}, dwk[CHUNK] = {};
    Rotary rope;
    const int safe = holds ? column : 0;
    load_weight(OF(weight_q), safe, flags & WEIGHT_FP32, wq);
    load_weight(OF(weight_k), safe, flags & WEIGHT_FP32, wk);
    if (rotate) rope.load(cos, OF(sin), b * OF(rope_at.batch) + t * OF(rope_at.token) + safe);

    const uint4 nothing = {0u, 0u, 0u, 0u};
    for (int h0 = 0; h0 < p.heads; h0 += groups) {
        const int h = h0 + group;
        const bool there = holds && h < p.heads;
        const uint4 raw_q = there && norm ? load_once(q, q_at + h * HEAD_DIM) : nothing;
        const uint4 raw_k = there && norm ? load_once(k, k_at + h * HEAD_DIM) : nothing;
        const uint4 grad_q = there ? load_once(p.grad_q, gq_at + h * p.grad_q_at.head) : nothing;
        const uint4 grad_k = there ? load_once(p.grad_k, gk_at + h * p.grad_k_at.head) : nothing;
        const uint4 grad_v = there && dv ? load_once(p.grad_v, gv_at + h * p.grad_v_at.head) : nothing;
        const uint4 new_q = retrace(raw_q, grad_q, wq, norm, p.eps, rotate, rope, dwq, gather);
        const uint4 new_k = retrace(raw_k, grad_k, wk, norm, p.eps, rotate, rope, dwk, gather);
        if (there) {
            store(dq, dq_at + h * HEAD_DIM, new_q);
            store(dk, dk_at + h * HEAD_DIM, new_k);
            if (dv) store(dv, dv_at + h * HEAD_DIM, grad_v);
        }
    }
    if (gather) {
        float* row = partial + (static_cast<i64>(b) * OF(tokens) + t) * 2 * HEAD_DIM;
        gather_weight(dwq, row, scratch, lane, group);
        gather_weight(dwk, row + HEAD_DIM, scratch, lane, group);
    }
}
