// Attention of projections, norm and rotation in its prologue.
#include "attend.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) prepared_attention(const __grid_constant__ Attend p) {
    attend<true>(p);
}
