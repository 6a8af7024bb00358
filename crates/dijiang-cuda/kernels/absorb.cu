// The keys that leave the window join the sums of their segment; and the mean values that each
// chunk of queries finds.

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
        if (call.envelope) exponent -= call.scale * half_norm(k, threadIdx.x);
        to[threadIdx.x] = joins ? exponent : NEVER;
    }
    __syncthreads();
    return true;
}

// The key projection of a block of 64 features.
struct KeyMap {
    Rows<D> high;
    FarRows<D> low;  // seldom needed
    float row[2];

    __device__ void load(const Call &call, int kv, int block, Element *k) {
        load_block<D>(k, projection(call, kv, 1, block, 0));
        if (SPLIT) low.load(projection(call, kv, 1, block, SPLIT));
        commit();
        arrived<0>();
        __syncthreads();
        high.load(k);
        int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        for (int r = 0; r < 2; r++) row[r] = call.rows[(kv * 2 + 1) * M + f + 8 * r];
        __syncthreads();
    }
};

// `exponents` is null if they are zero.
__device__ void absorb_tile(Softmax &sums, const KeyMap &map, const Element *k, const Element *v,
                            const float *exponents, Element *scratch) {
    float s[TILE / 8][4];
    all_scores(s, map.high, k);
    if (SPLIT && large(s)) scores(s, map.low, k);
    if (exponents) add_columns(s, exponents);
    sums.add(s, 1.f, map.row, v, scratch);
}

// The mean values of a block, by way of a tile in shared memory that nobody is to use before
// threads have met.
__device__ void store_means(const Softmax &sums, const float (&total)[2], Element *means,
                            float *units, long version, int block, Element *stage) {
    __shared__ float most[THREADS / 32];
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float inverse[2], unit = 1.f;
    for (int r = 0; r < 2; r++) inverse[r] = total[r] > 0.f ? reciprocal(total[r]) : 0.f;
    if (SCALED) {
        float most_of[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int n = 0; n < E / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) most_of[i] = fmaxf(most_of[i], fabsf(sums.o[n][i]));
        float own = fmaxf(fmaxf(most_of[0], most_of[1]) * inverse[0],
                          fmaxf(most_of[2], most_of[3]) * inverse[1]);
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2)
            own = fmaxf(own, __shfl_xor_sync(~0u, own, lane));
        if (threadIdx.x % 32 == 0) most[threadIdx.x / 32] = own;
        __syncthreads();
        own = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
        // A power of two; at most what f32 has the inverse of.
        if (own > 0.f) unit = __uint_as_float(max(__float_as_uint(own) & 0x7f800000u, 2u << 23));
        if (threadIdx.x == 0) units[version * (M / TILE) + block] = unit;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float factor = inverse[r] * inverse_of_power(unit);
#pragma unroll
        for (int n = 0; n < E / 8; n++) {
            Element *to = stage + place<E>(row + 8 * r, 8 * n + 2 * (threadIdx.x % 4));
            store_mean2(to, sums.o[n][2 * r] * factor, sums.o[n][2 * r + 1] * factor);
        }
    }
    __syncthreads();
    store_block<E>(means + (version * M + block * TILE) * E, stage, [](int) { return true; });
}

#ifndef BACKWARD
// One segment of one sequence, one head, 64 features: its sums; or, once the scan has made them
// those of all segments before it, the means at each of its chunks. There are not many more blocks
// than multiprocessors, so each has registers enough.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS == 4 ? 4 : 2) absorb(const Call call) {
    SHARED(shared);
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
    // Nobody asks for what is behind the last segment, but a state.
    if (!call.versions && ends && sequence.slot < 0) return;
    int base = begin * TILE;
    int at = segment == 0 ? first_kept(head, sequence.position) : first_seen(head, begin);
    int first = at, last = first_seen(head, ends || call.versions ? end : end + 1);
    if (call.versions && !any_before(sequence, last)) return;

    KeyMap map;
    // Without a split the projection is read from where it lies.
    map.load(call, kv, block, SPLIT ? tiles.k(0) : tiles.fixed());
    float *of_segment = call.segment_sums + ((long)at_segment * call.kv_heads + kv) * M * (E + 2);
    int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    int column = 2 * (threadIdx.x % 4);
    Softmax sums;
    sums.clear();
    // Nothing is before a sequence's first segment, but a state.
    bool resumes = call.versions && (segment > 0 || sequence.slot >= 0);
    for (int r = 0; resumes && r < 2; r++) {
        int g = f + 8 * r;
        sums.resume(r, of_segment[g], of_segment[M + g], of_segment + 2 * M + g * E);
    }
    if (at < last) load_keys(keys, at, tiles.k(0), tiles.v(0));
    commit();
    int first_chunk = begin / head.tiles, chunks = end / head.tiles - first_chunk + 1;
    for (int chunk = 0; chunk < (call.versions ? chunks : 1); chunk++) {
        int joined = max(0, first_chunk + chunk - head.back) * head.tiles;
        int seen = call.versions ? joined : last;
        for (; at < seen; at++) {
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
        float total[2] = {whole(sums.total[0]), whole(sums.total[2])};
        if (!call.versions) {
            for (int r = 0; r < 2; r++) {
                int g = f + 8 * r;
                if (column == 0) of_segment[g] = sums.top[r], of_segment[M + g] = total[r];
#pragma unroll
                for (int n = 0; n < E / 8; n++)
                    *(float2 *)(of_segment + 2 * M + g * E + 8 * n + column) =
                        make_float2(sums.o[n][2 * r], sums.o[n][2 * r + 1]);
            }
        } else if (any_before(sequence, seen)) {
            // As `version_of` has it.
            long version = (long)at_segment * call.segment_tiles + chunk;
            version = version * call.kv_heads + kv;
            if (column == 0)
                for (int r = 0; r < 2; r++)
                    call.mean_level[version * M + f + 8 * r] =
                        total[r] > 0.f ? sums.top[r] + __log2f(total[r]) : NEVER;
            // The place of the last tile; the next one is on its way to the other.
            Element *stage = tiles.v(1 - (at - first) % 2);
            store_means(sums, total, call.means, call.mean_unit, version, block, stage);
            __syncthreads();
        }
    }
}
#endif
