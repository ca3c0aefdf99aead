"""Speed of llama.cpp (flash attention) behind a long context, without reading that context in full, which takes it a quarter of an hour at 32,768 tokens.

    .venv/bin/python benches/peers/llama_at_depth.py --gguf M.Q8_0.gguf --depth 0 8192 16384 24576 32256

The cache is put together from blocks of 512 tokens that are read each on its own and then given to one sequence: keys and values are there, in the usual
cells, at the usual positions. What a step costs depends on how many there are, not on what they hold. At each depth one block of 512 tokens and `--tokens`
single tokens are timed, then taken back. Prints one JSON line: tokens/s of a block and of single tokens by depth, and the tokens/s of reading the
whole context that follow when the time of a block is taken to grow linearly between two depths. `--check` compares with a context that was read in full.
"""

import argparse
import json
import time

import llama_cpp as ll

BLOCK = 512
now = time.perf_counter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--depth", type=int, nargs="+", default=[0, 8192, 16384, 24576, 32256], help="multiples of 512, ascending")
    parser.add_argument("--tokens", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processor-time", action="store_true", help="for one thread on a machine that has other work")
    args = parser.parse_args()
    if args.processor_time:
        global now
        now = time.process_time
    model = Model(args.gguf, max(args.depth) + 2 * BLOCK, args.threads)
    rows, filled = [], 0
    for depth in args.depth:
        while filled < depth:
            if args.check:
                model.read(BLOCK, filled, 0)
            else:
                model.read(BLOCK, filled, 1)
                ll.llama_memory_seq_cp(model.memory, 1, 0, -1, -1)
                ll.llama_memory_seq_rm(model.memory, 1, -1, -1)
            filled += BLOCK
        block = model.read(BLOCK, depth, 0)
        ll.llama_memory_seq_rm(model.memory, 0, depth, -1)
        singles = sorted(model.read(1, depth + i, 0) for i in range(args.tokens))
        ll.llama_memory_seq_rm(model.memory, 0, depth, -1)
        rows.append({"depth": depth, "block_tokens_per_second": BLOCK / block, "decode_tokens_per_second": 1 / singles[len(singles) // 2]})
    # Blocks from the depth of one row to that of the next, and the last one itself.
    seconds = BLOCK / rows[-1]["block_tokens_per_second"]
    for a, b in zip(rows, rows[1:]):
        blocks = (b["depth"] - a["depth"]) // BLOCK
        first, last = BLOCK / a["block_tokens_per_second"], BLOCK / b["block_tokens_per_second"]
        seconds += sum(first + (last - first) * i / blocks for i in range(blocks))
    context = rows[-1]["depth"] + BLOCK
    print(json.dumps({"rows": rows, "context": context, "prefill_tokens_per_second": context / seconds, "llama_cpp_python": ll.__version__}))


class Model:
    def __init__(self, path, n_ctx, threads):
        ll.llama_log_set(QUIET, None)
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, BLOCK, BLOCK, 2
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = True
        self.context = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.context)
        self.batch = ll.llama_batch_init(BLOCK, 0, 1)

    def read(self, n, start, sequence):
        """Seconds for `n` tokens at positions from `start` on."""
        batch = self.batch
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = 100 + (start + i) * 7919 % 40000
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i == n - 1
        started = now()
        if ll.llama_decode(self.context, batch) != 0:
            raise SystemExit(f"llama.cpp cannot read {n} tokens at {start}")
        ll.llama_synchronize(self.context)
        return now() - started


QUIET = ll.llama_log_callback(lambda level, text, data: None)

if __name__ == "__main__":
    main()
