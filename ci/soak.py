"""A long run that saves, evaluates and is killed again and again: its memory and open files stay flat, and nothing is lost.

    soak.py --binary target/release/xorl-dist [--minutes 30] [--ranks 2] [--seed 1]

Half of the time its rows are packed, half of it each sample is a row. Of each half the first two thirds are one life: from its sixth
minute on (in one of less than ten minutes, from its second third on) resident memory of all ranks grows by less than 2 % and no file
stays open. Then SIGKILL ends all ranks, or one, at random moments; each time the run goes on from its newest step
(`load_checkpoint_path: auto`). A last life is asked to stop. Checked are, too:

- every life ends as it was ended: killed, or 75 where it was asked;
- each resumed life begins at the newest step that was published when it was killed;
- metrics.jsonl has every step once, and no step is damaged (`xorl-dist verify`).

Exit code 1 and a line each where one does not hold. The last line is JSON.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benches")]
from processes import Process, command_line, descendants, growth, open_files, resident_bytes, run  # noqa: E402

WARM_SECONDS = 300
FLAT = 0.02
MODEL = dict(
    model_type="llama",
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    initializer_range=0.05,
    tie_word_embeddings=False,
)
TRAIN = dict(
    num_train_epochs=1_000_000,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    lr=1e-4,
    save_steps=25,
    save_total_limit=3,
    eval_steps=40,
    log_format="structured",
    load_checkpoint_path="auto",
    save_epochs=0,
)


def prepare(folder, packing, seed):
    """The model's config, rows of 10 to 500 tokens and run.yaml."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    own = random.Random(seed)
    with open(folder / "rows.jsonl", "w") as rows:
        for _ in range(2000):
            ids = [own.randrange(MODEL["vocab_size"]) for _ in range(own.randrange(10, 500))]
            rows.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    data = {
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "tokenized"}],
        "sample_packing_method": packing,
        "sample_packing_sequence_len": 512,
        "val_set_size": 40,
    }
    train = TRAIN | {"output_dir": str(folder / "out")}
    config = {"model": {"config_path": str(folder)}, "data": data, "train": train, "lora": {"lora_rank": 8, "lora_alpha": 16}}
    # JSON is YAML.
    (folder / "run.yaml").write_text(json.dumps(config))


class Soak:
    def __init__(self, args, folder, failures):
        self.args, self.folder, self.failures = args, folder, failures
        self.own = random.Random(f"{args.seed} {folder.name}")
        self.kills = self.resumes = 0

    def start(self):
        launch = ["mpirun", "-n", self.args.ranks] if self.args.ranks > 1 else []
        environment = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        command = [*launch, self.args.binary, "--device", "cpu", "--config", self.folder / "run.yaml"]
        return Process(command, environment, self.args.binary, watch=False)

    def ranks(self, process):
        pids = [process.process.pid, *descendants(process.process.pid)]
        return [pid for pid in pids if str(self.args.binary) in command_line(pid)[:1]]

    def published(self):
        """The newest step of which the manifest is there."""
        steps = (self.folder / "out/weights/run").glob("step_*/manifest.json")
        return max((int(path.parent.name.removeprefix("step_")) for path in steps), default=0)

    def first_life(self, seconds):
        """Watches memory and files of one undisturbed life, and kills it."""
        process = self.start()
        began, memory, files = time.monotonic(), [], []
        warm = WARM_SECONDS if seconds >= 2 * WARM_SECONDS else seconds / 3
        while (spent := time.monotonic() - began) < seconds:
            if process.process.poll() is not None:
                raise process._failed("it ended by itself", process.process.returncode)
            if spent > warm:
                ranks = self.ranks(process)
                memory.append(sum(map(resident_bytes, ranks)))
                files.append(sum(map(open_files, ranks)))
            time.sleep(1)
        self.kill(process)
        (grown, share), (more_files, _) = growth(memory), growth(files)
        if share > FLAT:
            self.failures.append(f"{self.folder.name}: memory grew by {grown} bytes, {share:.1%}, after {warm:.0f} s")
        if more_files > 0:
            self.failures.append(f"{self.folder.name}: {more_files} more files are open than after {warm:.0f} s")
        return {"seconds": round(seconds), "memory_bytes": memory[-1], "growth": round(share, 4), "open_files": files[-1], "more_files": more_files}

    def kill(self, process):
        """SIGKILL to all ranks, or to one."""
        while not (ranks := self.ranks(process)):
            time.sleep(0.01)
        for pid in ranks if self.own.random() < 0.5 else [self.own.choice(ranks)]:
            os.kill(pid, signal.SIGKILL)
        process.process.wait(60)
        self.kills += 1

    def lives(self, seconds):
        """Kills and goes on, at random moments, then asks the last life to stop."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            newest, process = self.published(), self.start()
            time.sleep(1 + self.own.random() * 15)
            self.kill(process)
            self.check_beginning(process, newest)
        newest, process = self.published(), self.start()
        while self.published() == newest:
            if process.process.poll() is not None:
                raise process._failed("it ended by itself", process.process.returncode)
            time.sleep(0.1)
        process.process.send_signal(signal.SIGUSR1)
        status = process.process.wait(120)
        self.check_beginning(process, newest)
        if status != 75:
            self.failures.append(f"{self.folder.name}: ended with {status} after SIGUSR1")

    def check_beginning(self, process, newest):
        """The step that the life said it goes on from, if it came so far, is the newest of then."""
        process.errors.seek(0)
        found = re.search(r"on from \S*step_(\d+)", process.errors.read())
        if found and int(found[1]) != newest:
            self.failures.append(f"{self.folder.name}: went on from step {found[1]}, step {newest} was published")
        self.resumes += bool(found)

    def check_end(self):
        lines = (self.folder / "out/metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        if steps != list(range(1, len(steps) + 1)):
            self.failures.append(f"{self.folder.name}: metrics.jsonl has not every step once")
        told = run([self.args.binary, "verify", self.folder / "out"])
        return {"steps": len(steps), "kills": self.kills, "resumes": self.resumes, "verified": [text for _, text in told.lines]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/xorl-dist")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    failures, results = [], {}
    with tempfile.TemporaryDirectory() as root:
        for packing in ("multipack", "none"):
            folder, seconds = Path(root) / packing, 30 * args.minutes
            prepare(folder, packing, args.seed)
            soak = Soak(args, folder, failures)
            results[packing] = soak.first_life(seconds * 2 / 3)
            soak.lives(seconds / 3)
            results[packing] |= soak.check_end()
            print(f"soak: {packing}: {results[packing]}", file=sys.stderr, flush=True)
    for failure in failures:
        print(f"soak: {failure}", file=sys.stderr)
    print(json.dumps(results))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
