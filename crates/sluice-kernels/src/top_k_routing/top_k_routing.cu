// Causal prefix top-k for all blocks, heads and sequences at once. Compiled with KEPT, a power of two from 32
// to 4096 that is at least the budget `top_k`; `top_k` is at least 1.
//
// The order is total: score first, then position, packed into one integer whose larger value wins. A kept candidate
// leaves when the k-th better one arrives and never returns, so a candidate's whole life is two positions. That makes
// the blocks independent, given the kept set at a position not far before:
//
//   sort_chunks   the best of every chunk of positions, sorted; chunks in parallel
//   scan_chunks   the best of everything before every chunk; one merge of two sorted lists a chunk, heads in parallel
//   route_blocks  from those, who of the chunk is admitted, when each member leaves, and the blocks' sets; in parallel
//
// `best` [B, G, n_chunks, KEPT] holds the lists of the first kernel and then, in place, those of the second.

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

// Sort N numbers in shared memory, descending.
template <int N>
__device__ __forceinline__ void sort_descending(u64* x) {
    for (int size = 2; size <= N; size *= 2) {
        for (int stride = size / 2; stride > 0; stride /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < N / 2; i += THREADS) {
                const int a = i / stride * stride * 2 + i % stride, b = a + stride;
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
    sort_descending<CHUNK>(sorted);
    best += (((long)b * G + g) * gridDim.x + chunk) * KEPT;
    for (int i = threadIdx.x; i < KEPT; i += THREADS) best[i] = sorted[i];
}

constexpr int SCANNERS = KEPT < 1024 ? KEPT : 1024, EACH = KEPT / SCANNERS;

// Grid [B * G], SCANNERS threads. Thread `i` holds the places `e * SCANNERS + i` of the sorted list.
extern "C" __global__ __launch_bounds__(SCANNERS) void scan_chunks(u64* best, int n_chunks) {
    __shared__ u64 exchange[2][SCANNERS];
    best += (long)blockIdx.x * n_chunks * KEPT;
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
}

// Positions of a chunk that some block may keep, and how long each member lives.
struct Members {
    u64 kept[KEPT];      // Best before the chunk, descending.
    u64 by_position[KEPT]; // Inverted position and rank, so that descending means ascending positions.
    u64 admitted[CHUNK]; // By position.
    int kept_until[KEPT], admitted_until[CHUNK];
    int n_of_warp[THREADS / 32];
};

// indices [B, n_blocks, G, n_places], ascending and padded with -1; tau [B, n_blocks, G]. Grid [n_chunks, G, B],
// 512 threads, sizeof(Members) bytes of dynamic shared memory.
extern "C" __global__ __launch_bounds__(THREADS) void route_blocks(const float* scores, const int* lens, const u64* best, int* indices, float* tau, int T, int G,
                                                                   int n_blocks, int n_places, int window, int top_k, int every, int n_sink) {
    extern __shared__ u64 shared[];
    Members& m = *(Members*)shared;
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z, len = lens[b], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    best += (((long)b * G + g) * gridDim.x + chunk) * KEPT;
    for (int i = threadIdx.x; i < KEPT; i += THREADS) m.kept[i] = i < top_k ? best[i] : 0;
    __syncthreads();
    const u64 threshold = m.kept[top_k - 1];
    int n_kept = 0, n_admitted = 0;
    for (int begin = 0; begin < KEPT; begin += THREADS) {
        const int i = begin + threadIdx.x;
        n_kept += __syncthreads_count(i < KEPT && m.kept[i] != 0);
        if (i < KEPT) m.by_position[i] = m.kept[i] ? (u64)(0xffffffffu - (u32)m.kept[i]) << 32 | i : 0;
    }
    sort_descending<KEPT>(m.by_position);

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

    // A member is out as soon as `top_k` better ones are in; a set that ends at position `l` has those with
    // position < l <= until.
    for (int i = threadIdx.x; i < n_kept + n_admitted; i += THREADS) {
        const bool old = i < n_kept;
        const u64 x = old ? m.kept[i] : m.admitted[i - n_kept];
        int better = i, from = 0;
        if (!old) {
            int low = 0, high = n_kept;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (m.kept[middle] > x) low = middle + 1;
                else high = middle;
            }
            better = low, from = i - n_kept + 1;
            for (int j = 0; j < i - n_kept; j++) better += m.admitted[j] > x;
        }
        int until = better < top_k ? 0x7fffffff : position_of(x);
        for (int j = from; j < n_admitted && better < top_k; j++) {
            better += m.admitted[j] > x;
            if (better >= top_k) until = position_of(m.admitted[j]);
        }
        if (old) m.kept_until[i] = until;
        else m.admitted_until[i - n_kept] = until;
    }
    __syncthreads();

    // Blocks whose candidates end in this chunk; a block without candidates counts as the first chunk's.
    const int first = chunk == 0 ? 0 : (chunk * CHUNK + window + every - 1) / every;
    const int end = chunk + 1 == gridDim.x ? n_blocks : min(n_blocks, ((chunk + 1) * CHUNK + window - 1) / every + 1);
    const int n_valid = (len + every - 1) / every;
    for (int block = first + warp; block < end; block += THREADS / 32) {
        const long at = ((long)b * n_blocks + block) * G + g;
        int* to = indices + at * n_places;
        const int l = block < n_valid ? max(0, block * every + 1 - window) : 0;
        int n = 0;
        u64 worst = ~0ull;
        for (int begin = 0; begin < n_kept + n_admitted && l > 0; begin += 32) {
            const int i = begin + lane;
            u64 x = 0;
            int until = -1;
            if (i < n_kept) {
                const int rank = (u32)m.by_position[i];
                x = m.kept[rank], until = m.kept_until[rank];
            } else if (i < n_kept + n_admitted) {
                x = m.admitted[i - n_kept], until = m.admitted_until[i - n_kept];
            }
            const bool is_member = position_of(x) < l && l <= until;
            const u32 vote = __ballot_sync(0xffffffffu, is_member);
            if (is_member) {
                to[n + __popc(vote & ((1u << lane) - 1))] = position_of(x);
                worst = worst < x ? worst : x;
            }
            n += __popc(vote);
        }
        for (int i = n + lane; i < n_places; i += 32) to[i] = -1;
#pragma unroll
        for (int d = 16; d > 0; d /= 2) {
            const u64 other = __shfl_xor_sync(0xffffffffu, worst, d);
            worst = worst < other ? worst : other;
        }
        if (lane == 0) tau[at] = n == top_k ? score_of(worst) : __int_as_float(0xff800000);
    }
}
