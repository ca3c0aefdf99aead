// Causal prefix top-k for all blocks, heads and sequences at once.
//
// One operation does everything: four warps keep the k best of a list that is in order of position, and they come out
// in that order again. They find the k-th best score two bits at a time, by counting, then walk over the list once; of
// those that equal the k-th best the last ones are kept, since ties go to the larger position. Nothing is ever sorted.
// The best of a union are the best of its parts' best, so with chunks of positions:
//
//   best_of_chunks   of every chunk
//   best_of_groups   of every group of chunks
//   best_before      of everything before a chunk: the groups before its group, and the chunks before it in the group
//   route_blocks     of everything before a block: what precedes its last chunk, and the beginning of that
//
// A text of one group needs neither the second kernel nor the third. A list is `top_k` candidates (`u64`: score in an
// order-preserving form, position below). A chunk is no shorter than that, so whatever precedes a candidate is full.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr u32 RANK_OF_INFINITY = 0xff800000u;

// A score as the order sees it: larger is better, and 0 is less than any. NaN loses to everything, -0 equals 0.
__device__ __forceinline__ u32 rank_of(float score) {
    score = score != score ? __int_as_float(0xff800000) : score == 0.0f ? 0.0f : score;
    const u32 bits = __float_as_uint(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(u32 rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

extern __shared__ uint4 shared[];

// Candidates in shared memory, `n` of them, in order of position.
struct Candidates {
    u32* rank;
    int* position;
    int n;
};

// Room for candidates, in a multiple of what the warps count at a time.
__device__ __forceinline__ int padded(int n) { return (n + 4 * THREADS - 1) / (4 * THREADS) * (4 * THREADS); }

__device__ __forceinline__ Candidates no_candidates(int capacity) {
    Candidates c;
    c.rank = (u32*)shared;
    c.position = (int*)(c.rank + padded(capacity));
    c.n = 0;
    return c;
}

// Append `n` candidates.
__device__ __forceinline__ void append_list(Candidates& c, const u64* list, int n) {
    for (int begin = threadIdx.x; begin < n; begin += 8 * THREADS) {
        u64 x[8];
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = list[min(begin + e * THREADS, n - 1)];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int i = begin + e * THREADS;
            if (i < n) c.rank[c.n + i] = (u32)(x[e] >> 32), c.position[c.n + i] = (int)(u32)x[e];
        }
    }
    c.n += n;
}

// Append the positions `begin..end`. `scores` is the sequence's, `stride` apart.
__device__ __forceinline__ void append_scores(Candidates& c, const float* scores, int begin, int end, int stride, int n_sink) {
    const int n = max(0, end - begin);
    for (int first = threadIdx.x; first < n; first += 8 * THREADS) {
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = scores[(long)(begin + min(first + e * THREADS, n - 1)) * stride];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int i = first + e * THREADS;
            if (i < n) c.rank[c.n + i] = begin + i < n_sink ? RANK_OF_INFINITY : rank_of(x[e]), c.position[c.n + i] = begin + i;
        }
    }
    c.n += n;
}

// Sum over the warps of three numbers, the first two below 2^16 a warp. `turn` alternates.
__device__ __forceinline__ void sum_of_warps(int (&x)[3], int turn) {
    __shared__ int2 of_warp[2][WARPS];
    const int first = __reduce_add_sync(0xffffffffu, x[0] | x[1] << 16), last = __reduce_add_sync(0xffffffffu, x[2]);
    if (threadIdx.x % 32 == 0) of_warp[turn][threadIdx.x / 32] = make_int2(first, last);
    __syncthreads();
    x[0] = x[1] = x[2] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const int2 y = of_warp[turn][w];
        x[0] += y.x & 0xffff, x[1] += (u32)y.x >> 16, x[2] += y.y;
    }
}

// The rank of the k-th best, 0 if there are fewer; `emit(i, rank, position)` for every member, `i` counting them in
// order. Returns their number.
template <class Emit>
__device__ __forceinline__ int keep_best(const Candidates& c, int top_k, u32& worst, Emit emit) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = padded(c.n) / WARPS, begin = warp * share;
    for (int i = c.n + threadIdx.x; i < padded(c.n); i += THREADS) c.rank[i] = 0;
    __syncthreads();
    worst = 0;
    int n_at_least = c.n;
    if (c.n >= top_k) {
#pragma unroll 1
        for (int shift = 30; shift >= 0; shift -= 2) {
            const u32 bound[3] = {worst | 1u << shift, worst | 2u << shift, worst | 3u << shift};
            int n[3] = {};
            for (int i = begin + lane * 4; i < begin + share; i += 128) {
                const uint4 x = *(const uint4*)(c.rank + i);
#pragma unroll
                for (int e = 0; e < 3; e++) n[e] += (x.x >= bound[e]) + (x.y >= bound[e]) + (x.z >= bound[e]) + (x.w >= bound[e]);
            }
            sum_of_warps(n, shift / 2 % 2);
#pragma unroll
            for (int e = 0; e < 3; e++) {
                if (n[e] >= top_k) worst = bound[e], n_at_least = n[e];
            }
        }
    }
    // Of the equals of the worst, so many at the beginning are too many. What the warps before this one hold decides
    // where it begins.
    __shared__ int2 found[WARPS];
    int above = 0, equal = 0;
    for (int i = begin + lane; i < min(begin + share, c.n); i += 32) above += c.rank[i] > worst, equal += c.rank[i] == worst;
    above = __reduce_add_sync(0xffffffffu, above), equal = __reduce_add_sync(0xffffffffu, equal);
    if (lane == 0) found[warp] = make_int2(above, equal);
    __syncthreads();
    const int n_out = max(0, n_at_least - top_k);
    int to = 0, equals = 0, n_members = 0;
    for (int w = 0, equals_so_far = 0; w < WARPS; w++) {
        if (w == warp) to = n_members, equals = equals_so_far;
        n_members += found[w].x + max(0, equals_so_far + found[w].y - n_out) - max(0, equals_so_far - n_out);
        equals_so_far += found[w].y;
    }
    for (int first = begin; first < min(begin + share, c.n); first += 32) {
        const int i = first + lane;
        const bool real = i < c.n && i < begin + share;
        const u32 rank = real ? c.rank[i] : 0;
        const int position = real ? c.position[i] : 0;
        const u32 equal_votes = __ballot_sync(0xffffffffu, real && rank == worst);
        const bool is_member = real && (rank > worst || (rank == worst && equals + __popc(equal_votes & ((1u << lane) - 1)) >= n_out));
        const u32 votes = __ballot_sync(0xffffffffu, is_member);
        if (is_member) emit(to + __popc(votes & ((1u << lane) - 1)), rank, position);
        to += __popc(votes), equals += __popc(equal_votes);
    }
    return n_members;
}

// Keep the best as a list.
__device__ __forceinline__ void keep_list(const Candidates& c, int top_k, u64* list) {
    u32 worst;
    const int n = keep_best(c, top_k, worst, [&](int i, u32 rank, int position) { list[i] = (u64)rank << 32 | (u32)position; });
    for (int i = n + threadIdx.x; i < top_k; i += THREADS) list[i] = 0;
}

// Every kernel has blocks of 128 threads; dynamic shared memory: 8 bytes a candidate, their number rounded up to 512.

// best [B, G, n_chunks, top_k]. Grid [n_chunks, G, B].
extern "C" __global__ __launch_bounds__(THREADS) void best_of_chunks(const float* scores, const int* lens, u64* best, int T, int G, int n_sink, int top_k, int chunk_size) {
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    Candidates c = no_candidates(chunk_size);
    append_scores(c, scores + (long)b * T * G + g, chunk * chunk_size, min((chunk + 1) * chunk_size, lens[b]), G, n_sink);
    keep_list(c, top_k, best + (((long)b * G + g) * gridDim.x + chunk) * top_k);
}

// group_best [B, G, n_groups, top_k]. Grid [n_groups, B * G].
extern "C" __global__ __launch_bounds__(THREADS) void best_of_groups(const u64* best, u64* group_best, int n_chunks, int group, int top_k) {
    const long first = (long)blockIdx.x * group;
    Candidates c = no_candidates(group * top_k);
    append_list(c, best + (blockIdx.y * (long)n_chunks + first) * top_k, (int)min((long)group, n_chunks - first) * top_k);
    keep_list(c, top_k, group_best + ((long)blockIdx.y * gridDim.x + blockIdx.x) * top_k);
}

// before [B, G, n_chunks, top_k]. Grid [n_chunks, B * G].
extern "C" __global__ __launch_bounds__(THREADS) void best_before(const u64* best, const u64* group_best, u64* before, int group, int n_groups, int top_k) {
    const int chunk = blockIdx.x, first = chunk / group * group;
    Candidates c = no_candidates((n_groups + group) * top_k);
    append_list(c, group_best + (long)blockIdx.y * n_groups * top_k, chunk / group * top_k);
    append_list(c, best + ((long)blockIdx.y * gridDim.x + first) * top_k, (chunk - first) * top_k);
    keep_list(c, top_k, before + ((long)blockIdx.y * gridDim.x + chunk) * top_k);
}

// indices [B, n_blocks, G, n_places], ascending and padded with -1; tau [B, n_blocks, G]. `before` is null when what
// precedes a chunk is to be had from `best`. Grid [n_blocks, G, B]; the last blocks, which have most to do, come first.
extern "C" __global__ __launch_bounds__(THREADS) void route_blocks(const float* scores, const int* lens, const u64* best, const u64* before, int* indices, float* tau, int T,
                                                              int G, int n_blocks, int n_places, int window, int top_k, int every, int n_sink, int chunk_size,
                                                              int n_chunks) {
    const int block = n_blocks - 1 - blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    const long pair = (long)b * G + g, at = ((long)b * n_blocks + block) * G + g;
    const int n_candidates = block * every < lens[b] ? max(0, block * every + 1 - window) : 0;
    const int chunk = max(0, n_candidates - 1) / chunk_size;
    Candidates c = no_candidates((before ? top_k : (n_chunks - 1) * top_k) + chunk_size);
    if (before) append_list(c, before + (pair * n_chunks + chunk) * top_k, chunk > 0 ? top_k : 0);
    else append_list(c, best + pair * n_chunks * top_k, chunk * top_k);
    append_scores(c, scores + (long)b * T * G + g, chunk * chunk_size, n_candidates, G, n_sink);
    u32 worst;
    const int n = keep_best(c, top_k, worst, [&](int i, u32, int position) { indices[at * n_places + i] = position; });
    for (int i = n + threadIdx.x; i < n_places; i += THREADS) indices[at * n_places + i] = -1;
    if (threadIdx.x == 0) tau[at] = worst ? score_of(worst) : __int_as_float(0xff800000);
}

// The rows of `x` with `value` where the row's position is a sink.
extern "C" __global__ void with_sinks(const float* x, const u32* positions, float* filled, u64 n, u32 T, u32 G, u32 n_sink, float value) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        filled[i] = positions[i / G % T] < n_sink ? value : x[i];
    }
}
