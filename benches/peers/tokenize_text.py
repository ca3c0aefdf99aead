"""Token ids of texts by the `tokenizers` package, with the vocabulary and merges of a model: as JSON on stdout, or as a
stream of little-endian u16 for `bench train-step --fresh-batches`, the texts taking turns in pieces of 16 KiB."""

import argparse
import itertools
import json
import pathlib

import gguf_model

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--model", required=True, help="GGUF file or Hugging Face folder")
p.add_argument("--text", required=True, nargs="+")
p.add_argument("--u16", help="write this file instead of JSON")
p.add_argument("--limit", type=int, help="tokens to write")
args = p.parse_args()
tokenize = gguf_model.load_tokenizer(args.model)
texts = [pathlib.Path(text).read_bytes().decode("utf-8") for text in args.text]
if args.u16 is None:
    print(json.dumps({"token_ids": tokenize("".join(texts))}))
else:
    pieces = [[text[i : i + 16384] for i in range(0, len(text), 16384)] for text in texts]
    ids = []
    for piece in itertools.chain.from_iterable(itertools.zip_longest(*pieces, fillvalue="")):
        ids += tokenize(piece) if piece else []
        if args.limit and len(ids) >= args.limit:
            break
    pathlib.Path(args.u16).write_bytes(b"".join(i.to_bytes(2, "little") for i in ids[: args.limit]))
