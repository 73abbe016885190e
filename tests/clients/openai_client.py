"""Every call of OpenAI's that the server answers, as users of the `openai` package write it.

    openai_client.py URL KEY MODEL

Against the tests' double, whose tokens follow each other. Prints "done" where all went as expected.
"""

import sys

import openai

URL, KEY, MODEL = sys.argv[1:]
HELLO = [{"role": "user", "content": "hi"}]


def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
        return error
    raise AssertionError(f"no {kind.__name__}")


def models(client):
    listed = [model.id for model in client.models.list()]
    assert listed == [MODEL, "policy_v1"], listed
    assert client.models.retrieve(MODEL).id == MODEL
    raises(openai.NotFoundError, lambda: client.models.retrieve("none"), "none")


def chats(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=4, n=2, logprobs=True, top_logprobs=2, seed=5, temperature=0.5
    )
    assert [choice.message.content for choice in answer.choices] == ["89:;", "9:;<"], answer
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    scores = answer.choices[0].logprobs.content
    assert [score.token for score in scores] == list("89:;") and scores[0].logprob == -0.5
    assert len(scores[0].top_logprobs) == 2 and scores[0].bytes == [56]
    assert answer.usage.completion_tokens == 8 and answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    # An answer can be sent back as it came.
    more = [*HELLO, answer.choices[0].message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "on"}]}]
    again = client.chat.completions.create(model=MODEL, messages=more, max_tokens=2)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def streams(client):
    parts, reason, usage = [], None, None
    for event in client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, stop=["=", ";<"], stream=True, stream_options={"include_usage": True}
    ):
        if event.choices:
            parts.append(event.choices[0].delta.content or "")
            reason = event.choices[0].finish_reason or reason
        usage = event.usage or usage
    assert ("".join(parts), reason, usage.completion_tokens) == ("89:", "stop", 5), (parts, reason, usage)
    # The client's own helper, which raises where an answer ends by its length.
    with client.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=9, stop=";") as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "89:", final
    texts = client.completions.create(model=MODEL, prompt="A", max_tokens=3, stream=True)
    assert "".join(event.choices[0].text for event in texts) == "ABC"


def completions(client):
    answer = client.completions.create(model=MODEL, prompt=["A", "a"], max_tokens=2, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["AAB", "aab"], answer
    scores = answer.choices[0].logprobs
    assert scores.tokens == ["A", "A", "B"] and scores.token_logprobs == [None, -0.5, -0.5]
    assert scores.text_offset == [0, 1, 2] and scores.top_logprobs[0] is None
    ids = client.completions.create(model=MODEL, prompt=[[32], [64, 1]], max_tokens=1, extra_body={"top_k": 3})
    assert [choice.text for choice in ids.choices] == ["A", "a"], ids


def refusals(client):
    create = client.completions.create
    wrong = raises(openai.BadRequestError, lambda: create(model=MODEL, prompt="A", suffix="b"), "suffix")
    assert wrong.param == "suffix" and wrong.type == "invalid_request_error", wrong
    absent = raises(openai.NotFoundError, lambda: create(model="none", prompt="A"), "none")
    assert absent.code == "model_not_found", absent
    long = raises(openai.BadRequestError, lambda: create(model=MODEL, prompt="A" * 2000), "context")
    assert long.code == "context_length_exceeded", long
    raises(openai.BadRequestError, lambda: list(create(model=MODEL, prompt="A", temperature=-1, stream=True)), "temperature")
    stranger = openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, lambda: stranger.completions.create(model=MODEL, prompt="A"), "key")


def main():
    client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=30)
    for check in (models, chats, streams, completions, refusals):
        check(client)
    print("done")


main()
