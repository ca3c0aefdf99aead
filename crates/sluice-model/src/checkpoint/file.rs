//! Files whose length is known and checked: positioned reads that never run past the end, and writes
//! that appear complete or not at all. Knows nothing about formats.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::CheckpointError;

/// JSON files beside the weights are read whole; none is meant to be larger than this.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// An open file with its length.
pub(super) struct SizedFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl SizedFile {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let meta = fs::metadata(path).map_err(|e| CheckpointError::io("open", path, e))?;
        if !meta.is_file() {
            return Err(CheckpointError::unexpected(path, "something that is not a plain file", "a plain file"));
        }
        let file = File::open(path).map_err(|e| CheckpointError::io("open", path, e))?;
        Ok(Self { path: path.to_path_buf(), file, len: meta.len() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The first `N` bytes.
    pub(super) fn prefix<const N: usize>(&self) -> Result<[u8; N], CheckpointError> {
        if self.len < N as u64 {
            return Err(CheckpointError::unexpected(&self.path, format!("{} bytes", self.len), format!("at least {N} bytes")));
        }
        let mut bytes = [0; N];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Fill `buffer` from `offset`. Can be called from several threads at once.
    pub(super) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        read_exact_at(&self.file, offset, buffer).map_err(|e| CheckpointError::io("read", &self.path, e))
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// A small text file as a whole.
pub(super) fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let file = SizedFile::open(path)?;
    if file.len() > MAX_TEXT_BYTES {
        return Err(CheckpointError::unexpected(path, format!("{} bytes of text", file.len()), format!("at most {MAX_TEXT_BYTES}")));
    }
    let mut bytes = vec![0; file.len() as usize];
    file.read_at(0, &mut bytes)?;
    String::from_utf8(bytes).map_err(|e| {
        let found = format!("a byte at {} that is not UTF-8", e.utf8_error().valid_up_to());
        CheckpointError::unexpected(path, found, "UTF-8 text")
    })
}

/// Write a file aside, fsync it and rename it into place: readers see the old content or the new one, never a part.
pub(super) fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), CheckpointError> {
    // Two writers in one process must not share a scratch file.
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(CheckpointError::unexpected(path, "a path without a file name", "the path of a file"));
    };
    let mut aside_name = std::ffi::OsString::from(".");
    aside_name.push(name);
    aside_name.push(format!(".{}-{}.partial", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed)));
    let aside = path.with_file_name(aside_name);
    let result = write_and_rename(path, &aside, write);
    if result.is_err() {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&aside);
    }
    result.map_err(|e| CheckpointError::io("write", path, e))
}

fn write_and_rename(path: &Path, aside: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(aside)?);
    write(&mut out)?;
    out.flush()?;
    out.get_ref().sync_all()?;
    drop(out);
    fs::rename(aside, path)?;
    sync_folder_of(path)
}

/// A rename survives a power cut only once the folder is on disk too.
#[cfg(unix)]
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
fn sync_folder_of(_path: &Path) -> io::Result<()> {
    Ok(())
}
