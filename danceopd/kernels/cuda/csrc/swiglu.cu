// out = [passed | silu(gate) up]: the SwiGLU of a feed-forward, written behind the columns that are passed through
// (the attention output of a parallel block), so that the output projection reads one buffer and nothing is
// concatenated. Bytes: gate, up and the passed columns read once, out written once. One block a token.
#include "common.cuh"

struct At { i64 batch, token; };

struct Swiglu {
    const void *gate, *up, *passed, *grad;          // grad: of the silu(gate) up columns
    void *out, *dgate, *dup;
    At gate_at, up_at, passed_at, grad_at, out_at, dgate_at, dup_at;
    int width, passed_width;                        // of gate and up; of the passed columns (0: none)
};

__device__ __forceinline__ float logistic(float x) {
#if DTYPE == 0
    return 1.f / (1.f + expf(-x));
#else
    return __fdividef(1.f, 1.f + __expf(-x)); // two ulp of fp32, far below the half types' rounding
#endif
}

extern "C" __global__ void __launch_bounds__(256, 2) swiglu_forward(const __grid_constant__ Swiglu p) {
    const i64 s = blockIdx.x, b = blockIdx.y;
    const i64 gate_at = b * p.gate_at.batch + s * p.gate_at.token, up_at = b * p.up_at.batch + s * p.up_at.token;
    const i64 out_at = b * p.out_at.batch + s * p.out_at.token;
    const i64 passed_at = b * p.passed_at.batch + s * p.passed_at.token;
#pragma unroll 2
    for (int c = threadIdx.x * CHUNK; c < p.passed_width; c += blockDim.x * CHUNK)
        store(p.out, out_at + c, load_once(p.passed, passed_at + c));
#pragma unroll 2
    for (int c = threadIdx.x * CHUNK; c < p.width; c += blockDim.x * CHUNK) {
        float gate[CHUNK], up[CHUNK];
        unpack(load_once(p.gate, gate_at + c), gate);
        unpack(load_once(p.up, up_at + c), up);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) gate[i] *= logistic(gate[i]);
        round_chunk(gate);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) gate[i] *= up[i];
        store(p.out, out_at + p.passed_width + c, pack(gate));
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) swiglu_backward(const __grid_constant__ Swiglu p) {
    const i64 s = blockIdx.x, b = blockIdx.y;
    const i64 gate_at = b * p.gate_at.batch + s * p.gate_at.token, up_at = b * p.up_at.batch + s * p.up_at.token;
    const i64 grad_at = b * p.grad_at.batch + s * p.grad_at.token;
    const i64 dgate_at = b * p.dgate_at.batch + s * p.dgate_at.token;
    const i64 dup_at = b * p.dup_at.batch + s * p.dup_at.token;
#pragma unroll 2
    for (int c = threadIdx.x * CHUNK; c < p.width; c += blockDim.x * CHUNK) {
        float gate[CHUNK], up[CHUNK], grad[CHUNK];
        unpack(load_once(p.gate, gate_at + c), gate);
        unpack(load_once(p.up, up_at + c), up);
        unpack(load_once(p.grad, grad_at + c), grad);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            const float x = gate[i], sigma = logistic(x);
            gate[i] = grad[i] * up[i] * sigma * (1.f + x * (1.f - sigma));
            up[i] = grad[i] * x * sigma;
        }
        store(p.dgate, dgate_at + c, pack(gate));
        store(p.dup, dup_at + c, pack(up));
    }
}
