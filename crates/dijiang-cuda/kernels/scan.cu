// The sums of segments become those of what went before each, state included; then the state as it
// is after the last one. For gradients the same from the end: what comes after each.

// BACK: from the end, with a number more for each feature, behind the others.
template <bool BACK>
__device__ void scan_segments(const Call &call, float *all) {
    const int stride = M * (E + 2 + BACK), extra = M * (E + 2);
    int kv = blockIdx.y, element = blockIdx.x * 256 + threadIdx.x;
    const Sequence &sequence = call.sequences[blockIdx.z];
    const Head head = call.heads[kv];
    int f = element / E, first_tile = sequence.position / TILE;
    bool leads = element % E == 0;
    int last_tile = (sequence.position + sequence.n - 1) / TILE;
    int segments = (last_tile - first_tile) / call.segment_tiles + 1;
    float c = NEVER, z = 0.f, s = 0.f, x = 0.f;
    State state = state_of(call, head, max(sequence.slot, 0));
    // Until a chunk has left the window the state's sums mean nothing.
    int kept = first_kept(head, sequence.position);
    if (sequence.slot >= 0 && any_before(sequence, kept) && state.z[f] > 0.f) {
        c = state.c[f] + head.decay * TILE * (first_tile - kept);
        z = state.z[f];
        s = state.s[element];
    }
    auto at = [&](int i) {
        int segment = sequence.segment + (BACK ? segments - 1 - i : i);
        return all + ((long)segment * call.kv_heads + kv) * stride;
    };
    // The last one's sums are made for states only.
    int made = sequence.slot >= 0 ? segments : segments - 1;
    const int ahead = 8;
    for (int i = 0; i < segments; i += ahead) {
        float next[ahead][4];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            bool there = i + j < made;
            const float *from = at(min(i + j, segments - 1));
            next[j][0] = there ? from[f] : NEVER;
            next[j][1] = there ? from[M + f] : 0.f;
            next[j][2] = there ? from[2 * M + element] : 0.f;
            next[j][3] = BACK && there ? from[extra + f] : 0.f;
        }
        __syncthreads();  // threads of a row have all read what one of them overwrites
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            if (i + j >= segments) break;
            float *to = at(i + j);
            to[2 * M + element] = s;
            if (leads) to[f] = c, to[M + f] = z;
            if (BACK && leads) to[extra + f] = x;
            float top = fmaxf(c, next[j][0]), frame = top == NEVER ? 0.f : top;
            float own = exp2f(c - frame), others = exp2f(next[j][0] - frame);
            c = top;
            z = z * own + next[j][1] * others;
            s = s * own + next[j][2] * others;
            x = x * own + next[j][3] * others;
            // The next segment's exponents are relative to its own beginning.
            if (i + j + 1 < segments) c += head.decay * TILE * call.segment_tiles;
        }
    }
    if (sequence.slot >= 0) {
        int base = first_tile + (segments - 1) * call.segment_tiles;
        __syncthreads();
        if (leads) {
            float decay = head.decay * TILE * (first_seen(head, last_tile) - base);
            state.c[f] = z > 0.f ? c + decay : 0.f;
            state.z[f] = z;
        }
        state.s[element] = s;
    }
}

#ifndef BACKWARD
extern "C" __global__ void __launch_bounds__(256) scan(const Call call) {
    scan_segments<false>(call, call.segment_sums);
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
#endif
