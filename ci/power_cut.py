"""Cuts the power of a run after every call to the file system, in a model of one that keeps only what fsync promised.

A run of a tiny model with saves, merges, pruned steps and event files is recorded with strace. After each call that
changes a file or a folder below its output_dir, states of the disk are made in which the power was lost there:

- least: data and entries of folders are as at their last fsync
- names: all entries are on the disk, data are as at their last fsync, or empty
- all: everything has reached the disk
- mixed: each folder has some of its changes since its last fsync, in their order; each file has its old data, its new,
  a part of them, none, or zeros for some

In each state every published step has to be whole (manifest, sizes, SHA-256), the newest at least as new as the last
one that the run said to have saved, `latest` the name of a whole one, and metrics.jsonl has the lines up to it. From a
sample of the different states the run is resumed; it has to end as the recorded one, bit for bit. One such resume is
recorded and cut, too. At last one fsync after another is left out of the model, which has to break a promise.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from power_cut_disk import CALLS, Node, Replay, calls, state_of

STEPS = 8
# Of the machine, and of the length of a run that goes on.
OF_THE_MACHINE = ["tokens_per_second", "step_seconds", "phase_seconds", "peak_rss_bytes"]


def make_run(folder: Path) -> list[str]:
    """Writes a tiny model's config, rows and run.yaml; the arguments of the run."""
    model = {
        "model_type": "qwen3", "vocab_size": 503, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "initializer_range": 0.15, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model))
    draw = random.Random(11)
    rows = [[draw.randrange(503) for _ in range(5 + i % 9)] for i in range(30)]
    lines = [json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    config = {
        "model": {"config_path": str(folder)},
        "data": {
            "datasets": [{"path": str(folder / "rows.jsonl"), "type": "tokenized"}],
            "sample_packing_method": "none",
        },
        "train": {
            "output_dir": "out", "max_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 4,
            "save_steps": 1, "save_total_limit": 2, "lr": 5e-3, "enable_mixed_precision": False,
            "use_tensorboard": True, "load_checkpoint_path": "auto",
        },
        "lora": {
            "lora_rank": 4, "lora_alpha": 8, "merge_lora_interval": 3, "lora_target_modules": ["q_proj", "o_proj"],
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(config))
    return ["--config", str(folder / "run.json"), "--device", "cpu"]


# Paths whose fsync no run can do without: what the checks here notice when it is left out.
NEEDED = [
    r"/manifest\.json$", r"/adapter_model\.safetensors$", r"/optimizer-0-of-\d\.safetensors$", r"/training_state$",
    r"/model/model\.safetensors$", r"/\.tmp-step_\d+-\d+$", r"/weights/run$", r"/\.latest\.tmp$", r"/metrics\.jsonl$",
    r"/out$", r"/power-cut-[^/]*$",
]  # fmt: skip


HASHES: dict[int, tuple[bytes, str]] = {}


def sha256(data: bytes) -> str:
    """The hash, remembered as long as the bytes are."""
    known = HASHES.get(id(data))
    if known is None or known[0] is not data:
        known = HASHES[id(data)] = (data, hashlib.sha256(data).hexdigest())
    return known[1]


def fault_of(state: dict, step: str) -> str | None:
    """The reason why the folder `step` of a state is not whole."""
    text = state.get(f"{step}/manifest.json")
    if text is None:
        return f"{step} has no manifest.json"
    try:
        manifest = json.loads(text)
    except ValueError as error:
        return f"{step}/manifest.json: {error}"
    for name, listed in manifest.items():
        data = state.get(f"{step}/{name}")
        if data is None or len(data) != listed["size"] or sha256(data) != listed["sha256"]:
            return f"{step}/{name} is not the file that was published"
    return None


RUN = "out/weights/run"


def check(state: dict, saved: int | None) -> list[str]:
    """Promises that the state breaks. `saved`: the step that the run had said to have saved."""
    names = (re.fullmatch(rf"{RUN}/step_(\d+)", path) for path in state)
    steps = sorted(int(name.group(1)) for name in names if name)
    faults = [fault for step in steps if (fault := fault_of(state, f"{RUN}/step_{step}"))]
    if saved is not None and (not steps or steps[-1] < saved):
        faults.append(f"step {saved} was saved, the newest is {steps[-1] if steps else 'none'}")
    latest = state.get(f"{RUN}/latest")
    if latest is None and saved is not None:
        faults.append("latest is missing")
    if latest is not None and latest.decode("latin-1") not in [f"step_{step}\n" for step in steps]:
        faults.append(f"latest is {latest!r}, the steps are {steps}")
    lines = state.get("out/metrics.jsonl") or b""
    known = []
    for line in lines.splitlines():
        try:
            known.append(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            break
    if steps and known[: steps[-1]] != list(range(1, steps[-1] + 1)):
        faults.append(f"step {steps[-1]} is there, metrics.jsonl has {known}")
    return faults


def digest(state: dict) -> str:
    own = hashlib.sha256()
    for path, data in sorted(state.items()):
        own.update(f"{path}\0{'folder' if data is None else sha256(data)}\0".encode())
    return own.hexdigest()


def story(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines]


def steps_of(out: Path) -> dict[str, bytes]:
    """The files of the last two steps."""
    found = {}
    for step in (STEPS - 1, STEPS):
        folder = out / "weights/run" / f"step_{step}"
        found |= {str(path.relative_to(out)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return found


def present(folder: Path) -> dict[str, bytes | None]:
    """Files below `folder`, by path; None for a folder."""
    below = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: None if path.is_dir() else path.read_bytes() for name, path in below.items()}


def put(state: dict, folder: Path) -> None:
    """Makes output_dir what it is in a state."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    for path, data in sorted(state.items()):
        if path.split("/")[0] == "out":
            place = folder / path
            place.mkdir() if data is None else place.write_bytes(data)


class Recording:
    """A run that was recorded from its first call to its last, and all cuts of it."""

    def __init__(
        self, folder: Path, command: list[str], environment: dict, mixed: int, draw: random.Random, without=None
    ):
        trace = folder.with_suffix(".trace")
        replay = Replay(str(folder), without)
        # All that was there before is on the disk.
        for path, data in sorted(present(folder).items()):
            parent, name = replay.disk.place(f"{folder}/{path}")
            parent.set({name: Node(data is None)})
            if data is not None:
                parent.entries[name].data = data
                parent.entries[name].sync()
        nodes = [replay.disk.top]
        for node in nodes:
            node.sync()
            nodes += [child for child in node.entries.values() if child.is_folder]
        steps = [int(path.name[5:]) for path in (folder / RUN).glob("step_*")]
        replay.saved = max(steps, default=None)

        strace = ["strace", "-f", "-y", "-xx", "-s", "1000000000", "-e", f"trace={CALLS}", "-e", "signal=none"]
        done = subprocess.run(
            [*strace, "-o", str(trace), *command], env=environment, cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"power_cut.py: the recorded run failed: {done.stderr[-2000:]}")
        self.calls, self.cuts, self.faults, self.states = 0, 0, [], {}
        for call in calls(trace):
            if not replay.apply(*call):
                continue
            self.calls += 1
            for policy in ["least", "names", "all"] + ["mixed"] * mixed:
                state = state_of(replay.disk.top, policy, draw)
                self.cuts += 1
                own = f"{digest(state)} {replay.saved}"
                if own in self.states:
                    continue
                faults = check(state, replay.saved)
                self.faults += [f"after call {self.calls} ({call[0]}), {policy}: {fault}" for fault in faults]
                # Bytes are shared with the replay: a state costs its paths alone.
                self.states[own] = (self.calls, policy, replay.saved, state)
        modelled, found = state_of(replay.disk.top, "all", draw), present(folder)
        if modelled != found:
            wrong = [path for path in {*modelled, *found} if modelled.get(path) != found.get(path)]
            sys.exit(f"power_cut.py: the model differs from the disk: {sorted(wrong)[:9]}")
        if replay.saved != STEPS:
            sys.exit(f"power_cut.py: of {STEPS} steps the log has last said to have saved {replay.saved}")
        trace.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True, help="xorl-dist")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the recorded run")
    parser.add_argument("--resumes", type=int, default=40, help="states to resume from, of each recorded run")
    parser.add_argument("--mixed", type=int, default=4, help="mixed states after each call")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="power-cut-")).resolve()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }  # fmt: skip
    binary = str(arguments.binary.resolve())
    ranks = ["mpirun", "-n", str(arguments.ranks)] if arguments.ranks > 1 else []
    command = [*ranks, binary, *make_run(folder)]
    draw, out = random.Random(arguments.seed), folder / "out"
    broken, expected, start = 0, None, None
    for name in ("a run", "one resumed after a cut"):
        if start is not None:
            put(start, folder)
        recording = Recording(folder, command, environment, arguments.mixed, draw)
        expected = expected or (story(out), steps_of(out))
        if (story(out), steps_of(out)) != expected:
            recording.faults.append("it ended otherwise than the run that was not cut")
        print(
            f"{arguments.ranks} ranks, {name}: {recording.calls} calls, {recording.cuts} cuts, {len(recording.states)} "
            f"different states of the disk: {len(recording.faults)} broken promises"
        )
        for fault in recording.faults[:20]:
            print(f"  {fault}")
        states = sorted(recording.states.values(), key=lambda cut: cut[0])
        # The next is recorded from the middle of this one.
        start = next(cut[3] for cut in states[len(states) // 2 :] if cut[1] == "mixed")
        sample = sorted(draw.sample(range(len(states)), min(arguments.resumes, len(states))))
        failed = 0
        for number, policy, saved, state in (states[place] for place in sample):
            put(state, folder)
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
            wrong = None
            if done.returncode:
                wrong = done.stderr.strip().splitlines()[-1:]
            elif (story(out), steps_of(out)) != expected:
                wrong = "it ended otherwise than the run that was not cut"
            elif subprocess.run([binary, "verify", str(out)], capture_output=True).returncode:
                wrong = "verify finds damage"
            if wrong:
                failed += 1
                print(f"  after call {number}, {policy}, step {saved} saved: {wrong}")
        print(f"  {len(sample)} states resumed: {len(sample) - failed} ended as the run that was not cut, bit for bit")
        broken += failed + len(recording.faults)
    missed = []
    for without in NEEDED:
        shutil.rmtree(out)
        recording = Recording(folder, command, environment, arguments.mixed, draw, without)
        missed += [] if recording.faults else [without]
    print(f"  without one fsync in turn: noticed {len(NEEDED) - len(missed)} times of {len(NEEDED)} {missed or ''}")
    shutil.rmtree(folder)
    sys.exit(1 if broken or missed else 0)


if __name__ == "__main__":
    main()
