//! State of a run on disk: named tensors and a JSON header in one safetensors file, written aside, synced and
//! renamed, so that a kill at any moment leaves either the old state or the new one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_tensor::{Device, Tensor};

use crate::optimizer::Optimizer;

const HEADER: &str = "sluice.state";

/// Tensors of a run, by kind and name.
#[derive(Default)]
pub struct State {
    /// f32 tensors: parameters and moments.
    pub tensors: BTreeMap<String, Tensor>,
    /// f64 sums that must not lose bits.
    pub sums: BTreeMap<String, Vec<f64>>,
}

impl State {
    /// Add an optimizer's moments.
    pub fn insert_optimizer(&mut self, optimizer: &Optimizer) {
        for (kind, moments) in [("m", &optimizer.m), ("v", &optimizer.v)] {
            for (name, tensor) in moments {
                self.tensors.insert(format!("adamw.{kind}.{name}"), tensor.to(&Device::Cpu));
            }
        }
    }

    /// Take an optimizer's moments out again, in main memory.
    pub fn take_optimizer(&mut self, step: u64) -> Optimizer {
        let mut optimizer = Optimizer { step, ..Default::default() };
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            if let Some(name) = name.strip_prefix("adamw.m.") {
                optimizer.m.insert(name.to_string(), tensor);
            } else if let Some(name) = name.strip_prefix("adamw.v.") {
                optimizer.v.insert(name.to_string(), tensor);
            } else {
                self.tensors.insert(name, tensor);
            }
        }
        optimizer
    }
}

/// Write bytes so that a reader sees the old file or the new one, never a part.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create the folder {}", folder.display()))?;
    let aside = path.with_extension(format!("{}.part", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&aside);
        anyhow::Error::new(e).context(format!("cannot write {}; the previous file, if any, is untouched", path.display()))
    })
}

/// Save a state with a header.
pub fn save<H: Serialize>(path: &Path, header: &H, state: &State) -> Result<()> {
    let header = serde_json::to_string(header)?;
    let mut views = Vec::new();
    for (name, tensor) in &state.tensors {
        let bytes = bytemuck::cast_slice(tensor.f32());
        views.push((name.as_str(), TensorView::new(Dtype::F32, tensor.shape().to_vec(), bytes)?));
    }
    for (name, sums) in &state.sums {
        views.push((name.as_str(), TensorView::new(Dtype::F64, vec![sums.len()], bytemuck::cast_slice(sums))?));
    }
    let metadata = std::collections::HashMap::from([(HEADER.to_string(), header)]);
    write_atomically(path, &safetensors::serialize(views, Some(metadata))?)
}

/// Load a state; `None` when there is no such file.
pub fn load<H: DeserializeOwned>(path: &Path) -> Result<Option<(H, State)>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let damaged = || format!("{} is not a state that this program wrote; remove it to start anew", path.display());
    let (_, metadata) = SafeTensors::read_metadata(&bytes).with_context(damaged)?;
    let Some(header) = metadata.metadata().as_ref().and_then(|m| m.get(HEADER)) else { bail!(damaged()) };
    let header = serde_json::from_str(header).with_context(damaged)?;
    let mut state = State::default();
    for (name, view) in SafeTensors::deserialize(&bytes).with_context(damaged)?.tensors() {
        match view.dtype() {
            Dtype::F32 => {
                let data = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                state.tensors.insert(name, Tensor::from_vec(data, view.shape()));
            }
            Dtype::F64 => {
                let read = |b: &[u8]| f64::from_le_bytes(b.try_into().expect("eight bytes"));
                state.sums.insert(name, view.data().chunks_exact(8).map(read).collect());
            }
            other => bail!("{}: tensor {name} has format {other:?}; expected F32 or F64", path.display()),
        }
    }
    Ok(Some((header, state)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        assert!(load::<u64>(&path).unwrap().is_none());
        let mut state = State::default();
        state.tensors.insert("w".into(), Tensor::from_vec(vec![1.5, f32::MIN_POSITIVE, -0.0], [3]));
        state.sums.insert("xx".into(), vec![1.0 + f64::EPSILON, -2.0]);
        let mut optimizer = Optimizer { step: 7, ..Default::default() };
        optimizer.m.insert("w".into(), Tensor::full(0.25, [3]));
        state.insert_optimizer(&optimizer);
        save(&path, &42u64, &state).unwrap();
        let (header, mut again) = load::<u64>(&path).unwrap().unwrap();
        let optimizer_again = again.take_optimizer(7);
        assert_eq!(header, 42);
        assert_eq!(again.sums, state.sums);
        assert_eq!(again.tensors["w"].f32(), state.tensors["w"].f32());
        assert_eq!(optimizer_again.m["w"].f32(), &[0.25; 3]);
        assert_eq!(again.tensors.len(), 1);
    }

    #[test]
    fn a_cut_off_state_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        save(&path, &1u64, &State::default()).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = format!("{:#}", load::<u64>(&path).err().unwrap());
        assert!(error.contains("state.safetensors"), "{error}");
    }
}
