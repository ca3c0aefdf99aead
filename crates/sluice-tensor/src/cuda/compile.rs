//! From an embedded `.cu` source to machine code: NVRTC for the GPU found, and a cache on disk.
//!
//! An entry's name is the SHA-256 of everything that decides its content: source, options, architecture, driver and
//! compiler. An entry carries the digest of its own bytes; a damaged one is compiled again. Entries are written aside and
//! renamed, so that processes may share a folder.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result as nvrtc, sys};
use sha2::{Digest, Sha256};

use super::error::CudaError;
use super::libraries::Version;

/// A CUDA source that is part of the binary. NVRTC has no headers of the host: sources include nothing.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource {
    /// For messages and the names of cache entries.
    pub name: &'static str,
    /// The text. [`PRELUDE`] stands before it.
    pub code: &'static str,
}

/// What every source begins with: integer types, bf16, reductions.
pub const PRELUDE: &str = include_str!("prelude.cuh");

/// Floating-point behaviour is the default (IEEE division and roots, no flushing), the same for every source.
const OPTIONS: [&str; 3] = ["--std=c++17", "--extra-device-vectorization", "-default-device"];

/// Code for a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// CUBIN, or PTX where this compiler is older than the GPU, ready for the driver.
    pub image: Vec<u8>,
    /// Whether it came from the cache.
    pub cached: bool,
}

/// Compiles for one architecture.
#[derive(Clone, Debug)]
pub struct Compiler {
    target: Target,
    folder: Option<PathBuf>,
    key: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// `sm_90a`: machine code.
    Machine(String),
    /// `compute_80`: code that the driver translates.
    Virtual(String),
}

impl Target {
    fn name(&self) -> &str {
        match self {
            Self::Machine(name) | Self::Virtual(name) => name,
        }
    }
}

impl Compiler {
    /// For compute capability `major.minor`. NVRTC must be there ([`Libraries`](super::Libraries)). `folder` is the cache; without one
    /// every process compiles for itself.
    pub fn new(capability: (u32, u32), driver: Option<Version>, nvrtc: Version, folder: Option<PathBuf>) -> Result<Self, CudaError> {
        let target = target(capability, &supported_archs()?)?;
        let driver = driver.map_or("none".into(), |v| v.to_string());
        let key = format!("{}|{driver}|{nvrtc}|{}", target.name(), OPTIONS.join(" "));
        Ok(Self { target, folder, key })
    }

    /// Name of the architecture that is compiled for.
    pub fn arch(&self) -> &str {
        self.target.name()
    }

    /// Machine code of a source, from the cache if it is there.
    pub fn compile(&self, source: &KernelSource) -> Result<Compiled, CudaError> {
        let path = self.folder.as_ref().map(|folder| folder.join(self.entry_name(source)));
        if let Some(image) = path.as_deref().and_then(read_entry) {
            return Ok(Compiled { image, cached: true });
        }
        let image = self.run_nvrtc(source)?;
        if let Some(path) = path {
            // A folder that cannot be written costs time, not the result.
            let _ = write_entry(&path, &image);
        }
        Ok(Compiled { image, cached: false })
    }

    fn entry_name(&self, source: &KernelSource) -> String {
        let mut hash = Sha256::new();
        for part in [self.key.as_str(), PRELUDE, source.code] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        format!("{}-{}.cubin", source.name, hex(&hash.finalize()))
    }

    fn run_nvrtc(&self, source: &KernelSource) -> Result<Vec<u8>, CudaError> {
        let failed = |call: &'static str| move |error: nvrtc::NvrtcError| CudaError::call(call, error);
        let text = CString::new(format!("{PRELUDE}\n#line 1 \"{}.cu\"\n{}", source.name, source.code)).expect("a source has no zero byte");
        let name = CString::new(format!("{}.cu", source.name)).expect("a name has no zero byte");
        let program = Program(nvrtc::create_program(&text, Some(&name)).map_err(failed("nvrtcCreateProgram"))?);
        let mut options = vec![format!("--gpu-architecture={}", self.target.name())];
        options.extend(OPTIONS.map(String::from));
        // SAFETY: `program` is alive until the end of this function, and so are `text` and `name`.
        unsafe {
            if let Err(error) = nvrtc::compile_program(program.0, &options) {
                let log = nvrtc::get_program_log(program.0).map_or_else(|e| e.to_string(), |log| text_of(&log));
                let log = if log.is_empty() { error.to_string() } else { log };
                return Err(CudaError::Compile { source_name: source.name.into(), arch: self.arch().into(), log });
            }
            match self.target {
                Target::Virtual(_) => {
                    let ptx = nvrtc::get_ptx(program.0).map_err(failed("nvrtcGetPTX"))?;
                    Ok(ptx.into_iter().map(|c| c as u8).collect())
                }
                Target::Machine(_) => {
                    let mut size = 0;
                    sys::nvrtcGetCUBINSize(program.0, &mut size).result().map_err(failed("nvrtcGetCUBINSize"))?;
                    let mut cubin = vec![0u8; size];
                    sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()).result().map_err(failed("nvrtcGetCUBIN"))?;
                    Ok(cubin)
                }
            }
        }
    }
}

/// A program that is released at the end.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program` and released here alone. There is nothing to do about a failure.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

fn text_of(log: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_string()
}

fn supported_archs() -> Result<Vec<u32>, CudaError> {
    let failed = |error| CudaError::call("nvrtcGetSupportedArchs", error);
    let mut n = 0;
    // SAFETY: the second call fills as many integers as the first one announced.
    unsafe {
        sys::nvrtcGetNumSupportedArchs(&mut n).result().map_err(failed)?;
        let mut archs = vec![0i32; n as usize];
        sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()).result().map_err(failed)?;
        Ok(archs.into_iter().map(|a| a as u32).collect())
    }
}

/// Machine code if the compiler knows the GPU, else the newest older virtual architecture.
fn target((major, minor): (u32, u32), supported: &[u32]) -> Result<Target, CudaError> {
    if major < 8 {
        return Err(CudaError::Missing(format!("compute capability {major}.{minor} is too old; Sluice needs 8.0 (A100) or later")));
    }
    let arch = major * 10 + minor;
    if supported.contains(&arch) {
        // The `a` unlocks what only this generation has: warpgroup products on Hopper.
        let suffix = if arch == 90 { "a" } else { "" };
        return Ok(Target::Machine(format!("sm_{arch}{suffix}")));
    }
    let older = supported.iter().copied().filter(|&a| a <= arch).max();
    let newest =
        older.ok_or_else(|| CudaError::Missing(format!("this NVRTC serves {supported:?} and not compute capability {major}.{minor}")))?;
    Ok(Target::Virtual(format!("compute_{newest}")))
}

const MAGIC: &[u8; 8] = b"sluicecu";

/// The image of an entry; `None` if it is missing or damaged.
fn read_entry(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let rest = bytes.strip_prefix(MAGIC)?;
    let (digest, image) = rest.split_at_checked(32)?;
    (Sha256::digest(image)[..] == *digest && !image.is_empty()).then(|| image.to_vec())
}

fn write_entry(path: &Path, image: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let folder = path.parent().expect("an entry lies in a folder");
    std::fs::create_dir_all(folder)?;
    let aside = path.with_extension(format!("{}.part", std::process::id()));
    let written = std::fs::File::create(&aside).and_then(|mut file| {
        file.write_all(MAGIC)?;
        file.write_all(&Sha256::digest(image))?;
        file.write_all(image)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&aside, path));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&aside);
    }
    renamed
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::libraries::Libraries;
    use super::*;

    const SOURCE: KernelSource = KernelSource {
        name: "twice",
        code: "extern \"C\" __global__ void twice(float* x, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] *= 2.f; }",
    };

    /// A compiler for Ampere, or `None` where NVRTC is not installed.
    fn compiler(folder: Option<PathBuf>) -> Option<Compiler> {
        match Libraries::find(&[]).nvrtc {
            Ok(nvrtc) => Some(Compiler::new((8, 0), None, nvrtc, folder).expect("NVRTC serves sm_80")),
            Err(reason) => {
                eprintln!("skipped: {reason}");
                None
            }
        }
    }

    #[test]
    fn damaged_or_foreign_entries_are_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep").join("a.cubin");
        write_entry(&path, b"machine code").expect("written");
        assert_eq!(read_entry(&path).as_deref(), Some(&b"machine code"[..]));
        assert_eq!(std::fs::read_dir(folder.path().join("deep")).expect("a folder").count(), 1, "nothing lies aside");
        let good = std::fs::read(&path).expect("there");
        for damaged in [&good[..good.len() - 1], &good[..20], &good[..0], &[good.clone(), vec![0]].concat()] {
            std::fs::write(&path, damaged).expect("written");
            assert_eq!(read_entry(&path), None);
        }
        let mut flipped = good;
        flipped[45] ^= 1;
        std::fs::write(&path, flipped).expect("written");
        assert_eq!(read_entry(&path), None);
        assert_eq!(read_entry(&folder.path().join("missing")), None);
    }

    #[test]
    fn second_compilation_comes_from_the_cache_and_a_damaged_entry_is_rebuilt() {
        let folder = tempfile::tempdir().expect("a folder");
        let Some(compiler) = compiler(Some(folder.path().into())) else { return };
        let first = compiler.compile(&SOURCE).expect("compiles");
        assert!(!first.cached && first.image.starts_with(b"\x7fELF"));
        let second = compiler.compile(&SOURCE).expect("compiles");
        assert_eq!((second.cached, &second.image), (true, &first.image));
        let entry = folder.path().join(compiler.entry_name(&SOURCE));
        std::fs::write(&entry, b"rubbish").expect("written");
        assert!(!compiler.compile(&SOURCE).expect("compiles").cached);
        assert!(compiler.compile(&SOURCE).expect("compiles").cached);
    }

    #[test]
    fn an_error_carries_the_compilers_words_and_the_line_of_the_source() {
        let Some(compiler) = compiler(None) else { return };
        let error = compiler.compile(&KernelSource { name: "broken", code: "int x;\nint y = nonsense;" }).expect_err("nonsense");
        assert!(error.to_string().contains("broken.cu(2)") && error.to_string().contains("nonsense"), "{error}");
    }

    #[test]
    fn everything_that_decides_the_code_is_in_the_name() {
        let compiler = |arch: &str| Compiler { target: Target::Machine(arch.into()), folder: None, key: arch.into() };
        let other = KernelSource { code: "int x;", ..SOURCE };
        let names = [compiler("sm_80").entry_name(&SOURCE), compiler("sm_90a").entry_name(&SOURCE), compiler("sm_80").entry_name(&other)];
        assert!(names[0] != names[1] && names[0] != names[2]);
        assert_eq!(names[0], compiler("sm_80").entry_name(&SOURCE));
    }

    #[test]
    fn target_is_the_gpu_found_or_the_newest_older_one() {
        let known = [75, 80, 86, 90, 100];
        assert_eq!(target((9, 0), &known).expect("known").name(), "sm_90a");
        assert_eq!(target((8, 0), &known).expect("known").name(), "sm_80");
        assert_eq!(target((8, 9), &known).expect("newer"), Target::Virtual("compute_86".into()));
        assert_eq!(target((12, 0), &known).expect("newer"), Target::Virtual("compute_100".into()));
        assert!(target((7, 5), &known).expect_err("old").to_string().contains("8.0"));
    }
}
