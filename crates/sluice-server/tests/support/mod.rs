//! A server with a tiny model of random weights on a port of its own, and a client that sees every byte.
#![allow(dead_code, reason = "every test binary uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use sluice_data::embedded;
use sluice_engine::{Artifact, ArtifactBuilder, Engine, Options};
use sluice_server::{ServeError, ServerConfig};
use sluice_spec::artifact::{self, Provenance, TensorKind};
use sluice_spec::{Architecture, GateHeads, ModelConfig, RoutingConfig, TextConfig};
use sluice_testkit::{Rng, small_model};

/// Turns of a conversation in brackets, each on a line: no token reaches from one into the next.
pub(crate) const TEMPLATE: &str =
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

pub(crate) fn artifact() -> Artifact {
    let model =
        ModelConfig { d_model: 64, d_ff: 96, head_dim: 16, vocab_size: 2048, max_seq_len: 4096, ..small_model(Architecture::Llama) };
    let routing = RoutingConfig { window: 16, top_k: 24, route_every: 8, n_sink: 2, gate_heads: GateHeads::KvHead, gate_temperature: 0.0 };
    let text = TextConfig { bos: Some(0), eos: vec![1], chat_template: Some(TEMPLATE.into()) };
    let tokenizer = embedded::tokenizer().to_json();
    let provenance = Provenance { model: "random".into(), model_sha256: None, gates_sha256: None, made_by: "a test".into() };
    let mut builder = ArtifactBuilder::new(model.clone(), routing, true, 32, text, tokenizer, provenance);
    let mut rng = Rng::new(4);
    for (name, kind) in artifact::tensors(&model, &routing, true) {
        let (n, scale) = match kind {
            TensorKind::Int8 { rows, cols } => (rows * cols, 1.5 / (cols as f32).sqrt()),
            TensorKind::F32 { len } => (len, 1.0),
        };
        builder.add(&name, &(0..n).map(|_| scale * rng.normal()).collect::<Vec<f32>>()).unwrap();
    }
    builder.finish().unwrap()
}

pub(crate) fn engine(sequences: usize) -> Engine {
    Engine::new(artifact(), Options { threads: 1, chunk: 64, sequences, ..Options::default() }).unwrap()
}

pub(crate) fn tokenizer() -> sluice_data::Tokenizer {
    let artifact = artifact();
    sluice_data::Tokenizer::from_json(&artifact.tokenizer, &artifact.manifest.text).unwrap()
}

/// A running server; dropped, it stops.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Server {
    pub(crate) fn start(sequences: usize, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut config = ServerConfig::new("tiny", 4096);
        change(&mut config);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let shutdown = async move {
            let _ = stopped.await;
        };
        let thread = std::thread::spawn(move || sluice_server::serve(engine(sequences), tokenizer(), config, listener, shutdown));
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    /// Begin to stop.
    pub(crate) fn signal(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    /// Wait for the end.
    pub(crate) fn join(mut self) -> Result<(), ServeError> {
        self.thread.take().unwrap().join().unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut stream = self.open(method, path, headers, body);
        Reply::read(&mut stream)
    }

    /// Send a request and leave the answer to the caller.
    pub(crate) fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses by the head alone may close before the body is through.
        let _ = stream.write_all(body);
        BufReader::new(stream)
    }

    /// Value of a metric.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub(crate) fn wait_for_metric(&self, name: &str, value: f64) {
        let started = Instant::now();
        while self.metric(name) != value {
            assert!(started.elapsed() < Duration::from_secs(20), "{name} is {}, not {value}", self.metric(name));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An answer.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn read(stream: &mut BufReader<TcpStream>) -> Self {
        let (status, headers) = Self::read_head(stream);
        let chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let mut body = Vec::new();
        if chunked {
            while let Some(chunk) = read_chunk(stream) {
                body.extend(chunk);
            }
        } else {
            stream.read_to_end(&mut body).unwrap();
        }
        Self { status, headers, body }
    }

    pub(crate) fn read_head(stream: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_string());
        }
        let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
        let split = |line: &String| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_string()));
        (status, lines[1..].iter().filter_map(split).collect())
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The answer to a request that had to succeed.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// Data of server-sent events; the last one must be `[DONE]`, which is left out.
    pub(crate) fn events(&self) -> Vec<Value> {
        let text = self.text();
        let mut data: Vec<&str> = text.split("\n\n").filter_map(|event| event.trim().strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

/// Next chunk of a chunked body; none at its end.
pub(crate) fn read_chunk(stream: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let len = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("no chunk length: {line:?}"));
    let mut chunk = vec![0; len + 2];
    stream.read_exact(&mut chunk).unwrap();
    chunk.truncate(len);
    (len > 0).then_some(chunk)
}
