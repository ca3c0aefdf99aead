"""Training SmolLM2-135M on one GPU: Sluice beside torch.compile (bf16 autocast, cuDNN attention, fused AdamW) in the same call.

    python benches/peers/train_step_gpu.py --sluice target/release/sluice --tokens tokens.u16 --commit ID --out benches/results/train_step_gpu.json

Four rows: T = 4096, batch 8, dense; T = 32768, batch 1, routed (`--routed`, the `default` budget) beside dense attention in PyTorch; and with `--tokens`
the losses of T = 4096, batch 8, where every step has the next tokens of that file (little-endian u16), and those of T = 1024, batch 16, of both programs in f32
and in bf16: how far apart two curves are that differ in precision alone says what to expect of two programs. Where both are dense, PyTorch begins with the weights that Sluice
began with and has the same tokens and learning rates, clipped and decayed alike. Prints tokens/s (median after two steps), peak memory of tensors, and how far
the two curves of losses are apart.
"""

import argparse
import json
import os
import statistics
import struct
import subprocess
import tempfile
import time

import torch
from train_step_torch import CONFIGS, Decoder

# Context, batch, routed, fresh batches, steps of ours and of theirs.
ROWS = {
    "speed": (4096, 8, False, False, 20, 20),
    "long": (32768, 1, True, False, 12, 6),
    "losses": (4096, 8, False, True, 50, 50),
    "precisions": (1024, 16, False, True, 50, 50),
}
MASK = 2**64 - 1


def mix(a, b):
    """The hash that Sluice draws its tokens with."""
    z = (a * 0x9E3779B97F4A7C15 + b * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def load_state(path):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
        data = f.read()
    header.pop("__metadata__", None)
    of = lambda e: torch.frombuffer(bytearray(data[slice(*e["data_offsets"])]), dtype=torch.float32).reshape(e["shape"])
    return {name: of(entry) for name, entry in header.items()}


NAMES = {
    "input_layernorm": "norm1", "post_attention_layernorm": "norm2", "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}


def renamed(name):
    name = name.removeprefix("model.")
    if name.startswith("layers."):
        _, i, part = name.split(".", 2)
        return f"layers.{i}.{NAMES[part.removesuffix('.weight')]}.weight"
    return {"embed_tokens.weight": "embed.weight", "norm.weight": "norm.weight"}[name]


def run_sluice(binary, t, b, steps, state, routed, tokens, precision="bf16"):
    command = [binary, "bench", "train-step", "--config", "135m", "--context", str(t), "--batch", str(b), "--steps", str(steps - 2), "--device", "cuda",
               "--precision", precision, "--json", "--save-state", state]
    command += (["--routed"] if routed else []) + (["--fresh-batches", tokens] if tokens else [])
    print("$", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def run_torch(t, b, rates, state, stream=None, compiled=True, precision="bf16"):
    c = CONFIGS["135m"] | dict(T=t, B=b)
    torch.manual_seed(0)
    model = Decoder(c)
    weights = {renamed(name): tensor for name, tensor in load_state(state).items() if not name.startswith("sluice.")}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and all(k in ("cos", "sin") for k in left.missing_keys), left
    model = model.cuda()
    if stream is None:
        tokens = torch.tensor([[mix(row, i) % c["V"] for i in range(t + 1)] for row in range(b)], device="cuda")
    else:
        stream = torch.frombuffer(bytearray(open(stream, "rb").read()), dtype=torch.uint16).to(torch.int64).cuda()
    of_dim = lambda test: [p for p in model.parameters() if test(p.dim())]
    groups = [dict(params=of_dim(lambda d: d >= 2), weight_decay=0.01), dict(params=of_dim(lambda d: d < 2), weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=rates[0], betas=(0.9, 0.95), eps=1e-8, fused=True)
    loss_of = torch.compile(model.loss) if compiled else model.loss
    narrow = precision == "bf16"
    torch.set_float32_matmul_precision("high" if narrow else "highest")
    # In bf16 cuDNN's attention is the fastest; in f32 only the plain one groups heads.
    torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.enable_mem_efficient_sdp(False), torch.backends.cuda.enable_math_sdp(not narrow)
    seconds, losses = [], []
    for i, rate in enumerate(rates):
        if i == 2:
            torch.cuda.reset_peak_memory_stats()
        if stream is not None:
            begins = [(i * b + row) * t for row in range(b)]
            tokens = torch.stack([stream[begin : begin + t + 1] for begin in begins])
        torch.cuda.synchronize()
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    return dict(tokens_per_second=b * t / statistics.median(seconds[2:]), seconds=seconds[2:], losses=losses, peak_bytes=peak)


def curves_of_precisions(args, state, compiled):
    """Losses of both programs in f32 and bf16, and how far each pair is apart, up to step 20 and at any step."""
    t, b, _, _, steps, _ = ROWS["precisions"]
    row, curves = dict(row="precisions", context=t, batch=b), {}
    for precision in ["f32", "bf16"]:
        ours = run_sluice(args.sluice, t, b, steps, state, False, args.tokens, precision)
        curves[f"sluice {precision}"] = ours["losses"]
        curves[f"torch {precision}"] = run_torch(t, b, ours["learning_rates"], state, args.tokens, compiled, precision)["losses"]
        torch.cuda.empty_cache()
    row["losses"], row["apart"] = curves, {}
    for a, b in [("sluice f32", "torch f32"), ("sluice bf16", "torch bf16"), ("sluice bf16", "sluice f32"), ("torch bf16", "torch f32")]:
        apart = [abs(x - y) for x, y in zip(curves[a], curves[b])]
        row["apart"][f"{a}, {b}"] = dict(first_20=max(apart[:20]), all=max(apart), mean=statistics.mean(apart))
        print(f"{a}, {b}: at most {max(apart[:20]):.5f} apart up to step 20, {max(apart):.5f} up to {steps}, mean {statistics.mean(apart):.5f}", flush=True)
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--sluice", required=True)
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    p.add_argument("--tokens", help="stream of token ids for the row of losses, little-endian u16")
    p.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    p.add_argument("--commit", default="unknown")
    p.add_argument("--out")
    args = p.parse_args()
    results = []
    for name in args.rows:
        t, b, routed, fresh, steps, their_steps = ROWS[name]
        stream = args.tokens if fresh else None
        if fresh and stream is None:
            print(f"{name}: left out, there is no --tokens", flush=True)
            continue
        state = os.path.join(tempfile.gettempdir(), "sluice_train_step.safetensors")
        if name == "precisions":
            results.append(curves_of_precisions(args, state, not args.eager))
            continue
        row = dict(row=name, context=t, batch=b, routed=routed, fresh_batches=fresh)
        row["sluice"] = run_sluice(args.sluice, t, b, steps, state, routed, stream)
        ours = row["sluice"]
        print(f"T {t} batch {b}: sluice {ours['tokens_per_second']:.0f} tokens/s, peak {ours['peak_bytes'] / 1e9:.1f} GB", flush=True)
        try:
            theirs = row["torch"] = run_torch(t, b, ours["learning_rates"][:their_steps], state, stream, not args.eager)
        except Exception as e:  # The other figures are worth having.
            print("torch failed:", repr(e)[:500], flush=True)
            results.append(row)
            continue
        torch.cuda.empty_cache()
        row["ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
        print(f"T {t} batch {b}: torch  {theirs['tokens_per_second']:.0f} tokens/s, peak {theirs['peak_bytes'] / 1e9:.1f} GB; ratio {row['ratio']:.2f}", flush=True)
        if not routed:
            row["losses_apart"] = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"]))
            print(f"losses at most {row['losses_apart']:.4f} apart; step: ours, theirs: " + "; ".join(
                f"{i + 1}: {ours['losses'][i]:.4f}, {theirs['losses'][i]:.4f}" for i in sorted({0, 1, 4, 9, 19, 29, 39, steps - 1}) if i < steps), flush=True)
        results.append(row)
    if args.out:
        record = dict(what="training step of SmolLM2-135M: forward, backward, clipping, AdamW", commit=args.commit, device=torch.cuda.get_device_name(),
                      torch=torch.__version__, cudnn=torch.backends.cudnn.version(), command="python benches/peers/train_step_gpu.py", results=results)
        with open(args.out, "w") as f:
            json.dump(record, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
