"""A chat over the API of OpenAI's clients: the answer of an adapter, or of the base, comes word by word.

chat.py --list shows the models. --model is one of them, or the path of an adapter that was saved for sampling.
"""

import argparse
import os
import sys

from openai import OpenAI


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("question", nargs="?", default="What is the capital of France?")
    arguments.add_argument("--base-url", default="http://127.0.0.1:5555", help="address of the server")
    arguments.add_argument("--model", help="the base, if not given")
    arguments.add_argument("--system", help="text of a system message")
    arguments.add_argument("--temperature", type=float, default=0.0)
    arguments.add_argument("--max-tokens", type=int, default=64)
    arguments.add_argument("--expect", metavar="TEXT", help="the goal: an answer with this text; else any answer")
    arguments.add_argument("--list", action="store_true", help="lists the models")
    args = arguments.parse_args()

    # The client wants some key, also where the server asks for none.
    client = OpenAI(base_url=f"{args.base_url}/v1", api_key=os.environ.get("TINKER_API_KEY", "tml-local"))
    models = [model.id for model in client.models.list()]
    if args.list:
        print(*models, sep="\n")
        return
    messages = [{"role": "system", "content": args.system}] if args.system else []
    stream = client.chat.completions.create(
        model=args.model or models[0],
        messages=[*messages, {"role": "user", "content": args.question}],
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        stream=True,
    )
    pieces, reason = [], None
    for event in stream:
        for choice in event.choices:
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
            print(pieces[-1], end="", flush=True)
    answer = "".join(pieces)
    print(f"\n{len(list(filter(None, pieces)))} pieces, ended by {reason}")
    sys.exit(0 if answer.strip() and (args.expect or "") in answer else 1)


if __name__ == "__main__":
    main()
