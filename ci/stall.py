"""What a save keeps training waiting, from the trace of a run: the span `save` beside the median step.

    stall.py --binary target/release/xorl-dist [--steps 9] [--only smollm2|large|agreement]

- SmolLM2 in bf16, 8 rows of 512 tokens a step: at most 5 % of a step.
- Random values of Qwen2.5-1.5B's shapes: at most 1.2 times a memcpy of the same bytes into new memory (numpy, the
  tensors of the step's files one by one), on one rank.
- The agreement on signals after each micro-batch: the median host all-reduce of 2 ranks, which includes the wait for
  the slower one.

A save follows every second step, and its files are written during the next. Exit code 1 if a limit is passed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LIMIT_OF_STEP, LIMIT_OF_MEMCPY = 0.05, 1.2
TARGETS = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"


def traced(binary, folder, ranks, steps, model, tokens, micro, more=()):
    """Runs and returns rank 0's spans by name: seconds, in order."""
    config = folder / "run.yaml"
    config.write_text(f"""
model: {{{model}}}
data:
  datasets: [{{path: dummy, num_samples: 8}}]
  sample_packing_method: none
  max_seq_len: {tokens}
train:
  output_dir: {folder}/out
  num_train_epochs: 99
  max_steps: {steps + 2}
  micro_batch_size: {micro}
  global_batch_size: 8
  save_steps: 2
  save_epochs: 0
  save_total_limit: 1
  profile_steps: {steps}
lora: {{lora_rank: 16, lora_alpha: 32, lora_target_modules: {TARGETS}}}
""")
    launch = ["mpirun", "-n", str(ranks), "--allow-run-as-root", "--oversubscribe"] if ranks > 1 else []
    command = [*launch, str(binary), "--device", "cpu", "--config", str(config), *more]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    events = json.loads((folder / "out/trace/run/rank_0.json").read_text())["traceEvents"]
    spans = {}
    for event in sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"]):
        spans.setdefault(event["name"], []).append(event["dur"] / 1e6)
    return spans


def memcpy(step):
    """Bytes of the tensors in the files of `step`, and the median seconds of copying them into new memory."""
    lengths = []
    for file in [step / "adapter_model.safetensors", *sorted(step.glob("training_state/*.safetensors"))]:
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, end = tensor["data_offsets"]
                lengths.append(end - first)
    tensors = [np.ones(length, dtype=np.uint8) for length in lengths]
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        copies = [tensor.copy() for tensor in tensors]
        times.append(time.perf_counter() - begin)
        del copies
    return sum(lengths), statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9, help="steps that are traced, after two")
    parser.add_argument("--only", choices=["smollm2", "large", "agreement"])
    args = parser.parse_args()
    binary, fits = args.binary.resolve(), True
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cases = {
        "smollm2": (f"model_path: {ROOT}/models/smollm2", 512, 2),
        "large": (f"config_path: {ROOT}/tests/fixtures/qwen2_1_5b", 64, 8),
    }
    for name, (model, tokens, micro) in cases.items():
        if args.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            spans = traced(binary, Path(folder), 1, args.steps, model, tokens, micro)
            step = max(Path(folder).glob("out/weights/run/step_*"), key=lambda path: int(path.name[5:]))
            size, copied = memcpy(step)
        steps, saves = spans["step"], spans["save"]
        whole, stall = statistics.median(steps), statistics.median(saves)
        share, times = stall / whole, stall / copied
        print(
            f"{name}: a save of {size / 1e6:.1f} MB stalls {stall * 1e3:.1f} ms (of {len(saves)}: "
            f"{', '.join(f'{save * 1e3:.1f}' for save in saves)}): {share:.2%} of a step of {whole:.3f} s, {times:.2f} x a memcpy "
            f"of {copied * 1e3:.1f} ms; steps {', '.join(f'{step:.3f}' for step in steps)}"
        )
        fits &= share <= LIMIT_OF_STEP if name == "smollm2" else times <= LIMIT_OF_MEMCPY
    if args.only in (None, "agreement"):
        with tempfile.TemporaryDirectory() as folder:
            spans = traced(binary, Path(folder), 2, args.steps, cases["smollm2"][0], 128, 1)
        agreed, steps = spans["all_reduce_host"], spans["step"]
        per_step = statistics.median(agreed) * 3
        print(
            f"agreement: {statistics.median(agreed) * 1e6:.0f} us each, {len(agreed)} host all-reduces in {len(steps)} steps of "
            f"4 micro-batches a rank; 3 of a step {per_step / statistics.median(steps):.4%} of it"
        )
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
