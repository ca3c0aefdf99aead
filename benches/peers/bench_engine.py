"""Decode and prefill speed of llama.cpp (Q8_0, with flash attention and without) and of the int8 engine, in turn, on the same file requantised.

    .venv/bin/python benches/peers/bench_engine.py --gguf M.gguf --artifact DIR --sluice target/release/sluice --context 512 2048 8192

The GGUF is requantised to Q8_0 beside `--work` once. Each program reads the same number of tokens in a process of its own; decoding is
the median of single steps behind a full context. Prints a table and writes `benches/results/engine_cpu.json`. `--context 32768` takes llama.cpp
many minutes. A run that other processes disturbed is repeated. Needs llama-cpp-python, compiled on this machine.
"""

import argparse
import ctypes
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

PLAIN = "llama.cpp without flash attention"
ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, help="the model, in any format that llama.cpp reads")
    parser.add_argument("--artifact", required=True, help="the same model after `sluice quantize`")
    parser.add_argument("--sluice", default=ROOT / "target/release/sluice")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target/peers", help="folder for the Q8_0 file")
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=32, help="single steps timed at each context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="the median of so many runs counts; one from 8192 tokens on")
    parser.add_argument("--allow-others", type=float, default=0.03, help="share of the machine that other processes may use meanwhile; it is recorded")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benches/results/engine_cpu.json")
    parser.add_argument("--candle", help="candle's quantised llama as well (benches/peers/candle-llama); its contexts end at 4,096")
    parser.add_argument("--llama-one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--no-flash-attention", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama_one:
        print(json.dumps(llama(args.gguf, args.llama_one, args.tokens, args.threads, not args.no_flash_attention)))
        return
    q8 = requantise(args.gguf, args.work)
    rows = []
    for context in args.context:
        runs = [one_run(args, q8, context) for _ in range(args.runs if context < 8192 else 1)]
        row = {"context": context, "runs": runs}
        peers = [name for name in ["llama.cpp", PLAIN, "candle"] if name in runs[0]]
        for key in ["prefill", "decode"]:
            row[key] = {name: median(run[name][key] for run in runs) for name in ["sluice", *peers]}
            row[key]["ratio"] = {name: median(run["sluice"][key] / run[name][key] for run in runs) for name in peers}
        row["share_of_memory_limit"] = median(run["sluice"]["share_of_memory_limit"] for run in runs)
        rows.append(row)
        print(table_row(row), flush=True)
    report = {"cpu": cpu(), "threads": args.threads, "instructions": runs[0]["sluice"]["instructions"], "llama_cpp_python": version(), "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def one_run(args, q8, context):
    """Both programs in turn, so that what else the machine does hits them alike."""
    decode = sluice(args, "decode", context)
    prefill = sluice(args, "prefill", context)
    command = [sys.executable, __file__, "--gguf", q8, "--artifact", "-", "--llama-one", context, "--tokens", args.tokens, "--threads", args.threads]
    theirs = undisturbed(command, args.allow_others)
    # On some processors llama.cpp decodes faster without.
    plain = undisturbed([*command, "--no-flash-attention"], args.allow_others)
    ours = {
        "prefill": prefill["rows"][0]["prefill_tokens_per_second"],
        "decode": decode["rows"][0]["decode_tokens_per_second"],
        "share_of_memory_limit": decode["rows"][0]["share_of_memory_limit"],
        "resident_bytes": decode["rows"][0]["resident_bytes"],
        "instructions": decode["instructions"],
    }
    others = {"decode": decode["others"], "prefill": prefill["others"], "llama.cpp": theirs.pop("others"), PLAIN: plain.pop("others")}
    run = {"sluice": ours, "llama.cpp": theirs, PLAIN: plain, "share_of_the_machine_used_by_others": others}
    if args.candle and context + args.tokens <= 4096:
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)
        run["candle"] = undisturbed([args.candle, q8, context, args.tokens], args.allow_others)
        others["candle"] = run["candle"].pop("others")
    return run


def median(numbers):
    numbers = sorted(numbers)
    return numbers[len(numbers) // 2]


def sluice(args, which, context):
    command = [args.sluice, "--threads", args.threads, "bench", which, "--model", args.artifact, "--context", context, "--tokens", args.tokens, "--json"]
    return undisturbed(command, args.allow_others)


def undisturbed(command, allowed, tries=40):
    """Run a program that prints JSON, again when other processes took more than `allowed` of the machine meanwhile; adds their share."""
    for _ in range(tries):
        while busy_share(1.0) > allowed:
            time.sleep(2)
        before, own, started = busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
        elapsed, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        others = busy_seconds() - before - (used.ru_utime + used.ru_stime - own.ru_utime - own.ru_stime)
        share = others / elapsed / os.cpu_count()
        if share <= allowed:
            return json.loads(output) | {"others": share}
        print(f"repeated: others used {others:.1f} s of {elapsed:.1f} s x {os.cpu_count()}", file=sys.stderr, flush=True)
    raise SystemExit("the machine is never idle enough to measure on")


def busy_share(seconds):
    before = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - before) / seconds / os.cpu_count()


def busy_seconds():
    """Processor time of everything so far, time taken by the host included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def llama(gguf, context, steps, threads, flash_attention):
    import llama_cpp

    llm = llama_cpp.Llama(
        gguf, n_ctx=context + steps + 8, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, flash_attn=flash_attention, verbose=False
    )
    # Any ids do: neither program's speed depends on them.
    ids = [100 + i * 7919 % 40000 for i in range(context + steps)]
    started = time.perf_counter()
    llm.eval(ids[:context])
    prefill = context / (time.perf_counter() - started)
    seconds = []
    for token in ids[context:]:
        started = time.perf_counter()
        llm.eval([token])
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"prefill": prefill, "decode": 1 / sorted(seconds)[len(seconds) // 2], "peak_resident_bytes": peak}


def requantise(gguf, folder):
    """The same file in Q8_0."""
    import llama_cpp

    target = folder / (pathlib.Path(gguf).stem + ".Q8_0.gguf")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        params.allow_requantize = True
        aside = target.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(aside).encode(), ctypes.byref(params)) != 0:
            raise SystemExit(f"llama.cpp cannot requantise {gguf}")
        aside.rename(target)
    return target


def table_row(row):
    cells = []
    for key in ["prefill", "decode"]:
        peers = [f"{name} {row[key][name]:.1f} ({ratio:.2f}x)" for name, ratio in row[key]["ratio"].items()]
        cells.append(f"{key} {row[key]['sluice']:.1f} tokens/s, " + ", ".join(peers))
    return f"{row['context']:>7}  " + ", ".join(cells) + f", decode at {100 * row['share_of_memory_limit']:.0f} % of the memory limit"


def cpu():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name, family, model = (next(l.split(":", 1)[1].strip() for l in lines if l.split("\t")[0] == key) for key in ["model name", "cpu family", "model"])
    return f"{name}, family {family}, model {model}"


def version():
    import llama_cpp

    return llama_cpp.__version__


if __name__ == "__main__":
    main()
