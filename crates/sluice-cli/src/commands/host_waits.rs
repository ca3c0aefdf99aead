//! Part of `sluice selftest`: a training step queues all of its work without waiting for the GPU.

use anyhow::Result;
use sluice_kernels::selftest::Outcome;
use sluice_model::Decoder;
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_tensor::Device;
use sluice_tensor::cuda::{Gpu, Precision};
use sluice_train::distill::{Distiller, Split};
use sluice_train::distill_config::DistillConfig;
use sluice_train::documents::Documents;
use sluice_train::hash::mix;
use sluice_train::pretrain::{Batch, DataConfig, Phase, Pretrainer, TrainConfig};

/// Name beside those of the ops.
pub(super) const OP: &str = "training_step";

/// Waits inside the steps of pretraining and, where the GPU routes, of each stage of distillation: none is allowed.
pub(super) fn outcomes(gpu: &std::sync::Arc<Gpu>) -> Result<Vec<Outcome>> {
    let device = Device::Cuda(gpu.clone());
    let outcome = |case: &str, waits: u64| Outcome {
        op: OP,
        case: case.into(),
        output: "waits of the host inside",
        error: waits as f64,
        allowed: 0.0,
    };
    let mut outcomes = vec![outcome("pretraining", pretraining(&device)?)];
    if gpu.precision() == Precision::Bf16 {
        let mut run = distiller(&device)?;
        while let Some(report) = run.step()? {
            if report.loss.is_some() {
                outcomes.push(outcome(report.work.name(), report.host_waits));
            }
        }
    }
    Ok(outcomes)
}

fn tokens(salt: u64, n: usize) -> Vec<u32> {
    (0..n as u64).map(|i| (mix(salt, i) % 256) as u32).collect()
}

fn pretraining(device: &Device) -> Result<u64> {
    let config = TrainConfig {
        seed: 1,
        model: model(),
        optimizer: Default::default(),
        data: DataConfig { recall_share: 0.0, answer_weight: 1.0, text: Vec::new() },
        phases: vec![Phase { steps: 2, context: 200, batch: 2, copy_share: 0.0, drill: false }],
        checkpoint: false,
    };
    let mut trainer = Pretrainer::new(config).to(device);
    let batch = Batch::of(&[200, 130].map(|n| (tokens(n as u64, n), vec![1.0; n])));
    (0..2).map(|_| Ok(trainer.step(&batch)?.host_waits)).sum()
}

/// Every stage with steps, on documents of different lengths, with batches, layers that run again and an attack.
fn distiller(device: &Device) -> Result<Distiller> {
    let mut config = DistillConfig {
        context: 1300,
        routing: RoutingConfig { window: 64, top_k: 64, route_every: 64, ..RoutingConfig::default() },
        budgets: vec![128, 256],
        documents_per_step: 3,
        ..DistillConfig::default()
    };
    (config.stage0.documents, config.stage0.readers_from) = (1, 16);
    (config.stage1.layer_local_steps, config.stage1.end_to_end_steps) = (2, 2);
    (config.stage2.gate_steps, config.stage2.all_steps, config.stage2.long_range) = (2, 2, true);
    (config.stage3.steps, config.stage3.adversarial_share) = (2, 0.5);
    let documents = Documents::new([1300, 1100, 1210, 1170].map(|n| tokens(n as u64, n)).to_vec(), 600)?;
    let mut run = Distiller::new(Decoder::random(&model(), 9).to(device), None, config, documents)?;
    run.split = Split { documents: 2, recompute: 1 };
    Ok(run)
}

fn model() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        n_layers: 2,
        d_model: 128,
        d_ff: 192,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 64,
        vocab_size: 256,
        max_seq_len: 2048,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_that_are_checked_run_in_every_stage() {
        let mut run = distiller(&Device::Cpu).unwrap();
        let mut steps = [0; 4];
        while let Some(report) = run.step().unwrap() {
            steps[usize::from(report.work.stage())] += usize::from(report.loss.is_some());
        }
        assert_eq!(steps, [0, 4, 4, 2]);
        // A CPU never waits for a GPU: what is checked here is that these steps run at all.
        pretraining(&Device::Cpu).unwrap();
    }
}
