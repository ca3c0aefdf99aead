//! `sluice serve` as a program: its options, its end by SIGTERM, and the official `openai` client of Python against it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Python with `openai`: this variable, or else `python3`.
const PYTHON: &str = "SLUICE_PYTHON";

const TEMPLATE: &str =
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

/// The embedded teacher in int8, with a chat template.
fn artifact(folder: &Path) {
    let out = folder.to_str().unwrap();
    let done =
        Command::new(env!("CARGO_BIN_EXE_sluice")).args(["quantize", "--model", "tiny", "--quality-tokens", "0", "--out", out]).output();
    assert!(done.unwrap().status.success());
    let path = folder.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    manifest["text"]["chat_template"] = TEMPLATE.into();
    std::fs::write(&path, manifest.to_string()).unwrap();
}

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(folder: &Path, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
        command.args(["serve", "--model", folder.to_str().unwrap(), "--listen", "127.0.0.1:0", "--threads", "1"]).args(more);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        // It tells the port that it got.
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("http://") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the server ended");
        }
        let address = line.split("http://").nth(1).unwrap().split(": ").next().unwrap().to_string();
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { child, address }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_official_client_works() {
    let python = std::env::var(PYTHON).unwrap_or_else(|_| "python3".into());
    match Command::new(&python).args(["-c", "import openai"]).output() {
        Ok(output) if output.status.success() => {}
        _ => {
            eprintln!("skipped: {python} has no `openai`; set {PYTHON} to a Python that has it");
            return;
        }
    }
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("tiny-int8");
    artifact(&folder);
    let keys = temporary.path().join("keys");
    std::fs::write(&keys, "# the test's\nsk-test\n").unwrap();
    let server = Server::start(&folder, &["--api-key-file", keys.to_str().unwrap(), "--max-sequences", "4"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/openai_client.py");
    let output = Command::new(&python).arg(script).args([&format!("http://{}/v1", server.address), "sk-test"]).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    eprintln!("{said}");
}

#[test]
#[cfg(unix)]
fn sigterm_ends_it_after_the_last_answer() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("tiny-int8");
    artifact(&folder);
    let mut server = Server::start(&folder, &["--max-sequences", "2", "--log-json"]);
    let body = r#"{"model": "tiny-int8", "prompt": "The river", "max_tokens": 300, "stream": true, "logit_bias": {"1": -100}}"#;
    let mut stream = TcpStream::connect(&server.address).unwrap();
    write!(stream, "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    let mut text = String::new();
    let mut stream = BufReader::new(stream);
    while !text.contains("data: ") {
        assert!(stream.read_line(&mut text).unwrap() > 0, "{text}");
    }
    assert!(Command::new("kill").args(["-TERM", &server.child.id().to_string()]).status().unwrap().success());
    stream.read_to_string(&mut text).unwrap();
    assert!(text.contains("data: [DONE]"), "{text}");
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn what_cannot_be_served_is_an_error() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("tiny-int8");
    artifact(&folder);
    let (model, none) = (folder.to_str().unwrap(), temporary.path().join("none"));
    std::fs::write(&none, "# nothing\n").unwrap();
    for (args, word) in [
        (["--model", "tiny", "--listen", "127.0.0.1:0"], "no artifact"),
        (["--model", model, "--listen", "nowhere"], "--listen"),
        (["--model", model, "--max-sequences", "0"], "1 to 1024"),
        (["--model", model, "--api-key-file", "/nowhere"], "/nowhere"),
        (["--model", model, "--api-key-file", none.to_str().unwrap()], "no key"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_sluice")).arg("serve").args(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(word), "{args:?}: {error}");
    }
}
