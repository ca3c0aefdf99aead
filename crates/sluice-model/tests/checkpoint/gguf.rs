//! GGUF import: layout, names, metadata, and refusals of what would change the numbers.

use sluice_model::checkpoint;
use sluice_spec::{Architecture, RopeScaling, TokenizerSource};
use sluice_tensor::{DType, Tensor};

use super::support::*;

#[test]
fn gguf_and_hugging_face_folder_give_the_same_model() {
    for architecture in [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3] {
        for tie_embeddings in [true, false] {
            let config = sluice_spec::ModelConfig { tie_embeddings, ..tiny_config(architecture) };
            let tensors = random_tensors(&config, 7);
            let from_gguf = Gguf::of_model(&config, &tensors).load();
            let folder = tempfile::tempdir().unwrap();
            checkpoint::export_hf(folder.path(), &config, &tensors, &text_config(), None, None, DType::F32).unwrap();
            let from_hf = checkpoint::load(folder.path()).unwrap();
            assert_eq!(from_gguf.config, config);
            assert_eq!(from_hf.config, config);
            assert_same_tensors(&from_gguf.tensors, &tensors);
            assert_same_tensors(&from_hf.tensors, &tensors);
        }
    }
}

#[test]
fn other_formats_versions_and_alignments_give_the_same_tensors() {
    let config = tiny_config(Architecture::Llama);
    let tensors = random_tensors(&config, 8);
    let mut gguf = Gguf::of_model(&config, &tensors);
    for (name, kind) in [
        ("token_embd.weight", Q8_0),
        ("blk.0.attn_q.weight", Q8_0),
        ("blk.1.attn_q.weight", BF16),
        ("blk.0.attn_k.weight", F16),
        ("blk.1.ffn_down.weight", BF16),
    ] {
        gguf.restore(name, kind);
    }
    for (version, alignment) in [(2, 32), (3, 8), (3, 256)] {
        (gguf.version, gguf.alignment) = (version, alignment);
        gguf.set("general.alignment", u32_value(alignment as u32));
        let loaded = gguf.load();
        assert_same_tensors(&loaded.tensors, &tensors);
        assert_eq!(loaded.tensors["model.layers.1.mlp.down_proj.weight"].dtype(), DType::Bf16, "bf16 stays as stored");
        assert_eq!(loaded.tensors["model.layers.0.self_attn.k_proj.weight"].dtype(), DType::F32);
    }
}

#[test]
fn large_tensors_are_read_in_pieces_without_a_seam() {
    // More elements than one read covers, and not a multiple of it.
    let config = sluice_spec::ModelConfig { vocab_size: 20_001, ..tiny_config(Architecture::Qwen2) };
    let tensors = random_tensors(&config, 9);
    let mut gguf = Gguf::of_model(&config, &tensors);
    for kind in [F32, BF16] {
        gguf.restore("token_embd.weight", kind);
        assert_same_tensors(&gguf.load().tensors, &tensors);
    }
    let mut gguf = Gguf::of_model(&config, &tensors);
    gguf.restore("token_embd.weight", Q8_0);
    assert_same_tensors(&gguf.load().tensors, &tensors);
}

#[test]
fn metadata_of_every_type_is_understood() {
    let config = tiny_config(Architecture::Llama);
    let tensors = random_tensors(&config, 10);
    let mut gguf = Gguf::of_model(&config, &tensors);
    for kind in [0, 1, 7] {
        gguf.set(&format!("x.scalar.{kind}"), typed(kind, &[1]));
        gguf.set(&format!("x.array.{kind}"), array_value(kind, &[vec![0], vec![1]]));
    }
    for (kind, bytes) in [(2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (10, 8), (11, 8), (12, 8)] {
        gguf.set(&format!("x.scalar.{kind}"), typed(kind, &vec![1; bytes]));
        gguf.set(&format!("x.array.{kind}"), array_value(kind, &vec![vec![1; bytes]; 3]));
    }
    let inner = |texts: &[&str]| texts_value(texts)[4..].to_vec();
    gguf.set("x.nested", array_value(9, &[inner(&["a", "bc"]), inner(&[])]));
    // The same sizes in other widths, and once for each layer.
    gguf.set("llama.block_count", typed(10, &2u64.to_le_bytes()));
    gguf.set("llama.context_length", typed(5, &128i32.to_le_bytes()));
    gguf.set("llama.attention.head_count_kv", array_value(5, &vec![2i32.to_le_bytes().to_vec(); 2]));
    gguf.set("llama.rope.freq_base", typed(12, &50_000f64.to_le_bytes()));
    let loaded = gguf.load();
    assert_eq!(loaded.config, config);
    assert_same_tensors(&loaded.tensors, &tensors);

    gguf.set("llama.attention.head_count_kv", array_value(5, &[2i32, 4].map(|n| n.to_le_bytes().to_vec())));
    assert_mentions(&gguf.error(), &["head_count_kv", "all layers"]);
}

#[test]
fn rope_scaling_is_mapped_or_refused() {
    let mut config = tiny_config(Architecture::Llama);
    config.head_dim = 16;
    config.rope_theta = 500_000.0;
    let tensors = random_tensors(&config, 11);
    let gguf = Gguf::of_model(&config, &tensors);

    let mut linear = gguf.clone();
    linear.set("llama.rope.scaling.type", text_value("linear"));
    linear.set("llama.rope.scaling.factor", f32_value(4.0));
    assert_eq!(linear.load().config.rope_scaling, Some(RopeScaling::Linear { factor: 4.0 }));

    let mut yarn = gguf.clone();
    yarn.set("llama.rope.scaling.type", text_value("yarn"));
    assert_mentions(&yarn.error(), &["yarn", "linear"]);

    // As the converter computes them for llama 3.1: factor 8, 1, 4, 8192 positions, in f32.
    let factors: Vec<f32> = (0..8)
        .map(|i| {
            let wavelength = std::f32::consts::TAU * 500_000f32.powf(2.0 * i as f32 / 16.0);
            if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                8.0
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                1.0 / ((1.0 - smooth) / 8.0 + smooth)
            }
        })
        .collect();
    assert!(factors.iter().any(|&f| f > 1.0 && f < 8.0), "the ramp is covered: {factors:?}");
    let with_factors = |factors: Vec<f32>| {
        let mut gguf = gguf.clone();
        let n = factors.len();
        gguf.add("rope_freqs.weight", &Tensor::from_vec(factors, [n]), F32);
        gguf
    };
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_seq_len: 8192 };
    assert_eq!(with_factors(factors.clone()).load().config.rope_scaling, Some(llama3));
    assert_eq!(with_factors(vec![1.0; 8]).load().config.rope_scaling, None);
    let mut other = factors;
    other[4] *= 1.01;
    assert_mentions(&with_factors(other).error(), &["rope_freqs.weight", "llama 3"]);
    assert_mentions(&with_factors(vec![1.0; 5]).error(), &["rope_freqs.weight", "5 elements", "8"]);
}

#[test]
fn tokenizer_and_special_tokens_come_along() {
    let config = tiny_config(Architecture::Llama);
    let mut gguf = Gguf::of_model(&config, &random_tensors(&config, 12));
    assert_eq!(gguf.load().tokenizer, TokenizerSource::Missing);
    gguf.set("tokenizer.ggml.model", text_value("gpt2"));
    gguf.set("tokenizer.ggml.pre", text_value("smollm"));
    gguf.set("tokenizer.ggml.tokens", texts_value(&["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "Ġb", "<|im_end|>"]));
    let types: Vec<Vec<u8>> = [3i32, 3, 3, 1, 1, 1].iter().map(|t| t.to_le_bytes().to_vec()).collect();
    gguf.set("tokenizer.ggml.token_type", array_value(5, &types));
    gguf.set("tokenizer.ggml.merges", texts_value(&["a Ġb"]));
    gguf.set("tokenizer.ggml.bos_token_id", u32_value(1));
    gguf.set("tokenizer.ggml.eos_token_id", u32_value(2));
    gguf.set("tokenizer.chat_template", text_value("{{ x }}"));
    let loaded = gguf.load();
    let TokenizerSource::Gguf(tokenizer) = &loaded.tokenizer else { panic!("{:?}", loaded.tokenizer) };
    assert_eq!((tokenizer.model.as_str(), tokenizer.pre.as_str(), tokenizer.add_bos), ("gpt2", "smollm", false));
    assert_eq!((tokenizer.tokens[4].as_str(), tokenizer.merges.as_slice()), ("Ġb", &["a Ġb".to_string()][..]));
    assert_eq!(tokenizer.token_types, [3, 3, 3, 1, 1, 1]);
    // The named EOS first; other control tokens that end a turn after it; ordinary text never.
    assert_eq!((loaded.text.bos, loaded.text.eos.as_slice()), (Some(1), &[2, 0][..]));
    assert_eq!(loaded.text.chat_template.as_deref(), Some("{{ x }}"));

    gguf.set("tokenizer.ggml.add_bos_token", typed(7, &[1]));
    let TokenizerSource::Gguf(tokenizer) = gguf.load().tokenizer else { panic!("no tokenizer") };
    assert!(tokenizer.add_bos);
    gguf.set("tokenizer.ggml.eos_token_id", u32_value(40));
    assert_mentions(&gguf.error(), &["eos_token_id", "40"]);
    gguf.set("tokenizer.ggml.eos_token_id", u32_value(2));
    gguf.set("tokenizer.ggml.tokens", texts_value(&["x"; 41]));
    assert_mentions(&gguf.error(), &["41 tokens", "40 rows"]);
}

#[test]
fn settings_that_would_change_the_numbers_are_refused() {
    let config = tiny_config(Architecture::Llama);
    let gguf = Gguf::of_model(&config, &random_tensors(&config, 13));
    for (key, value, words) in [
        ("general.architecture", text_value("gemma3"), ["gemma3", "qwen2"]),
        ("llama.expert_count", u32_value(8), ["expert_count", "8"]),
        ("llama.attention.sliding_window", u32_value(4096), ["sliding_window", "4096"]),
        ("llama.attention.causal", typed(7, &[0]), ["causal", "false"]),
        ("llama.logit_scale", f32_value(0.5), ["logit_scale", "0.5"]),
        ("llama.attention.value_length", u32_value(16), ["value_length", "16"]),
        ("llama.rope.dimension_count", u32_value(4), ["dimension_count", "head width 8"]),
        ("llama.attention.head_count", u32_value(0), ["0 attention heads", "expected"]),
        ("llama.attention.head_count_kv", u32_value(3), ["4 query heads", "3 KV"]),
        ("llama.block_count", text_value("two"), ["block_count", "two"]),
        ("llama.embedding_length", u32_value(64), ["[40, 32]", "[40, 64]"]),
        ("split.count", typed(2, &3u16.to_le_bytes()), ["3 parts", "merge"]),
        ("general.alignment", u32_value(24), ["general.alignment", "24"]),
    ] {
        let mut gguf = gguf.clone();
        gguf.set(key, value);
        assert_mentions(&gguf.error(), &words);
    }
    for key in ["general.architecture", "llama.block_count", "llama.attention.layer_norm_rms_epsilon", "llama.context_length"] {
        let mut gguf = gguf.clone();
        gguf.remove(key);
        assert_mentions(&gguf.error(), &[key, "missing"]);
    }
    // What the file leaves out for good reasons has the same default everywhere.
    let mut defaults = gguf.clone();
    for key in ["attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"] {
        defaults.remove(&format!("llama.{key}"));
    }
    assert_eq!(defaults.load().config, sluice_spec::ModelConfig { rope_theta: 10_000.0, ..config });
}

#[test]
fn tensors_must_be_exactly_those_of_the_model() {
    let config = tiny_config(Architecture::Llama);
    let gguf = Gguf::of_model(&config, &random_tensors(&config, 14));
    let change = |change: &dyn Fn(&mut Gguf)| {
        let mut gguf = gguf.clone();
        change(&mut gguf);
        gguf.error()
    };
    assert_mentions(
        &change(&|g| g.tensors.retain(|t| t.name != "blk.1.ffn_up.weight")),
        &["model.layers.1.mlp.up_proj.weight", "20 tensors"],
    );
    assert_mentions(&change(&|g| g.tensors.retain(|t| t.name != "token_embd.weight")), &["token_embd.weight"]);
    assert_mentions(&change(&|g| g.add("blk.0.attn_q.bias", &Tensor::zeros([32]), F32)), &["self_attn.q_proj.bias", "llama"]);
    assert_mentions(&change(&|g| g.add("blk.2.attn_norm.weight", &Tensor::zeros([32]), F32)), &["model.layers.2", "2 layers"]);
    assert_mentions(&change(&|g| g.add("blk.01.attn_norm.weight", &Tensor::zeros([32]), F32)), &["blk.01"]);
    assert_mentions(&change(&|g| g.add("mystery", &Tensor::zeros([3]), F32)), &["mystery", "[3]"]);
    assert_mentions(&change(&|g| g.tensors.push(g.tensors[0].clone())), &["twice"]);
    assert_mentions(&change(&|g| g.metadata.push(g.metadata[0].clone())), &["general.architecture", "twice"]);
    assert_mentions(&change(&|g| g.tensors[0].kind = 10), &["Q2_K", "Q4_K"]);
    assert_mentions(&change(&|g| g.tensors[0].kind = 99), &["type 99"]);
    assert_mentions(&change(&|g| g.tensors[0].kind = 12), &["Q4_K", "256"]);
    assert_mentions(&change(&|g| g.tensors[0].shape = vec![0, 32]), &["axis of 0"]);
    assert_mentions(&change(&|g| g.tensors[0].shape = vec![1; 5]), &["5 axes"]);
    assert_mentions(&change(&|g| g.tensors[0].shape = vec![1 << 40, 1 << 40]), &["1099511627776"]);
}
