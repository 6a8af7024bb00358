// ---- products of a warp: 16 rows; a lane holds rows lane/4 and lane/4 + 8, columns 2 (lane%4), +1
// of every 8 ----

#if ELEMENT == 2

// 16 rows of WIDTH elements: each warp its own, or all the first ones.
template <int WIDTH> struct Rows {
    const float *at;
    __device__ void load(const float *shared, int warp = threadIdx.x / 32) {
        at = shared + warp * 16 * (WIDTH + PACK);
    }
};
template <int WIDTH> using SharedRows = Rows<WIDTH>;
template <int WIDTH> using FarRows = Rows<WIDTH>;

// acc += rows * tile^T, tile: N * 8 rows of WIDTH.
template <bool HALF = false, int N, int WIDTH>
__device__ void scores(float (&acc)[N][4], const Rows<WIDTH> &rows, const float *tile) {
    const int stride = WIDTH + PACK;
    int lane = threadIdx.x % 32, column = 2 * (lane % 4);
    const float *a = rows.at + lane / 4 * stride;
#pragma unroll 1
    for (int i = 0; i < WIDTH; i += 4) {
        float4 x = *(const float4 *)(a + i), y = *(const float4 *)(a + 8 * stride + i);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float4 b = *(const float4 *)(tile + (8 * n + column + j) * stride + i);
                acc[n][j] += x.x * b.x + x.y * b.y + x.z * b.z + x.w * b.w;
                acc[n][2 + j] += y.x * b.x + y.y * b.y + y.z * b.z + y.w * b.w;
            }
    }
}

// o += weights * tile, tile: N * 8 rows of 8 * C; with TOTALS total += their sum, a lane's share of
// it; with MEANS the tile is one of means. scratch: 64 rows of 64 + 4.
template <bool TOTALS, bool MEANS = false, int N, int C>
__device__ void mix(float (&o)[C][4], float (&total)[4], const float (&p)[N][4], const float *tile,
                    float *scratch) {
    const int stride = TILE + 4;
    int lane = threadIdx.x % 32, column = 2 * (lane % 4);
    float *own = scratch + (threadIdx.x / 32 * 16 + lane / 4) * stride;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < N; n++) {
        *(float2 *)(own + 8 * n + column) = make_float2(p[n][0], p[n][1]);
        *(float2 *)(own + 8 * stride + 8 * n + column) = make_float2(p[n][2], p[n][3]);
        if (TOTALS) total[0] += p[n][0] + p[n][1], total[2] += p[n][2] + p[n][3];
    }
    __syncwarp();
#pragma unroll 2
    for (int j = 0; j < 8 * N; j++) {
        float x = own[j], y = own[8 * stride + j];
#pragma unroll
        for (int n = 0; n < C; n++) {
            float2 v = *(const float2 *)(tile + j * (8 * C + PACK) + 8 * n + column);
            o[n][0] += x * v.x, o[n][1] += x * v.y, o[n][2] += y * v.x, o[n][3] += y * v.y;
        }
    }
}

// A row's total from its lanes' shares, and back.
__device__ float whole(float share) {
    share += __shfl_xor_sync(~0u, share, 1);
    return share + __shfl_xor_sync(~0u, share, 2);
}
__device__ float share(float whole) { return threadIdx.x % 4 == 0 ? whole : 0.f; }

#else

__device__ void ldmatrix(u32 (&to)[4], const Element *from) {
    u32 shared = (u32)__cvta_generic_to_shared(from);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared));
}
__device__ void ldmatrix_transposed(u32 (&to)[4], const Element *from) {
    u32 shared = (u32)__cvta_generic_to_shared(from);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared));
}
#define MMA(TYPE) "mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 " \
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
template <bool HALF>
__device__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (HALF)
        asm(MMA("f16") : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm(MMA("bf16") : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 rows of WIDTH elements: each warp its own, or all the first ones. In registers, or read again
// for each product.
template <int WIDTH> struct SharedRows {
    const Element *tile;
    int row;
    __device__ void load(const Element *shared, int warp = threadIdx.x / 32) {
        tile = shared, row = warp * 16 + threadIdx.x % 16;
    }
    __device__ void part(int i, u32 (&to)[4]) const {
        ldmatrix(to, tile + place<WIDTH>(row, 16 * i + threadIdx.x % 32 / 16 * 8));
    }
};
template <int WIDTH> struct Rows {
    u32 a[WIDTH / 16][4];
    __device__ void load(const Element *shared) {
        SharedRows<WIDTH> rows;
        rows.load(shared);
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) rows.part(i, a[i]);
    }
    __device__ void part(int i, u32 (&to)[4]) const {
        for (int j = 0; j < 4; j++) to[j] = a[i][j];
    }
};

// The same from rows without padding that lie in the device's memory.
template <int WIDTH> struct FarRows {
    const Element *at;
    __device__ void load(const Element *rows) {
        int lane = threadIdx.x % 32;
        at = rows + (threadIdx.x / 32 * 16 + lane / 4) * WIDTH + 2 * (lane % 4);
    }
    __device__ void part(int i, u32 (&to)[4]) const {
        for (int j = 0; j < 4; j++)
            to[j] = *(const u32 *)(at + j % 2 * 8 * WIDTH + 16 * i + j / 2 * 8);
    }
};

template <bool HALF = ELEMENT == 1, int N, int WIDTH, template <int> class R>
__device__ void scores(float (&acc)[N][4], const R<WIDTH> &rows, const Element *tile) {
    int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < WIDTH / 16; i++) {
        u32 a[4];
        rows.part(i, a);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix(b, tile + place<WIDTH>(row + 8 * n, column + 16 * i));
            mma<HALF>(acc[n], a, b[0], b[1]);
            mma<HALF>(acc[n + 1], a, b[2], b[3]);
        }
    }
}

// Weights of 16 columns, of two numbers of 8, as the left side of a product.
template <bool HALF>
__device__ void pack_weights(u32 (&a)[4], const float (&x)[4], const float (&y)[4]) {
    auto pack = [](float x, float y) { return HALF ? pack_half(x, y) : pack2(x, y); };
    a[0] = pack(x[0], x[1]), a[1] = pack(x[2], x[3]);
    a[2] = pack(y[0], y[1]), a[3] = pack(y[2], y[3]);
}
// Totals are a product with ones: of the weights as rounding has left them, so that what it does to
// a weight is in the normaliser too.
template <bool HALF> __device__ void add_total(float (&total)[4], const u32 (&a)[4]) {
    const u32 ones = HALF ? 0x3c003c00u : 0x3f803f80u;
    mma<HALF>(total, a, ones, ones);
}

template <bool TOTALS, bool MEANS = false, int N, int C>
__device__ void mix(float (&o)[C][4], float (&total)[4], const float (&p)[N][4],
                    const Element *tile, Element *) {
    const bool half = MEANS || ELEMENT == 1;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        u32 a[4];
        pack_weights<half>(a, p[2 * i], p[2 * i + 1]);
        if (TOTALS) add_total<half>(total, a);
#pragma unroll
        for (int n = 0; n < C; n += 2) {
            u32 b[4];
            int row = lane % 16 + 16 * i, column = lane / 16 * 8 + 8 * n;
            ldmatrix_transposed(b, tile + place<8 * C>(row, column));
            mma<half>(o[n], a, b[0], b[1]);
            mma<half>(o[n + 1], a, b[2], b[3]);
        }
    }
}

// Every lane of a row has its total.
__device__ float whole(float share) { return share; }
__device__ float share(float whole) { return whole; }

#endif
