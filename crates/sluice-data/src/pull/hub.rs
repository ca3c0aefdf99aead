//! Models of the Hugging Face hub, for networks that reach it. `HF_ENDPOINT` names a mirror; a token saved by
//! `huggingface-cli login` is used.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};

use super::{Progress, PullError, sha256_of};

/// `ORG/NAME`, perhaps with the path of one file.
#[derive(Debug, PartialEq)]
pub(super) struct Repository {
    id: String,
    file: Option<String>,
}

impl Repository {
    /// None unless `name` is `ORG/NAME` or `ORG/NAME/FILE.gguf`.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split('/').collect();
        let plain = |part: &&str| {
            !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c))
        };
        if parts.len() < 2 || !parts.iter().all(plain) || (parts.len() > 2 && !name.ends_with(".gguf")) {
            return None;
        }
        let file = (parts.len() > 2).then(|| parts[2..].join("/"));
        Some(Self { id: parts[..2].join("/"), file })
    }
}

/// Small files that belong to a checkpoint.
const COMPANIONS: [&str; 5] =
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"];

/// `endpoint` replaces the hub in tests.
pub(super) fn pull(
    repository: &Repository,
    dir: &Path,
    endpoint: Option<String>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, PullError> {
    let folder = dir.join(&repository.id);
    let cache = folder.join(".hub");
    fs::create_dir_all(&cache).map_err(|e| PullError::io(&cache, 0, e))?;
    // The client links files by relative paths and wants absolute ones for that.
    let cache = cache.canonicalize().map_err(|e| PullError::io(&cache, 0, e))?;
    let refused = |what: &str, e: ApiError| PullError::Download { what: what.into(), reason: explain(&e) };

    let mut builder = ApiBuilder::from_env().with_cache_dir(cache.clone()).with_progress(false).with_retries(3);
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    let api = builder.build().map_err(|e| refused(&repository.id, e))?;
    let repo = api.model(repository.id.clone());
    let files = match &repository.file {
        Some(file) => vec![file.clone()],
        None => {
            let info = repo.info().map_err(|e| refused(&repository.id, e))?;
            wanted(&repository.id, info.siblings.into_iter().map(|s| s.rfilename).collect())?
        }
    };
    for file in &files {
        let metadata = api.metadata(&repo.url(file)).map_err(|e| refused(file, e))?;
        let promise = Promise { size: metadata.size() as u64, etag: metadata.etag().to_string() };
        fetch(&repo, file, &promise, &folder, progress)?;
    }
    fs::remove_dir_all(&cache).map_err(|e| PullError::io(&cache, 0, e))?;
    Ok(folder)
}

/// The files of a checkpoint among all files of a repository.
fn wanted(id: &str, all: Vec<String>) -> Result<Vec<String>, PullError> {
    let (mut files, mut ggufs) = (Vec::new(), Vec::new());
    for name in all {
        // Folders hold other formats and the originals of the same weights.
        let top_level = !name.contains(['/', '\\']) && !name.starts_with('.');
        if name.ends_with(".gguf") {
            ggufs.push(name);
        } else if top_level && (COMPANIONS.contains(&name.as_str()) || name.ends_with(".safetensors")) {
            files.push(name);
        }
    }
    if files.iter().any(|name| name.ends_with(".safetensors")) {
        return Ok(files);
    }
    let reason = match ggufs.as_slice() {
        [] => "it has neither safetensors nor GGUF files".to_string(),
        many => format!(
            "it has no safetensors, but GGUF files; name one: {}",
            many.iter().map(|f| format!("{id}/{f}")).collect::<Vec<_>>().join(", ")
        ),
    };
    Err(PullError::Download { what: id.into(), reason })
}

/// What the hub says about a file before sending it.
struct Promise {
    size: u64,
    /// SHA-256 for large files, a git object id for small ones.
    etag: String,
}

impl Promise {
    /// None when the file keeps it; what was found and expected when not.
    fn broken_by(&self, path: &Path) -> std::io::Result<Option<(String, String)>> {
        let size = fs::metadata(path)?.len();
        if size != self.size {
            return Ok(Some((format!("{size} bytes"), format!("{} bytes", self.size))));
        }
        let has_hash = self.etag.len() == 64 && self.etag.chars().all(|c| c.is_ascii_hexdigit());
        let found = if has_hash { sha256_of(path, |_| {})? } else { None };
        Ok(found.filter(|found| *found != self.etag).map(|found| (format!("SHA-256 {found}"), format!("SHA-256 {}", self.etag))))
    }
}

fn fetch(repo: &ApiRepo, file: &str, promise: &Promise, folder: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<(), PullError> {
    let target = folder.join(file);
    let fail = |path: &Path, e| PullError::io(path, promise.size, e);
    if target.exists() && promise.broken_by(&target).map_err(|e| fail(&target, e))?.is_none() {
        return Ok(());
    }
    let reporter = Reporter { file, done: 0, total: promise.size, progress };
    let link = repo.download_with_progress(file, reporter).map_err(|e| match e {
        ApiError::IoError(e) => fail(&target, e),
        e => PullError::Download { what: file.into(), reason: explain(&e) },
    })?;
    let blob = link.canonicalize().map_err(|e| fail(&link, e))?;
    if let Some((found, expected)) = promise.broken_by(&blob).map_err(|e| fail(&blob, e))? {
        fs::remove_file(&blob).map_err(|e| fail(&blob, e))?;
        return Err(PullError::Wrong { path: target, found, expected });
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(|e| fail(parent, e))?;
    }
    fs::rename(&blob, &target).map_err(|e| fail(&target, e))
}

struct Reporter<'a, 'b> {
    file: &'a str,
    done: u64,
    total: u64,
    progress: &'b mut dyn FnMut(Progress<'_>),
}

impl hf_hub::api::Progress for Reporter<'_, '_> {
    fn init(&mut self, size: usize, _filename: &str) {
        // Called again after an interruption, followed by an update with what is there already.
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.progress)(Progress { what: self.file, done: self.done, total: self.total });
    }

    fn finish(&mut self) {}
}

fn explain(error: &ApiError) -> String {
    let said = error.to_string();
    let advice = if said.contains("401") || said.contains("403") {
        "; the repository is gated or private: accept its terms, then `huggingface-cli login`"
    } else if said.contains("404") {
        "; check the spelling of ORG/NAME and of the file"
    } else if said.contains("status code") {
        ""
    } else {
        "; is the hub reachable from this network? HF_ENDPOINT names a mirror"
    };
    said + advice
}

#[cfg(test)]
mod tests;
