"""Runs every script of configs/server/examples against a server of SmolLM2, one after another; the last line is JSON.

    examples.py --binary target/release/xorl-dist [--ranks 2] [NAME...]

`chat` asks the base, and after `memorise` its adapter for a code. `rl` runs once more in fp32, where its ratios are 1.

Exit code 1 if one does not reach its goal. The interpreter that runs this runs them: it has their clients.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serving import ROOT, Server

FOLDER = ROOT / "configs/server/examples"
NAMES = ["supervised", "memorise", "chat", "rl", "dpo", "distil", "xorl_loop"]


def run(name, *arguments):
    """Runs a script and passes its lines on; returns them, and if it reached its goal in how many seconds."""
    print(f"== {name} {' '.join(arguments)}", flush=True)
    began, lines = time.monotonic(), []
    command = [sys.executable, "-u", FOLDER / f"{name}.py", *arguments]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as process:
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            lines.append(line)
    seconds = round(time.monotonic() - began, 1)
    return "".join(lines), {"reached": process.returncode == 0, "seconds": seconds}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--binary", type=Path, required=True)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    args = arguments.parse_args()
    if unknown := set(args.names) - set(NAMES):
        arguments.error(f"no example {', '.join(sorted(unknown))}")

    told, names = {}, args.names or NAMES
    with tempfile.TemporaryDirectory() as folder, Server(args.binary.resolve(), args.ranks, folder) as server:
        for name in names:
            lines, told[name] = run(name, "--base-url", server.url)
            if name == "memorise" and told[name]["reached"]:
                model, question = re.search(r"chat\.py --model (\S+) '(.*)'", lines).groups()
                code = re.search(r"knows .*?'(.*)'", lines)[1]
                asked = ["--model", model, question, "--expect", code]
                _, told["chat with the adapter"] = run("chat", "--base-url", server.url, *asked)
    if "rl" in names:
        fp32 = {"enable_mixed_precision": "false"}
        with (
            tempfile.TemporaryDirectory() as folder,
            Server(args.binary.resolve(), args.ranks, folder, **fp32) as server,
        ):
            _, told["rl in fp32"] = run("rl", "--base-url", server.url, "--tolerance", "1e-5")
    print(json.dumps({"ranks": args.ranks, "examples": told}))
    sys.exit(0 if all(one["reached"] for one in told.values()) else 1)


if __name__ == "__main__":
    main()
