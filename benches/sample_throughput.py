"""Speed of sampling beside transformers and PEFT, beside its floors, and what it costs training.

    sample_throughput.py --model models/smollm2 [--binary target/release/xorl-dist] [--ranks 1 2] [--turns 3] [--cases a,b,d]
        [--temperature 0] [--top-p 1]

bf16, adapters of r = 16 on the seven projections, prompts of 32 random ids, no end token, greedy unless said:

    a   16 requests over 4 adapters, 128 new tokens each, sent at once to /generate; PEFT: one batch, `adapter_names`
    b   one request of 200 new tokens to the base; transformers: `generate`
    d   updates of one adapter, 4 data of 128 tokens each, alone and beside 16 requests of 16 tokens, sent again and again

Ours runs on as many ranks as `--ranks` says, each time on all cores; theirs is one process with a thread a core. They take
turns, after one turn each that does not count; a figure is the median of its turns. Time of this client counts.

The floor of a token (of a step of 16 in case a) is the larger of two times: that in which the cores read the base, the
adapters and the cache at its mean length from memory, and that of the arithmetic at the peak of bf16 torch.mm. Both are
measured before. Prints a line a figure and last all of it as JSON.
"""

import argparse
import asyncio
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from serve_throughput import ALPHA, RANK, ROOT, TARGETS, Connection, Server, bytes_per_second, datum

PROMPT, REQUESTS, ADAPTERS = 32, 16, 4
MANY, LONG, SHORT = 128, 200, 16
DATA, DATUM = 4, 128
WARMUP = 16


class Peer:
    """transformers and PEFT, in a process of their own, which generates when it is told to."""

    def __init__(self, args):
        command = [sys.executable, __file__, "--peer", "--model", args.model]
        command += ["--temperature", args.temperature, "--top-p", args.top_p]
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        self.process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.process.stdout.readline()

    def seconds(self, way, tokens):
        self.process.stdin.write(json.dumps([way, tokens]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def peer(args):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    shape = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    base, mixed = load(), get_peft_model(load(), shape, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, ADAPTERS):
        mixed.add_adapter(str(i), shape, autocast_adapter_dtype=False)
    mixed.eval()
    ids = torch.randint(3, base.config.vocab_size, (REQUESTS, PROMPT))

    choice = {"do_sample": False}
    if args.temperature > 0:
        choice = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}

    def generate(way, tokens):
        config = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, eos_token_id=None, **choice
        )
        prompts = ids if way == "mixed" else ids[:1]
        more = {"adapter_names": [str(i % ADAPTERS) for i in range(REQUESTS)]} if way == "mixed" else {}
        model = mixed if way == "mixed" else base
        out = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config, **more
        )
        assert out.shape == (len(prompts), PROMPT + tokens), out.shape

    print("ready", flush=True)
    with torch.no_grad():
        for line in sys.stdin:
            began = time.perf_counter()
            generate(*json.loads(line))
            print(time.perf_counter() - began, flush=True)


class Sampled:
    """A server with adapters that are saved for samplers."""

    def __init__(self, args, ranks, folder):
        folder.mkdir()
        self.server = Server(argparse.Namespace(**{**vars(args), "ranks": ranks}), folder)
        self.ranks, self.vocabulary = ranks, args.vocabulary
        self.choice = {"temperature": args.temperature, "top_p": args.top_p, "ignore_eos": True}
        self.prompts = [datum(args.random, PROMPT, args.vocabulary)[0] for _ in range(REQUESTS)]

    async def open(self):
        await self.server.wait()
        asked = [{"model_id": f"adapter{i}", "name": "sampled"} for i in range(ADAPTERS)]
        saved = [await Connection(self.server.port).ask("save_weights_for_sampler", one) for one in asked]
        self.paths = [one["path"] for one in saved]

    async def generate(self, number, tokens, adapter=True):
        body = {
            "input_ids": self.prompts[number],
            "sampling_params": {"max_new_tokens": tokens, **self.choice},
            **({"lora_path": self.paths[number % ADAPTERS]} if adapter else {}),
        }
        # The server closes those that are idle while theirs has its turn.
        connection = Connection(self.server.port)
        status, told = await connection.call("POST", "/generate", body)
        connection.close()
        assert status == 200 and len(told["output_ids"]) == tokens, (status, told)

    async def seconds(self, way, tokens):
        began = time.perf_counter()
        if way == "mixed":
            await asyncio.gather(*(self.generate(number, tokens) for number in range(REQUESTS)))
        else:
            await self.generate(0, tokens, adapter=False)
        return time.perf_counter() - began

    async def updates(self, seconds, generator):
        """Updates a second, the longest of them, and their number."""
        connection, took = Connection(self.server.port), []
        data = [datum(generator, DATUM, self.vocabulary) for _ in range(DATA)]
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            await self.server.step(connection, ADAPTERS, data)
            took.append(time.perf_counter() - began)
        return {"updates_per_second": len(took) / sum(took), "longest": max(took), "updates": len(took)}

    async def beside(self, seconds, generator, tokens):
        """Updates while requests to sample are sent again and again; with tokens that were sampled in a second."""
        sampled, is_over = 0, False

        async def again(number):
            nonlocal sampled
            while not is_over:
                await self.generate(number, tokens)
                sampled += tokens

        running = [asyncio.create_task(again(number)) for number in range(REQUESTS)]
        await asyncio.sleep(1)
        began, before = time.perf_counter(), sampled
        found = await self.updates(seconds, generator)
        found["sampled_per_second"] = (sampled - before) / (time.perf_counter() - began)
        is_over = True
        await asyncio.gather(*running)
        return found


async def in_turns(way, tokens, servers, other, turns):
    """Seconds of each, turn by turn; the first does not count."""
    ways = {str(server.ranks): functools.partial(server.seconds, way) for server in servers}
    ways["theirs"] = functools.partial(asyncio.to_thread, other.seconds, way)
    found = {name: [] for name in ways}
    for turn in range(-1, turns):
        for name, run in ways.items():
            seconds = await run(tokens if turn >= 0 else WARMUP)
            if turn >= 0:
                found[name].append(seconds)
    return found


def floors(args):
    """Seconds of a token of case b and of a step of case a, by memory and by arithmetic, with what they are made of."""
    config = json.loads((args.model / "config.json").read_text())
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    shapes = [(hidden, heads * head)] * 2 + [(hidden, kv * head)] * 2 + [(hidden, wide)] * 3
    base = layers * sum(rows * columns for rows, columns in shapes) + config["vocab_size"] * hidden
    lora = layers * RANK * sum(rows + columns for rows, columns in shapes)
    cache = layers * 2 * kv * head
    cores = os.cpu_count()
    peak, bandwidth = machine.peak(cores, 1), bytes_per_second(cores)
    values = {
        "a": base + ADAPTERS * lora + REQUESTS * cache * (PROMPT + MANY / 2),
        "b": base + cache * (PROMPT + LONG / 2),
    }
    operations = {"a": 2 * REQUESTS * (base + lora), "b": 2 * base}
    return {
        "peak_flops": peak,
        "bytes_per_second": bandwidth,
        **{
            case: {
                "bytes": 2 * values[case],
                "memory": 2 * values[case] / bandwidth,
                "arithmetic": operations[case] / peak,
            }
            for case in "ab"
        },
    }


async def measure(args, folder):
    found = {"floors": floors(args)}
    servers = [Sampled(args, ranks, folder / str(ranks)) for ranks in args.ranks]
    other = Peer(args) if set(args.cases) & set("ab") else None
    try:
        for server in servers:
            await server.open()
        for case, way, tokens in (("a", "mixed", MANY), ("b", "alone", LONG)):
            if case in args.cases:
                found[case] = await in_turns(way, tokens, servers, other, args.turns)
        if other:
            other.close()
        for server in servers:
            if "d" in args.cases:
                await server.updates(2, args.random)
                alone = [await server.updates(args.seconds / 2, args.random)]
                beside = await server.beside(args.seconds, args.random, SHORT)
                alone.append(await server.updates(args.seconds / 2, args.random))
                found.setdefault("d", {})[str(server.ranks)] = {"alone": alone, "beside": beside}
    finally:
        for server in servers:
            server.server.process.stop()
    return found


def figures(found, args):
    """Figures by which the cases are judged, each with its text."""
    lines = {}
    for case, tokens, goal in (("a", MANY, 2), ("b", LONG, 1.5)):
        if case not in found:
            continue
        floor = found["floors"][case]
        least = max(floor["memory"], floor["arithmetic"])
        together = REQUESTS if case == "a" else 1
        theirs = statistics.median(found[case]["theirs"])
        lines[f"{case} theirs"] = (together * tokens / theirs, "tokens/s")
        lines[f"{case} theirs, share of floor"] = (
            least * tokens / theirs,
            f"of the bytes' {floor['memory'] * tokens / theirs:.3f}",
        )
        for ranks in args.ranks:
            seconds = statistics.median(found[case][str(ranks)])
            lines[f"{case} {ranks} ranks"] = (together * tokens / seconds, "tokens/s")
            lines[f"{case} {ranks} ranks over theirs"] = (theirs / seconds, f"wanted: {goal}")
            lines[f"{case} {ranks} ranks, share of floor"] = (
                least * tokens / seconds,
                f"of the bytes' {floor['memory'] * tokens / seconds:.3f}",
            )
    for ranks, one in found.get("d", {}).items():
        alone = statistics.mean(part["updates_per_second"] for part in one["alone"])
        lines[f"d {ranks} ranks alone"] = (alone, "updates/s")
        lines[f"d {ranks} ranks beside over alone"] = (one["beside"]["updates_per_second"] / alone, "wanted: 0.5")
        lines[f"d {ranks} ranks sampled beside"] = (one["beside"]["sampled_per_second"], "tokens/s")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/xorl-dist")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=20, help="of updates in case d, alone and beside")
    parser.add_argument("--cases", default="abd", type=lambda text: text.replace(",", ""))
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args)
    args.random = random.Random(1)
    args.vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    stamp = machine.stamp()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(args, Path(folder)))
    print(machine.line(stamp))
    judged = figures(found, args)
    for name, (figure, text) in judged.items():
        print(f"{name:<28}{figure:9.3f}  {text}")
    print(json.dumps({"measured": found, "figures": {name: figure for name, (figure, _) in judged.items()}, **stamp}))


if __name__ == "__main__":
    main()
