// Tiles of bf16 rows in shared memory, the matrix products between them and the softmax of their results; what the
// attention sources build on. Compiled with HEAD_DIM, 64 or 128.
// Knows nothing about masks or routing. Needs no header, so that NVRTC compiles it without a toolkit.
//
// A tile of R rows and D columns is D/64 panels of R rows of 128 bytes. The eight 16-byte pieces of a row are
// permuted by the row number, so that neither reading along nor across the rows meets a bank twice; it is the
// layout that Hopper's matrix instruction calls 128-byte swizzle, with the same bytes for a matrix and for its
// transpose. Tiles begin at a multiple of 1024 bytes.
//
// A warpgroup of four warps owns 64 rows of a product, each warp 16 of them. A warp's accumulators of N columns
// are `float acc[N / 8][4]`: thread `lane` holds, for column pair `8 j + 2 (lane % 4)`, row `lane / 4` in
// `acc[j][0..2]` and row `lane / 4 + 8` in `acc[j][2..4]`.
//
// On sm_90a the products are `wgmma`, which reads tiles by itself and runs on while the warp computes; elsewhere
// they are `mma` with fragments loaded by `ldmatrix`. Between `products_begin` and `products_wait` nothing may
// touch the accumulators or the registers handed in.

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int D = HEAD_DIM;
constexpr float LOG2E = 1.4426950408889634f;

// Query heads that share a KV head, and how to divide by their number: `reciprocal` is 2^32 / n rounded down, plus 1,
// which is exact while x * n < 2^32.
struct Group {
    int n;
    u32 reciprocal;

    __device__ __forceinline__ int quotient(int x) const { return n == 1 ? x : (int)__umulhi((u32)x, reciprocal); }
    // Offset in [B, T, H] of row `row` (a query times the group's heads) of KV head `g` of `G` in sequence `b`.
    __device__ __forceinline__ u32 at(int b, int T, int G, int g, int row) const {
        const int query = quotient(row);
        return ((u32)b * T + query) * (G * n) + g * n + (row - query * n);
    }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1
#else
#define WGMMA 0
#endif

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats as bf16, the first in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float low_float(u32 pair) { return __int_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) { return __int_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The thread's number, read where it is used: what follows from it is computed there and not kept in registers.
__device__ __forceinline__ u32 thread_here() {
    u32 thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// The thread's warpgroup in its block, in a form that the compiler knows to be the same for a warp.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

// Asynchronous copy of 16 bytes.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void copy4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most N groups of copies are under way, and show what arrived to the matrix unit.
template <int N>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#if WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if WGMMA

// Barriers in shared memory that count phases, by their address. A phase ends when so many threads have arrived.
__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Arrive when all copies that this thread has asked for have come.
__device__ __forceinline__ void barrier_arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Wait for the end of a phase; the one before the first has ended with parity 1.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

#endif

// Byte offset of a 16-byte piece in a tile.
template <int ROWS>
__device__ __forceinline__ u32 tile_at(int row, int piece) {
    return (piece >> 3) * (ROWS * 128) + row * 128 + (((piece ^ row) & 7) << 4);
}

// For every 16-byte piece of a tile that falls to this thread: `each(row, offset of the piece in the tile)`. A thread's
// pieces lie in one column, `threadIdx.x % (D / 8)`.
template <int ROWS, int D, int THREADS, class Each>
__device__ __forceinline__ void for_pieces(Each each) {
    constexpr int STRIDE = THREADS / (D / 8);
    static_assert(STRIDE % 8 == 0, "rows of a thread share their place in the permutation");
    const int first = threadIdx.x / (D / 8);
    const u32 offset = tile_at<ROWS>(first, threadIdx.x % (D / 8));
#pragma unroll
    for (int i = 0; i < ROWS; i += STRIDE) {
        if (ROWS % STRIDE == 0 || first + i < ROWS) each(first + i, offset + i * 128);
    }
}

// Copy rows of D numbers to a tile: to its row `i` row `source(i)` of `x`. A copy costs two instructions if `source`
// costs none: they are a good part of what a step issues.
template <int ROWS, int D, int THREADS, class Source>
__device__ __forceinline__ void copy_rows(u32 tile, const bf16* x, Source source) {
    const char* piece = (const char*)(x + threadIdx.x % (D / 8) * 8);
    for_pieces<ROWS, D, THREADS>([&](int row, u32 at) { copy16(tile + at, piece + (u64)(u32)source(row) * (D * 2)); });
}

// The same rows of two matrices to two tiles.
template <int ROWS, int D, int THREADS, class Source>
__device__ __forceinline__ void copy_rows(u32 x_tile, const bf16* x, u32 y_tile, const bf16* y, Source source) {
    const char *x_piece = (const char*)(x + threadIdx.x % (D / 8) * 8), *y_piece = (const char*)(y + threadIdx.x % (D / 8) * 8);
    for_pieces<ROWS, D, THREADS>([&](int row, u32 at) {
        const u64 from = (u64)(u32)source(row) * (D * 2);
        copy16(x_tile + at, x_piece + from);
        copy16(y_tile + at, y_piece + from);
    });
}

__device__ __forceinline__ void products_begin() {
#if WGMMA
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void products_commit() {
#if WGMMA
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Wait until at most N groups of products are under way.
template <int N>
__device__ __forceinline__ void products_wait() {
#if WGMMA
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}

// Four 8 x 8 matrices of a tile; a lane names a row of one.
__device__ __forceinline__ void load_fragments(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

#if WGMMA

// Write four 8 x 8 matrices to a tile; a lane names a row of one, and has the numbers that it has in accumulators.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Describes a tile to wgmma: 128-byte swizzle, groups of 8 rows 1024 bytes apart, panels `panel` bytes apart. The address
// comes in two parts so that only the first is computed.
__device__ __forceinline__ u64 describe(u32 tile, u32 offset, u32 panel) {
    const u32 low = (tile >> 4) + (offset >> 4) + (panel >> 4 << 16), high = (1024 >> 4) | 1u << 30;
    return (u64)high << 32 | low;
}

#define ACC4(j) "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define ACC16(j) ACC4(j), ACC4(j + 1), ACC4(j + 2), ACC4(j + 3)
#define REGS16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define REGS32                                                                                                      \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"   \
    "%29,%30,%31}"
#define REGS64                                                                                                      \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"   \
    "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"  \
    "%56,%57,%58,%59,%60,%61,%62,%63}"

__device__ __forceinline__ void wgmma_tiles(float (&acc)[4][4], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " REGS16
                 ", %16, %17, p, 1, 1, 0, 0;\n}"
                 : ACC16(0)
                 : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_tiles(float (&acc)[8][4], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS32
                 ", %32, %33, p, 1, 1, 0, 0;\n}"
                 : ACC16(0), ACC16(4)
                 : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_registers(float (&acc)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGS32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : ACC16(0), ACC16(4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void wgmma_registers(float (&acc)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGS64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : ACC16(0), ACC16(4), ACC16(8), ACC16(12)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#else

__device__ __forceinline__ void load_fragments_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// acc = A B^T: rows `a_row..a_row + 64` of tile `a`, all N (32 or 64) rows of tile `b`, over D columns.
template <int D, int A_ROWS, int N>
__device__ __forceinline__ void product_of_tiles(float (&acc)[N / 8][4], u32 a, int a_row, u32 b) {
#if WGMMA
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const u64 a_tile = describe(a + a_row * 128, (i / 4) * (A_ROWS * 128) + (i % 4) * 32, 16);
        const u64 b_tile = describe(b, (i / 4) * (N * 128) + (i % 4) * 32, 16);
        wgmma_tiles(acc, a_tile, b_tile, i > 0);
    }
#else
    const int lane = threadIdx.x % 32, row = a_row + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < N / 8; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        u32 x[4];
        load_fragments(x, a + tile_at<A_ROWS>(row, 2 * i + lane / 16));
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) {
            u32 y[4];
            load_fragments(y, b + tile_at<N>(8 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
            mma(acc[j], x, y[0], y[1]);
            mma(acc[j + 1], x, y[2], y[3]);
        }
    }
#endif
}

// acc += A B: A in registers (see `to_fragments`), tile `b` of K rows and D columns.
template <int K, int D>
__device__ __forceinline__ void product_with_tile(float (&acc)[D / 8][4], const u32 (&a)[K / 16][4], u32 b) {
#if WGMMA
#pragma unroll
    for (int i = 0; i < K / 16; i++) wgmma_registers(acc, a[i], describe(b, i * 2048, K * 128));
#else
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < K / 16; i++) {
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            u32 y[4];
            load_fragments_transposed(y, b + tile_at<K>(16 * i + lane % 16, j + lane / 16));
            mma(acc[j], a[i], y[0], y[1]);
            mma(acc[j + 1], a[i], y[2], y[3]);
        }
    }
#endif
}

// Accumulators of N columns as the left factor of the next product.
template <int N>
__device__ __forceinline__ void to_fragments(u32 (&a)[N / 16][4], const float (&acc)[N / 8][4]) {
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        a[i][0] = pack(acc[2 * i][0], acc[2 * i][1]);
        a[i][1] = pack(acc[2 * i][2], acc[2 * i][3]);
        a[i][2] = pack(acc[2 * i + 1][0], acc[2 * i + 1][1]);
        a[i][3] = pack(acc[2 * i + 1][2], acc[2 * i + 1][3]);
    }
}

// Write a warp's accumulators, times a factor for either row, as bf16 to 16 rows of a tile from `row` on.
template <int ROWS, int D>
__device__ __forceinline__ void accumulators_to_tile(unsigned char* tile, int row, const float (&acc)[D / 8][4], float f0, float f1) {
#if WGMMA
    const int lane = thread_here() % 32;
    const u32 at = shared_address(tile) + tile_at<ROWS>(row + lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const float(&x)[4] = acc[2 * i], (&y)[4] = acc[2 * i + 1];
        store_matrices((at ^ i % 4 * 32) + i / 4 * (ROWS * 128), pack(x[0] * f0, x[1] * f0), pack(x[2] * f1, x[3] * f1), pack(y[0] * f0, y[1] * f0), pack(y[2] * f1, y[3] * f1));
    }
#else
    const int lane = threadIdx.x % 32, first = row + lane / 4;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        *(u32*)(tile + tile_at<ROWS>(first, j) + lane % 4 * 4) = pack(acc[j][0] * f0, acc[j][1] * f0);
        *(u32*)(tile + tile_at<ROWS>(first + 8, j) + lane % 4 * 4) = pack(acc[j][2] * f1, acc[j][3] * f1);
    }
#endif
}

// Write the first `n` rows of a tile to the rows `target(i)` of `x`.
template <int ROWS, int D, int THREADS, class Target>
__device__ __forceinline__ void store_rows(const unsigned char* tile, bf16* x, int n, Target target) {
    for_pieces<ROWS, D, THREADS>([&](int row, u32 at) {
        if (row < n) *(uint4*)(x + (u64)(u32)target(row) * D + threadIdx.x % (D / 8) * 8) = *(const uint4*)(tile + at);
    });
}

// Larger and sum of a value over the four threads that share a row of accumulators.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Logits of a thread's two rows become weights: 2^(logit * scale - top), with `scale` and `top` in units of log2. The sums grow by them.
template <int N>
__device__ __forceinline__ void exponentials(float (&s)[N][4], float scale, float top0, float top1, float& sum0, float& sum1) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        s[j][0] = exp2_fast(s[j][0] * scale - top0);
        s[j][1] = exp2_fast(s[j][1] * scale - top0);
        s[j][2] = exp2_fast(s[j][2] * scale - top1);
        s[j][3] = exp2_fast(s[j][3] * scale - top1);
        sum0 += s[j][0] + s[j][1];
        sum1 += s[j][2] + s[j][3];
    }
}

// Softmax of a thread's two rows over keys that come in steps: what earlier steps added up shrinks when a maximum grows.
// Maxima begin below any logit, but finite: a row may see nothing in its first steps.
struct OnlineSoftmax {
    float max0 = -3e38f, max1 = -3e38f, sum0 = 0.0f, sum1 = 0.0f, shrink0, shrink1;

    // Logits of a step become weights.
    template <int N>
    __device__ __forceinline__ void weigh(float (&s)[N][4], float scale) {
        float new0 = max0, new1 = max1;
#pragma unroll
        for (int j = 0; j < N; j++) {
            new0 = fmaxf(new0, fmaxf(s[j][0], s[j][1]));
            new1 = fmaxf(new1, fmaxf(s[j][2], s[j][3]));
        }
        new0 = quad_max(new0), new1 = quad_max(new1);
        const float top0 = new0 * scale, top1 = new1 * scale;
        shrink0 = exp2_fast(max0 * scale - top0), shrink1 = exp2_fast(max1 * scale - top1);
        max0 = new0, max1 = new1;
        sum0 *= shrink0, sum1 *= shrink1;
        exponentials(s, scale, top0, top1, sum0, sum1);
    }

    // What the weights of earlier steps gave. Maxima settle after a few steps.
    template <int N>
    __device__ __forceinline__ void shrink(float (&out)[N][4]) const {
        if (!__any_sync(0xffffffffu, shrink0 != 1.0f || shrink1 != 1.0f)) return;
#pragma unroll
        for (int j = 0; j < N; j++) {
            out[j][0] *= shrink0, out[j][1] *= shrink0;
            out[j][2] *= shrink1, out[j][3] *= shrink1;
        }
    }
};

// Logits of a thread's two rows become their gradients, weight * (ds - delta); `ds` are the products of dout and values, `top` log sums
// in units of log2.
template <int N>
__device__ __forceinline__ void logits_to_gradients(float (&s)[N][4], const float (&ds)[N][4], float scale, float top0, float top1, float delta0, float delta1) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        s[j][0] = exp2_fast(s[j][0] * scale - top0) * (ds[j][0] - delta0);
        s[j][1] = exp2_fast(s[j][1] * scale - top0) * (ds[j][1] - delta0);
        s[j][2] = exp2_fast(s[j][2] * scale - top1) * (ds[j][2] - delta1);
        s[j][3] = exp2_fast(s[j][3] * scale - top1) * (ds[j][3] - delta1);
    }
}
