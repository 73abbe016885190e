"""Shared by the examples: arguments, the connection, chats as data, and the end that says if a goal was reached."""

import argparse
import os
import sys

import tinker
from tinker import types


def parser(description):
    """Arguments that every example has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:5555", help="address of the server")
    return parser


def connect(base_url):
    """The service, and the name of the one model that it trains."""
    # The client wants a key that begins so, also where the server asks for none.
    where = {"base_url": base_url, "api_key": os.environ.get("TINKER_API_KEY", "tml-local")}
    (model,) = tinker.RestClient(**where).get_server_capabilities().result().supported_models
    return tinker.ServiceClient(**where), model.model_name


def prompt_tokens(tokenizer, *messages):
    """Tokens of a chat up to where the assistant begins; `messages` are (role, text), or the user's text alone."""
    chat = [("user", message) if isinstance(message, str) else message for message in messages]
    chat = [{"role": role, "content": text} for role, text in chat]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def answer_tokens(tokenizer, answer):
    """Tokens of an answer and its end."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


def datum(prompt, answer):
    """`prompt` and `answer`, both tokens, as data for cross_entropy: weight 1 on the tokens of the answer, 0 before."""
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    return types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})


def text_of(tokenizer, sequence):
    """A sampled answer as text, without its end."""
    return tokenizer.decode(sequence.tokens, skip_special_tokens=True).strip()


def train(client, data, learning_rate, loss_fn="cross_entropy"):
    """One pass and one update, sent together; returns the result of the pass."""
    passed = client.forward_backward(data, loss_fn)
    stepped = client.optim_step(types.AdamParams(learning_rate=learning_rate))
    stepped.result()
    return passed.result()


def finish(is_reached, goal):
    """Ends the program: code 0 if the goal was reached, else 1."""
    print(f"{'reached' if is_reached else 'NOT reached'}: {goal}")
    sys.exit(0 if is_reached else 1)
