"""Records one training step of a tiny routed decoder, computed by PyTorch, as the oracle of the Rust tests.

    python golden/golden_step.py            # rewrites golden/golden_step*.safetensors
    python golden/golden_step.py --check    # recomputes and compares with the files, writes nothing

Written to be read beside ARCHITECTURE.md, "Routed attention": every formula is spelled out with plain loops and
a [T, T] matrix of logit biases, nothing is fused or clever. All arithmetic is f64; what is recorded is f32.
With an unlimited budget and no gate bias the same code must agree with transformers' own Llama, Qwen2 and Qwen3
(which round to f32 inside), and the script refuses to write anything when it does not.

Three files, one layout:

    golden_step.safetensors         llama: tied embeddings, one gate score per KV head
    golden_step_qwen2.safetensors   q/k/v biases, untied output head
    golden_step_qwen3.safetensors   norms on queries and keys, one gate score per layer

    weights.NAME      parameter NAME, Hugging Face's names and `sluice.layers.N.gate.{weight,bias,recency}`
    grads.NAME        its gradient of the mean loss at those weights
    tokens            [B, T] u32; positions >= lens[b] are padding (id 0)
    lens              [B] u32
    logits            [B, T, V]; compare t < lens[b] only
    nll               [B, T-1] cross-entropy of token t+1 at position t; 0 where t+1 is padding
    loss              [1] mean of `nll` over the targets that are not padding
    adamw_losses      [10] the loss before each of ten AdamW updates on this batch, so the first equals `loss`
    layers.N.scores   [B, T, G'] gate scores; sinks are +inf (G' = 1 for a shared gate)
    layers.N.routing  [B, n_blocks, G, top_k] i32 routed positions, ascending, padded with -1
    layers.N.tau      [B, n_blocks, G] the k-th best score, -inf while there are fewer candidates

    metadata: `config` and `routing` (the JSON of sluice-spec's ModelConfig and RoutingConfig), `adamw`, `seed`,
    `least_margin` (see below), `torch`.

A hard top-k is not continuous: where the last kept and the first evicted score nearly tie, rounding decides and no
tolerance helps. So the seed is the first one for which all decisions of all ten steps keep MARGIN between the two.
"""

import argparse
import itertools
import json
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent
MARGIN = 1e-3
B, T, LENS = 2, 48, [48, 37]
ADAMW = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)  # on every parameter, no clipping
STEPS = 10

CONFIG = dict(
    architecture="llama", n_layers=2, d_model=32, d_ff=64, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=96,
    max_seq_len=64, norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None, tie_embeddings=True, qkv_bias=False, qk_norm=False,
)
ROUTING = dict(window=5, top_k=8, route_every=4, n_sink=2, gate_heads="kv_head", gate_temperature=0.7)
VARIANTS = {
    "golden_step": ({}, {}),
    "golden_step_qwen2": (dict(architecture="qwen2", qkv_bias=True, tie_embeddings=False), {}),
    "golden_step_qwen3": (dict(architecture="qwen3", qk_norm=True), dict(gate_heads="shared")),
}


# --- the model -----------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rotate(x, theta):
    """Rotary positions, half-split as in Hugging Face: element i turns together with element i + D/2.  x [B, T, H, D]"""
    t, d = x.shape[1], x.shape[-1]
    inv_freq = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)  # [D/2]
    angle = torch.arange(t, dtype=x.dtype)[:, None, None] * inv_freq  # [T, 1, D/2]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def gate_scores(x, weight, bias, recency, n_sink, eps):
    """s_j = a . rmsnorm(x_j) + b + c j / 1024, x = the attention's input; the first n_sink tokens have +inf.  [B, T, G']"""
    j = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
    scores = rms_norm(x, None, eps) @ weight.T + bias + recency * j / 1024
    return torch.where(j < n_sink, torch.inf, scores)


def route(scores, first_local, top_k):
    """The k best of the candidates 0..first_local-1, ties to the larger index; tau = the k-th best score, -inf if
    there are fewer than k; and by how much the last kept candidate beat the first evicted one."""
    order = sorted(range(first_local), key=lambda j: (scores[j], j), reverse=True)
    kept = order[:top_k]
    tau = scores[kept[-1]] if first_local >= top_k > 0 else -math.inf
    margin = scores[kept[-1]] - scores[order[top_k]] if first_local > top_k > 0 else math.inf
    return sorted(kept), tau, margin


def logit_bias(scores, length, routing):
    """What one KV head of one sequence adds to its attention logits: [T, T], -inf where a query does not see a key.

    scores [T].  Also returns the routed positions and tau of every block, and the least margin.
    """
    w, k, r, temperature = (routing[n] for n in ("window", "top_k", "route_every", "gate_temperature"))
    plain = scores.tolist()
    bias = torch.full((len(plain), len(plain)), -torch.inf, dtype=scores.dtype)
    blocks, taus, least = [], [], math.inf
    for start in range(0, len(plain), r):
        first_local = max(0, start - w + 1)
        queries = range(start, min(start + r, length))
        # A block of padding alone routes nothing.
        kept, tau, margin = route(plain, first_local, k) if queries else ([], -math.inf, math.inf)
        least = min(least, margin)
        for t in queries:
            bias[t, first_local : t + 1] = 0.0
            for j in kept:
                soft = temperature > 0 and tau > -math.inf and plain[j] < math.inf
                # tau is a number here, not a tensor: no gradient flows through the order statistic.
                bias[t, j] = F.logsigmoid((scores[j] - tau) / temperature) if soft else 0.0
        blocks.append(kept + [-1] * (k - len(kept)))
        taus.append(tau)
    return bias, blocks, taus, least


def attention(q, k, v, scores, lens, routing):
    """One softmax over routed and local keys.  q [B, T, H, D], k and v [B, T, G, D], scores [B, T, G or 1]."""
    heads_per_group = q.shape[2] // k.shape[2]
    out, blocks, taus, least = torch.zeros_like(q), [], [], math.inf
    for b, length in enumerate(lens):
        blocks.append([]), taus.append([])
        for g in range(k.shape[2]):
            bias, kept, tau, margin = logit_bias(scores[b, :, g % scores.shape[2]], length, routing)
            for h in range(g * heads_per_group, (g + 1) * heads_per_group):
                logits = (q[b, :length, h] @ k[b, :, g].T) / math.sqrt(q.shape[-1]) + bias[:length]
                out[b, :length, h] = logits.softmax(-1) @ v[b, :, g]  # rows of padding stay zero
            blocks[b].append(kept), taus[b].append(tau)
            least = min(least, margin)
    swap = lambda x: np.swapaxes(np.array(x), 1, 2)  # [B, G, n_blocks, ..] -> [B, n_blocks, G, ..]
    return out, swap(blocks), swap(taus), least


def forward(p, tokens, lens, config, routing):
    """Logits [B, T, V], and per layer what the router saw and decided."""
    n_batch, n_tokens = tokens.shape
    heads, groups, width, eps = (config[n] for n in ("n_heads", "n_kv_heads", "head_dim", "norm_eps"))
    routed = []
    x = p["model.embed_tokens.weight"][tokens]  # [B, T, M]
    for layer in range(config["n_layers"]):
        name = f"model.layers.{layer}."
        gate = f"sluice.layers.{layer}.gate."
        h = rms_norm(x, p[name + "input_layernorm.weight"], eps)

        def project(part, n):
            y = F.linear(h, p[f"{name}self_attn.{part}_proj.weight"], p.get(f"{name}self_attn.{part}_proj.bias"))
            return y.view(n_batch, n_tokens, n, width)

        q, k, v = project("q", heads), project("k", groups), project("v", groups)
        if config["qk_norm"]:
            q = rms_norm(q, p[name + "self_attn.q_norm.weight"], eps)
            k = rms_norm(k, p[name + "self_attn.k_norm.weight"], eps)
        q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
        scores = gate_scores(h, p[gate + "weight"], p[gate + "bias"], p[gate + "recency"], routing["n_sink"], eps)
        o, kept, tau, margin = attention(q, k, v, scores, lens, routing)
        routed.append(dict(scores=scores.detach(), routing=kept, tau=tau, margin=margin))
        x = x + o.reshape(n_batch, n_tokens, heads * width) @ p[name + "self_attn.o_proj.weight"].T

        h = rms_norm(x, p[name + "post_attention_layernorm.weight"], eps)
        up = F.linear(h, p[name + "mlp.up_proj.weight"])
        x = x + F.linear(F.silu(F.linear(h, p[name + "mlp.gate_proj.weight"])) * up, p[name + "mlp.down_proj.weight"])
    x = rms_norm(x, p["model.norm.weight"], eps)
    return x @ p.get("lm_head.weight", p["model.embed_tokens.weight"]).T, routed


def loss_of(logits, tokens, lens):
    """Cross-entropy of the next token [B, T-1], 0 where that is padding, and its mean over the rest."""
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    real = torch.arange(1, tokens.shape[1])[None, :] < torch.tensor(lens)[:, None]
    nll = torch.where(real, nll, 0.0)
    return nll, nll.sum() / real.sum()


# --- its numbers ---------------------------------------------------------------------------------------------------


def parameters(config, routing, generator):
    """Random weights, large enough that attention is far from uniform; rounded to f32 so that the file holds them exactly."""
    m, f, v, width = (config[n] for n in ("d_model", "d_ff", "vocab_size", "head_dim"))
    q, kv = config["n_heads"] * width, config["n_kv_heads"] * width
    gates = config["n_kv_heads"] if routing["gate_heads"] == "kv_head" else 1
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    linear = lambda n_out, n_in: normal(n_out, n_in) * n_in**-0.5
    norm = lambda n: 1 + 0.2 * normal(n)

    p = {"model.embed_tokens.weight": 0.5 * normal(v, m)}
    for layer in range(config["n_layers"]):
        name = f"model.layers.{layer}."
        p[name + "input_layernorm.weight"] = norm(m)
        for part, n in (("q", q), ("k", kv), ("v", kv)):
            p[f"{name}self_attn.{part}_proj.weight"] = linear(n, m)
            if config["qkv_bias"]:
                p[f"{name}self_attn.{part}_proj.bias"] = 0.3 * normal(n)
        if config["qk_norm"]:
            p[name + "self_attn.q_norm.weight"] = norm(width)
            p[name + "self_attn.k_norm.weight"] = norm(width)
        p[name + "self_attn.o_proj.weight"] = linear(m, q)
        p[name + "post_attention_layernorm.weight"] = norm(m)
        p[name + "mlp.gate_proj.weight"] = linear(f, m)
        p[name + "mlp.up_proj.weight"] = linear(f, m)
        p[name + "mlp.down_proj.weight"] = linear(m, f)
        p[f"sluice.layers.{layer}.gate.weight"] = 0.3 * normal(gates, m)
        p[f"sluice.layers.{layer}.gate.bias"] = 0.3 * normal(gates)
        # Far above what a trained gate has, so that the slope matters within 48 tokens.
        p[f"sluice.layers.{layer}.gate.recency"] = 10 + normal(gates)
    p["model.norm.weight"] = norm(m)
    if not config["tie_embeddings"]:
        p["lm_head.weight"] = 0.5 * normal(v, m)
    return {name: x.float().double().requires_grad_() for name, x in p.items()}


def record(config, routing, seed):
    """Everything the file holds, or None when some decision was closer than MARGIN."""
    generator = torch.Generator().manual_seed(seed)
    p = parameters(config, routing, generator)
    tokens = torch.randint(1, config["vocab_size"], (B, T), generator=generator)
    for b, length in enumerate(LENS):
        tokens[b, length:] = 0

    out = {"weights." + name: x.detach().clone() for name, x in p.items()}
    optimizer = torch.optim.AdamW(p.values(), foreach=False, **ADAMW)
    losses, least = [], math.inf
    for step in range(STEPS):
        logits, routed = forward(p, tokens, LENS, config, routing)
        least = min([least] + [layer["margin"] for layer in routed])
        if least < MARGIN:
            return None
        nll, loss = loss_of(logits, tokens, LENS)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            out |= {"grads." + name: x.grad.clone() for name, x in p.items()}
            out |= dict(logits=logits, nll=nll, loss=loss.reshape(1))
            for i, layer in enumerate(routed):
                out |= {f"layers.{i}.{part}": torch.as_tensor(layer[part]) for part in ("scores", "routing", "tau")}
        optimizer.step()
    out["adamw_losses"] = torch.tensor(losses, dtype=torch.float64)

    arrays = {name: x.detach().numpy() for name, x in out.items()}
    # save_file writes the buffer as it lies, so transposed views must be laid out anew.
    as_type = lambda name, x: np.ascontiguousarray(x, np.int32 if name.endswith(".routing") else np.float32)
    arrays = {name: as_type(name, x) for name, x in arrays.items()}
    arrays |= dict(tokens=tokens.numpy().astype(np.uint32), lens=np.array(LENS, dtype=np.uint32))
    metadata = dict(config=config, routing=routing, adamw=ADAMW, seed=seed, least_margin=least, torch=torch.__version__)
    return arrays, {name: json.dumps(x) for name, x in metadata.items()}


def check_against_transformers(config, routing):
    """With every key in the budget this is a plain Llama / Qwen2 / Qwen3: agree with transformers' implementation."""
    import transformers

    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config["architecture"]]
    hf_config = getattr(transformers, kind + "Config")(
        hidden_size=config["d_model"], intermediate_size=config["d_ff"], num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"], num_key_value_heads=config["n_kv_heads"], head_dim=config["head_dim"],
        vocab_size=config["vocab_size"], max_position_embeddings=config["max_seq_len"], rms_norm_eps=config["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]}, tie_word_embeddings=config["tie_embeddings"],
        attn_implementation="eager",
    )  # fmt: skip
    p = parameters(config, routing, torch.Generator().manual_seed(0))
    model = getattr(transformers, kind + "ForCausalLM")(hf_config).double()
    base = {name: x.detach() for name, x in p.items() if name.startswith(("model.", "lm_head."))}
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()

    tokens = torch.randint(1, config["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))
    ours, _ = forward(p, tokens, [T] * B, config, {**routing, "top_k": T, "gate_temperature": 0.0})
    with torch.no_grad():
        theirs = model(tokens).logits
    difference = (ours - theirs).abs().max().item()
    print(f"  dense limit against transformers' {kind}: largest difference {difference:.1e}")
    # Logits are of the order of 10, and transformers computes norms, softmax and angles in f32 whatever the weights are.
    assert difference < 2e-5, "the dense limit is not the reference model"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="recompute and compare with the files; write nothing")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    for file, (config, routing) in VARIANTS.items():
        print(file)
        config, routing = {**CONFIG, **config}, {**ROUTING, **routing}
        check_against_transformers(config, routing)
        path = HERE / f"{file}.safetensors"
        seed, (arrays, metadata) = next((s, r) for s in itertools.count() if (r := record(config, routing, s)))
        print(f"  seed {seed}, least margin {metadata['least_margin']}, losses {arrays['adamw_losses']}")
        if not check:
            save_file(arrays, path, metadata=metadata)
            print(f"  {path.name}: {path.stat().st_size:,} bytes")
        compare(path, arrays)


def compare(path, arrays):
    """What the file holds is what was computed (also right after writing it)."""
    old = load_file(path)
    assert old.keys() == arrays.keys(), old.keys() ^ arrays.keys()
    for name, x in arrays.items():
        # assert_allclose treats infinities of one sign as equal.
        tolerance = 1e-6 if x.dtype == np.float32 else 0
        np.testing.assert_allclose(old[name], x, rtol=tolerance, atol=tolerance, err_msg=f"{path.name}: {name}")
    print(f"  {path.name} holds these numbers")


if __name__ == "__main__":
    main()
