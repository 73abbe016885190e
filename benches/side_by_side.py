"""Drives benches/side_by_side.sh: gives the peer and us the same tokens and the same adapter, and runs them in turns.

The peer's fastest way is tried out first (recompute on or off, glibc's malloc as it is or tuned) and is the one that counts.
Every row of the table is the median over the repeats, of the median step of a run; memory is the largest rank's peak.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 2
# Keeps what was freed inside the process: without it every step pays the page faults of its buffers again.
TUNED_MALLOC = {'MALLOC_MMAP_THRESHOLD_': '4294967296', 'MALLOC_TRIM_THRESHOLD_': '17179869184', 'MALLOC_TOP_PAD_': '268435456'}


def call(command: list, environment: dict[str, str]) -> str:
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f'side_by_side: exit {done.returncode}: {" ".join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}')
    return done.stdout


def run_peer(args, work: Path, recompute: bool, tuned: bool) -> dict:
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={args.ranks}']
    command = launch + [ROOT / 'benches/peer_fsdp2_peft.py', '--model', args.model, '--adapter', work / 'adapter',
                        '--tokens', work / 'tokens.npy', '--batch', args.batch, '--seq', args.seq, '--steps', args.steps,
                        '--warmup', WARMUP, '--lr', args.lr] + ([] if recompute else ['--no-recompute'])
    return json.loads(call(command, TUNED_MALLOC if tuned else {}).splitlines()[-1])


def run_ours(args, work: Path, recompute: bool) -> dict:
    out = work / f'ours-{"recompute" if recompute else "keep"}'
    config = {
        'model': {'model_path': str(args.model)},
        'data': {'datasets': [{'path': str(work / 'tokens.jsonl'), 'type': 'tokenized'}], 'sample_packing_method': 'none',
                 'shuffle_merged_datasets': False, 'shuffle_before_merging_datasets': False},
        'train': {'output_dir': str(out), 'max_steps': args.steps, 'micro_batch_size': args.batch, 'lr': args.lr,
                  'save_epochs': 0, 'enable_gradient_checkpointing': recompute, 'log_format': 'structured'},
        'lora': {'adapter_path': str(work / 'adapter')},
    }
    path = work / 'run.json'
    path.write_text(json.dumps(config))
    shutil.rmtree(out, ignore_errors=True)  # the trainer goes on with, or refuses, what an earlier run left
    launch = ['mpirun', '-n', args.ranks]
    if 'Open MPI' in call(['mpirun', '--version'], {}):
        launch += ['--oversubscribe'] + (['--allow-run-as-root'] if os.getuid() == 0 else [])
    call(launch + [Path(args.binary).resolve(), '--device', 'cpu', '--config', path], {})
    steps = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    return {'tokens_per_second': statistics.median(s['tokens_per_second'] for s in steps[WARMUP:]),
            'peak_rss_bytes': max(s['peak_rss_bytes'] for s in steps), 'losses': [s['loss'] for s in steps]}


def prepare(args, work: Path) -> None:
    """The tokens in both forms, and an adapter to start from."""
    work.mkdir(parents=True, exist_ok=True)
    rows = args.steps * args.ranks * args.batch
    vocabulary = json.loads((args.model / 'config.json').read_text())['vocab_size']
    ids = np.random.default_rng(args.seed).integers(3, min(vocabulary, 40000), (rows, args.seq))
    np.save(work / 'tokens.npy', ids)
    (work / 'tokens.jsonl').write_text(''.join(json.dumps({'input_ids': row, 'labels': row}) + '\n' for row in ids.tolist()))
    call([sys.executable, ROOT / 'tests/oracle/peft_reference.py', 'make-adapter', args.model, work / 'adapter',
          '--rank', args.rank, '--alpha', 2 * args.rank], {})


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--binary', default='target/release/xorl-dist')
    parser.add_argument('--model', type=Path, default=ROOT / 'models/smollm2')
    parser.add_argument('--ranks', type=int, default=2)
    parser.add_argument('--batch', type=int, default=2, help='rows per rank and step')
    parser.add_argument('--seq', type=int, default=512)
    parser.add_argument('--rank', type=int, default=16, help='of the adapter')
    parser.add_argument('--lr', type=float, default=1e-4)
    parser.add_argument('--steps', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--seed', type=int, default=1)
    args = parser.parse_args()
    args.model = args.model.resolve()
    work = ROOT / 'target/side_by_side'
    prepare(args, work)

    tried = {}
    for recompute in (True, False):
        for tuned in (False, True):
            tried[recompute, tuned] = run_peer(args, work, recompute, tuned)
            print(f'peer, recompute {recompute}, tuned malloc {tuned}: '
                  f'{tried[recompute, tuned]["tokens_per_second"]:.0f} tokens/s', file=sys.stderr, flush=True)
    best = max(tried, key=lambda way: tried[way]['tokens_per_second'])
    named = f'FSDP2 + PEFT (recompute {"on" if best[0] else "off"}, malloc {"tuned" if best[1] else "default"})'

    runs = {named: [], 'xorl-dist (recompute on)': [], 'xorl-dist (recompute off)': []}
    for _ in range(args.repeats):
        runs[named].append(run_peer(args, work, *best))
        runs['xorl-dist (recompute on)'].append(run_ours(args, work, True))
        runs['xorl-dist (recompute off)'].append(run_ours(args, work, False))

    peer = runs[named]
    speed, memory, losses = median(peer, 'tokens_per_second'), median(peer, 'peak_rss_bytes'), peer[0]['losses']
    print(f'{args.model.name}, {args.ranks} ranks x 1 thread, batch {args.batch} x {args.seq}, r = {args.rank}, bf16, '
          f'{args.steps} steps, {args.repeats} runs each in turns\n')
    print(f'{"":<48}{"tokens/s":>10}{"ratio":>8}{"peak RSS":>11}{"ratio":>8}{"loss diff":>11}')
    result = []
    for name, of in runs.items():
        difference = max(abs(a - b) for run in of for a, b in zip(run['losses'], losses, strict=True))
        row = {'name': name, 'tokens_per_second': round(median(of, 'tokens_per_second'), 1),
               'peak_rss_bytes': int(median(of, 'peak_rss_bytes')), 'max_loss_difference': round(difference, 5)}
        result.append(row)
        print(f'{name:<48}{row["tokens_per_second"]:>10.0f}{row["tokens_per_second"] / speed:>8.2f}'
              f'{row["peak_rss_bytes"] / 1e6:>8.0f} MB{row["peak_rss_bytes"] / memory:>8.2f}{difference:>11.5f}')
    print()
    print(json.dumps({'side_by_side': result, 'ranks': args.ranks, 'batch': args.batch, 'seq': args.seq, 'steps': args.steps,
                      'repeats': args.repeats}))


if __name__ == '__main__':
    main()
