//! `sluice devices`: what this machine can compute with.

use anyhow::Result;
use serde_json::{Value, json};
use sluice_tensor::cuda::{Gpu, GpuInfo, Libraries, Options, Version, list};

use crate::device;
use crate::progress::bytes;

/// Arguments of `sluice devices`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let name = cpu_name();
    let threads = rayon::current_num_threads();
    let features = cpu_features();
    let libraries = Libraries::find(&device::cuda_folders());
    let gpus = list(&libraries);
    let listed = gpus.as_deref().unwrap_or_default();
    // Listing a GPU does not yet mean that it can compute: open it, as a command would.
    let usable: Vec<Result<String, String>> = listed.iter().map(|gpu| usable(gpu.ordinal)).collect();
    let named = [("driver", &libraries.driver), ("nvrtc", &libraries.nvrtc), ("cublaslt", &libraries.cublaslt), ("nccl", &libraries.nccl)];
    if args.json {
        let mut devices = vec![json!({"device": "cpu", "name": name, "threads": threads, "features": features})];
        devices.extend(listed.iter().zip(&usable).map(|(gpu, usable)| gpu_json(gpu, usable)));
        let found = |v: &Result<Version, String>| match v {
            Ok(version) => json!({"version": version.to_string()}),
            Err(reason) => json!({"missing": reason}),
        };
        let libraries: serde_json::Map<String, Value> = named.iter().map(|(name, v)| (name.to_string(), found(v))).collect();
        let no_gpu = gpus.as_ref().err().map(ToString::to_string);
        println!("{}", json!({"devices": devices, "cuda": libraries, "no_gpu": no_gpu}));
        return Ok(());
    }
    println!("cpu       {name}, {threads} threads");
    println!("          {}", if features.is_empty() { "no vector extension that Sluice uses".into() } else { features.join(" ") });
    match &gpus {
        Err(reason) => println!("gpu       none: {reason}"),
        Ok(gpus) => {
            for (gpu, usable) in gpus.iter().zip(&usable) {
                println!("cuda:{}    {}, {}, {} multiprocessors", gpu.ordinal, gpu.name, bytes(gpu.memory as u64), gpu.multiprocessors);
                match usable {
                    Ok(arch) => println!("          ready, kernels for {arch}"),
                    Err(reason) => println!("          cannot compute: {reason}"),
                }
            }
        }
    }
    for (name, found) in named {
        match found {
            Ok(version) => println!("{name:<9} {version}"),
            Err(reason) => println!("{name:<9} missing: {reason}"),
        }
    }
    Ok(())
}

/// Architecture that kernels are compiled for, or why this GPU cannot be used.
fn usable(ordinal: usize) -> Result<String, String> {
    let options = Options { ordinal, kernel_cache: device::kernel_cache(), cuda_folders: device::cuda_folders(), ..Options::default() };
    Gpu::open(&options).map(|gpu| gpu.arch().to_string()).map_err(|error| error.to_string())
}

fn gpu_json(gpu: &GpuInfo, usable: &Result<String, String>) -> Value {
    let (major, minor) = gpu.capability;
    json!({"device": format!("cuda:{}", gpu.ordinal), "name": gpu.name, "memory_bytes": gpu.memory, "multiprocessors": gpu.multiprocessors,
        "capability": format!("{major}.{minor}"), "arch": usable.as_ref().ok(), "cannot_compute": usable.as_ref().err()})
}

/// Marketing name of the processor, as the operating system tells it.
pub(crate) fn cpu_name() -> String {
    let from_proc = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    });
    from_proc.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ]
    .into_iter()
    .filter_map(|(name, found)| found.then_some(name))
    .collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> Vec<&'static str> {
    if cfg!(target_arch = "aarch64") { vec!["neon"] } else { Vec::new() }
}
