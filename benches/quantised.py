"""Speed and memory of quantised bases (QLoRA) on CPUs, beside bf16 and beside PEFT + bitsandbytes.

    quantised.py [--parts kernel,packing,step,memory] [--binary target/release/xorl-dist] [--format nf4] [--turns 1]
        [--batch 2] [--models DIR] [--keep]

    kernel    forward and input gradient of a layer [2048, 1024] with 1024 and 64 rows: each format beside bf16, ours
              (benches/ops.rs) and bitsandbytes' (nf4), each on all cores
    packing   values quantised in a second by one thread: ours from a file, bitsandbytes' from memory
    step      a step of a random Qwen2.5-1.5B, batch rows of 512 tokens a core, full recompute, r = 16: ours on 2 ranks
              in bf16 and in the format, PEFT in one process with 2 threads in bf16 and with bitsandbytes' nf4; in turns
    memory    Llama-2-7B's shapes in the format, full recompute, one row of 512 tokens a rank, 2 ranks: seconds of loading
              and of a step, and the largest sum of both ranks' PSS. The model, 13.5 GB, is made in --models and removed
              unless --keep is given.

Prints a line a figure and last all of it as JSON.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine
from processes import Process, run
from side_by_side import mpirun

ROOT = machine.ROOT
PEER = ROOT / 'benches/peer_fsdp2_peft.py'
OUTPUT, INPUT, SEQ = 2048, 1024, 512
SECONDS = 3.0


def ops(names: str) -> dict[str, float]:
    """Milliseconds of each line of benches/ops.rs."""
    done = subprocess.run(['cargo', 'bench', '--bench', 'ops', '--', names], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = re.findall(r'^(\S+/.*): +([\d.]+) ms', done.stdout, re.MULTILINE)
    return {name: float(milliseconds) for name, milliseconds in lines}


def in_turns(operations: dict) -> dict[str, list[float]]:
    """Seconds of each operation."""
    times = {name: [] for name in operations}
    for operation in operations.values():
        operation()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, operation in operations.items():
            begin = time.perf_counter()
            operation()
            times[name].append(time.perf_counter() - begin)
    return times


def bitsandbytes_layer(rows: int) -> dict:
    import bitsandbytes
    import torch

    weight = torch.randn(OUTPUT, INPUT) * 0.02
    packed = bitsandbytes.nn.Params4bit(weight.bfloat16(), requires_grad=False, quant_type='nf4')._quantize('cpu')
    plain = weight.bfloat16()
    x = torch.randn(rows, INPUT).bfloat16().requires_grad_()
    d_y = torch.randn(rows, OUTPUT).bfloat16()

    def both(layer) -> None:
        layer(x).backward(d_y)
        x.grad = None

    times = in_turns({'bf16': lambda: both(lambda x: torch.nn.functional.linear(x, plain)),
                      'nf4': lambda: both(lambda x: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=packed.quant_state))})
    kept = statistics.median(bf16 / nf4 for bf16, nf4 in zip(times['bf16'], times['nf4'], strict=True))
    return {**{f'{name}_ms': 1e3 * statistics.median(own) for name, own in times.items()}, 'keeps': kept}


def kernel(_) -> dict:
    found = {'ours': ops('quantised')}
    for rows in (1024, 64):
        found[f'bitsandbytes, {rows} rows'] = bitsandbytes_layer(rows)
    return found


def packing(_) -> dict:
    import bitsandbytes
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = (torch.randn(OUTPUT, INPUT) * 0.02).bfloat16()
    theirs = in_turns({'nf4': lambda: bitsandbytes.functional.quantize_4bit(weight, quant_type='nf4')})['nf4']
    torch.set_num_threads(threads)
    numbers = OUTPUT * INPUT
    rates = {f'ours, {name.split("/")[1]}': numbers / ms * 1e3 for name, ms in ops('packing').items()}
    rates['bitsandbytes, nf4'] = numbers / statistics.median(theirs)
    return {**{f'{name}, numbers/s': rate for name, rate in rates.items()},
            'nf4, ours / bitsandbytes': rates['ours, nf4'] / rates['bitsandbytes, nf4']}


def model(args, name: str) -> Path:
    path = args.models / name
    if not path.exists():
        args.models.mkdir(parents=True, exist_ok=True)
        run([sys.executable, ROOT / 'benches/random_model.py', name, path])
    return path


def ours(args, path: Path, batch: int, steps: int, quantised: bool, watch: bool) -> dict:
    """`steps` steps of 2 ranks."""
    import numpy as np

    folder = args.models / 'runs'
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((path / 'config.json').read_text())['vocab_size']
    ids = np.random.default_rng(1).integers(3, min(vocabulary, 40000), (steps * 2 * batch, SEQ))
    np.save(folder / 'tokens.npy', ids)
    lines = (json.dumps({'input_ids': row, 'labels': row}) + '\n' for row in ids.tolist())
    (folder / 'tokens.jsonl').write_text(''.join(lines))
    out = folder / 'out'
    shutil.rmtree(out, ignore_errors=True)
    config = {
        'model': {'model_path': str(path)},
        'data': {'datasets': [{'path': str(folder / 'tokens.jsonl'), 'type': 'tokenized'}], 'sample_packing_method': 'none',
                 'shuffle_merged_datasets': False, 'shuffle_before_merging_datasets': False},
        'train': {'output_dir': str(out), 'max_steps': steps, 'micro_batch_size': batch, 'save_epochs': 0,
                  'enable_gradient_checkpointing': True, 'gradient_checkpointing_method': 'recompute_full_layer',
                  'log_format': 'structured', 'enable_mixed_precision': True},
        'lora': {'lora_rank': 16, 'lora_alpha': 32, 'enable_qlora': quantised, 'quant_format': args.format},
    }
    (folder / 'run.json').write_text(json.dumps(config))
    process = Process([*mpirun(2), args.binary, '--device', 'cpu', '--config', folder / 'run.json'], {'OMP_NUM_THREADS': '1'},
                      args.binary, watch)
    done = process.wait()
    steps = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    first = next(at for at, text in done.lines if text.startswith('[STEP 1/'))
    counted = steps[1:] or steps
    return {'step_seconds': statistics.median(step['step_seconds'] for step in counted),
            'start_seconds': first - steps[0]['step_seconds'] - done.began,
            'peak_rss_bytes': max(step['peak_rss_bytes'] for step in steps), 'pss_bytes': done.pss_bytes,
            'losses': [step['loss'] for step in steps], 'comm_bytes': steps[-1]['comm_bytes']}


def theirs(args, path: Path, batch: int, steps: int, quantised: bool) -> dict:
    """The same rows in one process with 2 threads."""
    command = [sys.executable, PEER, '--model', path, '--tokens', args.models / 'runs/tokens.npy', '--batch', 2 * batch, '--seq', SEQ,
               '--steps', steps, '--warmup', 1, *(['--nf4'] if quantised else [])]
    found = json.loads(run(command, {'OMP_NUM_THREADS': '2'}).lines[-1][1])
    return {key: found[key] for key in ('step_seconds', 'peak_rss_bytes', 'losses')}


def step(args) -> dict:
    path, steps = model(args, 'qwen2.5-1.5b'), 2
    ways = {'ours, bf16': lambda: ours(args, path, args.batch, steps, False, False),
            f'ours, {args.format}': lambda: ours(args, path, args.batch, steps, True, False),
            'PEFT, bf16': lambda: theirs(args, path, args.batch, steps, False),
            'PEFT + bitsandbytes, nf4': lambda: theirs(args, path, args.batch, steps, True)}
    runs = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, way in ways.items():
            runs[name].append(way())
            say(f'{name}: {json.dumps(runs[name][-1])}')
    seconds = [statistics.median(run['step_seconds'] for run in of) for of in runs.values()]
    bytes_of = [max(run['peak_rss_bytes'] for run in of) for of in runs.values()]
    return {**runs, 'ours keeps of bf16': seconds[0] / seconds[1], 'PEFT keeps of bf16': seconds[2] / seconds[3],
            'ours / PEFT, bf16': seconds[2] / seconds[0], 'ours / PEFT, quantised': seconds[3] / seconds[1],
            'ratio of both': seconds[3] / seconds[1] / (seconds[2] / seconds[0]),
            'VmHWM, ours / PEFT, quantised': bytes_of[1] / bytes_of[3]}


def memory(args) -> dict:
    path = model(args, 'llama-2-7b')
    try:
        return ours(args, path, 1, 1, True, True)
    finally:
        if not args.keep:
            shutil.rmtree(path)


PARTS = {'kernel': kernel, 'packing': packing, 'step': step, 'memory': memory}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default='kernel,packing,step')
    parser.add_argument('--binary', type=Path, default=ROOT / 'target/release/xorl-dist')
    parser.add_argument('--format', default='nf4', choices=['nf4', 'block_fp8', 'nvfp4'])
    parser.add_argument('--batch', type=int, default=2, help='rows of a core')
    parser.add_argument('--turns', type=int, default=1)
    parser.add_argument('--models', type=Path, default=ROOT / 'target/quantised')
    parser.add_argument('--keep', action='store_true', help='keep the model of the part memory')
    args = parser.parse_args()
    parts = args.parts.split(',')
    if unknown := set(parts) - set(PARTS):
        parser.error(f'no parts {", ".join(sorted(unknown))}; there are {", ".join(PARTS)}')
    args.binary, args.models = args.binary.resolve(), args.models.resolve()
    found = {'load_before': os.getloadavg()[0]}
    for part in parts:
        found[part] = PARTS[part](args)
        for name, value in found[part].items():
            say(f'{part}: {name}: {value}')
    print(json.dumps({**machine.stamp(), **found}))


if __name__ == '__main__':
    main()
