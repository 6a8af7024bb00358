// Without a window a query attends to the keys of its own tile as to all older ones, by features:
//
//   K_ij = Σ_f 2^(a_f(i) + b_f(j)),   j <= i
//
// products of weights of keys relative to each feature's largest in the tile, and weights of
// queries relative to each query's largest, of which log2 K_ij are exponents like all others.
// Outputs lose a key whose exponents are all 100 below those of another key of the tile.

#if WINDOWLESS

// In 16 bits a weight is the sum of two bf16, whatever the elements are: f16 has no room for what
// is far below the largest.
struct Weights {
    Element *high, *low;
};
#define WEIGHTS_ROW (SWIZZLED ? TILE : TILE + PACK)
__device__ Weights weights_at(const Tiles &tiles, int i) {
    const int size = TILE * WEIGHTS_ROW;
    Element *high = tiles.fixed() + (SPLIT ? 0 : TILE * KEY_ROW) + i * (1 + SPLIT) * size;
    return {high, high + SPLIT * size};
}

__device__ void store_weights(const Weights &to, int row, int column, float x, float y) {
    int at = place<TILE>(row, column);
#if SPLIT
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
    *(u32 *)(to.high + at) = both;
    x -= __uint_as_float(both << 16), y -= __uint_as_float(both & 0xffff0000u);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
    *(u32 *)(to.low + at) = both;
#else
    store2(to.high + at, x, y);
#endif
}

// Products of a tile's rows with a block of a side's projection, which goes to `to`.
template <template <int> class R>
__device__ void log_features(float (&s)[TILE / 8][4], const R<D> &rows, const Call &call, int kv,
                             int side, int block, Element *to) {
    zero(s);
    for (int part = 0; part <= SPLIT; part++) {
        __syncthreads();
        load_block<D>(to, projection(call, kv, side, block, part));
        commit();
        arrived<0>();
        __syncthreads();
        scores(s, rows, to);
    }
    add_columns(s, call.rows + (kv * 2 + side) * M + block * TILE);
}

// The largest of each column of a tile.
__device__ void largest_of_columns(const float (&s)[TILE / 8][4], float *to) {
    __shared__ float of_warps[THREADS / 32][TILE];
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float most = fmaxf(s[n][i], s[n][2 + i]);
            for (int rows = 4; rows < 32; rows *= 2)
                most = fmaxf(most, __shfl_xor_sync(~0u, most, rows));
            if (lane < 4) of_warps[threadIdx.x / 32][8 * n + 2 * lane + i] = most;
        }
    __syncthreads();
    if (threadIdx.x < TILE) {
        float most = of_warps[0][threadIdx.x];
        for (int i = 1; i < THREADS / 32; i++) most = fmaxf(most, of_warps[i][threadIdx.x]);
        to[threadIdx.x] = most == NEVER ? 0.f : most;
    }
    __syncthreads();
}

// The exponents of queries with the keys in tiles.k(0), of which `exponents` are what each adds to
// its features', and of each query what is to be added to them all.
template <template <int> class R>
__device__ void own_scores(float (&s)[TILE / 8][4], float (&tops)[2], const R<D> &queries,
                           const Call &call, int kv, const Tiles &tiles, const float *exponents) {
    __shared__ float largest[TILE];
    const Weights of_queries = weights_at(tiles, 0), of_keys = weights_at(tiles, 1);
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = 2 * (lane % 4);
    SharedRows<D> keys;
    keys.load(tiles.k(0));
    SharedRows<TILE> high, low;
    high.load(of_queries.high);
    if (SPLIT) low.load(of_queries.low);
    zero(s);
    tops[0] = tops[1] = NEVER;
    for (int block = 0; block < M / TILE; block++) {
        float x[TILE / 8][4];
        log_features(x, keys, call, kv, 1, block, tiles.k(1));
        if (exponents) add_rows(x, exponents[row], exponents[row + 8]);
        largest_of_columns(x, largest);
        for (int n = 0; n < TILE / 8; n++)
            for (int r = 0; r < 2; r++) {
                float y[2];
                for (int i = 0; i < 2; i++)
                    y[i] = exp2f_fast(x[n][2 * r + i] - largest[8 * n + column + i]);
                store_weights(of_keys, row + 8 * r, 8 * n + column, y[0], y[1]);
            }
        log_features(x, queries, call, kv, 0, block, tiles.k(1));
        add_columns(x, largest);
        for (int r = 0; r < 2; r++) {
            float most = tops[r];
            for (int n = 0; n < TILE / 8; n++)
                most = fmaxf(most, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            float factor = exp2f_fast(tops[r] - most);
            tops[r] = most;
            for (int n = 0; n < TILE / 8; n++) {
                s[n][2 * r] *= factor, s[n][2 * r + 1] *= factor;
                store_weights(of_queries, row + 8 * r, 8 * n + column,
                              exp2f_fast(x[n][2 * r] - most), exp2f_fast(x[n][2 * r + 1] - most));
            }
        }
        __syncwarp();
        scores<false>(s, high, of_keys.high);
        if (SPLIT) scores<false>(s, high, of_keys.low), scores<false>(s, low, of_keys.high);
        __syncwarp();
    }
    for (int n = 0; n < TILE / 8; n++)
        for (int i = 0; i < 4; i++) s[n][i] = __log2f(s[n][i]);
}

#endif
