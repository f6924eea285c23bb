// Runs the kernels of kernels/ on the host, one block at a time, each thread a fiber: to check what they compute, not how
// fast. Warp-wide instructions meet at a barrier of their warp, exchange what they hold, and each lane computes its part.
//
// Made to catch mistakes that a GPU hides most of the time: shared memory is poisoned with NaN before each block; copies in
// the background happen when they are waited for, no earlier; every second launch runs its fibers in reverse order, so a
// missing barrier shows as a difference; a barrier that not all threads reach ends the program.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>
#include <vector>

#define KERNEL(name, Args, threads) extern "C" void name(const Args &a)
#define DEVICE [[maybe_unused]] static inline
#define SHARED static
#define __align__(n) alignas(n)

typedef unsigned short f16_bits;
struct Index {
    unsigned x, y, z;
};
static Index threadIdx, blockIdx;
static unsigned char *dynamic_shared;

namespace emulator {

constexpr int THREADS_MAX = 256;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SHARED_BYTES_MAX = 256 << 10;

struct Copy {
    unsigned char *to;
    const unsigned char *from;
    bool valid;
};

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, running = false;
    std::vector<unsigned char> stack;
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> committed;
};

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

struct Lane {
    uint32_t a[4], b[2];
    float value;
    const unsigned char *row;
};

static Fiber fibers[THREADS_MAX];
static Barrier block, warps[THREADS_MAX / 32];
static Lane lanes[THREADS_MAX];
static jmp_buf scheduler;
static int threads, alive;
static unsigned long progress;
static bool reverse;
static void (*kernel)(const void *);
static const void *kernel_args;

inline Fiber &current() {
    return fibers[threadIdx.x];
}

inline void yield() {
    if (!_setjmp(current().at)) _longjmp(scheduler, 1);
}

inline void wait(Barrier &barrier, int expected) {
    unsigned generation = barrier.generation;
    ++progress;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline void meet_warp() {
    wait(warps[threadIdx.x / 32], 32);
}

inline Lane &mine() {
    return lanes[threadIdx.x];
}

inline Lane &lane(unsigned index) {
    return lanes[threadIdx.x / 32 * 32 + index];
}

static void body() {
    for (;;) {
        kernel(kernel_args);
        if (!current().copies.empty()) {
            std::fprintf(stderr, "emulator: a kernel ended with copies that nobody committed\n");
            std::abort();
        }
        current().committed.clear();
        current().running = false;
        --alive;
        ++progress;
        yield();
    }
}

static void run_block() {
    std::memset(dynamic_shared, 0xff, SHARED_BYTES_MAX);
    alive = threads;
    for (int i = 0; i < threads; ++i) fibers[i].running = true;
    block = Barrier();
    for (auto &warp : warps) warp = Barrier();
    while (alive > 0) {
        unsigned long before = progress;
        for (int i = 0; i < threads; ++i) {
            int index = reverse ? threads - 1 - i : i;
            Fiber &fiber = fibers[index];
            if (!fiber.running) continue;
            threadIdx.x = (unsigned)index;
            if (_setjmp(scheduler)) continue;
            if (fiber.started) _longjmp(fiber.at, 1);
            fiber.started = true;
            fiber.stack.resize(STACK_BYTES);
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack.data();
            fiber.start.uc_stack.ss_size = STACK_BYTES;
            fiber.start.uc_link = nullptr;
            makecontext(&fiber.start, body, 0);
            setcontext(&fiber.start);
        }
        // A round in which nobody arrived anywhere: some wait for threads that will not come.
        static int stuck = 0;
        stuck = progress == before ? stuck + 1 : 0;
        if (stuck > 3) {
            std::fprintf(stderr, "emulator: a barrier that not all threads reach\n");
            std::abort();
        }
    }
}

} // namespace emulator

extern "C" void emulate(void (*kernel)(const void *), const void *args, unsigned grid_x, unsigned grid_y, unsigned threads) {
    using namespace emulator;
    if (!dynamic_shared) dynamic_shared = (unsigned char *)std::aligned_alloc(256, SHARED_BYTES_MAX);
    emulator::kernel = kernel;
    kernel_args = args;
    emulator::threads = (int)threads;
    reverse = !reverse;
    for (unsigned y = 0; y < grid_y; ++y) {
        for (unsigned x = 0; x < grid_x; ++x) {
            blockIdx = {x, y, 0};
            run_block();
        }
    }
}

static inline void __syncthreads() {
    emulator::wait(emulator::block, emulator::threads);
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline float __int_as_float(int bits) {
    return __uint_as_float((unsigned)bits);
}

static inline unsigned float_bits(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// All values there are, as working one out takes longer than looking it up.
struct HalfTable {
    float values[1 << 16];
    HalfTable() {
        for (unsigned h = 0; h < 1 << 16; ++h) {
            int exponent = (int)(h >> 10 & 31), mantissa = (int)(h & 1023);
            float value = exponent == 0    ? std::ldexp((float)mantissa, -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp((float)(mantissa + 1024), exponent - 25);
            values[h] = h >> 15 ? -value : value;
        }
    }
};

static inline float f16_to_f32(f16_bits h) {
    static const HalfTable table;
    return table.values[h];
}

// To nearest, ties to even.
static inline unsigned f32_to_f16(float value) {
    unsigned sign = float_bits(value) >> 16 & 0x8000;
    float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00;
    if (size == 0.0f) return sign;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    if (exponent < -13) exponent = -13;
    unsigned steps = (unsigned)std::nearbyint(std::ldexp(size, 11 - exponent));
    return sign | (((unsigned)(exponent + 13) << 10) + steps);
}

static inline unsigned f32_to_bf16(float value) {
    unsigned bits = float_bits(value);
    if (std::isnan(value)) return bits >> 16 | 64;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// 1 is f16, 2 bf16, as in common.cuh.
template <int T>
static inline unsigned pack2(float low, float high) {
    if (T == 1) {
        low = std::fmin(std::fmax(low, -65504.0f), 65504.0f);
        high = std::fmin(std::fmax(high, -65504.0f), 65504.0f);
        return f32_to_f16(low) | f32_to_f16(high) << 16;
    }
    return f32_to_bf16(low) | f32_to_bf16(high) << 16;
}

template <int T>
static inline float half_of(unsigned pair, int which) {
    unsigned bits = which ? pair >> 16 : pair & 0xffff;
    return T == 1 ? f16_to_f32((f16_bits)bits) : __uint_as_float(bits << 16);
}

static inline float exp2_fast(float x) {
    return std::exp2(x);
}

template <int T>
static void mma(float c[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    using namespace emulator;
    Lane &own = mine();
    own.a[0] = a0, own.a[1] = a1, own.a[2] = a2, own.a[3] = a3, own.b[0] = b0, own.b[1] = b1;
    meet_warp();
    unsigned l = threadIdx.x % 32, g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
        unsigned low_row = (unsigned)i / 2, column = 2 * t + (unsigned)i % 2;
        float sum = 0.0f;
        for (unsigned k = 0; k < 16; ++k) {
            const Lane &left = lane(4 * g + k % 8 / 2), &right = lane(4 * column + k % 8 / 2);
            sum += half_of<T>(left.a[low_row + k / 8 * 2], k % 2) * half_of<T>(right.b[k / 8], k % 2);
        }
        c[i] += sum;
    }
    meet_warp();
}

static inline void load_transposed(unsigned out[4], const unsigned char *row) {
    using namespace emulator;
    mine().row = row;
    meet_warp();
    unsigned l = threadIdx.x % 32;
    for (unsigned m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (unsigned i = 0; i < 2; ++i) std::memcpy(&pair[i], lane(m * 8 + l % 4 * 2 + i).row + l / 4 * 2, 2);
        out[m] = pair[0] | (unsigned)pair[1] << 16;
    }
    meet_warp();
}

static inline void copy_async(unsigned char *to, const unsigned char *from, bool valid) {
    emulator::current().copies.push_back({to, from, valid});
}

static inline void copy_commit() {
    auto &fiber = emulator::current();
    fiber.committed.push_back(std::move(fiber.copies));
    fiber.copies.clear();
}

template <int pending>
static inline void copy_wait() {
    auto &committed = emulator::current().committed;
    for (; committed.size() > pending; committed.pop_front()) {
        for (const auto &copy : committed.front()) {
            if (copy.valid)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
    }
}

static inline float exchange(float value, unsigned from) {
    emulator::mine().value = value;
    emulator::meet_warp();
    float got = emulator::lane(from).value;
    emulator::meet_warp();
    return got;
}

static inline float shuffle_xor(float value, int mask) {
    return exchange(value, (threadIdx.x % 32) ^ (unsigned)mask);
}

static inline float shuffle_from(float value, int lane) {
    return exchange(value, (unsigned)lane);
}
