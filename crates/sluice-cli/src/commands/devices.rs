//! `sluice devices`: what this machine can compute with.

use anyhow::Result;
use serde_json::json;

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
    if args.json {
        println!("{}", json!({"devices": [{"device": "cpu", "name": name, "threads": threads, "features": features}]}));
    } else {
        println!("cpu   {name}, {threads} threads");
        println!("      {}", if features.is_empty() { "no vector extension that Sluice uses".into() } else { features.join(" ") });
        println!("gpu   not supported in this version");
    }
    Ok(())
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
