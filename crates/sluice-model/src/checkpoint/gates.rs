//! Trained gates in a file of their own, `gates.safetensors`: three small f32 tensors a layer, with the
//! routing they were trained for and the shape of their base model in the metadata. Knows nothing about
//! how they were trained beyond a free note.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sluice_spec::{GateHeads, ModelConfig, RoutingConfig, tensor_names};
use sluice_tensor::{DType, Tensor};

use super::safetensors::{self, Safetensors};
use super::{CheckpointError, describe};

/// Name of the gate file inside an exported folder.
pub const GATES_FILE: &str = "gates.safetensors";
const FORMAT: &str = "sluice-gates";
const VERSION: &str = "1";

/// Gate of one layer. `Gs` is the number of KV heads, or 1 when they share a gate.
#[derive(Clone, Debug)]
pub struct GateTensors {
    /// `[Gs, M]`.
    pub weight: Tensor,
    /// `[Gs]`.
    pub bias: Tensor,
    /// `[Gs]`, score units per 1024 positions.
    pub recency: Tensor,
}

/// Gates of a whole model.
#[derive(Clone, Debug)]
pub struct Gates {
    /// Budget and rhythm that they were trained for.
    pub routing: RoutingConfig,
    /// One for each layer.
    pub layers: Vec<GateTensors>,
    /// Where they come from, in free words.
    pub note: String,
}

/// Number of gate scores a layer computes per token.
fn n_gate_heads(routing: &RoutingConfig, base: &ModelConfig) -> usize {
    match routing.gate_heads {
        GateHeads::KvHead => base.n_kv_heads,
        GateHeads::Shared => 1,
    }
}

/// Write gates for a base model; atomic. Gates that do not fit the base model are an error.
pub fn save_gates(path: &Path, gates: &Gates, base: &ModelConfig) -> Result<(), CheckpointError> {
    let heads = n_gate_heads(&gates.routing, base);
    if gates.layers.len() != base.n_layers {
        let expected = format!("{} for the {}", base.n_layers, describe(base));
        return Err(CheckpointError::unexpected(path, format!("gates of {} layers to write", gates.layers.len()), expected));
    }
    let named: Vec<(String, &Tensor, Vec<usize>)> = gates
        .layers
        .iter()
        .enumerate()
        .flat_map(|(layer, gate)| {
            [
                (tensor_names::gate_weight(layer), &gate.weight, vec![heads, base.d_model]),
                (tensor_names::gate_bias(layer), &gate.bias, vec![heads]),
                (tensor_names::gate_recency(layer), &gate.recency, vec![heads]),
            ]
        })
        .collect();
    for (name, tensor, shape) in &named {
        if tensor.shape() != shape.as_slice() {
            let found = format!("`{name}` of shape {:?} to write", tensor.shape());
            return Err(CheckpointError::unexpected(path, found, format!("{shape:?} for the {}", describe(base))));
        }
        check_finite(path, name, tensor)?;
    }
    let json = |value: Result<String, serde_json::Error>| value.expect("plain structs of numbers serialise");
    let metadata = BTreeMap::from([
        ("format".to_string(), FORMAT.to_string()),
        ("version".to_string(), VERSION.to_string()),
        ("routing".to_string(), json(serde_json::to_string(&gates.routing))),
        ("base".to_string(), json(serde_json::to_string(base))),
        ("note".to_string(), gates.note.clone()),
    ]);
    let tensors: Vec<(&str, &Tensor)> = named.iter().map(|(name, tensor, _)| (name.as_str(), *tensor)).collect();
    safetensors::write(path, &metadata, &tensors, DType::F32)
}

/// Read gates for a base model from a gate file, or from a folder that holds [`GATES_FILE`].
pub fn load_gates(path: &Path, base: &ModelConfig) -> Result<Gates, CheckpointError> {
    let path: PathBuf = if path.is_dir() { path.join(GATES_FILE) } else { path.to_path_buf() };
    let path = path.as_path();
    let file = Safetensors::open(path)?;
    let metadata = |key: &str| {
        let missing = || CheckpointError::unexpected(path, format!("no `{key}` in the metadata"), "a gate file written by sluice");
        file.metadata.get(key).ok_or_else(missing)
    };
    let (format, version) = (metadata("format")?, metadata("version")?);
    if format != FORMAT || version != VERSION {
        let found = format!("format {format:?}, version {version:?}");
        return Err(CheckpointError::unexpected(path, found, format!("{FORMAT:?}, version {VERSION:?}")));
    }
    let bad_json = |key: &str, e: serde_json::Error| CheckpointError::unexpected(path, format!("a bad `{key}`: {e}"), "a gate file");
    let routing: RoutingConfig = serde_json::from_str(metadata("routing")?).map_err(|e| bad_json("routing", e))?;
    routing.validate().map_err(|e| CheckpointError::config(path, e))?;
    let trained_for: ModelConfig = serde_json::from_str(metadata("base")?).map_err(|e| bad_json("base", e))?;
    // Words that name every size: equal descriptions are equal shapes.
    if describe(&trained_for) != describe(base) {
        let found = format!("gates trained for a {}", describe(&trained_for));
        return Err(CheckpointError::unexpected(path, found, format!("gates for this base model, a {}", describe(base))));
    }

    let heads = n_gate_heads(&routing, base);
    let n_expected = 3 * base.n_layers;
    if file.tensors.len() != n_expected {
        return Err(CheckpointError::unexpected(path, format!("{} tensors", file.tensors.len()), format!("{n_expected}, three a layer")));
    }
    let read = |name: String, shape: &[usize]| {
        let stored = file.stored(&name)?;
        if stored.shape != shape {
            let found = format!("`{name}` of shape {:?}", stored.shape);
            return Err(CheckpointError::unexpected(path, found, format!("{shape:?}")));
        }
        let tensor = stored.read(&file.file)?.to_dtype(DType::F32);
        check_finite(path, &name, &tensor)?;
        Ok(tensor)
    };
    let layers = (0..base.n_layers)
        .map(|layer| {
            Ok(GateTensors {
                weight: read(tensor_names::gate_weight(layer), &[heads, base.d_model])?,
                bias: read(tensor_names::gate_bias(layer), &[heads])?,
                recency: read(tensor_names::gate_recency(layer), &[heads])?,
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Gates { routing, layers, note: metadata("note").cloned().unwrap_or_default() })
}

/// Whether a file says that it holds gates; a damaged one does not.
pub(super) fn is_gate_file(path: &Path) -> bool {
    Safetensors::open(path).is_ok_and(|file| file.metadata.get("format").is_some_and(|f| f == FORMAT))
}

/// One NaN score would silently decide every routing of its head.
fn check_finite(path: &Path, name: &str, tensor: &Tensor) -> Result<(), CheckpointError> {
    let tensor = tensor.to_dtype(DType::F32);
    match tensor.f32().iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(i) => Err(CheckpointError::unexpected(path, format!("{} in `{name}` at {i}", tensor.f32()[i]), "finite gate parameters")),
    }
}
