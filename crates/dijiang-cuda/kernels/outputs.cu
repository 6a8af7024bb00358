// A tile of 64 queries: over its window, the sinks, and the sums of everything older.

// The queries of a tile and where they lie.
struct QueryTile {
    long row;              // of the tile's first query in q and out
    int first, position, end;
    __device__ QueryTile(const Call &call, const Sequence &sequence, int h, int t) {
        position = sequence.position, end = sequence.position + sequence.n, first = t * TILE;
        row = (long)h * call.tokens + sequence.token + first - position;
    }
    __device__ bool has(int r) const { return first + r >= position && first + r < end; }
    __device__ bool plain() const { return first >= position && first + TILE <= end; }
};

__device__ void load_queries(const Call &call, const QueryTile &tile, Element *to) {
    if (tile.plain()) return load_block<D>(to, call.q + tile.row * D);
    load_rows<D, TILE>(
        to, [&](int r) { return tile.has(r) ? call.q + (tile.row + r) * D : nullptr; });
}

// Scores that no query of the tile may look at: of masked keys, and of later ones.
__device__ void hide(float (&s)[TILE / 8][4], const float *masked, bool diagonal) {
    if (masked) add_columns(s, masked);
    if (!diagonal) return;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * n + 2 * (lane % 4) + i % 2 > row + i / 2 * 8) s[n][i] = NEVER;
}

__device__ void load_sinks(const Keys &keys, const Sequence &sequence, int sinks, Element *k,
                           Element *v) {
    load_rows<D, SINKS>(k, [&](int r) -> const Element * {
        if (r >= sinks) return nullptr;
        int p = sequence.sink[r];
        return p < keys.position ? keys.state.sink_k + r * D : keys.key(p);
    });
    load_rows<E, SINKS>(v, [&](int r) -> const Element * {
        if (r >= sinks) return nullptr;
        int p = sequence.sink[r];
        return p < keys.position ? keys.state.sink_v + r * E : keys.value(p);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) outputs(const Call call) {
    extern __shared__ __align__(16) Element shared[];
    __shared__ float masked[2][TILE], level[2][M], norm[TILE];
    const Tiles tiles{shared};
    int h = blockIdx.y, kv = h / call.group, i = 0;
    while (i + 1 < call.count && (int)blockIdx.x >= call.sequences[i + 1].tile) i++;
    const Sequence &sequence = call.sequences[i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    int first_tile = sequence.position / TILE, t = first_tile + blockIdx.x - sequence.tile;
    int seen = first_seen(head, t);
    const QueryTile tile(call, sequence, h, t);
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;

    // Queries by way of the second tile's place.
    Element *queries = SPLIT ? tiles.k(1) : tiles.fixed();
    load_queries(call, tile, queries);
    load_keys(keys, seen, tiles.k(0), tiles.v(0));
    commit();

    int segment = (t - first_tile) / call.segment_tiles;
    int begin = first_tile + segment * call.segment_tiles;
    int first = segment == 0 ? first_kept(head, sequence.position) : first_seen(head, begin);
    // Mean values: of the segments before, and of the own one up to the window.
    long of_segment = sequence.segment + segment;
    long before_at = of_segment * call.kv_heads + kv;
    int version = t / head.tiles - begin / head.tiles;
    long within_at = (of_segment * call.segment_tiles + version) * call.kv_heads + kv;
    bool before = segment > 0 || sequence.slot >= 0, within = seen > first, far = before || within;
    for (int f = threadIdx.x; far && f < M; f += THREADS) {
        float c = call.rows[kv * 2 * M + f];
        level[0][f] = before ? c + call.before_level[before_at * M + f] : NEVER;
        level[1][f] = within ? c + call.within_level[within_at * M + f] : NEVER;
    }
    int sinks = 0;
    while (sinks < sequence.sinks && sequence.sink[sinks] < seen * TILE) sinks++;

    arrived<0>();
    __syncthreads();
    Rows q;
    q.load(queries);
    if (call.envelope && threadIdx.x < TILE)
        norm[threadIdx.x] = half_norm(queries + threadIdx.x * KEY_ROW);
    __syncthreads();

    // Two places for tiles: while one is worked on, the next one is on its way to the other.
    Softmax rows;
    rows.clear();
    int now = 0;
    for (int key_tile = seen; key_tile <= t; key_tile++, now = 1 - now) {
        Element *k = tiles.k(1 - now), *v = tiles.v(1 - now);
        if (key_tile < t) load_keys(keys, key_tile + 1, k, v);
        else if (sinks > 0) load_sinks(keys, sequence, sinks, k, v);
        commit();
        bool plain = keys.plain(key_tile);
        if (!plain && threadIdx.x < TILE)
            masked[now][threadIdx.x] = keys.valid(key_tile * TILE + threadIdx.x) ? 0.f : NEVER;
        arrived<1>();
        __syncthreads();
        float s[TILE / 8][4];
        zero(s);
        scores(s, q, tiles.k(now));
        hide(s, plain ? nullptr : masked[now], key_tile == t);
        rows.add(s, call.scale, tiles.v(now), tiles.scratch());
        __syncthreads();
    }

    // Place `now` is the sinks', the other one is free for half of what the features need.
    const int one = 1 - now;
    auto load_high = [&](int block) {
        load_block<D>(tiles.k(one), projection(call, kv, 0, block, 0));
    };
    auto load_low = [&](int block) {
        if (SPLIT) load_block<D>(tiles.k(now), projection(call, kv, 0, block, SPLIT));
    };
    auto load_before = [&](int block) {
        const Element *from = call.before + (before_at * M + block * TILE) * E;
        if (before) load_block<E>(tiles.v(one), from);
    };
    auto load_within = [&](int block) {
        const Element *from = call.within + (within_at * M + block * TILE) * E;
        if (within) load_block<E>(tiles.v(now), from);
    };
    if (far) load_high(0), load_before(0);
    commit();
    if (sinks > 0) {
        arrived<1>();
        __syncthreads();
        float s[SINKS / 8][4];
        zero(s);
        scores(s, q, tiles.k(now));
#pragma unroll
        for (int n = 0; n < SINKS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (8 * n + 2 * (lane % 4) + i % 2 >= sinks) s[n][i] = NEVER;
        rows.add(s, call.scale, tiles.v(now), tiles.scratch());
        __syncthreads();
    }
    if (far) {
        load_low(0), load_within(0);
        commit();
        float shift[2];
        for (int r = 0; r < 2; r++) {
            shift[r] = head.decay * ((t - begin) * TILE + row + 8 * r);
            if (call.envelope) shift[r] -= call.scale * norm[row + 8 * r];
        }
        for (int block = 0; block < M / TILE; block++) {
            arrived<0>();
            __syncthreads();
            float s[TILE / 8][4];
            zero(s);
            scores(s, q, tiles.k(one));
            if (SPLIT && large(s)) scores(s, q, tiles.k(now));
            add_rows(s, shift[0], shift[1]);
            bool more = block + 1 < M / TILE;
            if (more) {
                __syncthreads();
                load_high(block + 1), load_low(block + 1);
                commit();
            }
            if (before) {
                float w[TILE / 8][4];
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) w[n][i] = s[n][i];
                add_columns(w, level[0] + block * TILE);
                rows.add(w, 1.f, tiles.v(one), tiles.scratch());
            }
            if (within) {
                add_columns(s, level[1] + block * TILE);
                rows.add(s, 1.f, tiles.v(now), tiles.scratch());
            }
            if (more) {
                __syncthreads();
                load_before(block + 1), load_within(block + 1);
                commit();
            }
        }
    }

    // By way of shared memory, for whole lines of stores.
    __syncthreads();
    Element *out = tiles.k(0);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = whole(rows.total[2 * r]), inverse = total > 0.f ? 1.f / total : 0.f;
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            store2(out + (row + 8 * r) * VALUE_ROW + 8 * n + 2 * (lane % 4),
                   rows.o[n][2 * r] * inverse, rows.o[n][2 * r + 1] * inverse);
    }
    __syncthreads();
    store_block<E>(call.out + tile.row * E, out, [&](int r) { return tile.has(r); });
}
