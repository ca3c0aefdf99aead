// The k best of a list that is in order of position, by a block of threads; they come out in that order again.
//
// A histogram of the upper 12 bits of the scores, made while they arrive, says which few candidates are near the k-th best;
// the k-th best is then found among these by counting the better ones of each. Ties go to the larger position, so a
// candidate is compared by its score and then its place in the list.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int DIGIT = 12, BINS = 1 << DIGIT;
// A candidate's key is its rank, and its place in the list in 16 bits below.
constexpr int PLACE_BITS = 16, KEY_BITS = 32 + PLACE_BITS;
constexpr u32 RANK_OF_INFINITY = 0xff800000u;

// A score as the order sees it: larger is better, and 0 is less than any. NaN loses to everything, -0 equals 0.
__device__ __forceinline__ u32 rank_of(float score) {
    const u32 bits = __float_as_uint(fmaxf(score, __int_as_float(0xff800000)) + 0.0f);
    return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ float score_of(u32 rank) { return __uint_as_float(rank >> 31 ? rank & 0x7fffffffu : ~rank); }

// Candidates of each value of the digit.
__shared__ __align__(16) u32 bins[BINS];
extern __shared__ u32 shared[];

// Candidates in shared memory, `n` of them, in order of position: first those of lists, then consecutive positions.
struct Candidates {
    u32* rank;
    int* position;  // Of those from lists.
    int n, n_listed;
    int begin;      // First of the consecutive ones.

    __device__ __forceinline__ int position_of(int i) const { return i < n_listed ? position[i] : begin + i - n_listed; }
};

__device__ __forceinline__ void clear_bins() {
    for (int i = threadIdx.x; i < BINS / 4; i += THREADS) ((uint4*)bins)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
}

// Dynamic shared memory from `memory` on: 8 bytes for everyone of `most_listed` candidates from lists, 4 for any other.
__device__ __forceinline__ Candidates no_candidates(u32* memory, int most_listed) {
    clear_bins();
    Candidates c;
    c.position = (int*)memory;
    c.rank = memory + most_listed;
    c.n = c.n_listed = c.begin = 0;
    return c;
}

__device__ __forceinline__ void add(u32* to, u32 rank) {
    *to = rank;
    atomicAdd(bins + (rank >> (32 - DIGIT)), 1u);
}

// Append `n` candidates.
__device__ __forceinline__ void append_list(Candidates& c, const u64* list, int n) {
    list += threadIdx.x;
    u32* rank = c.rank + c.n + threadIdx.x;
    int* position = c.position + c.n + threadIdx.x;
#pragma unroll 1
    for (int left = n - threadIdx.x; left > 0; left -= 4 * THREADS, list += 4 * THREADS, rank += 4 * THREADS, position += 4 * THREADS) {
        u64 x[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e * THREADS < left) x[e] = list[e * THREADS];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e * THREADS < left) add(rank + e * THREADS, (u32)(x[e] >> 32)), position[e * THREADS] = (int)(u32)x[e];
        }
    }
    c.n += n;
    c.n_listed += n;
}

// Append the positions `begin..end`, once and last. `scores` is the sequence's, `stride` apart.
__device__ __forceinline__ void append_scores(Candidates& c, const float* scores, int begin, int end, int stride, int n_sink) {
    const int n = max(0, end - begin);
    const long step = (long)THREADS * stride;
    const float* from = scores + (long)(begin + (int)threadIdx.x) * stride;
    u32* rank = c.rank + c.n + threadIdx.x;
    int sinks = n_sink - begin - threadIdx.x;
#pragma unroll 1
    for (int left = n - threadIdx.x; left > 0; left -= 4 * THREADS, rank += 4 * THREADS, from += 4 * step, sinks -= 4 * THREADS) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e * THREADS < left) x[e] = from[e * step];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (e * THREADS < left) add(rank + e * THREADS, e * THREADS < sinks ? RANK_OF_INFINITY : rank_of(x[e]));
        }
    }
    c.n += n;
    c.begin = begin;
}

// The key of the k-th best, 0 if there are fewer; `emit(i, rank, position)` for every member, `i` counting them in
// order; their number in `n_members`.
template <class Emit>
__device__ __forceinline__ u64 keep_best(const Candidates& c, int top_k, int& n_members, Emit emit) {
    __shared__ __align__(16) u64 close[THREADS + 2];
    __shared__ u64 kth;
    __shared__ int of_warp[WARPS], bin, n_above, n_in, n_close;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto key = [&](int i) { return (u64)c.rank[i] << PLACE_BITS | (u32)i; };
    // A warp has consecutive candidates; what the warps before it hold decides where its members begin.
    const int share = (c.n + THREADS - 1) / THREADS * 32, begin = warp * share, end = min(begin + share, c.n);
    u64 least = 0;
    __syncthreads();
    if (c.n < top_k) {
        if (lane == 0) of_warp[warp] = max(0, end - begin);
        __syncthreads();
    } else {
        u64 prefix = 0;
        int shift = KEY_BITS, needed = top_k, n;
        for (;;) {
            // The bin of the one that is needed, counted from the last bin; a thread has a few consecutive ones.
            constexpr int EACH = BINS / THREADS;
            const int first = BINS - (threadIdx.x + 1) * EACH;
            int mine[EACH], sum = 0;
#pragma unroll
            for (int e = 0; e < EACH; e += 4) {
                const uint4 x = *(const uint4*)(bins + first + e);
                mine[e] = x.x, mine[e + 1] = x.y, mine[e + 2] = x.z, mine[e + 3] = x.w;
                sum += x.x + x.y + x.z + x.w;
            }
            int up_to = sum;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int other = __shfl_up_sync(0xffffffffu, up_to, d);
                if (lane >= d) up_to += other;
            }
            if (lane == 31) of_warp[warp] = up_to;
            __syncthreads();
            int before = of_warp[lane % WARPS];
            before = __reduce_add_sync(0xffffffffu, lane < warp ? before : 0);
            up_to += before;
            if (up_to - sum < needed && needed <= up_to) {
                int above = up_to - sum;
#pragma unroll
                for (int e = EACH - 1; e >= 0; e--) {
                    if (above < needed && needed <= above + mine[e]) bin = first + e, n_above = above, n_in = mine[e], n_close = 0;
                    above += mine[e];
                }
            }
            __syncthreads();
            prefix = prefix << DIGIT | (u32)bin, needed -= n_above, n = n_in, shift -= DIGIT;
            // The last digit leaves one.
            if (n <= THREADS) break;
            clear_bins();
            for (int i = threadIdx.x; i < c.n; i += THREADS) {
                if (key(i) >> shift == prefix) atomicAdd(bins + (u32)(key(i) >> (shift - DIGIT)) % BINS, 1u);
            }
            __syncthreads();
        }
        // Those in the bin, and the number of those above it.
        int n_better = 0;
        if (shift == KEY_BITS - DIGIT) {
#pragma unroll 2
            for (int i = begin + lane; i < end; i += 32) {
                const u32 digit = c.rank[i] >> (32 - DIGIT);
                n_better += digit > (u32)prefix;
                if (digit == (u32)prefix) close[atomicAdd(&n_close, 1)] = key(i);
            }
        } else {
            for (int i = begin + lane; i < end; i += 32) {
                n_better += key(i) >> shift > prefix;
                if (key(i) >> shift == prefix) close[atomicAdd(&n_close, 1)] = key(i);
            }
        }
        n_better = __reduce_add_sync(0xffffffffu, n_better);
        if (lane == 0) of_warp[warp] = n_better;
        if (threadIdx.x == 0) close[n] = 0;
        __syncthreads();
        if (threadIdx.x < n) {
            const u64 mine = close[threadIdx.x];
            int n_better = 0;
#pragma unroll 4
            for (int i = 0; i < n; i += 2) {
                const ulonglong2 other = *(const ulonglong2*)(close + i);
                n_better += (other.x > mine) + (other.y > mine);
            }
            if (n_better < needed) atomicAdd(of_warp + (u32)mine % (1u << PLACE_BITS) / share, 1);
            if (n_better == needed - 1) kth = mine;
        }
        __syncthreads();
        least = kth;
    }
    const u32 above = (u32)(least >> PLACE_BITS);
    const int least_place = (int)((u32)least % (1u << PLACE_BITS));
    const int n_of_warp = lane < WARPS ? of_warp[lane] : 0;
    n_members = __reduce_add_sync(0xffffffffu, n_of_warp);
    int to = __reduce_add_sync(0xffffffffu, lane < warp ? n_of_warp : 0);
    if (__shfl_sync(0xffffffffu, n_of_warp, warp) == 0) return least;
#pragma unroll 2
    for (int first = begin; first < end; first += 32) {
        const int i = first + lane;
        const u32 rank = i < end ? c.rank[i] : 0;
        const bool is_member = i < end && (rank > above || (rank == above && i >= least_place));
        const u32 votes = __ballot_sync(0xffffffffu, is_member);
        if (is_member) emit(to + __popc(votes & ((1u << lane) - 1)), rank, c.position_of(i));
        to += __popc(votes);
    }
    return least;
}
