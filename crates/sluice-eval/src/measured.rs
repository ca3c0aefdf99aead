//! Comparisons that were already made, on disk: a long evaluation that is cut off continues where it was.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use sluice_autograd::Param;
use sluice_model::decoder::is_gate;
use sluice_model::{Decoder, Policy};
use sluice_spec::RoutingConfig;
use sluice_tensor::{DType, Device};

use crate::quality::Compared;

/// A folder of comparisons of one model. Each is a file named after everything that decides its numbers: weights (gates only
/// where they decide), tokens, policy, budget and a GPU's precision. Deleting the folder costs time and nothing else.
pub struct Measured {
    folder: PathBuf,
    base: Sha256,
    with_gates: Sha256,
}

impl Measured {
    /// Keep comparisons of `model` in `folder`, which is made with the first of them.
    pub fn new(folder: impl Into<PathBuf>, model: &Decoder) -> Self {
        let mut base = Sha256::new();
        base.update(env!("CARGO_PKG_VERSION"));
        base.update(format!("{:?}", model.config));
        // A GPU rounds factors in its own way.
        if let Some(gpu) = model.device().gpu() {
            base.update(gpu.precision().name());
        }
        let (gates, rest): (Vec<_>, Vec<_>) = model.params().into_iter().partition(|param| is_gate(&param.name));
        rest.into_iter().for_each(|param| add(&mut base, param));
        let mut with_gates = base.clone();
        gates.into_iter().for_each(|param| add(&mut with_gates, param));
        Self { folder: folder.into(), base, with_gates }
    }

    /// The comparison of tokens `from..` under a policy: read if it was made before, else made and saved.
    pub fn or_make(
        &self,
        tokens: &[u32],
        policy: Policy,
        routing: &RoutingConfig,
        from: usize,
        make: impl FnOnce() -> Compared,
    ) -> Result<Compared> {
        let mut digest = if policy == Policy::Gate { self.with_gates.clone() } else { self.base.clone() };
        digest.update(format!("{} {routing:?} {from}", policy.name()));
        digest.update(bytemuck::cast_slice(tokens));
        let name: String = digest.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.folder.join(name + ".f32");
        if let Some(compared) = fs::read(&path).ok().and_then(|bytes| Compared::from_bytes(&bytes, tokens.len().saturating_sub(from))) {
            return Ok(compared);
        }
        let compared = make();
        let save = || -> std::io::Result<()> {
            fs::create_dir_all(&self.folder)?;
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(&compared.to_bytes())?;
            file.persist(&path)?;
            Ok(())
        };
        save().with_context(|| format!("cannot save a finished measurement to {}", path.display()))?;
        Ok(compared)
    }
}

fn add(digest: &mut Sha256, param: &Param) {
    digest.update(&param.name);
    let value = param.value.to(&Device::Cpu);
    match value.dtype() {
        DType::F32 => digest.update(bytemuck::cast_slice(value.f32())),
        DType::Bf16 => digest.update(bytemuck::cast_slice(value.bf16())),
    }
}

impl Compared {
    fn columns(&self) -> [&Vec<f32>; 5] {
        [&self.nll, &self.nll_dense, &self.kl, &self.agree, &self.hit]
    }

    fn to_bytes(&self) -> Vec<u8> {
        self.columns().into_iter().flatten().flat_map(|x| x.to_le_bytes()).collect()
    }

    /// `None` unless the bytes are five columns of `n` numbers.
    fn from_bytes(bytes: &[u8], n: usize) -> Option<Self> {
        if bytes.len() != 5 * 4 * n {
            return None;
        }
        let numbers: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let column = |i: usize| numbers[i * n..(i + 1) * n].to_vec();
        Some(Self { nll: column(0), nll_dense: column(1), kl: column(2), agree: column(3), hit: column(4) })
    }
}

#[cfg(test)]
mod tests {
    use sluice_spec::{Architecture, ModelConfig};
    use sluice_testkit::small_model;

    use super::*;

    fn tiny() -> Decoder {
        let config = ModelConfig {
            n_layers: 1,
            d_model: 8,
            d_ff: 8,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 4,
            vocab_size: 16,
            max_seq_len: 64,
            ..small_model(Architecture::Llama)
        };
        Decoder::random(&config, 1)
    }

    fn compared(n: usize) -> Compared {
        let column = |c: usize| (0..n).map(|i| (c * n + i) as f32).collect();
        Compared { nll: column(0), nll_dense: column(1), kl: column(2), agree: column(3), hit: column(4) }
    }

    #[test]
    fn a_comparison_is_made_once_and_again_for_other_weights_tokens_or_budgets() {
        let folder = tempfile::tempdir().unwrap();
        let mut model = tiny();
        let measured = Measured::new(folder.path().join("measured"), &model);
        let routing = RoutingConfig::default();
        let tokens = [1, 2, 3, 4];
        let first = measured.or_make(&tokens, Policy::Gate, &routing, 1, || compared(3)).unwrap();
        let again = measured.or_make(&tokens, Policy::Gate, &routing, 1, || panic!("it was made before")).unwrap();
        assert_eq!((first.kl, first.hit), (again.kl, again.hit));

        let mut made = 0;
        let mut count = |measured: &Measured, tokens: &[u32], policy, routing: &RoutingConfig, from: usize| {
            let n = tokens.len() - from;
            measured
                .or_make(tokens, policy, routing, from, || {
                    made += 1;
                    compared(n)
                })
                .unwrap();
        };
        count(&measured, &[1, 2, 3, 5], Policy::Gate, &routing, 1);
        count(&measured, &tokens, Policy::Streaming, &routing, 1);
        count(&measured, &tokens, Policy::Gate, &routing.with_kv_budget(512).unwrap(), 1);
        count(&measured, &tokens, Policy::Gate, &routing, 2);
        model.params_mut()[0].value.f32_mut()[0] += 1.0;
        count(&Measured::new(folder.path().join("measured"), &model), &tokens, Policy::Gate, &routing, 1);
        assert_eq!(made, 5);
    }

    #[test]
    fn a_file_of_another_length_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let measured = Measured::new(folder.path(), &tiny());
        let routing = RoutingConfig::default();
        measured.or_make(&[1, 2, 3], Policy::Gate, &routing, 1, || compared(2)).unwrap();
        let file = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        fs::write(&file, [0; 7]).unwrap();
        let again = measured.or_make(&[1, 2, 3], Policy::Gate, &routing, 1, || compared(2)).unwrap();
        assert_eq!(again.kl, compared(2).kl);
        assert_eq!(fs::metadata(&file).unwrap().len(), 40);
    }
}
