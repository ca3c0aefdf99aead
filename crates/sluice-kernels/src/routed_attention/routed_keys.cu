// Routed attention: which routed keys a superblock of blocks of queries reads, in which place each is while the gradients of
// keys are computed, and where their sums are kept. Follows attention_tile/tile.cuh; key_gradients.cu follows and says why.
//
// Buffers, for P = B * G pairs, n superblocks of at most `span` blocks, `capacity` entries a pair (for what a
// top-k router chose, T + n * n_places always suffice, otherwise n_blocks * n_places):
//   routed_keys [P, n, span * n_places]; n_keys, n_open [P, n]; first_entry, first_tile [P, n + 1];
//   readers [P, T], zero before and after; first_reader (-1 for a key without any; `sum_entries` leaves the entry of the key's sums there),
//   next_reader [P, T]; n_listed [P];
//   entries, sorted [P, capacity]; sums [P, capacity, 2 D]; score_sums [P, capacity].

constexpr int KEYS = 64;   // Places of a tile.

// A routed key of a superblock: its position, a bit for every block that reads it, and the key that takes its place in
// the unit of blocks `due` (-1 if none does).
struct __align__(16) RoutedKey {
    int row;
    u32 blocks;
    int next, due;
};

// First block of a superblock, or behind the last. `n` superblocks of `span` blocks would hold more blocks than there are. Mostly the first ones are
// shorter for it, because early in a sequence keys change in every block, which takes time; the last may be empty.
__device__ __forceinline__ int first_block(int superblock, int n, int n_blocks, int span) {
    const int spare = n * span - n_blocks;
    return min(superblock * span - min(spare * superblock / (superblock + 7), superblock * span / 4), n_blocks);
}

// What a list says of a key: whether its block is the first or the last of a superblock that reads it, and how many earlier
// keys of the list share that. Keys that stay throughout are counted apart.
struct Listed {
    u32 slot, blocks;
    bool begins, stays, ends;
    int rank, rank_of_end;
};

// For every key in the list of block `block`, by a warp: `each(what the list says)`. How many begin and stay, begin and do not, and
// end: for all threads. `slots [.., n_places]` name the keys of a list in the table `slot_blocks`, 0xffff where there is none.
template <class Each>
__device__ __forceinline__ int3 for_listed(const unsigned short* slots, const u32* slot_blocks, int n_places, int block, int unit, int last_unit, Each each) {
    int3 n = make_int3(0, 0, 0);
    const int lane = threadIdx.x % 32;
    const u32 before = (1u << lane) - 1;
#pragma unroll 4
    for (int i = lane; i - lane < n_places; i += 32) {
        Listed key;
        key.slot = i < n_places ? slots[block * n_places + i] : 0xffff;
        key.blocks = key.slot != 0xffff ? slot_blocks[key.slot] : 0;
        const int last = 31 - __clz(key.blocks);
        key.begins = __ffs(key.blocks) - 1 == block, key.ends = last == block;
        key.stays = key.begins && block < unit && last / unit == last_unit;
        const u32 stay = __ballot_sync(0xffffffffu, key.stays), begin = __ballot_sync(0xffffffffu, key.begins && !key.stays), end = __ballot_sync(0xffffffffu, key.ends);
        key.rank = key.stays ? n.x + __popc(stay & before) : n.y + __popc(begin & before);
        key.rank_of_end = n.z + __popc(end & before);
        each(key);
        n.x += __popc(stay), n.y += __popc(begin), n.z += __popc(end);
    }
    return n;
}

constexpr int THREADS_OF_KEYS = 512;

// The routed keys of a superblock, each once. The first `n_open` begin a place of their own, in this order; those that
// stay throughout come first. A place changes hands where a unit of `unit` blocks begins, where a step of the kernels that
// follow begins too. Which place a key has follows from the lists alone, so that sums over places are the same every time.
// Grid [n, G, B], 512 threads; dynamic shared memory: `n_slots` (a power of two, at least twice span * n_places) slots of
// 8 bytes and span * n_places times two numbers of 2.
extern "C" __global__ __launch_bounds__(THREADS_OF_KEYS) void superblock_keys(const int* indices, const int* lens, RoutedKey* routed_keys, int* n_keys, int* n_open, int* readers,
                                                                  int* n_listed, int T, int G, int n_blocks, int n_places, int every, int span, int unit, int n_slots) {
    // A hash table, in which chance says where a key is. Once its row is known elsewhere, `slot_row` has its place.
    extern __shared__ __align__(16) int slot_row[];
    u32* slot_blocks = (u32*)(slot_row + n_slots);
    unsigned short* slots = (unsigned short*)(slot_row + 2 * n_slots);
    unsigned short* left = slots + span * n_places;                             // Places of keys in the order of their last blocks.
    __shared__ int staying[33], begin[33], end[33];                             // By blocks: keys before, as `Listed` counts them.
    __shared__ int opened[32], taken[32], n_taken[32], n_places_open;           // By units.
    const int superblock = blockIdx.x, g = blockIdx.y, b = blockIdx.z, warp = threadIdx.x / 32;
    const long pair = (long)b * G + g, at = pair * gridDim.x + superblock;
    routed_keys += at * span * n_places;
    for (int i = threadIdx.x; i < n_slots / 4; i += THREADS_OF_KEYS) ((int4*)slot_row)[i] = make_int4(-1, -1, -1, -1), ((uint4*)slot_blocks)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const int first = first_block(superblock, gridDim.x, n_blocks, span), behind = first_block(superblock + 1, gridDim.x, n_blocks, span);
    const int n_valid = max(0, min(behind, (lens[b] + every - 1) / every) - first);
    const int* lists = indices + (((long)b * n_blocks + first) * G + g) * n_places;
    constexpr int AT_ONCE = 4;
    for (int from = threadIdx.x; from < n_valid * n_places; from += AT_ONCE * THREADS_OF_KEYS) {
        int rows[AT_ONCE], blocks[AT_ONCE];
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const int i = from + e * THREADS_OF_KEYS;
            blocks[e] = i / n_places;
            rows[e] = blocks[e] < n_valid ? lists[(long)blocks[e] * (G - 1) * n_places + i] : -1;
        }
#pragma unroll
        for (int e = 0; e < AT_ONCE; e++) {
            const int row = rows[e];
            u32 slot = 0xffff;
            if (row >= 0) {
                slot = (u32)row * 2654435761u & (n_slots - 1);
                for (;;) {
                    const int found = atomicCAS(slot_row + slot, -1, row);
                    if (found == -1 || found == row) break;
                    slot = (slot + 1) & (n_slots - 1);
                }
                atomicOr(slot_blocks + slot, 1u << blocks[e]);
            }
            if (blocks[e] < n_valid) slots[from + e * THREADS_OF_KEYS] = slot;
        }
    }
    __syncthreads();
    const int last_unit = (n_valid + unit - 1) / unit - 1;
    for (int block = warp; block < n_valid; block += THREADS_OF_KEYS / 32) {
        const int3 n = for_listed(slots, slot_blocks, n_places, block, unit, last_unit, [](const Listed&) {});
        if (threadIdx.x % 32 == 0) staying[block + 1] = n.x, begin[block + 1] = n.y, end[block + 1] = n.z;
    }
    __syncthreads();
    // A key has its place from its first unit to its last. As many as possible take over the places of others.
    if (warp == 0) {
        const int lane = threadIdx.x;
        int3 n = lane < n_valid ? make_int3(staying[lane + 1], begin[lane + 1], end[lane + 1]) : make_int3(0, 0, 0);
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int3 other = make_int3(__shfl_up_sync(0xffffffffu, n.x, d), __shfl_up_sync(0xffffffffu, n.y, d), __shfl_up_sync(0xffffffffu, n.z, d));
            if (lane >= d) n.x += other.x, n.y += other.y, n.z += other.z;
        }
        if (lane == 0) staying[0] = begin[0] = end[0] = 0;
        staying[lane + 1] = n.x, begin[lane + 1] = n.y, end[lane + 1] = n.z;
        __syncwarp();
        // Lane `u` has the unit `u`.
        const int from = min(lane * unit, 32), to = min(from + unit, 32), begin_here = begin[to] - begin[from], freed_here = end[from];
        int n_opened = staying[32], n_taken_all = 0;
#pragma unroll 4
        for (int u = 0; u <= last_unit; u++) {
            const int begin_u = __shfl_sync(0xffffffffu, begin_here, u), take = min(begin_u, __shfl_sync(0xffffffffu, freed_here, u) - n_taken_all);
            if (lane == u) n_taken[u] = take, opened[u] = n_opened, taken[u] = n_taken_all;
            n_opened += begin_u - take, n_taken_all += take;
        }
        if (lane == 0) n_places_open = n_opened;
    }
    __syncthreads();
    for (int block = warp; block < n_valid; block += THREADS_OF_KEYS / 32) {
        for_listed(slots, slot_blocks, n_places, block, unit, last_unit, [&](const Listed& key) {
            if (!key.begins) return;
            const int u = block / unit, rank = begin[block] + key.rank - begin[u * unit];
            int to;
            if (key.stays) to = staying[block] + key.rank;
            else if (rank < n_taken[u]) to = n_places_open + taken[u] + rank;
            else to = opened[u] + rank - n_taken[u];
            const int row = slot_row[key.slot];
            routed_keys[to] = {row, key.blocks, -1, 0};
            atomicAdd(readers + pair * T + row, 1);
            slot_row[key.slot] = to;
        });
    }
    __syncthreads();
    for (int block = warp; block < n_valid; block += THREADS_OF_KEYS / 32) {
        for_listed(slots, slot_blocks, n_places, block, unit, last_unit, [&](const Listed& key) {
            if (key.ends) left[end[block] + key.rank_of_end] = slot_row[key.slot];
        });
    }
    __syncthreads();
    const int n = end[32];
    for (int i = threadIdx.x; i < n - n_places_open; i += THREADS_OF_KEYS) {
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
