"""The official `openai` client against a running server: list, chat, stream, stop, logprobs, errors.

usage: openai_client.py BASE_URL API_KEY
Exits with 77 where the package is missing. `crates/sluice-cli/tests/openai_client.rs` starts a server and runs this.
"""

import sys

try:
    import openai
except ImportError:
    print("the package `openai` is missing; python3 -m pip install openai")
    sys.exit(77)


def raises(kind, call, word):
    try:
        call()
    except kind as error:
        assert word in str(error), f"{word!r} in {error}"
        return error
    raise AssertionError(f"no {kind.__name__}")


def main(base_url, key):
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)

    models = client.models.list().data
    assert len(models) == 1, models
    model = models[0].id
    assert client.models.retrieve(model).id == model
    print("list            ", model)

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the river go?"}]
    chat = dict(model=model, messages=messages, temperature=0, max_tokens=24)
    whole = client.chat.completions.create(**chat)
    answer = whole.choices[0].message.content
    assert whole.choices[0].message.role == "assistant" and answer, whole
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")
    print("chat            ", repr(answer[:50]), whole.usage.completion_tokens, "tokens")

    stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    pieces, usage, finish = [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
    assert "".join(pieces) == answer and len(pieces) > 2, (pieces, answer)
    assert usage.completion_tokens == whole.usage.completion_tokens and finish == whole.choices[0].finish_reason
    print("stream          ", len(pieces), "pieces, the same text")

    early = client.chat.completions.create(**chat, stream=True)
    next(iter(early))
    early.close()
    print("closed early    ", "a stream")

    several = client.chat.completions.create(model=model, messages=messages, n=2, seed=5, temperature=1.2, max_tokens=12)
    again = client.chat.completions.create(model=model, messages=messages, n=2, seed=5, temperature=1.2, max_tokens=12)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [choice.message.content for choice in again.choices] and texts[0] != texts[1], texts
    print("n, seed         ", "two answers, the same ones twice")

    completion = dict(model=model, prompt="The river", temperature=0, max_tokens=24)
    text = client.completions.create(**completion).choices[0].text
    stop = text[len(text) // 2 :][:4]
    stopped = client.completions.create(**completion, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(stop)], (text, stop, stopped)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**completion, stream=True))
    assert streamed == text
    print("completion, stop", repr(stopped.text), "before", repr(stop))

    logprobs = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(logprobs) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 and token.token == token.top_logprobs[0].token for token in logprobs)
    legacy = client.completions.create(**completion, logprobs=2).choices[0].logprobs
    assert len(legacy.tokens) == len(legacy.token_logprobs) == len(legacy.top_logprobs) == len(legacy.text_offset)
    print("logprobs        ", repr(logprobs[0].token), f"{logprobs[0].logprob:.3f}")

    biased = client.chat.completions.create(**chat, logit_bias={str(100): 100}, logprobs=True).choices[0].logprobs.content
    assert len({token.token for token in biased}) == 1, "a bias of 100 leaves one token"
    print("logit_bias      ", repr(biased[0].token))

    missing = raises(openai.NotFoundError, lambda: client.chat.completions.create(**{**chat, "model": "gpt-4"}), "gpt-4")
    assert missing.code == "model_not_found"
    wrong = raises(openai.BadRequestError, lambda: client.chat.completions.create(**{**chat, "temperature": "hot"}), "temperature")
    assert wrong.param == "temperature", wrong.param
    long = {**completion, "prompt": "river " * 20000}
    assert raises(openai.BadRequestError, lambda: client.completions.create(**long), "tokens").code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: stranger.models.list(), "API key")
    print("errors          ", "NotFound, BadRequest, too long, Authentication")

    session = client.post("/sessions", cast_to=object, body={"model": model, "messages": messages[:1]})
    more = client.chat.completions.create(**{**chat, "messages": messages[1:]}, extra_body={"session_id": session["id"]})
    assert more.choices[0].message.content == answer
    print("session         ", session["id"][:16], "answers as the whole conversation does")
    print(f"openai {openai.__version__}: all passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
