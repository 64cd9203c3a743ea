// Attention of q, k and v that are normalised, rotated and joined.
#include "attend.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) ragged_attention(const __grid_constant__ Attend p) {
    attend<false>(p);
}
