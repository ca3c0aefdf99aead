// Routed attention: the gradients of keys, values and scores, without atomics on floating-point numbers, so that they
// come out the same every time. Follows routed_keys.cu.
//
// 64 keys stay in place and all queries that see them pass by, so that their gradients stay in registers. A key has
// two kinds of viewers. Those in its window are consecutive: `dkv_local` visits them all and writes the result. Those
// that read it as a routed key are anywhere: they are visited in superblocks of `span` blocks, whose union of routed
// keys is hardly longer than one block's list because a routing changes slowly. A key that no later block of the
// superblock reads gives its place to one that comes, so that there are no more places than a block has keys. Every
// superblock leaves one partial sum a key (an entry), which `sum_entries` adds up in order before `dkv_local` adds the rest.
//
//   superblock_keys -> place_entries -> list_entries (routed_keys.cu) -> dkv_routed -> sum_entries -> dkv_local

constexpr int ROWS = 64, THREADS = 128;
constexpr int TILE = 64 * D * 2;
// Blocks of threads that must fit a multiprocessor: what the registers allow.
constexpr int ROUTED_CTAS = 2, LOCAL_CTAS = D == 64 ? 3 : 2;

// What a step needs to know of 64 rows.
struct Rows {
    float lse[ROWS], delta[ROWS];
    // Local: first and last position that the row sees. Routed: the row's block in the superblock, and its tau.
    int first[ROWS];
    int last[ROWS];
};

struct Gradients {
    float dk[D / 8][4], dv[D / 8][4];
    float dscore0, dscore1;
};

struct Problem {
    const bf16 *dout, *q, *k, *v;
    const float *lse, *delta;
    int T, G;
    Group group;
};

// Visit rows `begin..end` (queries times the group's heads) of a sequence and a KV head with the 64 keys in `shared`.
// `describe_row(rows, i, query)` says what a row sees; `bias` adds to the logits, collects the gradients of scores, and may
// exchange keys before a step.
template <class Describe, class Bias>
__device__ __forceinline__ void visit(Gradients& grads, unsigned char* shared, const Problem& x, int b, int g, int begin, int end, Describe describe_row, Bias& bias) {
    const u32 k_tile = shared_address(shared), v_tile = k_tile + TILE;
    Rows* infos = (Rows*)(shared + 6 * TILE);
    // Whether the rows of a thread, which are so far apart, belong to the same head.
    const bool regular = THREADS / (D / 8) % x.group.n == 0;
    auto fetch = [&](int step) {
        const int first = begin + step * ROWS;
        const u32 q_tile = k_tile + 2 * TILE + step % 2 * (2 * TILE), dout_tile = q_tile + TILE;
        if (regular && first + ROWS <= end) {
            // A row's distance to the thread's first one is that of their numbers: heads of a group lie side by side.
            const int own = threadIdx.x / (D / 8);
            const u32 at = x.group.at(b, x.T, x.G, g, first + own);
            copy_rows<ROWS, D, THREADS>(q_tile, x.q, dout_tile, x.dout, [&](int i) { return at + (u32)(i - own) * x.G; });
        } else {
            copy_rows<ROWS, D, THREADS>(q_tile, x.q, dout_tile, x.dout, [&](int i) { return x.group.at(b, x.T, x.G, g, min(first + i, end - 1)); });
        }
        // A row past the end has no weights.
        Rows& info = infos[step % 2];
        const int i = threadIdx.x % ROWS, row = min(first + i, end - 1);
        if (threadIdx.x < ROWS) {
            const u32 from = x.group.at(b, x.T, x.G, g, row);
            copy4(&info.delta[i], x.delta + from);
            if (first + i < end) copy4(&info.lse[i], x.lse + from);
            else info.lse[i] = infinity();
        } else {
            describe_row(info, i, x.group.quotient(row));
        }
    };
    const int steps = end > begin ? (end - begin + ROWS - 1) / ROWS : 0;
    if (steps > 0) fetch(0);
    copies_commit();
    const float scale = LOG2E * rsqrtf((float)D);
    const int column = threadIdx.x % 4 * 2;
    for (int step = 0; step < steps; step++) {
        const u32 q_tile = k_tile + 2 * TILE + step % 2 * (2 * TILE), dout_tile = q_tile + TILE;
        const Rows& info = infos[step % 2];
        copies_wait<0>();
        if (bias.exchange_due(step)) {
            bias.exchange(grads, k_tile, v_tile, step);
            copies_commit();
            copies_wait<0>();
            __syncthreads();
        }
        float s[ROWS / 8][4], ds[ROWS / 8][4];
        products_begin();
        product_of_tiles<D, KEYS, ROWS>(s, k_tile, 0, q_tile);
        products_commit();
        product_of_tiles<D, KEYS, ROWS>(ds, v_tile, 0, dout_tile);
        products_commit();
        // Asking for copies takes as long as a product, so it stands behind one.
        if (step + 1 < steps) fetch(step + 1);
        copies_commit();
        products_wait<1>();
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
            float2 lse = *(const float2*)&info.lse[8 * j + column];
            lse.x *= LOG2E, lse.y *= LOG2E;
            s[j][0] = s[j][0] * scale - lse.x;
            s[j][1] = s[j][1] * scale - lse.y;
            s[j][2] = s[j][2] * scale - lse.x;
            s[j][3] = s[j][3] * scale - lse.y;
        }
        bias.add(s, info);
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = exp2_fast(s[j][e]);
        }
        u32 weights[ROWS / 16][4];
        to_fragments<ROWS>(weights, s);
        products_begin();
        product_with_tile<ROWS, D>(grads.dv, weights, dout_tile);
        products_commit();
        products_wait<1>();
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
            const float2 delta = *(const float2*)&info.delta[8 * j + column];
            s[j][0] *= ds[j][0] - delta.x;
            s[j][1] *= ds[j][1] - delta.y;
            s[j][2] *= ds[j][2] - delta.x;
            s[j][3] *= ds[j][3] - delta.y;
        }
        bias.score_gradient(s, info, grads.dscore0, grads.dscore1);
        u32 factors[ROWS / 16][4];
        to_fragments<ROWS>(factors, s);
        products_begin();
        product_with_tile<ROWS, D>(grads.dk, factors, q_tile);
        products_commit();
        products_wait<0>();
    }
}

// The gate's bias of a key for a row, in units of log2, and its derivative by the key's score.
__device__ __forceinline__ float gate_bias(float score, float tau, float inverse_temperature) {
    const float x = (score - tau) * inverse_temperature;
    return score == infinity() || tau == -infinity() ? 0.0f : (fminf(x, 0.0f) - log1pf(expf(-fabsf(x)))) * LOG2E;
}

__device__ __forceinline__ float gate_slope(float score, float tau, float inverse_temperature) {
    const float x = (score - tau) * inverse_temperature;
    return score == infinity() || tau == -infinity() ? 0.0f : inverse_temperature / (1.0f + expf(x));
}

// The keys of a tile's places now and next, in shared memory behind what is known of rows.
struct Places {
    RoutedKey ahead[KEYS];
    int number[KEYS], next[KEYS];
};

// How a thread's two keys, routed ones, appear to the rows of a step, and where their sums go.
struct RoutedBias {
    bool biased;
    float score0, score1, inverse_temperature;
    u32 blocks0, blocks1, all_blocks;
    // Steps from which the next keys of the two places count, and the next step that can be one.
    int due0, due1, boundary, steps_a_unit;
    Places* places;
    const RoutedKey* routed_keys;
    const float* scores;
    const bf16 *k, *v;
    float *sums, *score_sums;
    u32 row0;
    int G;

    // A barrier, with the answer whether some place of the tile changes hands.
    __device__ __forceinline__ bool exchange_due(int step) {
        if (step != boundary) {
            __syncthreads();
            return false;
        }
        boundary += steps_a_unit;
        return __syncthreads_or(min(due0, due1) <= step);
    }

    // Store the sums of the leaving keys, or of all.
    __device__ __forceinline__ void store(Gradients& grads, bool leaves0, bool leaves1) const {
        const int column = threadIdx.x % 4 * 2, key = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
        const float scale = rsqrtf((float)D);
        const float dscore0 = quad_sum(grads.dscore0), dscore1 = quad_sum(grads.dscore1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half ? leaves1 : leaves0) {
                const long entry = places->number[key + 8 * half];
                float* to = sums + entry * (2 * D) + column;
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    *(float2*)(to + 8 * j) = make_float2(grads.dk[j][2 * half] * scale, grads.dk[j][2 * half + 1] * scale);
                    *(float2*)(to + D + 8 * j) = make_float2(grads.dv[j][2 * half], grads.dv[j][2 * half + 1]);
                    grads.dk[j][2 * half] = grads.dk[j][2 * half + 1] = grads.dv[j][2 * half] = grads.dv[j][2 * half + 1] = 0.0f;
                }
                if (column == 0) score_sums[entry] = half ? dscore1 : dscore0;
                if (half) grads.dscore1 = 0.0f;
                else grads.dscore0 = 0.0f;
            }
        }
    }

    // The next key of a place, if there is one, on its way to `places`.
    __device__ __forceinline__ void fetch_ahead(int key, int next) const {
        places->next[key] = next;
        if (next >= 0) copy16(shared_address(places->ahead + key), routed_keys + next);
    }

    __device__ __forceinline__ void exchange(Gradients& grads, u32 k_tile, u32 v_tile, int step) {
        store(grads, due0 <= step, due1 <= step);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bool due = (half ? due1 : due0) <= step;
            const int key = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
            RoutedKey come;
            if (due) {
                come = places->ahead[key];
                const u32 row = row0 + come.row * G;
#pragma unroll
                for (int i = 0; i < D / 32; i++) {
                    const int piece = i * 4 + threadIdx.x % 4;
                    copy16(k_tile + tile_at<KEYS>(key, piece), k + (u64)row * D + piece * 8);
                    copy16(v_tile + tile_at<KEYS>(key, piece), v + (u64)row * D + piece * 8);
                }
                const int next_due = come.next >= 0 ? come.due * steps_a_unit : 0x7fffffff;
                const float score = biased ? scores[row] : infinity();
                if (half) due1 = next_due, blocks1 = come.blocks, score1 = score;
                else due0 = next_due, blocks0 = come.blocks, score0 = score;
            }
            __syncwarp();
            if (due && threadIdx.x % 4 == 0) {
                places->number[key] = places->next[key];
                fetch_ahead(key, come.next);
            }
        }
    }

    __device__ __forceinline__ static bool one_block(const Rows& info) { return info.first[0] == info.first[ROWS - 1]; }

    __device__ __forceinline__ void add(float (&s)[ROWS / 8][4], const Rows& info) const {
        const int column = threadIdx.x % 4 * 2;
        if (one_block(info)) {
            const float tau = __int_as_float(info.last[0]);
            float add0 = biased ? gate_bias(score0, tau, inverse_temperature) : 0.0f, add1 = biased ? gate_bias(score1, tau, inverse_temperature) : 0.0f;
            if (!(blocks0 >> info.first[0] & 1)) add0 = -infinity();
            if (!(blocks1 >> info.first[0] & 1)) add1 = -infinity();
            if (!biased && __all_sync(0xffffffffu, add0 == 0.0f && add1 == 0.0f)) return;
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) s[j][0] += add0, s[j][1] += add0, s[j][2] += add1, s[j][3] += add1;
            return;
        }
        if (!biased && __all_sync(0xffffffffu, blocks0 == all_blocks && blocks1 == all_blocks)) return;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int block = info.first[8 * j + column + e];
                const float tau = __int_as_float(info.last[8 * j + column + e]);
                if (biased) {
                    s[j][e] += gate_bias(score0, tau, inverse_temperature);
                    s[j][2 + e] += gate_bias(score1, tau, inverse_temperature);
                }
                if (!(blocks0 >> block & 1)) s[j][e] = -infinity();
                if (!(blocks1 >> block & 1)) s[j][2 + e] = -infinity();
            }
        }
    }

    __device__ __forceinline__ void score_gradient(const float (&ds)[ROWS / 8][4], const Rows& info, float& dscore0, float& dscore1) const {
        if (!biased) return;
        const int column = threadIdx.x % 4 * 2;
        if (one_block(info)) {
            float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) sum0 += ds[j][0] + ds[j][1], sum1 += ds[j][2] + ds[j][3];
            dscore0 += sum0 * gate_slope(score0, __int_as_float(info.last[0]), inverse_temperature);
            dscore1 += sum1 * gate_slope(score1, __int_as_float(info.last[0]), inverse_temperature);
            return;
        }
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float tau = __int_as_float(info.last[8 * j + column + e]);
                dscore0 += ds[j][e] * gate_slope(score0, tau, inverse_temperature);
                dscore1 += ds[j][2 + e] * gate_slope(score1, tau, inverse_temperature);
            }
        }
    }
};

// Partial sums of the routed keys of all superblocks. Grid [any, P], 128 threads.
extern "C" __global__ __launch_bounds__(THREADS, ROUTED_CTAS) void dkv_routed(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                                                          const float* delta, const float* scores, const float* tau, const int* lens,
                                                                          const RoutedKey* routed_keys, const int* n_open, const int* first_entry,
                                                                          const int* first_tile, float* sums, float* score_sums, int T, int G, int n_blocks,
                                                                          int n_places, int every, float inverse_temperature, int span, int unit, int n, int capacity,
                                                                          int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const long pair = blockIdx.y;
    const int b = pair / G, g = pair % G;
    const Problem x = {dout, q, k, v, lse, delta, T, G, {group, reciprocal}};
    first_tile += pair * (n + 1);
    for (int tile = blockIdx.x; tile < first_tile[n]; tile += gridDim.x) {
        // The last superblock that begins at this tile or before.
        int superblock = 0, high = n;
        while (high - superblock > 1) {
            const int middle = (superblock + high) / 2;
            if (first_tile[middle] <= tile) superblock = middle;
            else high = middle;
        }
        const int first = (tile - first_tile[superblock]) * KEYS;
        const RoutedKey* list = routed_keys + (pair * n + superblock) * span * n_places;
        const int n_here = min(KEYS, n_open[pair * n + superblock] - first);
        const int block = first_block(superblock, n, n_blocks, span), begin = block * every, end = min(first_block(superblock + 1, n, n_blocks, span) * every, lens[b]);
        __syncthreads();
        // Places without a key hold the last one again; nobody stores what becomes of them.
        copy_rows<KEYS, D, THREADS>(shared_address(shared), k, shared_address(shared) + TILE, v,
                                    [&](int i) { return ((u32)b * T + list[first + min(i, n_here - 1)].row) * G + g; });

        const int key0 = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, key1 = key0 + 8;
        RoutedBias bias;
        bias.biased = scores != nullptr;
        bias.inverse_temperature = inverse_temperature;
        const int n_valid = (end - begin + every - 1) / every;
        bias.all_blocks = n_valid >= 32 ? 0xffffffffu : (1u << n_valid) - 1;
        bias.steps_a_unit = bias.boundary = unit * every * group / ROWS;
        bias.places = (Places*)(shared + 6 * TILE + 2 * sizeof(Rows));
        bias.routed_keys = list, bias.scores = scores, bias.k = k, bias.v = v;
        bias.sums = sums + (pair * capacity + first_entry[pair * (n + 1) + superblock]) * (2 * D);
        bias.score_sums = score_sums + pair * capacity + first_entry[pair * (n + 1) + superblock];
        bias.row0 = (u32)b * T * G + g, bias.G = G;
        const RoutedKey none = {0, bias.all_blocks, -1, 0};
        const RoutedKey here0 = key0 < n_here ? list[first + key0] : none, here1 = key1 < n_here ? list[first + key1] : none;
        bias.blocks0 = here0.blocks, bias.blocks1 = here1.blocks;
        bias.score0 = bias.biased && key0 < n_here ? scores[bias.row0 + here0.row * G] : infinity();
        bias.score1 = bias.biased && key1 < n_here ? scores[bias.row0 + here1.row * G] : infinity();
        bias.due0 = here0.next >= 0 ? here0.due * bias.steps_a_unit : 0x7fffffff;
        bias.due1 = here1.next >= 0 ? here1.due * bias.steps_a_unit : 0x7fffffff;
        if (threadIdx.x % 4 == 0) {
            bias.places->number[key0] = first + key0, bias.places->number[key1] = first + key1;
            bias.fetch_ahead(key0, here0.next), bias.fetch_ahead(key1, here1.next);
        }

        Gradients grads = {};
        visit(
            grads, shared, x, b, g, begin * group, end * group,
            [&](Rows& info, int i, int query) {
                info.first[i] = query / every - block;
                info.last[i] = scores ? __float_as_int(tau[((long)b * n_blocks + query / every) * G + g]) : 0;
            },
            bias);
        bias.store(grads, key0 < n_here, key1 < n_here);
    }
}

// Add up the entries of every key in ascending order, into the first one, whose number takes the place of `first_reader`; dscores [B, T, G] (or
// null). Grid [ceil(T / 64), G, B], 256 threads: a warp has 8 keys, as far apart as there are warps, because the first keys have the longest lists.
extern "C" __global__ __launch_bounds__(256) void sum_entries(int* readers, int* first_reader, const int* entries, int* sorted, float* sums, const float* score_sums,
                                                              float* dscores, int T, int G, int capacity) {
    const int lane = threadIdx.x % 32, g = blockIdx.y, b = blockIdx.z, warp = blockIdx.x * 8 + threadIdx.x / 32, stride = gridDim.x * 8;
    const long pair = (long)b * G + g;
    entries += pair * capacity, sorted += pair * capacity, sums += pair * capacity * (2 * D), score_sums += pair * capacity;
    readers += pair * T, first_reader += pair * T;
    const int key_of_lane = warp + lane * stride;
    const bool is_key = lane < 8 && key_of_lane < T;
    const int n_of_lane = is_key ? readers[key_of_lane] : 0, first_of_lane = is_key ? first_reader[key_of_lane] : 0;
    const auto dscore = [&](int key) -> float& { return dscores[((long)b * T + key) * G + g]; };
    if (n_of_lane > 0) readers[key_of_lane] = 0;
    else if (is_key && dscores) dscore(key_of_lane) = 0.0f;
    if (n_of_lane == 1) {
        const int entry = entries[first_of_lane];
        first_reader[key_of_lane] = entry;
        if (dscores) dscore(key_of_lane) = score_sums[entry];
    }
    for (u32 left = __ballot_sync(0xffffffffu, n_of_lane > 1); left; left &= left - 1) {
        const int from = __ffs(left) - 1, key = warp + from * stride, n = __shfl_sync(0xffffffffu, n_of_lane, from), first = __shfl_sync(0xffffffffu, first_of_lane, from);
        for (int i = lane; i < n; i += 32) {
            const int mine = entries[first + i];
            int rank = 0;
            for (int j = 0; j < n; j++) rank += entries[first + j] < mine;
            sorted[first + rank] = mine;
            if (rank == 0) first_reader[key] = mine;
        }
        __syncwarp();
        constexpr int PIECES = 2 * D / 128;
        float4 sum[PIECES] = {};
        float score_sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < n; i++) {
            const long entry = sorted[first + i];
#pragma unroll
            for (int e = 0; e < PIECES; e++) {
                const float4 x = *(const float4*)(sums + entry * (2 * D) + (e * 32 + lane) * 4);
                sum[e].x += x.x, sum[e].y += x.y, sum[e].z += x.z, sum[e].w += x.w;
            }
            if (dscores) score_sum += score_sums[entry];
        }
        const long entry = sorted[first];
#pragma unroll
        for (int e = 0; e < PIECES; e++) *(float4*)(sums + entry * (2 * D) + (e * 32 + lane) * 4) = sum[e];
        if (dscores && lane == 0) dscore(key) = score_sum;
    }
}

// How a thread's two keys, positions, appear to the rows of a step.
struct LocalBias {
    int key0, key1, first_key, last_key;

    __device__ __forceinline__ bool exchange_due(int) const {
        __syncthreads();
        return false;
    }

    __device__ __forceinline__ void exchange(Gradients&, u32, u32, int) const {}

    __device__ __forceinline__ void add(float (&s)[ROWS / 8][4], const Rows& info) const {
        // Both ends of what a row sees only grow from row to row.
        if (info.first[ROWS - 1] <= first_key && last_key <= info.last[0]) return;
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
            const int2 first = *(const int2*)&info.first[8 * j + column], last = *(const int2*)&info.last[8 * j + column];
            if (key0 < first.x || key0 > last.x) s[j][0] = -infinity();
            if (key0 < first.y || key0 > last.y) s[j][1] = -infinity();
            if (key1 < first.x || key1 > last.x) s[j][2] = -infinity();
            if (key1 < first.y || key1 > last.y) s[j][3] = -infinity();
        }
    }

    __device__ __forceinline__ void score_gradient(const float (&)[ROWS / 8][4], const Rows&, float&, float&) const {}
};

// dk, dv [B, T, G, D]: what the window's queries contribute, and the sums of the routed ones. `entry_of_key`, from `sum_entries`, is
// null when nothing is routed. Grid [ceil(T / 64), G, B], 128 threads.
extern "C" __global__ __launch_bounds__(THREADS, LOCAL_CTAS) void dkv_local(const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                                                         const float* delta, const int* lens, const int* entry_of_key, const float* sums,
                                                                         bf16* dk, bf16* dv, int T, int G, int window, int every, int capacity,
                                                                         int group, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int g = blockIdx.y, b = blockIdx.z, len = lens[b], first = blockIdx.x * KEYS;
    const Problem x = {dout, q, k, v, lse, delta, T, G, {group, reciprocal}};
    if (first < len) {
        copy_rows<KEYS, D, THREADS>(shared_address(shared), k, shared_address(shared) + TILE, v,
                                    [&](int i) { return ((u32)b * T + min(first + i, len - 1)) * G + g; });
    }

    const int row0 = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    LocalBias bias = {first + row0, first + row0 + 8, first, first + KEYS - 1};
    // The last block whose strip begins at the last key or before.
    const long last_block = ((long)first + KEYS - 1 + window - 1) / every;
    const int end = (int)min((long)len, (last_block + 1) * every);
    Gradients grads = {};
    visit(
        grads, shared, x, b, g, first * group, end * group,
        [&](Rows& info, int i, int query) {
            info.first[i] = query / every * every - window + 1;
            info.last[i] = query;
        },
        bias);
    const float scale = rsqrtf((float)D);
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) grads.dk[j][e] *= scale;
    }
    if (entry_of_key) {
        const long pair = (long)b * G + g;
        const int column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int key = half ? bias.key1 : bias.key0;
            const int entry = key < T ? entry_of_key[pair * T + key] : -1;
            if (entry >= 0) {
                const float* from = sums + (pair * capacity + entry) * (2 * D) + column;
#pragma unroll
                for (int j = 0; j < D / 8; j++) {
                    const float2 a = *(const float2*)(from + 8 * j), c = *(const float2*)(from + D + 8 * j);
                    grads.dk[j][2 * half] += a.x, grads.dk[j][2 * half + 1] += a.y;
                    grads.dv[j][2 * half] += c.x, grads.dv[j][2 * half + 1] += c.y;
                }
            }
        }
    }
    copies_wait<0>();
    __syncthreads();
    accumulators_to_tile<KEYS, D>(shared, threadIdx.x / 32 * 16, grads.dk, 1.0f, 1.0f);
    accumulators_to_tile<KEYS, D>(shared + TILE, threadIdx.x / 32 * 16, grads.dv, 1.0f, 1.0f);
    __syncthreads();
    const auto target = [&](int i) { return ((u32)b * T + first + i) * G + g; };
    store_rows<KEYS, D, THREADS>(shared, dk, T - first, target);
    store_rows<KEYS, D, THREADS>(shared + TILE, dv, T - first, target);
}
