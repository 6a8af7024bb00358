// A tile of 64 queries: over its window, the sinks, and the sums of everything older.

extern "C" __global__ void __launch_bounds__(THREADS) outputs(const Call call) {
    extern __shared__ __align__(16) Element shared[];
    __shared__ float level[2][TILE], norm[TILE];
    Element *k[2] = {shared, shared + TILE * KEY_ROW};
    Element *v[2] = {shared + 2 * TILE * KEY_ROW, shared + 2 * TILE * KEY_ROW + TILE * VALUE_ROW};
    Element *scratch = v[1] + TILE * VALUE_ROW, *own = scratch + SCRATCH;
    int h = blockIdx.y, kv = h / call.group, i = 0;
    while (i + 1 < call.count && (int)blockIdx.x >= call.sequences[i + 1].tile) i++;
    const Sequence &sequence = call.sequences[i];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    int first_tile = sequence.position / TILE, t = first_tile + blockIdx.x - sequence.tile;
    int seen = first_seen(head, t);
    long row0 = (long)h * call.tokens + sequence.token + (long)t * TILE - sequence.position;
    bool masked = call.mask || sequence.position > 0;
    int lane = threadIdx.x % 32, column = 2 * (lane % 4);
    int row = threadIdx.x / 32 * 16 + lane / 4;

    load_rows<D, TILE>(own, [&](int r) {
        int p = t * TILE + r;
        return p >= sequence.position && keys.has(p) ? call.q + (row0 + r) * D : nullptr;
    });
    load_keys(keys, seen, k[0], v[0]);
    commit();
    Rows q;
    Softmax rows;
    rows.clear();
    for (int tile = seen; tile <= t; tile++) {
        int now = (tile - seen) % 2;
        if (tile < t) load_keys(keys, tile + 1, k[1 - now], v[1 - now]);
        commit();
        arrived<1>();
        if (masked && threadIdx.x < TILE)
            level[now][threadIdx.x] = keys.valid(tile * TILE + threadIdx.x) ? 0.f : NEVER;
        __syncthreads();
        if (tile == seen) q.load(own);
        float s[TILE / 8][4];
        zero(s);
        scores(s, q, k[now]);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = 8 * n + column + i % 2;
                s[n][i] *= call.scale;
                if (masked) s[n][i] += level[now][key];
                if (tile == t && key > row + i / 2 * 8) s[n][i] = NEVER;
            }
        rows.weigh(s);
        mix(rows.o, s, v[now], scratch);
        __syncthreads();
    }

    int sinks = 0;
    while (sinks < sequence.sinks && sequence.sink[sinks] < seen * TILE) sinks++;
    if (sinks > 0) {
        load_rows<D, SINKS>(k[0], [&](int r) -> const Element * {
            if (r >= sinks) return nullptr;
            int p = sequence.sink[r];
            return p < sequence.position ? keys.state.sink_k + r * D : keys.key(p);
        });
        load_rows<E, SINKS>(v[0], [&](int r) -> const Element * {
            if (r >= sinks) return nullptr;
            int p = sequence.sink[r];
            return p < sequence.position ? keys.state.sink_v + r * E : keys.value(p);
        });
        commit();
        arrived<0>();
        __syncthreads();
        float s[SINKS / 8][4];
        zero(s);
        scores(s, q, k[0]);
#pragma unroll
        for (int n = 0; n < SINKS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[n][i] = 8 * n + column + i % 2 < sinks ? s[n][i] * call.scale : NEVER;
        rows.weigh(s);
        mix(rows.o, s, v[0], scratch);
        __syncthreads();
    }

    // The sums: up to the segment, and within it up to the window.
    int segment = (t - first_tile) / call.segment_tiles;
    int begin = first_tile + segment * call.segment_tiles;
    int first = segment == 0 ? first_kept(head, sequence.position) : first_seen(head, begin);
    bool before = segment > 0 || sequence.slot >= 0;
    bool within = seen > first;
    if (before || within) {
        if (call.envelope && threadIdx.x < TILE)
            norm[threadIdx.x] = half_norm(own + threadIdx.x * KEY_ROW);
        long head_at = (long)(sequence.segment + segment) * call.kv_heads + kv;
        int version = t / head.tiles - begin / head.tiles;
        long within_at = ((long)(sequence.segment + segment) * call.segment_tiles + version) *
                             call.kv_heads + kv;
        for (int block = 0; block < M / TILE; block++) {
            load_block<D>(k[0], projection(call, kv, 0, block, 0));
            if (SPLIT) load_block<D>(k[1], projection(call, kv, 0, block, SPLIT));
            if (before) load_block<E>(v[0], call.before + (head_at * M + block * TILE) * E);
            if (within) load_block<E>(v[1], call.within + (within_at * M + block * TILE) * E);
            commit();
            if (threadIdx.x < TILE) {
                int f = block * TILE + threadIdx.x;
                float c = call.rows[kv * 2 * M + f];
                level[0][threadIdx.x] = before ? c + call.before_level[head_at * M + f] : NEVER;
                level[1][threadIdx.x] = within ? c + call.within_level[within_at * M + f] : NEVER;
            }
            arrived<0>();
            __syncthreads();
            float s[TILE / 8][4];
            zero(s);
            scores(s, q, k[0]);
            if (SPLIT) scores(s, q, k[1]);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float shift = head.decay * ((t - begin) * TILE + row + 8 * r);
                if (call.envelope) shift -= call.scale * norm[row + 8 * r];
#pragma unroll
                for (int n = 0; n < TILE / 8; n++) s[n][2 * r] += shift, s[n][2 * r + 1] += shift;
            }
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (!(part == 0 ? before : within)) continue;
                float w[TILE / 8][4];
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        w[n][i] = s[n][i] + level[part][8 * n + column + i % 2];
                rows.weigh(w);
                mix(rows.o, w, v[part], scratch);
            }
            __syncthreads();
        }
    }

    rows.add_up();
    // By way of shared memory, for whole lines of stores.
    Element *tile = k[0];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float inverse = rows.total[r] > 0.f ? 1.f / rows.total[r] : 0.f;
#pragma unroll
        for (int n = 0; n < E / 8; n++)
            store2(tile + (row + 8 * r) * VALUE_ROW + 8 * n + column, rows.o[n][2 * r] * inverse,
                   rows.o[n][2 * r + 1] * inverse);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * (E / PACK); i += THREADS) {
        int r = i / (E / PACK), p = t * TILE + r, at = i % (E / PACK) * PACK;
        if (p >= sequence.position && keys.has(p))
            *(float4 *)(call.out + (row0 + r) * E + at) = *(const float4 *)(tile + r * VALUE_ROW + at);
    }
}
