//! The artifact loader: any manifest, beside files of the sizes that it claims, is refused or computes without a panic.
#![no_main]

use std::cell::RefCell;
use std::fs;

use libfuzzer_sys::fuzz_target;
use sluice_engine::{Artifact, Engine, Options};

/// Larger files are not written: the loader would read them, and nothing else happens.
const MAX_FILE: u64 = 1 << 18;

thread_local! {
    static FOLDER: RefCell<tempfile::TempDir> = RefCell::new(tempfile::tempdir().expect("a temporary folder"));
}

fuzz_target!(|data: &[u8]| {
    FOLDER.with_borrow(|folder| {
        let folder = folder.path();
        // What follows a zero byte fills the files.
        let (manifest, fill) = data.split_at(data.iter().position(|&b| b == 0).unwrap_or(data.len()));
        fs::write(folder.join("manifest.json"), manifest).expect("write");
        let claims: serde_json::Value = serde_json::from_slice(manifest).unwrap_or_default();
        for (name, filler) in [("weights.bin", fill), ("tokenizer.json", b"{} ".as_slice())] {
            let size = claims["files"][name]["bytes"].as_u64().unwrap_or(0).min(MAX_FILE) as usize;
            let bytes: Vec<u8> = filler.iter().chain(std::iter::once(&7)).copied().cycle().take(size).collect();
            fs::write(folder.join(name), bytes).expect("write");
        }
        let _ = Artifact::open(folder, true);
        let Ok(artifact) = Artifact::open(folder, false) else { return };
        // A large budget is a large cache, which is no fault.
        let routing = artifact.manifest.routing;
        if routing.window.max(routing.top_k).max(routing.route_every) > 1 << 10 || artifact.manifest.model.n_layers > 8 {
            return;
        }
        let Ok(mut engine) = Engine::new(artifact, Options { threads: 1, chunk: 4, ..Options::default() }) else { return };
        let mut sequence = engine.new_sequence();
        for tokens in [&[0, 0, 0, 0, 0][..], &[0]] {
            engine.extend(&mut sequence, tokens).expect("every model has a token 0");
        }
        let snapshot = sequence.snapshot();
        // Weights that make a key or value overflow f16 leave a state that is good for nothing, and is refused as that.
        if let Err(error) = engine.new_sequence().restore(&snapshot) {
            assert!(error.to_string().contains("not finite"), "its own snapshot: {error}");
        }
    });
});
