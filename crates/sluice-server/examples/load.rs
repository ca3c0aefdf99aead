//! Load on a running server: many streams with random arrival, prompts of 1 to N tokens, a third of the clients hanging up; then
//! every stream that was heard to its end is asked for again alone and must be the same to the byte.
//!
//! `cargo run --release -p sluice-server --example load -- --address 127.0.0.1:8080 --pid PID --streams 200 --seconds 600`
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example is a program")]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice_testkit::Rng;

struct Options {
    address: String,
    pid: u32,
    streams: usize,
    max_prompt: usize,
    max_tokens: usize,
    /// New rounds begin until this is over.
    seconds: u64,
    /// In which the streams of a round arrive.
    arrival: f64,
    vocab: usize,
}

impl Options {
    fn parse() -> Self {
        let mut options = Self {
            address: "127.0.0.1:8080".into(),
            pid: 0,
            streams: 200,
            max_prompt: 8000,
            max_tokens: 64,
            seconds: 600,
            arrival: 30.0,
            vocab: 2000,
        };
        let mut args = std::env::args().skip(1);
        while let Some(name) = args.next() {
            let value = args.next().unwrap_or_else(|| panic!("{name} needs a value"));
            match name.as_str() {
                "--address" => options.address = value,
                "--pid" => options.pid = value.parse().expect("--pid N"),
                "--streams" => options.streams = value.parse().expect("--streams N"),
                "--max-prompt" => options.max_prompt = value.parse().expect("--max-prompt N"),
                "--max-tokens" => options.max_tokens = value.parse().expect("--max-tokens N"),
                "--seconds" => options.seconds = value.parse().expect("--seconds N"),
                "--arrival" => options.arrival = value.parse().expect("--arrival SECONDS"),
                "--vocab" => options.vocab = value.parse().expect("--vocab N"),
                other => panic!("unknown option {other}"),
            }
        }
        options
    }
}

/// One client's part.
#[derive(Clone)]
struct Client {
    prompt: Vec<usize>,
    arrives: Duration,
    /// Goes away after this many events; 0 at once, while its prompt waits or is read.
    leaves_after: Option<usize>,
}

enum Heard {
    Whole { text: String, first: Duration, tokens: usize },
    Left,
}

fn main() {
    let options = Options::parse();
    let model = get(&options, "/v1/models")["data"][0]["id"].as_str().expect("a model").to_string();
    let (started, mut rng) = (Instant::now(), Rng::new(1));
    let (mut round, mut rounds, mut problems) = (0, Vec::new(), Vec::new());
    let mut survivors: Vec<(Vec<usize>, String)> = Vec::new();
    while round == 0 || started.elapsed() < Duration::from_secs(options.seconds) {
        let clients: Vec<Client> = (0..options.streams).map(|i| client(&options, i, &mut rng)).collect();
        let began = Instant::now();
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for client in &clients {
                let (results, options, model) = (&results, &options, &model);
                scope.spawn(move || {
                    std::thread::sleep(client.arrives);
                    let heard = ask(options, model, &client.prompt, client.leaves_after);
                    results.lock().expect("no client panics").push((client, heard));
                });
            }
        });
        let seconds = began.elapsed().as_secs_f64();
        let (mut firsts, mut tokens, mut left) = (Vec::new(), 0, 0);
        for (client, heard) in results.into_inner().expect("no client panics") {
            match heard {
                Ok(Heard::Whole { text, first, tokens: n }) => {
                    firsts.push(first.as_secs_f64());
                    tokens += n;
                    survivors.push((client.prompt.clone(), text));
                }
                Ok(Heard::Left) => left += 1,
                Err(problem) => problems.push(format!("prompt of {} tokens: {problem}", client.prompt.len())),
            }
        }
        firsts.sort_by(f64::total_cmp);
        // Whoever left is noticed at once; a moment for the last of them.
        std::thread::sleep(Duration::from_millis(300));
        let quantile = |q: f64| firsts.get(((firsts.len() as f64 - 1.0) * q) as usize).copied();
        let row = json!({"seconds": seconds, "whole": firsts.len(), "left": left, "tokens": tokens, "first_token_p50": quantile(0.5),
            "first_token_p95": quantile(0.95), "resident_bytes": resident_bytes(options.pid), "slots_in_use": metric(&options, "sluice_slots_in_use")});
        eprintln!("round {round}: {row}");
        rounds.push(row);
        round += 1;
    }
    // Alone now, one after the other.
    let mut different = 0;
    for (prompt, text) in &survivors {
        match ask(&options, &model, prompt, None) {
            Ok(Heard::Whole { text: alone, .. }) => different += usize::from(alone != *text),
            _ => different += 1,
        }
    }
    problems.truncate(20);
    let report = json!({
        "streams_at_once": options.streams, "max_prompt": options.max_prompt, "max_tokens": options.max_tokens, "rounds": rounds,
        "errors": problems.len(), "problems": problems, "survivors_compared_with_solo_run": survivors.len(), "different": different,
        "resident_bytes_at_end": resident_bytes(options.pid), "generated_tokens": metric(&options, "sluice_generated_tokens_total"),
        "prompt_tokens": metric(&options, "sluice_prompt_tokens_total"), "cancelled": metric(&options, "sluice_requests_cancelled_total"),
        "batch_size_mean": metric(&options, "sluice_batch_size_sum") / metric(&options, "sluice_batch_size_count"),
    });
    println!("{report}");
    assert!(problems.is_empty() && different == 0, "{} errors, {different} different", problems.len());
}

/// Lengths are spread over their logarithms: short prompts are usual, long ones happen.
fn client(options: &Options, i: usize, rng: &mut Rng) -> Client {
    let len = (options.max_prompt as f64).powf(rng.uniform().abs() as f64).round().max(1.0) as usize;
    let len = if i == 0 {
        options.max_prompt
    } else if i == 1 {
        1
    } else {
        len
    };
    let prompt = (0..len).map(|_| 3 + rng.below(options.vocab - 3)).collect();
    let arrives = Duration::from_secs_f64(options.arrival * rng.uniform().abs() as f64);
    let leaves_after = (i % 3 == 2).then(|| rng.below(options.max_tokens / 2));
    Client { prompt, arrives, leaves_after }
}

fn ask(options: &Options, model: &str, prompt: &[usize], leaves_after: Option<usize>) -> Result<Heard, String> {
    let body = json!({"model": model, "prompt": prompt, "max_tokens": options.max_tokens, "temperature": 0, "stream": true}).to_string();
    let began = Instant::now();
    let mut stream = TcpStream::connect(&options.address).map_err(|e| e.to_string())?;
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).map_err(|e| e.to_string())?;
    if leaves_after == Some(0) {
        std::thread::sleep(Duration::from_millis(100));
        return Ok(Heard::Left);
    }
    let (mut text, mut first, mut events, mut status) = (String::new(), None, 0, String::new());
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(|e| e.to_string())?;
        if status.is_empty() {
            status = line;
            if !status.contains(" 200 ") {
                return Err(status);
            }
            continue;
        }
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            return Ok(Heard::Whole { text, first: first.unwrap_or_default(), tokens: events });
        }
        let event: Value = serde_json::from_str(data).map_err(|e| format!("{e}: {data}"))?;
        let Some(piece) = event["choices"][0]["text"].as_str() else { return Err(data.to_string()) };
        text.push_str(piece);
        events += 1;
        first.get_or_insert_with(|| began.elapsed());
        if leaves_after.is_some_and(|n| events >= n) {
            return Ok(Heard::Left);
        }
    }
    Err("the stream ended without [DONE]".into())
}

fn fetch(options: &Options, path: &str) -> String {
    let mut stream = TcpStream::connect(&options.address).expect("the server listens");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).expect("a request is sent");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut stream, &mut text).expect("a reply of text");
    text.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default()
}

fn get(options: &Options, path: &str) -> Value {
    serde_json::from_str(&fetch(options, path)).expect("JSON")
}

fn metric(options: &Options, name: &str) -> f64 {
    let text = fetch(options, "/metrics");
    let line = text.lines().find(|line| line.split(' ').next() == Some(name));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(f64::NAN)
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
