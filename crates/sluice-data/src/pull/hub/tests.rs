use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use super::*;

/// A hub on the loopback address with one repository, `org/toy`; answers until it is dropped with the process.
struct ToyHub {
    endpoint: String,
    downloads: Arc<AtomicUsize>,
    files: Arc<Mutex<Files>>,
}

/// Content and SHA-256 by name.
type Files = HashMap<&'static str, (Vec<u8>, String)>;

impl ToyHub {
    fn new(files: &[(&'static str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let with_hashes = files.iter().map(|(name, bytes)| {
            let sha: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            (*name, (bytes.to_vec(), sha))
        });
        let files = Arc::new(Mutex::new(with_hashes.collect::<Files>()));
        let downloads = Arc::new(AtomicUsize::new(0));
        let (shared, counter) = (files.clone(), downloads.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_string();
                let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let range = headers.iter().find_map(|h| h.to_lowercase().strip_prefix("range: bytes=").map(str::to_string));
                let files = shared.lock().unwrap();
                let answer = if path.starts_with("/api/models/org/toy") {
                    let siblings: Vec<String> = files.keys().map(|name| format!("{{\"rfilename\":\"{name}\"}}")).collect();
                    let body = format!("{{\"sha\":\"abc\",\"siblings\":[{}]}}", siblings.join(","));
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()).into_bytes()
                } else if let Some((bytes, sha)) = path.strip_prefix("/org/toy/resolve/main/").and_then(|f| files.get(f)) {
                    let (from, to) = range.as_deref().and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
                    let from: usize = from.parse().unwrap();
                    let to = to.parse::<usize>().map_or(bytes.len(), |t| t + 1);
                    counter.fetch_add(usize::from(to == bytes.len()), Ordering::Relaxed);
                    let mut answer = format!(
                        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\nETag: \"{sha}\"\r\n\
                         x-repo-commit: abc\r\nConnection: close\r\n\r\n",
                        to - from,
                        to - 1,
                        bytes.len()
                    )
                    .into_bytes();
                    answer.extend(&bytes[from..to]);
                    answer
                } else {
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
                };
                // The client may have closed the connection already.
                let _ = stream.write_all(&answer);
            }
        });
        Self { endpoint, downloads, files }
    }

    fn pull(&self, name: &str, dir: &Path) -> Result<PathBuf, PullError> {
        super::pull(&Repository::parse(name).unwrap(), dir, Some(self.endpoint.clone()), &mut |_| {})
    }
}

#[test]
fn a_checkpoint_is_its_weights_config_and_tokenizer() {
    let hub = ToyHub::new(&[
        ("config.json", b"{}x"),
        ("tokenizer.json", b"{}yy"),
        ("model.safetensors", &[7; 5000]),
        ("README.md", b"read me"),
        ("onnx/model.safetensors", b"other"),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let folder = hub.pull("org/toy", dir.path()).unwrap();
    assert_eq!(folder, dir.path().join("org/toy"));
    let mut names: Vec<String> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), [7; 5000]);
    assert!(folder.join("model.safetensors").symlink_metadata().unwrap().is_file());
    assert_eq!(hub.downloads.load(Ordering::Relaxed), 3);
    hub.pull("org/toy", dir.path()).unwrap();
    assert_eq!(hub.downloads.load(Ordering::Relaxed), 3, "intact files are not downloaded again");
}

#[test]
fn bytes_that_do_not_match_their_hash_are_refused() {
    let hub = ToyHub::new(&[("model.safetensors", &[7; 5000])]);
    hub.files.lock().unwrap().get_mut("model.safetensors").unwrap().0[100] = 8;
    let dir = tempfile::tempdir().unwrap();
    let error = hub.pull("org/toy", dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("SHA-256"), "{error}");
    assert!(!dir.path().join("org/toy/model.safetensors").exists());
}

#[test]
fn a_repository_of_gguf_files_asks_for_one_of_them() {
    let hub = ToyHub::new(&[("toy-q4.gguf", b"four"), ("toy-q8.gguf", b"eight")]);
    let dir = tempfile::tempdir().unwrap();
    let error = hub.pull("org/toy", dir.path()).unwrap_err().to_string();
    assert!(error.contains("org/toy/toy-q4.gguf") && error.contains("org/toy/toy-q8.gguf"), "{error}");
    let folder = hub.pull("org/toy/toy-q8.gguf", dir.path()).unwrap();
    assert_eq!(fs::read(folder.join("toy-q8.gguf")).unwrap(), b"eight");
}

#[test]
fn what_is_not_there_is_said_plainly() {
    let hub = ToyHub::new(&[("model.safetensors", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let error = hub.pull("org/tov", dir.path()).unwrap_err().to_string();
    assert!(error.contains("org/tov") && error.contains("spelling"), "{error}");
}

#[test]
fn names_of_repositories_and_files_are_told_apart() {
    let repository = |id: &str, file: Option<&str>| Some(Repository { id: id.into(), file: file.map(str::to_string) });
    assert_eq!(Repository::parse("org/name"), repository("org/name", None));
    assert_eq!(Repository::parse("org/name/q/f.gguf"), repository("org/name", Some("q/f.gguf")));
    for bad in ["name", "org/", "../name", "org/name/config.json", "org/name/../x.gguf", "org/na me", "a//b"] {
        assert_eq!(Repository::parse(bad), None, "{bad}");
    }
}
