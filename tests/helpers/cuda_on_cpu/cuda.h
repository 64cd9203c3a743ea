// Enough of CUDA to run a kernel's source on a CPU: one fiber a thread, blocks one after another. Shuffles and
// barriers wait for every lane they name; a lane that never comes ends the run instead of going unnoticed.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim;

struct Fiber { ucontext_t context; jmp_buf place; std::vector<char> stack; bool started, done; };
struct Gate { int arrived = 0, generation = 0; };
static std::vector<Fiber> fibers;
static std::vector<Gate> warps;
static Gate block;
static jmp_buf scheduler; // after the first entry: jumps, which cost no system call as swapcontext does
static void (*body)(const void*);
static const void* argument;
static float slots[2][1024];
static int current, progress, alive;

static void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

static void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

static void meet(Gate& gate, int expected) {
    const int generation = gate.generation;
    ++progress;
    if (++gate.arrived == expected) {
        gate.arrived = 0;
        ++gate.generation;
    }
    while (gate.generation == generation) yield();
}

static void __syncthreads() { meet(block, blockDim.x); }

static float __shfl_xor_sync(unsigned, float x, int offset) {
    Gate& warp = warps[threadIdx.x / 32];
    float* slot = slots[warp.generation & 1];
    slot[threadIdx.x] = x;
    meet(warp, 32);
    return slot[threadIdx.x ^ offset];
}

// What every lane of the warp brings.
template <typename T> static void exchange(const T& mine, T (&all)[32]) {
    static T places[2][1024];
    Gate& warp = warps[threadIdx.x / 32];
    T* place = places[warp.generation & 1];
    place[threadIdx.x] = mine;
    meet(warp, 32);
    memcpy(all, place + threadIdx.x / 32 * 32, sizeof all);
}

static void enter() {
    body(argument);
    fibers[current].done = true;
    ++progress;
    --alive;
    yield();
}

static int run(int grid_x, int grid_y, int threads, void (*kernel)(const void*), const void* given) {
    body = kernel, argument = given;
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    fibers.resize(threads);
    for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; ++x) {
            blockIdx = {static_cast<unsigned>(x), static_cast<unsigned>(y), 0};
            warps.assign(threads / 32, Gate());
            block = Gate();
            alive = threads;
            for (Fiber& fiber : fibers) {
                getcontext(&fiber.context);
                fiber.stack.resize(1 << 15);
                fiber.started = fiber.done = false;
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                makecontext(&fiber.context, enter, 0);
            }
            while (alive > 0) {
                progress = 0;
                for (current = 0; current < threads; ++current)
                    if (!fibers[current].done) {
                        threadIdx = {static_cast<unsigned>(current), 0, 0};
                        resume(fibers[current]);
                    }
                if (progress == 0) return 1; // some lane waits for one that has left
            }
        }
    return 0;
}

static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
#define __expf(x) std::exp(x) // the C library has a __expf of its own
static float __fdividef(float a, float b) { return a / b; }
template <typename T> static T __ldg(const T* p) { return *p; }
