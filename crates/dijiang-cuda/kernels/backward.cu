// Gradients of whole sequences. With g the gradient of the outputs, δ_i = g_i o_i, and W_i the log2
// of all weights of query i, as `outputs` leaves them, the gradient of an exponent is
//
//   2^(exponent - W_i) (g_i v - δ_i)      of query i with a key of value v, or a feature of mean v
//   2^(b_f(j) + W_f) (g_f v_j - δ_f)      of feature f of key j
//
// where g_f and δ_f are means of g_i and δ_i over the queries that find key j in the sums, query i
// having the weight 2^(a_f(i) - W_i), and W_f is the log2 of the sum of these weights. They are
// made as the sums of keys are, from the end of the sequence.

struct Back {
    Element *dq, *dk, *dv;
    // Of each segment's queries, then of those of all segments behind it: the sums (c, z, those of
    // g, those of δ).
    float *sums;              // [segments][kv_heads][M * (E + 3)]
    // What the keys that leave the window with a chunk find, as `Call` has it for queries.
    Element *means;
    float *mean_unit, *mean_level, *mean_delta;
    int versions;             // whether `gather` makes these, or the sums of segments
    int segments;             // of all sequences
    float shrink;             // log2 of what weights of keys are divided by: f16 ends at 65504
    float *sinks;             // [segments][4][kv_heads][SINKS][D + E]
    float *sink_totals;       // [sequences][kv_heads][SINKS][D + E]
    // For the gradients of the maps, else null: of log-features times q or k, and their sums.
    float *moments;           // [query, key][segments][kv_heads][M * (D + 1)]
    double *moment_totals;    // [query, key][kv_heads][M * (D + 1)]
    double *decays;           // [heads + kv_heads][tiles]
};

// Rows that stay, tiles that pass by, and the low part of projections and means.
struct Places {
    Element *shared;
    __device__ Element *rows_d() const { return shared; }
    __device__ Element *rows_e() const { return rows_d() + TILE * KEY_ROW; }
    __device__ Element *tile_d() const { return rows_e() + TILE * VALUE_ROW; }
    __device__ Element *tile_e() const { return tile_d() + TILE * KEY_ROW; }
    __device__ Element *low_d() const { return tile_e() + TILE * VALUE_ROW; }
    __device__ Element *low_e() const { return low_d() + SPLIT * TILE * KEY_ROW; }
    __device__ Element *scratch() const { return low_e() + SCALED * TILE * VALUE_ROW; }
};

// The smallest unit of weights.
#define FEW 0x1p-100f

// Weights that f16 has no digits for: a row's are counted in units of its largest, a power of two.
template <int N>
__device__ void raise(float (&o)[D / 8][4], float (&unit)[2], float (&s)[N][4]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = unit[r];
#pragma unroll
        for (int n = 0; n < N; n++)
            most = fmaxf(most, fmaxf(fabsf(s[n][2 * r]), fabsf(s[n][2 * r + 1])));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        most = __uint_as_float(__float_as_uint(most) & 0x7f800000u);
        float factor = unit[r] / most, inverse = 1.f / most;
        unit[r] = most;
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[n][2 * r] *= factor, o[n][2 * r + 1] *= factor;
#pragma unroll
        for (int n = 0; n < N; n++) s[n][2 * r] *= inverse, s[n][2 * r + 1] *= inverse;
    }
}

// Where a block of the grid's segments is.
struct Place {
    int i, segment, begin, end, last_tile;
    __device__ Place(const Call &call, int at_segment) {
        i = 0;
        while (i + 1 < call.count && at_segment >= call.sequences[i + 1].segment) i++;
        const Sequence &sequence = call.sequences[i];
        last_tile = (sequence.n - 1) / TILE;
        segment = at_segment - sequence.segment;
        begin = segment * call.segment_tiles;
        end = min(begin + call.segment_tiles - 1, last_tile);
    }
};

// The first tile whose queries find the keys of tile `j` in the sums.
__device__ int first_far(const Head &head, int j) {
    return (j / head.tiles + head.back + 1) * head.tiles;
}

template <int WIDTH>
__device__ void load_tile(const QueryTile &tile, const Element *from, Element *to) {
    from += tile.row * WIDTH;
    if (tile.plain()) return load_block<WIDTH>(to, from);
    load_rows<WIDTH, TILE>(
        to, [&](int r) -> const Element * { return tile.has(r) ? from + r * WIDTH : nullptr; });
}

// A tile of queries with what its outputs' gradients are, waited for.
__device__ void load_pass(const Call &call, const QueryTile &tile, const Places &at, float *totals,
                          float *deltas) {
    load_tile<D>(tile, call.q, at.tile_d());
    load_tile<E>(tile, call.grad_out, at.tile_e());
    commit();
    if (threadIdx.x < TILE) {
        bool has = tile.has(threadIdx.x);
        totals[threadIdx.x] = has ? call.log_total[tile.row + threadIdx.x] : EVER;
        deltas[threadIdx.x] = has ? call.delta[tile.row + threadIdx.x] : 0.f;
    }
    arrived<0>();
    __syncthreads();
}

// What the queries of a tile add to every feature's exponent; they are `offset` tokens and more
// from the beginning of their segment.
__device__ void query_exponents(const Call &call, const Head &head, int offset, const Element *q,
                                const float *totals, float *to) {
    if (threadIdx.x < TILE) {
        float exponent = head.decay * (offset + (int)threadIdx.x) - totals[threadIdx.x];
        if (call.envelope) exponent -= call.scale * half_norm(q, threadIdx.x);
        to[threadIdx.x] = exponent;
    }
    __syncthreads();
}

// A block of 64 features of a side's projection.
__device__ void load_projection(const Call &call, int kv, int side, int block, Element *high,
                                Element *low) {
    load_block<D>(high, projection(call, kv, side, block, 0));
    if (SPLIT) load_block<D>(low, projection(call, kv, side, block, SPLIT));
}
__device__ void load_means(const Element *means, long version, int block, Element *to) {
    load_block<E>(to, means + (version * M + block * TILE) * E);
}
// Means in f16 that have arrived become the sum of two in bf16. All threads leave together.
__device__ void split_means(const float *units, long version, int block, Element *high,
                            Element *low) {
#if SCALED
    float unit = units[version * (M / TILE) + block];
    for (int i = threadIdx.x; i < TILE * E / 2; i += THREADS) {
        int at = i / (E / 2) * VALUE_ROW + i % (E / 2) * 2;
        u32 both = *(const u32 *)(high + at);
        float x = low_half(both) * unit, y = high_half(both) * unit;
        u32 rounded = pack2(x, y);
        *(u32 *)(high + at) = rounded;
        *(u32 *)(low + at) = pack2(x - low_of(rounded), y - high_of(rounded));
    }
    __syncthreads();
#endif
}

template <int N> __device__ void times(float (&s)[N][4], float factor) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] *= factor;
}

// Exponents scale * s to weights.
template <int N> __device__ void weights(float (&s)[N][4], float scale) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = exp2f_fast(scale * s[n][i]);
}

// Weights to gradients of exponents: times what `products` are above a number of the row.
template <int N>
__device__ void above_rows(float (&s)[N][4], const float (&products)[N][4],
                           const float (&rows)[2]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] *= products[n][i] - rows[i / 2];
}

// The same with a number of the column.
template <int N>
__device__ void above_columns(float (&s)[N][4], const float (&products)[N][4],
                              const float *columns) {
    const float *own = columns + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] *= products[n][i] - own[8 * n + i % 2];
}

// Takes a number of the column from scores that are to be multiplied by `scale`.
template <int N>
__device__ void below_columns(float (&s)[N][4], float scale, const float *columns) {
    const float *own = columns + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][i] = fmaf(s[n][i], scale, -own[8 * n + i % 2]);
}

// Adds to a lane's share of the sums of its two rows.
template <int N> __device__ void add_sums(float (&rows)[2], const float (&s)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i / 2] += s[n][i];
}

// The sum over a tile's rows of their position times a number, of which lanes hold shares.
__device__ void store_decay(int first, const float (&rows)[2], double *to) {
    __shared__ double sums[TILE];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int r = 0; r < 2; r++) {
        float sum = of_row(rows[r]);
        if (lane % 4 == 0) sums[row + 8 * r] = (double)sum * (first + row + 8 * r);
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    double sum = 0.;
    for (int r = 0; r < TILE; r++) sum += sums[r];
    *to = sum;
}

// ---- what the queries behind a key leave for it ----

// One segment, one key-value head, 64 features: the sums over its queries; or, once the scan has
// made them those of all segments behind, the means from each of its chunks on.
extern "C" __global__ void __launch_bounds__(THREADS, 2) gather(const Call call, const Back back) {
    SHARED(shared);
    __shared__ float totals[TILE], deltas[TILE], exponents[TILE];
    const Places at{shared};
    int kv = blockIdx.y, block = blockIdx.x % (M / TILE), at_segment = blockIdx.x / (M / TILE);
    const Place place(call, at_segment);
    const Sequence &sequence = call.sequences[place.i];
    const Head head = call.heads[kv];
    // Nobody asks for what is before the first segment.
    if (!back.versions && place.segment == 0) return;

    load_projection(call, kv, 0, block, at.rows_d(), at.low_d());
    SharedRows<D> high, low;
    high.load(at.rows_d());
    if (SPLIT) low.load(at.low_d());
    int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    int column = 2 * (threadIdx.x % 4);
    float *of_segment = back.sums + ((long)at_segment * call.kv_heads + kv) * M * (E + 3);
    Softmax sums;
    sums.clear();
    float row[2], delta[2] = {0.f, 0.f};
    for (int r = 0; r < 2; r++) {
        int g = f + 8 * r;
        row[r] = call.rows[kv * 2 * M + g];
        // Nothing is behind a sequence's last segment.
        if (!back.versions || place.end == place.last_tile) continue;
        sums.resume(r, of_segment[g], of_segment[M + g], of_segment + 2 * M + g * E);
        if (column == 0) delta[r] = of_segment[M * (E + 2) + g];
    }
    for (int t = place.end; t >= place.begin && first_seen(head, t) > 0; t--) {
        for (int g = 0; g < call.group; g++) {
            const QueryTile tile(call, sequence, kv * call.group + g, t);
            __syncthreads();
            load_pass(call, tile, at, totals, deltas);
            int offset = (t - place.begin) * TILE;
            query_exponents(call, head, offset, at.tile_d(), totals, exponents);
            float s[TILE / 8][4];
            zero(s);
            scores(s, high, at.tile_d());
            if (SPLIT) scores(s, low, at.tile_d());
            add_columns(s, exponents);
            float top[2] = {sums.top[0], sums.top[1]};
            sums.add(s, 1.f, row, at.tile_e(), at.scratch());
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float frame = sums.top[r] == NEVER ? 0.f : sums.top[r];
                delta[r] *= exp2f_fast(top[r] - frame);
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        delta[r] += wide(narrow(s[n][2 * r + i])) * deltas[8 * n + column + i];
            }
        }
        if (!back.versions || t % head.tiles != 0) continue;
        float total[2] = {whole(sums.total[0]), whole(sums.total[2])};
        long version = version_of(call, head, sequence, t, kv);
        for (int r = 0; r < 2; r++) {
            float sum = of_row(delta[r]);
            if (column > 0) continue;
            bool any = total[r] > 0.f;
            float level = any ? sums.top[r] + log2f(total[r]) : NEVER;
            back.mean_level[version * M + f + 8 * r] = level;
            back.mean_delta[version * M + f + 8 * r] = any ? sum / total[r] : 0.f;
        }
        // Other tiles come only after threads have met again.
        __syncthreads();
        store_means(sums, total, back.means, back.mean_unit, version, block, at.tile_e());
    }
    if (back.versions) return;
    for (int r = 0; r < 2; r++) {
        int g = f + 8 * r;
        float total = whole(sums.total[2 * r]), sum = of_row(delta[r]);
        if (column == 0) {
            of_segment[g] = sums.top[r], of_segment[M + g] = total;
            of_segment[M * (E + 2) + g] = sum;
        }
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            *(float2 *)(of_segment + 2 * M + g * E + 8 * n + column) =
                make_float2(sums.o[n][2 * r], sums.o[n][2 * r + 1]);
    }
}

extern "C" __global__ void __launch_bounds__(256) scan_back(const Call call, const Back back) {
    scan_segments<true>(call, back.sums);
}

// ---- gradients of q, k and v ----

// A tile of 64 queries.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    query_gradients(const Call call, const Back back) {
    SHARED(shared);
    __shared__ float masked[TILE], level[M], norm[TILE];
    const Places at{shared};
    int h = blockIdx.y, kv = h / call.group, i = 0;
    while (i + 1 < call.count && (int)blockIdx.x >= call.sequences[i + 1].tile) i++;
    const Sequence &sequence = call.sequences[i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    int t = blockIdx.x - sequence.tile, seen = first_seen(head, t);
    const QueryTile tile(call, sequence, h, t);
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    long version = version_of(call, head, sequence, t, kv);
    bool far = seen > 0;

    load_tile<D>(tile, call.q, at.rows_d());
    load_tile<E>(tile, call.grad_out, at.rows_e());
    commit();
    for (int f = threadIdx.x; far && f < M; f += THREADS)
        level[f] = call.rows[kv * 2 * M + f] + call.mean_level[version * M + f];
    float total[2], delta[2];
    for (int r = 0; r < 2; r++) {
        bool has = tile.has(row + 8 * r);
        total[r] = has ? call.log_total[tile.row + row + 8 * r] : EVER;
        delta[r] = has ? call.delta[tile.row + row + 8 * r] : 0.f;
    }
    int sinks = 0;
    while (sinks < sequence.sinks && sequence.sink[sinks] < seen * TILE) sinks++;
    arrived<0>();
    __syncthreads();
    if (call.envelope && threadIdx.x < TILE)
        norm[threadIdx.x] = half_norm(at.rows_d(), threadIdx.x);
    SharedRows<D> q;
    q.load(at.rows_d());
    SharedRows<E> g;
    g.load(at.rows_e());

    float dq[D / 8][4], features[2] = {0.f, 0.f}, unused[4];
    zero(dq);
    for (int key_tile = seen; key_tile <= t; key_tile++) {
        __syncthreads();
        load_keys(keys, key_tile, at.tile_d(), at.tile_e());
        commit();
        bool plain = keys.plain(key_tile);
        if (!plain && threadIdx.x < TILE)
            masked[threadIdx.x] = keys.valid(key_tile * TILE + threadIdx.x) ? 0.f : NEVER;
        arrived<0>();
        __syncthreads();
        float s[TILE / 8][4], products[TILE / 8][4];
        zero(s), zero(products);
        scores(s, q, at.tile_d());
        scores(products, g, at.tile_e());
        hide(s, plain ? nullptr : masked, key_tile == t);
        times(s, call.scale);
        add_rows(s, -total[0], -total[1]);
        weights(s, 1.f);
        above_rows(s, products, delta);
        mix<false>(dq, unused, s, at.tile_d(), at.scratch());
    }
    if (sinks > 0) {
        __syncthreads();
        load_sinks(keys, sequence, sinks, at.tile_d(), at.tile_e());
        commit();
        arrived<0>();
        __syncthreads();
        float s[SINKS / 8][4], products[SINKS / 8][4];
        zero(s), zero(products);
        scores(s, q, at.tile_d());
        scores(products, g, at.tile_e());
        hide_columns(s, sinks);
        times(s, call.scale);
        add_rows(s, -total[0], -total[1]);
        weights(s, 1.f);
        above_rows(s, products, delta);
        mix<false>(dq, unused, s, at.tile_d(), at.scratch());
    }
    times(dq, call.scale);
    if (far) {
        float shift[2];
        for (int r = 0; r < 2; r++) {
            shift[r] = head.decay * (t % call.segment_tiles * TILE + row + 8 * r) - total[r];
            if (call.envelope) shift[r] -= call.scale * norm[row + 8 * r];
        }
        for (int block = 0; block < M / TILE; block++) {
            __syncthreads();
            load_projection(call, kv, 0, block, at.tile_d(), at.low_d());
            load_means(call.means, version, block, at.tile_e());
            commit();
            arrived<0>();
            __syncthreads();
            split_means(call.mean_unit, version, block, at.tile_e(), at.low_e());
            float s[TILE / 8][4], products[TILE / 8][4];
            zero(s), zero(products);
            scores(s, q, at.tile_d());
            if (SPLIT) scores(s, q, at.low_d());
            scores(products, g, at.tile_e());
            if (SCALED) scores(products, g, at.low_e());
            add_rows(s, shift[0], shift[1]);
            add_columns(s, level + block * TILE);
            weights(s, 1.f);
            above_rows(s, products, delta);
            add_sums(features, s);
            mix<false>(dq, unused, s, at.tile_d(), at.scratch());
        }
    }

    __syncthreads();
    Element *stage = at.tile_d();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float envelope = call.envelope ? call.scale * of_row(features[r]) : 0.f;
        const Element *own = at.rows_d() + (row + 8 * r) * KEY_ROW + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            store2(stage + (row + 8 * r) * KEY_ROW + 8 * n + 2 * (lane % 4),
                   (dq[n][2 * r] - envelope * wide(own[8 * n])) / LOG2E,
                   (dq[n][2 * r + 1] - envelope * wide(own[8 * n + 1])) / LOG2E);
    }
    __syncthreads();
    store_block<D>(back.dq + tile.row * D, stage, [&](int r) { return tile.has(r); });
    if (back.decays) store_decay(t * TILE, features, back.decays + h * gridDim.x + blockIdx.x);
}

// Sinks that have left the window: one segment's queries, a share for each warp.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sink_gradients(const Call call, const Back back) {
    SHARED(shared);
    __shared__ float totals[TILE], deltas[TILE];
    const Places at{shared};
    int kv = blockIdx.y, at_segment = blockIdx.x;
    const Place place(call, at_segment);
    const Sequence &sequence = call.sequences[place.i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    load_sinks(keys, sequence, sequence.sinks, at.rows_d(), at.rows_e());
    commit();
    SharedRows<D> k;
    k.load(at.rows_d(), 0);
    SharedRows<E> v;
    v.load(at.rows_e(), 0);
    int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
    float dk[D / 8][4], dv[E / 8][4], unused[4];
    zero(dk), zero(dv);
    for (int t = place.begin; t <= place.end; t++) {
        int seen = first_seen(head, t), sinks = 0;
        while (sinks < sequence.sinks && sequence.sink[sinks] < seen * TILE) sinks++;
        for (int g = 0; sinks > 0 && g < call.group; g++) {
            __syncthreads();
            const QueryTile tile(call, sequence, kv * call.group + g, t);
            load_pass(call, tile, at, totals, deltas);
            const Element *queries = at.tile_d() + warp * 16 * KEY_ROW;
            const Element *grads = at.tile_e() + warp * 16 * VALUE_ROW;
            float s[2][4], products[2][4];
            zero(s), zero(products);
            scores(s, k, queries);
            scores(products, v, grads);
            below_columns(s, call.scale, totals + warp * 16);
            add_rows(s, row < sinks ? 0.f : NEVER, row + 8 < sinks ? 0.f : NEVER);
            weights(s, 1.f);
            mix<false>(dv, unused, s, grads, at.scratch());
            above_columns(s, products, deltas + warp * 16);
            mix<false>(dk, unused, s, queries, at.scratch());
        }
    }
    float *to = back.sinks +
                (((long)at_segment * 4 + warp) * call.kv_heads + kv) * SINKS * (D + E);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float *own = to + (row + 8 * r) * (D + E) + column;
        float scale = call.scale / LOG2E;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            own[8 * n] = scale * dk[n][2 * r], own[8 * n + 1] = scale * dk[n][2 * r + 1];
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            own[D + 8 * n] = dv[n][2 * r], own[D + 8 * n + 1] = dv[n][2 * r + 1];
    }
}

// Over the segments of a sequence.
extern "C" __global__ void __launch_bounds__(256) sink_totals(const Call call, const Back back) {
    int kv = blockIdx.y, i = blockIdx.z, element = blockIdx.x * 256 + threadIdx.x;
    const int size = SINKS * (D + E);
    const Sequence &sequence = call.sequences[i];
    int segments = (sequence.n - 1) / TILE / call.segment_tiles + 1;
    const float *from = back.sinks + ((long)sequence.segment * 4 * call.kv_heads + kv) * size;
    double sum = 0.;
#pragma unroll 8
    for (int part = 0; part < 4 * segments; part++)
        sum += from[(long)part * call.kv_heads * size + element];
    back.sink_totals[((long)i * call.kv_heads + kv) * size + element] = sum;
}

// A tile of 64 keys.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    key_gradients(const Call call, const Back back) {
    SHARED(shared);
    __shared__ float totals[TILE], deltas[TILE], exponents[TILE], level[M], mean_delta[M];
    const Places at{shared};
    int kv = blockIdx.y, i = 0;
    while (i + 1 < call.count && (int)blockIdx.x >= call.sequences[i + 1].tile) i++;
    const Sequence &sequence = call.sequences[i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    int j = blockIdx.x - sequence.tile, last_tile = (sequence.n - 1) / TILE;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    int from = first_far(head, j);
    bool far = from <= last_tile;
    long version = far ? version_of(call, head, sequence, from, kv) : 0;

    load_keys(keys, j, at.rows_d(), at.rows_e());
    commit();
    for (int f = threadIdx.x; far && f < M; f += THREADS) {
        float constant = call.rows[(kv * 2 + 1) * M + f] - back.shrink;
        level[f] = constant + back.mean_level[version * M + f];
        mean_delta[f] = back.mean_delta[version * M + f];
    }
    SharedRows<D> k;
    k.load(at.rows_d());
    SharedRows<E> v;
    v.load(at.rows_e());
    float dk[D / 8][4], dv[E / 8][4], features[2] = {0.f, 0.f}, unused[4];
    zero(dk), zero(dv);
    for (int t = j; t <= min(from - 1, last_tile); t++)
        for (int g = 0; g < call.group; g++) {
            const QueryTile tile(call, sequence, kv * call.group + g, t);
            __syncthreads();
            load_pass(call, tile, at, totals, deltas);
            float s[TILE / 8][4], products[TILE / 8][4];
            zero(s);
            scores(s, k, at.tile_d());
            below_columns(s, call.scale, totals);
            // Queries before the key.
#pragma unroll
            for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                for (int x = 0; x < 4; x++)
                    if (t == j && 8 * n + 2 * (lane % 4) + x % 2 < row + x / 2 * 8) s[n][x] = NEVER;
            weights(s, 1.f);
            mix<false>(dv, unused, s, at.tile_e(), at.scratch());
            zero(products);
            scores(products, v, at.tile_e());
            above_columns(s, products, deltas);
            mix<false>(dk, unused, s, at.tile_d(), at.scratch());
        }
    times(dk, call.scale);
    if (far) {
        float shrink = exp2f(-back.shrink), own[2] = {0.f, 0.f};
        times(dk, shrink), times(dv, shrink);
        int base = from / call.segment_tiles * call.segment_tiles * TILE;
        arrived<0>();
        __syncthreads();
        if (key_exponents(call, head, sequence, keys, j, base, at.rows_d(), exponents))
            own[0] = exponents[row], own[1] = exponents[row + 8];
        for (int block = 0; block < M / TILE; block++) {
            __syncthreads();
            load_projection(call, kv, 1, block, at.tile_d(), at.low_d());
            load_means(back.means, version, block, at.tile_e());
            commit();
            arrived<0>();
            __syncthreads();
            split_means(back.mean_unit, version, block, at.tile_e(), at.low_e());
            float s[TILE / 8][4], products[TILE / 8][4];
            zero(s);
            scores(s, k, at.tile_d());
            if (SPLIT) scores(s, k, at.low_d());
            add_rows(s, own[0], own[1]);
            add_columns(s, level + block * TILE);
            weights(s, 1.f);
            mix<false>(dv, unused, s, at.tile_e(), at.scratch());
            if (SCALED) mix<false>(dv, unused, s, at.low_e(), at.scratch());
            zero(products);
            scores(products, v, at.tile_e());
            if (SCALED) scores(products, v, at.low_e());
            above_columns(s, products, mean_delta + block * TILE);
            add_sums(features, s);
            mix<false>(dk, unused, s, at.tile_d(), at.scratch());
        }
        times(dk, 1.f / shrink), times(dv, 1.f / shrink);
        features[0] /= shrink, features[1] /= shrink;
    }

    __syncthreads();
    const float *of_sinks = back.sink_totals + ((long)i * call.kv_heads + kv) * SINKS * (D + E);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int p = j * TILE + row + 8 * r, sink = 0;
        while (sink < sequence.sinks && sequence.sink[sink] != p) sink++;
        bool is = sink < sequence.sinks, valid = keys.valid(p);
        const float *more = of_sinks + sink * (D + E) + 2 * (lane % 4);
        float envelope = call.envelope ? call.scale * of_row(features[r]) : 0.f;
        Element *own = at.rows_d() + (row + 8 * r) * KEY_ROW + 2 * (lane % 4);
        Element *value = at.rows_e() + (row + 8 * r) * VALUE_ROW + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float x = (dk[n][2 * r] - envelope * wide(own[8 * n])) / LOG2E;
            float y = (dk[n][2 * r + 1] - envelope * wide(own[8 * n + 1])) / LOG2E;
            if (is) x += more[8 * n], y += more[8 * n + 1];
            store2(own + 8 * n, valid ? x : 0.f, valid ? y : 0.f);
        }
#pragma unroll
        for (int n = 0; n < E / 8; n++) {
            float x = dv[n][2 * r], y = dv[n][2 * r + 1];
            if (is) x += more[D + 8 * n], y += more[D + 8 * n + 1];
            store2(value + 8 * n, valid ? x : 0.f, valid ? y : 0.f);
        }
    }
    __syncthreads();
    long first = (long)kv * call.tokens + sequence.token + j * TILE;
    auto has = [&](int r) { return j * TILE + r < sequence.n; };
    store_block<D>(back.dk + first * D, at.rows_d(), has);
    store_block<E>(back.dv + first * E, at.rows_e(), has);
    int tiles = gridDim.x;
    long decay_at = (long)(call.kv_heads * call.group + kv) * tiles + blockIdx.x;
    if (back.decays) store_decay(j * TILE, features, back.decays + decay_at);
}

// ---- gradients of the maps ----

// One segment, one key-value head, 64 features, queries or keys: gradients of log-features times
// the tokens they are of, and without.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    moments(const Call call, const Back back) {
    SHARED(shared);
    __shared__ float totals[TILE], deltas[TILE], exponents[TILE];
    const Places at{shared};
    int kv = blockIdx.y, side = blockIdx.z;
    int block = blockIdx.x % (M / TILE), at_segment = blockIdx.x / (M / TILE);
    const Place place(call, at_segment);
    const Sequence &sequence = call.sequences[place.i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    load_projection(call, kv, side, block, at.rows_d(), at.low_d());
    SharedRows<D> high, low;
    high.load(at.rows_d());
    if (SPLIT) low.load(at.low_d());
    SharedRows<E> mean, mean_low;
    mean.load(at.rows_e());
    if (SCALED) mean_low.load(at.low_e());
    int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    float o[D / 8][4], sum[2] = {0.f, 0.f}, level[2], delta[2], unused[4];
    float unit[2] = {FEW, FEW};
    zero(o);
    long version = -1;
    for (int t = place.begin; t <= place.end; t++) {
        int from = side == 0 ? t : first_far(head, t);
        if (side == 0 ? first_seen(head, t) == 0 : from > place.last_tile) continue;
        long found = version_of(call, head, sequence, from, kv);
        if (found != version) {
            version = found;
            __syncthreads();
            const Element *means = side == 0 ? call.means : back.means;
            load_means(means, version, block, at.rows_e());
            commit();
            arrived<0>();
            __syncthreads();
            const float *units = side == 0 ? call.mean_unit : back.mean_unit;
            split_means(units, version, block, at.rows_e(), at.low_e());
            for (int r = 0; r < 2; r++) {
                int g = f + 8 * r;
                level[r] = call.rows[(kv * 2 + side) * M + g];
                level[r] += (side == 0 ? call.mean_level : back.mean_level)[version * M + g];
                if (side == 1) level[r] -= back.shrink;
                delta[r] = side == 0 ? 0.f : back.mean_delta[version * M + g];
            }
        }
        for (int g = 0; g < (side == 0 ? call.group : 1); g++) {
            __syncthreads();
            bool any = true;
            if (side == 0) {
                const QueryTile tile(call, sequence, kv * call.group + g, t);
                load_pass(call, tile, at, totals, deltas);
                int offset = (t - place.begin) * TILE;
                query_exponents(call, head, offset, at.tile_d(), totals, exponents);
            } else {
                load_keys(keys, t, at.tile_d(), at.tile_e());
                commit();
                arrived<0>();
                __syncthreads();
                int base = from / call.segment_tiles * call.segment_tiles * TILE;
                any = key_exponents(call, head, sequence, keys, t, base, at.tile_d(), exponents);
            }
            float s[TILE / 8][4], products[TILE / 8][4];
            zero(s), zero(products);
            scores(s, high, at.tile_d());
            if (SPLIT) scores(s, low, at.tile_d());
            add_rows(s, level[0], level[1]);
            if (any) add_columns(s, exponents);
            weights(s, 1.f);
            scores(products, mean, at.tile_e());
            if (SCALED) scores(products, mean_low, at.tile_e());
            if (side == 0) above_columns(s, products, deltas);
            else above_rows(s, products, delta);
            add_sums(sum, s);
            if (ELEMENT == 1) raise(o, unit, s);
            mix<false>(o, unused, s, at.tile_d(), at.scratch());
        }
    }
    float factor = side == 0 ? 1.f : exp2f(back.shrink);
    float *to = back.moments +
                (((long)side * back.segments + at_segment) * call.kv_heads + kv) * M * (D + 1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = of_row(sum[r]) * factor;
        if (threadIdx.x % 4 == 0) to[M * D + f + 8 * r] = total;
        float scale = ELEMENT == 1 ? factor * unit[r] : factor;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(to + (f + 8 * r) * D + 8 * n + 2 * (threadIdx.x % 4)) =
                make_float2(o[n][2 * r] * scale, o[n][2 * r + 1] * scale);
    }
}

// Over all segments.
extern "C" __global__ void __launch_bounds__(256)
    moment_totals(const Call call, const Back back) {
    int element = blockIdx.x * 256 + threadIdx.x, kv = blockIdx.y, side = blockIdx.z;
    const int size = M * (D + 1);
    if (element >= size) return;
    const float *from = back.moments + ((long)side * back.segments * call.kv_heads + kv) * size;
    double sum = 0.;
#pragma unroll 8
    for (int i = 0; i < back.segments; i++) sum += from[(long)i * call.kv_heads * size + element];
    back.moment_totals[((long)side * call.kv_heads + kv) * size + element] = sum;
}
