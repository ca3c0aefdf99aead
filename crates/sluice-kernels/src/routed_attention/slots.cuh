// What a tile of an encoder's queries of one KV head walks over, and what each query sees of it. Knows nothing about products.
//
// Slots are the strip, the keys that are local to one of the queries, and then the routed keys outside the strip. A key of the strip counts once,
// whether a query sees it as a local one, as a routed one or as both: of every slot a bit says whether all queries see it, and what remains are the
// queries' windows.

// Those of 64 slots from `first` on that lie in `begin..end`.
__device__ __forceinline__ u64 slots_between(int begin, int end, int first) {
    const int low = max(begin - first, 0), high = min(end - first, 64);
    return low < high ? ~0ull >> (64 - (high - low)) << low : 0ull;
}

struct Slots {
    u64* for_all;       // Bits of the slots that all queries see, 64 for a step. In shared memory, as what follows.
    int* places;        // Routed keys, ascending.
    int n;              // Slots; 0 if nobody sees anything.
    int n_local;        // Those of the strip.
    int begin;          // Position of the first one.
    int n_before;       // Routed keys before the strip,
    int n_inside;       // and in it.
    int window;
    int common;         // First slot of the last query's window, and
    int common_end;     // behind the last one of the first query's: between them all queries see all.

    // Queries `first..=last` of a sequence with `len` keys, of which `list` has the routed ones, ascending and padded with -1. `memory`: shared, 8 bytes
    // for each of `most_steps` steps, then 4 for each of `n_places`. To be called by all of THREADS threads, and not ready before they have met again.
    template <int THREADS>
    __device__ __forceinline__ void make(unsigned char* memory, const int* list, int n_places, int most_steps, int window, int len, int first,
                                         int last) {
        for_all = (u64*)memory, places = (int*)(for_all + most_steps), this->window = window;
        begin = max(window_begin(first), 0);
        n_local = window > 0 ? min(window_begin(last) + window, len) - begin : 0;
        common = slot_of_window(last), common_end = min(slot_of_window(first) + window, n_local);
        int n_routed = 0;
        n_before = n_inside = 0;
        for (int i = threadIdx.x; i < most_steps; i += THREADS) for_all[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i - (int)threadIdx.x < n_places; i += THREADS) {
            const int place = i < n_places ? list[i] : -1;
            const bool is_inside = place >= begin && place < begin + n_local;
            if (i < n_places) places[i] = place;
            if (is_inside) atomicOr((u32*)for_all + (place - begin) / 32, 1u << (place - begin) % 32);
            n_routed += __syncthreads_count(place >= 0);
            n_before += __syncthreads_count(place >= 0 && place < begin);
            n_inside += __syncthreads_count(is_inside);
        }
        n = n_local + n_routed - n_inside;
        for (int step = threadIdx.x; step < steps(); step += THREADS) for_all[step] |= slots_between(n_local, n, step * 64);
    }

    __device__ __forceinline__ int steps() const { return (n + 63) / 64; }
    // The key of a slot; behind the last one that one again.
    __device__ __forceinline__ int position(int slot) const {
        const int outside = min(slot, n - 1) - n_local;
        return outside < 0 ? begin + n_local + outside : places[outside < n_before ? outside : outside + n_inside];
    }
    // Position of the first key of a window, which may lie before the sequence.
    __device__ __forceinline__ int window_begin(int query) const { return query - (window - 1) / 2; }
    __device__ __forceinline__ int slot_of_window(int query) const { return window_begin(query) - begin; }

    // Bits of a step's keys that a query sees whose window begins at a slot.
    __device__ __forceinline__ u64 seen(int step, int window_slot) const {
        return for_all[step] | slots_between(window_slot, min(window_slot + window, n_local), step * 64);
    }

    // Hide from a thread's two rows, whose windows begin at two slots, the keys of a step that they do not see. The thread has columns
    // 8 j + 2 (lane % 4) of either and their neighbours.
    __device__ __forceinline__ void hide(float (&s)[8][4], int step, int window0, int window1) const {
        if ((for_all[step] | slots_between(common, common_end, step * 64)) == ~0ull) return;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const u64 bits = seen(step, row ? window1 : window0) >> (threadIdx.x % 4 * 2);
            const u32 words[2] = {(u32)bits, (u32)(bits >> 32)};
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (!(words[j / 4] & 1u << (j % 4 * 8 + e))) s[j][2 * row + e] = __int_as_float(0xff800000);
                }
            }
        }
    }
};
