"""Greedy text and log-probabilities of a server beside those of transformers and PEFT: SmolLM2 in fp32, its base and an
adapter that the server has trained.

    greedy.py --binary target/release/xorl-dist [--ranks 2] [--tokens 48] [--prompts 50]

Prompts go as text, half of them rendered by the chat template, all at once over `/generate`; each is continued until the
model ends it or `--tokens` are there. PEFT loads what `save_weights_for_sampler` wrote. Compared are, of each prompt:

- tokens and text: all equal. Where two tokens are as likely as rounding allows (their logits within TIE), it is a tie:
  counted apart, and what follows is not compared;
- log-probabilities of these tokens, and of the prompt's (`/v1/completions` with echo), within 1e-4.

Exit code 1 if one differs. The last line is JSON; `smallest_margin` is the least gap between the best two logits.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from serving import ROOT, Server
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path[:0] = [str(ROOT / "tests/clients")]
from raw import Connection, Refused, pass_body  # noqa: E402

MODEL = ROOT / "models/smollm2"
NEAR, TIE = 1e-4, 1e-4
BATCH = 10
TOPICS = (
    "the sea|a small bakery|glass|the number seven|bees|old maps|a train at night|salt|winter in the mountains|the first telephone|"
    "paper|a lost key|volcanoes|tea|clocks|the city of Lisbon|whales|a broken radio|gravity|chess|rivers that run dry|bread|"
    "the alphabet|moss|a very long and winding road through three countries"
).split("|")
ADAM = {"learning_rate": 2e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 1.0}
STEPS = 6


def prompts(tokenizer, count):
    def chat(topic):
        messages = [{"role": "user", "content": f"Tell me something about {topic}."}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    pairs = ((f"Everybody should know that {topic}", chat(topic)) for topic in TOPICS)
    return list(itertools.islice(itertools.chain.from_iterable(pairs), count))


async def train(port, model, tokenizer):
    """An adapter that speaks in another way; the path of its save."""
    connection = Connection(port)
    await connection.ask("create_model", {"model_id": model, "lora_config": {"rank": 16, "alpha": 32, "seed": 3}})
    answers = [f"Ahoy! {topic.capitalize()}, says the captain, is dearer to me than gold." for topic in TOPICS]
    rows = [tokenizer(prompt + answer).input_ids for prompt, answer in zip(prompts(tokenizer, 50)[1::2], answers)]
    data = [(ids[:-1], ids[1:], None) for ids in rows]
    for step in range(STEPS):
        await connection.ask("forward_backward", pass_body(model, data[step::STEPS]))
        await connection.ask("optim_step", {"model_id": model, "adam_params": ADAM})
    return (await connection.ask("save_weights_for_sampler", {"model_id": model, "name": "greedy"}))["path"]


async def call(port, path, body):
    connection = Connection(port)
    status, reply = await connection.call("POST", path, body)
    connection.close()
    if status != 200:
        raise Refused(status, reply)
    return reply


async def ours(port, path, texts, tokens):
    """What the server makes of each text: tokens, text, and log-probabilities of these and of the prompt."""

    async def one(text):
        params = {"max_new_tokens": tokens, "temperature": 0}
        body = {
            "text": text,
            "sampling_params": params,
            "return_logprob": True,
            **({"lora_path": path} if path else {}),
        }
        told = await call(port, "/generate", body)
        echo = {"model": path or str(MODEL), "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
        scored = (await call(port, "/v1/completions", echo))["choices"][0]["logprobs"]
        return {
            "ids": told["output_ids"],
            "text": told["text"],
            "log_probs": [one[0] for one in told["meta_info"]["output_token_logprobs"]],
            "prompt_log_probs": scored["token_logprobs"][1:],
        }

    return await asyncio.gather(*map(one, texts))


async def ask(port, texts, tokens, tokenizer):
    adapter = await train(port, "greedy", tokenizer)
    return adapter, {"base": await ours(port, None, texts, tokens), "adapter": await ours(port, adapter, texts, tokens)}


def theirs(model, tokenizer, texts, tokens):
    """The same by transformers, with the gap between the best two logits at each token."""
    together = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = together.input_ids, together.attention_mask
    end = model.config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=model.config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        told = model.generate(**together, generation_config=config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        scored = model(ids, attention_mask=mask, position_ids=positions).logits[:, :-1].log_softmax(-1)
    prompts, all_logits = scored.gather(2, ids[:, 1:, None])[..., 0], torch.stack(told.logits, 1)
    found = []
    for row, new in enumerate(told.sequences[:, ids.shape[1] :].tolist()):
        new = new[: new.index(end) + 1] if end in new else new
        logits = all_logits[row, : len(new)]
        best = logits.topk(2).values
        found.append(
            {
                "ids": new,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "log_probs": logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist(),
                "prompt_log_probs": prompts[row, ids.shape[1] - int(mask[row].sum()) :].tolist(),
                "margins": (best[:, 0] - best[:, 1]).tolist(),
            }
        )
    return found


def apart(left, right):
    return max((abs(a - b) for a, b in zip(left, right)), default=0.0)


def compare(told, truth):
    """Counts and largest distances over all prompts, and a line for each that differs."""
    found = {"prompts": len(told), "equal": 0, "ties": 0, "tokens": 0, "ended_by_themselves": 0}
    distances, prompt_distances, lines = [0.0], [0.0], []
    for number, (mine, right) in enumerate(zip(told, truth)):
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine["ids"], right["ids"])))
        found["tokens"] += same
        found["ended_by_themselves"] += right["ids"][-1] == 2
        if mine["ids"] == right["ids"] and mine["text"] == right["text"]:
            found["equal"] += 1
        elif same < len(right["ids"]) and right["margins"][same] < TIE:
            found["ties"] += 1
        else:
            margin = right["margins"][same] if same < len(right["ids"]) else None
            lines.append(
                f"prompt {number}, token {same}, margin {margin}: {mine['text']!r} instead of {right['text']!r}"
            )
        distances.append(apart(mine["log_probs"][:same], right["log_probs"]))
        prompt_distances.append(apart(mine["prompt_log_probs"], right["prompt_log_probs"]))
        if len(mine["prompt_log_probs"]) != len(right["prompt_log_probs"]):
            lines.append(
                f"prompt {number}: {len(mine['prompt_log_probs'])} tokens are scored, not {len(right['prompt_log_probs'])}"
            )
    found["smallest_margin"] = min(min(right["margins"]) for right in truth)
    found["log_probs_apart"], found["prompt_log_probs_apart"] = max(distances), max(prompt_distances)
    lines += [
        f"{name}: {found[name]:.1e}" for name in ("log_probs_apart", "prompt_log_probs_apart") if not found[name] < NEAR
    ]
    return found, lines


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, required=True)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--tokens", type=int, default=48)
    arguments.add_argument("--prompts", type=int, default=2 * len(TOPICS))
    args = arguments.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = prompts(tokenizer, args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"enable_mixed_precision": "false", "base_model_name": str(MODEL)}
        with Server(args.binary.resolve(), args.ranks, folder, **settings) as server:
            adapter, told = asyncio.run(ask(int(server.url.rsplit(":", 1)[1]), texts, args.tokens, tokenizer))
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        found, lines = {}, []
        for name in ("base", "adapter"):
            if name == "adapter":
                owner, kind, save = adapter.split("://")[1].split("/")
                model = PeftModel.from_pretrained(model, Path(folder) / kind / owner / save).eval()
            parts = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
            truth = [one for part in parts for one in theirs(model, tokenizer, part, args.tokens)]
            found[name], more = compare(told[name], truth)
            lines += [f"{name}: {line}" for line in more]
            print(f"{name}: {found[name]}; the last is {truth[-1]['text']!r}", flush=True)
    found["texts_that_the_adapter_changes"] = sum(a["ids"] != b["ids"] for a, b in zip(told["base"], told["adapter"]))
    for line in lines:
        print(f"failed: {line}")
    print(json.dumps({"ranks": args.ranks, "greedy": found}))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
