//! Every `.cu` source compiles for the oldest and the newest architecture that we serve, where NVRTC is installed; no GPU is needed.

use std::path::Path;

use sluice_tensor::cuda::{Compiler, KernelSource, Libraries};

#[test]
fn every_source_compiles_for_ampere_and_hopper() {
    let nvrtc = match Libraries::find(&[]).nvrtc {
        Ok(version) => version,
        Err(reason) => return eprintln!("skipped: {reason}"),
    };
    let mut sources = Vec::new();
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crates");
    for name in ["sluice-kernels", "sluice-tensor"] {
        collect(&crates.join(name).join("src"), &mut sources);
    }
    assert!(sources.len() > 5, "only {} sources found", sources.len());
    let compilers = [(8, 0), (9, 0)].map(|capability| Compiler::new(capability, None, nvrtc, None).expect("NVRTC serves it"));
    let failures: Vec<String> =
        compilers.iter().flat_map(|compiler| sources.iter().filter_map(|s| compiler.compile(s).err())).map(|e| e.to_string()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn collect(folder: &Path, sources: &mut Vec<KernelSource>) {
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, sources);
        } else if path.extension().is_some_and(|e| e == "cu") {
            let leak = |text: String| -> &'static str { Box::leak(text.into_boxed_str()) };
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let code = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let whole = with_what_it_follows(&path);
            let widths = [("Compiled with HEAD_DIM, 64 or 128.", [64, 128]), ("Compiled with HEAD_DIM, 32 or 64.", [32, 64])];
            if let Some((_, widths)) = widths.into_iter().find(|(says, _)| whole.contains(says)) {
                for head_dim in widths {
                    let whole = format!("#define HEAD_DIM {head_dim}\n{whole}");
                    sources.push(KernelSource { name: leak(format!("{name}_{head_dim}")), code: leak(whole) });
                }
            } else if code.contains("k_best.cuh, which this follows") {
                let first = path.with_file_name("k_best.cuh");
                let first = std::fs::read_to_string(&first).unwrap_or_else(|e| panic!("{}: {e}", first.display()));
                sources.push(KernelSource { name: leak(name), code: leak(format!("{first}\n{code}")) });
            } else if code.contains("act*") {
                for format in ["float", "u16"] {
                    let whole = format!("typedef {format} act;\n{code}");
                    sources.push(KernelSource { name: leak(format!("{name}_{format}")), code: leak(whole) });
                }
            } else {
                sources.push(KernelSource { name: leak(name), code: leak(whole) });
            }
        }
    }
}

/// A source behind the files that its first lines say it follows: files beside it or, with a folder, of `src`.
fn with_what_it_follows(path: &Path) -> String {
    let code = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let names = code.split_once("Follows ").map_or("", |(_, rest)| rest.split([',', ';', '\n']).next().unwrap_or_default());
    let files = names.split(" and ").filter(|name| !name.is_empty()).map(|name| {
        let name = name.trim_end_matches('.');
        if name.contains('/') { Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name) } else { path.with_file_name(name) }
    });
    let before: String = files.map(|file| with_what_it_follows(&file) + "\n").collect();
    before + &code
}
