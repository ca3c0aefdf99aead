"""Writes gguf_blocks.bin: random blocks of every GGUF format that Sluice reads, with their values as
computed by the format's reference implementation.

    pip install gguf numpy && python golden/gguf_blocks.py

Layout, little-endian: for each format u32 ggml type, u32 block count, u32 elements per block,
u32 bytes per block, the blocks, the f32 values. Ends with the file.
"""

import pathlib
import struct

import gguf
import numpy as np

BLOCKS = 12
FORMATS = {  # byte offsets of the f16 scales inside a block
    "F32": [], "F16": [], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}

rng = np.random.default_rng(20261123)
out = bytearray()
for name, scales in FORMATS.items():
    kind = gguf.GGMLQuantizationType[name]
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = BLOCKS if block_len > 1 else 64
    blocks = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    # Scales of every size, subnormal ones and zeros of both signs among them; NaN and infinity have no place in a file.
    values = rng.normal(size=(n_blocks, 4)) * 10.0 ** rng.integers(-7, 4, (n_blocks, 4))
    values[0], values[1] = 0.0, -0.0
    halves = values.astype(np.float16).view(np.uint8).reshape(n_blocks, 4, 2)
    for i, at in enumerate(scales):
        blocks[:, at : at + 2] = halves[:, i]
    if name == "F32":
        blocks = (rng.normal(size=n_blocks) * 10.0 ** rng.integers(-40, 38, n_blocks)).astype(np.float32).view(np.uint8).reshape(n_blocks, 4)
    elif name == "F16":
        blocks = values[:, 0].astype(np.float16).view(np.uint8).reshape(n_blocks, 2)
    elif name == "BF16":
        blocks = (values[:, 0].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(n_blocks, 2)
    data = blocks.reshape(-1)
    if name == "F32":
        decoded = data.view(np.float32)
    elif name == "F16":
        decoded = data.view(np.float16).astype(np.float32)
    else:
        decoded = gguf.quants.dequantize(data, kind)
    decoded = np.ascontiguousarray(decoded, dtype="<f4").reshape(-1)
    assert decoded.size == n_blocks * block_len and np.isfinite(decoded).all(), name
    out += struct.pack("<4I", kind.value, n_blocks, block_len, block_bytes) + data.tobytes() + decoded.tobytes()

path = pathlib.Path(__file__).with_name("gguf_blocks.bin")
path.write_bytes(out)
print(f"{path}: {len(out)} bytes")
