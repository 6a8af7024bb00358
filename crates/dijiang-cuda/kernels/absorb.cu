// The keys that leave the window join the sums of their segment.

// A tile of keys and values; zeros where there is none to look at, for a masked one may be
// anything.
__device__ void load_keys(const Keys &keys, int tile, Element *k, Element *v) {
    if (keys.plain(tile)) {
        load_block<D>(k, keys.k + (long)(tile * TILE - keys.position) * D);
        load_block<E>(v, keys.v + (long)(tile * TILE - keys.position) * E);
        return;
    }
    load_rows<D, TILE>(k, [&](int r) {
        int p = tile * TILE + r;
        return keys.valid(p) ? keys.key(p) : nullptr;
    });
    load_rows<E, TILE>(v, [&](int r) {
        int p = tile * TILE + r;
        return keys.valid(p) ? keys.value(p) : nullptr;
    });
}

// What the tokens of a tile add to every feature's exponent, seen from position `base`; false if
// that is nothing.
__device__ bool key_exponents(const Call &call, const Head &head, const Sequence &sequence,
                              const Keys &keys, int tile, int base, const Element *k, float *to) {
    bool sinks = sequence.sinks > 0 && sequence.sink[0] < (tile + 1) * TILE &&
                 sequence.sink[sequence.sinks - 1] >= tile * TILE;
    if (!call.envelope && head.decay == 0.f && !sinks && keys.plain(tile)) return false;
    if (threadIdx.x < TILE) {
        int p = tile * TILE + threadIdx.x;
        bool joins = keys.valid(p) && !is_sink(sequence, p);
        float exponent = head.decay == 0.f ? 0.f : head.decay * (base - p);
        if (call.envelope) exponent -= call.scale * half_norm(k + threadIdx.x * KEY_ROW);
        to[threadIdx.x] = joins ? exponent : NEVER;
    }
    __syncthreads();
    return true;
}

// The key projection of a block of 64 features.
struct KeyMap {
    Rows high, low;
    float row[2];

    __device__ void load(const Call &call, int kv, int block, Element *k, Element *rest) {
        load_block<D>(k, projection(call, kv, 1, block, 0));
        if (SPLIT) load_block<D>(rest, projection(call, kv, 1, block, SPLIT));
        commit();
        arrived<0>();
        __syncthreads();
        high.load(k);
        if (SPLIT) low.load(rest);
        int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        for (int r = 0; r < 2; r++) row[r] = call.rows[(kv * 2 + 1) * M + f + 8 * r];
        __syncthreads();
    }
};

// `exponents` is null if they are zero.
__device__ void absorb_tile(Softmax &sums, const KeyMap &map, const Element *k, const Element *v,
                            const float *exponents, Element *scratch) {
    float s[TILE / 8][4];
    zero(s);
    scores(s, map.high, k);
    if (SPLIT && large(s)) scores(s, map.low, k);
    add_rows(s, map.row[0], map.row[1]);
    if (exponents) add_columns(s, exponents);
    sums.add(s, 1.f, v, scratch);
}

// One segment of one sequence, one head, 64 features.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) absorb(const Call call) {
    extern __shared__ __align__(16) Element shared[];
    __shared__ float exponents[TILE];
    const Tiles tiles{shared};
    // Blocks that read the same keys are neighbours.
    int kv = blockIdx.y, i = 0;
    int block = blockIdx.x % (M / TILE), at_segment = blockIdx.x / (M / TILE);
    while (i + 1 < call.count && at_segment >= call.sequences[i + 1].segment) i++;
    const Sequence &sequence = call.sequences[i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    int segment = at_segment - sequence.segment, first_tile = sequence.position / TILE;
    int last_tile = (sequence.position + sequence.n - 1) / TILE;
    int begin = first_tile + segment * call.segment_tiles;
    int end = min(begin + call.segment_tiles - 1, last_tile);
    bool ends = end == last_tile;
    int base = begin * TILE;
    int at = segment == 0 ? first_kept(head, sequence.position) : first_seen(head, begin);
    int first = at;

    KeyMap map;
    // Without a split the projection is read from where it lies.
    map.load(call, kv, block, SPLIT ? tiles.k(0) : tiles.fixed(), tiles.k(1));
    Softmax sums;
    sums.clear();
    int last = first_seen(head, ends ? end : end + 1);
    if (at < last) load_keys(keys, at, tiles.k(0), tiles.v(0));
    commit();
    int first_chunk = begin / head.tiles, chunks = end / head.tiles - first_chunk + 1;
    for (int chunk = 0; chunk <= chunks; chunk++) {
        // After the last chunk of the segment, what the next segment finds.
        int until = chunk == chunks ? last : first_seen(head, (first_chunk + chunk) * head.tiles);
        until = max(first, until);
        for (; at < until; at++) {
            int now = (at - first) % 2;
            if (at + 1 < last) load_keys(keys, at + 1, tiles.k(1 - now), tiles.v(1 - now));
            commit();
            arrived<1>();
            __syncthreads();
            const Element *k = tiles.k(now), *v = tiles.v(now);
            bool any = key_exponents(call, head, sequence, keys, at, base, k, exponents);
            absorb_tile(sums, map, k, v, any ? exponents : nullptr, tiles.scratch());
            __syncthreads();
        }
        if (chunk < chunks && until == first) continue;
        float total[2] = {whole(sums.total[0]), whole(sums.total[2])};
        int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        int column = 2 * (threadIdx.x % 4);
        if (chunk < chunks) {
            long head_at = ((long)at_segment * call.segment_tiles + chunk) * call.kv_heads + kv;
            // By way of shared memory, for whole lines of stores.
            Element *stage = tiles.v((at - 1 - first) % 2);
            for (int r = 0; r < 2; r++) {
                int g = f + 8 * r;
                float inverse = total[r] > 0.f ? 1.f / total[r] : 0.f;
                if (column == 0)
                    call.within_level[head_at * M + g] =
                        total[r] > 0.f ? sums.top[r] + log2f(total[r]) : NEVER;
#pragma unroll
                for (int n = 0; n < E / 8; n++)
                    store2(stage + (g - block * TILE) * VALUE_ROW + 8 * n + column,
                           sums.o[n][2 * r] * inverse, sums.o[n][2 * r + 1] * inverse);
            }
            __syncthreads();
            Element *to = call.within + (head_at * M + block * TILE) * E;
            store_block<E>(to, stage, [](int) { return true; });
            __syncthreads();
        } else {
            float *to = call.segment_sums + ((long)at_segment * call.kv_heads + kv) * M * (E + 2);
            for (int r = 0; r < 2; r++) {
                int g = f + 8 * r;
                if (column == 0) to[g] = sums.top[r], to[M + g] = total[r];
#pragma unroll
                for (int n = 0; n < E / 8; n++)
                    *(float2 *)(to + 2 * M + g * E + 8 * n + column) =
                        make_float2(sums.o[n][2 * r], sums.o[n][2 * r + 1]);
            }
        }
    }
}
