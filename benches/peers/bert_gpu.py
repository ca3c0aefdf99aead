"""Encoders on one GPU: Sluice beside PyTorch in the same call.

    python benches/peers/bert_gpu.py --sluice target/release/sluice --minilm models/all-minilm-l6-v2 --sentences FILE.. --commit ID --out benches/results/bert_gpu.json

Speed: a forward pass of BERT-large's shape with random weights (24 layers, 1024 wide, 16 heads, sequence 128, batch 64), `sluice bench bert`, which checks its
states against the CPU first, and two forms of the same in PyTorch, each eager and under torch.compile: transformers' BertModel, and a plain module with one product for queries, keys and
values and attention without a mask. The fastest of the four is the peer (`--forms` runs some of them only). Medians; f32, TF32, bf16 (weights in bf16, which is faster than
autocast). Sluice runs before and after PyTorch, so that neither has the cooler card, each time without and with `--tune`.

Accuracy: all-MiniLM-L6-v2 on real sentences (lines of text files cut at full stops). Embeddings by transformers in f32 on the CPU are the reference; for every
precision of Sluice the cosine of each sentence with it, and whether rankings survive: Spearman's rank correlation of all pairs' cosines, the overlap of the ten nearest
sentences, and how often the nearest one is the same. Without a GPU (`--cpu`), Sluice on the CPU alone.
"""

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time

import numpy as np
import torch

BERT_LARGE = dict(vocab_size=30522, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, max_position_embeddings=512)


def last_json(command):
    print("$", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def run_sluice(args, precision, *more):
    command = [args.sluice, "bench", "bert", "--sequence", str(args.sequence), "--batch", str(args.batch), "--runs", str(args.runs), "--device", "cuda", "--precision", precision, "--json", *more]
    return last_json(command)


class Layer(torch.nn.Module):
    def __init__(self, m, f, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = torch.nn.Linear(m, 3 * m), torch.nn.Linear(m, m)
        self.up, self.down = torch.nn.Linear(m, f), torch.nn.Linear(f, m)
        self.norm1, self.norm2 = torch.nn.LayerNorm(m, eps=1e-12), torch.nn.LayerNorm(m, eps=1e-12)

    def forward(self, h):
        b, t, m = h.shape
        q, k, v = (x.transpose(1, 2) for x in self.qkv(h).view(b, t, 3, self.heads, m // self.heads).unbind(2))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, m)
        h = self.norm1(h + self.out(o))
        return self.norm2(h + self.down(torch.nn.functional.gelu(self.up(h))))


class Plain(torch.nn.Module):
    """BERT without options: what torch.compile does best with."""

    def __init__(self, c):
        super().__init__()
        m = c["hidden_size"]
        self.words, self.positions = torch.nn.Embedding(c["vocab_size"], m), torch.nn.Embedding(c["max_position_embeddings"], m)
        self.types = torch.nn.Parameter(torch.randn(m))
        self.norm = torch.nn.LayerNorm(m, eps=1e-12)
        self.layers = torch.nn.ModuleList(Layer(m, c["intermediate_size"], c["num_attention_heads"]) for _ in range(c["num_hidden_layers"]))

    def forward(self, tokens):
        h = self.norm(self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.types)
        for layer in self.layers:
            h = layer(h)
        return h


def run_torch(args, precision):
    """Samples/s by name."""
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.manual_seed(0)
    tokens = torch.randint(0, BERT_LARGE["vocab_size"], (args.batch, args.sequence), device="cuda")

    def measure(forward):
        seconds = []
        with torch.inference_mode():
            for i in range(args.runs + 5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                forward(tokens)
                torch.cuda.synchronize()
                if i >= 5:
                    seconds.append(time.perf_counter() - start)
        return args.batch / statistics.median(seconds)

    found = {}
    with torch.device("cuda"):
        models = dict(transformers=transformers.BertModel(transformers.BertConfig(**BERT_LARGE, attn_implementation="sdpa"), add_pooling_layer=False), plain=Plain(BERT_LARGE))
    for name, model in models.items():
        model = model.eval().bfloat16() if precision == "bf16" else model.eval()
        for way in ["eager", "compiled"] if precision != "f32" else ["eager"]:
            if args.forms and f"{name} {way}" not in args.forms:
                continue
            try:
                found[f"{name} {way}"] = measure(torch.compile(model) if way == "compiled" else model)
            except Exception as e:  # The others are worth having.
                print(name, way, "failed:", repr(e)[:300], flush=True)
    return found


def speed(args):
    rows = []
    for precision in args.precisions:
        row = dict(precision=precision)
        try:
            ways = dict(sluice=[], sluice_tuned=["--tune"])
            row |= {way: [run_sluice(args, precision, *more)] for way, more in ways.items()}
            row["torch"] = run_torch(args, precision)
            torch.cuda.empty_cache()
            for way, more in reversed(ways.items()):
                row[way].append(run_sluice(args, precision, *more))
            row["peer"] = max(row["torch"], key=row["torch"].get)
            for way, ratio in zip(ways, ["ratio", "ratio_tuned"]):
                ours = [run["samples_per_second"] for run in row[way]]
                # The slower of our two runs against the fastest of theirs.
                row[ratio] = min(ours) / row["torch"][row["peer"]]
                print(f"{precision}: {way} {' and '.join(f'{x:.0f}' for x in ours)} samples/s, torch " + ", ".join(f"{k} {v:.0f}" for k, v in row["torch"].items())
                      + f": ratio {row[ratio]:.3f}", flush=True)
        except Exception as e:
            row["failed"] = repr(e)[:500]
            print(precision, "failed:", row["failed"], flush=True)
        rows.append(row)
    return rows


def sentences_of(paths, n):
    """Up to n distinct sentences, the same number from each file, spread over it; or those of one JSON list."""
    if len(paths) == 1 and paths[0].endswith(".json"):
        with open(paths[0], encoding="utf-8") as f:
            return json.load(f)[:n]
    found = []
    for path in paths:
        with open(path, encoding="utf-8") as f:
            text = re.sub(r"\s+", " ", f.read())
        own = [s.strip() for s in re.split(r"(?<=[.!?]) ", text)]
        own = list(dict.fromkeys(s for s in own if 30 <= len(s) <= 400))
        step = max(1, len(own) * len(paths) // n)
        found += own[::step][: n // len(paths)]
    return list(dict.fromkeys(found))


def reference(folder, sentences):
    """What sentence-transformers does with this model, written out: cut at 256 tokens, mean of the states, length 1; f32 on the CPU."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    vectors = []
    with torch.inference_mode():
        for i in range(0, len(sentences), 32):
            inputs = tokenizer(sentences[i : i + 32], padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].float()
            vectors.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(vectors).double().numpy()


def compare(want, got):
    cosines = (want * got).sum(1) / np.linalg.norm(want, axis=1) / np.linalg.norm(got, axis=1)
    pairs = np.triu_indices(len(want), 1)
    a, b = (want @ want.T), (got @ got.T)
    rank = lambda x: np.argsort(np.argsort(x[pairs]))
    spearman = np.corrcoef(rank(a), rank(b))[0, 1]
    np.fill_diagonal(a, -2), np.fill_diagonal(b, -2)
    tens = [np.argsort(-x, axis=1)[:, :10] for x in (a, b)]
    overlap = np.mean([len(set(x) & set(y)) / 10 for x, y in zip(*tens)])
    return dict(least_cosine=float(cosines.min()), mean_cosine=float(cosines.mean()), spearman=float(spearman), top_10_overlap=float(overlap),
                same_nearest=float(np.mean(tens[0][:, 0] == tens[1][:, 0])))


def accuracy(args):
    sentences = sentences_of(args.sentences, args.n)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", delete=False) as f:
        f.write("\n".join(sentences) + "\n")
    want = reference(args.minilm, sentences)
    rows = []
    modes = [("cpu", "f32")] + ([] if args.cpu else [("cuda", p) for p in args.precisions])
    for device, precision in modes:
        try:
            got = last_json([args.sluice, "embed", "--model", args.minilm, "--text", f.name, "--device", device, "--precision", precision, "--json"])
        except Exception as e:
            print(device, precision, "failed:", repr(e)[:300], flush=True)
            continue
        row = dict(device=device, precision=precision, sentences=len(sentences), tokens=got["tokens"], seconds=got["seconds"]) | compare(want, np.array(got["vectors"]))
        print(f"{device} {precision}: {len(sentences)} sentences, cosine with transformers least {row['least_cosine']:.7f}, mean {row['mean_cosine']:.7f}; rankings: "
              f"Spearman {row['spearman']:.6f}, ten nearest {row['top_10_overlap']:.4f}, nearest {row['same_nearest']:.4f}", flush=True)
        rows.append(row)
    assert all(row["least_cosine"] >= 0.99999 for row in rows if row["precision"] == "f32"), "f32 is not what transformers computes"
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--sluice", required=True)
    p.add_argument("--sequence", type=int, default=128)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--runs", type=int, default=20)
    p.add_argument("--precisions", nargs="+", default=["bf16", "tf32", "f32"])
    p.add_argument("--forms", nargs="*", help='of "transformers eager", "transformers compiled", "plain eager", "plain compiled"')
    p.add_argument("--minilm", help="folder of all-MiniLM-L6-v2; without it no accuracy is measured")
    p.add_argument("--sentences", nargs="*", default=[], help="text files, or one JSON list of sentences")
    p.add_argument("--n", type=int, default=600, help="sentences")
    p.add_argument("--cpu", action="store_true", help="no GPU: accuracy of the CPU alone")
    p.add_argument("--commit", default="unknown")
    p.add_argument("--out")
    args = p.parse_args()
    record = dict(what="encoders: forward pass of BERT-large's shape, and all-MiniLM-L6-v2 on real sentences", commit=args.commit, torch=torch.__version__,
                  command="python benches/peers/bert_gpu.py")
    if not args.cpu:
        record["device"] = torch.cuda.get_device_name()
        record["speed"] = speed(args)
    if args.minilm:
        record["accuracy"] = accuracy(args)
    if args.out:
        with open(args.out, "w") as f:
            json.dump(record, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
