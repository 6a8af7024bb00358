// What all kernels share. Compiled with -DELEMENT (0: bf16, 1: f16, 2: f32), -DD, -DE, -DM.
//
// Everything is attention with an online softmax over tiles of 64 rows, in log2 units:
//
//   the sums of feature f    attend from the row W_f of the key projection to the keys
//   the outputs of query i   attend to sinks and window, and to the rows W_f of the query
//                            projection, whose "values" are the mean values S_f / z_f and whose
//                            scores are raised by l_f = c_f + log2 z_f
//
// so that no weight exceeds 1 and values stay in the range of V, whatever the exponents are.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if ELEMENT == 2
typedef float Element;
#define SPLIT 0
#else
typedef u16 Element;
// A projection in 16 bits is the sum of two matrices, for exponents of hundreds.
#define SPLIT 1
#endif

// Means of bf16 values are kept in f16, in units of their block's largest: rounded to 8 bits they
// would show beside the rounding of the outputs.
#define SCALED (ELEMENT == 0)

#define TILE 64
#define THREADS 128
#define SINKS 16
// Elements in 16 bytes; also the padding of rows in shared memory, which keeps banks apart.
#define PACK (16 / (int)sizeof(Element))
#define LOG2E 1.4426950408889634f
#define NEVER (-__int_as_float(0x7f800000))
#define EVER (__int_as_float(0x7f800000))

// One key-value head.
struct Head {
    int tiles;       // of a chunk
    int back;        // chunks before the own one
    int ring;        // tokens of the window
    float decay;     // log2 of the decay of a token
    u64 state;       // bytes before this head's part of a state
};

// The next tokens of one sequence.
struct Sequence {
    int token;       // first row in q, k, v and out
    int n;           // tokens
    int position;    // of the first one
    int slot;        // its state, or -1
    int tile;        // tiles of the sequences before this one
    int segment;     // segments of the sequences before this one
    int sinks;       // positions in use below
    int sink[SINKS];
};

// A call: the same for all blocks.
struct Call {
    const Element *q, *k, *v;
    Element *out;            // may be null where gradients are wanted
    const u8 *mask;          // one byte a token, or null
    const Head *heads;
    const Sequence *sequences;
    int count;               // sequences
    int kv_heads;
    int group;               // query heads of a key-value head
    int tokens;              // rows of a head in q, k, v and out
    int segment_tiles;
    int envelope;            // whether the map has one
    float scale;             // sigma * log2(e)
    const Element *projections;   // [kv_heads][query, key][hi, lo][M][D]
    const float *wide;            // [kv_heads][query, key][M][D]
    const float *rows;            // [kv_heads][query, key][M]
    u8 *states;
    u64 state_bytes;
    // Of each segment: its sums (c, z, S), of which the scan makes those of all before it.
    float *segment_sums;          // [segments][kv_heads][M * (E + 2)]
    // What the queries of each chunk find: means S/z, their units, and levels c + log2 z, which are
    // relative to the beginning of their segment.
    Element *means;               // [segments][segment_tiles][kv_heads][M][E]
    float *mean_unit;             // [segments][segment_tiles][kv_heads][M / TILE]
    float *mean_level;            // [segments][segment_tiles][kv_heads][M]
    int versions;                 // whether `absorb` makes these, or the sums of segments
    // For gradients, else null: of the outputs, and for each query the log2 of all its weights and
    // the product of its output with the output's gradient.
    const Element *grad_out;
    float *log_total, *delta;     // [heads][tokens]
};

// One head's part of a state.
struct State {
    float *c, *z, *s;
    Element *ring_k, *ring_v, *sink_k, *sink_v;
    u8 *valid;
};

__device__ State state_of(const Call &call, const Head &head, int slot) {
    State state;
    u8 *at = call.states + slot * call.state_bytes + head.state;
    state.c = (float *)at;
    state.z = state.c + M;
    state.s = state.z + M;
    state.ring_k = (Element *)(state.s + M * E);
    state.ring_v = state.ring_k + head.ring * D;
    state.sink_k = state.ring_v + head.ring * E;
    state.sink_v = state.sink_k + SINKS * D;
    state.valid = (u8 *)(state.sink_v + SINKS * E);
    return state;
}

// The first tile a query in tile `t` sees in its window: earlier ones are in the sums.
__device__ int first_seen(const Head &head, int t) {
    return max(0, t / head.tiles - head.back) * head.tiles;
}

// The first tile that is not in the sums when `position` tokens have been seen: a chunk joins them
// when a later one begins.
__device__ int first_kept(const Head &head, int position) {
    int chunk = head.tiles * TILE;
    return max(0, (position + chunk - 1) / chunk - head.back - 1) * head.tiles;
}

// Which of the means, or of their levels, the queries of tile `t` find.
__device__ long version_of(const Call &call, const Head &head, const Sequence &sequence, int t,
                           int kv) {
    int first_tile = sequence.position / TILE;
    int segment = (t - first_tile) / call.segment_tiles;
    int begin = first_tile + segment * call.segment_tiles;
    int version = t / head.tiles - begin / head.tiles;
    long of_segment = (long)(sequence.segment + segment) * call.segment_tiles;
    return (of_segment + version) * call.kv_heads + kv;
}

__device__ bool is_sink(const Sequence &sequence, int position) {
    for (int i = 0; i < sequence.sinks; i++)
        if (sequence.sink[i] == position) return true;
    return false;
}

// The keys and values of one head of a sequence: new ones, and those its state remembers.
struct Keys {
    const Element *k, *v;
    const u8 *mask;
    int position, n, ring;
    State state;

    __device__ Keys(const Call &call, const Head &head, const Sequence &sequence, int kv) {
        long first = (long)kv * call.tokens + sequence.token;
        k = call.k + first * D;
        v = call.v + first * E;
        mask = call.mask ? call.mask + sequence.token : nullptr;
        position = sequence.position;
        n = sequence.n;
        ring = head.ring;
        state = state_of(call, head, max(sequence.slot, 0));
    }
    __device__ bool has(int p) const { return p >= 0 && p < position + n; }
    __device__ bool valid(int p) const {
        if (!has(p)) return false;
        if (p < position) return state.valid[p % ring];
        return !mask || mask[p - position];
    }
    // A tile of new tokens all of which may be looked at.
    __device__ bool plain(int tile) const {
        return !mask && tile * TILE >= position && tile * TILE + TILE <= position + n;
    }
    __device__ const Element *key(int p) const {
        return p < position ? state.ring_k + (p % ring) * D : k + (long)(p - position) * D;
    }
    __device__ const Element *value(int p) const {
        return p < position ? state.ring_v + (p % ring) * E : v + (long)(p - position) * E;
    }
};

// ---- copies into shared memory ----

__device__ void copy16(void *to, const void *from, bool there) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared), "l"(from), "r"(bytes));
}
__device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ void arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Rows of WIDTH elements into rows of WIDTH + PACK; `row(i)` is null for a row of zeros.
template <int WIDTH, int ROWS, class Row>
__device__ void load_rows(Element *to, Row row) {
    const int packs = WIDTH / PACK;
    for (int i = threadIdx.x; i < ROWS * packs; i += THREADS) {
        int r = i / packs, at = i % packs * PACK;
        const Element *from = row(r);
        copy16(to + r * (WIDTH + PACK) + at, from ? from + at : to, from != nullptr);
    }
}

// A dense block of 64 rows.
template <int WIDTH> __device__ void load_block(Element *to, const Element *from) {
    const int packs = WIDTH / PACK;
#pragma unroll
    for (int j = 0; j < TILE * packs / THREADS; j++) {
        int i = j * THREADS + threadIdx.x;
        copy16(to + i / packs * (WIDTH + PACK) + i % packs * PACK, from + i * PACK, true);
    }
}

// 64 rows of WIDTH + PACK elements in shared memory to dense ones; `has(i)` says which.
template <int WIDTH, class Has>
__device__ void store_block(Element *to, const Element *from, Has has) {
    const int packs = WIDTH / PACK;
#pragma unroll
    for (int j = 0; j < TILE * packs / THREADS; j++) {
        int i = j * THREADS + threadIdx.x, r = i / packs, at = i % packs * PACK;
        const float4 *pack = (const float4 *)(from + r * (WIDTH + PACK) + at);
        if (has(r)) *(float4 *)(to + r * WIDTH + at) = *pack;
    }
}

// ---- elements ----

__device__ float exp2f_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if ELEMENT != 2
__device__ u32 pack_half(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ float low_half(u32 both) {
    float x;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(x) : "r"(both));
    return x;
}
__device__ float high_half(u32 both) {
    float x;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(both));
    return x;
}
#endif
#if ELEMENT == 0
__device__ u32 pack2(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ float low_of(u32 both) { return __uint_as_float(both << 16); }
__device__ float high_of(u32 both) { return __uint_as_float(both & 0xffff0000u); }
#elif ELEMENT == 1
__device__ u32 pack2(float low, float high) { return pack_half(low, high); }
__device__ float low_of(u32 both) { return low_half(both); }
__device__ float high_of(u32 both) { return high_half(both); }
#endif

#if ELEMENT == 2
__device__ float wide(Element x) { return x; }
__device__ Element narrow(float x) { return x; }
__device__ void store2(Element *to, float low, float high) {
    *(float2 *)to = make_float2(low, high);
}
__device__ void widen(const float4 &pack, float *to) {
    to[0] = pack.x, to[1] = pack.y, to[2] = pack.z, to[3] = pack.w;
}
#else
__device__ float wide(Element x) { return low_of(x); }
__device__ Element narrow(float x) { return (Element)pack2(x, 0.f); }
__device__ void store2(Element *to, float low, float high) { *(u32 *)to = pack2(low, high); }
__device__ void widen(const float4 &pack, float *to) {
    const u32 *both = (const u32 *)&pack;
    for (int i = 0; i < 4; i++) to[2 * i] = low_of(both[i]), to[2 * i + 1] = high_of(both[i]);
}
#endif

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
template <int N, int WIDTH>
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
template <bool HALF = ELEMENT == 1>
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
    const Element *at;
    __device__ void load(const Element *shared, int warp = threadIdx.x / 32) {
        int lane = threadIdx.x % 32;
        at = shared + (warp * 16 + lane % 16) * (WIDTH + PACK) + lane / 16 * 8;
    }
    __device__ void part(int i, u32 (&to)[4]) const { ldmatrix(to, at + 16 * i); }
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

template <int N, int WIDTH, template <int> class R>
__device__ void scores(float (&acc)[N][4], const R<WIDTH> &rows, const Element *tile) {
    const int stride = WIDTH + PACK;
    int lane = threadIdx.x % 32;
    const Element *at = tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < WIDTH / 16; i++) {
        u32 a[4];
        rows.part(i, a);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b[4];
            ldmatrix(b, at + 8 * n * stride + 16 * i);
            mma(acc[n], a, b[0], b[1]);
            mma(acc[n + 1], a, b[2], b[3]);
        }
    }
}

// The totals are a product with ones: of the weights as rounding has left them, so that what it
// does to a weight is in the normaliser too.
template <bool TOTALS, bool MEANS = false, int N, int C>
__device__ void mix(float (&o)[C][4], float (&total)[4], const float (&p)[N][4],
                    const Element *tile, Element *) {
    const bool half = MEANS || ELEMENT == 1;
    const int stride = 8 * C + PACK;
    const u32 ones = half ? 0x3c003c00u : 0x3f803f80u;
    auto pack = [](float x, float y) { return half ? pack_half(x, y) : pack2(x, y); };
    int lane = threadIdx.x % 32;
    const Element *at = tile + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float(&x)[4] = p[2 * i], (&y)[4] = p[2 * i + 1];
        u32 a[4] = {pack(x[0], x[1]), pack(x[2], x[3]), pack(y[0], y[1]), pack(y[2], y[3])};
        if (TOTALS) mma<half>(total, a, ones, ones);
#pragma unroll
        for (int n = 0; n < C; n += 2) {
            u32 b[4];
            ldmatrix_transposed(b, at + 16 * i * stride + 8 * n);
            mma<half>(o[n], a, b[0], b[1]);
            mma<half>(o[n + 1], a, b[2], b[3]);
        }
    }
}

// Every lane of a row has its total.
__device__ float whole(float share) { return share; }
__device__ float share(float whole) { return whole; }

#endif

// The online softmax of a warp's 16 rows: the largest exponent, what weights sum up to (see
// `whole`), and the weighted sum of values, in units of `unit`.
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

    // A tile of values, or of MEANS in units of `other`, with the exponents scale * s, scale > 0.
    template <bool MEANS = false, int N>
    __device__ void add(float (&s)[N][4], float scale, const Element *tile, Element *scratch,
                        float other = 1.f) {
        float change = MEANS && SCALED ? unit / other : 1.f;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = NEVER;
#pragma unroll
            for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(top[r], scale * fmaxf(most, __shfl_xor_sync(~0u, most, 2)));
            float frame = most == NEVER ? 0.f : most, factor = exp2f_fast(top[r] - frame);
            top[r] = most;
#pragma unroll
            for (int n = 0; n < N; n++) {
                s[n][2 * r] = exp2f_fast(fmaf(s[n][2 * r], scale, -frame));
                s[n][2 * r + 1] = exp2f_fast(fmaf(s[n][2 * r + 1], scale, -frame));
            }
            total[2 * r] *= factor, total[2 * r + 1] *= factor;
            if (MEANS && SCALED) factor *= change;
#pragma unroll
            for (int n = 0; n < E / 8; n++) o[n][2 * r] *= factor, o[n][2 * r + 1] *= factor;
        }
        if (MEANS && SCALED) unit = other;
        mix<true, MEANS>(o, total, s, tile, scratch);
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
    float most = 0.f;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) most = fmaxf(most, fabsf(s[n][i]));
    return __any_sync(~0u, !(most <= 8.f));
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

// Half the squared norm of a row in shared memory.
__device__ float half_norm(const Element *row) {
    float sum = 0.f;
    for (int i = 0; i < D; i++) sum += wide(row[i]) * wide(row[i]);
    return 0.5f * sum;
}

#define KEY_ROW (D + PACK)
#define VALUE_ROW (E + PACK)
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
// As many blocks at a time as shared memory has room for.
#define BLOCKS (D == 64 && E == 64 && SPLIT ? 4 : 2)

// The projection of a side: 0 query, 1 key; its block of 64 features; 0 high, 1 low part.
__device__ const Element *projection(const Call &call, int kv, int side, int block, int part) {
    return call.projections + ((((long)kv * 2 + side) * (1 + SPLIT) + part) * M + block * TILE) * D;
}
