// What went before each segment, from the sums of the segments and of the state; then the state as
// it is after the last one.

extern "C" __global__ void __launch_bounds__(256) scan(const Call call) {
    int kv = blockIdx.y, element = blockIdx.x * 256 + threadIdx.x;
    const Sequence &sequence = call.sequences[blockIdx.z];
    const Head head = call.heads[kv];
    int f = element / E, first_tile = sequence.position / TILE;
    int last_tile = (sequence.position + sequence.n - 1) / TILE;
    int segments = (last_tile - first_tile) / call.segment_tiles + 1;
    float c = NEVER, z = 0.f, s = 0.f;
    State state = state_of(call, head, max(sequence.slot, 0));
    // Until a chunk has left the window the state's sums mean nothing.
    int kept = first_kept(head, sequence.position);
    if (sequence.slot >= 0 && kept > 0 && state.z[f] > 0.f) {
        c = state.c[f] + head.decay * TILE * (first_tile - kept);
        z = state.z[f];
        s = state.s[element];
    }
    const int ahead = 8;
    for (int i = 0; i < segments; i += ahead) {
        float next[ahead][3];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            long at = (long)(sequence.segment + min(i + j, segments - 1)) * call.kv_heads + kv;
            const float *from = call.segment_sums + at * M * (E + 2);
            next[j][0] = from[f], next[j][1] = from[M + f], next[j][2] = from[2 * M + element];
        }
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            if (i + j >= segments) break;
            long at = (long)(sequence.segment + i + j) * call.kv_heads + kv;
            call.before[at * M * E + element] = narrow(z > 0.f ? s / z : 0.f);
            if (element % E == 0) call.before_level[at * M + f] = z > 0.f ? c + log2f(z) : NEVER;
            float top = fmaxf(c, next[j][0]), frame = top == NEVER ? 0.f : top;
            float own = exp2f(c - frame), others = exp2f(next[j][0] - frame);
            c = top;
            z = z * own + next[j][1] * others;
            s = s * own + next[j][2] * others;
            // The next segment's exponents are relative to its own beginning.
            if (i + j + 1 < segments) c += head.decay * TILE * call.segment_tiles;
        }
    }
    if (sequence.slot >= 0) {
        int base = first_tile + (segments - 1) * call.segment_tiles;
        __syncthreads();  // threads of a row have all read what is overwritten now
        if (element % E == 0) {
            float decay = head.decay * TILE * (first_seen(head, last_tile) - base);
            state.c[f] = z > 0.f ? c + decay : 0.f;
            state.z[f] = z;
        }
        state.s[element] = s;
    }
}

// A row, by all threads; of zeros if there is none.
template <int WIDTH> __device__ void copy_row(Element *to, const Element *from) {
    for (int i = threadIdx.x; i < WIDTH / PACK; i += THREADS)
        ((float4 *)to)[i] = from ? ((const float4 *)from)[i] : make_float4(0.f, 0.f, 0.f, 0.f);
}

// Keys and values go to the rings and to the sinks of the states, for the next call.
extern "C" __global__ void __launch_bounds__(THREADS) keep(const Call call) {
    int kv = blockIdx.x;
    const Sequence &sequence = call.sequences[blockIdx.y];
    const Head head = call.heads[kv];
    const Keys keys(call, head, sequence, kv);
    const State &state = keys.state;
    int end = sequence.position + sequence.n, begin = max(sequence.position, end - head.ring);
    for (int p = begin + blockIdx.z; p < end; p += gridDim.z) {
        int row = p % head.ring;
        bool valid = keys.valid(p);
        copy_row<D>(state.ring_k + row * D, valid ? keys.key(p) : nullptr);
        copy_row<E>(state.ring_v + row * E, valid ? keys.value(p) : nullptr);
        if (threadIdx.x == 0) state.valid[row] = valid;
    }
    for (int s = blockIdx.z; s < sequence.sinks; s += gridDim.z) {
        int p = sequence.sink[s];
        if (p < sequence.position) continue;
        copy_row<D>(state.sink_k + s * D, keys.key(p));
        copy_row<E>(state.sink_v + s * E, keys.value(p));
    }
}
