"""Preparation of a data set: xorl-dist beside HF datasets with a tokenizer, and beside the tokenizers crate alone.

    prepare.py --model DIR [--mb 100] [--type chat|text] [--processes N] [--binary target/release/xorl-dist] [--skip-hf]

Writes one .jsonl of that size, then lets each side prepare it: ours by `check` with an empty cache (less the seconds of
`check` on random data), HF datasets by load_dataset and map with N processes (chat: apply_chat_template, then the
tokenizer), the crate by encode_batch of the finished texts with N threads. Prints seconds, MB/s and the peak of resident
memory of the largest process. Needs transformers; datasets for the second side.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

WORDS = (pathlib.Path(__file__).resolve().parents[1] / "README.md").read_text().split()


def text(random_, words):
    return " ".join(random_.choice(WORDS) for _ in range(words))


def rows(kind, size):
    random_ = random.Random(0)
    written = 0
    while written < size:
        if kind == "text":
            row = {"text": text(random_, 300)}
        else:
            turns = [("user", 40), ("assistant", 120), ("user", 20), ("assistant", 80)]
            row = {"messages": [{"role": role, "content": text(random_, words)} for role, words in turns]}
        line = json.dumps(row, ensure_ascii=False) + "\n"
        written += len(line.encode())
        yield line


def timed(command, env):
    """Seconds, and the peak of resident memory in MB of a program."""
    begin = time.time()
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command}: {error.decode()}")
    return time.time() - begin, usage.ru_maxrss / 1024


def ours(binary, model, data, kind, folder):
    def check(entry, cache):
        config = folder / "run.yaml"
        config.write_text(
            f"model: {{config_path: {model}, tokenizer_path: {model}}}\n"
            f"data: {{datasets: [{json.dumps(entry)}], dataset_prepared_path: {cache}}}\n"
        )
        return timed([binary, "check", "--config", str(config)], {})

    base, _ = check({"path": "dummy", "num_samples": 1}, folder / "none")
    seconds, peak = check({"path": str(data), "type": kind}, folder / "cache")
    again, _ = check({"path": str(data), "type": kind}, folder / "cache")
    return seconds - base, peak, again - base


HF = """
import sys, datasets, transformers
model, data, kind, processes, cache = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=cache)
def tokenize(batch):
    if kind == "text":
        return tokenizer(batch["text"])
    texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
    return tokenizer(texts, add_special_tokens=False)
rows = rows.map(tokenize, batched=True, num_proc=int(processes), remove_columns=rows.column_names)
"""

CRATE = """
import sys, json, time, tokenizers, transformers
model, data, kind = sys.argv[1:]
crate = tokenizers.Tokenizer.from_file(model + "/tokenizer.json")
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
rows = [json.loads(line) for line in open(data)]
if kind == "text":
    texts = [row["text"] for row in rows]
else:
    texts = tokenizer.apply_chat_template([row["messages"] for row in rows], tokenize=False)
begin = time.time()
for at in range(0, len(texts), 4096):
    crate.encode_batch(texts[at : at + 4096], add_special_tokens=False)
print(time.time() - begin)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--type", default="chat", choices=["chat", "text"])
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--binary", default="target/release/xorl-dist")
    parser.add_argument("--skip-hf", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        data = folder / "data.jsonl"
        with data.open("w") as file:
            file.writelines(rows(args.type, args.mb << 20))

        def say(name, seconds, peak):
            peak = f", peak {peak:.0f} MB" if peak else ""
            print(f"{name}: {seconds:.1f} s, {args.mb / seconds:.1f} MB/s{peak}", flush=True)

        model = str(pathlib.Path(args.model).resolve())
        seconds, peak, again = ours(args.binary, model, data, args.type, folder)
        say(f"xorl-dist, {args.processes} threads", seconds, peak)
        print(f"xorl-dist, prepared before: {again:.1f} s", flush=True)
        threads = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(args.processes), "HF_HUB_OFFLINE": "1"}
        crate = subprocess.run(
            [sys.executable, "-c", CRATE, model, str(data), args.type],
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
            check=True,
        )
        say("tokenizers crate alone, texts in memory", float(crate.stdout), None)
        if not args.skip_hf:
            command = [sys.executable, "-c", HF, model, str(data), args.type, str(args.processes), str(folder / "hf")]
            quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
            say(f"HF datasets, {args.processes} processes", *timed(command, quiet))


main()
