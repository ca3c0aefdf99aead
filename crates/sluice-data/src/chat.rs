//! Chat messages to the text that a model was trained on, by the Jinja template of its checkpoint.
//! Knows nothing about token ids: encode the result with [`Tokenizer::encode_chat`](crate::Tokenizer::encode_chat).

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, State, context};
use serde::{Deserialize, Serialize};

use crate::Tokenizer;

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of this role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A chat template that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A base model, or a folder without `tokenizer_config.json`.
    #[error("the checkpoint has no chat template; use plain text completion, or a checkpoint tuned for chat")]
    Missing,
    /// The template does not parse, or uses a feature that we lack.
    #[error("the checkpoint's chat template does not parse: {0}")]
    Syntax(String),
    /// The template refused the messages or failed on them.
    #[error("the checkpoint's chat template failed: {0}")]
    Render(String),
}

/// Templates come with the checkpoint and may loop for ever; real ones use a few hundred steps a message.
const FUEL: u64 = 20_000_000;

/// A parsed chat template.
///
/// As transformers does: blocks are trimmed, `raise_exception` and `tojson` exist, Python's string and dict methods work.
/// There is no `strftime_now`: templates that test for it fall back to a fixed date, so the same chat gives the same text.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The template of a tokenizer's checkpoint.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, ChatError> {
        let template = tokenizer.text_config().chat_template.as_deref().ok_or(ChatError::Missing)?;
        let spelled = |id: Option<u32>| id.map(|id| tokenizer.decode_with_special(&[id])).unwrap_or_default();
        Self::new(template, &spelled(tokenizer.bos()), &spelled(tokenizer.eos().first().copied()))
    }

    /// Parse a template that may refer to `bos_token` and `eos_token`.
    pub fn new(template: &str, bos_token: &str, eos_token: &str) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("the usual delimiters are valid");
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", template.to_string()).map_err(|e| ChatError::Syntax(said(&e)))?;
        Ok(Self { environment, bos_token: bos_token.into(), eos_token: eos_token.into() })
    }

    /// Text of a chat. `add_generation_prompt` ends it where the assistant's answer begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let messages: Vec<Value> =
            messages.iter().map(|m| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())])).collect();
        let context = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let template = self.environment.get_template("chat").expect("added by new");
        template.render(context).map_err(|e| ChatError::Render(said(&e)))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos_token", &self.bos_token).finish_non_exhaustive()
    }
}

/// Templates call this on chats they do not support.
fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False)`: the built-in filter escapes for HTML and leaves no spaces, which are other tokens.
fn to_json(_: &State, value: Value) -> Result<String, Error> {
    let value = serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
    let mut out = String::new();
    write_json(&value, &mut out);
    Ok(out)
}

fn write_json(value: &serde_json::Value, out: &mut String) {
    use serde_json::Value as Json;
    let separate = |i: usize, out: &mut String| {
        if i > 0 {
            out.push_str(", ");
        }
    };
    match value {
        Json::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                separate(i, out);
                write_json(item, out);
            }
            out.push(']');
        }
        Json::Object(fields) => {
            out.push('{');
            for (i, (key, item)) in fields.iter().enumerate() {
                separate(i, out);
                out.push_str(&Json::from(key.as_str()).to_string());
                out.push_str(": ");
                write_json(item, out);
            }
            out.push('}');
        }
        plain => out.push_str(&plain.to_string()),
    }
}

/// What went wrong and on which line, without the template's source.
fn said(error: &Error) -> String {
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    match error.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMOL: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn render(template: &str, messages: &[Message]) -> Result<String, ChatError> {
        ChatTemplate::new(template, "<s>", "</s>")?.render(messages, true)
    }

    #[test]
    fn smollm_template_gives_the_text_that_jinja_gives() {
        let text = render(SMOL, &[Message::new("user", "Hi <b>you</b>\n")]).unwrap();
        let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                        <|im_start|>user\nHi <b>you</b>\n<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn python_methods_blocks_and_special_tokens_work_as_in_transformers() {
        let template = "{{ bos_token }}\n{%- for m in messages %}\n    {%- set t = m.content.strip().upper() %}\n    \
                        {%- if not t.startswith('NO') %}{{ t }}{{ eos_token }}{% endif %}\n{%- endfor %}\n\
                        {% if strftime_now is defined %}date{% endif %}\n";
        let text = render(template, &[Message::new("user", "  yes "), Message::new("user", "no")]).unwrap();
        // What Jinja2 gives: newlines after blocks are trimmed, so is the one that ends the template.
        assert_eq!(text, "<s>YES</s>");
    }

    #[test]
    fn tojson_is_pythons() {
        let text = render("{{ messages | tojson }}", &[Message::new("user", "a<'é\"")]).unwrap();
        assert!(text.contains("\"role\": \"user\"") && text.contains(r#""a<'é\"""#) && text.contains(", "), "{text}");
    }

    #[test]
    fn bad_templates_and_refused_chats_are_errors() {
        let hello = [Message::new("user", "hello")];
        for (template, word) in [
            ("{% if %}", "parse"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}", "fuel"),
            ("{{ messages[0].content.nonsense() }}", "nonsense"),
        ] {
            let error = render(template, &hello).unwrap_err().to_string();
            assert!(error.contains(word), "{template}: {error}");
        }
    }
}
