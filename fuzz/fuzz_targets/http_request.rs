//! Bodies of requests, parsed and planned as every kind. `cargo +nightly fuzz run http_request`; the same function runs in
//! `crates/sluice-server/tests/any_body.rs`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sluice_data::{ChatTemplate, embedded};
use sluice_server::plan::{ModelFacts, read_as_every_kind};

static FACTS: LazyLock<ModelFacts> = LazyLock::new(|| ModelFacts {
    name: "tiny".into(),
    tokenizer: embedded::tokenizer().into(),
    template: Some(
        ChatTemplate::new("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "", "").expect("the template is valid"),
    ),
    vocab_size: 2048,
    max_context: 300,
    max_choices: 4,
});

fuzz_target!(|body: &[u8]| {
    read_as_every_kind(&FACTS, body);
});
