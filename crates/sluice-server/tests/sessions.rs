//! Sessions, and the paths that describe the server.

mod support;

use serde_json::json;
use support::Server;

#[test]
fn a_session_goes_on_as_one_text() {
    let server = Server::start(2, |_| {});
    let first = server.post("/v1/sessions", &json!({"model": "tiny", "prompt": "It was a dark night."})).ok();
    let id = first["id"].as_str().unwrap();
    let ask = |session: Option<&str>, prompt: &str| {
        let body = json!({"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "session_id": session});
        server.post("/v1/completions", &body).ok()["choices"][0]["text"].as_str().unwrap().to_string()
    };
    let answer = ask(Some(id), " The wind");
    assert_eq!(answer, ask(None, "It was a dark night. The wind"));
    let described = server.get(&format!("/v1/sessions/{id}")).ok();
    assert!(described["tokens"].as_u64() > first["tokens"].as_u64() && described["cache_bytes"] == first["cache_bytes"]);
    // As bytes to another server, where it goes on from the same state.
    let snapshot = server.get(&format!("/v1/sessions/{id}/snapshot"));
    assert_eq!(snapshot.header("content-type"), Some("application/octet-stream"));
    let other = Server::start(1, |_| {});
    let octets = [("content-type", "application/octet-stream")];
    let resumed = other.send("POST", "/v1/sessions", &octets, &snapshot.body).ok();
    assert_eq!(resumed["tokens"], described["tokens"]);
    let body = json!({"model": "tiny", "prompt": " And then", "max_tokens": 12, "temperature": 0, "session_id": resumed["id"]});
    let there = other.post("/v1/completions", &body).ok()["choices"][0]["text"].clone();
    assert_eq!(ask(Some(id), " And then"), there);
    for at in [0, 20, 60, snapshot.body.len() - 5] {
        let mut damaged = snapshot.body.clone();
        damaged[at] ^= 1;
        assert_eq!(other.send("POST", "/v1/sessions", &octets, &damaged).status, 400, "byte {at}");
        assert_eq!(other.send("POST", "/v1/sessions", &octets, &snapshot.body[..at]).status, 400, "cut at {at}");
    }
    assert_eq!(server.get("/v1/sessions").ok()["data"].as_array().unwrap().len(), 1);
    assert_eq!(server.send("DELETE", &format!("/v1/sessions/{id}"), &[], b"").ok()["deleted"], true);
    for gone in [server.get(&format!("/v1/sessions/{id}")), server.send("DELETE", &format!("/v1/sessions/{id}"), &[], b"")] {
        assert_eq!((gone.status, gone.json()["error"]["code"].as_str()), (404, Some("session_not_found")));
    }
}

#[test]
fn a_chat_in_a_session_is_the_whole_chat() {
    let server = Server::start(2, |_| {});
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let system = message("system", "Be kind");
    let session = server.post("/v1/sessions", &json!({"model": "tiny", "messages": [system]})).ok();
    let ask = |messages: serde_json::Value, session: Option<&serde_json::Value>| {
        let body = json!({"model": "tiny", "messages": messages, "max_tokens": 9, "temperature": 0, "logit_bias": {"1": -100}});
        let mut body = body;
        session.into_iter().for_each(|session| body["session_id"] = session["id"].clone());
        server.post("/v1/chat/completions", &body).ok()["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    };
    let first = ask(json!([message("user", "Hello")]), Some(&session));
    assert_eq!(first, ask(json!([system, message("user", "Hello")]), None));
    let before = server.get(&format!("/v1/sessions/{}", session["id"].as_str().unwrap())).ok()["tokens"].clone();
    let second = ask(json!([message("user", "And you?")]), Some(&session));
    assert!(!second.is_empty());
    let after = server.get(&format!("/v1/sessions/{}", session["id"].as_str().unwrap())).ok()["tokens"].clone();
    // The question, its brackets and nine tokens; not the whole conversation again.
    assert!(after.as_u64().unwrap() - before.as_u64().unwrap() < 60, "{before} to {after}");
    for wrong in [json!({"n": 2}), json!({"stop": "x"})] {
        let mut body = json!({"model": "tiny", "messages": [message("user", "x")], "session_id": session["id"]});
        wrong.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        assert_eq!(server.post("/v1/chat/completions", &body).status, 400);
    }
}

#[test]
fn a_session_that_is_continued_is_not_lent_twice_and_survives_a_client_that_leaves() {
    let server = Server::start(2, |config| config.sessions = 2);
    let new = || server.post("/v1/sessions", &json!({"model": "tiny", "prompt": "abc"})).ok()["id"].as_str().unwrap().to_string();
    let id = new();
    let read = || server.get(&format!("/v1/sessions/{id}")).ok()["tokens"].clone();
    let before = read();
    let long = json!({"model": "tiny", "prompt": "x", "max_tokens": 3000, "stream": true, "session_id": id, "logit_bias": {"1": -100}});
    let stream = server.open("POST", "/v1/completions", &[], long.to_string().as_bytes());
    server.wait_for_metric("sluice_slots_in_use", 1.0);
    let short = json!({"model": "tiny", "prompt": "x", "max_tokens": 2, "session_id": id});
    assert_eq!(server.post("/v1/completions", &short).status, 409);
    drop(stream);
    server.wait_for_metric("sluice_slots_in_use", 0.0);
    assert_eq!(read(), before, "as it was before the client left");
    let short = server.post("/v1/completions", &short).ok();
    let more = &short["usage"]["total_tokens"];
    assert_eq!(read().as_u64().unwrap(), before.as_u64().unwrap() + more.as_u64().unwrap());
    // The third one sends away the one that was not used for longest.
    let (second, third) = (new(), new());
    assert_eq!(server.get(&format!("/v1/sessions/{id}")).status, 404);
    assert!(server.get(&format!("/v1/sessions/{second}")).status == 200 && third != second);
    assert_eq!(server.metric("sluice_sessions"), 2.0);
}

#[test]
fn the_server_describes_itself() {
    let server = Server::start(1, |_| {});
    let models = server.get("/v1/models").ok();
    assert_eq!((models["object"].as_str(), models["data"][0]["id"].as_str()), (Some("list"), Some("tiny")));
    assert_eq!(server.get("/v1/models/tiny").ok()["max_context"], 4096);
    assert_eq!((server.get("/health").status, server.get("/ready").text().trim()), (200, "ready"));
    let document = server.get("/openapi.json").ok();
    for path in ["/v1/completions", "/v1/chat/completions", "/v1/sessions", "/v1/sessions/{id}/snapshot", "/metrics", "/ready"] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
    assert!(document["components"]["schemas"]["CompletionRequest"]["properties"]["temperature"].is_object());
    let page = server.get("/");
    assert!(page.status == 200 && page.header("content-type").unwrap().starts_with("text/html"));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let reply = server.send("GET", "/health", &[("x-request-id", "my-id-7")], b"");
    assert_eq!(reply.header("x-request-id"), Some("my-id-7"));
    let reply = server.send("GET", "/health", &[("x-request-id", "a b\"c")], b"");
    assert!(reply.header("x-request-id").is_some_and(|id| id.len() == 32), "a name that is no harm in a log");
    server.post("/v1/completions", &json!({"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0})).ok();
    let metrics = server.get("/metrics").text();
    for name in [
        "sluice_queue_requests",
        "sluice_batch_size_bucket",
        "sluice_prompt_tokens_total",
        "sluice_generated_tokens_total",
        "sluice_time_to_first_token_seconds_bucket",
        "sluice_inter_token_seconds_bucket",
        "sluice_cache_bytes",
        "sluice_cache_admissions_total",
        "sluice_cache_evictions_total",
        "sluice_http_requests_total{route=\"/v1/completions\",status=\"200\"} 1",
    ] {
        assert!(metrics.contains(name), "{name} in\n{metrics}");
    }
}
