// Causal prefix top-k for all blocks, heads and sequences at once.
//
// One operation does everything: a warp keeps the k best of a list that is in order of position, and they come out in
// that order again. It finds the k-th best score bit by bit (32 counts), then walks over the list once; of those that
// equal the k-th best the last ones are kept, since ties go to the larger position. Nothing is ever sorted. The best
// of a union are the best of the unions' best, so with chunks of positions:
//
//   best_of_chunks   of every chunk
//   best_of_groups   of every group of chunks
//   best_before      of everything before a chunk: the groups before its group, and the chunks before it in the group
//   route_blocks     of everything before a block: what precedes its last chunk, and the beginning of that
//
// A text of one group needs neither the second kernel nor the third. A list is `top_k` candidates (`u64`: score in an
// order-preserving form, position below), padded with 0, which is less than any.

typedef unsigned int u32;
typedef unsigned long long u64;

// A score as the order sees it: larger is better, and 0 is less than any.
__device__ __forceinline__ u32 rank_of(float score, int position, int n_sink) {
    if (position < n_sink) score = __int_as_float(0x7f800000);
    else if (score != score) score = __int_as_float(0xff800000);
    else if (score == 0.0f) score = 0.0f;
    const u32 bits = __float_as_uint(score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(u32 rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

// Candidates in shared memory, `n` of them, in order of position.
struct Candidates {
    u32* rank;
    int* position;
    int n;
};

extern __shared__ uint4 shared[];

__device__ __forceinline__ Candidates no_candidates(int capacity) {
    Candidates c;
    c.rank = (u32*)shared;
    c.position = (int*)(c.rank + (capacity + 127) / 128 * 128);
    c.n = 0;
    return c;
}

// Append the real ones of `n` lists of `top_k` candidates that follow each other.
__device__ __forceinline__ void append_lists(Candidates& c, const u64* lists, long n, int top_k) {
    const int lane = threadIdx.x;
    for (long begin = 0; begin < n * top_k; begin += 128) {
        u64 x[4];
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = begin + e * 32 + lane < n * top_k ? lists[begin + e * 32 + lane] : 0;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const u32 real = __ballot_sync(0xffffffffu, x[e] != 0);
            const int to = c.n + __popc(real & ((1u << lane) - 1));
            if (x[e]) c.rank[to] = (u32)(x[e] >> 32), c.position[to] = (int)(u32)x[e];
            c.n += __popc(real);
        }
    }
}

// Append the positions `begin..end`.
__device__ __forceinline__ void append_scores(Candidates& c, const float* scores, int begin, int end, int G, int n_sink) {
#pragma unroll 8
    for (int position = begin + threadIdx.x; position < end; position += 32) {
        const int to = c.n + position - begin;
        c.rank[to] = rank_of(scores[(long)position * G], position, n_sink), c.position[to] = position;
    }
    c.n += max(0, end - begin);
}

// Rank of the k-th best, 0 if there are fewer; `emit(i, rank, position)` for every member, in order. Returns their number.
template <class Emit>
__device__ __forceinline__ int keep_best(const Candidates& c, int top_k, u32& worst, Emit emit) {
    const int lane = threadIdx.x, n_padded = (c.n + 127) / 128 * 128;
    for (int i = c.n + lane; i < n_padded; i += 32) c.rank[i] = 0;
    __syncwarp();
    worst = 0;
    int n_at_least = c.n;
    if (c.n >= top_k) {
        for (u32 bit = 1u << 31; bit; bit >>= 1) {
            const u32 bound = worst | bit;
            int n = 0;
#pragma unroll 8
            for (int i = lane * 4; i < n_padded; i += 128) {
                const uint4 x = *(const uint4*)(c.rank + i);
                n += (x.x >= bound) + (x.y >= bound) + (x.z >= bound) + (x.w >= bound);
            }
            n = __reduce_add_sync(0xffffffffu, n);
            if (n >= top_k) worst = bound, n_at_least = n;
        }
    }
    // Of the equals of the worst, so many at the beginning are too many.
    int n_out = max(0, n_at_least - top_k), n_members = 0;
    for (int begin = 0; begin < c.n; begin += 32) {
        const int i = begin + lane;
        const u32 rank = i < c.n ? c.rank[i] : 0;
        const u32 equal = __ballot_sync(0xffffffffu, i < c.n && rank == worst);
        const bool is_member = i < c.n && (rank > worst || (rank == worst && __popc(equal & ((1u << lane) - 1)) >= n_out));
        const u32 members = __ballot_sync(0xffffffffu, is_member);
        if (is_member) emit(n_members + __popc(members & ((1u << lane) - 1)), rank, c.position[i]);
        n_members += __popc(members);
        n_out = max(0, n_out - __popc(equal));
    }
    return n_members;
}

// Keep the best as a list.
__device__ __forceinline__ void keep_list(const Candidates& c, int top_k, u64* list) {
    u32 worst;
    const int n = keep_best(c, top_k, worst, [&](int i, u32 rank, int position) { list[i] = (u64)rank << 32 | (u32)position; });
    for (int i = n + threadIdx.x; i < top_k; i += 32) list[i] = 0;
}

// Every kernel has one warp a block; dynamic shared memory: 8 bytes a candidate, their number rounded up to 128.

// best [B, G, n_chunks, top_k]. Grid [n_chunks, G, B].
extern "C" __global__ __launch_bounds__(32) void best_of_chunks(const float* scores, const int* lens, u64* best, int T, int G, int n_sink, int top_k, int chunk_size) {
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    Candidates c = no_candidates(chunk_size);
    append_scores(c, scores + (long)b * T * G + g, chunk * chunk_size, min((chunk + 1) * chunk_size, lens[b]), G, n_sink);
    keep_list(c, top_k, best + (((long)b * G + g) * gridDim.x + chunk) * top_k);
}

// group_best [B, G, n_groups, top_k]. Grid [n_groups, B * G].
extern "C" __global__ __launch_bounds__(32) void best_of_groups(const u64* best, u64* group_best, int n_chunks, int group, int top_k) {
    const long first = (long)blockIdx.x * group;
    Candidates c = no_candidates(group * top_k);
    append_lists(c, best + (blockIdx.y * (long)n_chunks + first) * top_k, min((long)group, n_chunks - first), top_k);
    keep_list(c, top_k, group_best + ((long)blockIdx.y * gridDim.x + blockIdx.x) * top_k);
}

// before [B, G, n_chunks, top_k]. Grid [n_chunks, B * G].
extern "C" __global__ __launch_bounds__(32) void best_before(const u64* best, const u64* group_best, u64* before, int group, int n_groups, int top_k) {
    const int chunk = blockIdx.x, first = chunk / group * group;
    Candidates c = no_candidates((n_groups + group) * top_k);
    append_lists(c, group_best + (long)blockIdx.y * n_groups * top_k, chunk / group, top_k);
    append_lists(c, best + ((long)blockIdx.y * gridDim.x + first) * top_k, chunk - first, top_k);
    keep_list(c, top_k, before + ((long)blockIdx.y * gridDim.x + chunk) * top_k);
}

// indices [B, n_blocks, G, n_places], ascending and padded with -1; tau [B, n_blocks, G]. `before` is null when what
// precedes a chunk is to be had from `best`. Grid [n_blocks, G, B]; the last blocks, which have most to do, come first.
extern "C" __global__ __launch_bounds__(32) void route_blocks(const float* scores, const int* lens, const u64* best, const u64* before, int* indices, float* tau, int T,
                                                              int G, int n_blocks, int n_places, int window, int top_k, int every, int n_sink, int chunk_size,
                                                              int n_chunks) {
    const int block = n_blocks - 1 - blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    const long pair = (long)b * G + g, at = ((long)b * n_blocks + block) * G + g;
    const int n_candidates = block * every < lens[b] ? max(0, block * every + 1 - window) : 0;
    const int chunk = max(0, n_candidates - 1) / chunk_size;
    Candidates c = no_candidates((before ? top_k : (n_chunks - 1) * top_k) + chunk_size);
    if (before) append_lists(c, before + (pair * n_chunks + chunk) * top_k, 1, top_k);
    else append_lists(c, best + pair * n_chunks * top_k, chunk, top_k);
    append_scores(c, scores + (long)b * T * G + g, chunk * chunk_size, n_candidates, G, n_sink);
    u32 worst;
    const int n = keep_best(c, top_k, worst, [&](int i, u32, int position) { indices[at * n_places + i] = position; });
    for (int i = n + threadIdx.x; i < n_places; i += 32) indices[at * n_places + i] = -1;
    if (threadIdx.x == 0) tau[at] = worst ? score_of(worst) : __int_as_float(0xff800000);
}
