"""Routing and routed attention on the GPU: correctness against a plain float64 twin, then time beside cuDNN attention in PyTorch.

    python benches/peers/attention_gpu.py --check --time --out benches/results/attention_gpu.json

`--check` runs odd cases forward and backward with outputs poisoned by NaN and unseen rows too, twice, and compares the two runs bit by bit.
`--time` takes medians of graph replays, bf16, batch 1, in one process with the peer. The floor of a row is the larger of its FLOPs over the
measured rate of an 8192^3 bf16 product and its bytes (every input read once, every output written once) over the measured copy bandwidth.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import torch

import routed_attention_cuda as ours
from routed_attention_cuda import Routed, ceil

# heads, kv heads, head dim
SMALL, LARGE = (9, 3, 64), (32, 8, 128)


def case(t=1000, shape=SMALL, w=8, k=16, r=8, bias=True, lens=None, ties=False, sinks=2, span=None, steep=None):
    return dict(t=t, shape=shape, w=w, k=k, r=r, bias=bias, lens=lens or [t], ties=ties, sinks=sinks, span=span, steep=steep)


CASES = [
    case(t=1),
    case(t=63, r=64),
    case(t=100, w=1, r=1),
    case(t=100, lens=[100, 41, 0], bias=False),
    case(w=1, r=64, k=33),
    case(ties=True, k=40, r=8, w=5),
    case(r=1, w=8, k=64, lens=[1000, 640]),
    case(t=1000, shape=LARGE, w=128, k=256, r=64),
    case(t=1000, shape=LARGE, w=128, k=100, r=8, bias=False, lens=[1000, 333]),
    case(t=1000, shape=(4, 4, 64), w=3, k=100, r=64),
    case(t=1500, shape=(2, 1, 128), w=200, k=500, r=100),
    case(t=4096, w=128, k=256, r=64, ties=True),
    case(t=4096, w=128, k=256, r=64, bias=False, lens=[4096, 1300], sinks=4),
    case(t=4096, shape=LARGE, w=128, k=256, r=64, sinks=4),
    case(t=3000, shape=(3, 1, 64), w=8, k=1500, r=8),
    case(t=2100, shape=(4, 1, 128), w=2100, k=1, r=64, bias=False),  # Dense causal attention.
    case(t=900, shape=(2, 1, 64), w=16, k=64, r=64),  # Tiles of 128 rows.
    # Places of keys that change hands between several blocks of queries.
    case(t=9000, shape=(8, 4, 128), w=64, k=128, r=16, lens=[9000, 700]),
    case(t=16384, k=64),
    case(t=2000, w=200, k=300, r=128, lens=[2000, 700], bias=False),  # Two tiles of 192 rows.
    # Logits so far apart that the first keys' largest says nothing about the others'.
    case(w=128, k=256, r=64, bias=False, steep=60.0),
    case(w=128, k=100, r=64, lens=[1000, 333], steep=60.0),
    case(shape=LARGE, w=128, k=100, r=64, lens=[1000, 333], steep=60.0),
    # Gradients in one pass: lengths that end within blocks and superblocks, group sizes, keys that come and go, few places, windows.
    case(t=11300, w=128, k=256, r=64, lens=[11300, 5050], sinks=4),
    case(t=12000, w=100, k=200, r=64, bias=False, lens=[12000, 0, 64, 129]),
    case(t=4200, shape=(8, 8, 64), w=129, k=256, r=64, lens=[4200, 4199]),
    case(t=12000, shape=(10, 2, 64), w=65, k=140, r=64, ties=True, lens=[12000, 3001]),
    case(t=17000, shape=(4, 2, 64), w=1, k=256, r=64, bias=False, steep=60.0),
    # Routing by chunks, and what precedes them in one group and in several.
    case(t=6000, shape=(1, 1, 64), w=128, k=256, r=100, ties=True, lens=[6000, 4500]),
    case(t=20000, shape=(1, 1, 64), w=128, k=256, r=512, bias=False),
    case(t=20000, shape=(1, 1, 64), w=8, k=1500, r=512, ties=True, bias=False),
]


def random(*shape, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def inputs(c, seed):
    b, t, (h, g, d) = len(c["lens"]), c["t"], c["shape"]
    q, k, v, dout = (random(b, t, n, d, seed=seed + i).bfloat16() for i, n in enumerate([h, g, g, h]))
    scores = random(b, t, g, seed=seed + 9)
    if c["steep"]:
        q = q * c["steep"]
    if c["ties"]:
        scores = (scores * 2).round()  # With zeros of both signs.
    for i, n in enumerate(c["lens"]):
        for x in (q, k, v, dout, scores):
            x[i, n:] = float("nan")
    return q, k, v, dout, scores


def routing_twin(c, scores):
    """Kept [B, n_blocks, G, T] as booleans and tau [B, n_blocks, G]: sort every block's candidates."""
    b, t, g = scores.shape
    r, w, k = c["r"], c["w"], c["k"]
    n_blocks = ceil(t, r)
    n_candidates = (torch.arange(n_blocks, device="cuda") * r + 1 - w).clamp(min=0)
    kept = torch.zeros((b, n_blocks, g, t), dtype=torch.bool, device="cuda")
    tau = torch.full((b, n_blocks, g), -float("inf"), device="cuda")
    position = torch.arange(t, device="cuda")
    for i, length in enumerate(c["lens"]):
        for j in range(g):
            s = scores[i, :, j].double() + 0.0
            s[: c["sinks"]] = float("inf")
            s[length:] = -float("inf")
            # Ascending by score, then position; a candidate's place in this order is its rank.
            order = torch.argsort(s, stable=True)
            rank = torch.empty_like(order)
            rank[order] = position
            for begin in range(0, ceil(length, r), 512):
                block = torch.arange(begin, min(begin + 512, ceil(length, r)), device="cuda")
                ranks = torch.where(position[None] < n_candidates[block, None], rank[None], -1)
                best = ranks.topk(min(k, t), dim=1).values
                worst = best[:, -1].clamp(min=0)
                kept[i, block, j] = ranks >= worst[:, None]
                full = (n_candidates[block] >= k) & (k <= t)
                tau[i, block, j] = torch.where(full, s[order[worst]].float(), tau[i, block, j])
    return kept, tau


def attention_twin(c, q, k, v, dout, scores, kept, tau, temperature):
    """o, lse, dq, dk, dv, dscores in float64."""
    (b, t, h, d), g = q.shape, k.shape[2]
    group = h // g
    out = [torch.zeros_like(x, dtype=torch.float64) for x in (q, q[..., 0], q, k, v, scores)]
    out[1].fill_(-float("inf"))
    for i, n in enumerate(c["lens"]):
        for j in range(g if n else 0):
            block = torch.arange(n, device="cuda") // c["r"]
            first = (block * c["r"] - c["w"] + 1).clamp(min=0)
            position = torch.arange(n, device="cuda")
            local = (position[None] >= first[:, None]) & (position[None] <= position[:, None])
            routed = kept[i, block, j, :n]
            heads = slice(j * group, (j + 1) * group)
            qs, ks, vs, s = (x.double().detach().requires_grad_() for x in (q[i, :n, heads], k[i, :n, j], v[i, :n, j], scores[i, :n, j]))
            z = torch.einsum("thd,sd->hts", qs, ks) / math.sqrt(d)
            if temperature:
                x = (s[None] - tau[i, block, j].double()[:, None]) / temperature
                plain = (position[None] < c["sinks"]) | torch.isinf(tau[i, block, j])[:, None] | ~routed
                z = z + torch.where(plain, 0.0, torch.nn.functional.logsigmoid(torch.where(plain, 0.0, x)))
            z = z.masked_fill(~(local | routed), -float("inf"))
            lse = torch.logsumexp(z, dim=2)
            o = torch.einsum("hts,sd->thd", torch.exp(z - lse[..., None]), vs)
            grads = torch.autograd.grad(o, [qs, ks, vs, s], dout[i, :n, heads].double(), allow_unused=True)
            out[0][i, :n, heads], out[1][i, :n, heads] = o.detach(), lse.detach().T
            out[2][i, :n, heads], out[3][i, :n, j], out[4][i, :n, j] = grads[:3]
            if grads[3] is not None:
                out[5][i, :n, j] = grads[3]
    return out


def error(got, want):
    """|got - want| / |want|; infinities must agree."""
    got, want = got.double(), want.double()
    finite = torch.isfinite(want)
    if not bool((got[~finite] == want[~finite]).all()):
        return float("inf")
    scale = float(want[finite].norm())
    e = float((got[finite] - want[finite]).norm()) / (scale if scale > 0 else 1.0)
    return e if math.isfinite(e) else float("inf")


def run_case(c, seed):
    q, k, v, dout, scores = inputs(c, seed)
    temperature = 0.7 if c["bias"] else None
    marked = scores.clone()
    marked[:, : c["sinks"]] = float("inf")  # As `mark_sinks` does for the kernel.
    results = []
    for _ in range(2):
        x = Routed(c["lens"], c["t"], *c["shape"], c["w"], c["k"], c["r"], c["sinks"], temperature, c["span"])
        x.prepare_bwd()
        x.route(scores)
        x.fwd(q, k, v, marked)
        x.bwd(dout, q, k, v, marked)
        torch.cuda.synchronize()
        results.append([x.indices, x.tau, x.o, x.lse, x.dq, x.dk, x.dv] + ([x.dscores] if c["bias"] else []))
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*results) if a.numel())
    kept, tau = routing_twin(c, scores)
    indices = x.indices.long()
    got = torch.zeros_like(kept)
    if x.n_places:
        got.scatter_(3, indices.clamp(min=0), (indices >= 0))
        got[..., 0] |= (indices == 0).any(3)
    ascending = bool(((indices[..., 1:] > indices[..., :-1]) | (indices[..., 1:] == -1)).all()) if x.n_places > 1 else True
    exact = torch.equal(got, kept) and torch.equal(x.tau, tau) and ascending and torch.equal((indices >= 0).sum(3), kept.sum(3))
    want = attention_twin(c, q, k, v, dout, scores, kept, tau, temperature)
    names = ["o", "lse", "dq", "dk", "dv"] + (["ds"] if c["bias"] else [])
    errors = {name: error(a, b) for name, a, b in zip(names, results[0][2:], want)}
    return {"routing exact": exact, "same twice": same, "errors": errors}


def check(archs):
    rows, failed = [], 0
    for arch in archs:
        ours.ARCH = arch
        for i, c in enumerate(CASES):
            try:
                result = run_case(c, 1000 * i)
                limits = {"lse": 1e-3}
                good = result["routing exact"] and result["same twice"] and all(e < limits.get(n, 1e-2) for n, e in result["errors"].items())
            except Exception as e:  # The other cases still say something.
                result, good = {"routing exact": None, "same twice": None, "errors": {}, "failure": str(e)[:300]}, False
            failed += not good
            rows.append({"arch": arch, "case": {key: value for key, value in c.items() if value is not None}, "good": good, **result})
            errors = " ".join(f"{n} {e:.1e}" for n, e in result["errors"].items())
            text = f"T {c['t']} {c['shape']} w {c['w']} k {c['k']} r {c['r']} bias {c['bias']} lens {c['lens']} ties {c['ties']}"
            print(f"{'ok  ' if good else 'FAIL'} {arch} {text}: exact {result['routing exact']} same {result['same twice']} {errors} {result.get('failure', '')}", flush=True)
    ours.ARCH = "sm_90a"
    return rows, failed


def milliseconds(f, repeats=9):
    """Median time of a graph replay of `f`, long enough to outweigh the launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f()
        f()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            f()
        graph.replay()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        stream.synchronize()
        n = max(1, min(50, int(10 / max(start.elapsed_time(end), 1e-3))))
        times = []
        for _ in range(repeats):
            start.record()
            for _ in range(n):
                graph.replay()
            end.record()
            stream.synchronize()
            times.append(start.elapsed_time(end) / n)
    return statistics.median(times)


def kernel_times(f, repeats=5):
    """Milliseconds of every kernel in `f`, by name."""
    from torch.profiler import ProfilerActivity, profile

    f()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(repeats):
            f()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / repeats / 1e3 for e in p.key_averages() if e.self_device_time_total > 0}


def cudnn(q, k, v, dout):
    """Forward, and forward and backward, of the fastest attention in PyTorch on `[B, T, H, D]` tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    d = dout.transpose(1, 2)

    def fwd():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)

    def both():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        torch.autograd.grad(o, qkv, d)

    return milliseconds(fwd), milliseconds(both)


def visible(t, w, k, r):
    """Pairs of a query and a key that it sees, for one head."""
    total = 0
    for begin in range(0, t, r):
        first = max(0, begin - w + 1)
        n = min(r, t - begin)
        total += n * (min(k, first) + begin - first) + n * (n + 1) // 2
    return total


def floor(shape, t, w, k, r, rates):
    (h, g, d), pairs = shape, visible(t, w, k, r)
    flops = 4 * d * h * pairs
    q, kv = 2 * t * h * d, 2 * t * g * d
    row = {
        "fwd": max(flops / rates["flops"], (2 * q + 2 * kv + 4 * t * h + 4 * t * g) / rates["bytes"]),
        # Read q, k, v, o, dout, lse, scores; write dq, dk, dv; on top of the forward pass.
        "bwd": max(2.5 * flops / rates["flops"], (4 * q + 4 * kv + 4 * t * h + 4 * t * g) / rates["bytes"]),
    }
    return {"fwd": row["fwd"] * 1e3, "both": (row["fwd"] + row["bwd"]) * 1e3}


def measure_rates():
    a, b = (random(8192, 8192, seed=i).bfloat16() for i in (1, 2))
    product = milliseconds(lambda: torch.matmul(a, b))
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    copy = milliseconds(lambda: y.copy_(x))
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes": 2 * 2**30 / copy * 1e3}


def time_shape(shape, t, rates, peer=True, w=128, k=256, r=64):
    h, g, d = shape
    q, key, v, dout = (random(1, t, n, d, seed=t + i).bfloat16() for i, n in enumerate([h, g, g, h]))
    scores = random(1, t, g, seed=t + 9)
    x = Routed([t], t, *shape, w, k, r, 4)

    def fwd():
        x.route(scores)
        x.fwd(q, key, v, scores)

    row = {"shape": shape, "tokens": t, "route": milliseconds(lambda: x.route(scores)), "fwd": milliseconds(fwd)}
    x.prepare_bwd()

    def both():
        fwd()
        x.bwd(dout, q, key, v, scores)

    row["both"] = milliseconds(both)
    row["parts"] = kernel_times(both)
    row["entries"] = int(x.n_keys.sum())
    row["finite"] = all(bool(torch.isfinite(y).all()) for y in (x.o, x.dq, x.dk, x.dv))
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    low = floor(shape, t, w, k, r, rates)
    row["floor"] = low
    row["share"] = {name: low[name] / row[name] for name in ("fwd", "both")}
    if peer:
        del x
        row["cudnn"] = dict(zip(("fwd", "both"), cudnn(q, key, v, dout)))
        row["ratio"] = {name: row["cudnn"][name] / row[name] for name in ("fwd", "both")}
    torch.cuda.empty_cache()
    return row


def show(row):
    (h, g, d), t = row["shape"], row["tokens"]
    text = f"{h}/{g}/{d} T {t:>7}: route {row['route']:.4f} fwd {row['fwd']:.4f} ({row['share']['fwd']:.0%} of floor) both {row['both']:.4f} ({row['share']['both']:.0%})"
    if "ratio" in row:
        text += f" | cuDNN {row['cudnn']['fwd']:.3f} {row['cudnn']['both']:.3f}: {row['ratio']['fwd']:.1f}x {row['ratio']['both']:.1f}x"
    if "parts" in row:
        text += " | " + " ".join(f"{n} {ms:.4f}" for n, ms in row["parts"].items()) + f" entries {row['entries']}"
    print(text + ("" if row["finite"] else " NOT FINITE"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--archs", nargs="+", default=["sm_90a", "compute_80"])
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--alone", type=int, nargs="*", default=[262144, 1048576], help="lengths without the peer")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    report = {"command": " ".join(["python"] + sys.argv), "commit": args.commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"cudnn": torch.backends.cudnn.version(), "window": 128, "top_k": 256, "route_every": 64, "dtype": "bf16", "milliseconds": "medians of 9"}
    failed = 0
    if args.check:
        report["cases"], failed = check(args.archs)
    if args.time:
        rates = report["rates"] = measure_rates()
        print(f"{report['device']}: product {rates['flops'] / 1e12:.0f} TFLOP/s, copy {rates['bytes'] / 1e12:.2f} TB/s", flush=True)
        rows = report["rows"] = []
        for shape in (SMALL, LARGE):
            for t in args.tokens + args.alone:
                def one():
                    torch.cuda.reset_peak_memory_stats()
                    rows.append(time_shape(shape, t, rates, peer=t in args.tokens))
                    show(rows[-1])
                attempt(one)
                write(report, args.out)
    write(report, args.out)
    if args.check:
        print(f"{failed} of {len(report['cases'])} cases failed")
    sys.exit(failed > 0)


def write(report, path):
    """JSON with a line for every case and every row."""
    if path:
        lists = {name: value for name, value in report.items() if name in ("cases", "rows")}
        parts = [f' "{name}": {json.dumps(value)}' for name, value in report.items() if name not in lists]
        parts += [f' "{name}": [\n' + ",\n".join("  " + json.dumps(x) for x in value) + "\n ]" for name, value in lists.items()]
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def attempt(f):
    try:
        f()
    except Exception as e:
        print(f"failed: {str(e)[:400]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
