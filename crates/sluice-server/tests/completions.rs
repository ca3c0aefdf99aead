//! Completions and chats, whole and streamed, against the engine itself.

mod support;

use serde_json::{Value, json};
use sluice_engine::Sampler;
use support::{Server, engine, tokenizer};

/// What the engine alone says, greedily.
fn alone(prompt: &str, n: usize) -> String {
    let (mut engine, tokenizer) = (engine(1), tokenizer());
    let (mut sequence, mut sampler) = (engine.new_sequence(), Sampler::new(Default::default(), 2048));
    let (mut read, mut ids) = (tokenizer.encode_with_special(prompt), Vec::new());
    while ids.len() < n {
        let token = sampler.sample(engine.extend(&mut sequence, &read).unwrap()).token;
        if token == 1 {
            break;
        }
        ids.push(token);
        read = vec![token];
    }
    tokenizer.decode(&ids)
}

fn greedy(prompt: &str, n: usize) -> Value {
    json!({"model": "tiny", "prompt": prompt, "max_tokens": n, "temperature": 0})
}

fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn text_of(events: &[Value], index: u64) -> String {
    let pieces = events.iter().flat_map(|event| event["choices"].as_array().unwrap()).filter(|choice| choice["index"] == index);
    pieces.filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str())).collect()
}

#[test]
fn a_completion_is_what_the_engine_says_whole_and_in_pieces() {
    let server = Server::start(4, |_| {});
    for prompt in ["The river was", "A", "ship ".repeat(150).as_str()] {
        let want = alone(prompt, 30);
        let reply = server.post("/v1/completions", &greedy(prompt, 30)).ok();
        let choice = &reply["choices"][0];
        assert_eq!((reply["object"].as_str(), choice["text"].as_str()), (Some("text_completion"), Some(want.as_str())));
        let finish = choice["finish_reason"].as_str().unwrap();
        let usage = &reply["usage"];
        let prompt_tokens = tokenizer().encode_with_special(prompt).len();
        assert_eq!(usage["prompt_tokens"], prompt_tokens);
        assert!(finish == "stop" || usage["completion_tokens"] == 30);
        assert_eq!(usage["total_tokens"].as_u64(), Some(prompt_tokens as u64 + usage["completion_tokens"].as_u64().unwrap()));
        let body = with(greedy(prompt, 30), json!({"stream": true, "stream_options": {"include_usage": true}}));
        let events = server.post("/v1/completions", &body).events();
        assert_eq!(text_of(&events, 0), want);
        let last = events.last().unwrap();
        assert!(last["choices"].as_array().unwrap().is_empty() && last["usage"]["total_tokens"] == usage["total_tokens"], "{last}");
        assert_eq!(events[events.len() - 2]["choices"][0]["finish_reason"], finish);
    }
    let cached = server.post("/v1/completions", &greedy(&"ship ".repeat(150), 3)).ok();
    assert!(cached["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 64, "{cached}");
}

#[test]
fn the_same_seed_gives_the_same_answers_and_each_of_n_its_own() {
    let server = Server::start(4, |_| {});
    let body = with(greedy("Once", 16), json!({"temperature": 1.3, "seed": -7, "n": 3}));
    let texts = |reply: &Value| -> Vec<String> {
        reply["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect()
    };
    let first = texts(&server.post("/v1/completions", &body).ok());
    assert!(first.len() == 3 && first[0] != first[1] && first[1] != first[2], "{first:?}");
    assert_eq!(texts(&server.post("/v1/completions", &body).ok()), first);
    let other = with(body.clone(), json!({"seed": 8}));
    assert_ne!(texts(&server.post("/v1/completions", &other).ok()), first);
    let events = server.post("/v1/completions", &with(body, json!({"stream": true}))).events();
    assert_eq!((0..3).map(|i| text_of(&events, i)).collect::<Vec<_>>(), first);
    let unseeded = with(greedy("Once", 16), json!({"temperature": 1.3}));
    assert_ne!(server.post("/v1/completions", &unseeded).ok()["choices"], server.post("/v1/completions", &unseeded).ok()["choices"]);
}

#[test]
fn a_stop_string_ends_the_answer_before_it() {
    let server = Server::start(2, |_| {});
    let whole = alone("The sea", 40);
    let middle = whole.char_indices().map(|(at, _)| at).nth(20).unwrap();
    let stop: String = whole[middle..].chars().take(6).collect();
    let want = &whole[..whole.find(&stop).unwrap()];
    let body = with(greedy("The sea", 40), json!({"stop": ["never said", stop]}));
    let reply = server.post("/v1/completions", &body).ok();
    assert_eq!((reply["choices"][0]["text"].as_str(), reply["choices"][0]["finish_reason"].as_str()), (Some(want), Some("stop")));
    assert!(reply["usage"]["completion_tokens"].as_u64().unwrap() < 40);
    let events = server.post("/v1/completions", &with(body, json!({"stream": true}))).events();
    assert_eq!(text_of(&events, 0), want);
    server.wait_for_metric("sluice_slots_in_use", 0.0);
    // A stop token, too.
    let id = tokenizer().encode(&whole)[2];
    let reply = server.post("/v1/completions", &with(greedy("The sea", 40), json!({"stop_token_ids": [id]}))).ok();
    assert!(reply["choices"][0]["finish_reason"] == "stop" && whole.starts_with(reply["choices"][0]["text"].as_str().unwrap()));
}

#[test]
fn probabilities_come_in_the_form_of_each_endpoint() {
    let server = Server::start(2, |_| {});
    let reply = server.post("/v1/completions", &with(greedy("The", 6), json!({"logprobs": 3}))).ok();
    let logprobs = &reply["choices"][0]["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!((tokens.len(), logprobs["top_logprobs"].as_array().unwrap().len()), (6, 6));
    for i in 0..6 {
        let own = logprobs["token_logprobs"][i].as_f64().unwrap();
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        let best = top.values().map(|p| p.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert!(own <= 0.0 && own == best && top.len() == 3, "greedy takes the best: {logprobs}");
    }
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0,
        "logprobs": true, "top_logprobs": 2});
    let content = server.post("/v1/chat/completions", &chat).ok()["choices"][0]["logprobs"]["content"].clone();
    let content = content.as_array().unwrap();
    assert_eq!(content.len(), 5);
    assert!(content.iter().all(|t| t["top_logprobs"][0]["token"] == t["token"] && t["top_logprobs"].as_array().unwrap().len() == 2));
    let events = server.post("/v1/chat/completions", &with(chat, json!({"stream": true}))).events();
    let streamed: Vec<Value> = events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten().cloned().collect();
    assert_eq!(&streamed, content);
}

#[test]
fn a_chat_is_its_template_continued() {
    let server = Server::start(2, |_| {});
    let want = alone("[system]Be brief[/]\n[user]Hello[/]\n[assistant]", 20);
    let content = json!([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]);
    let body = json!({"model": "tiny", "temperature": 0, "max_completion_tokens": 20,
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": content}]});
    let reply = server.post("/v1/chat/completions", &body).ok();
    let message = &reply["choices"][0]["message"];
    assert_eq!((message["role"].as_str(), message["content"].as_str()), (Some("assistant"), Some(want.as_str())));
    assert_eq!(reply["object"], "chat.completion");
    let events = server.post("/v1/chat/completions", &with(body, json!({"stream": true}))).events();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(text_of(&events, 0), want);
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event["id"] == events[0]["id"]));
}

#[test]
fn kept_tokens_are_reported_with_their_texts() {
    let server = Server::start(1, |_| {});
    let prompt = "word ".repeat(50);
    let body = with(greedy(&prompt, 60), json!({"stream": true, "report_kept": true}));
    let events = server.post("/v1/completions", &body).events();
    let kept: Vec<&Value> = events.iter().map(|event| &event["kept"]).filter(|kept| !kept.is_null()).collect();
    let tokens = kept[0]["tokens"].as_array().unwrap();
    assert_eq!(tokens.iter().map(|t| t.as_str().unwrap()).collect::<String>(), prompt);
    assert!(kept.len() > 3 && kept[1]["tokens"].is_null());
    let sum = |kept: &Value| kept["layers"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>();
    for kept in &kept {
        assert_eq!((kept["layers"].as_array().unwrap().len(), kept["n_layers"].as_u64()), (tokens.len(), Some(2)));
        assert_eq!((kept["layers"][0].as_u64(), kept["layers"][1].as_u64()), (Some(2), Some(2)), "sinks stay");
    }
    assert!(sum(kept.last().unwrap()) < sum(kept[0]));
}

#[test]
fn many_at_once_get_what_each_gets_alone() {
    let server = Server::start(5, |config| config.queue = 40);
    let prompts: Vec<String> = (0..24).map(|i| format!("Chapter {i}. {}", "It was late. ".repeat(i * 3 % 40))).collect();
    let answers: Vec<String> = std::thread::scope(|scope| {
        let ask = |prompt: &str| {
            let events = server.post("/v1/completions", &with(greedy(prompt, 25), json!({"stream": true}))).events();
            text_of(&events, 0)
        };
        let threads: Vec<_> = prompts.iter().map(|prompt| scope.spawn(move || ask(prompt))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (prompt, answer) in prompts.iter().zip(answers) {
        assert_eq!(answer, alone(prompt, 25), "{prompt}");
    }
    assert_eq!(server.metric("sluice_slots_in_use"), 0.0);
    assert!(server.metric("sluice_batch_size_sum") > server.metric("sluice_batch_size_count"), "some ran together");
    assert!(server.metric("sluice_cache_evictions_total") > 0.0 && server.metric("sluice_cache_admissions_total") > 0.0);
    assert_eq!(server.metric("sluice_time_to_first_token_seconds_count"), 24.0);
}
