//! The device that a command computes on, from `--device` and `--precision`; the environment says where CUDA and the cache are.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sluice_model::Policy;
use sluice_tensor::Device;
use sluice_tensor::cuda::{Gpu, Libraries, Options, Precision, list};

/// Where to compute: the options that commands with a GPU path share.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct DeviceArgs {
    /// `cpu`, `cuda`, `cuda:N`, or `auto`: the first GPU if there is a usable one
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: String,
    /// Factors of matrix products on a GPU; sums, norms, gates, losses and master weights are f32 [auto: bf16]
    #[arg(long, default_value = "auto", value_name = "FORMAT", value_parser = ["auto", "bf16", "tf32", "f32"])]
    pub(crate) precision: String,
}

impl DeviceArgs {
    /// Open the device and say what it is and how it multiplies.
    pub(crate) fn open(&self) -> Result<Device> {
        let device = open(&self.device, precision(&self.precision))?;
        if let Device::Cuda(gpu) = &device {
            eprintln!("{gpu:?}, {}: factors of matrix products in {}, everything else in f32", gpu.arch(), gpu.precision().name());
        } else {
            ensure!(
                matches!(self.precision.as_str(), "auto" | "f32"),
                "--precision {} needs a GPU; on the CPU everything is f32",
                self.precision
            );
        }
        Ok(device)
    }
}

/// Routing does not run on a GPU yet: say so before anything is computed.
pub(crate) fn require_dense(device: &Device, policy: Policy) -> Result<()> {
    ensure!(
        *device == Device::Cpu || policy == Policy::Dense,
        "policy {} does not run on a GPU yet; give --policy dense or --device cpu",
        policy.name()
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
pub(crate) fn open(name: &str, precision: Precision) -> Result<Device> {
    let ordinal = match name.split_once(':') {
        _ if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" || name == "auto" => 0,
        Some(("cuda", n)) => n.parse().with_context(|| format!("--device {name}: {n} is not the number of a GPU"))?,
        _ => anyhow::bail!("--device {name}: expected cpu, cuda, cuda:N or auto"),
    };
    if name == "auto" && list(&Libraries::find(&cuda_folders())).is_err() {
        return Ok(Device::Cpu);
    }
    let options = Options { ordinal, precision, kernel_cache: kernel_cache(), cuda_folders: cuda_folders() };
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
