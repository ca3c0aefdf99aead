// Causal prefix top-k for all blocks, heads and sequences at once. Compiled with KEPT, a power of two from 32
// to 4096 that is at least the budget `top_k`; `top_k` is at least 1.
//
// The order is total: score first, then position, packed into one integer whose larger value wins. A set is whatever
// of its candidates reaches the k-th best of them, so the blocks are independent given the best before a position not
// far away:
//
//   sort_chunks   the best of every chunk of positions, sorted; chunks in parallel
//   scan_chunks   the best of everything before every chunk of a group, and of the group; groups in parallel
//   scan_chunks   the same over the groups
//   route_blocks  the sets of the blocks: the best before the group, before the chunk, and of the chunk; in parallel
//
// `best` [B, G, n_chunks, KEPT] and `group_best` [B, G, n_groups, KEPT] hold sorted lists, first those of the chunks
// and groups themselves, then, in place, those of everything before them.

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

// Sort n numbers, a power of two, in shared memory, descending.
__device__ __forceinline__ void sort_descending(u64* x, int n) {
    for (int size = 2; size <= n; size *= 2) {
        for (int stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < n / 2; i += THREADS) {
                const int a = i + (i & -stride), b = a + stride;
                const u64 p = x[a], q = x[b];
                if ((p < q) == ((a & size) == 0)) x[a] = q, x[b] = p;
            }
        }
    }
    __syncthreads();
}

// Grid [n_chunks, G, B], 512 threads, CHUNK * 8 bytes of dynamic shared memory.
extern "C" __global__ __launch_bounds__(THREADS) void sort_chunks(const float* scores, const int* lens, u64* best, int T, int G, int n_sink) {
    extern __shared__ u64 sorted[];
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z, len = lens[b];
    for (int i = threadIdx.x; i < CHUNK; i += THREADS) {
        const int position = chunk * CHUNK + i;
        sorted[i] = position < len ? candidate(scores[((long)b * T + position) * G + g], position, n_sink) : 0;
    }
    sort_descending(sorted, CHUNK);
    best += (((long)b * G + g) * gridDim.x + chunk) * KEPT;
    for (int i = threadIdx.x; i < KEPT; i += THREADS) best[i] = sorted[i];
}

constexpr int SCANNERS = KEPT < 1024 ? KEPT : 1024, EACH = KEPT / SCANNERS;

// `group_best` may be null. Grid [n_groups, B * G], SCANNERS threads. Thread `i` holds the places `e * SCANNERS + i` of
// the sorted list.
extern "C" __global__ __launch_bounds__(SCANNERS) void scan_chunks(u64* best, u64* group_best, int n_chunks, int group) {
    __shared__ u64 exchange[2][SCANNERS];
    best += ((long)blockIdx.y * n_chunks + (long)blockIdx.x * group) * KEPT;
    n_chunks = min(group, n_chunks - (int)blockIdx.x * group);
    const int i = threadIdx.x;
    u64 kept[EACH], next[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) kept[e] = 0, next[e] = best[KEPT - 1 - (e * SCANNERS + i)];
    for (int chunk = 0; chunk < n_chunks; chunk++, best += KEPT) {
        u64 x[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) x[e] = next[e] > kept[e] ? next[e] : kept[e];
        if (chunk + 1 < n_chunks) {
#pragma unroll
            for (int e = 0; e < EACH; e++) next[e] = best[2 * KEPT - 1 - (e * SCANNERS + i)];
        }
        // Everyone has read this chunk's list (a barrier ago, or at the start) before anyone overwrites it.
        __syncthreads();
#pragma unroll
        for (int e = 0; e < EACH; e++) best[e * SCANNERS + i] = kept[e];
        // The maxima of a descending and an ascending list are the best of both and rise and fall only once: merge.
#pragma unroll
        for (int stride = EACH / 2; stride > 0; stride /= 2) {
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                if ((e & stride) == 0 && x[e] < x[e + stride]) {
                    const u64 y = x[e];
                    x[e] = x[e + stride], x[e + stride] = y;
                }
            }
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            int turn = 0;
#pragma unroll
            for (int stride = SCANNERS / 2; stride > 0; stride /= 2) {
                u64 other;
                if (stride >= 32) {
                    exchange[turn][i] = x[e];
                    __syncthreads();
                    other = exchange[turn][i ^ stride];
                    turn ^= 1;
                } else {
                    other = __shfl_xor_sync(0xffffffffu, x[e], stride);
                }
                if ((i & stride) == 0 ? other > x[e] : other < x[e]) x[e] = other;
            }
            __syncthreads();
            kept[e] = x[e];
        }
    }
    if (group_best) {
#pragma unroll
        for (int e = 0; e < EACH; e++) group_best[((long)blockIdx.y * gridDim.x + blockIdx.x) * KEPT + e * SCANNERS + i] = kept[e];
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
    best += (pair * gridDim.x + chunk) * KEPT;
    group_best += (pair * ((gridDim.x + group - 1) / group) + chunk / group) * KEPT;
    for (int i = threadIdx.x; i < KEPT; i += THREADS) {
        const u64 x = best[i], y = group_best[KEPT - 1 - i];
        m.kept[i] = x > y ? x : y;
    }
    for (int stride = KEPT / 2; stride > 0; stride /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEPT / 2; i += THREADS) {
            const int a = i + (i & -stride);
            const u64 x = m.kept[a], y = m.kept[a + stride];
            if (x < y) m.kept[a] = y, m.kept[a + stride] = x;
        }
    }
    __syncthreads();
    const u64 threshold = m.kept[top_k - 1];
    int n_kept = 0, n_admitted = 0;
    for (int begin = 0; begin < KEPT; begin += THREADS) {
        const int i = begin + threadIdx.x;
        const bool is_kept = i < top_k && m.kept[i] != 0;
        n_kept += __syncthreads_count(is_kept);
        if (i < KEPT) m.by_position[i] = is_kept ? (u64)(0xffffffffu - (u32)m.kept[i]) << 32 | i : 0;
    }
    sort_descending(m.by_position, KEPT);

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
        if (x > threshold) m.admitted[to] = m.admitted_sorted[to] = x;
        __syncthreads();
    }
    int padded = 1;
    while (padded < n_admitted) padded *= 2;
    for (int i = n_admitted + threadIdx.x; i < padded; i += THREADS) m.admitted_sorted[i] = 0;
    sort_descending(m.admitted_sorted, padded);
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
        for (int begin = 0, before = 0; begin < n; begin += 32) {
            const u64 x = begin + lane < n ? m.sorted[begin + lane] : ~0ull;
            const bool is_candidate = position_of(x) < l && begin + lane < n;
            const u32 vote = __ballot_sync(0xffffffffu, is_candidate);
            const u32 is_last = __ballot_sync(0xffffffffu, is_candidate && before + __popc(vote & ((2u << lane) - 1)) == top_k);
            if (is_last) {
                worst = __shfl_sync(0xffffffffu, x, __ffs(is_last) - 1);
                break;
            }
            before += __popc(vote);
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
