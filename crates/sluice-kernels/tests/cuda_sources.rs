//! Every `.cu` source compiles for the oldest and the newest architecture that we serve, where NVRTC is installed; no GPU is needed.

use std::path::Path;

use sluice_kernels::selftest::SOURCES;
use sluice_tensor::cuda::{Compiler, Libraries};

#[test]
fn every_source_compiles_for_ampere_and_hopper() {
    let nvrtc = match Libraries::find(&[]).nvrtc {
        Ok(version) => version,
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    let n_files = count(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(SOURCES.len() >= n_files, "{n_files} files of kernels but {} sources in the list", SOURCES.len());
    let compilers = [(8, 0), (9, 0)].map(|capability| Compiler::new(capability, None, nvrtc, None).expect("NVRTC serves it"));
    let failures: Vec<String> =
        compilers.iter().flat_map(|compiler| SOURCES.iter().filter_map(|s| compiler.compile(s).err())).map(|e| e.to_string()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn count(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let of = |path: std::path::PathBuf| if path.is_dir() { count(&path) } else { usize::from(path.extension().is_some_and(|e| e == "cu")) };
    entries.map(|entry| of(entry.expect("an entry").path())).sum()
}
