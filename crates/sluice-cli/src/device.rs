//! The device that a command computes on, from `--device` and `--precision`; the environment says where CUDA and the cache are.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sluice_model::Policy;
use sluice_spec::ModelConfig;
use sluice_tensor::cuda::{Gpu, Libraries, Options, Precision, list};
use sluice_tensor::{DType, Device};

use crate::commands::devices::cpu_name;
use crate::progress;

/// Where to compute: the options that commands with a GPU path share.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct DeviceArgs {
    /// `cpu`, `cuda`, `cuda:N`, or `auto`: the first GPU if there is a usable one
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: String,
    /// Factors of matrix products on a GPU, with bf16 activations too; sums, norms, gates, losses and master weights are f32 [auto: bf16]
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = ["auto", "bf16", "tf32", "f32"])]
    pub(crate) precision: String,
    /// Try the algorithms that a GPU's library proposes for every large matrix product when its sizes first come, and keep the fastest with the same bits: for runs
    /// whose sizes repeat
    #[arg(long)]
    pub(crate) tune: bool,
}

impl DeviceArgs {
    /// Open the device and say what it is and how it multiplies.
    pub(crate) fn open(&self) -> Result<Device> {
        let device = open(&self.device, precision(&self.precision), self.tune)?;
        if let Device::Cuda(gpu) = &device {
            let precision = gpu.precision();
            let activations = if precision.activations() == DType::Bf16 { " and activations" } else { "" };
            eprintln!("{gpu:?}, {}: factors of matrix products{activations} in {}, everything else in f32", gpu.arch(), precision.name());
        } else {
            ensure!(!self.tune, "--tune needs a GPU");
            ensure!(
                matches!(self.precision.as_str(), "auto" | "f32"),
                "--precision {} needs a GPU; on the CPU everything is f32",
                self.precision
            );
        }
        Ok(device)
    }
}

/// What a training step may hold: the option of commands that train.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct MemoryArgs {
    /// Most that a training step may hold, for instance 24GiB: as many layers run again in the backward pass as it takes, then fewer documents
    /// go together [on a GPU: nine tenths of what is free there; on the CPU: as the settings say]
    #[arg(long, value_name = "SIZE", value_parser = progress::parse_bytes)]
    memory: Option<u64>,
}

impl MemoryArgs {
    /// Bytes that a training step may hold, the model included; none if nobody sets a limit.
    pub(crate) fn budget(self, device: &Device) -> Result<Option<u64>> {
        let Some(gpu) = device.gpu().filter(|_| self.memory.is_none()) else { return Ok(self.memory) };
        let held = gpu.held()?;
        // The rest is for what no count knows: kernels' code, workspaces, gaps between blocks.
        Ok(Some((held.total - held.others) as u64 / 10 * 9))
    }
}

/// Name of a device and of the format of its products' factors, for reports.
pub(crate) fn name_and_precision(device: &Device) -> (String, &'static str) {
    device.gpu().map_or_else(|| (cpu_name(), "f32"), |gpu| (gpu.name().to_string(), gpu.precision().name()))
}

/// Say before anything is computed what the routed attention of a GPU does not serve.
pub(crate) fn require_routable(device: &Device, model: &ModelConfig, policy: Policy) -> Result<()> {
    let Some(gpu) = device.gpu().filter(|_| policy != Policy::Dense) else { return Ok(()) };
    ensure!(
        gpu.precision() == Precision::Bf16,
        "policy {} on a GPU multiplies in bf16 only, found --precision {}; leave the option out, or give --device cpu for f32",
        policy.name(),
        gpu.precision().name()
    );
    ensure!(
        matches!(model.head_dim, 64 | 128),
        "policy {} on a GPU serves heads of 64 and 128, and this model has heads of {}; give --policy dense or --device cpu",
        policy.name(),
        model.head_dim
    );
    Ok(())
}

/// The format that `--precision` names.
pub(crate) fn precision(name: &str) -> Precision {
    match name {
        "f32" => Precision::F32,
        "tf32" => Precision::Tf32,
        _ => Precision::Bf16,
    }
}

/// Open a device by the name that a user gives.
fn open(name: &str, precision: Precision, tune: bool) -> Result<Device> {
    let ordinal = match name.split_once(':') {
        _ if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" || name == "auto" => 0,
        Some(("cuda", n)) => n.parse().with_context(|| format!("--device {name}: {n} is not the number of a GPU"))?,
        _ => anyhow::bail!("--device {name}: expected cpu, cuda, cuda:N or auto"),
    };
    if name == "auto" && list(&Libraries::find(&cuda_folders())).is_err() {
        return Ok(Device::Cpu);
    }
    let options = Options { ordinal, precision, kernel_cache: kernel_cache(), tune, cuda_folders: cuda_folders() };
    let gpu = Gpu::open(&options).with_context(|| format!("--device {name}; `sluice devices` lists what this machine has"))?;
    Ok(Device::Cuda(gpu))
}

/// Folders of CUDA installations in which libraries are looked for.
pub(crate) fn cuda_folders() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    named.chain([PathBuf::from("/usr/local/cuda")]).filter(|folder| folder.is_dir()).collect()
}

/// Folder for compiled kernels: the user's cache, as the XDG convention has it.
pub(crate) fn kernel_cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(cache.join("sluice").join("kernels"))
}
