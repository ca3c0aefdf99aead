"""Training-step throughput of Sluice, PyTorch and candle, in turn on the same machine, with ratios.

    python benches/peers/bench_train_step.py            # prints a table, writes benches/results/train_step.json

Each round runs every engine once, so that a machine that slows down slows all of them; a ratio is the median over the
rounds of the ratios within a round. Sluice against eager and compiled PyTorch alike: the bar is the faster of the two.
`--add` puts more rounds into the file, so that a long measurement can be made in parts.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CONFIGS = ["tiny", "135m"]
ENGINES = ["sluice", "torch", "torch.compile", "candle"]
BARS = {"torch": 1.2, "torch.compile": 1.2, "candle": 1.5}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    p.add_argument("--engines", nargs="+", default=["sluice", *BARS], choices=["sluice", *BARS])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--steps", type=int, default=5, help="timed steps of a run, after 2 that are not")
    p.add_argument("--add", action="store_true", help="keep the rounds that are in the file and add to them")
    p.add_argument("--sluice", default=str(ROOT / "target/release/sluice"), help="the binary")
    p.add_argument("--candle", default="candle-train", help="the binary built from candle-train/")
    p.add_argument("--out", default=str(ROOT / "benches/results/train_step.json"))
    args = p.parse_args()

    torch = [sys.executable, str(HERE / "train_step_torch.py"), "--threads", str(args.threads)]
    commands = {
        "sluice": [args.sluice, "bench", "train-step", "--json"],
        "torch": torch,
        "torch.compile": [*torch, "--compile"],
        "candle": [args.candle],
    }
    environment = os.environ | {"RAYON_NUM_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    out = pathlib.Path(args.out)
    before = json.loads(out.read_text()) if args.add and out.exists() else {}
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "crates", "benches/peers")
    commit = git("rev-parse", "HEAD") + (" (modified)" if changes else "")
    if before and before["commit"] != commit:
        raise SystemExit(f"{out} holds rounds of commit {before['commit']}, this is {commit}; measure without --add")
    results = before.get("configs", {})
    for config in args.configs:
        rounds = results.get(config, {}).get("rounds", [])
        for i in range(args.rounds):
            rounds.append({"load_before": os.getloadavg()[0]})
            for engine in args.engines:
                command = [*commands[engine], "--config", config, "--steps", str(args.steps)]
                print(f"$ round {i + 1} of {args.rounds}:", *command, file=sys.stderr)
                rounds[-1][engine] = last_json_line(command, environment)
        commands_so_far = results.get(config, {}).get("commands", [])
        results[config] = {"commands": commands_so_far + [" ".join(["python", *sys.argv])]} | summary(rounds)
        print_table(config, results[config])

    record = {
        "what": "tokens/s of one training step: forward, full backward, AdamW, f32; median of the timed steps",
        "commit": commit,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads, "os": f"{platform.system()} {platform.machine()}"},
        "date": datetime.date.today().isoformat(),
        "configs": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {out}")


def summary(rounds):
    """Median tokens/s of each engine, and Sluice's ratio to each peer."""
    engines = [e for e in ENGINES if all(e in r for r in rounds)]
    speed = {e: statistics.median(r[e]["tokens_per_second"] for r in rounds) for e in engines}
    ratios = {}
    if "sluice" in engines:
        of = lambda r, e: r["sluice"]["tokens_per_second"] / r[e]["tokens_per_second"]
        ratios = {e: statistics.median(of(r, e) for r in rounds) for e in engines if e != "sluice"}
    return {"tokens_per_second": speed, "sluice_over": ratios, "rounds": rounds}


def print_table(config, result):
    print(f"\n{config:16}{'tokens/s':>10}{'sluice is':>11}{'bar':>7}")
    for engine, speed in result["tokens_per_second"].items():
        ratio = result["sluice_over"].get(engine)
        compared = "" if ratio is None else f"{ratio:10.2f}x{BARS[engine]:6.1f}x  {'ok' if ratio >= BARS[engine] else 'MISSED'}"
        print(f"{engine:16}{speed:10.0f}{compared}")
    print()


def last_json_line(command, environment):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"{command[0]} exited with {done.returncode} and printed {len(lines)} JSON lines; expected 0 and 1")
    return json.loads(lines[-1])


def git(*arguments):
    return subprocess.run(["git", "-C", ROOT, *arguments], stdout=subprocess.PIPE, text=True).stdout.strip()


def cpu_name():
    """The name and, since vendors reuse names, family and model."""
    path = pathlib.Path("/proc/cpuinfo")
    fields = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


if __name__ == "__main__":
    main()
