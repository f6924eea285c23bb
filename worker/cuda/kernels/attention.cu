// Causal attention of ragged spans over paged K and V, flash-style (Dao et al. 2022), with a fixed split of the keys for
// decoding (Dao et al. 2023).
//
// Order (P1). A row's keys are cut at multiples of SPLIT positions, and splits at multiples of CHUNK, counted from the
// sequence's start, so nothing depends on where a prompt was cut. Within a split: an online softmax, chunk by chunk. Then
// splits are merged in order. A block either passes over all splits of up to 64 rows (token x head of a K/V head) and merges
// as it goes, or computes one split and leaves it to `attention_merge`; both do the same operations. A chunk that a row does
// not see changes none of its bits: its weights are 0, and what they multiply is finite.

#define CHUNK 64
#define SPLIT 256
#define ITEM_ROWS 64

// A block's work: rows of one span, and which splits.
struct Item {
    u32 row;         // of the batch
    u32 tokens;      // 0: nothing to do
    u32 start;       // position of the first token
    u32 table;       // where the span's block table starts
    u32 split_first;
    u32 split_end;
    u32 partial; // where its rows of partial results start, or NONE to write the output
    u32 unused;
};

struct AttentionArgs {
    u64 q;
    u64 out;
    u64 arena; // from the layer's first head of this rank on
    u64 items;
    u64 tables;
    u64 partials; // [rows][HEAD_DIM + 2]: unnormalised output, maximum, sum
    u64 block_bytes;
    u64 head_bytes;
    u64 half_bytes;
    u32 q_stride;
    u32 group; // query heads of a K/V head
    u32 kv_heads;
    u32 block_size;
    u32 out_type;
    float scale; // of the scores, times log2(e)
};

// A softmax so far: `out` is scaled by 2^-maximum, as `sum`.
DEVICE float base_of(float maximum) {
    return maximum == MINUS_INFINITY ? 0.0f : maximum;
}

DEVICE void merge_scales(float &maximum, float &sum, float part_maximum, float part_sum, float &keep, float &add) {
    float both = fmaxf(maximum, part_maximum), base = base_of(both);
    keep = exp2_fast(maximum - base);
    add = exp2_fast(part_maximum - base);
    maximum = both;
    sum = fmaf(sum, keep, part_sum * add);
}

DEVICE float merge_value(float total, float part, float keep, float add) {
    return fmaf(total, keep, part * add);
}

struct MergeArgs {
    u64 items;
    u64 partials;
    u64 out;
    u32 group;
    u32 kv_heads;
    u32 out_type;
    u32 unused;
};

// Merges the splits of one token of one head; grid: (items, group * kv_heads). `split_end` counts the splits here.
KERNEL(attention_merge, MergeArgs, 128) {
    const Item item = ((const Item *)a.items)[blockIdx.x];
    u32 head = blockIdx.y, kv_head = head / a.group, in_group = head % a.group;
    u32 rows = item.tokens * a.group;
    for (u32 token = 0; token < item.tokens; ++token) {
        for (u32 d = threadIdx.x; d < HEAD_DIM; d += 128) {
            float maximum = MINUS_INFINITY, sum = 0.0f, total = 0.0f;
            for (u32 s = 0; s < item.split_end; ++s) {
                u64 at = item.partial + (u64)(s * a.kv_heads + kv_head) * rows + token * a.group + in_group;
                const float *part = (const float *)a.partials + at * (HEAD_DIM + 2);
                float keep, add;
                merge_scales(maximum, sum, part[HEAD_DIM], part[HEAD_DIM + 1], keep, add);
                total = merge_value(total, part[d], keep, add);
            }
            u64 to = ((u64)(item.row + token) * a.group * a.kv_heads + head) * HEAD_DIM + d;
            store_as(a.out, to, a.out_type, total * (1.0f / sum));
        }
    }
}

#if KV_TYPE != TYPE_F32

#define ROW_CHUNKS (HEAD_DIM / 8) // 16-byte pieces of a key
#define KV_BYTES (CHUNK * HEAD_DIM * 2)

// Where pieces of keys and values lie: those read at once in different banks.
DEVICE u8 *key_at(u8 *keys, u32 key, u32 chunk) {
    return keys + (key * ROW_CHUNKS + (chunk ^ (ROW_CHUNKS % 8 == 0 ? (key & 1) << 2 : 0))) * 16;
}

DEVICE u8 *value_at(u8 *values, u32 key, u32 chunk) {
    return values + (key * ROW_CHUNKS + (chunk ^ (key & (ROW_CHUNKS % 8 == 0 ? 7 : 3)))) * 16;
}

// K and V of 64 positions; zeros past the end, where the arena holds anything.
DEVICE void load_chunk(const AttentionArgs &a, u8 *to, const u32 *table, u64 head, u32 base, u32 end) {
    for (u32 i = threadIdx.x; i < CHUNK * ROW_CHUNKS; i += 128) {
        u32 key = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS, position = base + key;
        bool valid = position < end;
        u64 from = a.arena + head;
        if (valid) {
            from += table[position / a.block_size] * a.block_bytes;
            from += ((u64)(position % a.block_size) * HEAD_DIM + chunk * 8) * 2;
        }
        copy_async(key_at(to, key, chunk), (const u8 *)from, valid);
        copy_async(value_at(to + KV_BYTES, key, chunk), (const u8 *)from + a.half_bytes, valid);
    }
}

// grid: (items, K/V heads); four warps, 16 rows each. Shared: two chunks of K and V, and the merged output.
KERNEL(attention, AttentionArgs, 128) {
    const Item item = ((const Item *)a.items)[blockIdx.x];
    if (item.tokens == 0) return;
    u32 kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 rows = item.tokens * a.group, end = item.start + item.tokens;
    const u32 *table = (const u32 *)a.tables + item.table;
    u64 head = kv_head * a.head_bytes;
    bool works = warp * 16 < rows;
    float *merged = (float *)(dynamic_shared + 4 * KV_BYTES);

    // This thread's two rows: their queries, and the last position they see.
    Quad q[HEAD_DIM / 32][2];
    u32 sees[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        u32 row = warp * 16 + g + r * 8;
        bool there = row < rows;
        u32 token = there ? row / a.group : 0, in_group = there ? row % a.group : 0;
        sees[r] = item.start + token;
        const float *from =
            (const float *)a.q + (u64)(item.row + token) * a.q_stride + (kv_head * a.group + in_group) * HEAD_DIM;
#pragma unroll
        for (int kk = 0; kk < HEAD_DIM / 32; ++kk) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float *pair = from + kk * 32 + t * 8 + i * 2;
                q[kk][r].v[i] = there ? pack2<KV_TYPE>(pair[0], pair[1]) : 0;
            }
        }
    }
    float out[HEAD_DIM / 8][4], maximum[2], sum[2], merged_maximum[2], merged_sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        merged_maximum[r] = MINUS_INFINITY;
        merged_sum[r] = 0.0f;
    }
    u32 first = item.split_first * (SPLIT / CHUNK), last = item.split_end * (SPLIT / CHUNK);
    u32 chunks = (end + CHUNK - 1) / CHUNK;
    if (last > chunks) last = chunks;
    load_chunk(a, dynamic_shared, table, head, first * CHUNK, end);
    copy_commit();
    for (u32 chunk = first; chunk < last; ++chunk) {
        u32 now = (chunk - first) % 2;
        if (chunk + 1 < last) load_chunk(a, dynamic_shared + (1 - now) * 2 * KV_BYTES, table, head, (chunk + 1) * CHUNK, end);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        u8 *keys = dynamic_shared + now * 2 * KV_BYTES, *values = keys + KV_BYTES;
        if (chunk % (SPLIT / CHUNK) == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                maximum[r] = MINUS_INFINITY;
                sum[r] = 0.0f;
            }
#pragma unroll
            for (int nt = 0; nt < HEAD_DIM / 8; ++nt)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[nt][i] = 0.0f;
        }
        if (works) {
            float scores[CHUNK / 8][4];
#pragma unroll
            for (int nt = 0; nt < CHUNK / 8; ++nt) {
                scores[nt][0] = scores[nt][1] = scores[nt][2] = scores[nt][3] = 0.0f;
#pragma unroll
                for (int kk = 0; kk < HEAD_DIM / 32; ++kk) {
                    Quad b = *(Quad *)key_at(keys, nt * 8 + g, kk * 4 + t);
                    mma<KV_TYPE>(scores[nt], q[kk][0].v[0], q[kk][1].v[0], q[kk][0].v[1], q[kk][1].v[1], b.v[0], b.v[1]);
                    mma<KV_TYPE>(scores[nt], q[kk][0].v[2], q[kk][1].v[2], q[kk][0].v[3], q[kk][1].v[3], b.v[2], b.v[3]);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float largest = MINUS_INFINITY;
#pragma unroll
                for (int nt = 0; nt < CHUNK / 8; ++nt) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        u32 position = chunk * CHUNK + nt * 8 + 2 * t + i;
                        float score = position <= sees[r] ? scores[nt][2 * r + i] * a.scale : MINUS_INFINITY;
                        scores[nt][2 * r + i] = score;
                        largest = fmaxf(largest, score);
                    }
                }
                largest = fmaxf(largest, shuffle_xor(largest, 1));
                largest = fmaxf(largest, shuffle_xor(largest, 2));
                float both = fmaxf(maximum[r], largest), base = base_of(both);
                float keep = exp2_fast(maximum[r] - base), part = 0.0f;
                maximum[r] = both;
#pragma unroll
                for (int nt = 0; nt < CHUNK / 8; ++nt) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float weight = exp2_fast(scores[nt][2 * r + i] - base);
                        scores[nt][2 * r + i] = weight;
                        part += weight;
                    }
                }
                part += shuffle_xor(part, 1);
                part += shuffle_xor(part, 2);
                sum[r] = fmaf(sum[r], keep, part);
#pragma unroll
                for (int nt = 0; nt < HEAD_DIM / 8; ++nt) {
                    out[nt][2 * r] *= keep;
                    out[nt][2 * r + 1] *= keep;
                }
            }
#pragma unroll
            for (int j = 0; j < CHUNK / 16; ++j) {
                // Two tiles of scores are, as they lie, the left side of a product over 16 keys.
                u32 w0 = pack2<KV_TYPE>(scores[2 * j][0], scores[2 * j][1]);
                u32 w1 = pack2<KV_TYPE>(scores[2 * j][2], scores[2 * j][3]);
                u32 w2 = pack2<KV_TYPE>(scores[2 * j + 1][0], scores[2 * j + 1][1]);
                u32 w3 = pack2<KV_TYPE>(scores[2 * j + 1][2], scores[2 * j + 1][3]);
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 16; ++n) {
                    u32 b[4];
                    u32 key = j * 16 + (lane / 8 & 1) * 8 + lane % 8;
                    load_transposed(b, value_at(values, key, n * 2 + lane / 16));
                    mma<KV_TYPE>(out[2 * n], w0, w1, w2, w3, b[0], b[1]);
                    mma<KV_TYPE>(out[2 * n + 1], w0, w1, w2, w3, b[2], b[3]);
                }
            }
        }
        bool split_ends = chunk % (SPLIT / CHUNK) == SPLIT / CHUNK - 1 || chunk + 1 == last;
        if (works && split_ends) {
            bool only = chunk < first + SPLIT / CHUNK;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32 row = warp * 16 + g + r * 8;
                if (item.partial != NONE) {
                    u64 at = item.partial + (u64)kv_head * rows + row;
                    float *to = (float *)a.partials + at * (HEAD_DIM + 2);
                    if (row < rows) {
                        for (int nt = 0; nt < HEAD_DIM / 8; ++nt) {
                            to[nt * 8 + 2 * t] = out[nt][2 * r];
                            to[nt * 8 + 2 * t + 1] = out[nt][2 * r + 1];
                        }
                        if (t == 0) {
                            to[HEAD_DIM] = maximum[r];
                            to[HEAD_DIM + 1] = sum[r];
                        }
                    }
                    continue;
                }
                float keep, add;
                merge_scales(merged_maximum[r], merged_sum[r], maximum[r], sum[r], keep, add);
#pragma unroll
                for (int nt = 0; nt < HEAD_DIM / 8; ++nt) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float *total = merged + row * HEAD_DIM + nt * 8 + 2 * t + i;
                        *total = merge_value(only ? 0.0f : *total, out[nt][2 * r + i], keep, add);
                    }
                }
            }
        }
        __syncthreads();
    }
    if (!works || item.partial != NONE) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        u32 row = warp * 16 + g + r * 8;
        if (row >= rows) continue;
        float inverse = 1.0f / merged_sum[r];
        u64 to = ((u64)(item.row + row / a.group) * a.group * a.kv_heads + kv_head * a.group + row % a.group) * HEAD_DIM;
        for (int nt = 0; nt < HEAD_DIM / 8; ++nt) {
            for (int i = 0; i < 2; ++i) {
                u32 d = nt * 8 + 2 * t + i;
                store_as(a.out, to + d, a.out_type, merged[row * HEAD_DIM + d] * inverse);
            }
        }
    }
}

#else

// f32, without tensor cores: a warp a row and head, 32 keys at a time, a lane a key and then a lane some elements. Passes
// over all splits as one. grid: (items, query heads); rows are the item's tokens, one after the other.
KERNEL(attention_f32, AttentionArgs, 128) {
    const Item item = ((const Item *)a.items)[blockIdx.x];
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 head = blockIdx.y, kv_head = head / a.group;
    const u32 *table = (const u32 *)a.tables + item.table;
    for (u32 token = warp; token < item.tokens; token += 4) {
        const float *q = (const float *)a.q + (u64)(item.row + token) * a.q_stride + head * HEAD_DIM;
        u32 end = item.start + token + 1;
        float out[(HEAD_DIM + 31) / 32];
        for (int i = 0; i < (HEAD_DIM + 31) / 32; ++i) out[i] = 0.0f;
        float maximum = MINUS_INFINITY, sum = 0.0f;
        for (u32 base = 0; base < end; base += 32) {
            u32 position = base + lane;
            bool valid = position < end;
            u64 key = 0;
            float score = MINUS_INFINITY;
            if (valid) {
                key = a.arena + kv_head * a.head_bytes + table[position / a.block_size] * a.block_bytes;
                key += (u64)(position % a.block_size) * HEAD_DIM * 4;
                score = 0.0f;
                for (u32 d = 0; d < HEAD_DIM; ++d) score = fmaf(q[d], ((const float *)key)[d], score);
                score *= a.scale;
            }
            float both = fmaxf(maximum, warp_max(score));
            float keep = exp2f(maximum - both), weight = exp2f(score - both);
            maximum = both;
            sum = fmaf(sum, keep, warp_sum(weight));
            for (int i = 0; i < (HEAD_DIM + 31) / 32; ++i) out[i] *= keep;
            for (u32 j = 0; j < 32 && base + j < end; ++j) {
                float w = shuffle_from(weight, (int)j);
                u32 at = base + j;
                u64 value = a.arena + kv_head * a.head_bytes + table[at / a.block_size] * a.block_bytes + a.half_bytes;
                value += (u64)(at % a.block_size) * HEAD_DIM * 4;
                for (u32 d = lane, i = 0; d < HEAD_DIM; d += 32, ++i) out[i] = fmaf(w, ((const float *)value)[d], out[i]);
            }
        }
        u64 to = ((u64)(item.row + token) * a.group * a.kv_heads + head) * HEAD_DIM;
        for (u32 d = lane, i = 0; d < HEAD_DIM; d += 32, ++i) {
            store_as(a.out, to + d, a.out_type, out[i] * (1.0f / sum));
        }
    }
}
#endif
