"""Load on a server: 64 clients for some minutes, who cancel, repeat, reconnect and send nonsense, while the server is asked to stop twice and
killed once, and started again each time.

    load.py --binary target/release/xorl-dist [--minutes 10] [--clients 64] [--samplers 24] [--ranks 2] [--seed 1]

Each client trains one adapter after another, a life each: some steps of passes and updates, now and then a save, at the end a last one. It
keeps a ledger of what was acknowledged. Checked are:

- after a stop, that every adapter is at its ledger, with what was taken but not answered: counts of updates and of passes since;
- after a kill, that an adapter which had changed is refused with a text that names its last saved state, from which its client goes on;
- at the end of a life, that the counts are the ledger's: nothing is lost, nothing is done twice;
- nonsense gets a 4xx and a reason;
- what clients say that sample (load_sampling.py): the same greedy text from a save before and after restarts, ratios of 1 while others
  train, nothing for another tenant, no 5xx but at an end of the server;
- adapters at the end of their lives, those that went through a stop or kill first, are within 1e-4 of a calm replay of their ledger;
- resident memory and open files of the ranks are flat after the last start.

Exit code 1 and a line each where one does not hold. The last line is JSON.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from load_actors import ROOT, Raw, Tinker, XorlClient, raw
from load_life import Life
from load_sampling import OTHER_KEY, Found, Keeper, Policy

sys.path[:0] = [str(ROOT / "benches")]
from processes import Process, command_line, descendants, growth, open_files, resident_bytes  # noqa: E402

BASE_MODEL = "tiny/llama"
KEY, TENANT = "tml-test", "lab"
STEPS_OF_A_LIFE = 12
# What memory may grow by after the last start: of a run of some minutes, in which the server fills what it keeps
# (10 000 results and as many sessions, some KB each) and allocators keep what they like; and of one that goes on twice
# as long as that takes, the share of what it has by then.
FLAT_BYTES = 32 << 20
FLAT = 0.02
WARM_SECONDS = 300
SAMPLE_SECONDS = 0.5
# Clients come and go with their connections.
FLAT_FILES = 100
# Between 0 and 1 of the time.
EVENTS = {0.2: "stop", 0.35: "kill", 0.5: "stop"}


class Server:
    """The server, started again after each end."""

    def __init__(self, args, folder):
        self.args, self.folder, self.output_dir = args, folder, folder / "out/tenants" / TENANT
        self.base_model = BASE_MODEL
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.generation = 0
        self.is_up = asyncio.Event()
        self.counts = collections.Counter()
        self.rss, self.files = [], []
        config = {
            "model_path": str(folder / "model"),
            "base_model_name": BASE_MODEL,
            "output_dir": str(folder / "out"),
            "api_keys_file": str(folder / "keys"),
            "api_port": self.port,
            "enable_mixed_precision": False,
            "lora_rank": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }
        (folder / "server.yaml").write_text(json.dumps(config))
        keys = {KEY: TENANT, OTHER_KEY: "other"}
        lines = [f"{hashlib.sha256(key.encode()).hexdigest()} {tenant}\n" for key, tenant in keys.items()]
        (folder / "keys").write_text("".join(lines))

    async def start(self):
        command = [ROOT / "launch/mpirun.sh", "-n", self.args.ranks, "serve", "--device", "cpu", "--config", self.folder / "server.yaml"]
        self.process = Process(command, {"XORL_DIST": str(self.args.binary)}, self.args.binary, watch=False)
        while True:
            try:
                status, _ = await raw.Connection(self.port).call("GET", "/health")
                if status == 200:
                    break
            except (OSError, EOFError):
                pass
            if self.process.process.poll() is not None:
                self.process.wait()
            await asyncio.sleep(0.05)
        self.rss, self.files = [], []
        self.generation += 1
        self.is_up.set()

    def ranks(self):
        pids = descendants(self.process.process.pid)
        return [pid for pid in pids if str(self.args.binary) in command_line(pid)[:1]]

    async def end(self, how):
        """Stops or kills it, and waits until all of it is gone."""
        self.is_up.clear()
        if how == "stop":
            self.process.process.send_signal(signal.SIGTERM)
        else:
            os.kill(random.choice(self.ranks()), signal.SIGKILL)
        status = await asyncio.to_thread(self.process.process.wait, 120)
        if how == "stop" and status != 75:
            raise AssertionError(f"the server ended with {status} after a stop signal: {self.process._failed(None, status)}")

    async def watch(self):
        while True:
            ranks = self.ranks() if self.is_up.is_set() else []
            if ranks:
                self.rss.append([resident_bytes(rank) for rank in ranks])
                self.files.append(sum(map(open_files, ranks)))
            await asyncio.sleep(SAMPLE_SECONDS)


async def client(server, args, index, deadline, lives, failures):
    """One life after another until the time is over."""
    own = random.Random(f"{args.seed} {index}")
    make = {0: Tinker, 1: XorlClient}.get(index % 8, Raw)
    make = make if make.kind in args.kinds else Raw

    async def pause():
        await asyncio.sleep(own.random() * 2 * args.pause)

    number = 0
    while time.monotonic() < deadline:
        adapter = own.randrange(8) if make is not Raw else own.randrange(1000)
        life = Life(server, make(server, f"c{index}-{number}", adapter, own), adapter, own)
        try:
            await life.live(pause, STEPS_OF_A_LIFE)
            lives.append(life)
        except Exception as error:
            failures.append(f"{life.actor.kind} {index}, life {number}: {type(error).__name__}: {error}")
            if len(failures) > 20:
                return
        finally:
            life.actor.close()
        number += 1


NONSENSE = [
    ("POST", "/api/v1/forward_backward", b"{"),
    ("POST", "/api/v1/forward_backward", b"[1, 2]"),
    ("POST", "/api/v1/forward_backward", b"\x00\xff" * 100),
    ("POST", "/api/v1/forward_backward", b'{"a":' * 500),
    ("POST", "/api/v1/forward_backward", {"model_id": "nobody", "forward_backward_input": {"data": [], "loss_fn": "x"}}),
    ("POST", "/api/v1/forward_backward", raw.pass_body("nobody", [([1], [1], None)])),
    ("POST", "/api/v1/forward_backward", raw.pass_body("default", [([1 << 40], [1], None)])),
    ("POST", "/api/v1/forward_backward", raw.pass_body("default", [([1, 2], [1], None)])),
    ("POST", "/api/v1/optim_step", {"model_id": "nobody"}),
    ("POST", "/api/v1/optim_step", {"model_id": "../../etc"}),
    ("POST", "/api/v1/optim_step", {"model_id": "default", "adam_params": {"learning_rate": "fast"}}),
    ("POST", "/api/v1/load_weights", {"model_id": "default", "path": "/etc/passwd"}),
    ("POST", "/api/v1/save_weights", {"model_id": "default", "path": "../out"}),
    ("POST", "/api/v1/retrieve_future", {"request_id": "none"}),
    ("POST", "/api/v1/no_such_call", {}),
    ("POST", "/generate", b"{"),
    ("POST", "/generate", {"input_ids": []}),
    ("POST", "/generate", {"input_ids": [1 << 40], "sampling_params": {"max_new_tokens": 4}}),
    ("POST", "/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 1 << 40}}),
    ("POST", "/generate", {"input_ids": [5], "sampling_params": {"n": 1 << 20}}),
    ("POST", "/generate", {"input_ids": [5] * 600, "sampling_params": {"max_new_tokens": 4}}),
    ("POST", "/generate", {"input_ids": [5], "sampling_params": {"temperature": -1}}),
    ("POST", "/generate", {"input_ids": [5], "lora_path": "../../out"}),
    ("POST", "/v1/completions", {"model": "nobody", "prompt": "a"}),
    ("POST", "/v1/completions", {"model": BASE_MODEL, "prompt": [1 << 40]}),
    ("POST", "/v1/completions", {"model": BASE_MODEL, "prompt": "a", "stream": True, "top_p": 7}),
    ("POST", "/v1/chat/completions", {"model": BASE_MODEL, "messages": [{"role": 7}]}),
    ("GET", "/v1/models/../../etc/passwd", None),
    ("POST", "/api/v1/asample", {"type": "asample", "sampling_session_id": "nobody", "seq_id": 0}),
    ("POST", "/api/v1/create_sampling_session", {"session_id": "nobody", "sampling_session_seq_id": 0, "base_model": BASE_MODEL}),
    ("POST", "/api/v1/create_sampling_session", {"model_path": "tinker://a/sampler_weights/../../b"}),
    ("POST", "/api/v1/retrieve_futures", {"target": {"sampling_session_id": "nobody"}}),
    ("GET", "/api/v1/samplers/..%2f..", None),
    ("GET", "/api/v1/forward_backward", None),
    ("DELETE", "/", None),
]


async def send_nonsense(server, args, deadline, failures):
    own = random.Random(f"{args.seed} nonsense")
    while time.monotonic() < deadline:
        await server.is_up.wait()
        method, path, body = own.choice(NONSENSE)
        try:
            status, told = await raw.Connection(server.port).call(method, path, body)
        except (OSError, EOFError):
            continue
        server.counts[f"nonsense answered {status}"] += 1
        if not 400 <= status < 500 and status != 503:
            failures.append(f"{method} {path} {str(body)[:80]}: {status} {str(told)[:200]}")
        await asyncio.sleep(own.random() * 0.2)


async def disturb(server, began, seconds):
    """Ends the server at its moments and starts it again."""
    for moment, how in EVENTS.items():
        await asyncio.sleep(max(0.0, began + moment * seconds - time.monotonic()))
        say(f"{how} after {time.monotonic() - began:.0f} s")
        await server.end(how)
        await server.start()


async def replay(server, lives, failures):
    """Each ledger once more, calmly; the largest distance of an adapter."""
    from safetensors.numpy import load_file

    worst, gate = 0.0, asyncio.Semaphore(8)

    async def once(number, life):
        nonlocal worst
        async with gate:
            actor = type(life.actor)(server, f"replay-{number}", life.adapter, random.Random(0), mischief=False)
            await actor.create()
            for operation in life.applied:
                actor.begin(operation)
                await actor.perform()
            path = await actor.save("final")
            await actor.unload()
            actor.close()
        ours, theirs = (load_file(folder_of(server, uri) / "adapter_model.safetensors") for uri in (life.final, path))
        apart = sum(float(((ours[key] - theirs[key]) ** 2).sum()) for key in theirs) ** 0.5
        apart /= sum(float((values**2).sum()) for values in theirs.values()) ** 0.5
        worst = max(worst, apart)
        if not apart <= 1e-4:
            failures.append(f"{life.final} is {apart:.2e} from its calm replay {path}, {len(life.applied)} operations, {life.restarts} restarts")

    await asyncio.gather(*(once(number, life) for number, life in enumerate(lives)))
    return worst


def folder_of(server, uri):
    model, kind, name = uri.split("://")[1].split("/")
    return server.output_dir / kind / urllib.parse.quote(model) / name


def say(text):
    print(f"load: {text}", file=sys.stderr, flush=True)


def samplers(server, args, found):
    """Clients that sample: a third of them train too, and one samples from the base."""
    made = []
    for index in range(args.samplers):
        own = random.Random(f"{args.seed} sampler {index}")
        policy = index % 3 == 2
        made.append(Policy(server, f"p{index}", own, found) if policy else Keeper(server, f"k{index}", own, found, of_base=index == 0))
    return made


async def measure(args, folder):
    asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(64))
    server = Server(args, folder)
    await server.start()
    failures, lives, found = [], [], Found()
    watcher = asyncio.create_task(server.watch())
    began, seconds = time.monotonic(), 60 * args.minutes
    deadline = began + seconds
    try:
        clients = [client(server, args, index, deadline, lives, failures) for index in range(args.clients)]
        sampling = [one.turns(deadline, failures) for one in samplers(server, args, found)]
        await asyncio.gather(*clients, *sampling, send_nonsense(server, args, deadline, failures), disturb(server, began, seconds))
        samples = len(server.rss)
        warm = int(WARM_SECONDS / SAMPLE_SECONDS)
        warm = warm if samples >= 2 * warm else 0
        together = [sum(ranks) for ranks in server.rss]
        (grown, share), (more_files, _) = (growth(values[warm:]) if samples >= 8 else (0, 0) for values in (together, server.files))
        # Rank 0 alone keeps results.
        by_rank = [growth(values)[0] for values in zip(*server.rss[warm:], strict=False)] if samples >= 8 else []
        watcher.cancel()
        operations = sum(len(life.applied) for life in lives)
        say(f"{len(lives)} adapters, {operations} operations; replaying")
        chosen = sorted(lives, key=lambda life: -life.restarts)[: args.replays]
        worst = await replay(server, chosen, failures) if not failures else None
    finally:
        watcher.cancel()
        server.process.stop()
    if (share > FLAT) if warm else (grown > FLAT_BYTES and samples > 100):
        failures.append(f"memory of the ranks grew by {grown >> 20} MiB, {share:.1%}, after the last start")
    if more_files > FLAT_FILES:
        failures.append(f"{more_files} more files are open than after the last start")
    if found.seeded_that_differ > found.seeded // 100:
        failures.append(f"{found.seeded_that_differ} of {found.seeded} continuations of a seed differ")
    restarted = sum(1 for life in lives if life.restarts)
    return failures, {
        "adapters": len(lives),
        "of_them_over_a_restart": restarted,
        "operations": operations,
        "replayed": len(chosen),
        "largest_distance": worst,
        "memory_bytes": together[-1] if together else 0,
        "memory_growth_bytes": grown,
        "memory_growth_bytes_of_ranks": by_rank,
        "memory_growth": round(share, 4),
        "memory_seconds": round((samples - warm) * SAMPLE_SECONDS),
        "open_files": server.files[-1] if server.files else 0,
        "open_files_growth": more_files,
        "counts": dict(server.counts),
        "sampling": dataclasses.asdict(found),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/xorl-dist")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--samplers", type=int, default=24, help="clients that sample, beside the others")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.3, help="mean seconds between two operations of a client")
    parser.add_argument("--replays", type=int, default=200, help="adapters that are replayed, at most")
    kinds = ["raw", "xorl-client", "tinker"]
    parser.add_argument("--kinds", nargs="*", choices=kinds, default=kinds, help="kinds of clients; there are raw ones always")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    # Real clients tell of each error that they meet.
    logging.disable(logging.CRITICAL)
    raw.Connection.key = os.environ["XORL_API_KEY"] = KEY
    # Those of the tinker client, behind this Python's own.
    sys.path += [str(path) for path in (ROOT / ".venv-tinker/lib").glob("python3.*/site-packages")]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = [sys.executable, ROOT / "tests/clients/peft_alone.py", "model", folder / "model", ROOT / "tests/data/chat/byte_level"]
        subprocess.run(model, check=True, stdout=subprocess.DEVNULL)
        failures, told = asyncio.run(measure(args, folder))
    for failure in failures:
        print(f"failed: {failure}")
    print(json.dumps(told))
    sys.stdout.flush()
    # Threads of real clients may wait for a server that is gone.
    os._exit(1 if failures else 0)


if __name__ == "__main__":
    main()
