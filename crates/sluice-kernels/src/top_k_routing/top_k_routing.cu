// Causal prefix top-k for all blocks, heads and sequences at once. Compiled with KEPT, a power of two from 32
// to 4096 that is at least the budget `top_k`; `top_k` is at least 1.
//
// The order is total: score first, then position, packed into one integer whose larger value wins. A set is whatever
// of its candidates reaches the k-th best of them, so the blocks are independent given the best before a position not
// far away:
//
//   sort_chunks   the best of every chunk of positions, sorted; chunks in parallel
//   merge_chunks  the best of every group of chunks; groups in parallel
//   scan_groups   the best of everything before every group; heads in parallel
//   route_blocks  the best before the chunk, from those; then the sets of the blocks that end in it; chunks in parallel
//
// `best` [B, G, n_chunks, KEPT] and `group_best` [B, G, n_groups, KEPT] hold sorted lists. A text of one group needs
// neither the second kernel nor the third.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int CHUNK = KEPT > 1024 ? KEPT : 1024, THREADS = 512;

// A candidate as the order sees it; 0 is less than any.
__device__ __forceinline__ u64 candidate(float score, int position, int n_sink) {
    if (position < n_sink) score = __int_as_float(0x7f800000);
    else if (score != score) score = __int_as_float(0xff800000);
    else if (score == 0.0f) score = 0.0f;
    const u32 bits = __float_as_uint(score);
    return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (u32)position;
}

__device__ __forceinline__ int position_of(u64 candidate) { return (int)(u32)candidate; }

__device__ __forceinline__ float score_of(u64 candidate) {
    const u32 bits = candidate >> 32;
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// A list of N numbers in the registers of a block of 512 threads: thread `i` holds the places `i * E .. (i + 1) * E`, and
// nothing when that is past the end. Sorting networks on it exchange within a thread, within a warp, or, a barrier
// each, through shared memory.
template <int N>
struct List {
    static constexpr int E = N > THREADS ? N / THREADS : 1;
    static constexpr bool ALL = N >= THREADS;
    u64 x[E];

    __device__ __forceinline__ static bool here() { return ALL || threadIdx.x < N; }
    __device__ __forceinline__ static int place(int e) { return threadIdx.x * E + e; }

    // One exchange of the network: the larger of two places `stride` apart goes to the front where `size` does not divide
    // the place, to the back elsewhere.
    __device__ __forceinline__ void exchange(int size, int stride, u64* buffer) {
        const bool far = stride >= 32 * E;
        if (far) {
            __syncthreads();
            if (here()) {
#pragma unroll
                for (int e = 0; e < E; e++) buffer[e * THREADS + threadIdx.x] = x[e];
            }
            __syncthreads();
        }
#pragma unroll
        for (int e = 0; e < E; e++) {
            u64 other;
            if (far) other = here() ? buffer[e * THREADS + (threadIdx.x ^ (stride / E))] : 0;
            else other = __shfl_xor_sync(0xffffffffu, x[e], stride / E);
            const bool wants_larger = ((place(e) & stride) == 0) == ((place(e) & size) == 0);
            if (wants_larger ? other > x[e] : other < x[e]) x[e] = other;
        }
    }

    __device__ __forceinline__ void exchange_within(int size, int stride) {
#pragma unroll
        for (int e = 0; e < E; e++) {
            if ((e & stride) == 0) {
                const u64 p = x[e], q = x[e | stride];
                if ((p < q) == ((place(e) & size) == 0)) x[e] = q, x[e | stride] = p;
            }
        }
    }

    // Put in order what rises and falls only once in every `size` places. Loops rather than straight code, which would
    // take longer to fetch than to run.
    __device__ __forceinline__ void merge_descending(int size, u64* buffer) {
#pragma unroll 1
        for (int stride = size / 2; stride >= E; stride /= 2) exchange(size, stride, buffer);
#pragma unroll
        for (int stride = E / 2; stride > 0; stride /= 2) {
            if (stride < size) exchange_within(size, stride);
        }
    }

    // Sort the first `n` places, a power of two.
    __device__ __forceinline__ void sort_descending(int n, u64* buffer) {
#pragma unroll 1
        for (int size = 2; size <= n; size *= 2) merge_descending(size, buffer);
    }

    // The best of this list and an ascending one.
    __device__ __forceinline__ void take_best(const List& ascending, u64* buffer) {
#pragma unroll
        for (int e = 0; e < E; e++) x[e] = x[e] > ascending.x[e] ? x[e] : ascending.x[e];
        merge_descending(N, buffer);
    }

    __device__ __forceinline__ void load(const u64* from) {
#pragma unroll
        for (int e = 0; e < E; e++) x[e] = from && here() ? from[place(e)] : 0;
    }

    __device__ __forceinline__ void load_ascending(const u64* from) {
#pragma unroll
        for (int e = 0; e < E; e++) x[e] = from && here() ? from[N - 1 - place(e)] : 0;
    }

    __device__ __forceinline__ void store(u64* to) const {
        if (here()) {
#pragma unroll
            for (int e = 0; e < E; e++) to[place(e)] = x[e];
        }
    }
};

// Grid [n_chunks, G, B], 512 threads, CHUNK * 8 bytes of dynamic shared memory.
extern "C" __global__ __launch_bounds__(THREADS) void sort_chunks(const float* scores, const int* lens, u64* best, int T, int G, int n_sink) {
    extern __shared__ u64 buffer[];
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z, len = lens[b];
    List<CHUNK> list;
#pragma unroll
    for (int e = 0; e < list.E; e++) {
        const int position = chunk * CHUNK + e * THREADS + threadIdx.x;
        list.x[e] = position < len ? candidate(scores[((long)b * T + position) * G + g], position, n_sink) : 0;
    }
    list.sort_descending(CHUNK, buffer);
    best += (((long)b * G + g) * gridDim.x + chunk) * KEPT;
#pragma unroll
    for (int e = 0; e < list.E; e++) {
        if (list.place(e) < KEPT) best[list.place(e)] = list.x[e];
    }
}

// Grid [n_groups, B * G], 512 threads.
extern "C" __global__ __launch_bounds__(THREADS) void merge_chunks(const u64* best, u64* group_best, int n_chunks, int group) {
    __shared__ u64 buffer[KEPT > THREADS ? KEPT : THREADS];
    best += ((long)blockIdx.y * n_chunks + (long)blockIdx.x * group) * KEPT;
    n_chunks = min(group, n_chunks - (int)blockIdx.x * group);
    List<KEPT> kept, next;
    kept.load(best);
    next.load_ascending(n_chunks > 1 ? best + KEPT : nullptr);
    for (int chunk = 1; chunk < n_chunks; chunk++) {
        const List<KEPT> now = next;
        next.load_ascending(chunk + 1 < n_chunks ? best + (long)(chunk + 1) * KEPT : nullptr);
        kept.take_best(now, buffer);
    }
    kept.store(group_best + ((long)blockIdx.y * gridDim.x + blockIdx.x) * KEPT);
}

// In place: from the best of every group to the best of everything before it. Grid [B * G], 512 threads.
extern "C" __global__ __launch_bounds__(THREADS) void scan_groups(u64* group_best, int n_groups) {
    __shared__ u64 buffer[KEPT > THREADS ? KEPT : THREADS];
    group_best += (long)blockIdx.x * n_groups * KEPT;
    List<KEPT> kept, next;
    kept.load(nullptr);
    next.load_ascending(group_best);
    for (int i = 0; i < n_groups; i++) {
        const List<KEPT> now = next;
        next.load_ascending(i + 1 < n_groups ? group_best + (long)(i + 1) * KEPT : nullptr);
        // Everyone has read this group's list before anyone overwrites it.
        __syncthreads();
        kept.store(group_best + (long)i * KEPT);
        kept.take_best(now, buffer);
    }
}

// Candidates that some block of a chunk may keep.
struct Members {
    u64 kept[KEPT];                // Best before the chunk, descending.
    u64 by_position[KEPT];         // Inverted position and rank, so that descending means ascending positions.
    u64 admitted[CHUNK];           // Of the chunk, by position.
    u64 admitted_sorted[CHUNK];    // Descending.
    u64 sorted[KEPT + CHUNK];      // Both, descending.
    int n_of_warp[THREADS / 32];
};

// How many of `n` descending numbers are larger than `x`.
__device__ __forceinline__ int larger(const u64* sorted, int n, u64 x) {
    int low = 0, high = n;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (sorted[middle] > x) low = middle + 1;
        else high = middle;
    }
    return low;
}

// indices [B, n_blocks, G, n_places], ascending and padded with -1; tau [B, n_blocks, G]. Grid [n_chunks, G, B],
// 512 threads, sizeof(Members) bytes of dynamic shared memory.
extern "C" __global__ __launch_bounds__(THREADS) void route_blocks(const float* scores, const int* lens, const u64* best, const u64* group_best, int* indices,
                                                                   float* tau, int T, int G, int n_blocks, int n_places, int window, int top_k, int every,
                                                                   int n_sink, int group) {
    extern __shared__ u64 shared[];
    Members& m = *(Members*)shared;
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z, len = lens[b], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long pair = (long)b * G + g;
    List<KEPT> kept, next;
    kept.load(group_best ? group_best + (pair * ((gridDim.x + group - 1) / group) + chunk / group) * KEPT : nullptr);
    best += pair * gridDim.x * KEPT;
    const int first_chunk = chunk / group * group;
    next.load_ascending(first_chunk < chunk ? best + (long)first_chunk * KEPT : nullptr);
    for (int other = first_chunk; other < chunk; other++) {
        const List<KEPT> now = next;
        next.load_ascending(other + 1 < chunk ? best + (long)(other + 1) * KEPT : nullptr);
        kept.take_best(now, m.sorted);
    }
    kept.store(m.kept);
    int n_kept = 0, n_admitted = 0;
#pragma unroll
    for (int e = 0; e < kept.E; e++) {
        const bool is_kept = kept.here() && kept.place(e) < top_k && kept.x[e] != 0;
        n_kept += __syncthreads_count(is_kept);
        kept.x[e] = is_kept ? (u64)(0xffffffffu - (u32)kept.x[e]) << 32 | kept.place(e) : 0;
    }
    const u64 threshold = m.kept[top_k - 1];
    if (n_kept > 0) kept.sort_descending(KEPT, m.sorted);
    kept.store(m.by_position);

    for (int begin = 0; begin < CHUNK; begin += THREADS) {
        const int position = chunk * CHUNK + begin + threadIdx.x;
        const u64 x = position < len ? candidate(scores[((long)b * T + position) * G + g], position, n_sink) : 0;
        const u32 vote = __ballot_sync(0xffffffffu, x > threshold);
        if (lane == 0) m.n_of_warp[warp] = __popc(vote);
        __syncthreads();
        int to = n_admitted + __popc(vote & ((1u << lane) - 1));
        for (int w = 0; w < THREADS / 32; w++) {
            if (w < warp) to += m.n_of_warp[w];
            n_admitted += m.n_of_warp[w];
        }
        if (x > threshold) m.admitted[to] = x;
        __syncthreads();
    }
    List<CHUNK> admitted;
#pragma unroll
    for (int e = 0; e < admitted.E; e++) admitted.x[e] = admitted.place(e) < n_admitted ? m.admitted[admitted.place(e)] : 0;
    int n_sorted = 2;
    while (n_sorted < n_admitted) n_sorted *= 2;
    admitted.sort_descending(n_sorted, m.sorted);
    admitted.store(m.admitted_sorted);
    __syncthreads();
    for (int i = threadIdx.x; i < n_kept; i += THREADS) m.sorted[i + larger(m.admitted_sorted, n_admitted, m.kept[i])] = m.kept[i];
    for (int i = threadIdx.x; i < n_admitted; i += THREADS) m.sorted[i + larger(m.kept, n_kept, m.admitted_sorted[i])] = m.admitted_sorted[i];
    __syncthreads();

    // Blocks whose candidates end in this chunk; a block without candidates counts as the first chunk's.
    const int first = chunk == 0 ? 0 : (chunk * CHUNK + window + every - 1) / every;
    const int end = chunk + 1 == gridDim.x ? n_blocks : min(n_blocks, ((chunk + 1) * CHUNK + window - 1) / every + 1);
    const int n_valid = (len + every - 1) / every, n = n_kept + n_admitted;
    for (int block = first + warp; block < end; block += THREADS / 32) {
        const int l = block < n_valid ? max(0, block * every + 1 - window) : 0;
        // The k-th best of the candidates before `l`.
        u64 worst = 0;
        for (int begin = 0, before = 0; begin < n && !worst; begin += 128) {
            u64 x[4];
            u32 vote[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = begin + e * 32 + lane;
                x[e] = i < n ? m.sorted[i] : ~0ull;
                vote[e] = __ballot_sync(0xffffffffu, i < n && position_of(x[e]) < l);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int more = top_k - before;
                before += __popc(vote[e]);
                if (more > 0 && before >= top_k) {
                    const u32 is_last = __ballot_sync(0xffffffffu, vote[e] >> lane & 1 && __popc(vote[e] & ((2u << lane) - 1)) == more);
                    worst = __shfl_sync(0xffffffffu, x[e], __ffs(is_last) - 1);
                }
            }
        }
        const long at = ((long)b * n_blocks + block) * G + g;
        int* to = indices + at * n_places;
        int n_members = 0;
        for (int begin = 0; begin < n && l > 0; begin += 32) {
            const int i = begin + lane;
            const u64 x = i < n_kept ? m.kept[(u32)m.by_position[i]] : i < n ? m.admitted[i - n_kept] : ~0ull;
            const bool is_member = i < n && position_of(x) < l && x >= worst;
            const u32 vote = __ballot_sync(0xffffffffu, is_member);
            if (is_member) to[n_members + __popc(vote & ((1u << lane) - 1))] = position_of(x);
            n_members += __popc(vote);
        }
        for (int i = n_members + lane; i < n_places; i += 32) to[i] = -1;
        if (lane == 0) tau[at] = worst ? score_of(worst) : __int_as_float(0xff800000);
    }
}
