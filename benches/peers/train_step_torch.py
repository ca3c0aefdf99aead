"""Tokens/s of one training step (forward, full backward, AdamW) of a dense decoder in PyTorch, f32 on the CPU.

    python benches/peers/train_step_torch.py --config tiny

The strongest plain PyTorch we know for this machine: fused attention (`scaled_dot_product_attention`), fused cross-entropy,
fused AdamW, no masks or padding. Prints one JSON line.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

# L layers, M model, H heads, G KV heads, D head width, F feed-forward, V vocabulary, B x T tokens a step. Embeddings tied.
CONFIGS = {
    "tiny": dict(L=6, M=128, H=4, G=2, D=32, F=384, V=2048, T=2048, B=2),
    "135m": dict(L=30, M=576, H=9, G=3, D=64, F=1536, V=49152, T=512, B=1),  # SmolLM2-135M
}


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(c["M"], 1e-5), nn.RMSNorm(c["M"], 1e-5)
        self.q, self.o = linear(c["M"], c["H"] * c["D"]), linear(c["H"] * c["D"], c["M"])
        self.k, self.v = linear(c["M"], c["G"] * c["D"]), linear(c["M"], c["G"] * c["D"])
        self.gate, self.up, self.down = linear(c["M"], c["F"]), linear(c["M"], c["F"]), linear(c["F"], c["M"])

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        h = self.norm1(x)
        heads = lambda y: y.view(b, t, -1, self.c["D"]).transpose(1, 2)  # [B, heads, T, D]
        q, k, v = rotate(heads(self.q(h)), cos, sin), rotate(heads(self.k(h)), cos, sin), heads(self.v(h))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(o.transpose(1, 2).reshape(b, t, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c["V"], c["M"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["L"]))
        self.norm = nn.RMSNorm(c["M"], 1e-5)
        angle = torch.arange(c["T"])[:, None] * 10000.0 ** (-torch.arange(0, c["D"], 2) / c["D"])
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def loss(self, tokens):
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--config", required=True, choices=list(CONFIGS))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5, help="timed steps, after 2 that are not")
    p.add_argument("--compile", action="store_true", help="torch.compile the loss; compilation is not timed")
    args = p.parse_args()
    c = CONFIGS[args.config]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Decoder(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    tokens = torch.randint(c["V"], (c["B"], c["T"] + 1))
    loss_of = torch.compile(model.loss) if args.compile else model.loss

    seconds, losses = [], []
    for _ in range(2 + args.steps):
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    # The same batch over and over: a step that learns must bring the loss down from ln V.
    assert losses[-1] < losses[0], losses
    median = statistics.median(seconds[2:])
    out = dict(peer="torch.compile" if args.compile else "torch", version=torch.__version__, config=args.config, threads=args.threads, steps=args.steps)
    out |= dict(tokens_per_second=c["B"] * c["T"] / median, seconds=seconds[2:], first_loss=losses[0], last_loss=losses[-1])
    print(json.dumps(out | dict(n_params=sum(p.numel() for p in model.parameters()))))


if __name__ == "__main__":
    main()
