// Between two matrix products of a transformer block, in one pass (adaptive layer norm):
//     sum    = x + gate * branch                    branch: y, or RMSNorm(y) with a weight (Z-Image)
//     normed = norm(sum) * (1 + scale) + shift      norm: layer norm, or RMSNorm with a weight; or none
// Either half may be absent. Bytes: x, y read once, sum and normed written once. Modulation is a row for each sample,
// or one for each token (its strides say which). Backward reads the two gradients, sum and, for a normed branch, y.
//
// One block a token; a thread keeps PER_THREAD chunks of 16 bytes in registers between the sums over the row.
#include "common.cuh"

#ifndef PER_THREAD
#define PER_THREAD 2
#endif

struct At { i64 batch, token; };

struct AddNorm {
    const void *x, *y, *gate, *y_weight, *weight, *scale, *shift;
    const void *grad_sum, *grad_normed;             // backward; x is then the sum
    void *sum, *normed, *dx, *dy;
    At x_at, y_at, gate_at, scale_at, shift_at, grad_sum_at, grad_normed_at;
    i64 out_batch;                                  // outputs are dense: a batch is `tokens` rows of `width`
    int width, flags;
    float eps, y_eps;
};

enum Flags { NORM_LAYER = 1, NORM_RMS = 2, WEIGHT_FP32 = 4, Y_WEIGHT_FP32 = 8, ROUND_FIRST = 16, Y_RMS = 32 };

typedef float Row[PER_THREAD][CHUNK];

#define EACH_CHUNK(c, at)                                                                           \
    _Pragma("unroll") for (int c = 0, at = threadIdx.x * CHUNK; c < PER_THREAD; ++c, at += blockDim.x * CHUNK)
#define EACH(i) _Pragma("unroll") for (int i = 0; i < CHUNK; ++i)

__device__ __forceinline__ void read_row(const void* base, i64 at, int width, Row& row) {
    uint4 raw[PER_THREAD];
    EACH_CHUNK(c, column) {
        const uint4 nothing = {0u, 0u, 0u, 0u};
        raw[c] = column < width ? load_once(base, at + column) : nothing;
    }
    EACH_CHUNK(c, column) unpack(raw[c], row[c]);
}

// 1 / root mean square, or 1 / standard deviation with the row centred in place (pads stay zero).
__device__ __forceinline__ float inverse_rms(const Row& row, int width, float eps, float* scratch) {
    float sum = 0.f;
    EACH_CHUNK(c, column) EACH(i) sum += row[c][i] * row[c][i];
    return rsqrtf(sum_block(sum, scratch) / width + eps);
}

__device__ __forceinline__ void centre(Row& row, int width, float* scratch) {
    float sum = 0.f;
    EACH_CHUNK(c, column) EACH(i) sum += row[c][i];
    const float mean = sum_block(sum, scratch) / width;
    EACH_CHUNK(c, column) if (column < width) EACH(i) row[c][i] -= mean;
}

extern "C" __global__ void __launch_bounds__(256, 2) add_norm_forward(const __grid_constant__ AddNorm p) {
    __shared__ float scratch[32];
    const i64 s = blockIdx.x, b = blockIdx.y, out_at = b * p.out_batch + s * p.width;
    Row x;
    read_row(p.x, b * p.x_at.batch + s * p.x_at.token, p.width, x);
    if (p.y != nullptr) {
        Row y;
        read_row(p.y, b * p.y_at.batch + s * p.y_at.token, p.width, y);
        const bool y_rms = p.flags & Y_RMS;
        const float r = y_rms ? inverse_rms(y, p.width, p.y_eps, scratch) : 1.f;
        const i64 gate_at = b * p.gate_at.batch + s * p.gate_at.token;
        EACH_CHUNK(c, column) if (column < p.width) {
            if (y_rms) {
                float w[CHUNK];
                load_weight(p.y_weight, column, p.flags & Y_WEIGHT_FP32, w);
                EACH(i) y[c][i] *= r;
                if (!(p.flags & Y_WEIGHT_FP32)) round_chunk(y[c]);
                EACH(i) y[c][i] *= w[i];
                round_chunk(y[c]);
            }
            if (p.gate != nullptr) {
                float gate[CHUNK];
                unpack(load_shared(p.gate, gate_at + column), gate);
                EACH(i) y[c][i] *= gate[i];
                round_chunk(y[c]);
            }
            EACH(i) x[c][i] += y[c][i];
            const uint4 sum = pack(x[c]);
            store(p.sum, out_at + column, sum);
            unpack(sum, x[c]);
        }
    }
    if (!(p.flags & (NORM_LAYER | NORM_RMS))) return;
    if (p.flags & NORM_LAYER) centre(x, p.width, scratch);
    const float r = inverse_rms(x, p.width, p.eps, scratch);
    const i64 scale_at = b * p.scale_at.batch + s * p.scale_at.token;
    const i64 shift_at = b * p.shift_at.batch + s * p.shift_at.token;
    EACH_CHUNK(c, column) if (column < p.width) {
        EACH(i) x[c][i] *= r;
        if (p.weight != nullptr) {
            float w[CHUNK];
            load_weight(p.weight, column, p.flags & WEIGHT_FP32, w);
            if (p.flags & ROUND_FIRST) round_chunk(x[c]);
            EACH(i) x[c][i] *= w[i];
        }
        if (p.scale != nullptr) {
            float scale[CHUNK];
            unpack(load_shared(p.scale, scale_at + column), scale);
            EACH(i) scale[i] += 1.f;
            round_chunk(scale);
            round_chunk(x[c]);
            EACH(i) x[c][i] *= scale[i];
        }
        if (p.shift != nullptr) {
            float shift[CHUNK];
            unpack(load_shared(p.shift, shift_at + column), shift);
            round_chunk(x[c]);
            EACH(i) x[c][i] += shift[i];
        }
        store(p.normed, out_at + column, pack(x[c]));
    }
}

// dx = grad_sum + J(norm)^T (grad_normed (1 + scale) weight);  dy = gate dx, through the branch's RMSNorm if any.
extern "C" __global__ void __launch_bounds__(256, 2) add_norm_backward(const __grid_constant__ AddNorm p) {
    __shared__ float scratch[32];
    const i64 s = blockIdx.x, b = blockIdx.y, out_at = b * p.out_batch + s * p.width;
    Row d;                                          // the gradient of the sum
    if (p.flags & (NORM_LAYER | NORM_RMS)) {
        Row x;
        read_row(p.grad_normed, b * p.grad_normed_at.batch + s * p.grad_normed_at.token, p.width, d);
        read_row(p.x, b * p.x_at.batch + s * p.x_at.token, p.width, x);
        const i64 scale_at = b * p.scale_at.batch + s * p.scale_at.token;
        EACH_CHUNK(c, column) if (column < p.width) {
            if (p.scale != nullptr) {
                float scale[CHUNK];
                unpack(load_shared(p.scale, scale_at + column), scale);
                EACH(i) d[c][i] *= 1.f + scale[i];
            }
            if (p.weight != nullptr) {
                float w[CHUNK];
                load_weight(p.weight, column, p.flags & WEIGHT_FP32, w);
                EACH(i) d[c][i] *= w[i];
            }
        }
        if (p.flags & NORM_LAYER) centre(x, p.width, scratch);
        const float r = inverse_rms(x, p.width, p.eps, scratch);
        float along = 0.f;
        EACH_CHUNK(c, column) EACH(i) along += d[c][i] * x[c][i];
        along = sum_block(along, scratch) / p.width * r * r;
        if (p.flags & NORM_LAYER) centre(d, p.width, scratch);
        EACH_CHUNK(c, column) EACH(i) d[c][i] = r * (d[c][i] - x[c][i] * along);
    } else {
        EACH_CHUNK(c, column) EACH(i) d[c][i] = 0.f;
    }
    if (p.grad_sum != nullptr) {
        const i64 at = b * p.grad_sum_at.batch + s * p.grad_sum_at.token;
        EACH_CHUNK(c, column) if (column < p.width) {
            float g[CHUNK];
            unpack(load_once(p.grad_sum, at + column), g);
            EACH(i) d[c][i] += g[i];
        }
    }
    EACH_CHUNK(c, column) if (column < p.width) store(p.dx, out_at + column, pack(d[c]));
    if (p.dy == nullptr) return;
    const i64 gate_at = b * p.gate_at.batch + s * p.gate_at.token;
    EACH_CHUNK(c, column) if (column < p.width) {
        if (p.gate != nullptr) {
            float gate[CHUNK];
            unpack(load_shared(p.gate, gate_at + column), gate);
            EACH(i) d[c][i] *= gate[i];
        }
    }
    if (p.flags & Y_RMS) {
        Row y;
        read_row(p.y, b * p.y_at.batch + s * p.y_at.token, p.width, y);
        const float r = inverse_rms(y, p.width, p.y_eps, scratch);
        float along = 0.f;
        EACH_CHUNK(c, column) if (column < p.width) {
            float w[CHUNK];
            load_weight(p.y_weight, column, p.flags & Y_WEIGHT_FP32, w);
            EACH(i) d[c][i] *= w[i];
            EACH(i) along += d[c][i] * y[c][i];
        }
        along = sum_block(along, scratch) / p.width * r * r;
        EACH_CHUNK(c, column) EACH(i) d[c][i] = r * (d[c][i] - y[c][i] * along);
    }
    EACH_CHUNK(c, column) if (column < p.width) store(p.dy, out_at + column, pack(d[c]));
}
