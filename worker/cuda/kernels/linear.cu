// out = x * W^T + bias, in f32, for weights as they are stored: [columns][k], a row's `k` contiguous.
//
// Order of every output, in all kernels of a format but f32 (P1): k is cut into 64s, and these into SEGMENTS runs that
// depend on k alone. Within a run, 32 elements after the other: two tensor-core products of 16 each, the first over elements
// 0..3 of every 8, the second over 4..7, summed in f32. Then runs are added in order, then the bias. `linear_few` computes
// the runs on the warps of a block at once, so that few rows stream weights with the whole machine; `linear_many` computes
// them one after the other, with tiles in shared memory. Which one is taken changes no bit.
//
// Why not cuBLASLt: its algorithms promise the same bits for the same shape only, not a row the same bits in every shape,
// and a chunk of one row and a chunk of a thousand must agree. See docs/gpu.md.
//
// Elements are taken in that odd order so that a thread's part of two products is 16 contiguous bytes of a row, for x and
// for W alike: k is summed over, so any order does, as long as both use the same.

#define SEGMENTS 8

struct LinearArgs {
    u64 x;
    u64 w;
    u64 scales;
    u64 minima;
    u64 bias; // f32 or 0
    u64 out;
    u32 rows;
    u32 columns;
    u32 k;      // a multiple of 8
    u32 groups; // scales of a column
};

// Weight formats.
#define DENSE 0      // 16-bit floats, of the activations' type
#define INT8 1       // signed bytes; one f32 scale a column
#define GROUP8 2     // signed bytes; one f16 scale for 32 elements
#define GROUP4 3     // nibbles + 8; one f16 scale for 32 elements
#define GROUP4_MIN 4 // nibbles; one f16 scale and one f16 minimum for 32 elements

// Integers up to 8 bits are exact in both 16-bit types: weights are multiplied as integers and their sums scaled.
template <int T>
DEVICE u32 pack_bytes(u32 low, u32 high) {
    return pack2<T>((float)(int)(signed char)low, (float)(int)(signed char)high);
}

template <int T>
DEVICE u32 pack_nibbles(u32 low, u32 high, float bias) {
    return pack2<T>((float)(low & 15) - bias, (float)(high & 15) - bias);
}

// Elements k0..k0+8 of a column's row, as 16-bit floats. Elements past the end are zero where they are stored.
template <int T, int F>
DEVICE Quad load_weights(const LinearArgs &a, u64 column, u32 k0) {
    if (F == DENSE) return load_once((const u8 *)a.w + (column * a.k + k0) * 2);
    Quad q;
    if (F == INT8 || F == GROUP8) {
        const u32 *from = (const u32 *)((const u8 *)a.w + column * a.k + k0);
        for (int i = 0; i < 2; ++i) {
            u32 word = from[i];
            q.v[2 * i] = pack_bytes<T>(word & 255, word >> 8 & 255);
            q.v[2 * i + 1] = pack_bytes<T>(word >> 16 & 255, word >> 24);
        }
        return q;
    }
    u32 word = *(const u32 *)((const u8 *)a.w + (column * a.k + k0) / 2);
    float bias = F == GROUP4 ? 8.0f : 0.0f;
    for (int i = 0; i < 4; ++i) q.v[i] = pack_nibbles<T>(word >> 8 * i, word >> (8 * i + 4), bias);
    return q;
}

// The two products of 32 elements, from the 16 bytes of each row.
template <int T>
DEVICE void products(float c[4], const Quad &top, const Quad &bottom, const Quad &b) {
    mma<T>(c, top.v[0], bottom.v[0], top.v[1], bottom.v[1], b.v[0], b.v[1]);
    mma<T>(c, top.v[2], bottom.v[2], top.v[3], bottom.v[3], b.v[2], b.v[3]);
}

DEVICE u32 segment_start(u32 units, u32 segment) {
    return (u32)((u64)units * segment / SEGMENTS);
}

// The run of one segment for MT * 16 rows from `m0` and NT * 8 columns from `n0`: what a warp of `linear_few` computes.
template <int T, int F, int MT, int NT>
DEVICE void run_segment(const LinearArgs &a, u32 m0, u32 n0, u32 segment, float (&acc)[MT][NT][4]) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 units = (a.k + 63) / 64;
    u32 first = segment_start(units, segment) * 2, last = segment_start(units, segment + 1) * 2;
    const u32 ones = T == TYPE_F16 ? 0x3c003c00u : 0x3f803f80u;
#pragma unroll 2
    for (u32 chunk = first; chunk < last; ++chunk) {
        u32 k0 = chunk * 32 + t * 8;
        bool inside = k0 < a.k;
        Quad b[NT];
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            u32 column = n0 + nt * 8 + g;
            b[nt] = inside && column < a.columns ? load_weights<T, F>(a, column, k0) : zero_quad();
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
            u32 row = m0 + mt * 16 + g;
            const u8 *from = (const u8 *)a.x + ((u64)row * a.k + k0) * 2;
            Quad top = inside && row < a.rows ? *(const Quad *)from : zero_quad();
            Quad bottom = inside && row + 8 < a.rows ? *(const Quad *)(from + (u64)8 * a.k * 2) : zero_quad();
            if (F == DENSE || F == INT8) {
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) products<T>(acc[mt][nt], top, bottom, b[nt]);
                continue;
            }
            // A group has its scale: the sum of its integers' products is scaled and added.
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (F == GROUP4_MIN) {
                Quad one;
                one.v[0] = one.v[1] = one.v[2] = one.v[3] = ones;
                products<T>(sums, top, bottom, one);
            }
#pragma unroll
            for (int nt = 0; nt < NT; ++nt) {
                float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                products<T>(part, top, bottom, b[nt]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    u32 column = n0 + nt * 8 + 2 * t + i % 2;
                    bool there = column < a.columns && chunk < a.groups;
                    u64 at = (u64)column * a.groups + chunk;
                    float scale = there ? f16_to_f32(((const u16 *)a.scales)[at]) : 0.0f;
                    acc[mt][nt][i] = fmaf(scale, part[i], acc[mt][nt][i]);
                    if (F == GROUP4_MIN) {
                        float minimum = there ? f16_to_f32(((const u16 *)a.minima)[at]) : 0.0f;
                        acc[mt][nt][i] = fmaf(minimum, sums[i], acc[mt][nt][i]);
                    }
                }
            }
        }
    }
}

template <int F>
DEVICE void store_output(const LinearArgs &a, u32 row, u32 column, float sum) {
    if (row >= a.rows || column >= a.columns) return;
    if (F == INT8) sum *= ((const float *)a.scales)[column];
    if (a.bias) sum += ((const float *)a.bias)[column];
    ((float *)a.out)[(u64)row * a.columns + column] = sum;
}

// grid: (columns / (8 * NT), rows / (16 * MT)); a warp a segment.
template <int T, int F, int MT, int NT>
DEVICE void linear_few(const LinearArgs &a, float *runs) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 n0 = blockIdx.x * 8 * NT, m0 = blockIdx.y * 16 * MT;
    float acc[MT][NT][4];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[mt][nt][i] = 0.0f;
    run_segment<T, F, MT, NT>(a, m0, n0, warp, acc);
    const u32 size = 16 * 8 * NT;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 row = g + i / 2 * 8, column = nt * 8 + 2 * t + i % 2;
                runs[warp * size + row * 8 * NT + column] = acc[mt][nt][i];
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < size; i += 256) {
            float sum = 0.0f;
            for (u32 s = 0; s < SEGMENTS; ++s) sum += runs[s * size + i];
            store_output<F>(a, m0 + mt * 16 + i / (8 * NT), n0 + i % (8 * NT), sum);
        }
        __syncthreads();
    }
}

#define LINEAR_FEW(name, T, F, MT, NT)                  \
    KERNEL(name, LinearArgs, 256) {                     \
        SHARED float runs[SEGMENTS * 16 * 8 * NT];      \
        linear_few<T, F, MT, NT>(a, runs);              \
    }

#if KV_TYPE != TYPE_F32
LINEAR_FEW(linear_dense_16, KV_TYPE, DENSE, 1, 2)
LINEAR_FEW(linear_dense_64, KV_TYPE, DENSE, 4, 4)
LINEAR_FEW(linear_int8_16, KV_TYPE, INT8, 1, 2)
LINEAR_FEW(linear_int8_64, KV_TYPE, INT8, 4, 4)
LINEAR_FEW(linear_group8_16, KV_TYPE, GROUP8, 1, 2)
LINEAR_FEW(linear_group8_64, KV_TYPE, GROUP8, 4, 4)
LINEAR_FEW(linear_group4_16, KV_TYPE, GROUP4, 1, 2)
LINEAR_FEW(linear_group4_64, KV_TYPE, GROUP4, 4, 4)
LINEAR_FEW(linear_group4min_16, KV_TYPE, GROUP4_MIN, 1, 2)
LINEAR_FEW(linear_group4min_64, KV_TYPE, GROUP4_MIN, 4, 4)

// Tiles of 128 rows by 128 columns by 64 elements; three are on their way at a time.
#define TILE 128
#define TILE_BYTES (TILE * 64 * 2)
#define STAGES 3

// Where 16 bytes of a tile lie: the threads that read at once then find different banks.
DEVICE u8 *tile_at(u8 *tile, u32 row, u32 chunk) {
    return tile + row * 128 + (chunk ^ (row & 1) << 2) * 16;
}

DEVICE void load_tile(u8 *tile, u64 base, u32 first, u32 rows, u32 k, u32 unit) {
    for (u32 i = threadIdx.x; i < TILE * 8; i += 256) {
        u32 row = i / 8, chunk = i % 8, k0 = unit * 64 + chunk * 8;
        bool valid = first + row < rows && k0 < k;
        const u8 *from = (const u8 *)base + (valid ? ((u64)(first + row) * k + k0) * 2 : 0);
        copy_async(tile_at(tile, row, chunk), from, valid);
    }
}

// grid: (rows / 128, columns / 128): blocks that share weights run together. Eight warps, 64 rows by 32 columns each.
KERNEL(linear_dense_many, LinearArgs, 256) {
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 m0 = blockIdx.x * TILE, n0 = blockIdx.y * TILE;
    u32 wm = warp / 4 * 64, wn = warp % 4 * 32;
    u32 units = (a.k + 63) / 64;
    float total[4][4][4], acc[4][4][4];
#pragma unroll
    for (int mt = 0; mt < 4; ++mt)
#pragma unroll
        for (int nt = 0; nt < 4; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i) total[mt][nt][i] = acc[mt][nt][i] = 0.0f;
    for (u32 stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < units) {
            load_tile(dynamic_shared + stage * 2 * TILE_BYTES, a.x, m0, a.rows, a.k, stage);
            load_tile(dynamic_shared + stage * 2 * TILE_BYTES + TILE_BYTES, a.w, n0, a.columns, a.k, stage);
        }
        copy_commit();
    }
    u32 segment = 0;
    for (u32 unit = 0; unit < units; ++unit) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        u32 next = unit + STAGES - 1;
        if (next < units) {
            u8 *to = dynamic_shared + next % STAGES * 2 * TILE_BYTES;
            load_tile(to, a.x, m0, a.rows, a.k, next);
            load_tile(to + TILE_BYTES, a.w, n0, a.columns, a.k, next);
        }
        copy_commit();
        u8 *xs = dynamic_shared + unit % STAGES * 2 * TILE_BYTES, *ws = xs + TILE_BYTES;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            Quad b[4];
#pragma unroll
            for (int nt = 0; nt < 4; ++nt) b[nt] = *(Quad *)tile_at(ws, wn + nt * 8 + g, half * 4 + t);
#pragma unroll
            for (int mt = 0; mt < 4; ++mt) {
                Quad top = *(Quad *)tile_at(xs, wm + mt * 16 + g, half * 4 + t);
                Quad bottom = *(Quad *)tile_at(xs, wm + mt * 16 + g + 8, half * 4 + t);
#pragma unroll
                for (int nt = 0; nt < 4; ++nt) products<KV_TYPE>(acc[mt][nt], top, bottom, b[nt]);
            }
        }
        // The end of one segment, or of several empty ones, which add nothing.
        if (unit + 1 >= segment_start(units, segment + 1)) {
            while (segment < SEGMENTS && unit + 1 >= segment_start(units, segment + 1)) ++segment;
#pragma unroll
            for (int mt = 0; mt < 4; ++mt)
#pragma unroll
                for (int nt = 0; nt < 4; ++nt)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        total[mt][nt][i] += acc[mt][nt][i];
                        acc[mt][nt][i] = 0.0f;
                    }
        }
    }
#pragma unroll
    for (int mt = 0; mt < 4; ++mt)
#pragma unroll
        for (int nt = 0; nt < 4; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                store_output<DENSE>(a, m0 + wm + mt * 16 + g + i / 2 * 8, n0 + wn + nt * 8 + 2 * t + i % 2, total[mt][nt][i]);
}
#else

// f32 weights and activations: for models that have them, and to tell rounding from mistakes. A chain along k for each
// output; grid: (columns / 16, rows / 16).
KERNEL(linear_f32, LinearArgs, 256) {
    SHARED float xs[16][17];
    SHARED float ws[16][17];
    u32 i = threadIdx.x / 16, j = threadIdx.x % 16;
    u32 m0 = blockIdx.y * 16, n0 = blockIdx.x * 16;
    float sum = 0.0f;
    for (u32 k0 = 0; k0 < a.k; k0 += 16) {
        bool inside = k0 + j < a.k;
        xs[i][j] = inside && m0 + i < a.rows ? ((const float *)a.x)[(u64)(m0 + i) * a.k + k0 + j] : 0.0f;
        ws[i][j] = inside && n0 + i < a.columns ? ((const float *)a.w)[(u64)(n0 + i) * a.k + k0 + j] : 0.0f;
        __syncthreads();
        for (u32 kk = 0; kk < 16; ++kk) sum = fmaf(xs[i][kk], ws[j][kk], sum);
        __syncthreads();
    }
    store_output<DENSE>(a, m0 + i, n0 + j, sum);
}
#endif
