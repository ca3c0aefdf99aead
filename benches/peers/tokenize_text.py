"""Token ids of a text by the `tokenizers` package, with the vocabulary and merges of a model, as JSON on stdout."""

import argparse
import json
import pathlib

import gguf_model

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--model", required=True, help="GGUF file or Hugging Face folder")
p.add_argument("--text", required=True)
args = p.parse_args()
print(json.dumps({"token_ids": gguf_model.load_tokenizer(args.model)(pathlib.Path(args.text).read_bytes().decode("utf-8"))}))
