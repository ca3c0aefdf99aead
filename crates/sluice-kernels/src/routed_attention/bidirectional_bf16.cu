// Routed attention of an encoder with factors rounded to bf16, forward: a query sees the routed keys of its sequence and a window centred on it.
// Follows attention_tile/walk.cuh and slots.cuh.
// A row is one query of one head; rows of a KV head are ordered by query, then head.

// Warpgroups of a tile, and blocks of threads that must fit a multiprocessor.
constexpr int WARPGROUPS = D == 64 ? 2 : 3, CTAS = D == 64 ? 2 : 1;
constexpr int ROWS = WARPGROUPS * 64, THREADS = WARPGROUPS * 128;

// o [B, T, H, D] and lse [B, T, H] (natural logarithm). `rows` is 3 where q, k and v are rows of one matrix [B, T, 3, H, D], otherwise 1. `indices`
// [B, 1, G, n_places]. Grid: x = sequences times KV heads, y = tiles; dynamic shared memory: what `walk_over_keys` says, then what `Slots` says.
extern "C" __global__ __launch_bounds__(THREADS, CTAS) void routed_bidirectional_fwd(
    const bf16* q, const bf16* k, const bf16* v, const int* indices, const int* lens, bf16* o, float* lse, int rows, int T, int G, int n_places, int window,
    int most_steps, int group_size, u32 reciprocal) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Group group = {group_size, reciprocal};
    const int b = blockIdx.x / G, g = blockIdx.x % G, first_row = blockIdx.y * ROWS, len = lens[b];
    const int n_rows = min(ROWS, len * group.n - first_row);
    const auto at = [&](int row) { return group.at(b, T, G, g, first_row + row); };
    // Of the last row for those that are padding.
    const auto query = [&](int row) { return group.quotient(first_row + min(row, n_rows - 1)); };
    Slots slots;
    slots.n = 0;
    if (n_rows > 0) {
        const int* list = indices + (u64)blockIdx.x * n_places;
        slots.make<THREADS>(shared + ROWS * D * 2 + 4 * KEY_TILE, list, n_places, most_steps, window, len, query(0), query(n_rows - 1));
    }
    const int n_seeing = slots.n > 0 ? n_rows : 0;
    write_padding<THREADS>(o, lse, -infinity(), n_seeing, min(ROWS, T * group.n - first_row), at);
    if (n_seeing == 0) return;
    __syncthreads();
    const int window0 = slots.slot_of_window(query(row_of_thread())), window1 = slots.slot_of_window(query(row_of_thread() + 8));
    walk_over_keys<WARPGROUPS>(
        shared, q, k, v, o, lse, slots.steps(), n_rows, [&](int row) { return group.at(b, T, rows * G, g, first_row + min(row, n_rows - 1)); },
        [&](int step, int i) { return ((u32)b * T + slots.position(step * KEYS + i)) * (rows * G) + g; },
        [&](Logits& s, int step) { slots.hide(s, step, window0, window1); }, at);
}
