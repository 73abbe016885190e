#!/usr/bin/env python3
"""Compares what a model wrote before and after training with the reference answers.

    score.py HELDOUT.jsonl BEFORE.jsonl AFTER.jsonl [--examples 2]

HELDOUT holds chats that end with the reference answer; BEFORE and AFTER are what `xorl-dist generate --chat-file … --out …`
wrote: {"prompt_index", "completion", "loss_sum", "loss_tokens"} a line. An answer counts when its text equals the reference,
character by character, surrounding blanks apart. Prints examples side by side, then one line of JSON: exact_before and
exact_after (fractions), loss_before and loss_after (mean over the tokens of the reference answers), n. Standard library only.
"""
import argparse
import json
import sys
import textwrap


def read_jsonl(path: str) -> list[dict]:
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file if line.strip()]


def read_predictions(path: str, count: int) -> list[dict]:
    """The predictions in the order of the prompts; every prompt exactly once."""
    found = {p['prompt_index']: p for p in read_jsonl(path)}
    if sorted(found) != list(range(count)):
        sys.exit(f'score: {path}: expected an answer to each of {count} prompts, found {len(found)}')
    return [found[i] for i in range(count)]


def correct(prediction: dict, chat: dict) -> bool:
    return prediction['completion'].strip() == chat['messages'][-1]['content'].strip()


def exact(predictions: list[dict], chats: list[dict]) -> float:
    return sum(map(correct, predictions, chats)) / len(chats)


def mean_loss(predictions: list[dict]) -> float:
    return sum(p['loss_sum'] for p in predictions) / sum(p['loss_tokens'] for p in predictions)


def columns(left: str, right: str, width: int = 54) -> str:
    """Two texts side by side, wrapped."""
    def lines(text: str) -> list[str]:
        return [part for line in text.strip().splitlines() for part in textwrap.wrap(line, width) or ['']]

    a, b = lines(left), lines(right)
    rows = max(len(a), len(b))
    pairs = zip(a + [''] * (rows - len(a)), b + [''] * (rows - len(b)))
    return '\n'.join(f'  {x:<{width}} | {y}'.rstrip() for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('heldout')
    parser.add_argument('before')
    parser.add_argument('after')
    parser.add_argument('--examples', type=int, default=2)
    args = parser.parse_args()
    chats = read_jsonl(args.heldout)
    before, after = (read_predictions(path, len(chats)) for path in (args.before, args.after))

    # The first ones: chosen by their place, not by their result.
    for chat, old, new in list(zip(chats, before, after))[:args.examples]:
        print(f"\n{chat['messages'][-2]['content']}")
        print(columns('BEFORE', 'AFTER' + (' (right)' if correct(new, chat) else ' (wrong)')))
        print(columns(old['completion'], new['completion']))
    print()
    print(json.dumps({
        'exact_before': round(exact(before, chats), 4), 'exact_after': round(exact(after, chats), 4),
        'loss_before': round(mean_loss(before), 4), 'loss_after': round(mean_loss(after), 4), 'n': len(chats),
    }))


if __name__ == '__main__':
    main()
