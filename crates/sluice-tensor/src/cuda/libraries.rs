//! Which NVIDIA libraries this machine has, and why one is missing. Nothing here needs a GPU.
//!
//! All of them are loaded while running: the same binary works where there is none. The system's search path
//! comes first; a CUDA folder that the caller names (`CUDA_HOME`, for instance) is tried after it.

use std::path::{Path, PathBuf};

use cudarc::{cublaslt, driver, nvrtc};
use libloading::Library;

/// A version as `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Before the dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What was found, each with the reason where it was not.
#[derive(Clone, Debug)]
pub struct Libraries {
    /// Newest CUDA version that the driver serves.
    pub driver: Result<Version, String>,
    /// Compiler of the kernels.
    pub nvrtc: Result<Version, String>,
    /// Matrix products.
    pub cublaslt: Result<Version, String>,
    /// Collectives between GPUs; not needed for one.
    pub nccl: Result<Version, String>,
}

impl Libraries {
    /// Look for the libraries, also in `lib64` and `lib` of the given CUDA folders.
    pub fn find(cuda_folders: &[PathBuf]) -> Self {
        // SAFETY: loading a library runs its initialisers; these are NVIDIA's own, meant to be loaded like this.
        unsafe {
            Self {
                driver: if driver::sys::is_culib_present() { driver_version() } else { Err(no_driver()) },
                nvrtc: present(|| nvrtc::sys::is_culib_present(), "libnvrtc", &[13, 12], cuda_folders).and_then(|()| nvrtc_version()),
                cublaslt: present(|| cublaslt::sys::is_culib_present(), "libcublasLt", &[13, 12], cuda_folders)
                    .map(|()| split(cublaslt::sys::cublasLtGetVersion() as u32, 10_000, 100)),
                nccl: nccl_version(cuda_folders),
            }
        }
    }
}

fn no_driver() -> String {
    "libcuda is not on the library path: no NVIDIA driver is installed, or this container was started without one".into()
}

fn driver_version() -> Result<Version, String> {
    let mut version = 0;
    // SAFETY: the library is there, and the call writes one integer.
    match unsafe { driver::sys::cuDriverGetVersion(&mut version) } {
        driver::sys::CUresult::CUDA_SUCCESS => Ok(split(version as u32, 1000, 10)),
        error => Err(format!("the driver does not say its version: {error:?}")),
    }
}

fn nvrtc_version() -> Result<Version, String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there, and the call writes two integers.
    match unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) } {
        nvrtc::sys::nvrtcResult::NVRTC_SUCCESS => Ok(Version { major: major as u32, minor: minor as u32 }),
        error => Err(format!("NVRTC does not say its version: {error:?}")),
    }
}

/// Whether a library can be loaded by its name; if not, from one of the folders. One that was loaded from a folder stays,
/// and the loader then knows it by its name.
unsafe fn present(by_name: impl Fn() -> bool, name: &str, versions: &[u32], folders: &[PathBuf]) -> Result<(), String> {
    if by_name() {
        return Ok(());
    }
    for path in candidates(name, versions, folders) {
        // SAFETY: the caller's promise.
        if let Ok(library) = unsafe { Library::new(&path) } {
            std::mem::forget(library);
            if by_name() {
                return Ok(());
            }
        }
    }
    Err(missing(name, folders))
}

fn candidates(name: &str, versions: &[u32], folders: &[PathBuf]) -> Vec<PathBuf> {
    let in_folder = |folder: &Path| -> Vec<PathBuf> {
        let files = versions.iter().map(|v| format!("{name}.so.{v}"));
        files.flat_map(|file| [folder.join("lib64").join(&file), folder.join("lib").join(&file)]).collect()
    };
    folders.iter().flat_map(|f| in_folder(f)).collect()
}

fn missing(name: &str, folders: &[PathBuf]) -> String {
    let searched = folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ");
    let elsewhere = if searched.is_empty() { String::new() } else { format!(" nor under {searched}") };
    format!("{name} is not on the library path{elsewhere}; install the CUDA toolkit, or set CUDA_HOME or LD_LIBRARY_PATH")
}

fn nccl_version(folders: &[PathBuf]) -> Result<Version, String> {
    let named = ["libnccl.so.2", "libnccl.so"].map(PathBuf::from);
    // SAFETY: as for the other libraries; `ncclGetVersion` writes one integer and returns 0 for success.
    unsafe {
        let library = named
            .into_iter()
            .chain(candidates("libnccl", &[2], folders))
            .find_map(|path| Library::new(path).ok())
            .ok_or_else(|| missing("libnccl", folders))?;
        let get = library.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"ncclGetVersion").map_err(|e| e.to_string())?;
        let mut version = 0;
        match get(&mut version) {
            0 => Ok(split(version as u32, 10_000, 100)),
            error => Err(format!("NCCL does not say its version: error {error}")),
        }
    }
}

fn split(version: u32, major: u32, minor: u32) -> Version {
    Version { major: version / major, minor: version % major / minor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_names_the_folders_that_were_searched() {
        let folders = [PathBuf::from("/nowhere/cuda")];
        // SAFETY: nothing is loaded: the folder does not exist.
        let said = unsafe { present(|| false, "libnvrtc", &[13], &folders) }.expect_err("nothing there");
        assert!(said.contains("libnvrtc") && said.contains("/nowhere/cuda") && said.contains("CUDA_HOME"), "{said}");
    }

    #[test]
    fn looking_for_libraries_works_on_any_machine() {
        let found = Libraries::find(&[]);
        for reason in [found.driver.err(), found.nvrtc.err(), found.cublaslt.err(), found.nccl.err()].into_iter().flatten() {
            assert!(!reason.is_empty());
        }
    }

    #[test]
    fn versions_are_read_as_nvidia_writes_them() {
        assert_eq!(split(13_000, 1000, 10).to_string(), "13.0");
        assert_eq!(split(12_080, 1000, 10).to_string(), "12.8");
        assert_eq!(split(130_002, 10_000, 100).to_string(), "13.0");
        assert_eq!(split(22_703, 10_000, 100).to_string(), "2.27");
    }
}
