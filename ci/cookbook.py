"""Recipes of tinker-cookbook, unmodified, against a server of SmolLM2 under a name that the cookbook knows.

    cookbook.py --binary target/release/xorl-dist [--ranks 2] [sl_loop] [rl_loop]

- sl_loop is killed in the middle and started again: it goes on from its last checkpoint, and steps that are trained
  twice have the same loss.
- rl_loop with loss_fn=importance_sampling samples, gets rewards and trains.

The last line is JSON; exit code 1 if one fails. Nothing is downloaded: the recipes find tokenizer and data by their hub
names below the folder where they start. The interpreter that runs this runs them: it has the cookbook.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving import ROOT, Server

# The cookbook knows no SmolLM2. Of a name that ends so, chats are plain text, which any tokenizer can have.
MODEL = "Qwen/Qwen3-8B-Base"
ROWS, BATCH = 32, 4
PROBLEMS, PROBLEMS_BATCH = 8, 2
# bf16, which a state that was saved and loaded changes in nothing; what may differ is the order of sums.
SAME = 1e-3


def write_home(home):
    """The tokenizer, conversations and problems that the recipes name."""
    (home / MODEL).mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (home / MODEL / name).symlink_to(ROOT / "models/smollm2" / name)
    chats = [
        [
            {"role": "user", "content": f"What is {i} plus {i + 3}?"},
            {"role": "assistant", "content": f"The sum is {2 * i + 3}."},
        ]
        for i in range(ROWS)
    ]
    write_rows(home / "HuggingFaceH4/no_robots/train.jsonl", [{"messages": chat} for chat in chats])
    # Problems with worked examples of one answer, so that a small model is right now and then, as advantages need.
    example = "What is 1 plus 2? Write \\boxed{3}.\n\nAssistant: \\boxed{3}\n\nUser: "
    problems = [example * (1 + i % 2) + f"What is {i % 4} plus {3 - i % 4}?" for i in range(PROBLEMS)]
    write_rows(home / "openai/gsm8k/main/train.jsonl", [{"question": one, "answer": "#### 3"} for one in problems])
    config = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n---\n"
    (home / "openai/gsm8k/README.md").write_text(config)


def write_rows(path, rows):
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(home, name, url, log, **settings):
    """Starts a recipe, which logs into `log`."""
    settings = {"base_url": url, "model_name": MODEL, "log_path": log, "lora_rank": 8, **settings}
    command = [
        sys.executable,
        "-m",
        f"tinker_cookbook.recipes.{name}",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    print(f"== {' '.join(command[2:])}", flush=True)
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(home / "hub"),
        "TINKER_API_KEY": "tml-local",
    }
    return subprocess.Popen(command, cwd=home, env={**os.environ, **offline}, stdout=sys.stderr)


def lines(path):
    """Rows of a file that may not be there yet, or be in the writing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def step_of(row):
    """The recipe's step; its field `step` is overwritten by the server's metric, which counts updates."""
    return round(row["progress"] * ROWS / BATCH)


def sl_loop(home, url):
    log = home / "sl_loop"
    settings = {"batch_size": BATCH, "save_every": 2, "learning_rate": 1e-3}
    first = recipe(home, "sl_loop", url, log, **settings)
    # Step 3 comes after the checkpoint before step 2, so steps 2 and 3 are trained again.
    while first.poll() is None and len(lines(log / "metrics.jsonl")) < 4:
        time.sleep(0.02)
    was_running = first.poll() is None
    first.kill()
    first.wait()
    before = lines(log / "metrics.jsonl")
    resumed_at = lines(log / "checkpoints.jsonl")[-1]["batch"]
    code = recipe(home, "sl_loop", url, log, **settings).wait()
    after = lines(log / "metrics.jsonl")[len(before) :]
    losses = {step_of(row): row["train_mean_nll"] for row in before}
    apart = max(abs(row["train_mean_nll"] - losses[step_of(row)]) for row in after if step_of(row) in losses)
    told = {
        "interrupted": was_running,
        "resumed_at": resumed_at,
        "steps": [step_of(row) for row in after],
        "losses": [losses[0], after[-1]["train_mean_nll"]],
        "losses_apart": apart,
        "last": lines(log / "checkpoints.jsonl")[-1]["name"],
    }
    steps = list(range(resumed_at, ROWS // BATCH))
    is_good = code == 0 and was_running and told["steps"] == steps and apart < SAME and told["last"] == "final"
    return is_good and after[-1]["train_mean_nll"] < losses[0], told


def rl_loop(home, url):
    log = home / "rl_loop"
    settings = {
        "loss_fn": "importance_sampling",
        "batch_size": PROBLEMS_BATCH,
        "group_size": 8,
        "max_tokens": 32,
        "save_every": 2,
    }
    code = recipe(home, "rl_loop", url, log, **settings).wait()
    rows = lines(log / "metrics.jsonl")
    # A step whose answers are all right or all wrong is left out by the recipe, and has no metrics of an update.
    trained = [row["progress/batch"] for row in rows if "grad_norm" in row]
    told = {"rewards": [row["reward/total"] for row in rows], "trained": trained}
    return code == 0 and len(rows) == PROBLEMS // PROBLEMS_BATCH and bool(trained), told


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, required=True)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("names", nargs="*", metavar="NAME", help="sl_loop, rl_loop; both if none is given")
    args = arguments.parse_args()
    recipes = {"sl_loop": sl_loop, "rl_loop": rl_loop}
    if unknown := set(args.names) - set(recipes):
        arguments.error(f"no recipe {', '.join(sorted(unknown))} here")

    told = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        write_home(home)
        with Server(args.binary.resolve(), args.ranks, Path(folder) / "server", base_model_name=MODEL) as server:
            for name in args.names or recipes:
                began = time.monotonic()
                is_good, more = recipes[name](home, server.url)
                told[name] = {"good": is_good, **more, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps({"ranks": args.ranks, "cookbook": told}))
    sys.exit(0 if all(one["good"] for one in told.values()) else 1)


if __name__ == "__main__":
    main()
