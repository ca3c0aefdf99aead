//! Tiny models of each family, and a writer of GGUF files that follows llama.cpp's converter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use sluice_model::checkpoint::{self, Checkpoint, tensor_shapes};
use sluice_spec::{Architecture, ModelConfig, TextConfig, tensor_names};
use sluice_tensor::{DType, Tensor};
use sluice_testkit::{Rng, small_model};

pub(crate) type Tensors = BTreeMap<String, Tensor>;

pub(crate) fn tiny_config(architecture: Architecture) -> ModelConfig {
    ModelConfig { d_ff: 64, vocab_size: 40, max_seq_len: 128, rope_theta: 50_000.0, ..small_model(architecture) }
}

/// Multiples of 1/64 below 2: exact in every format that the tests store.
pub(crate) fn random_tensors(config: &ModelConfig, seed: u64) -> Tensors {
    let mut rng = Rng::new(seed);
    let mut tensor = |shape: Vec<usize>| {
        let n = shape.iter().product();
        Tensor::from_vec((0..n).map(|_| (rng.below(255) as f32 - 127.0) / 64.0).collect(), shape)
    };
    tensor_shapes(config).into_iter().map(|(name, shape)| (name, tensor(shape))).collect()
}

pub(crate) fn text_config() -> TextConfig {
    TextConfig { bos: Some(1), eos: vec![2, 0], chat_template: Some("{{ messages }}".into()) }
}

#[track_caller]
pub(crate) fn assert_same_tensors(got: &Tensors, want: &Tensors) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, want) in want {
        let (got, want) = (got[name].to_dtype(DType::F32), want.to_dtype(DType::F32));
        assert_eq!(got.shape(), want.shape(), "{name}");
        assert!(got.f32().iter().zip(want.f32()).all(|(g, w)| g.to_bits() == w.to_bits()), "`{name}` differs");
    }
}

/// The message of a load that must fail; it always names the file.
#[track_caller]
pub(crate) fn load_error(path: &Path) -> String {
    match checkpoint::load(path) {
        Ok(_) => panic!("{} loads", path.display()),
        Err(e) => {
            let message = e.to_string();
            assert!(message.contains(&*path.to_string_lossy()), "the message does not name {}: {message}", path.display());
            message
        }
    }
}

#[track_caller]
pub(crate) fn assert_mentions(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "no `{word}` in: {message}");
    }
}

/// ggml type numbers that the writer can encode.
pub(crate) const F32: u32 = 0;
pub(crate) const F16: u32 = 1;
pub(crate) const Q8_0: u32 = 8;
pub(crate) const BF16: u32 = 30;

#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    /// Slowest axis first, as everywhere in this project.
    pub(crate) shape: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// A GGUF file in the making; everything can be set wrong on purpose.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) alignment: usize,
    /// Key, and type number with value as they stand in the file.
    pub(crate) metadata: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<GgufTensor>,
}

pub(crate) fn text_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn typed(kind: u32, value: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], value].concat()
}

pub(crate) fn u32_value(v: u32) -> Vec<u8> {
    typed(4, &v.to_le_bytes())
}

pub(crate) fn f32_value(v: f32) -> Vec<u8> {
    typed(6, &v.to_le_bytes())
}

pub(crate) fn text_value(v: &str) -> Vec<u8> {
    typed(8, &text_bytes(v))
}

pub(crate) fn array_value(kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    typed(9, &[&kind.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes(), &elements.concat()].concat())
}

pub(crate) fn texts_value(texts: &[&str]) -> Vec<u8> {
    array_value(8, &texts.iter().map(|t| text_bytes(t)).collect::<Vec<_>>())
}

impl Gguf {
    /// What llama.cpp's converter makes of a model: its names, its metadata and, for llama, its row order.
    pub(crate) fn of_model(config: &ModelConfig, tensors: &Tensors) -> Self {
        let arch = config.architecture.name();
        let mut gguf = Self { version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() };
        gguf.set("general.architecture", text_value(arch));
        gguf.set("general.name", text_value("tiny"));
        for (key, value) in [
            ("block_count", config.n_layers),
            ("context_length", config.max_seq_len),
            ("embedding_length", config.d_model),
            ("feed_forward_length", config.d_ff),
            ("attention.head_count", config.n_heads),
            ("attention.head_count_kv", config.n_kv_heads),
            ("attention.key_length", config.head_dim),
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.head_dim),
        ] {
            gguf.set(&format!("{arch}.{key}"), u32_value(value as u32));
        }
        gguf.set(&format!("{arch}.rope.freq_base"), f32_value(config.rope_theta));
        gguf.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), f32_value(config.norm_eps));
        for (name, tensor) in tensors {
            let mut tensor = tensor.clone();
            if config.architecture == Architecture::Llama && name.ends_with("q_proj.weight") {
                tensor = converter_permute(&tensor, config.n_heads);
            }
            if config.architecture == Architecture::Llama && name.ends_with("k_proj.weight") {
                tensor = converter_permute(&tensor, config.n_kv_heads);
            }
            gguf.add(&gguf_name(name), &tensor, F32);
        }
        gguf
    }

    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_string(), value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(k, _)| k != key);
    }

    pub(crate) fn add(&mut self, name: &str, tensor: &Tensor, kind: u32) {
        let shape = tensor.shape().iter().map(|&d| d as u64).collect();
        self.tensors.push(GgufTensor { name: name.to_string(), shape, kind, data: encode(tensor.f32(), kind) });
    }

    /// Store a tensor that is there in another format.
    pub(crate) fn restore(&mut self, name: &str, kind: u32) {
        let tensor = self.tensors.iter_mut().find(|t| t.name == name).unwrap();
        let values: Vec<f32> = tensor.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (tensor.kind, tensor.data) = (kind, encode(&values, kind));
    }

    /// Bytes of the file, and where the header ends.
    pub(crate) fn bytes(&self) -> (Vec<u8>, usize) {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(text_bytes(key));
            out.extend(value);
        }
        let mut offset = 0;
        for t in &self.tensors {
            out.extend(text_bytes(&t.name));
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.kind.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset = (offset + t.data.len()).next_multiple_of(self.alignment);
        }
        let header = out.len();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&t.data);
        }
        (out, header)
    }

    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("tiny.gguf");
        std::fs::write(&path, self.bytes().0).unwrap();
        path
    }

    /// Write and load.
    pub(crate) fn load(&self) -> Checkpoint {
        let folder = tempfile::tempdir().unwrap();
        checkpoint::load(&self.write(folder.path())).unwrap()
    }

    /// Write, fail to load, and give the message.
    #[track_caller]
    pub(crate) fn error(&self) -> String {
        let folder = tempfile::tempdir().unwrap();
        load_error(&self.write(folder.path()))
    }
}

/// `reshape(heads, 2, D/2, M).swapaxes(1, 2)`, as the converter does to q and k of a llama.
fn converter_permute(w: &Tensor, n_heads: usize) -> Tensor {
    let [rows, m] = w.dims();
    let half = rows / n_heads / 2;
    let mut out = Vec::new();
    for head in 0..n_heads {
        for pair in 0..half {
            for side in 0..2 {
                let row = (head * 2 + side) * half + pair;
                out.extend_from_slice(&w.f32()[row * m..(row + 1) * m]);
            }
        }
    }
    Tensor::from_vec(out, [rows, m])
}

fn gguf_name(hf: &str) -> String {
    if hf == tensor_names::EMBED {
        return "token_embd.weight".into();
    }
    if hf == tensor_names::FINAL_NORM {
        return "output_norm.weight".into();
    }
    if hf == tensor_names::LM_HEAD {
        return "output.weight".into();
    }
    let mut name = hf.replace("model.layers", "blk");
    for (ours, theirs) in [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(ours, theirs);
    }
    name
}

fn encode(values: &[f32], kind: u32) -> Vec<u8> {
    match kind {
        F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        // The scale 1/64 makes every value of `random_tensors` exact.
        Q8_0 => values
            .chunks(32)
            .flat_map(|block| {
                let scale = f16::from_f32(1.0 / 64.0).to_le_bytes();
                scale.into_iter().chain(block.iter().map(|x| (x * 64.0) as i8 as u8)).collect::<Vec<_>>()
            })
            .collect(),
        _ => panic!("the test writer has no encoder for type {kind}"),
    }
}
