"""Sluice's dense negative log-likelihood against transformers (f32, same weights) and llama.cpp (its own kernels).

    python benches/peers/compare_nll.py --model M.gguf --text FILE

Runs `sluice eval nll`, hands its token ids to both peers, prints a table and exits with 1 when a bar is missed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import windows

HERE = pathlib.Path(__file__).parent
# (largest difference of the mean, largest difference of any token), nats
BARS = {"transformers": (1e-3, 2e-2), "llama.cpp": (1e-2, None)}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", required=True)
    p.add_argument("--text", required=True)
    p.add_argument("--context", type=int, default=2048, help="tokens per window")
    p.add_argument("--tokens", type=int, default=2048, help="tokens compared")
    p.add_argument("--sluice", default="target/release/sluice", help="the binary")
    p.add_argument("--peers", nargs="+", default=list(BARS), choices=list(BARS))
    args = p.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        # 8 bytes a token is more than any text needs; Sluice need not score the rest.
        text = pathlib.Path(folder) / "text.txt"
        start = pathlib.Path(args.text).read_bytes()[: 8 * args.tokens]
        text.write_text(start.decode("utf-8", errors="ignore"), encoding="utf-8")
        model = ["--model", args.model]
        window = ["--context", str(args.context)]
        nll = ["eval", "nll", *model, "--text", text, *window, "--policy", "dense", "--per-token", "--json"]
        ours = run([args.sluice, *nll])
        ids = ours["token_ids"]
        ids = ids if ids and isinstance(ids[0], list) else windows.cut(ids, args.context)
        ids = first(ids, args.tokens)
        (pathlib.Path(folder) / "ids.json").write_text(json.dumps(ids))
        peers = {}
        for peer in args.peers:
            script = HERE / f"nll_{peer.replace('.', '_')}.py"
            peers[peer] = run([sys.executable, script, *model, "--ids", f"{folder}/ids.json"])
        theirs = run([sys.executable, HERE / "tokenize_text.py", *model, "--text", text])

    n = sum(len(window) - 1 for window in ids)
    if len(ours["per_token"]) < n:
        raise SystemExit(f"sluice scored {len(ours['per_token'])} tokens, its windows hold {n}")
    ours = ours["per_token"][:n]
    mean = sum(ours) / n
    print(f"{args.model}, {n} tokens in {len(ids)} windows\n")
    print(f"{'':14}{'nats/token':>12}{'difference':>12}{'bar':>8}{'worst token':>13}{'bar':>8}")
    print(f"{'sluice':14}{mean:12.6f}")
    passed = True
    for peer, scored in peers.items():
        if len(scored["per_token"]) != n:
            raise SystemExit(f"{peer} scored {len(scored['per_token'])} tokens, expected {n}")
        worst = max(abs(a - b) for a, b in zip(ours, scored["per_token"]))
        difference = mean - scored["nll"]
        bar_mean, bar_token = BARS[peer]
        # NaN compares false, so it fails.
        ok = abs(difference) <= bar_mean and (bar_token is None or worst <= bar_token)
        passed &= ok
        token = "" if bar_token is None else f"{bar_token:g}"
        print(f"{peer:14}{scored['nll']:12.6f}{difference:+12.6f}{bar_mean:8g}{worst:13.6f}{token:>8}  {'ok' if ok else 'MISSED'}")
    flat = [i for window in ids for i in window]
    same = flat == theirs["token_ids"][: len(flat)]
    passed &= same
    print(f"{'token ids':14}{'equal to those of the tokenizers package' if same else 'DIFFER from those of the tokenizers package'}")
    sys.exit(0 if passed else 1)


def first(ids, n):
    """Windows until they hold n tokens; the last one may be cut."""
    taken = []
    for window in ids:
        if n >= 2:
            taken.append(window[:n])
            n -= len(window)
    return taken


def run(command):
    command = [str(c) for c in command]
    print("$", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed with {done.returncode}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
