"""Records a tiny encoder of the BERT family, computed by transformers, as the oracle of the Rust tests.

    python golden/encoder.py            # rewrites golden/encoder.safetensors
    python golden/encoder.py --check    # recomputes and compares with the file, writes nothing

    weights.NAME   every tensor as transformers' BertModel saves it, the pooler and the buffer of positions (as f32) among them
    tokens         [B, T] u32; positions >= lens[b] are padding (id 0)
    lens           [B] u32
    hidden         [B, T, M] final states; compare t < lens[b] only
    mean           [B, M] mean of the states of each text

    metadata: `config` (a config.json), `seed`, `torch`, `transformers`. Arithmetic is f64, what is recorded is f32.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

FILE = pathlib.Path(__file__).parent / "encoder.safetensors"
SEED = 7
LENS = [23, 1, 17]
CONFIG = dict(
    model_type="bert", vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_act="gelu",
    max_position_embeddings=24, type_vocab_size=2, layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)


def compute():
    torch.manual_seed(SEED)
    model = transformers.BertModel(transformers.BertConfig(**CONFIG, attn_implementation="eager")).eval()
    with torch.no_grad():
        # Larger than the usual start, so that every weight, norm and bias is seen in the result.
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.2) + (1.0 if name.endswith("LayerNorm.weight") else 0.0))
    model = model.double()
    tokens = torch.randint(1, CONFIG["vocab_size"], (len(LENS), max(LENS)))
    mask = torch.arange(max(LENS))[None] < torch.tensor(LENS)[:, None]
    tokens = tokens * mask
    with torch.no_grad():
        hidden = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    hidden = hidden * mask[..., None]
    mean = hidden.sum(1) / torch.tensor(LENS)[:, None]
    tensors = {f"weights.{name}": t.float().numpy() for name, t in model.state_dict().items()}
    tensors["weights.embeddings.position_ids"] = np.arange(CONFIG["max_position_embeddings"], dtype=np.float32)[None]
    tensors |= dict(tokens=tokens.numpy().astype(np.uint32), lens=np.array(LENS, np.uint32), hidden=hidden.float().numpy(), mean=mean.float().numpy())
    return tensors


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    tensors = compute()
    if args.check:
        known = load_file(FILE)
        assert known.keys() == tensors.keys()
        worst = max(float(np.abs(known[k].astype(np.float64) - tensors[k]).max()) for k in known)
        assert worst < 1e-5, worst
        print("the file agrees to", worst)
        return
    metadata = dict(config=json.dumps(CONFIG), seed=str(SEED), torch=torch.__version__, transformers=transformers.__version__)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, FILE, metadata)
    print(FILE, FILE.stat().st_size, "bytes; state 0:", tensors["hidden"][0, 0, :4], "spread", tensors["hidden"][0].std())


if __name__ == "__main__":
    main()
