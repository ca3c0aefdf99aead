// Causal prefix top-k for all blocks, heads and sequences at once.
//
// One operation does most of it: a block of threads keeps the k best of a list (k_best.cuh, which this follows).
// The best of a union are the best of its parts' best, so with chunks of positions:
//
//   best_of_chunks   of every chunk
//   best_of_groups   of every group of chunks
//   best_before      of everything before a chunk: the groups before its group, and the chunks before it in the group
//   route_blocks     of everything before a block, for a run of consecutive blocks
//
// The first block of a run gets the best of what precedes its last chunk and of that chunk's beginning. What may still
// change for the others is little: these k, and those of the run's own positions that are no worse than the k-th. A warp
// has them in registers and finds the k-th best of a block by counting. If even what precedes the chunk leaves but few of its
// candidates a chance, the first block is no exception.
//
// A text of one chunk needs the last kernel only, one of a few chunks the first as well, one of a single group all but the
// second. A list is `top_k` candidates (`u64`: score in an order-preserving form, position below). A chunk is no shorter
// than that, so whatever precedes a candidate is full.

// Those that may be among the best of some block of a run, at most: `top_k`, and what its blocks but the first add.
constexpr int CONTENDERS = 1024;

// Keep the best as a list.
__device__ __forceinline__ void keep_list(const Candidates& c, int top_k, u64* list) {
    int n;
    keep_best(c, top_k, n, [&](int i, u32 rank, int position) { list[i] = (u64)rank << 32 | (u32)position; });
    for (int i = n + threadIdx.x; i < top_k; i += THREADS) list[i] = 0;
}

// Every kernel has blocks of 512 threads; dynamic shared memory as `no_candidates` says.

// best [B, G, n_chunks, top_k]. Grid [n_chunks, G, B].
extern "C" __global__ __launch_bounds__(THREADS) void best_of_chunks(const float* scores, const int* lens, u64* best, int T, int G, int n_sink, int top_k, int chunk_size) {
    const int chunk = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    Candidates c = no_candidates(shared, 0);
    append_scores(c, scores + (long)b * T * G + g, chunk * chunk_size, min((chunk + 1) * chunk_size, lens[b]), G, n_sink);
    keep_list(c, top_k, best + (((long)b * G + g) * gridDim.x + chunk) * top_k);
}

// group_best [B, G, n_groups, top_k]. Grid [n_groups, B * G].
extern "C" __global__ __launch_bounds__(THREADS) void best_of_groups(const u64* best, u64* group_best, int n_chunks, int group, int top_k) {
    const long first = (long)blockIdx.x * group;
    Candidates c = no_candidates(shared, group * top_k);
    append_list(c, best + (blockIdx.y * (long)n_chunks + first) * top_k, (int)min((long)group, n_chunks - first) * top_k);
    keep_list(c, top_k, group_best + ((long)blockIdx.y * gridDim.x + blockIdx.x) * top_k);
}

// before [B, G, n_chunks, top_k]. Grid [n_chunks, B * G]; the last chunks, which have most to do, come first.
extern "C" __global__ __launch_bounds__(THREADS) void best_before(const u64* best, const u64* group_best, u64* before, int group, int n_groups, int top_k) {
    const int n_chunks = gridDim.x, chunk = n_chunks - 1 - blockIdx.x, first = chunk / group * group;
    Candidates c = no_candidates(shared, (n_groups - 1 + group) * top_k);
    append_list(c, group_best + (long)blockIdx.y * n_groups * top_k, chunk / group * top_k);
    append_list(c, best + ((long)blockIdx.y * n_chunks + first) * top_k, (chunk - first) * top_k);
    keep_list(c, top_k, before + ((long)blockIdx.y * n_chunks + chunk) * top_k);
}

// Those that may be among the best of some block of a run, in order of position.
struct Contenders {
    u32* rank;
    int* position;
    int n;
};

// Append those of THREADS * EACH candidates that have a rank that is not 0, in order: first by warp, then by `e`, then by lane; positions
// of a lane are 32 apart. False if there are too many then, and nobody was appended.
template <int EACH>
__device__ __forceinline__ bool append(Contenders& x, const u32 (&rank)[EACH], int first_position) {
    __shared__ int of_warp[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int n = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) n += __popc(__ballot_sync(0xffffffffu, rank[e] > 0));
    if (lane == 0) of_warp[warp] = n;
    __syncthreads();
    const int n_of_warp = lane < WARPS ? of_warp[lane] : 0;
    const int all = x.n + __reduce_add_sync(0xffffffffu, n_of_warp);
    if (all > CONTENDERS) return false;
    int to = x.n + __reduce_add_sync(0xffffffffu, lane < warp ? n_of_warp : 0);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const u32 votes = __ballot_sync(0xffffffffu, rank[e] > 0);
        const int i = to + __popc(votes & ((1u << lane) - 1));
        if (rank[e] > 0) x.rank[i] = rank[e], x.position[i] = first_position + e * 32;
        to += __popc(votes);
    }
    x.n = all;
    __syncthreads();
    return true;
}

// A warp routes a block: the best of the contenders below `limit`, none of which has a rank below `least`.
__device__ __forceinline__ void route_block(const Contenders& x, int limit, int top_k, u32 least, int* indices, float* tau, int n_places) {
    constexpr int MOST = CONTENDERS / 32, PART = 8;  // Contenders of a lane, and those of them that are skipped together.
    const int lane = threadIdx.x % 32;
    u32 rank[MOST];
    int n = 0;
#pragma unroll
    for (int part = 0; part < MOST; part += PART) {
#pragma unroll
        for (int e = part; e < part + PART; e++) rank[e] = 0;
        if (part * 32 < x.n) {
#pragma unroll
            for (int e = part; e < part + PART; e++) {
                const int i = e * 32 + lane;
                if (i < x.n && x.position[i] < limit) rank[e] = x.rank[i], n++;
            }
        }
    }
    n = __reduce_add_sync(0xffffffffu, n);
    const auto n_from = [&](u32 bound) {
        int n = 0;
#pragma unroll
        for (int part = 0; part < MOST; part += PART) {
            if (part * 32 < x.n) {
#pragma unroll
                for (int e = part; e < part + PART; e++) n += rank[e] >= bound;
            }
        }
        return __reduce_add_sync(0xffffffffu, n);
    };
    // Members are those from `low` on, less the first `leave` of those that equal it. Few have come since `least` was the
    // worst, so the search begins near it.
    u32 low = max(least, 1u), high = RANK_OF_INFINITY + 1;
    int leave = max(0, n - top_k);
    for (u32 step = 1u << 16; leave > 0 && high - low > 1;) {
        const u32 middle = step < high - low ? low + step : low + (high - low) / 2;
        const int n_here = n_from(middle);
        if (n_here >= top_k) low = middle, leave = n_here - top_k;
        else high = middle;
        step = high > RANK_OF_INFINITY ? min(step, 1u << 28) * 8 : 0xffffffffu;
    }
    u32 worst = 0xffffffffu;
    int to = 0, equals = 0;
#pragma unroll
    for (int part = 0; part < MOST; part += PART) {
        if (part * 32 < x.n) {
#pragma unroll
            for (int e = part; e < part + PART; e++) {
                bool is_member = rank[e] >= low;
                if (leave > 0) {
                    const u32 votes = __ballot_sync(0xffffffffu, rank[e] == low);
                    if (rank[e] == low && equals + __popc(votes & ((1u << lane) - 1)) < leave) is_member = false;
                    equals += __popc(votes);
                }
                const u32 votes = __ballot_sync(0xffffffffu, is_member);
                if (is_member) indices[to + __popc(votes & ((1u << lane) - 1))] = x.position[e * 32 + lane], worst = min(worst, rank[e]);
                to += __popc(votes);
            }
        }
    }
    worst = __reduce_min_sync(0xffffffffu, worst);
    for (int i = to + lane; i < n_places; i += 32) indices[i] = -1;
    if (lane == 0) *tau = n < top_k ? __int_as_float(0xff800000) : score_of(worst);
}

// indices [B, n_blocks, G, n_places], ascending and padded with -1; tau [B, n_blocks, G]. `before` is null when what
// precedes a chunk is to be had from `best`. A `window` of 1 - T lets the only block of an encoder keep any position.
// Grid [ceil(n_blocks / run), G, B]; the last blocks, which have most to do, come first. The blocks of a run but the first
// add CONTENDERS - top_k positions at most. Dynamic shared memory, beside that of `no_candidates`, if a run has several blocks: 8 bytes
// for everyone of CONTENDERS.
extern "C" __global__ __launch_bounds__(THREADS, 2) void route_blocks(const float* scores, const int* lens, const u64* best, const u64* before, int* indices, float* tau, int T,
                                                              int G, int n_blocks, int n_places, int window, int top_k, int every, int n_sink, int chunk_size,
                                                              int n_chunks, int run) {
    const int first = (gridDim.x - 1 - blockIdx.x) * run, n_here = min(run, n_blocks - first), g = blockIdx.y, b = blockIdx.z, len = lens[b];
    const long pair = (long)b * G + g;
    scores += (long)b * T * G + g;
    const auto at = [&](int block) { return ((long)b * n_blocks + block) * G + g; };
    const auto n_candidates = [&](int block) { return block * every < len ? min(len, max(0, block * every + 1 - window)) : 0; };
    const int begin = n_candidates(first), chunk = max(0, begin - 1) / chunk_size;
    // The last candidate of the run.
    const int last = n_here > 1 ? min(first + n_here - 1, (len - 1) / every) : first, end = last > first ? n_candidates(last) : begin;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto rank_at = [&](int position) { return position < n_sink ? RANK_OF_INFINITY : rank_of(scores[(long)position * G]); };
    Contenders x = {shared, (int*)shared + CONTENDERS, 0};
    u32 least = 0;
    int routed = 0;

    // If few of the chunk's candidates are no worse than the k-th of what precedes it, they and those k contend.
    constexpr int OF_CHUNK = 6;
    if (run > 1 && before && chunk > 0 && end - chunk * chunk_size <= OF_CHUNK * THREADS) {
        __shared__ u32 least_of_warp[WARPS];
        const u64* list = before + (pair * n_chunks + chunk) * top_k;
        const int position = chunk * chunk_size + warp * (32 * OF_CHUNK) + lane;
        u32 rank[OF_CHUNK];
#pragma unroll
        for (int e = 0; e < OF_CHUNK; e++) rank[e] = position + 32 * e < end ? rank_at(position + 32 * e) : 0;
        u32 least_here = 0xffffffffu;
        for (int i = threadIdx.x; i < top_k; i += THREADS) {
            const u64 key = list[i];
            x.rank[i] = (u32)(key >> 32), x.position[i] = (int)(u32)key;
            least_here = min(least_here, x.rank[i]);
        }
        least_here = __reduce_min_sync(0xffffffffu, least_here);
        if (lane == 0) least_of_warp[warp] = least_here;
        __syncthreads();
        least = __reduce_min_sync(0xffffffffu, least_of_warp[lane % WARPS]);
#pragma unroll
        for (int e = 0; e < OF_CHUNK; e++) rank[e] = rank[e] >= least ? rank[e] : 0;
        x.n = top_k;
        if (!append(x, rank, position)) x.n = 0;
    }
    if (x.n == 0) {
        Candidates c = no_candidates(shared + (run > 1 ? 2 * CONTENDERS : 0), before ? top_k : (n_chunks - 1) * top_k);
        if (before) append_list(c, before + (pair * n_chunks + chunk) * top_k, chunk > 0 ? top_k : 0);
        else append_list(c, best + pair * n_chunks * top_k, chunk * top_k);
        append_scores(c, scores, chunk * chunk_size, begin, G, n_sink);
        int* to = indices + at(first) * n_places;
        least = (u32)(keep_best(c, top_k, x.n, [&](int i, u32 rank, int position) {
            to[i] = position;
            if (run > 1) x.rank[i] = rank, x.position[i] = position;
        }) >> PLACE_BITS);
        for (int i = x.n + threadIdx.x; i < n_places; i += THREADS) to[i] = -1;
        if (threadIdx.x == 0) tau[at(first)] = least ? score_of(least) : __int_as_float(0xff800000);
        if (n_here == 1) return;
        constexpr int OF_RUN = CONTENDERS / THREADS;
        const int position = begin + warp * (32 * OF_RUN) + lane;
        u32 contends[OF_RUN];
#pragma unroll
        for (int e = 0; e < OF_RUN; e++) {
            const u32 rank = position + 32 * e < end ? rank_at(position + 32 * e) : 0;
            contends[e] = rank >= least ? rank : 0;
        }
        append(x, contends, position);
        routed = 1;
    }
    for (int i = routed + warp; i < n_here; i += WARPS) {
        const long block = at(first + i);
        route_block(x, n_candidates(first + i), top_k, least, indices + block * n_places, tau + block, n_places);
    }
}

// The rows of `x` with `value` where the row's position is a sink.
extern "C" __global__ void with_sinks(const float* x, const u32* positions, float* filled, u64 n, u32 T, u32 G, u32 n_sink, float value) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        filled[i] = positions[i / G % T] < n_sink ? value : x[i];
    }
}
