"""Which tokens are scored, the same for Sluice and every peer: ids are cut into windows of `context` tokens, each window is
scored on its own from its second token on."""

import argparse
import json
import pathlib


def parser(doc):
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--model", required=True, help="GGUF file (or, for transformers, a Hugging Face folder)")
    ids = p.add_mutually_exclusive_group(required=True)
    ids.add_argument("--ids", help="JSON with token ids: a list, a list of windows, or an object with `token_ids`")
    ids.add_argument("--text", help="text file, tokenised here")
    p.add_argument("--context", type=int, default=2048, help="tokens per window")
    p.add_argument("--tokens", type=int, help="use only this many tokens of the text")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--generate", type=int, default=0, help="also continue --prompt-tokens greedily by this many tokens")
    p.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompt, taken from the first window")
    return p


def load(args, encode):
    """Windows of token ids."""
    if args.ids:
        ids = json.loads(pathlib.Path(args.ids).read_text())
        ids = ids["token_ids"] if isinstance(ids, dict) else ids
        if ids and isinstance(ids[0], list):
            return ids
    else:
        ids = encode(pathlib.Path(args.text).read_bytes().decode("utf-8"))
    return cut(ids[: args.tokens], args.context)


def cut(ids, context):
    """Whole windows only, unless there is not even one."""
    n = len(ids) // context
    return [ids[i * context : (i + 1) * context] for i in range(n)] or [ids]


def report(peer, windows, per_token, generated):
    flat = [x for window in per_token for x in window]
    out = {"peer": peer, "tokens": len(flat), "nll": sum(flat) / len(flat), "per_token": flat, "token_ids": windows}
    print(json.dumps(out | generated))
