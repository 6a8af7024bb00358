// The next token of many streams: one block for a stream and a key-value head.

#define FEATURE_LANES (D / 4)

// The sum of `x` over groups of LANES neighbours.
template <int LANES> __device__ float sum_of_lanes(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

// The largest of all threads' `x`, or their sum.
template <bool LARGEST> __device__ float of_block(float x) {
    __shared__ float warps[THREADS / 32];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        float other = __shfl_xor_sync(~0u, x, lane);
        x = LARGEST ? fmaxf(x, other) : x + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = warps[0];
    for (int i = 1; i < THREADS / 32; i++) x = LARGEST ? fmaxf(x, warps[i]) : x + warps[i];
    return x;
}

// Tiles from `first` on join the sums, whose exponents become relative to tile `from`.
__device__ void retire(const Call &call, const Head &head, const Sequence &sequence, int kv,
                       const Keys &keys, int first, int until, int from, Element *shared,
                       float *exponents) {
    const Tiles tiles{shared};
    Element *k = tiles.k(0), *v = tiles.v(0);
    const State &state = keys.state;
    int base = from * TILE, column = 2 * (threadIdx.x % 4);
    for (int block = 0; block < M / TILE; block++) {
        KeyMap map;
        map.load(call, kv, block, SPLIT ? k : tiles.fixed());
        Softmax sums;
        sums.clear();
        for (int tile = first; tile < until; tile++) {
            load_keys(keys, tile, k, v);
            commit();
            arrived<0>();
            __syncthreads();
            bool any = key_exponents(call, head, sequence, keys, tile, base, k, exponents);
            absorb_tile(sums, map, k, v, any ? exponents : nullptr, tiles.scratch());
            __syncthreads();
        }
        // Added to the state's sums here, not as what the products start from: tensor cores
        // truncate, which over a million tokens would be seen.
        int f = block * TILE + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        for (int r = 0; r < 2; r++) {
            int g = f + 8 * r;
            bool more = any_before(sequence, first) && state.z[g] > 0.f;
            float z = more ? state.z[g] : 0.f, total = whole(sums.total[2 * r]);
            float c = more ? state.c[g] + head.decay * TILE * (from - first) : NEVER;
            float top = fmaxf(c, sums.top[r]), frame = top == NEVER ? 0.f : top;
            float own = exp2f(c - frame), added = exp2f(sums.top[r] - frame);
            __syncwarp();  // all lanes of the row have read what one of them writes
            if (column == 0) state.z[g] = z * own + total * added, state.c[g] = frame;
#pragma unroll
            for (int n = 0; n < E / 8; n++) {
                float2 *s = (float2 *)(state.s + g * E + 8 * n + column);
                float2 old = more ? *s : make_float2(0.f, 0.f);
                *s = make_float2(old.x * own + sums.o[n][2 * r] * added,
                                 old.y * own + sums.o[n][2 * r + 1] * added);
            }
        }
    }
    __syncthreads();
}

// The dot product of a row with the query, by LANES threads.
template <int LANES> __device__ float dot(const Element *row, const float *q) {
    float x[PACK], sum = 0.f;
    int at = threadIdx.x % LANES * PACK;
    widen(*(const float4 *)(row + at), x);
#pragma unroll
    for (int i = 0; i < PACK; i++) sum += x[i] * q[at + i];
    return sum_of_lanes<LANES>(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS == 4 ? 4 : 3) step(const Call call) {
    SHARED(shared);
    __shared__ float exponents[TILE], query[D], columns[THREADS * (PACK + 4)];
    const int key_lanes = D / PACK, key_rows = THREADS / key_lanes;
    const int value_lanes = E / PACK, value_rows = THREADS / value_lanes;
    int kv = blockIdx.x;
    const Sequence &sequence = call.sequences[blockIdx.y];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    const State &state = keys.state;
    int p = sequence.position, t = p / TILE, seen = first_seen(head, t);
    int kept = first_kept(head, p);
#if WINDOWLESS
    // The new key joins the sums at once, with those that a prefill has left in the ring.
    retire(call, head, sequence, kv, keys, kept, t + 1, t, shared, exponents);
    if (threadIdx.x < TILE) state.valid[threadIdx.x] = 0;
    const int sinks = 0, window = 0;
#else
    if (kept < seen) retire(call, head, sequence, kv, keys, kept, seen, seen, shared, exponents);

    // The new key and value go to the ring first, and are read from there like the others.
    int slot = p % head.ring;
    bool valid = keys.valid(p);
    copy_row<D>(state.ring_k + slot * D, valid ? keys.k : nullptr);
    copy_row<E>(state.ring_v + slot * E, valid ? keys.v : nullptr);
    if (threadIdx.x == 0) state.valid[slot] = valid;
    int sinks = 0;
    for (int i = 0; i < sequence.sinks; i++) {
        if (sequence.sink[i] < seen * TILE) sinks = i + 1;
        if (sequence.sink[i] != p) continue;
        copy_row<D>(state.sink_k + i * D, keys.k);
        copy_row<E>(state.sink_v + i * E, keys.v);
    }
    __syncthreads();
    int window = p + 1 - seen * TILE;
#endif

    // Weights: window, then sinks, then features.
    int exact = window + sinks, features = WINDOWLESS || seen > 0 ? M : 0;
    float *weights = (float *)shared;
    for (int g = 0; g < call.group; g++) {
        long row = (long)(kv * call.group + g) * call.tokens + sequence.token;
        __syncthreads();
        for (int i = threadIdx.x; i < D; i += THREADS) query[i] = wide(call.q[row * D + i]);
        __syncthreads();
        float top = NEVER;
#pragma unroll 4
        for (int pass = 0; pass < exact; pass += key_rows) {
            // All threads of a warp take part in its sums, to the last row.
            int i = min(pass + (int)threadIdx.x / key_lanes, exact - 1);
            int at = (seen * TILE + i) % head.ring;
            const Element *sink = state.sink_k + (i - window) * D;
            const Element *key = i < window ? state.ring_k + at * D : sink;
            float score = dot<key_lanes>(key, query) * call.scale;
            if (i < window && !state.valid[at]) score = NEVER;
            if (threadIdx.x % key_lanes == 0) weights[i] = score;
            top = fmaxf(top, score);
        }
        float shift = head.decay * (p - seen * TILE);
        if (call.envelope) {
            float norm = 0.f;
            for (int i = 0; i < D; i++) norm += query[i] * query[i];
            shift -= call.scale * 0.5f * norm;
        }
        const float *map = call.wide + (long)kv * 2 * M * D;
#pragma unroll 4
        for (int f = threadIdx.x / FEATURE_LANES; f < features; f += THREADS / FEATURE_LANES) {
            int at = threadIdx.x % FEATURE_LANES * 4;
            float4 w = *(const float4 *)(map + f * D + at);
            const float *x = query + at;
            float sum = w.x * x[0] + w.y * x[1] + w.z * x[2] + w.w * x[3];
            sum = sum_of_lanes<FEATURE_LANES>(sum);
            float level = state.z[f] > 0.f ? state.c[f] + call.rows[kv * 2 * M + f] + shift : NEVER;
            if (threadIdx.x % FEATURE_LANES == 0) weights[exact + f] = sum + level;
            top = fmaxf(top, sum + level);
        }
        top = of_block<true>(top);
        float frame = top == NEVER ? 0.f : top, total = 0.f;
        for (int i = threadIdx.x; i < exact + features; i += THREADS) {
            float w = exp2f_fast(weights[i] - frame);
            weights[i] = w;
            total += i < exact ? w : w * state.z[i - exact];
        }
        total = of_block<false>(total);

        float o[PACK] = {};
        int at = threadIdx.x % value_lanes * PACK;
#pragma unroll 4
        for (int i = threadIdx.x / value_lanes; i < exact; i += value_rows) {
            int r = (seen * TILE + i) % head.ring;
            const Element *sink = state.sink_v + (i - window) * E;
            const Element *value = i < window ? state.ring_v + r * E : sink;
            float x[PACK], w = weights[i];
            widen(*(const float4 *)(value + at), x);
#pragma unroll
            for (int j = 0; j < PACK; j++) o[j] += w * x[j];
        }
        const int sum_lanes = E / 4, sum_rows = THREADS / sum_lanes;
        float far[4] = {};
        int far_at = threadIdx.x % sum_lanes * 4;
#pragma unroll 4
        for (int f = threadIdx.x / sum_lanes; f < features; f += sum_rows) {
            float4 s = *(const float4 *)(state.s + f * E + far_at);
            float w = weights[exact + f];
            far[0] += w * s.x, far[1] += w * s.y, far[2] += w * s.z, far[3] += w * s.w;
        }
        for (int j = 0; j < PACK; j++) columns[threadIdx.x / value_lanes * E + at + j] = o[j];
        for (int j = 0; j < 4; j++)
            columns[(value_rows + threadIdx.x / sum_lanes) * E + far_at + j] = far[j];
        __syncthreads();
        if (threadIdx.x < E) {
            float sum = 0.f;
            for (int i = 0; i < value_rows + sum_rows; i++) sum += columns[i * E + threadIdx.x];
            call.out[row * E + threadIdx.x] = narrow(total > 0.f ? sum / total : 0.f);
        }
    }
}
