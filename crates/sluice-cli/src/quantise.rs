//! A float decoder as an int8 artifact, and what that costs: both models read the same text in their bounded caches.

use std::path::Path;

use anyhow::{Context, Result};
use sluice_data::embedded::{self, Split};
use sluice_engine::{Artifact, ArtifactBuilder, Engine, Options};
use sluice_model::checkpoint::Gates;
use sluice_model::{AttentionPlan, Cache, Decoder, Policy};
use sluice_spec::artifact::{EMBED, FINAL_NORM, LM_HEAD, Provenance, Quality, of_layer};
use sluice_spec::{RoutingConfig, tensor_names as names};
use sluice_tensor::Tensor;

use crate::models::Loaded;
use crate::progress;

/// Tokens that the float model reads at once.
const CHUNK: usize = 128;

/// Round a model and its gates to int8. `group` inputs share a scale.
pub(crate) fn quantise(
    loaded: &Loaded,
    gates: Option<&Gates>,
    routing: RoutingConfig,
    group: usize,
    provenance: Provenance,
) -> Result<Artifact> {
    let model = &loaded.model.config;
    let text = loaded.tokenizer.text_config().clone();
    let tokenizer = loaded.tokenizer.to_json();
    let mut builder = ArtifactBuilder::new(model.clone(), routing, gates.is_some(), group, text, tokenizer, provenance);
    let tensors = loaded.model.base_tensors();
    let f32 = |name: &str| tensors[name].f32();
    builder.add(EMBED, f32(names::EMBED))?;
    builder.add(FINAL_NORM, f32(names::FINAL_NORM))?;
    if !model.tie_embeddings {
        builder.add(LM_HEAD, f32(names::LM_HEAD))?;
    }
    let bar = progress::bar(model.n_layers as u64, "layers");
    for layer in 0..model.n_layers {
        let of = |part: &str| f32(&names::of_layer(layer, part));
        let stacked = |parts: &[&str]| parts.iter().flat_map(|part| of(part).iter().copied()).collect::<Vec<f32>>();
        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        let mut add = |part: &str, numbers: &[f32]| builder.add(&of_layer(layer, part), numbers);
        add("input_norm", of("input_layernorm.weight"))?;
        add("qkv", &stacked(&qkv.map(|p| format!("{p}.weight")).each_ref().map(String::as_str)))?;
        if model.qkv_bias {
            add("qkv.bias", &stacked(&qkv.map(|p| format!("{p}.bias")).each_ref().map(String::as_str)))?;
        }
        if model.qk_norm {
            add("q_norm", of("self_attn.q_norm.weight"))?;
            add("k_norm", of("self_attn.k_norm.weight"))?;
        }
        add("o", of("self_attn.o_proj.weight"))?;
        add("post_norm", of("post_attention_layernorm.weight"))?;
        add("gate_up", &stacked(&["mlp.gate_proj.weight", "mlp.up_proj.weight"]))?;
        add("down", of("mlp.down_proj.weight"))?;
        if let Some(gates) = gates {
            let gate = &gates.layers[layer];
            add("gate.weight", gate.weight.f32())?;
            add("gate.bias", gate.bias.f32())?;
            add("gate.recency", gate.recency.f32())?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(builder.finish()?)
}

/// Compare the artifact with the float model on the beginning of an embedded text, and note the result in its manifest.
pub(crate) fn measure(artifact: Artifact, loaded: &Loaded, n_tokens: usize) -> Result<Artifact> {
    let documents = embedded::documents();
    let document = documents.iter().find(|d| d.split == Split::Held && d.domain == "prose").context("no held-out prose is embedded")?;
    let ids: Vec<u32> = loaded.tokenizer.encode(&document.text).into_iter().take(n_tokens + 1).collect();
    let mut engine = Engine::new(artifact, Options::default())?;
    let quality = compare(&loaded.model, &mut engine, &ids, &document.name)?;
    let mut artifact = engine.into_artifact();
    artifact.manifest.quality = Some(quality);
    Ok(artifact)
}

/// Int8 against float on tokens `1..` of a text, under the engine's routing.
fn compare(model: &Decoder, engine: &mut Engine, ids: &[u32], text: &str) -> Result<Quality> {
    let policy = if engine.artifact().manifest.has_gates { Policy::Gate } else { Policy::Streaming };
    let mut cache = Cache::new(&model.config, AttentionPlan::new(policy, *engine.routing()));
    let mut sequence = engine.new_sequence();
    // Without gates both keep the same keys.
    let mut replayed = engine.artifact().manifest.has_gates.then(|| engine.new_sequence());
    let (mut kl, mut agreed, mut nll, mut nll_float, mut nll_replayed, mut n) = (0.0, 0, 0.0, 0.0, 0.0, 0usize);
    let mut overlaps = Vec::new();
    let bar = progress::bar(ids.len() as u64, "tokens compared");
    for chunk in ids.chunks(CHUNK) {
        let h = model.forward_cached(chunk, &mut cache);
        let float: Tensor = model.logits(&h.reshape([chunk.len(), model.config.d_model])); // [T, V]
        let first = n;
        engine.extend_with_logits(&mut sequence, chunk, |i, int8| {
            let float = &float.f32()[i * int8.len()..(i + 1) * int8.len()];
            if let Some(&next) = ids.get(first + i + 1) {
                let (log_p, log_q) = (log_softmax(float), log_softmax(int8));
                kl += log_p.iter().zip(&log_q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                agreed += usize::from(best(float) == best(int8));
                nll_float -= log_p[next as usize];
                nll -= log_q[next as usize];
            }
        })?;
        if let Some(sequence) = &mut replayed {
            (0..model.config.n_layers).for_each(|layer| sequence.replay_scores(layer, cache.last_scores(layer)));
            engine.extend_with_logits(sequence, chunk, |i, int8| {
                if let Some(&next) = ids.get(first + i + 1) {
                    nll_replayed -= log_softmax(int8)[next as usize];
                }
            })?;
        }
        let heads = (0..model.config.n_layers).flat_map(|layer| (0..model.config.n_kv_heads).map(move |head| (layer, head)));
        overlaps.extend(heads.filter_map(|(layer, head)| {
            let (a, b) = (cache.kept_positions(layer, head)?, sequence.kept_positions(layer, head));
            let both = a.iter().filter(|p| b.binary_search(p).is_ok()).count();
            Some(both as f64 / (a.len() + b.len() - both) as f64)
        }));
        n += chunk.len();
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let scored = (n - 1).max(1) as f64;
    Ok(Quality {
        text: text.into(),
        tokens: n - 1,
        kl: kl / scored,
        top1_agreement: agreed as f64 / scored,
        nll_difference: (nll - nll_float) / scored,
        routing_overlap: overlaps.iter().sum::<f64>() / overlaps.len().max(1) as f64,
        nll_difference_replayed: replayed.map(|_| (nll_replayed - nll_float) / scored),
    })
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&l| (l as f64 - largest).exp()).sum();
    logits.iter().map(|&l| l as f64 - largest - sum.ln()).collect()
}

fn best(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a })
}

/// Name and digest of what a model was read from.
pub(crate) fn provenance(loaded: &Loaded, gates: Option<&Path>) -> Result<Provenance> {
    let path = &loaded.checkpoint.path;
    let digest = |path: &Path| sluice_engine::artifact::file_digest(path).with_context(|| format!("cannot read {}", path.display()));
    Ok(Provenance {
        model: path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        model_sha256: path.is_file().then(|| digest(path)).transpose()?,
        gates_sha256: gates.filter(|path| path.is_file()).map(digest).transpose()?,
        made_by: format!("sluice {}", env!("CARGO_PKG_VERSION")),
    })
}
