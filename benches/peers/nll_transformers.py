"""Negative log-likelihood of a text under transformers in f32, as JSON on stdout.

    python benches/peers/nll_transformers.py --model M.gguf --text FILE --context 2048 --tokens 2048
    python benches/peers/nll_transformers.py --model M.gguf --ids ids.json --generate 64
"""

import torch

import gguf_model
import windows


def main():
    p = windows.parser(__doc__)
    p.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    ids = windows.load(args, lambda text: gguf_model.load_tokenizer(args.model)(text))
    model = gguf_model.load_model(args.model, args.attention)
    with torch.inference_mode():
        per_token = [score(model, window) for window in ids]
        generated = greedy(model, ids[0][: args.prompt_tokens], args.generate) if args.generate else {}
    windows.report("transformers", ids, per_token, generated)


def score(model, window):
    """-log p of each token but the first, nats."""
    ids = torch.tensor(window)
    hidden = model.model(ids[None]).last_hidden_state[0, :-1]  # [T-1, M]
    nll = []
    for rows, targets in zip(hidden.split(256), ids[1:].split(256)):  # logits of all rows at once would be gigabytes
        nll += torch.nn.functional.cross_entropy(model.lm_head(rows).double(), targets, reduction="none").tolist()
    return nll


def greedy(model, prompt, n):
    """The n most likely tokens, one after the other, and by how much each beat the second best: a difference between two
    engines where that is near 0 is rounding."""
    cache, step, ids, margins = None, torch.tensor(prompt)[None], [], []
    for _ in range(n):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        ids.append(best.indices[0].item())
        margins.append((best.values[0] - best.values[1]).item())
        step = best.indices[:1][None]
    return {"prompt_ids": prompt, "generated_ids": ids, "generated_margins": margins}


if __name__ == "__main__":
    main()
