// Routed attention: which routed keys a superblock of blocks of queries reads, in which place each is while the gradients of
// keys are computed, and where their sums are kept. Follows attention_tile/tile.cuh; key_gradients.cu follows and says why.
//
// Buffers, for P = B * G pairs, n = ceil(n_blocks / span) superblocks, `capacity` entries a pair (for what a
// top-k router chose, T + n * n_places always suffice, otherwise n_blocks * n_places):
//   routed_keys [P, n, span * n_places]; n_keys, n_open [P, n]; first_entry, first_tile [P, n + 1];
//   readers [P, T], zero before and after; first_reader (-1 for a key without any), next_reader [P, T]; n_listed [P];
//   entries, sorted [P, capacity]; sums [P, capacity, 2 D]; score_sums [P, capacity].

constexpr int KEYS = 64;   // Places of a tile.

// A routed key of a superblock: its position, a bit for every block that reads it, and the key that takes its place in
// the unit of blocks `due` (-1 if none does).
struct __align__(16) RoutedKey {
    int row;
    u32 blocks;
    int next, due;
};

// The routed keys of a superblock, each once. The first `n_open` begin a place of their own, in this order; those that
// stay throughout come first. A place changes hands where a unit of `unit` blocks begins, where a step of `dkv_routed`
// begins too. Grid [n, G, B], 256 threads; dynamic shared memory: `n_slots` (a power of two, at least twice
// span * n_places) slots of 8 bytes and span * n_places times two numbers of 2.
extern "C" __global__ __launch_bounds__(256) void superblock_keys(const int* indices, const int* lens, RoutedKey* routed_keys, int* n_keys, int* n_open, int* readers,
                                                                  int* n_listed, int T, int G, int n_blocks, int n_places, int every, int span, int unit, int n_slots) {
    // A hash table. What depends on the order of its slots is only where a key is computed, never what.
    extern __shared__ __align__(16) int slot_row[];
    u32* slot_blocks = (u32*)(slot_row + n_slots);
    unsigned short* slots = (unsigned short*)(slot_row + 2 * n_slots);  // Those with a key.
    unsigned short* left = slots + span * n_places;                     // Keys whose places become free, in the order of units.
    __shared__ int n, n_staying, n_first[32], n_last[32];               // Keys; those that stay; those that begin and end in a unit.
    __shared__ int opened[32], taken[32], n_taken[32], freed[32], n_places_open;
    const int superblock = blockIdx.x, g = blockIdx.y, b = blockIdx.z;
    const long pair = (long)b * G + g, at = pair * gridDim.x + superblock;
    routed_keys += at * span * n_places;
    for (int i = threadIdx.x; i < n_slots / 4; i += 256) ((int4*)slot_row)[i] = make_int4(-1, -1, -1, -1), ((uint4*)slot_blocks)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x < 32) n_first[threadIdx.x] = n_last[threadIdx.x] = 0;
    if (threadIdx.x == 0) n = n_staying = 0;
    __syncthreads();
    const int first = superblock * span, n_valid = max(0, min(min(span, n_blocks - first), (lens[b] + every - 1) / every - first));
    const int* lists = indices + (((long)b * n_blocks + first) * G + g) * n_places;
    constexpr int AT_ONCE = 4;
    for (int i = threadIdx.x; i < n_places; i += 256) {
        for (int block = 0; block < n_valid; block += AT_ONCE) {
            int rows[AT_ONCE];
#pragma unroll
            for (int e = 0; e < AT_ONCE; e++) rows[e] = block + e < n_valid ? lists[(long)(block + e) * G * n_places + i] : -1;
#pragma unroll
            for (int e = 0; e < AT_ONCE; e++) {
                const int row = rows[e];
                if (row < 0) continue;
                u32 slot = (u32)row * 2654435761u & (n_slots - 1);
                for (;;) {
                    const int found = atomicCAS(slot_row + slot, -1, row);
                    if (found == -1) slots[atomicAdd(&n, 1)] = slot;
                    if (found == -1 || found == row) break;
                    slot = (slot + 1) & (n_slots - 1);
                }
                atomicOr(slot_blocks + slot, 1u << (block + e));
            }
        }
    }
    __syncthreads();
    // A key has its place from its first unit to its last. As many as possible take over the places of others.
    const int last_unit = (n_valid - 1) / unit;
    for (int i = threadIdx.x; i < n; i += 256) {
        const u32 blocks = slot_blocks[slots[i]];
        const int begins = (__ffs(blocks) - 1) / unit, ends = (31 - __clz(blocks)) / unit;
        atomicAdd(begins == 0 && ends == last_unit ? &n_staying : n_first + begins, 1);
        atomicAdd(n_last + ends, 1);
        atomicAdd(readers + pair * T + slot_row[slots[i]], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const int begin = n_first[threadIdx.x], end = n_last[threadIdx.x];
        int n_opened = n_staying, n_taken_all = 0, n_freed = 0;
#pragma unroll 4
        for (int u = 0; u <= last_unit; u++) {
            const int begin_u = __shfl_sync(0xffffffffu, begin, u), end_u = __shfl_sync(0xffffffffu, end, u), take = min(begin_u, n_freed - n_taken_all);
            if (threadIdx.x == u) n_taken[u] = take, opened[u] = n_opened, taken[u] = n_taken_all, freed[u] = n_freed;
            n_opened += begin_u - take, n_taken_all += take, n_freed += end_u;
        }
        __syncwarp();
        n_first[threadIdx.x] = n_last[threadIdx.x] = 0;
        if (threadIdx.x == 0) n_staying = 0, n_places_open = n_opened;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += 256) {
        const u32 blocks = slot_blocks[slots[i]];
        const int begins = (__ffs(blocks) - 1) / unit, ends = (31 - __clz(blocks)) / unit;
        int to;
        if (begins == 0 && ends == last_unit) {
            to = atomicAdd(&n_staying, 1);
        } else {
            to = atomicAdd(n_first + begins, 1);
            to = to < n_taken[begins] ? n_places_open + taken[begins] + to : opened[begins] + to - n_taken[begins];
        }
        left[freed[ends] + atomicAdd(n_last + ends, 1)] = to;
        routed_keys[to] = {slot_row[slots[i]], blocks, -1, 0};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n - n_places_open; i += 256) {
        RoutedKey& before = routed_keys[left[i]];
        before.next = n_places_open + i;
        before.due = (__ffs(routed_keys[n_places_open + i].blocks) - 1) / unit;
    }
    if (threadIdx.x == 0) {
        n_keys[at] = n, n_open[at] = n_places_open;
        if (superblock == 0) n_listed[pair] = 0;
    }
}

// Sum of what the threads before this one hold, and of all, for 1024 threads.
__device__ __forceinline__ int sum_before(int mine, int* of_warp, int& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto scan = [&](int x) {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, x, d);
            if (lane >= d) x += other;
        }
        return x;
    };
    const int sum = scan(mine);
    __syncthreads();
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    const int warps = scan(of_warp[lane]);
    total = __shfl_sync(0xffffffffu, warps, 31);
    const int before = __shfl_sync(0xffffffffu, warps, warp == 0 ? 0 : warp - 1);
    return sum - mine + (warp == 0 ? 0 : before);
}

// Where the entries of a superblock, its tiles of 64 keys, and the readers of a key begin. The order of the lists of
// readers is left to chance, since nothing depends on it. Grid [ceil(T / 4096), P], 1024 threads.
extern "C" __global__ __launch_bounds__(1024) void place_entries(const int* n_keys, const int* n_open, const int* readers, int* first_entry, int* first_tile,
                                                                 int* first_reader, int* next_reader, int* n_listed, int T, int n, int capacity) {
    __shared__ int of_warp[32], begin;
    const long pair = blockIdx.y;
    int count[4], mine = 0, total;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int key = blockIdx.x * 4096 + e * 1024 + threadIdx.x;
        count[e] = key < T ? readers[pair * T + key] : 0;
        mine += count[e];
    }
    int to = sum_before(mine, of_warp, total);
    if (threadIdx.x == 0) begin = atomicAdd(n_listed + pair, total);
    __syncthreads();
    to += begin;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int key = blockIdx.x * 4096 + e * 1024 + threadIdx.x;
        if (key < T) {
            first_reader[pair * T + key] = count[e] ? to : -1;
            next_reader[pair * T + key] = to;
        }
        to += count[e];
    }
    if (blockIdx.x == 0) {
        n_keys += pair * n, n_open += pair * n, first_entry += pair * (n + 1), first_tile += pair * (n + 1);
        int entries = 0, tiles = 0;
        for (int i = threadIdx.x; i - (int)threadIdx.x < n; i += 1024) {
            const int size = i < n ? n_keys[i] : 0, size_in_tiles = i < n ? (n_open[i] + KEYS - 1) / KEYS : 0;
            const int entry = entries + sum_before(size, of_warp, total);
            entries += total;
            const int tile = tiles + sum_before(size_in_tiles, of_warp, total);
            tiles += total;
            if (i < n) first_entry[i] = entry, first_tile[i] = tile;
        }
        if (threadIdx.x == 0) first_entry[n] = entries, first_tile[n] = tiles;
        if (entries > capacity) __trap();
    }
}

// The entries of every key, in no order. Grid [n, G, B], 256 threads.
extern "C" __global__ __launch_bounds__(256) void list_entries(const RoutedKey* routed_keys, const int* n_keys, const int* first_entry, int* next_reader, int* entries,
                                                               int T, int G, int n_places, int span, int capacity) {
    const long pair = (long)blockIdx.z * G + blockIdx.y, at = pair * gridDim.x + blockIdx.x;
    const int first = first_entry[pair * (gridDim.x + 1) + blockIdx.x];
    for (int i = threadIdx.x; i < n_keys[at]; i += 256) {
        const int row = routed_keys[at * span * n_places + i].row;
        const int to = atomicAdd(next_reader + pair * T + row, 1);
        entries[pair * capacity + to] = first + i;
    }
}
