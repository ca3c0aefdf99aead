"""Negative log-likelihood of a text under llama.cpp (llama-cpp-python), as JSON on stdout.

    python benches/peers/nll_llama_cpp.py --model M.gguf --ids ids.json

llama.cpp rounds activations to 8 bits wherever weights are quantised, so its numbers differ from f32 arithmetic on the same
weights by a few thousandths of a nat; they show that a file is read as its own engine reads it.
"""

import llama_cpp
import numpy as np

import windows


def main():
    args = windows.parser(__doc__).parse_args()
    ids = windows.load(args, lambda text: tokenize(args.model, text))
    llm = llama_cpp.Llama(
        args.model,
        n_ctx=max(max(len(w) for w in ids), args.prompt_tokens + args.generate),
        n_batch=512,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        logits_all=True,
        verbose=False,
    )
    per_token = [score(llm, window) for window in ids]
    generated = greedy(llm, ids[0][: args.prompt_tokens], args.generate) if args.generate else {}
    windows.report("llama.cpp", ids, per_token, generated)


def tokenize(model, text):
    return llama_cpp.Llama(model, vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=False)


def score(llm, window):
    """-log p of each token but the first, nats."""
    llm.reset()
    llm.eval(window)
    nll = []
    for i, target in enumerate(window[1:]):
        logits = llm.scores[i].astype(np.float64)
        top = logits.max()
        nll.append(float(np.log(np.exp(logits - top).sum()) + top - logits[target]))
    return nll


def greedy(llm, prompt, n):
    llm.reset()
    llm.eval(prompt)
    ids = []
    for _ in range(n):
        ids.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(ids[-1:])
    return {"prompt_ids": prompt, "generated_ids": ids}


if __name__ == "__main__":
    main()
