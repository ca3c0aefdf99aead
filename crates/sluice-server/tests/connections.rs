//! Connections that are not used as they should be, and what holders of different keys can learn of each other.

mod support;

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_server::{ApiKeys, ConnectionLimits};
use support::{Reply, Server};

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// How long until the server closes a connection, and what it says before.
fn closed_after(stream: &mut TcpStream) -> (Duration, Vec<u8>) {
    let (started, mut said) = (Instant::now(), Vec::new());
    // A reset is an end too.
    let _ = stream.read_to_end(&mut said);
    (started.elapsed(), said)
}

#[test]
fn a_head_that_does_not_arrive_in_time_ends_its_connection() {
    let head_timeout = Duration::from_millis(300);
    let server = Server::start(1, |config| config.connections.head_timeout = head_timeout);
    let started = Instant::now();
    // Nothing at all; half a head; a head letter by letter, each within the time.
    let mut silent = connect(&server);
    let mut half = connect(&server);
    half.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n").unwrap();
    let mut slow = connect(&server);
    for letter in b"GET /health HTTP/1.1\r\nhost: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" {
        std::thread::sleep(Duration::from_millis(30));
        if slow.write_all(&[*letter]).is_err() {
            break;
        }
    }
    for stream in [&mut silent, &mut half, &mut slow] {
        closed_after(stream);
    }
    assert!(started.elapsed() >= head_timeout && started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    // One that was used and now idles; the next request in time is answered on it.
    let mut kept = connect(&server);
    for _ in 0..2 {
        kept.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut reader = BufReader::new(kept.try_clone().unwrap());
        assert_eq!(Reply::read_head(&mut reader).0, 200);
        let mut body = [0; 3];
        reader.read_exact(&mut body).unwrap();
        assert_eq!(&body, b"ok\n");
    }
    let (idle, said) = closed_after(&mut kept);
    assert!(idle < Duration::from_secs(15) && said.is_empty(), "{idle:?}");
}

#[test]
fn a_slow_answer_is_not_a_slow_head() {
    let server = Server::start(1, |config| config.connections.head_timeout = Duration::from_millis(50));
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 3000, "logit_bias": {"1": -100}});
    let started = Instant::now();
    assert_eq!(server.post("/v1/completions", &body).ok()["usage"]["completion_tokens"], 3000);
    assert!(started.elapsed() > Duration::from_millis(50), "too fast to show anything: {:?}", started.elapsed());
}

#[test]
fn a_head_that_is_too_large_is_refused() {
    let server = Server::start(1, |config| config.connections = ConnectionLimits { max_head: 8 << 10, ..config.connections });
    let large = "x".repeat(20_000);
    assert_eq!(server.send("GET", "/health", &[("x-large", large.as_str())], b"").status, 431);
    let names: Vec<String> = (0..100).map(|i| format!("x-{i}")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "1")).collect();
    assert_eq!(server.send("GET", "/health", &many, b"").status, 431);
    let path = format!("/health?{large}");
    assert!((400..500).contains(&server.send("GET", &path, &[], b"").status));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_client_that_takes_nothing_loses_its_connection_and_its_slot() {
    let server = Server::start(1, |config| {
        config.connections.write_timeout = Duration::from_millis(300);
        config.max_context = 400_000;
    });
    // Alternatives make every token some kilobytes, so that the system's buffers fill.
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 390_000, "stream": true,
        "logit_bias": {"1": -100}, "logprobs": true, "top_logprobs": 20});
    let stream = server.open("POST", "/v1/chat/completions", &[], body.to_string().as_bytes());
    let started = Instant::now();
    while server.metric("sluice_requests_cancelled_total") == 0.0 {
        assert!(started.elapsed() < Duration::from_secs(60), "{} tokens", server.metric("sluice_generated_tokens_total"));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.metric("sluice_slots_in_use"), 0.0);
    drop(stream);
}

#[test]
fn with_all_connections_in_use_the_next_one_waits() {
    let server = Server::start(1, |config| {
        config.connections = ConnectionLimits { most: 2, head_timeout: Duration::from_millis(400), ..config.connections };
    });
    // The probes of `Server` close their connections, so two that idle are what there is.
    let idle = [connect(&server), connect(&server)];
    std::thread::sleep(Duration::from_millis(100));
    let started = Instant::now();
    assert_eq!(server.get("/health").status, 200, "once the idle ones are cut");
    assert!(started.elapsed() > Duration::from_millis(150), "{:?}: it did not wait", started.elapsed());
    drop(idle);
}

#[test]
fn what_one_key_stores_no_other_sees() {
    let server = Server::start(1, |config| config.keys = ApiKeys::parse("alpha\nbeta\n").unwrap());
    let send = |key: &str, method: &str, path: &str, body: Value| {
        let authorization = format!("Bearer {key}");
        let headers = [("authorization", authorization.as_str()), ("content-type", "application/json")];
        server.send(method, path, &headers, if body.is_null() { String::new() } else { body.to_string() }.as_bytes())
    };
    // A stored beginning is faster to read again, for whoever stored it.
    let prompt = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. ".repeat(3);
    let ask = |key: &str| {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0});
        let answer = send(key, "POST", "/v1/completions", body).ok();
        (answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(), answer["choices"][0]["text"].clone())
    };
    let (first, text) = ask("alpha");
    assert_eq!(first, 0);
    assert!(ask("alpha").0 >= 32);
    assert_eq!(ask("beta"), (0, text.clone()), "beta's first time");
    assert!(ask("beta").0 >= 32);
    // A session is not there for others.
    let id = send("alpha", "POST", "/v1/sessions", json!({"model": "tiny", "prompt": "abc"})).ok()["id"].as_str().unwrap().to_string();
    let path = format!("/v1/sessions/{id}");
    let count = |key: &str| send(key, "GET", "/v1/sessions", Value::Null).ok()["data"].as_array().unwrap().len();
    assert_eq!((count("alpha"), count("beta")), (1, 0));
    let go_on = json!({"model": "tiny", "prompt": "x", "max_tokens": 2, "session_id": id});
    for (method, path, body) in [
        ("GET", path.clone(), Value::Null),
        ("GET", format!("{path}/snapshot"), Value::Null),
        ("DELETE", path.clone(), Value::Null),
        ("POST", "/v1/completions".into(), go_on.clone()),
    ] {
        let reply = send("beta", method, &path, body);
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (404, Some("session_not_found")), "{method} {path}");
    }
    send("alpha", "POST", "/v1/completions", go_on).ok();
    send("alpha", "DELETE", &path, Value::Null).ok();
}
