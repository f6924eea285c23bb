// What all kernels share: types, 16-bit floats, tensor-core instructions, reductions.
//
// Rules of this folder, for promise P1 (an output depends on its own inputs only, bit for bit):
//  - every output element has one fixed order of operations, whatever the grid, the batch or the chunk;
//  - no atomics on values; no reduction whose order depends on who comes first;
//  - compiled with --fmad=false: products and sums are fused only where fmaf() says so, so that two kernels which must
//    agree do.
// A kernel takes one structure by value; src/args.rs has the same ones. All threads of a warp reach every warp-wide
// function, and all of a block every barrier.
//
// With BATON_EMULATED the same source is C++ for the host (tests/emulator), which is how it is checked without a GPU.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BATON_EMULATED
#define KERNEL(name, Args, threads) extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a)
#define DEVICE static __device__ __forceinline__ __attribute__((unused))
#define SHARED __shared__
extern __shared__ __align__(16) u8 dynamic_shared[];
#endif

// Element types, as in src/args.rs.
#define TYPE_F32 0
#define TYPE_F16 1
#define TYPE_BF16 2

// Set when compiled for a model.
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef KV_TYPE
#define KV_TYPE TYPE_BF16
#endif

#define NONE 0xffffffffu
#define MINUS_INFINITY (-__int_as_float(0x7f800000))
#define F16_MAX 65504.0f

struct __align__(16) Quad {
    u32 v[4];
};

#ifndef BATON_EMULATED

// Two floats to two 16-bit floats, `low` in the low half. f16 saturates: an activation beyond its range is then wrong by
// little instead of becoming infinite.
template <int T>
DEVICE u32 pack2(float low, float high) {
    u32 out;
    if (T == TYPE_F16) {
        low = fminf(fmaxf(low, -F16_MAX), F16_MAX);
        high = fminf(fmaxf(high, -F16_MAX), F16_MAX);
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    }
    return out;
}

DEVICE float f16_to_f32(u16 bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}

// 2^x, the hardware's: the same bits wherever it is used.
DEVICE float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// c += a * b: 16 x 8 results, 16 products each, on the tensor cores.
template <int T>
DEVICE void mma(float c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if (T == TYPE_F16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// Four 8 x 8 matrices of 16-bit values, transposed; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_transposed(u32 out[4], const u8 *row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory in the background; zeros if `valid` is not.
DEVICE void copy_async(u8 *to, const u8 *from, bool valid) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

DEVICE void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `pending` of this thread's commits are under way.
template <int pending>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Weights are read once: past the L1 cache.
DEVICE Quad load_once(const u8 *from) {
    Quad q;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
                 : "l"(from));
    return q;
}

DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(NONE, value, mask);
}

DEVICE float shuffle_from(float value, int lane) {
    return __shfl_sync(NONE, value, lane);
}

#else

DEVICE Quad load_once(const u8 *from) {
    return *(const Quad *)from;
}

#endif

DEVICE Quad zero_quad() {
    Quad q;
    q.v[0] = q.v[1] = q.v[2] = q.v[3] = 0;
    return q;
}

DEVICE float bf16_to_f32(u16 bits) {
    return __uint_as_float((u32)bits << 16);
}

DEVICE float load_as_f32(u64 base, u64 index, u32 type) {
    if (type == TYPE_F32) return ((const float *)base)[index];
    u16 bits = ((const u16 *)base)[index];
    return type == TYPE_F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

DEVICE u16 to_16(float value, u32 type) {
    return (u16)(type == TYPE_F16 ? pack2<TYPE_F16>(value, 0.0f) : pack2<TYPE_BF16>(value, 0.0f));
}

DEVICE void store_as(u64 base, u64 index, u32 type, float value) {
    if (type == TYPE_F32) {
        ((float *)base)[index] = value;
    } else {
        ((u16 *)base)[index] = to_16(value, type);
    }
}

// Sum and maximum over the warp, the same bits in every lane: each step adds a pair, and a + b is b + a.
DEVICE float warp_sum(float value) {
    for (int mask = 16; mask > 0; mask >>= 1) value += shuffle_xor(value, mask);
    return value;
}

DEVICE float warp_max(float value) {
    for (int mask = 16; mask > 0; mask >>= 1) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// Sum over a block of 256 threads: warps in order.
DEVICE float block_sum_256(float value, float *scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < 8; ++w) sum += scratch[w];
    __syncthreads();
    return sum;
}
