// Row by row: embedding, RMSNorm with the residual, SiLU, gather; and the rotary table of a step.

struct EmbedArgs {
    u64 table;
    u64 tokens;
    u64 out;
    u32 width;
    u32 type;
};

// out[row] = table[tokens[row]]; grid: rows.
KERNEL(embed, EmbedArgs, 256) {
    u64 row = blockIdx.x;
    u64 from = (u64)((const u32 *)a.tokens)[row] * a.width;
    for (u32 i = threadIdx.x; i < a.width; i += 256) {
        ((float *)a.out)[row * a.width + i] = load_as_f32(a.table, from + i, a.type);
    }
}

struct NormArgs {
    u64 x;
    u64 delta; // or 0
    u64 weight;
    u64 out;
    u32 width;
    u32 out_type;
    float eps;
    u32 unused;
};

// x += delta; out = x / sqrt(mean(x^2) + eps) * weight; grid: rows. A thread sums every 256th square.
KERNEL(rms_norm, NormArgs, 256) {
    SHARED float scratch[8];
    u64 start = (u64)blockIdx.x * a.width;
    float *x = (float *)a.x + start;
    const float *delta = a.delta ? (const float *)a.delta + start : nullptr;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < a.width; i += 256) {
        float v = x[i];
        if (delta) {
            v += delta[i];
            x[i] = v;
        }
        squares = fmaf(v, v, squares);
    }
    float mean = block_sum_256(squares, scratch) / (float)a.width;
    float scale = 1.0f / sqrtf(mean + a.eps);
    for (u32 i = threadIdx.x; i < a.width; i += 256) {
        store_as(a.out, start + i, a.out_type, x[i] * scale * ((const float *)a.weight)[i]);
    }
}

struct SiluArgs {
    u64 gate_up;
    u64 out;
    u32 width;
    u32 out_type;
};

// out = silu(gate) * up of rows [gate | up]; grid: (width / 256, rows).
KERNEL(silu_mul, SiluArgs, 256) {
    u32 i = blockIdx.x * 256 + threadIdx.x;
    u64 row = blockIdx.y;
    if (i < a.width) {
        const float *from = (const float *)a.gate_up + row * 2 * a.width;
        float gate = from[i];
        store_as(a.out, row * a.width + i, a.out_type, gate / (1.0f + expf(-gate)) * from[a.width + i]);
    }
}

struct GatherArgs {
    u64 x;
    u64 rows;
    u64 out;
    u32 words; // 32-bit words of a row
    u32 unused;
};

// out[i] = x[rows[i]]; grid: rows of out.
KERNEL(gather_rows, GatherArgs, 256) {
    u64 from = (u64)((const u32 *)a.rows)[blockIdx.x] * a.words;
    u64 to = (u64)blockIdx.x * a.words;
    for (u32 i = threadIdx.x; i < a.words; i += 256) ((u32 *)a.out)[to + i] = ((const u32 *)a.x)[from + i];
}

struct RopeTableArgs {
    u64 positions;
    u64 frequencies;
    u64 cos;
    u64 sin;
    float scale;
    u32 half; // pairs of a head
};

// Cosines and sines of a step's positions; grid: rows.
KERNEL(rope_table, RopeTableArgs, 128) {
    float position = (float)((const u32 *)a.positions)[blockIdx.x];
    for (u32 i = threadIdx.x; i < a.half; i += 128) {
        float angle = position * ((const float *)a.frequencies)[i];
        u64 to = (u64)blockIdx.x * a.half + i;
        ((float *)a.cos)[to] = cosf(angle) * a.scale;
        ((float *)a.sin)[to] = sinf(angle) * a.scale;
    }
}

struct RopeArgs {
    u64 qkv;
    u64 cos;
    u64 sin;
    u64 slots; // per row: block * block_size + slot, or NONE
    u64 arena; // from the layer's first written head on
    u64 block_bytes;
    u64 head_bytes;
    u64 half_bytes;
    u32 heads;
    u32 kv_heads;
    u32 block_size;
    u32 unused;
};

// Rotates Q and K of rows [q | k | v] (rotate-half) and writes K and V to their slots; grid: rows.
KERNEL(rope_kv_write, RopeArgs, 256) {
    const u32 half = HEAD_DIM / 2;
    u64 row = blockIdx.x;
    float *x = (float *)a.qkv + row * (a.heads + 2 * a.kv_heads) * HEAD_DIM;
    const float *cos = (const float *)a.cos + row * half;
    const float *sin = (const float *)a.sin + row * half;
    u32 slot = ((const u32 *)a.slots)[row];
    u64 place = slot == NONE ? 0 : a.arena + slot / a.block_size * a.block_bytes;
    u64 element = (u64)(slot % a.block_size) * HEAD_DIM;
    for (u32 i = threadIdx.x; i < (a.heads + a.kv_heads) * half; i += 256) {
        u32 head = i / half, at = i % half;
        float *pair = x + head * HEAD_DIM + at;
        float low = pair[0], high = pair[half], c = cos[at], s = sin[at];
        float first = low * c - high * s, second = high * c + low * s;
        pair[0] = first;
        pair[half] = second;
        if (head >= a.heads && slot != NONE) {
            u64 keys = place + (head - a.heads) * a.head_bytes;
            store_as(keys, element + at, KV_TYPE, first);
            store_as(keys, element + at + half, KV_TYPE, second);
        }
    }
    const float *values = x + (a.heads + a.kv_heads) * HEAD_DIM;
    for (u32 i = threadIdx.x; i < a.kv_heads * HEAD_DIM && slot != NONE; i += 256) {
        u64 to = place + i / HEAD_DIM * a.head_bytes + a.half_bytes;
        store_as(to, element + i % HEAD_DIM, KV_TYPE, values[i]);
    }
}
