// Hopper's own matrix products, of four warps together: 64 rows in registers, as `mma` has them,
// times a tile that is read where it lies in shared memory. All four warps must come here.

#if WGMMA

// A tile from this element on: panels of 64 rows, groups of 8 rows of 128 bytes, swizzled.
__device__ u64 descriptor(const Element *at) {
    const u32 panel = TILE * 128 / 16, rows = 8 * 128 / 16, swizzle = 1;
    u32 low = (u32)__cvta_generic_to_shared(at) / 16 | panel << 16, high = rows | swizzle << 30;
    return (u64)high << 32 | low;
}

// Products run beside the threads: registers that they work on are left alone until they end.
template <int N> __device__ void held(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(c[n][i])::"memory");
}
template <int N> __device__ void begin_products(float (&c)[N][4]) {
    held(c);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
template <int N> __device__ void end_products(float (&c)[N][4]) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    held(c);
}

#define FOUR(C) "+f"(C[0]), "+f"(C[1]), "+f"(C[2]), "+f"(C[3])
#define EIGHT(C, N) FOUR(C[N]), FOUR(C[N + 1])
#define SIXTEEN(C, N) EIGHT(C, N), EIGHT(C, N + 2)
#define D32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
    "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define D64 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
    "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43," \
    "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define GROUP_MMA(WIDTH, TYPE) \
    "wgmma.mma_async.sync.aligned.m64n" WIDTH "k16.f32." TYPE "." TYPE " "

// c = a * b, or with `add` c += a * b; b as it lies there has a row for each column of c, or
// TRANSPOSED for each column of a.
template <bool HALF, bool TRANSPOSED>
__device__ void group_mma(float (&c)[8][4], const u32 (&a)[4], u64 b, int add) {
#define OPERANDS \
    : SIXTEEN(c, 0), SIXTEEN(c, 4) \
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED)
#define TEXT(TYPE) "{.reg .pred p; setp.ne.b32 p, %37, 0;" \
    GROUP_MMA("64", TYPE) D32 ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;}"
    if (HALF) asm volatile(TEXT("f16") OPERANDS);
    else asm volatile(TEXT("bf16") OPERANDS);
#undef OPERANDS
#undef TEXT
}
template <bool HALF, bool TRANSPOSED>
__device__ void group_mma(float (&c)[16][4], const u32 (&a)[4], u64 b, int add) {
#define OPERANDS \
    : SIXTEEN(c, 0), SIXTEEN(c, 4), SIXTEEN(c, 8), SIXTEEN(c, 12) \
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED)
#define TEXT(TYPE) "{.reg .pred p; setp.ne.b32 p, %69, 0;" \
    GROUP_MMA("128", TYPE) D64 ", {%64,%65,%66,%67}, %68, p, 1, 1, %70;}"
    if (HALF) asm volatile(TEXT("f16") OPERANDS);
    else asm volatile(TEXT("bf16") OPERANDS);
#undef OPERANDS
#undef TEXT
}

// acc = rows * tile^T.
template <int WIDTH>
__device__ void all_scores(float (&acc)[TILE / 8][4], const Rows<WIDTH> &rows,
                           const Element *tile) {
    begin_products(acc);
#pragma unroll
    for (int i = 0; i < WIDTH / 16; i++)
        group_mma<ELEMENT == 1, false>(acc, rows.a[i], descriptor(tile + place<WIDTH>(0, 16 * i)),
                                       i > 0);
    end_products(acc);
}

// As the other `mix`, of a whole tile.
template <bool TOTALS, bool MEANS = false, int C>
__device__ void mix(float (&o)[C][4], float (&total)[4], const float (&p)[TILE / 8][4],
                    const Element *tile, Element *) {
    const bool half = MEANS || ELEMENT == 1;
    u32 a[TILE / 16][4];
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
        pack_weights<half>(a[i], p[2 * i], p[2 * i + 1]);
        if (TOTALS) add_total<half>(total, a[i]);
    }
    begin_products(o);
#pragma unroll
    for (int i = 0; i < TILE / 16; i++)
        group_mma<half, true>(o, a[i], descriptor(tile + place<8 * C>(16 * i, 0)), 1);
    end_products(o);
}

#else

template <int N, int WIDTH, template <int> class R>
__device__ void all_scores(float (&acc)[N][4], const R<WIDTH> &rows, const Element *tile) {
#pragma unroll
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.f;
    scores(acc, rows, tile);
}

#endif
