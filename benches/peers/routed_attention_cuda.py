"""The GPU kernels of routing and routed attention, compiled with NVRTC from the sources that Sluice embeds and launched on PyTorch
tensors. Only for comparisons with PyTorch (`attention_gpu.py`)."""

import ctypes
import glob
import math
import os
import pathlib

import torch

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "crates/sluice-kernels/src"
TILE = KERNELS / "attention_tile/tile.cuh"
SOURCES = {
    "routing": [KERNELS / "top_k_routing/k_best.cuh", KERNELS / "top_k_routing/top_k_routing.cu"],
    "attention": [TILE, KERNELS / "routed_attention/routed_attention.cu", KERNELS / "routed_attention/query_gradient.cu",
                  KERNELS / "routed_attention/query_gradient_sm90.cu", KERNELS / "routed_attention/forward_sm90.cu"],
    "keys": [TILE] + [KERNELS / "routed_attention" / name for name in ("routed_keys.cu", "key_gradients.cu", "one_pass.cuh", "routed_gradients_sm90.cu",
                                                                       "local_gradients_sm90.cu")],
}
ARCH = "sm_90a"  # Or compute_80, for the path of older cards.
LOADED = {}


def nvrtc():
    import nvidia

    for root in nvidia.__path__:
        for path in sorted(glob.glob(os.path.join(root, "*/lib/libnvrtc.so.*"))):
            if ".alt." not in path:
                return ctypes.CDLL(path)
    return ctypes.CDLL("libnvrtc.so.13")


def driver():
    return ctypes.CDLL("libcuda.so.1")


def check(code, what):
    if code != 0:
        raise RuntimeError(f"{what}: CUDA error {code}")


def compile_source(source, arch, defines):
    """Machine code for `sm_..`; for `compute_..` PTX, which the driver compiles for the card: the path of older cards on a newer one."""
    lib = nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None), "nvrtcCreateProgram")
    options = [option.encode() for option in [f"-arch={arch}", "--std=c++17"] + [f"-D{name}={value}" for name, value in defines.items()]]
    code = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if code != 0:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    get_size, get = (lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN) if arch.startswith("sm_") else (lib.nvrtcGetPTXSize, lib.nvrtcGetPTX)
    check(get_size(program, ctypes.byref(size)), "size of the code")
    code = ctypes.create_string_buffer(size.value)
    check(get(program, code), "code")
    return code.raw


def function(kind, name, **defines):
    """The kernel `name` of a source compiled with `defines`."""
    key = (kind, ARCH, tuple(sorted(defines.items())))
    if key not in LOADED:
        code = compile_source("\n".join(path.read_text() for path in SOURCES[kind]), ARCH, defines)
        module = ctypes.c_void_p()
        check(driver().cuModuleLoadData(ctypes.byref(module), code), f"cuModuleLoadData of {kind} {defines}")
        LOADED[key] = (module, {})
    module, functions = LOADED[key]
    if name not in functions:
        found = ctypes.c_void_p()
        check(driver().cuModuleGetFunction(ctypes.byref(found), module, name.encode()), f"cuModuleGetFunction {name}")
        check(driver().cuFuncSetAttribute(found, 8, 227 * 1024 - static_shared(found)), "dynamic shared memory")
        functions[name] = found
    return functions[name]


def static_shared(found):
    bytes_ = ctypes.c_int()
    check(driver().cuFuncGetAttribute(ctypes.byref(bytes_), 1, found), "cuFuncGetAttribute")
    return bytes_.value


def launch(kernel, grid, threads, shared, *arguments):
    """Tensors and None become pointers, int an i32, float an f32."""
    if 0 in grid:
        return
    values = []
    for argument in arguments:
        if argument is None:
            values.append(ctypes.c_void_p(0))
        elif isinstance(argument, torch.Tensor):
            assert argument.is_contiguous()
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            values.append(ctypes.c_float(argument))
        else:
            values.append(ctypes.c_uint(argument & 0xFFFFFFFF))
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values])
    grid = list(grid) + [1] * (3 - len(grid))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    check(driver().cuLaunchKernel(kernel, *grid, threads, 1, 1, shared, stream, pointers, None), f"launch {grid} x {threads}, {shared} bytes")


def ceil(a, b):
    return -(-a // b)


class Routed:
    """Buffers and launches for one shape; `poison` fills every output with NaN or nonsense first."""

    def __init__(self, lens, t, heads, kv_heads, d, window, top_k, every, n_sink=4, temperature=None, span=None):
        dev = "cuda"
        self.b, self.t, self.h, self.g, self.d = len(lens), t, heads, kv_heads, d
        self.window, self.top_k, self.every, self.n_sink = window, top_k, every, n_sink
        self.lens = torch.tensor(lens, dtype=torch.int32, device=dev)
        self.inverse_temperature = 1.0 / temperature if temperature else 1.0
        self.biased, self.wanted_span = temperature is not None, span
        self.n_blocks = ceil(t, every)
        self.n_candidates = max(0, (self.n_blocks - 1) * every + 1 - window)
        self.n_places = min(top_k, self.n_candidates)
        self.group = heads // kv_heads
        self.division = (self.group, 2**32 // self.group + 1 if self.group > 1 else 0)
        b, g = self.b, self.g
        f32 = lambda *shape: torch.full(shape, float("nan"), dtype=torch.float32, device=dev)
        i32 = lambda *shape: torch.full(shape, -77, dtype=torch.int32, device=dev)
        bf16 = lambda *shape: torch.full(shape, float("nan"), dtype=torch.bfloat16, device=dev)
        self.plan(4096, 200 << 10)
        lists = lambda n: torch.empty((b, g, n, top_k), dtype=torch.int64, device=dev)
        self.best, self.group_best, self.before = lists(self.n_chunks), lists(self.n_groups), lists(self.n_chunks)
        self.indices, self.tau = i32(b, self.n_blocks, g, self.n_places), f32(b, self.n_blocks, g)
        self.o, self.lse = bf16(b, t, heads, d), f32(b, t, heads)

    def plan(self, few, most_bytes):
        """Chunks and groups of the fewest launches that leave no block too many candidates, as `Plan` in `top_k_routing/cuda.rs`."""

        def one_group(chunk, before):
            self.chunk, self.has_before = chunk, before
            self.n_chunks = max(1, ceil(self.n_candidates, chunk))
            self.chunk_group, self.n_groups = self.n_chunks, 1

        k = self.top_k
        if self.n_candidates <= few:
            return one_group(max(self.n_candidates, k), False)
        one_group(max(1024, k), False)
        if (self.n_chunks - 1) * k <= few:
            return
        chunk = max(2048, k)
        while True:
            one_group(chunk, True)
            if (self.n_chunks - 1) * k > 2 * few:
                self.chunk_group = math.isqrt(self.n_chunks)
                self.n_groups = ceil(self.n_chunks, self.chunk_group)
            if (self.n_groups - 1 + self.chunk_group) * k * 8 <= most_bytes:
                return
            chunk *= 2

    def prepare_bwd(self):
        """Buffers of the backward pass."""
        dev = "cuda"
        f32 = lambda *shape: torch.full(shape, float("nan"), dtype=torch.float32, device=dev)
        i32 = lambda *shape: torch.full(shape, -77, dtype=torch.int32, device=dev)
        bf16 = lambda *shape: torch.full(shape, float("nan"), dtype=torch.bfloat16, device=dev)
        b, t, g, pairs = self.b, self.t, self.g, self.b * self.g
        # As `one_pass.rs` decides; a wanted span means two passes.
        self.one_pass = (ARCH == "sm_90a" and self.d == 64 and self.every == 64 and self.window <= 129 and 128 < self.n_places <= 256
                         and self.n_blocks * pairs >= 4 * 132 and self.wanted_span is None)
        span = self.wanted_span
        if self.one_pass:
            self.n_super, span = self.superblocks(pairs)
        elif span is None:
            # Long superblocks leave fewer partial sums, short ones more to do side by side; the table of keys must fit.
            span = 32
            while span > 1 and (span * self.n_places > 4096 and span > 8 or span * self.n_places > 8192 or ceil(self.n_blocks, span) * pairs < (48 if span * self.every <= 512 else 128)):
                span //= 2
        self.span = span
        if not self.one_pass:
            self.n_super = ceil(self.n_blocks, span)
        self.capacity = max(1, min(self.n_blocks * self.n_places, t + self.n_super * self.n_places))
        # Blocks between which steps of 64 rows begin: there a key may take the place of another, if that saves a wave.
        waves = lambda tiles: ceil(self.n_super * pairs * tiles, 2 * 132)
        places = ceil(self.n_places, 64)
        self.unit = 1 if self.one_pass else 64 // math.gcd(64, self.every * self.group) if waves(places) < waves(places + 1) else span
        self.n_rows = self.n_blocks * self.every * self.group
        self.rows = f32(pairs, self.n_rows, 2) if self.one_pass else None
        self.side = torch.cuda.Stream()
        self.routed_keys = i32(pairs, self.n_super, span * self.n_places, 4)
        self.n_keys, self.n_open = i32(pairs, self.n_super), i32(pairs, self.n_super)
        self.first_entry, self.first_tile = i32(pairs, self.n_super + 1), i32(pairs, self.n_super + 1)
        self.readers = torch.zeros((pairs, t), dtype=torch.int32, device=dev)
        self.first_reader, self.next_reader, self.n_listed = i32(pairs, t), i32(pairs, t), i32(pairs)
        self.entries, self.sorted = i32(pairs, self.capacity), i32(pairs, self.capacity)
        self.sums, self.score_sums = f32(pairs, self.capacity, 2 * self.d), f32(pairs, self.capacity)
        self.dq, self.delta = bf16(b, t, self.h, self.d), f32(b, t, self.h)
        self.dk, self.dv = bf16(b, t, g, self.d), bf16(b, t, g, self.d)
        self.dscores = f32(b, t, g) if self.biased else None

    def superblocks(self, pairs, multiprocessors=132):
        """How many and how long, as `superblocks` in `one_pass.rs`."""
        most, best = max(1, min(32, 8192 // self.n_places)), None
        for waves in range(1, ceil(self.n_blocks * pairs, multiprocessors) + 1):
            n = min(max(waves * multiprocessors // pairs, 1), self.n_blocks)
            span = ceil(self.n_blocks, n)
            time = ceil(n * pairs, multiprocessors) * (span + 1)
            if span <= most and (best is None or time < best[0]):
                best = time, n, span
        return best[1:]

    def route(self, scores):
        if self.n_places == 0:
            self.tau.fill_(-float("inf"))
            return
        f, pairs, threads = lambda name: function("routing", name), self.b * self.g, 512
        if self.n_chunks > 1:
            launch(f("best_of_chunks"), (self.n_chunks, self.g, self.b), threads, 4 * self.chunk, scores, self.lens, self.best, self.t, self.g, self.n_sink, self.top_k,
                   self.chunk)
        before = self.before if self.has_before else None
        if self.has_before:
            if self.n_groups > 1:
                launch(f("best_of_groups"), (self.n_groups, pairs), threads, 8 * self.chunk_group * self.top_k, self.best, self.group_best, self.n_chunks,
                       self.chunk_group, self.top_k)
            launch(f("best_before"), (self.n_chunks, pairs), threads, 8 * (self.n_groups - 1 + self.chunk_group) * self.top_k, self.best, self.group_best, before,
                   self.chunk_group, self.n_groups, self.top_k)
        listed = 8 * self.top_k * (1 if self.has_before else self.n_chunks - 1)
        # Consecutive blocks of one run share most of the work.
        run = max(1, min(self.n_blocks * pairs // 128, (1024 - self.top_k) // self.every if self.top_k <= 512 else 1, self.n_blocks))
        contenders = 8 * 1024 if run > 1 else 0
        launch(f("route_blocks"), (ceil(self.n_blocks, run), self.g, self.b), threads, contenders + listed + 4 * self.chunk, scores, self.lens, self.best, before,
               self.indices, self.tau, self.t, self.g, self.n_blocks, self.n_places, self.window, self.top_k, self.every, self.n_sink, self.chunk, self.n_chunks, run)

    def attention(self, pass_):
        warpgroups = 1 if self.d == 64 else 2
        grid = (self.n_blocks * ceil(self.every * self.group, warpgroups * 64), self.g, self.b)
        row_tile, key_tile = warpgroups * 64 * self.d * 2, 64 * self.d * 2
        shared = row_tile + 4 * key_tile if pass_ == "fwd" else 2 * row_tile + 5 * key_tile
        return function("attention", "routed_attention_" + pass_, HEAD_DIM=self.d), grid, warpgroups * 128, shared + 8 * self.n_places

    def keys(self, name):
        return function("keys", name, HEAD_DIM=self.d)

    def fwd(self, q, k, v, scores):
        kernel, rows, tile = self.attention("fwd"), self.every * self.group, 192 if self.d == 64 else 128
        if ARCH == "sm_90a" and rows % tile == 0:
            shared = 2 * tile * self.d + (4 if self.d == 64 else 2) * (4 * 64 * self.d + 16 + 4 * 64)
            kernel = function("attention", "routed_attention_fwd_sm90", HEAD_DIM=self.d), (self.n_blocks * (rows // tile), self.g, self.b), 2 * tile, shared
        launch(*kernel, q, k, v, scores if self.biased else None, self.indices, self.tau, self.lens, self.o, self.lse, self.t, self.g,
               self.n_blocks, self.n_places, self.window, self.every, self.inverse_temperature, *self.division)

    def bwd_dq(self, dout, q, k, v, scores):
        if self.d == 128 and ARCH == "sm_90a":
            n_tiles = self.n_blocks * ceil(self.every * self.group, 128) * self.g * self.b
            launch(function("attention", "routed_attention_dq_sm90", HEAD_DIM=128), (min(132, n_tiles),), 384, (4 * 128 + 6 * 64) * 256 + 2904, dout, q, k, v, self.o,
                   self.lse, scores if self.biased else None, self.indices, self.tau, self.lens, self.dq, self.delta, self.t, self.g, self.n_blocks, self.n_places,
                   self.window, self.every, self.inverse_temperature, *self.division, n_tiles)
            return
        launch(*self.attention("dq"), dout, q, k, v, self.o, self.lse, scores if self.biased else None, self.indices, self.tau, self.lens, self.dq, self.delta,
               self.t, self.g, self.n_blocks, self.n_places, self.window, self.every, self.inverse_temperature, *self.division)

    def bwd_index(self):
        if self.n_places == 0:
            return
        grid, pairs = (self.n_super, self.g, self.b), self.b * self.g
        slots = 256
        while slots < 2 * self.span * self.n_places:
            slots *= 2
        launch(self.keys("superblock_keys"), grid, 512, slots * 8 + 4 * self.span * self.n_places, self.indices, self.lens, self.routed_keys, self.n_keys, self.n_open,
               self.readers, self.n_listed, self.t, self.g, self.n_blocks, self.n_places, self.every, self.span, self.unit, slots)
        launch(self.keys("place_entries"), (ceil(self.t, 4096), pairs), 1024, 0, self.n_keys, self.n_open, self.readers, self.first_entry, self.first_tile,
               self.first_reader, self.next_reader, self.n_listed, self.t, self.n_super, self.capacity)
        launch(self.keys("list_entries"), grid, 256, 0, self.routed_keys, self.n_keys, self.first_entry, self.next_reader, self.entries, self.t, self.g,
               self.n_places, self.span, self.capacity)

    def key_shared(self):
        return 6 * 64 * self.d * 2 + 2 * 4 * 64 * 4

    def routed_shared(self):
        return self.key_shared() + 64 * (16 + 8)

    def bwd_routed(self, dout, q, k, v, scores):
        if self.n_places == 0:
            return
        pairs = self.b * self.g
        if self.one_pass:
            launch(self.keys("routed_gradients_sm90"), (self.n_super, pairs), 384, 227504, dout, q, k, v, self.rows, scores if self.biased else None, self.tau,
                   self.lens, self.routed_keys, self.n_keys, self.n_open, self.first_entry, self.sums, self.score_sums, self.dq, self.t, self.g, self.n_blocks,
                   self.n_places, self.every, self.inverse_temperature, self.span, self.capacity, *self.division)
            return self.sum_entries()
        tiles = self.n_super * ceil(self.n_places, 64) * (1 if self.unit == 1 else 2)
        scores = scores if self.biased else None
        launch(self.keys("dkv_routed"), (tiles, pairs), 128, self.routed_shared(), dout, q, k, v, self.lse, self.delta, scores, self.tau, self.lens, self.routed_keys,
               self.n_open, self.first_entry, self.first_tile, self.sums, self.score_sums, self.t, self.g, self.n_blocks, self.n_places,
               self.every, self.inverse_temperature, self.span, self.unit, self.n_super, self.capacity, *self.division)
        self.sum_entries()

    def sum_entries(self):
        launch(self.keys("sum_entries"), (ceil(self.t, 64), self.g, self.b), 256, 0, self.readers, self.first_reader, self.entries, self.sorted, self.sums, self.score_sums,
               self.dscores, self.t, self.g, self.capacity)

    def bwd_local(self, dout, q, k, v):
        if self.one_pass:
            pairs = self.b * self.g
            chunk = ceil(self.n_blocks, max(1, 132 // pairs))
            launch(self.keys("local_gradients_sm90"), (ceil(self.n_blocks, chunk), pairs), 512, 224432, dout, q, k, v, self.rows, self.lens, self.first_reader,
                   self.sums, self.dq, self.dk, self.dv, self.t, self.g, self.n_blocks, self.window, chunk, self.capacity, *self.division)
            return
        routed = self.n_places > 0
        launch(self.keys("dkv_local"), (ceil(self.t, 64), self.g, self.b), 128, self.key_shared(), dout, q, k, v, self.lse, self.delta, self.lens,
               self.first_reader if routed else None, self.sums, self.dk, self.dv, self.t, self.g, self.window, self.every, self.capacity, *self.division)

    def bwd(self, dout, q, k, v, scores):
        if self.n_places == 0 and self.biased:
            self.dscores.zero_()
        if self.one_pass:
            # Beside the index, as in `one_pass.rs`.
            stream = torch.cuda.current_stream()
            self.side.wait_stream(stream)
            self.bwd_index()
            with torch.cuda.stream(self.side):
                launch(self.keys("row_products"), (ceil(self.n_rows, 128), self.b * self.g), 256, 0, dout, self.o, self.lse, self.lens, self.rows, self.t, self.g,
                       self.n_rows, *self.division)
            stream.wait_stream(self.side)
        else:
            self.bwd_dq(dout, q, k, v, scores)
            self.bwd_index()
        self.bwd_routed(dout, q, k, v, scores)
        self.bwd_local(dout, q, k, v)
