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

// Hopper's own matrix products read tiles where they lie. The kernels for gradients do without.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && SPLIT && !defined(BACKWARD)
#define WGMMA 1
#else
#define WGMMA 0
#endif

// Whether every key joins the sums at once. Chunks are tiles then, and the own one is not exact.
#ifndef WINDOWLESS
#define WINDOWLESS 0
#endif

#define TILE 64
#define THREADS 128
#define SINKS 16
// Elements in 16 bytes.
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

// Whether anything is in the sums before tile `seen`. Without a window what the last steps have
// added may be.
__device__ bool any_before(const Sequence &sequence, int seen) {
    return seen > 0 || WINDOWLESS && sequence.position > 0;
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

// ---- tiles in shared memory ----

// Rows one after the other would all begin in the same bank. For gradients and in f32 each has a
// pack more than it needs; else columns lie in panels of 64, where a row's packs change places.
#if SPLIT && !defined(BACKWARD)
#define SWIZZLED 1
#else
#define SWIZZLED 0
#endif
#define KEY_ROW (SWIZZLED ? D : D + PACK)
#define VALUE_ROW (SWIZZLED ? E : E + PACK)

// Where an element of a tile of rows of WIDTH is.
template <int WIDTH> __device__ int place(int row, int column) {
    if (!SWIZZLED) return row * (WIDTH + PACK) + column;
    return column / 64 * TILE * 64 + row * 64 + (column % 64 ^ row % 8 * 8);
}

#if SWIZZLED
#define SHARED(NAME) extern __shared__ __align__(1024) Element NAME[]
#else
#define SHARED(NAME) extern __shared__ __align__(16) Element NAME[]
#endif

__device__ void copy16(void *to, const void *from, bool there) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared), "l"(from), "r"(bytes));
}
__device__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> __device__ void arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
#if WGMMA
    // What copies have written is there for matrix products too.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Rows of WIDTH elements into a tile; `row(i)` is null for a row of zeros.
template <int WIDTH, int ROWS, class Row>
__device__ void load_rows(Element *to, Row row) {
    const int packs = WIDTH / PACK;
    for (int i = threadIdx.x; i < ROWS * packs; i += THREADS) {
        int r = i / packs, at = i % packs * PACK;
        const Element *from = row(r);
        copy16(to + place<WIDTH>(r, at), from ? from + at : to, from != nullptr);
    }
}

// A dense block of 64 rows. Its copies are the same distance apart on both sides.
template <int TO, int FROM> __device__ void copy16_at(u32 to, const Element *from) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;"
                 ::"r"(to), "l"(from), "n"(TO), "n"(FROM));
}
template <int WIDTH, int J = 0> __device__ void load_packs(u32 to, const Element *from) {
    const int packs = WIDTH / PACK, rows = THREADS / packs;
    if constexpr (J * rows < TILE) {
        const int stride = SWIZZLED ? 64 : WIDTH + PACK;
        copy16_at<J * rows * stride * (int)sizeof(Element), J * THREADS * 16>(to, from);
        load_packs<WIDTH, J + 1>(to, from);
    }
}
template <int WIDTH> __device__ void load_block(Element *to, const Element *from) {
    const int packs = WIDTH / PACK;
    const Element *first = to + place<WIDTH>(threadIdx.x / packs, threadIdx.x % packs * PACK);
    load_packs<WIDTH>((u32)__cvta_generic_to_shared(first), from + threadIdx.x * PACK);
}

// A tile of 64 rows to dense ones; `has(i)` says which.
template <int WIDTH, class Has>
__device__ void store_block(Element *to, const Element *from, Has has) {
    const int packs = WIDTH / PACK, rows = THREADS / packs;
    const int stride = SWIZZLED ? 64 : WIDTH + PACK;
    int row = threadIdx.x / packs;
    from += place<WIDTH>(row, threadIdx.x % packs * PACK), to += threadIdx.x * PACK;
#pragma unroll
    for (int j = 0; j * rows < TILE; j++)
        if (has(row + j * rows))
            *(float4 *)(to + j * THREADS * PACK) = *(const float4 *)(from + j * rows * stride);
}

// ---- elements ----

__device__ float exp2f_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x of a power of two that has one.
__device__ float inverse_of_power(float x) {
    return __uint_as_float((254u << 23) - __float_as_uint(x));
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
__device__ void store_mean2(Element *to, float low, float high) { store2(to, low, high); }
__device__ void widen(const float4 &pack, float *to) {
    to[0] = pack.x, to[1] = pack.y, to[2] = pack.z, to[3] = pack.w;
}
#else
__device__ float wide(Element x) { return low_of(x); }
__device__ Element narrow(float x) { return (Element)pack2(x, 0.f); }
__device__ void store2(Element *to, float low, float high) { *(u32 *)to = pack2(low, high); }
__device__ void store_mean2(Element *to, float low, float high) {
    *(u32 *)to = pack_half(low, high);
}
__device__ void widen(const float4 &pack, float *to) {
    const u32 *both = (const u32 *)&pack;
    for (int i = 0; i < 4; i++) to[2 * i] = low_of(both[i]), to[2 * i + 1] = high_of(both[i]);
}
#endif
