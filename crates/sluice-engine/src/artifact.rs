//! Artifact folders in and out. What is read is complete and has the right sizes, or it is an error that names the
//! file, what was found and what was expected; what is written appears whole or not at all.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use sha2::{Digest, Sha256};
use sluice_kernels::int8_linear::{self, Layout, PackError, PackedMatrix};
use sluice_spec::artifact::{
    self, ALIGNMENT, FileEntry, MANIFEST_FILE, Manifest, Provenance, TOKENIZER_FILE, TensorEntry, TensorKind, WEIGHTS_FILE,
};
use sluice_spec::{ConfigError, ModelConfig, RoutingConfig, TextConfig};

/// A manifest larger than this is not one.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// A tokenizer larger than this is not one.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// An artifact in memory.
pub struct Artifact {
    /// Everything but the numbers and the tokenizer.
    pub manifest: Manifest,
    /// Text of a Hugging Face `tokenizer.json`.
    pub tokenizer: String,
    weights: AlignedBytes,
}

/// An artifact that cannot be read, made or written.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: found {found}; expected {expected}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be there.
        expected: String,
    },
    /// The manifest cannot be used.
    #[error("{}: {source}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// A tensor that was given for a new artifact does not fit the model.
    #[error("tensor `{name}`: found {found}; expected {expected}")]
    Tensor {
        /// Its name.
        name: String,
        /// What was given.
        found: String,
        /// What the model has.
        expected: String,
    },
    /// A weight that int8 cannot hold.
    #[error("tensor `{name}`: {source}")]
    Weight {
        /// The tensor.
        name: String,
        /// Which weight.
        source: PackError,
    },
}

impl ArtifactError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_path_buf(), source }
    }

    fn unexpected(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Unexpected { path: path.to_path_buf(), found: found.into(), expected: expected.into() }
    }
}

impl Artifact {
    /// Whether a path is the folder of an artifact.
    pub fn is_at(path: &Path) -> bool {
        path.join(MANIFEST_FILE).is_file()
    }

    /// Read an artifact folder. Sizes are always checked; `verify` reads every byte again and checks the digests.
    pub fn open(folder: &Path, verify: bool) -> Result<Self, ArtifactError> {
        let manifest = read_manifest(folder)?;
        for (name, entry) in &manifest.files {
            let path = folder.join(name);
            let found = fs::metadata(&path).map_err(ArtifactError::io("open", &path))?.len();
            if found != entry.bytes {
                return Err(ArtifactError::unexpected(
                    &path,
                    format!("{found} bytes"),
                    format!("{} bytes, as the manifest says", entry.bytes),
                ));
            }
        }
        let weights_path = folder.join(WEIGHTS_FILE);
        let weights_len = manifest.files[WEIGHTS_FILE].bytes;
        for (name, entry) in &manifest.tensors {
            let end = entry.offset.checked_add(byte_len(entry.kind, manifest.group) as u64);
            if !entry.offset.is_multiple_of(ALIGNMENT as u64) || end.is_none_or(|end| end > weights_len) {
                let found = format!("tensor `{name}` at byte {}", entry.offset);
                let expected = format!("a multiple of {ALIGNMENT} from which it fits into {weights_len} bytes");
                return Err(ArtifactError::unexpected(&weights_path, found, expected));
            }
        }
        let mut weights = AlignedBytes::zeros(weights_len as usize).map_err(ArtifactError::io("make room for", &weights_path))?;
        let mut file = File::open(&weights_path).map_err(ArtifactError::io("open", &weights_path))?;
        file.read_exact(weights.bytes_mut()).map_err(ArtifactError::io("read", &weights_path))?;
        let tokenizer_path = folder.join(TOKENIZER_FILE);
        let tokenizer = read_text(&tokenizer_path, MAX_TOKENIZER_BYTES)?;
        if verify {
            check_digest(&weights_path, weights.bytes(), &manifest.files[WEIGHTS_FILE])?;
            check_digest(&tokenizer_path, tokenizer.as_bytes(), &manifest.files[TOKENIZER_FILE])?;
        }
        Ok(Self { manifest, tokenizer, weights })
    }

    /// Write the artifact as a new folder: under another name beside it first, then synced and renamed.
    pub fn write(&self, folder: &Path) -> Result<(), ArtifactError> {
        if folder.exists() {
            return Err(ArtifactError::unexpected(
                folder,
                "something that exists already",
                "a new folder; remove it or choose another name",
            ));
        }
        let Some(name) = folder.file_name() else {
            return Err(ArtifactError::unexpected(folder, "a path without a name", "the name of a new folder"));
        };
        let parent = folder.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(ArtifactError::io("create", parent))?;
        let mut aside_name = std::ffi::OsString::from(".");
        aside_name.push(name);
        aside_name.push(format!(".{}.partial", std::process::id()));
        let aside = parent.join(aside_name);
        let result = self.write_aside(&aside).and_then(|()| {
            fs::rename(&aside, folder).map_err(ArtifactError::io("rename", folder))?;
            sync_folder(parent)
        });
        if result.is_err() {
            // Best effort: the error that matters is the first one.
            let _ = fs::remove_dir_all(&aside);
        }
        result
    }

    fn write_aside(&self, aside: &Path) -> Result<(), ArtifactError> {
        let manifest = serde_json::to_string_pretty(&self.manifest).expect("a manifest is plain data");
        fs::create_dir(aside).map_err(ArtifactError::io("create", aside))?;
        let files =
            [(WEIGHTS_FILE, self.weights.bytes()), (TOKENIZER_FILE, self.tokenizer.as_bytes()), (MANIFEST_FILE, manifest.as_bytes())];
        for (name, bytes) in files {
            let path = aside.join(name);
            let write = || {
                let mut file = File::create(&path)?;
                file.write_all(bytes)?;
                file.sync_all()
            };
            write().map_err(ArtifactError::io("write", &path))?;
        }
        sync_folder(aside)
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes().len()
    }

    /// All weights as words.
    pub(crate) fn weight_words(&self) -> &[u64] {
        bytemuck::cast_slice(&self.weights.bytes()[..self.weight_bytes() / 8 * 8])
    }

    /// Where an int8 tensor lies; its presence and size were checked.
    pub(crate) fn int8_place(&self, name: &str) -> Int8Place {
        match self.manifest.tensors[name] {
            TensorEntry { kind: TensorKind::Int8 { rows, cols }, offset } => {
                Int8Place { layout: Layout::new(rows, cols, self.manifest.group), offset: offset as usize }
            }
            TensorEntry { kind, .. } => panic!("tensor `{name}` is {kind:?}, not int8"),
        }
    }

    /// Where an f32 tensor lies; its presence and size were checked.
    pub(crate) fn float_place(&self, name: &str) -> FloatPlace {
        match self.manifest.tensors[name] {
            TensorEntry { kind: TensorKind::F32 { len }, offset } => FloatPlace { len, offset: offset as usize },
            TensorEntry { kind, .. } => panic!("tensor `{name}` is {kind:?}, not f32"),
        }
    }

    /// An int8 tensor as the kernels read it.
    pub(crate) fn matrix(&self, place: Int8Place) -> PackedMatrix<'_> {
        let Int8Place { layout, offset } = place;
        let (values, scales) = self.weights.bytes()[offset..].split_at(layout.n_values());
        PackedMatrix::new(layout, values, bytemuck::cast_slice(&scales[..2 * layout.n_scales()]))
    }

    /// The numbers of an f32 tensor.
    pub(crate) fn floats(&self, place: FloatPlace) -> &[f32] {
        bytemuck::cast_slice(&self.weights.bytes()[place.offset..][..4 * place.len])
    }
}

/// Place of an int8 tensor in the weights.
#[derive(Clone, Copy)]
pub(crate) struct Int8Place {
    layout: Layout,
    offset: usize,
}

/// Place of an f32 tensor in the weights.
#[derive(Clone, Copy)]
pub(crate) struct FloatPlace {
    len: usize,
    offset: usize,
}

/// Read and check the manifest of a folder.
pub fn read_manifest(folder: &Path) -> Result<Manifest, ArtifactError> {
    let path = folder.join(MANIFEST_FILE);
    let text = read_text(&path, MAX_MANIFEST_BYTES)?;
    let manifest = Manifest::from_json(&text).map_err(|source| ArtifactError::Manifest { path: path.clone(), source })?;
    if !int8_linear::GROUPS.contains(&manifest.group) {
        return Err(ArtifactError::unexpected(&path, format!("groups of {}", manifest.group), format!("one of {:?}", int8_linear::GROUPS)));
    }
    Ok(manifest)
}

fn read_text(path: &Path, limit: u64) -> Result<String, ArtifactError> {
    let len = fs::metadata(path).map_err(ArtifactError::io("open", path))?.len();
    if len > limit {
        return Err(ArtifactError::unexpected(path, format!("{len} bytes of text"), format!("at most {limit}")));
    }
    let bytes = fs::read(path).map_err(ArtifactError::io("read", path))?;
    String::from_utf8(bytes).map_err(|e| {
        let found = format!("a byte at {} that is not UTF-8", e.utf8_error().valid_up_to());
        ArtifactError::unexpected(path, found, "UTF-8 text")
    })
}

fn check_digest(path: &Path, bytes: &[u8], entry: &FileEntry) -> Result<(), ArtifactError> {
    let found = digest(bytes);
    if found == entry.sha256 {
        return Ok(());
    }
    Err(ArtifactError::unexpected(path, format!("content with SHA-256 {found}"), format!("{}, as the manifest says", entry.sha256)))
}

/// SHA-256 of a file in hexadecimal, read in pieces.
pub fn file_digest(path: &Path) -> io::Result<String> {
    let (mut file, mut hasher, mut piece) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&piece[..n]),
        }
    }
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> Result<(), ArtifactError> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(ArtifactError::io("sync", folder))
}

#[cfg(not(unix))]
fn sync_folder(_folder: &Path) -> Result<(), ArtifactError> {
    Ok(())
}

/// Bytes of a tensor in the weights file.
fn byte_len(kind: TensorKind, group: usize) -> usize {
    match kind {
        TensorKind::F32 { len } => 4 * len,
        TensorKind::Int8 { rows, cols } => {
            let layout = Layout::new(rows, cols, group);
            layout.n_values() + 2 * layout.n_scales()
        }
    }
}

/// Collects the tensors of a model into a new artifact.
pub struct ArtifactBuilder {
    manifest: Manifest,
    tokenizer: String,
    weights: AlignedBytes,
    missing: BTreeMap<String, TensorKind>,
}

impl ArtifactBuilder {
    /// Reserve room for every tensor of a model. Panics for a group that the kernels do not have.
    #[track_caller]
    pub fn new(
        model: ModelConfig,
        routing: RoutingConfig,
        has_gates: bool,
        group: usize,
        text: TextConfig,
        tokenizer: String,
        provenance: Provenance,
    ) -> Self {
        let missing = artifact::tensors(&model, &routing, has_gates);
        let mut offset = 0;
        let tensors = missing.iter().map(|(name, &kind)| {
            let entry = TensorEntry { kind, offset: offset as u64 };
            offset = (offset + byte_len(kind, group)).next_multiple_of(ALIGNMENT);
            (name.clone(), entry)
        });
        let tensors = tensors.collect();
        let manifest = Manifest {
            format: artifact::FORMAT.into(),
            version: artifact::VERSION,
            model,
            routing,
            has_gates,
            group,
            text,
            files: BTreeMap::new(),
            tensors,
            provenance,
            quality: None,
        };
        Self { manifest, tokenizer, weights: AlignedBytes::zeros(offset).expect("room for the weights"), missing }
    }

    /// Add a tensor: its numbers in f32, row-major. Int8 tensors are rounded here.
    pub fn add(&mut self, name: &str, numbers: &[f32]) -> Result<(), ArtifactError> {
        let wrong = |found: String, expected: String| ArtifactError::Tensor { name: name.into(), found, expected };
        let Some(kind) = self.missing.remove(name) else {
            return Err(wrong("it twice, or in a model that has none".into(), format!("one of {} others", self.missing.len())));
        };
        let len = match kind {
            TensorKind::F32 { len } => len,
            TensorKind::Int8 { rows, cols } => rows * cols,
        };
        if numbers.len() != len {
            return Err(wrong(format!("{} numbers", numbers.len()), format!("{len} ({kind:?})")));
        }
        let offset = self.manifest.tensors[name].offset as usize;
        let target = &mut self.weights.bytes_mut()[offset..];
        match kind {
            TensorKind::F32 { .. } => {
                if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                    return Err(wrong(format!("{} at {at}", numbers[at]), "finite numbers".into()));
                }
                target[..4 * len].copy_from_slice(bytemuck::cast_slice(numbers));
            }
            TensorKind::Int8 { rows, cols } => {
                let layout = Layout::new(rows, cols, self.manifest.group);
                let packed = int8_linear::pack(numbers, layout);
                let (values, scales) = packed.map_err(|source| ArtifactError::Weight { name: name.into(), source })?;
                target[..values.len()].copy_from_slice(&values);
                target[values.len()..][..2 * scales.len()].copy_from_slice(bytemuck::cast_slice(&scales));
            }
        }
        Ok(())
    }

    /// The artifact, once every tensor is there.
    pub fn finish(mut self) -> Result<Artifact, ArtifactError> {
        if let Some((name, kind)) = self.missing.first_key_value() {
            let expected = format!("{kind:?} ({} tensors are missing in all)", self.missing.len());
            return Err(ArtifactError::Tensor { name: name.clone(), found: "nothing".into(), expected });
        }
        let entry = |bytes: &[u8]| FileEntry { bytes: bytes.len() as u64, sha256: digest(bytes) };
        self.manifest.files.insert(WEIGHTS_FILE.into(), entry(self.weights.bytes()));
        self.manifest.files.insert(TOKENIZER_FILE.into(), entry(self.tokenizer.as_bytes()));
        Ok(Artifact { manifest: self.manifest, tokenizer: self.tokenizer, weights: self.weights })
    }
}

/// Bytes in memory of their own, which begins at a page: vectors want to begin at a cache line.
struct AlignedBytes(MmapMut);

impl AlignedBytes {
    fn zeros(len: usize) -> io::Result<Self> {
        let bytes = MmapMut::map_anon(len)?;
        // A token reads all weights, and large pages make that a few percent faster (LOG.md). A system that has none does without.
        #[cfg(target_os = "linux")]
        let _ = bytes.advise(memmap2::Advice::HugePage);
        Ok(Self(bytes))
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
