"""Compares the speed and the memory of two builds: `ci/long.sh same_speed BEFORE AFTER`.

The builds run in turns, BEFORE AFTER BEFORE AFTER, on 2 ranks of one core each. Training runs are those of side_by_side.py in bf16:
tokens/s is the median of a run's counted steps, memory is VmHWM of the largest rank. `generate` continues chats with SmolLM2; its
tokens are those that it reads and those that it adds, its time is that of the whole command. Of the runs the medians are compared.

A line a case: tokens/s before and after, their ratio, the lowest and the highest ratio of a pair, memory before and after, and their
ratio. The last line is JSON. Exit code 1: a ratio of tokens/s is under 0.98, or one of memory over 1.02.
"""
import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
from processes import Failed, Process, command_line, descendants, read
from side_by_side import CASES, ROOT, TWO_RANKS, WORK, Material, Method, mpirun, ours, say

LEAST_SPEED, MOST_MEMORY = 0.98, 1.02
# Of VmHWM, which only grows: all but the last moment of a run is seen.
SAMPLE_SECONDS = 0.1
TRAINING = {
    'smollm2-2x512': ('smollm2-2x512', Method(TWO_RANKS, 'no_recompute')),
    'smollm2-2x512-recompute': ('smollm2-2x512', Method(TWO_RANKS, 'recompute_full_layer')),
    'qwen3-0.5b-1x512': ('qwen3-0.5b-1x512', Method(TWO_RANKS, 'recompute_full_layer')),
    'qwen3-moe-2x512-ep1': ('qwen3-moe-2x512', Method(TWO_RANKS, 'recompute_full_layer')),
    'qwen3-moe-2x512-ep2': ('qwen3-moe-2x512', Method(TWO_RANKS, 'recompute_full_layer', experts_over=2)),
    # Shows that the benchmark works; not one of the default cases.
    'smoke': ('smoke', Method(TWO_RANKS, 'no_recompute')),
}
GENERATE = 'generate'
NAMES = [*TRAINING, GENERATE]
CHATS, NEW_TOKENS = 16, 128


def trained(name: str, args) -> Callable[[Path], dict]:
    """Runs the training case `name` with a program."""
    case, method = TRAINING[name]
    material = Material(CASES[case], argparse.Namespace(**vars(args), lr=1e-4, rank=16, seed=1, binary=None))

    def once(program: Path) -> dict:
        material.args.binary = program
        found = ours(material, method, material.steps, min(args.warmup, material.steps - 1))
        return {key: found[key] for key in ('tokens_per_second', 'peak_rss_bytes')}
    return once


def generated(args) -> Callable[[Path], dict]:
    """Runs `generate` with a program."""
    from tokenizers import Tokenizer
    model, folder = ROOT / 'models/smollm2', WORK / 'generate'
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(model / 'tokenizer.json'))
    questions = [f'Tell a long story about {number} people and their {number + 1} houses.' for number in range(2, 2 + CHATS)]
    chats = folder / 'chats.jsonl'
    chats.write_text(''.join(json.dumps({'messages': [{'role': 'user', 'content': text}]}) + '\n' for text in questions))
    asked = sum(len(tokenizer.encode(text).ids) for text in questions)

    def once(program: Path) -> dict:
        out = folder / 'answers.jsonl'
        out.unlink(missing_ok=True)
        command = mpirun(2) + [program, 'generate', '--device', 'cpu', '--model', model, '--chat-file', chats, '--out', out,
                               '--max-new-tokens', args.steps or NEW_TOKENS]
        process = Process(command, {'OMP_NUM_THREADS': '1'}, program, watch=False)
        began, peak = time.time(), 0
        while process.process.poll() is None:
            pids = [pid for pid in descendants(process.process.pid) if str(program) in command_line(pid)[:3]]
            peak = max([peak, *map(peak_rss_bytes, pids)])
            time.sleep(SAMPLE_SECONDS)
        seconds = time.time() - began
        process.wait()
        answers = [json.loads(line)['completion'] for line in out.read_text().splitlines()]
        tokens = asked + sum(len(tokenizer.encode(text).ids) for text in answers)
        return {'tokens_per_second': tokens / seconds, 'peak_rss_bytes': peak}
    return once


def peak_rss_bytes(pid: int) -> int:
    found = re.search(r'^VmHWM:\s+(\d+) kB', read(Path(f'/proc/{pid}/status')), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def measure(name: str, programs: list[Path], args) -> dict:
    """All pairs of a case."""
    once = generated(args) if name == GENERATE else trained(name, args)
    runs: list[list[dict]] = [[], []]
    for pair in range(args.pairs):
        for of, program in zip(runs, programs):
            of.append(once(program))
        say(f'  {name}, pair {pair + 1} of {args.pairs}: ' + ' then '.join(f'{of[-1]["tokens_per_second"]:.1f}' for of in runs))
    before, after = ({key: statistics.median(run[key] for run in of) for key in of[0]} for of in runs)
    pairs = [other['tokens_per_second'] / one['tokens_per_second'] for one, other in zip(*runs)]
    return {'tokens_per_second': [before['tokens_per_second'], after['tokens_per_second']],
            'ratio': after['tokens_per_second'] / before['tokens_per_second'], 'pair_ratios': pairs,
            'peak_rss_bytes': [before['peak_rss_bytes'], after['peak_rss_bytes']],
            'memory_ratio': after['peak_rss_bytes'] / before['peak_rss_bytes']}


def show(name: str, found: dict) -> None:
    (before, after), (small, large) = found['tokens_per_second'], (min(found['pair_ratios']), max(found['pair_ratios']))
    memory = [size / 1e6 for size in found['peak_rss_bytes']]
    print(f'{name:<24}{before:>10.1f}{after:>10.1f}{found["ratio"]:>8.3f}   {small:.3f} to {large:.3f}'
          f'{memory[0]:>9.0f}{memory[1]:>9.0f}{found["memory_ratio"]:>8.3f}', flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', type=Path, metavar='BEFORE', help='a release build of xorl-dist')
    parser.add_argument('after', type=Path, metavar='AFTER', help='another one')
    parser.add_argument('--cases', default=','.join(name for name in NAMES if name != 'smoke'), help=f'some of {",".join(NAMES)}')
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--steps', type=int, help='of a training run, new tokens of a generation; by case where not given')
    parser.add_argument('--warmup', type=int, default=2, help='steps of a run that do not count')
    args = parser.parse_args()
    args.cases = args.cases.split(',')
    unknown = [name for name in args.cases if name not in NAMES]
    if unknown:
        parser.error(f'{unknown[0]!r} is none of {", ".join(NAMES)}')
    return args


def main() -> None:
    args = arguments()
    programs = [args.before.resolve(), args.after.resolve()]
    stamp, began, results = machine.stamp(), time.time(), {}
    print(machine.line(stamp))
    print(f'{"":<24}{"before":>10}{"after":>10}{"ratio":>8}{"pairs":>17}{"MB":>10}{"MB":>9}{"ratio":>8}', flush=True)
    try:
        for name in args.cases:
            results[name] = measure(name, programs, args)
            show(name, results[name])
    except Failed as failure:
        sys.exit(f'same_speed: {failure}')
    slower = [name for name, found in results.items() if found['ratio'] < LEAST_SPEED]
    larger = [name for name, found in results.items() if found['memory_ratio'] > MOST_MEMORY]
    print(json.dumps({'same_speed': {'pairs': args.pairs, 'cases': results, 'slower': slower, 'larger': larger,
                                     'seconds': round(time.time() - began), **stamp}}))
    sys.exit(1 if slower or larger else 0)


if __name__ == '__main__':
    main()
