use proptest::prelude::*;

use super::*;

/// The 256 letters that byte-level BPE writes bytes with, in byte order (GPT-2's `bytes_to_unicode`).
fn byte_alphabet() -> Vec<String> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256u32)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

/// 256 bytes, the tokens of `merges`, then two control tokens, one user-defined and one unused.
fn gguf(pre: &str) -> GgufTokenizer {
    let mut tokens = byte_alphabet();
    let merges: Vec<String> = ["t h", "th e", "Ġ the", "1 2", "12 3", "a b", "h i", "' s", "' S"].iter().map(|m| m.to_string()).collect();
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    let mut token_types = vec![1; tokens.len()];
    for (token, kind) in [("<|bos|>", CONTROL), ("<|eos|>", CONTROL), ("<tool>", USER_DEFINED), ("[PAD9]", UNUSED)] {
        tokens.push(token.into());
        token_types.push(kind);
    }
    GgufTokenizer { model: "gpt2".into(), pre: pre.into(), tokens, merges, token_types, add_bos: false }
}

fn build(metadata: &GgufTokenizer) -> Tokenizer {
    let bos = metadata.tokens.iter().position(|t| t == "<|bos|>").unwrap() as u32;
    let text = TextConfig { bos: Some(bos), eos: vec![bos + 1], chat_template: None };
    Tokenizer::from_source(&TokenizerSource::Gguf(metadata.clone()), &text).unwrap()
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    tokenizer.encode(text).iter().map(|&id| tokenizer.decode_with_special(&[id])).collect()
}

#[test]
fn each_pre_tokenizer_splits_digits_and_contractions_its_own_way() {
    for (pre, text, expected) in [
        ("smollm", "the the 123", vec!["the", " the", " ", "1", "2", "3"]),
        ("gpt-2", "the the 123", vec!["the", " the", " ", "123"]),
        ("qwen2", "the the 123", vec!["the", " the", " ", "1", "2", "3"]),
        ("llama-bpe", "the the 1234", vec!["the", " the", " ", "123", "4"]),
        // Only the later families treat capital contractions as one piece.
        ("gpt-2", "AB'S", vec!["A", "B", "'", "S"]),
        ("qwen2", "AB'S", vec!["A", "B", "'S"]),
    ] {
        assert_eq!(pieces(&build(&gguf(pre)), text), expected, "{pre}: {text}");
    }
}

#[test]
fn special_tokens_are_parsed_only_when_asked_for() {
    let tokenizer = build(&gguf("smollm"));
    let bos = tokenizer.bos().unwrap();
    let text = "<|bos|>hi<|eos|>";
    let raw = tokenizer.encode(text);
    assert!(!raw.contains(&bos), "{raw:?}");
    assert_eq!(tokenizer.decode(&raw), text);
    let parsed = tokenizer.encode_chat(text);
    assert_eq!(parsed.len(), 3);
    assert_eq!((parsed[0], parsed[2]), (bos, bos + 1));
    assert_eq!(tokenizer.decode(&parsed), "hi");
    assert_eq!(tokenizer.decode_with_special(&parsed), text);
    // A user-defined token is one token in any text.
    assert_eq!(tokenizer.encode("<tool>"), vec![bos + 2]);
}

#[test]
fn prefix_is_the_bos_when_the_file_asks_for_it() {
    let mut metadata = gguf("llama-bpe");
    assert!(build(&metadata).prefix().is_empty());
    metadata.add_bos = true;
    let tokenizer = build(&metadata);
    let bos = tokenizer.bos().unwrap();
    assert_eq!(tokenizer.prefix(), [bos]);
    assert_eq!(tokenizer.encode_with_special("hi")[0], bos);
    assert_ne!(tokenizer.encode("hi")[0], bos);
    assert_ne!(tokenizer.encode_chat("hi")[0], bos);
}

#[test]
fn exported_json_gives_the_same_ids() {
    for pre in ["smollm", "qwen2", "gpt-2", "llama-bpe"] {
        let mut metadata = gguf(pre);
        metadata.add_bos = true;
        let tokenizer = build(&metadata);
        let again = Tokenizer::from_json(&tokenizer.to_json(), tokenizer.text_config()).unwrap();
        let text = "<|bos|>the 123's\n\n  naïve <tool> ab\u{301}";
        assert_eq!(tokenizer.encode(text), again.encode(text), "{pre}");
        assert_eq!(tokenizer.encode_with_special(text), again.encode_with_special(text), "{pre}");
        assert_eq!(tokenizer.vocab_size(), again.vocab_size(), "{pre}");
    }
}

#[test]
fn unused_ids_are_no_tokens_and_decode_to_nothing() {
    let metadata = gguf("smollm");
    let tokenizer = build(&metadata);
    assert_eq!(tokenizer.vocab_size(), metadata.tokens.len() - 1);
    assert_eq!(tokenizer.decode_with_special(&[metadata.tokens.len() as u32 - 1]), "");
}

#[test]
fn a_model_with_too_few_rows_is_refused_with_both_sizes() {
    let tokenizer = build(&gguf("smollm"));
    tokenizer.check_fits(268).unwrap();
    tokenizer.check_fits(300).unwrap();
    let error = tokenizer.check_fits(100).unwrap_err().to_string();
    assert!(error.contains("268") && error.contains("100"), "{error}");
}

#[test]
fn what_we_do_not_implement_or_cannot_trust_is_refused() {
    type Damage = fn(&mut GgufTokenizer);
    let cases: [(Damage, &str); 7] = [
        (|g| g.pre = "chameleon".into(), "chameleon"),
        (|g| g.model = "llama".into(), "`llama`"),
        (|g| g.merges.push("the".into()), "merge 9"),
        (|g| g.merges.push("zz yy".into()), "merges"),
        (|g| g.tokens[5] = g.tokens[6].clone(), "twice"),
        (|g| g.token_types.truncate(3), "token types"),
        (|g| g.tokens.clear(), "no tokens"),
    ];
    for (damage, word) in cases {
        let mut metadata = gguf("smollm");
        damage(&mut metadata);
        let error = Tokenizer::from_source(&TokenizerSource::Gguf(metadata), &TextConfig::default()).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    let error = Tokenizer::from_source(&TokenizerSource::Missing, &TextConfig::default()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let nowhere = TokenizerSource::Json("nowhere/tokenizer.json".into());
    let error = Tokenizer::from_source(&nowhere, &TextConfig::default()).unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
}

#[test]
fn stream_holds_back_a_character_until_it_is_whole() {
    let tokenizer = build(&gguf("gpt-2"));
    let ids = tokenizer.encode("é!");
    assert_eq!(ids.len(), 3, "two bytes and an exclamation mark");
    let mut stream = tokenizer.stream();
    assert_eq!(stream.push(ids[0]), "");
    assert_eq!(stream.push(ids[1]), "é");
    assert_eq!(stream.push(ids[2]), "!");
    assert_eq!(stream.finish(), "");
    let mut cut_off = tokenizer.stream();
    assert_eq!(cut_off.push(ids[0]), "");
    assert_eq!(cut_off.finish(), "\u{FFFD}");
}

proptest! {
    #[test]
    fn any_text_survives_and_streaming_agrees(text in "\\PC{0,40}|[a-z \n0-9']{0,60}") {
        for pre in ["smollm", "gpt-2", "llama-bpe"] {
            let tokenizer = build(&gguf(pre));
            let ids = tokenizer.encode(&text);
            prop_assert_eq!(&tokenizer.decode(&ids), &text);
            let mut stream = tokenizer.stream();
            let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
            streamed += &stream.finish();
            prop_assert_eq!(&streamed, &text);
        }
    }

    #[test]
    fn streaming_agrees_on_any_ids(ids in prop::collection::vec(0u32..256, 0..40)) {
        let tokenizer = build(&gguf("gpt-2"));
        let mut stream = tokenizer.stream();
        let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
        streamed += &stream.finish();
        prop_assert_eq!(streamed, tokenizer.decode(&ids));
    }
}
