"""Throughput of the server beside PEFT, beside itself one adapter after another, and beside the local trainer.

    serve_throughput.py --model models/smollm2 [--binary target/release/xorl-dist] [--ranks 2] [--repeats 5] [--cases a,b,c,d]

bf16, r = 16 on the seven projections, AdamW, one datum a line of random ids:

    a   8 adapters with one datum of 32 tokens each: all at once, and one after another
    b   the same by PEFT in one process with as many threads as cores, `set_adapter` in turns
    c   8 adapters with one datum of 512 tokens each at once, and one adapter with 8 such data in one request
    d   one adapter with 8 data of 512 tokens: the server's pass and update beside a step of `xorl-dist`

A round is a pass and an update of each adapter. Ways take turns round by round, so what slows the machine slows both; a figure is the
median of its rounds. Warm-up rounds do not count. Requests are JSON over one connection an adapter, sent and read by this process, whose
time counts. Prints a line a case and last all of it as JSON.

Case a is also held against the ratio that its floors allow. The floor of a pass is the larger of its arithmetic over the peak of bf16
torch.mm, and of the bytes of the base, read in forward and in backward, over what the same processes read from memory in a second.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/clients"), str(ROOT / "benches")]
import machine  # noqa: E402
from processes import Process  # noqa: E402
from raw import Connection, pass_body  # noqa: E402

ADAPTERS, RANK, ALPHA = 8, 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAM = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 1.0}
WARMUP = 2
READER = """
import time, torch
torch.set_num_threads(1)
x = torch.ones(1 << 28, dtype=torch.int32)
print("ready", flush=True)
input()
seconds = []
for _ in range(5):
    begin = time.perf_counter()
    x.max()
    seconds.append(time.perf_counter() - begin)
print(x.nbytes / min(seconds))
"""


def datum(generator, tokens, vocabulary):
    ids = [generator.randrange(3, vocabulary) for _ in range(tokens + 1)]
    return ids[:-1], ids[1:], None


class Server:
    """A server on the machine's cores, started as launch/mpirun.sh starts ranks."""

    def __init__(self, args, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = {
            "model_path": str(args.model.resolve()),
            "output_dir": str(folder / "server"),
            "api_port": self.port,
            "lora_rank": RANK,
            "lora_alpha": ALPHA,
            "lora_target_modules": TARGETS,
            "enable_gradient_checkpointing": False,
            "model_ids": [f"adapter{i}" for i in range(ADAPTERS)],
        }
        (folder / "server.yaml").write_text(json.dumps(config))
        command = [ROOT / "launch/mpirun.sh", "-n", args.ranks, "serve", "--device", "cpu", "--config", folder / "server.yaml"]
        self.process = Process(command, {"XORL_DIST": str(args.binary)}, args.binary, watch=False)

    async def wait(self):
        while True:
            try:
                status, _ = await Connection(self.port).call("GET", "/health")
                if status == 200:
                    return
            except (OSError, EOFError):
                pass
            if self.process.process.poll() is not None:
                self.process.wait()
            await asyncio.sleep(0.05)

    async def step(self, connection, adapter, data):
        """A pass and an update, the second submitted behind the first."""
        model = f"adapter{adapter}"
        passed = (await connection.post("forward_backward", pass_body(model, data)))["request_id"]
        stepped = (await connection.post("optim_step", {"model_id": model, "adam_params": ADAM}))["request_id"]
        result = await connection.result(passed)
        await connection.result(stepped)
        return result["metrics"]["loss:sum"]


async def timed(awaitable):
    began = time.perf_counter()
    await awaitable
    return time.perf_counter() - began


async def in_turns(ways, rounds):
    """Seconds of each way, [rounds], round by round."""
    seconds = {name: [] for name in ways}
    for index in range(WARMUP + rounds):
        for name, way in ways.items():
            took = await timed(way())
            if index >= WARMUP:
                seconds[name].append(took)
    return {name: statistics.median(found) for name, found in seconds.items()}


async def case_a(server, args):
    connections = [Connection(server.port) for _ in range(ADAPTERS)]
    data = [[datum(args.random, args.short, args.vocabulary)] for _ in range(ADAPTERS)]

    async def together():
        await asyncio.gather(*(server.step(connections[i], i, data[i]) for i in range(ADAPTERS)))

    async def one_after_another():
        for i in range(ADAPTERS):
            await server.step(connections[i], i, data[i])

    return await in_turns({"together": together, "one_after_another": one_after_another}, args.repeats)


async def case_c(server, args):
    connections = [Connection(server.port) for _ in range(ADAPTERS)]
    data = [datum(args.random, args.long, args.vocabulary) for _ in range(ADAPTERS)]

    async def eight_adapters():
        await asyncio.gather(*(server.step(connections[i], i, [data[i]]) for i in range(ADAPTERS)))

    async def one_adapter():
        await server.step(connections[0], 0, data)

    return await in_turns({"eight_adapters": eight_adapters, "one_adapter": one_adapter}, args.repeats)


def case_b(args):
    """PEFT, in a process of its own, so that its threads and memory are its own."""
    command = [sys.executable, __file__, "--peft-alone", "--model", args.model, "--repeats", args.repeats, "--short", args.short]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    told = subprocess.run([str(word) for word in command], env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def peft_alone(args):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.config.use_cache = False
    shape = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    model = get_peft_model(base, shape, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, ADAPTERS):
        model.add_adapter(str(i), shape, autocast_adapter_dtype=False)
    model.train()
    optimizers = []
    for i in range(ADAPTERS):
        model.set_adapter(str(i))
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers.append(torch.optim.AdamW(own, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0))
    ids = torch.randint(3, base.config.vocab_size, (ADAPTERS, 1, args.short + 1))

    def once():
        for i, optimizer in enumerate(optimizers):
            model.set_adapter(str(i))
            logits = model(input_ids=ids[i, :, :-1]).logits[0].float()
            torch.nn.functional.cross_entropy(logits, ids[i, 0, 1:], reduction="sum").backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()

    seconds = []
    for index in range(WARMUP + args.repeats):
        began = time.perf_counter()
        once()
        if index >= WARMUP:
            seconds.append(time.perf_counter() - began)
    print(json.dumps({"in_turns": statistics.median(seconds), "threads": torch.get_num_threads()}))


def local_step(args, folder):
    """Median seconds of a step of the local trainer, on the rows that case d sends."""
    rows = folder / "rows.jsonl"
    lines = []
    for _ in range(ADAPTERS * (WARMUP + args.repeats)):
        ids, _, _ = datum(args.random, args.long - 1, args.vocabulary)
        lines.append(json.dumps({"input_ids": [*ids, 5]}) + "\n")
    rows.write_text("".join(lines))
    steps = WARMUP + args.repeats
    run = {
        "model": {"model_path": str(args.model.resolve())},
        "data": {"datasets": [{"path": str(rows), "type": "tokenized"}], "sample_packing_method": "none"},
        "train": {
            "output_dir": str(folder / f"local-{time.time_ns()}"),
            "max_steps": steps,
            "num_train_epochs": 1,
            "micro_batch_size": ADAPTERS // args.ranks,
            "gradient_accumulation_steps": 1,
            "enable_gradient_checkpointing": False,
            "save_steps": 0,
            "save_epochs": 0,
            "lr": 1e-4,
            "weight_decay": 0.0,
        },
        "lora": {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_target_modules": TARGETS},
    }
    config = folder / "run.yaml"
    config.write_text(json.dumps(run))
    command = [ROOT / "launch/mpirun.sh", "-n", args.ranks, "--device", "cpu", "--config", config]
    Process(command, {"XORL_DIST": str(args.binary)}, args.binary, watch=False).wait()
    lines = (Path(run["train"]["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_seconds"] for line in lines][WARMUP:steps]
    return statistics.median(seconds)


async def case_d(args, folder):
    """Runs of the local trainer before and after the server's rounds."""
    before = local_step(args, folder)
    server = Server(args, folder)
    try:
        await server.wait()
        connection, data = Connection(server.port), [datum(args.random, args.long, args.vocabulary) for _ in range(ADAPTERS)]
        served = await in_turns({"server": lambda: server.step(connection, 0, data)}, args.repeats)
    finally:
        server.process.stop()
    after = local_step(args, folder)
    return {**served, "local_before": before, "local_after": after, "local": min(before, after)}


def bytes_per_second(processes):
    """What so many processes of one thread read from memory at once."""
    workers = [
        subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    return sum(float(worker.communicate()[0]) for worker in workers)


def allowed_ratio(args):
    """The ratio of case a that the floors allow, with what they are made of."""
    config = json.loads((args.model / "config.json").read_text())
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    shapes = [(hidden, heads * head)] * 2 + [(hidden, kv * head)] * 2 + [(hidden, wide)] * 3
    base = layers * sum(rows * columns for rows, columns in shapes) + config["vocab_size"] * hidden
    lora = layers * RANK * sum(rows + columns for rows, columns in shapes)
    # Forward and the gradient of the input; of adapters that of the weights too.
    operations = 4 * base + 6 * lora
    peak, bandwidth = machine.peak(args.ranks, 1), bytes_per_second(args.ranks)

    def floor(tokens):
        return max(operations * tokens / peak, 2 * 2 * base / bandwidth)

    allowed = ADAPTERS * floor(args.short) / floor(ADAPTERS * args.short)
    return {"allowed": allowed, "peak_flops": peak, "bytes_per_second": bandwidth, "floor_of_one": floor(args.short)}


async def measure(args, folder):
    found = {}
    if "a" in args.cases:
        found["floors"] = allowed_ratio(args)
    if set(args.cases) & set("ac"):
        server = Server(args, folder)
        try:
            await server.wait()
            for case, run in {"a": case_a, "c": case_c}.items():
                if case in args.cases:
                    found[case] = await run(server, args)
        finally:
            server.process.stop()
    if "b" in args.cases:
        found["b"] = case_b(args)
    if "d" in args.cases:
        found["d"] = await case_d(args, folder)
    return found


def ratios(found, args):
    """The figures by which the cases are judged, each with its text."""
    lines = {}
    if "a" in found:
        seconds = found["a"]
        at_once = seconds["one_after_another"] / seconds["together"]
        lines["a"] = (at_once, f"8 x {args.short} tokens at once over one after another")
        lines["a_of_allowed"] = (at_once / found["floors"]["allowed"], "of the ratio that the floors allow")
        if "b" in found:
            lines["b"] = (found["b"]["in_turns"] / seconds["together"], f"8 x {args.short} tokens at once over PEFT in turns")
    if "c" in found:
        seconds = found["c"]
        lines["c"] = (seconds["one_adapter"] / seconds["eight_adapters"], f"8 adapters over one, 8 x {args.long} tokens")
    if "d" in found:
        lines["d"] = (found["d"]["server"] / found["d"]["local"] - 1, f"time of the server above a local step, 8 x {args.long} tokens")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/xorl-dist")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default="abcd", type=lambda text: text.replace(",", ""))
    parser.add_argument("--short", type=int, default=32, help="tokens of a datum of cases a and b")
    parser.add_argument("--long", type=int, default=512, help="tokens of a datum of cases c and d")
    parser.add_argument("--peft-alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peft_alone:
        return peft_alone(args)
    args.random = random.Random(1)
    args.vocabulary = json.loads((args.model / "config.json").read_text())["vocab_size"]
    stamp = machine.stamp()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(args, Path(folder)))
    print(machine.line(stamp))
    judged = ratios(found, args)
    for case, (figure, text) in judged.items():
        print(f"{case:<13}{figure:7.3f}  {text}")
    told = {"seconds": found, "ratios": {case: figure for case, (figure, _) in judged.items()}, **stamp}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
