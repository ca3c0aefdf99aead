"""compute-sanitizer over `sluice selftest --device cuda`, op by op and side by side. Needs a GPU and the CUDA toolkit.

    python tests/sanitize.py --sluice target/release/sluice --tool racecheck --precision bf16

The cases come from `sluice selftest --all --json`. Every op is a process of its own, and so is every case of the ops named by --apart, whose cases are too many
or too large for one time limit. Products of cuBLASLt are not ours: the tool looks at the kernels of this repository alone, whose names it takes from the
sources. Prints a row per process and, last, what is not clean.
"""

import argparse
import collections
import concurrent.futures
import json
import pathlib
import re
import subprocess
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def kernels():
    """Names of the kernels in the .cu and .cuh files."""
    bounds = r"(?:\s+__launch_bounds__\([^)]*\))?"
    defined = rf"(?:^KERNEL|__global__){bounds}(?:\s+void)?{bounds}\s+(\w+)\("
    by_macro = r"^[A-Z_]+\((\w+), \d+"
    text = "".join(path.read_text() for path in REPOSITORY.glob("crates/*/src/**/*.cu*"))
    return sorted(set(re.findall(defined, text, re.M) + re.findall(by_macro, text, re.M)) - {"name", "__launch_bounds__"})


def processes(args, precision):
    """(op, case or None) of every process."""
    listed = subprocess.run([args.sluice, "selftest", "--device", "cuda", "--precision", precision, "--all", "--json"], stdout=subprocess.PIPE, text=True)
    found = json.loads([line for line in listed.stdout.splitlines() if line.startswith("{")][-1])
    print(f"{precision}: {found['compared']} comparisons on {found['device']}, {found['failed']} failed", flush=True)
    cases = collections.OrderedDict()
    for outcome in found["outcomes"]:
        # The output head reports under the names of its two losses.
        op = {"cross_entropy": "output_head", "distill": "output_head"}.get(outcome["op"], outcome["op"])
        cases.setdefault(op, {})[outcome["case"]] = None
    cases.pop("memory", None)  # It asks for memory that is not there, which the tool reports as an error of the API.
    for op, names in cases.items():
        if args.ops and op not in args.ops:
            continue
        if op in args.apart:
            yield from ((op, case) for case in names)
        else:
            yield op, None


def check(args, precision, op, case):
    command = [args.sanitizer, "--tool", args.tool]
    if not args.every_kernel:
        command += [option for name in kernels() for option in ("--kernel-name", f"kne={name}")]
    if args.tool == "racecheck" and args.workers:
        command += ["--racecheck-num-workers", str(args.workers)]
    command += [args.sluice, "selftest", "--device", "cuda", "--precision", precision, "--op", op]
    if case is not None:
        command += ["--case", case]
    started = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=args.timeout)
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as e:
        output, code = (e.stdout or b"").decode(errors="replace") if isinstance(e.stdout, bytes) else (e.stdout or ""), "time limit"
    compared = re.search(r"(\d+) comparisons on .*: (\d+) failed", output)
    summary = re.findall(r"(?:RACECHECK|ERROR) SUMMARY: .*", output)
    clean = code == 0 and compared and compared[2] == "0" and any(re.search(r"\b0 (hazards|errors)", line) for line in summary)
    row = dict(tool=args.tool, precision=precision, op=op, case=case, clean=bool(clean), code=code, seconds=round(time.monotonic() - started, 1),
               compared=int(compared[1]) if compared else None, summary=summary[-1] if summary else None)
    if not clean:
        row["output"] = output[-6000:]
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--sluice", required=True)
    p.add_argument("--sanitizer", default="compute-sanitizer")
    p.add_argument("--tool", default="racecheck", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    p.add_argument("--precision", nargs="+", default=["bf16"])
    p.add_argument("--ops", nargs="*", help="only these")
    p.add_argument("--apart", nargs="*", default=["dense_attention", "linear"], help="ops with a process for every case")
    p.add_argument("--every-kernel", action="store_true", help="the kernels of cuBLASLt too")
    p.add_argument("--workers", type=int, help="threads of racecheck in a process")
    p.add_argument("--at-once", type=int, default=8, help="processes side by side")
    p.add_argument("--timeout", type=float, default=150, help="seconds of a process")
    p.add_argument("--out")
    args = p.parse_args()
    rows = []
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        work = [pool.submit(check, args, precision, *process) for precision in args.precision for process in processes(args, precision)]
        for future in concurrent.futures.as_completed(work):
            row = future.result()
            rows.append(row)
            print(f"{row['tool']} {row['precision']} {row['op']} {row['case'] or ''}: {'clean' if row['clean'] else 'NOT CLEAN'}, {row['compared']} comparisons, "
                  f"{row['seconds']} s, code {row['code']}, {row['summary']}", flush=True)
    bad = [row for row in rows if not row["clean"]]
    print(f"{args.tool}: {len(rows)} processes, {sum(row['compared'] or 0 for row in rows)} comparisons, {len(bad)} processes not clean: "
          + ", ".join(f"{row['op']} {row['case'] or ''} ({row['precision']}, {row['code']})" for row in bad))
    if args.out:
        with open(args.out, "w") as f:
            json.dump(rows, f, indent=1)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
