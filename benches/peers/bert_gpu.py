"""Encoders on one GPU: Sluice beside PyTorch in the same call.

    python benches/peers/bert_gpu.py --sluice target/release/sluice --minilm models/all-minilm-l6-v2 --sentences FILE.. --commit ID --out benches/results/bert_gpu.json

Speed: a forward pass of BERT-large's shape with random weights (24 layers, 1024 wide, 16 heads, sequence 128, batch 64), `sluice bench bert`, which checks its
states against the CPU first, and transformers' BertModel (SDPA), eager and under torch.compile; the faster of the two is the peer. Medians; f32, TF32, bf16.
The two take turns, so that neither has the cooler card.

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


def run_sluice(args, precision):
    command = [args.sluice, "bench", "bert", "--sequence", str(args.sequence), "--batch", str(args.batch), "--runs", str(args.runs), "--device", "cuda", "--precision", precision, "--json"]
    return last_json(command)


def torch_passes(args, precision):
    """`measure(compiled)` -> samples/s of BertModel; weights as bf16 in mode bf16, which is the fastest of PyTorch's ways (autocast converts them in every pass)."""
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.BertModel(transformers.BertConfig(**BERT_LARGE, attn_implementation="sdpa"), add_pooling_layer=False).eval()
    if precision == "bf16":
        model = model.bfloat16()
    tokens = torch.randint(0, BERT_LARGE["vocab_size"], (args.batch, args.sequence), device="cuda")

    def measure(compiled):
        forward = torch.compile(model) if compiled else model
        seconds = []
        with torch.inference_mode():
            for i in range(args.runs + 5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                forward(input_ids=tokens).last_hidden_state
                torch.cuda.synchronize()
                if i >= 5:
                    seconds.append(time.perf_counter() - start)
        return args.batch / statistics.median(seconds)

    return measure


def speed(args):
    rows = []
    for precision in args.precisions:
        row = dict(precision=precision)
        try:
            row["sluice"] = [run_sluice(args, precision)]
            measure = torch_passes(args, precision)
            row["torch_eager"] = measure(False)
            if precision != "f32":
                try:
                    row["torch_compile"] = measure(True)
                except Exception as e:  # Eager is worth having.
                    row["torch_compile_failed"] = repr(e)[:300]
                    print("torch.compile failed:", row["torch_compile_failed"], flush=True)
            del measure
            torch.cuda.empty_cache()
            row["sluice"].append(run_sluice(args, precision))
            ours = max(run["samples_per_second"] for run in row["sluice"])
            theirs = max(row["torch_eager"], row.get("torch_compile", 0.0))
            row["ratio"] = ours / theirs
            both = " and ".join(f"{run['samples_per_second']:.0f}" for run in row["sluice"])
            print(f"{precision}: sluice {both} samples/s, torch eager {row['torch_eager']:.0f}, "
                  f"compiled {row.get('torch_compile', 0):.0f}: ratio {row['ratio']:.3f}", flush=True)
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
