//! No body makes the server panic, and what is accepted can be computed: the function of the fuzz target, on random bodies.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use sluice_data::{ChatTemplate, embedded};
use sluice_server::plan::{ModelFacts, read_as_every_kind};

static FACTS: LazyLock<ModelFacts> = LazyLock::new(|| ModelFacts {
    name: "tiny".into(),
    tokenizer: embedded::tokenizer().into(),
    template: Some(ChatTemplate::new("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "", "").unwrap()),
    vocab_size: 2048,
    max_context: 300,
    max_choices: 4,
});

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3i64..3000).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2.0..2.0f64).prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 5, |inner| {
        let key = prop_oneof!["[a-z_]{1,12}", Just("type".to_string()), Just("text".to_string()), Just("role".to_string()), "[0-9]{1,5}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..4).prop_map(|map| map.into_iter().collect::<serde_json::Map<_, _>>().into()),
        ]
    })
}

const FIELDS: [&str; 26] = [
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "user",
    "session_id",
    "report_kept",
    "logprobs",
    "top_logprobs",
    "echo",
    "tools",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes(body in prop::collection::vec(any::<u8>(), 0..200)) {
        read_as_every_kind(&FACTS, &body);
    }

    #[test]
    fn any_json(body in value()) {
        read_as_every_kind(&FACTS, body.to_string().as_bytes());
    }

    #[test]
    fn good_bodies_with_anything_in_some_fields(
        chat in any::<bool>(),
        changes in prop::collection::vec((prop::sample::select(&FIELDS[..]), value()), 0..4),
        cut in prop::option::of(0usize..400),
    ) {
        let mut body = if chat { json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}) } else { json!({"model": "tiny", "prompt": "Hi"}) };
        changes.into_iter().for_each(|(field, value)| body[field] = value);
        let text = body.to_string();
        let text = &text.as_bytes()[..cut.unwrap_or(text.len()).min(text.len())];
        read_as_every_kind(&FACTS, text);
    }
}

#[test]
fn good_bodies_are_planned() {
    // A prompt is a session's too, when it comes without options.
    assert_eq!(read_as_every_kind(&FACTS, br#"{"model": "tiny", "prompt": "Hi"}"#), 2);
    assert_eq!(read_as_every_kind(&FACTS, br#"{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "n": 2}"#), 1);
    assert_eq!(read_as_every_kind(&FACTS, br#"{"model": "tiny"}"#), 0);
}
