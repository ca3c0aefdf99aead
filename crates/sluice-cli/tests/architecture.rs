//! The invariants of ARCHITECTURE.md that a program can check.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    // Resolved, or every path below would have `sluice-cli` among its components.
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace exists")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn crates_depend_on_each_other_as_the_document_says() {
    let document = read(&root().join("ARCHITECTURE.md"));
    let block = document.split("```edges\n").nth(1).and_then(|rest| rest.split("```").next()).expect("the edges block");
    let written: BTreeMap<String, BTreeSet<String>> = block
        .lines()
        .map(|line| {
            let (name, edges) = line.split_once(':').unwrap_or_else(|| panic!("not an edge line: {line}"));
            (name.to_string(), edges.split_whitespace().map(str::to_string).collect())
        })
        .collect();

    let cargo = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&cargo.stdout).expect("cargo metadata is JSON");
    let mut found = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let edges = package["dependencies"].as_array().expect("dependencies").iter().filter(|d| d["kind"].is_null());
        let edges = edges.filter_map(|d| d["name"].as_str()).filter(|n| n.starts_with("sluice-")).map(str::to_string);
        found.insert(package["name"].as_str().expect("a name").to_string(), edges.collect::<BTreeSet<_>>());
    }
    assert_eq!(found, written);
}

#[test]
fn unsafe_code_and_the_environment_stay_where_they_belong() {
    let mut sources = Vec::new();
    collect(&root().join("crates"), &mut sources);
    assert!(sources.len() > 50, "only {} sources found", sources.len());
    for path in sources {
        let text = read(&path);
        let of = |name: &str| path.components().any(|c| c.as_os_str() == name);
        let code: String = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        if !of("sluice-tensor") && !of("sluice-kernels") {
            let found = ["unsafe {", "unsafe fn", "unsafe impl"].iter().find(|word| code.contains(*word));
            // This file names the words it looks for.
            assert!(found.is_none() || path.ends_with("architecture.rs"), "{} contains {}", path.display(), found.unwrap_or(&""));
        }
        // Examples are programs too.
        if !of("sluice-cli") && !of("tests") && !of("examples") {
            for word in ["std::env::var", "env::vars", "env::args"] {
                assert!(!code.contains(word), "{} reads the environment: {word}", path.display());
            }
        }
    }
}

fn collect(folder: &Path, sources: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, sources);
        } else if path.extension().is_some_and(|e| e == "rs") {
            sources.push(path);
        }
    }
}
