//! What is refused, and how; who goes away, and what becomes of their slots.

mod support;

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_server::ApiKeys;
use support::{Reply, Server, read_chunk};

#[test]
fn every_bad_request_is_an_error_in_the_form_of_openai() {
    let server = Server::start(3, |config| config.max_context = 200);
    let completion = |more: Value| {
        let mut body = json!({"model": "tiny", "prompt": "x"});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        ("/v1/completions", body.to_string())
    };
    let chat = |more: Value| {
        let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}]});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        ("/v1/chat/completions", body.to_string())
    };
    let raw = |text: &str| ("/v1/completions", text.to_string());
    for ((path, body), status, param, word) in [
        (raw(""), 400, None, "JSON"),
        (raw("{"), 400, None, "JSON"),
        (raw("[]"), 400, None, "object"),
        (raw("\u{7f}"), 400, None, "JSON"),
        (raw("{} x"), 400, None, "missing field"),
        (raw(r#"{"model": "tiny", "prompt": "x"} y"#), 400, None, "JSON"),
        (raw(&"[".repeat(10_000)), 400, None, ""),
        (completion(json!({"temperature": "hot"})), 400, Some("temperature"), "hot"),
        (completion(json!({"temperature": 2.5})), 400, Some("temperature"), "0 to 2"),
        (completion(json!({"temperature": 1e300})), 400, Some("temperature"), "0 to 2"),
        (completion(json!({"max_tokens": -1})), 400, Some("max_tokens"), "-1"),
        (completion(json!({"max_tokens": 0})), 400, Some("max_tokens"), "at least 1"),
        (completion(json!({"max_tokens": 1.5})), 400, Some("max_tokens"), "1.5"),
        (completion(json!({"max_tokens": u64::MAX})), 400, Some("prompt"), "200"),
        (completion(json!({"prompt": {"a": 1}})), 400, Some("prompt"), "token ids"),
        (completion(json!({"prompt": ""})), 400, Some("prompt"), "empty"),
        (completion(json!({"prompt": []})), 400, Some("prompt"), "empty"),
        (completion(json!({"prompt": [5, 99999]})), 400, Some("prompt"), "99999"),
        (completion(json!({"prompt": ["a", "b"]})), 400, Some("prompt"), "2 prompts"),
        (completion(json!({"prompt": "word ".repeat(300)})), 400, Some("prompt"), "200"),
        (completion(json!({"stop": [1]})), 400, Some("stop"), "texts"),
        (completion(json!({"stop": ["a", "b", "c", "d", "e"]})), 400, Some("stop"), "4"),
        (completion(json!({"stop": ""})), 400, Some("stop"), "1 to"),
        (completion(json!({"n": 4})), 400, Some("n"), "1 to 3"),
        (completion(json!({"n": 0})), 400, Some("n"), "1 to 3"),
        (completion(json!({"logit_bias": {"x": 1}})), 400, Some("logit_bias"), "x"),
        (completion(json!({"logit_bias": {"7": 101}})), 400, Some("logit_bias"), "100"),
        (completion(json!({"stream_options": {}})), 400, Some("stream_options"), "stream"),
        (completion(json!({"logprobs": 1000})), 400, Some("logprobs"), "20"),
        (completion(json!({"best_of": 2})), 400, Some("best_of"), "unknown field"),
        (completion(json!({"stop_token_ids": [4096]})), 400, Some("stop_token_ids"), "4096"),
        (completion(json!({"session_id": "../../etc/passwd"})), 404, Some("session_id"), "no session"),
        (completion(json!({"model": "gpt-4"})), 404, Some("model"), "gpt-4"),
        (chat(json!({"messages": []})), 400, Some("messages"), "at least one"),
        (chat(json!({"messages": [{"role": "user"}]})), 400, Some("messages[0]"), "content"),
        (chat(json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})), 400, Some("messages[0].content"), "text"),
        (chat(json!({"messages": "hello"})), 400, Some("messages"), "sequence"),
        (chat(json!({"top_logprobs": 2})), 400, Some("top_logprobs"), "logprobs"),
        (chat(json!({"max_tokens": 3, "max_completion_tokens": 4})), 400, Some("max_completion_tokens"), "one of the two"),
        (chat(json!({"tools": []})), 400, Some("tools"), "unknown field"),
    ] {
        let reply = server.send("POST", path, &[], body.as_bytes());
        let error = &reply.json()["error"];
        assert_eq!(reply.status, status, "{body}: {error}");
        assert_eq!(error["param"].as_str(), param, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(word), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert_eq!(server.send("POST", "/v1/completions", &[], b"\"\xff\xfe\"").status, 400);
    assert_eq!(server.get("/v1/completions").status, 405);
    assert_eq!(server.get("/v1/../etc/passwd").json()["error"]["code"], "unknown_url");
    assert_eq!(server.get("/v1/sessions/%2e%2e%2fetc").status, 404);
    assert_eq!(server.get("/v1/sessions/%ff").json()["error"]["code"], "unknown_url");
    assert_eq!(server.get("/v1/models/nobody").json()["error"]["code"], "model_not_found");
    // After all of that it still works.
    server.post("/v1/completions", &json!({"model": "tiny", "prompt": "x"})).ok();
    assert_eq!(server.metric("sluice_slots_in_use"), 0.0);
}

#[test]
fn a_body_that_is_too_large_or_too_slow_is_refused() {
    let server = Server::start(1, |config| {
        config.max_body = 1000;
        config.body_timeout = Duration::from_millis(200);
    });
    let body = json!({"model": "tiny", "prompt": "x".repeat(2000)}).to_string();
    let reply = server.send("POST", "/v1/completions", &[], body.as_bytes());
    assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (413, Some("request_too_large")));
    // Without a length in the head.
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n").unwrap();
    stream.write_all(format!("7d0\r\n{}\r\n0\r\n\r\n", "x".repeat(2000)).as_bytes()).unwrap();
    assert_eq!(Reply::read(&mut std::io::BufReader::new(stream)).status, 413);
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{").unwrap();
    assert_eq!(Reply::read(&mut std::io::BufReader::new(stream)).status, 408);
}

#[test]
fn without_a_key_only_the_page_and_the_state_are_shown() {
    let server = Server::start(1, |config| config.keys = ApiKeys::parse("secret\n").unwrap());
    for path in ["/v1/models", "/v1/sessions", "/metrics"] {
        let reply = server.get(path);
        assert_eq!((reply.status, reply.json()["error"]["code"].as_str()), (401, Some("invalid_api_key")), "{path}");
        assert_eq!(server.send("GET", path, &[("authorization", "Bearer wrong")], b"").status, 401);
        assert_eq!(server.send("GET", path, &[("authorization", "Bearer secret")], b"").status, 200, "{path}");
    }
    assert_eq!(server.post("/v1/completions", &json!({"model": "tiny", "prompt": "x"})).status, 401);
    for path in ["/", "/health", "/ready", "/openapi.json"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}

fn endless(server: &Server) -> std::io::BufReader<TcpStream> {
    // Every token but the end may be chosen, so it runs as long as it is allowed to.
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": true, "logit_bias": {"1": -100}});
    let mut stream = server.open("POST", "/v1/completions", &[], body.to_string().as_bytes());
    assert_eq!(Reply::read_head(&mut stream).0, 200);
    read_chunk(&mut stream).unwrap();
    stream
}

#[test]
fn when_slots_and_queue_are_full_clients_are_asked_to_come_again() {
    let server = Server::start(1, |config| config.queue = 1);
    let running = endless(&server);
    let body = json!({"model": "tiny", "prompt": "y", "max_tokens": 2});
    let waiting = server.open("POST", "/v1/completions", &[], body.to_string().as_bytes());
    server.wait_for_metric("sluice_queue_requests", 1.0);
    let reply = server.post("/v1/completions", &body);
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")), "{}", reply.text());
    assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
    assert_eq!(server.metric("sluice_requests_refused_total"), 1.0);
    drop(running);
    let mut waiting = waiting;
    assert_eq!(Reply::read(&mut waiting).status, 200);
}

#[test]
fn a_client_that_goes_away_frees_its_slot_at_once() {
    let server = Server::start(2, |config| config.queue = 4);
    for streamed in [true, false] {
        let before = server.metric("sluice_requests_cancelled_total");
        let stream = if streamed {
            endless(&server)
        } else {
            let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 4000, "logit_bias": {"1": -100}});
            server.open("POST", "/v1/completions", &[], body.to_string().as_bytes())
        };
        server.wait_for_metric("sluice_slots_in_use", 1.0);
        let tokens = server.metric("sluice_generated_tokens_total");
        let gone = Instant::now();
        drop(stream);
        server.wait_for_metric("sluice_requests_cancelled_total", before + 1.0);
        assert_eq!(server.metric("sluice_slots_in_use"), 0.0);
        assert!(gone.elapsed() < Duration::from_secs(2), "after {:?}", gone.elapsed());
        // Far from its end: it was the client that ended it.
        assert!(server.metric("sluice_generated_tokens_total") - tokens < 3000.0, "streamed {streamed}");
    }
    // While it waits.
    let running = [endless(&server), endless(&server)];
    let waiting = endless_body(&server);
    server.wait_for_metric("sluice_queue_requests", 1.0);
    drop(waiting);
    server.wait_for_metric("sluice_queue_requests", 0.0);
    drop(running);
    server.wait_for_metric("sluice_slots_in_use", 0.0);
}

fn endless_body(server: &Server) -> std::io::BufReader<TcpStream> {
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 4000});
    server.open("POST", "/v1/completions", &[], body.to_string().as_bytes())
}

#[test]
fn a_signal_lets_running_answers_end_and_takes_nothing_new() {
    let mut server = Server::start(1, |_| {});
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 600, "stream": true, "logit_bias": {"1": -100}});
    let mut stream = server.open("POST", "/v1/completions", &[], body.to_string().as_bytes());
    assert_eq!(Reply::read_head(&mut stream).0, 200);
    read_chunk(&mut stream).unwrap();
    server.signal();
    let started = Instant::now();
    while TcpStream::connect(server.address).is_ok() {
        assert!(started.elapsed() < Duration::from_secs(10), "still taking connections");
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut rest = Vec::new();
    while let Some(chunk) = read_chunk(&mut stream) {
        rest.extend(chunk);
    }
    let text = String::from_utf8(rest).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n") && text.contains("\"finish_reason\":\"length\""), "{text}");
    server.join().unwrap();
}

#[test]
fn a_server_that_is_not_done_in_time_stops_anyway() {
    let mut server = Server::start(1, |config| config.drain = Duration::from_millis(50));
    let mut stream = endless(&server);
    server.signal();
    let started = Instant::now();
    server.join().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    stream.get_mut().set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut rest = Vec::new();
    // Cut off, with or without an error: what matters is that it ends.
    let _ = std::io::Read::read_to_end(&mut stream, &mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
}
