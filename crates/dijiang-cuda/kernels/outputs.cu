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

// Scores of columns that stand for nothing.
template <int N> __device__ void hide_columns(float (&s)[N][4], int columns) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (8 * n + 2 * (threadIdx.x % 4) + i % 2 >= columns) s[n][i] = NEVER;
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

#ifndef BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) outputs(const Call call) {
    SHARED(shared);
    __shared__ float masked[2][TILE], level[M], norm[TILE], unit[M / TILE];
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

    int begin = t - (t - first_tile) % call.segment_tiles;
    long version = version_of(call, head, sequence, t, kv);
    bool far = any_before(sequence, seen);
    for (int f = threadIdx.x; far && f < M; f += THREADS)
        level[f] = call.rows[kv * 2 * M + f] + call.mean_level[version * M + f];
    if (SCALED && far && threadIdx.x < M / TILE)
        unit[threadIdx.x] = call.mean_unit[version * (M / TILE) + threadIdx.x];
    int sinks = 0;
    while (sinks < sequence.sinks && sequence.sink[sinks] < seen * TILE) sinks++;

    arrived<0>();
    __syncthreads();
    Rows<D> q;
    q.load(queries);
    if (call.envelope && threadIdx.x < TILE)
        norm[threadIdx.x] = half_norm(queries, threadIdx.x);
    __syncthreads();

    // Two places for tiles: while one is worked on, the next one is on its way to the other.
    Softmax rows;
    rows.clear();
    const float none[2] = {0.f, 0.f};
    int now = 0;
#if WINDOWLESS
    {
        float s[TILE / 8][4], tops[2];
        bool any = key_exponents(call, head, sequence, keys, t, t * TILE, tiles.k(0), masked[0]);
        own_scores(s, tops, q, call, kv, tiles, any ? masked[0] : nullptr);
        for (int r = 0; r < 2; r++) {
            tops[r] += head.decay * (row + 8 * r);
            if (call.envelope) tops[r] -= call.scale * norm[row + 8 * r];
        }
        hide(s, nullptr, true);
        rows.add(s, 1.f, tops, tiles.v(0), tiles.scratch());
        __syncthreads();
    }
#else
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
        all_scores(s, q, tiles.k(now));
        hide(s, plain ? nullptr : masked[now], key_tile == t);
        rows.add(s, call.scale, none, tiles.v(now), tiles.scratch());
        __syncthreads();
    }
#endif

    // Place `now` is the sinks', the other one is free for the first features.
    auto load_features = [&](int block, int to) {
        load_block<D>(tiles.k(to), projection(call, kv, 0, block, 0));
        load_block<E>(tiles.v(to), call.means + (version * M + block * TILE) * E);
    };
    if (far) load_features(0, 1 - now);
    commit();
    if (sinks > 0) {
        arrived<1>();
        __syncthreads();
        float s[SINKS / 8][4];
        zero(s);
        scores(s, q, tiles.k(now));
        hide_columns(s, sinks);
        rows.add(s, call.scale, none, tiles.v(now), tiles.scratch());
        __syncthreads();
    }
    if (far) {
        float shift[2];
        for (int r = 0; r < 2; r++) {
            shift[r] = head.decay * ((t - begin) * TILE + row + 8 * r);
            if (call.envelope) shift[r] -= call.scale * norm[row + 8 * r];
        }
        for (int block = 0; block < M / TILE; block++) {
            now = 1 - now;
            if (block > 0) __syncthreads();
            if (block + 1 < M / TILE) load_features(block + 1, 1 - now);
            commit();
            arrived<1>();
            __syncthreads();
            float s[TILE / 8][4];
            all_scores(s, q, tiles.k(now));
            // Seldom needed, so it is not on its way already.
            if (SPLIT && __syncthreads_or(large(s))) {
                load_block<D>(tiles.k(now), projection(call, kv, 0, block, SPLIT));
                commit();
                arrived<0>();
                __syncthreads();
                scores(s, q, tiles.k(now));
            }
            add_columns(s, level + block * TILE);
            rows.add<true>(s, 1.f, shift, tiles.v(now), tiles.scratch(),
                           SCALED ? unit[block] : 1.f);
        }
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = whole(rows.total[2 * r]);
        inverse[r] = total > 0.f ? rows.unit * reciprocal(total) : 0.f;
        if (!call.grad_out || !tile.has(row + 8 * r)) continue;
        long at = tile.row + row + 8 * r;
        const Element *grad = call.grad_out + at * E + 2 * (lane % 4);
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            sum += rows.o[n][2 * r] * wide(grad[8 * n]) +
                   rows.o[n][2 * r + 1] * wide(grad[8 * n + 1]);
        sum = of_row(sum);
        if (lane % 4 == 0) {
            call.log_total[at] = total > 0.f ? rows.top[r] + log2f(total) : EVER;
            call.delta[at] = sum * inverse[r];
        }
    }
    if (!call.out) return;
    // By way of shared memory, for whole lines of stores.
    __syncthreads();
    Element *out = tiles.k(0);
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            store2(out + place<E>(row + 8 * r, 8 * n + 2 * (lane % 4)),
                   rows.o[n][2 * r] * inverse[r], rows.o[n][2 * r + 1] * inverse[r]);
    }
    __syncthreads();
    Element *to = call.out + tile.row * E;
    if (tile.plain()) store_block<E>(to, out, [](int) { return true; });
    else store_block<E>(to, out, [&](int r) { return tile.has(r); });
}
#endif
