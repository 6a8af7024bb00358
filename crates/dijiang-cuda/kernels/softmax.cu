// Without a window sharp features leave a query a handful of keys, and rounding to bf16 would be
// seen: what it takes from weights is added too, and the low part of projections is always used.
#define TWICE (WINDOWLESS && ELEMENT == 0)
template <int N> __device__ void unrounded(float (&s)[N][4]) {
#if TWICE
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            u32 both = pack2(s[n][i], s[n][i + 1]);
            s[n][i] -= low_of(both), s[n][i + 1] -= high_of(both);
        }
#endif
}

// The online softmax of a warp's 16 rows: the exponent that weights are relative to, what they sum
// up to (see `whole`), and the weighted sum of values, in units of `unit`. The exponent is one of
// the row's largest: it moves when another one is SLACK above it, for values of 16 bits whenever
// there is one, for the largest weight is 1 then, which rounding leaves alone.
#define SLACK 8.f
struct Softmax {
    float top[2], total[4], o[E / 8][4], unit;

    __device__ void clear() {
        unit = 1.f;
        for (int r = 0; r < 2; r++) top[r] = NEVER;
        for (int i = 0; i < 4; i++) total[i] = 0.f;
#pragma unroll
        for (int n = 0; n < E / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] = 0.f;
    }

    // Row r goes on from sums whose exponents are relative to c.
    __device__ void resume(int r, float c, float z, const float *row) {
        if (z == 0.f) return;
        top[r] = c;
        total[2 * r] = share(z);
        if (SPLIT) total[2 * r + 1] = z;
#pragma unroll
        for (int n = 0; n < E / 8; n++) {
            float2 s = *(const float2 *)(row + 8 * n + 2 * (threadIdx.x % 4));
            o[n][2 * r] = s.x, o[n][2 * r + 1] = s.y;
        }
    }

    // A tile of values, or of MEANS in units of `other`, with the exponents scale * s + rows,
    // scale > 0. `s` becomes the weights, of which none is above 2^SLACK.
    template <bool MEANS = false, int N>
    __device__ void add(float (&s)[N][4], float scale, const float (&rows)[2],
                        const Element *tile, Element *scratch, float other = 1.f) {
        const float slack = SPLIT && !MEANS ? 0.f : SLACK;
        float next[2];
        bool moves = MEANS && SCALED && unit != other;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most_of[2] = {NEVER, NEVER};
#pragma unroll
            for (int n = 0; n < N; n++)
                most_of[n % 2] = fmaxf(most_of[n % 2], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            float most = fmaxf(most_of[0], most_of[1]);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaf(fmaxf(most, __shfl_xor_sync(~0u, most, 2)), scale, rows[r]);
            bool grows = most > top[r] + slack;
            next[r] = grows ? most : top[r];
            moves |= grows;
        }
        // Seldom after the first tiles.
        if (__any_sync(~0u, moves)) move<MEANS>(next, other);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float shift = rows[r] - (top[r] == NEVER ? 0.f : top[r]);
#pragma unroll
            for (int n = 0; n < N; n++) {
                s[n][2 * r] = exp2f_fast(fmaf(s[n][2 * r], scale, shift));
                s[n][2 * r + 1] = exp2f_fast(fmaf(s[n][2 * r + 1], scale, shift));
            }
        }
        mix<true, MEANS>(o, total, s, tile, scratch);
        if (TWICE && !MEANS) {
            unrounded(s);
            mix<true>(o, total, s, tile, scratch);
        }
    }

    // Other exponents that weights are relative to.
    template <bool MEANS> __device__ void move(const float (&next)[2], float other) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float factor = exp2f_fast(top[r] - (next[r] == NEVER ? 0.f : next[r]));
            top[r] = next[r];
            total[2 * r] *= factor, total[2 * r + 1] *= factor;
            if (MEANS && SCALED) factor *= unit * inverse_of_power(other);
#pragma unroll
            for (int n = 0; n < E / 8; n++) o[n][2 * r] *= factor, o[n][2 * r + 1] *= factor;
        }
        if (MEANS && SCALED) unit = other;
    }
};

template <int N> __device__ void zero(float (&s)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
}

// Adds a number to each row.
template <int N> __device__ void add_rows(float (&s)[N][4], float row0, float row1) {
#pragma unroll
    for (int n = 0; n < N; n++) s[n][0] += row0, s[n][1] += row0, s[n][2] += row1, s[n][3] += row1;
}

// Whether rounding the projection to its high part could be seen in some of a warp's exponents: up
// to 8 it changes a weight by less than rounding the weight does.
template <int N> __device__ bool large(const float (&s)[N][4]) {
    if (TWICE) return true;
    // Four side by side: each waits for the one before it.
    float most[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) most[i] = fmaxf(most[i], fabsf(s[n][i]));
    most[0] = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    return __any_sync(~0u, !(most[0] <= 8.f));
}

// Adds a number to each column.
template <int N> __device__ void add_columns(float (&s)[N][4], const float *columns) {
    const float *own = columns + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < N; n++) {
        float2 x = *(const float2 *)(own + 8 * n);
        s[n][0] += x.x, s[n][1] += x.y, s[n][2] += x.x, s[n][3] += x.y;
    }
}

// A row's sum from its four lanes' parts; they must be there together.
__device__ float of_row(float x) {
    u32 lanes = 15u << threadIdx.x % 32 / 4 * 4;
    x += __shfl_xor_sync(lanes, x, 1);
    return x + __shfl_xor_sync(lanes, x, 2);
}

// Half the squared norm of a row of a tile.
__device__ float half_norm(const Element *tile, int row) {
    float sum = 0.f;
    for (int i = 0; i < D; i++) {
        float x = wide(tile[place<D>(row, i)]);
        sum += x * x;
    }
    return 0.5f * sum;
}

// Two tiles of keys and values; and for products that do not take their operands from registers the
// weights of a tile and a tile of rows.
#define SCRATCH (SPLIT ? 0 : TILE * (TILE + 4))
struct Tiles {
    Element *shared;
    __device__ Element *k(int i) const { return shared + i * TILE * KEY_ROW; }
    __device__ Element *v(int i) const { return k(2) + i * TILE * VALUE_ROW; }
    __device__ Element *scratch() const { return v(2); }
    __device__ Element *fixed() const { return v(2) + SCRATCH; }
};
// As many blocks at a time as shared memory or registers have room for.
#define BLOCKS (!SPLIT || WINDOWLESS ? 2 : D == 64 && E == 64 ? 4 : 3)

// The projection of a side: 0 query, 1 key; its block of 64 features; 0 high, 1 low part.
__device__ const Element *projection(const Call &call, int kv, int side, int block, int part) {
    return call.projections + ((((long)kv * 2 + side) * (1 + SPLIT) + part) * M + block * TILE) * D;
}
