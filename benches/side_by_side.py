"""Drives benches/side_by_side.sh: gives the peer and us the same tokens and the same adapter, and runs them in turns.

A step lasts from the end of the one before to its own end, saves aside. Of a run the median of its counted steps is taken, of
the repeats the median run. Memory is VmHWM of the largest rank, and the largest sum of all ranks' PSS that was seen in a
short run of its own, because watching it costs speed. Of the peer's ways the fastest counts; ours are held against the one
with as many cores: both, or one. A core computes `batch` rows a step, in 2 ranks, in 2 threads of
one process or alone, so that all who have both cores see the same rows in every step.
Fraction of peak: arithmetic that a step needs (nothing for what is computed twice) over what bf16 torch.mm reached with as
many processes and threads right before the runs of that repeat. Comm: share of our steps spent in gathers and reductions.
"""
import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import machine
import numpy as np
import plot
from processes import Failed, Process, run, run_together

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / 'target/side_by_side'
PEER = ROOT / 'benches/peer_fsdp2_peft.py'
# Keeps what was freed inside the process: without it every step pays the page faults of its buffers again.
TUNED_MALLOC = {'MALLOC_MMAP_THRESHOLD_': '4294967296', 'MALLOC_TRIM_THRESHOLD_': '17179869184', 'MALLOC_TOP_PAD_': '268435456'}
METHODS = ['recompute_full_layer', 'selective', 'no_recompute']
# Of a try of the peer's ways, of one of torch.compile (its second step may compile once more), of a run that is
# watched.
TRY_STEPS, COMPILE_STEPS, WATCHED_STEPS = 3, 4, 3


@dataclass(frozen=True)
class Layout:
    """Processes, and threads of each."""
    ranks: int
    threads: int

    def __str__(self) -> str:
        return f'{self.ranks} rank{"s" if self.ranks > 1 else ""} x {self.threads} thread{"s" if self.threads > 1 else ""}'


TWO_RANKS, TWO_THREADS, ONE_CORE = Layout(2, 1), Layout(1, 2), Layout(1, 1)
LAYOUTS = {'2x1': TWO_RANKS, '1x2': TWO_THREADS, '1x1': ONE_CORE}


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    seq: int
    steps: int

    def rows(self, layout: Layout) -> int:
        """Of a rank and step."""
        return self.batch * layout.threads


MAIN = 'smollm2-2x512'
CASES = {
    MAIN: Case('smollm2', 2, 512, 8),
    'smollm2-1x512': Case('smollm2', 1, 512, 8),
    'smollm2-4x512': Case('smollm2', 4, 512, 6),
    'smollm2-1x2048': Case('smollm2', 1, 2048, 6),
    'smollm2-2x2048': Case('smollm2', 2, 2048, 5),
    'qwen3-0.5b-1x512': Case('qwen3-0.5b', 1, 512, 6),
    'qwen3-moe-2x512': Case('qwen3-moe-0.23b', 2, 512, 6),
    # Says whether the benchmark works, nothing else; not one of `all`.
    'smoke': Case('smollm2', 1, 64, 3),
}
# Models whose load is timed; a row of few tokens, for the step is not what is asked for.
STARTS = {'smollm2': Case('smollm2', 1, 128, 1), 'qwen3-2gb': Case('qwen3-2gb', 1, 128, 1)}


@dataclass(frozen=True)
class Way:
    """How the peer is run."""
    layout: Layout
    recompute: bool
    tuned_malloc: bool
    compiled: bool = False

    def __str__(self) -> str:
        parts = ['recompute' if self.recompute else 'no recompute', 'tuned malloc' if self.tuned_malloc else 'default malloc']
        return ', '.join(parts + ['torch.compile'] * self.compiled)

    @property
    def name(self) -> str:
        return f'{"FSDP2 + PEFT" if self.layout.ranks > 1 else "PEFT"} ({self})'


@dataclass(frozen=True)
class Method:
    """How ours is run."""
    layout: Layout
    method: str
    bf16: bool = True
    # Ranks over which experts are divided.
    experts_over: int = 1

    @property
    def name(self) -> str:
        over = f', ep {self.experts_over}' if self.experts_over > 1 else ''
        return f'xorl-dist ({self.method}{over}{"" if self.bf16 else ", fp32"})'


# What of a model with experts is adapted, as PEFT's target_parameters and as our targets: gate and up of an expert
# by one.
EXPERT_PARAMETERS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
ATTENTION = ['q_proj', 'k_proj', 'v_proj', 'o_proj']


# --- what both are given

class Material:
    """Model, adapter and tokens of a case, made where they are missing."""

    def __init__(self, case: Case, args):
        self.case, self.args = case, args
        self.steps = args.steps or case.steps
        self.model = ROOT / 'models' / case.model
        if not self.model.exists():
            say(f'making random weights: {self.model}')
            run([sys.executable, ROOT / 'benches/random_model.py', case.model, self.model])
        self.folder = WORK / f'{case.model}-{case.batch}x{case.seq}'
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = json.loads((self.model / 'config.json').read_text())
        self.has_experts = bool(self.config.get('num_experts') or self.config.get('num_local_experts'))
        self.adapter = self._adapter()
        self._tokens()

    def _adapter(self) -> Path:
        rank = self.args.rank
        adapter = WORK / f'{self.case.model}-adapter-r{rank}'
        if not adapter.exists():
            unfinished = adapter.with_suffix('.tmp')
            targets = ['--targets', ','.join(ATTENTION), '--parameters', ','.join(EXPERT_PARAMETERS)] if self.has_experts else []
            run([sys.executable, ROOT / 'tests/oracle/peft_reference.py', 'make-adapter', self.model, unfinished,
                 '--rank', rank, '--alpha', 2 * rank, *targets])
            unfinished.rename(adapter)
        return adapter

    def _tokens(self) -> None:
        rows = max(self.steps, COMPILE_STEPS) * self.case.batch * 2
        ids = np.random.default_rng(self.args.seed).integers(3, min(self.config['vocab_size'], 40000), (rows, self.case.seq))
        np.save(self.folder / 'tokens.npy', ids)
        lines = (json.dumps({'input_ids': row, 'labels': row}) + '\n' for row in ids.tolist())
        (self.folder / 'tokens.jsonl').write_text(''.join(lines))


# --- one run


def peer(material: Material, way: Way, steps: int, warmup: int, watch: bool = False, limit: float | None = None) -> dict:
    case, layout = material.case, way.layout
    launch = [sys.executable]
    if layout.ranks > 1:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={layout.ranks}']
    command = launch + [PEER, '--model', material.model, '--adapter', material.adapter, '--tokens', material.folder / 'tokens.npy',
                        '--batch', case.rows(layout), '--seq', case.seq, '--steps', steps, '--warmup', warmup,
                        '--lr', material.args.lr]
    command += [] if way.recompute else ['--no-recompute']
    command += ['--compile'] if way.compiled else []
    environment = {'OMP_NUM_THREADS': str(layout.threads), **(TUNED_MALLOC if way.tuned_malloc else {})}
    done = run(command, environment, PEER, watch, limit)
    found = json.loads(done.lines[-1][1])
    return {'tokens_per_second': found['tokens_per_second'], 'peak_rss_bytes': found['peak_rss_bytes'], 'pss_bytes': done.pss_bytes,
            'losses': found['losses'], 'comm_share': None, 'start_seconds': found['first_step_at'] - done.began}


def start_ours(material: Material, method: Method, steps: int, watch: bool = False, cores: list[int] | None = None,
               job: int = 0) -> tuple[Process, Path]:
    """The process and its output_dir. With `cores`, each rank is bound to its own."""
    out = material.folder / f'ours-{job}'
    path = material.folder / f'run-{job}.json'
    path.write_text(json.dumps(config(material, method, steps, out)))
    shutil.rmtree(out, ignore_errors=True)  # the trainer goes on with, or refuses, what an earlier run left
    command = [material.args.binary, '--device', 'cpu', '--config', path]
    if method.layout.ranks > 1:
        command = mpirun(method.layout.ranks) + bound_ranks(cores) + command
    elif cores:
        command = ['taskset', '-c', cores[0], *command]
    environment = {'OMP_NUM_THREADS': str(method.layout.threads)}
    return Process(command, environment, material.args.binary, watch), out


def config(material: Material, method: Method, steps: int, out: Path) -> dict:
    return {
        'model': {'model_path': str(material.model)},
        'data': {'datasets': [{'path': str(material.folder / 'tokens.jsonl'), 'type': 'tokenized'}],
                 'sample_packing_method': 'none', 'shuffle_merged_datasets': False, 'shuffle_before_merging_datasets': False},
        'train': {'output_dir': str(out), 'max_steps': steps, 'micro_batch_size': material.case.rows(method.layout),
                  'lr': material.args.lr, 'save_epochs': 0, 'enable_gradient_checkpointing': True,
                  'gradient_checkpointing_method': method.method, 'log_format': 'structured',
                  'enable_mixed_precision': method.bf16, 'expert_parallel_size': method.experts_over},
        'lora': {'adapter_path': str(material.adapter),
                 'lora_target_modules': ATTENTION + ['gate_up_proj', 'down_proj'] if material.has_experts else None},
    }


def mpirun(ranks: int) -> list:
    launch = ['mpirun', '-n', ranks]
    if 'Open MPI' in machine.output(['mpirun', '--version']):
        launch += ['--oversubscribe'] + (['--allow-run-as-root'] if os.getuid() == 0 else [])
    return launch


def bound_ranks(cores: list[int] | None) -> list:
    """What binds the rank that it starts to its core, whichever MPI it is; nothing without `cores`."""
    if not cores:
        return []
    script = f'cores=({" ".join(map(str, cores))}); rank=${{OMPI_COMM_WORLD_LOCAL_RANK:-${{MPI_LOCALRANKID:-$PMI_RANK}}}}'
    return ['bash', '-c', script + '; exec taskset -c "${cores[$rank]}" "$@"', 'bound']


def result_of_ours(done: Process, out: Path, warmup: int) -> dict:
    steps = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    counted = steps[warmup:]
    # Its line is printed when the step has ended.
    first_line = next(at for at, text in done.lines if text.startswith('[STEP 1/'))
    return {'tokens_per_second': statistics.median(step['tokens_per_second'] for step in counted),
            'peak_rss_bytes': max(step['peak_rss_bytes'] for step in steps), 'pss_bytes': done.pss_bytes,
            'losses': [step['loss'] for step in steps], 'comm_share': statistics.median(map(comm_share, counted)),
            'start_seconds': first_line - steps[0]['step_seconds'] - done.began}


def comm_share(step: dict) -> float:
    phases = step['phase_seconds']
    return (phases.get('gather', 0.0) + phases.get('reduce', 0.0)) / step['step_seconds']


def ours(material: Material, method: Method, steps: int, warmup: int, watch: bool = False, cores: list[int] | None = None) -> dict:
    process, out = start_ours(material, method, steps, watch, cores)
    return result_of_ours(process.wait(), out, warmup)


def flops_per_token(material: Material) -> float:
    """As `xorl-dist check` counts them: 4 a frozen weight, 6 a LoRA weight, 6 · length · heads · head_dim a layer."""
    path = material.folder / 'check.json'
    path.write_text(json.dumps(config(material, Method(ONE_CORE, 'no_recompute'), 1, material.folder / 'none')))
    text = '\n'.join(line for _, line in run([material.args.binary, 'check', '--config', path]).lines)
    return float(re.search(r'arithmetic: ([\d.]+) GFLOP a token', text)[1]) * 1e9


# --- a case

def search(material: Material, layouts: list[Layout]) -> list[dict]:
    """Every way of the peer, a few steps each; torch.compile once a layout, on the fastest way without, within a limit."""
    tried = []
    for layout in layouts:
        ways = [Way(layout, recompute, tuned) for recompute, tuned in itertools.product((True, False), repeat=2)]
        plain = [attempt(material, way, TRY_STEPS, 1) for way in ways]
        tried += plain
        limit = material.args.compile_limit
        if limit > 0:
            tried.append(attempt(material, replace(fastest(plain), compiled=True), COMPILE_STEPS, 2, limit))
    return tried


def attempt(material: Material, way: Way, steps: int, warmup: int, limit: float | None = None) -> dict:
    """Only what has a limit may fail."""
    entry = {'way': asdict(way), 'name': f'{way.layout}: {way}'}
    try:
        found = peer(material, way, steps, warmup, limit=limit)
        entry |= {key: found[key] for key in ('tokens_per_second', 'peak_rss_bytes')}
        told = f'{found["tokens_per_second"]:.0f} tokens/s, {found["peak_rss_bytes"] / 1e6:.0f} MB'
    except Failed as failure:
        if limit is None:
            raise
        entry['failed'] = failure.reason
        told = f'failed: {failure.reason}'
    say(f'  peer, {entry["name"]}: {told}')
    return entry


def fastest(tried: list[dict], *layouts: Layout) -> Way | None:
    """Of those layouts, or of all; None where none was tried."""
    ways = [(entry['tokens_per_second'], way_of(entry)) for entry in tried if 'failed' not in entry]
    ways = [(speed, way) for speed, way in ways if not layouts or way.layout in layouts]
    return max(ways, key=lambda pair: pair[0])[1] if ways else None


def way_of(entry: dict) -> Way:
    return Way(**{**entry['way'], 'layout': Layout(**entry['way']['layout'])})


class Turns:
    """The runs of a case, by who ran, and what of memory was seen; `peaks` holds the FLOP/s of this repeat."""

    def __init__(self, material: Material, layouts: list[Layout]):
        self.material, self.layouts = material, layouts
        self.runs: dict[Way | Method, list[dict]] = {}
        self.pss_bytes: dict[Way | Method, int] = {}

    def measure(self, peers: list[Way | None], methods: list[str]) -> None:
        two_cores, one_core = peers
        for repeat in range(self.material.args.repeats):
            say(f'  repeat {repeat + 1} of {self.material.args.repeats}')
            self.peaks = {layout: machine.peak(layout.ranks, layout.threads) for layout in self.layouts}
            self._take(two_cores)
            if TWO_RANKS in self.layouts:
                for method in methods:
                    for experts_over in (1, 2) if self.material.has_experts else (1,):
                        self._take(Method(TWO_RANKS, method, experts_over=experts_over))
            best = self._best(methods)
            if TWO_THREADS in self.layouts:
                self._take(Method(TWO_THREADS, best))
            if ONE_CORE in self.layouts:
                self._take(one_core)
                self._take(Method(ONE_CORE, best))

    def _best(self, methods: list[str]) -> str:
        """Our fastest method in the first repeat, so that it is the same in all."""
        first = {method: self.runs[Method(TWO_RANKS, method)][0]['tokens_per_second'] for method in methods
                 if Method(TWO_RANKS, method) in self.runs}
        return max(first, key=first.get) if first else methods[-1]

    def _take(self, who: Way | Method | None) -> None:
        if who is None:
            return
        call = peer if isinstance(who, Way) else ours
        if who not in self.pss_bytes:
            # All that stays is there from the second step on.
            self.pss_bytes[who] = call(self.material, who, WATCHED_STEPS, 0, watch=True)['pss_bytes']
        found = call(self.material, who, self.material.steps, self.material.args.warmup)
        found |= {'peak_flops': self.peaks[who.layout], 'pss_bytes': self.pss_bytes[who]}
        self.runs.setdefault(who, []).append(found)
        say(f'    {who.layout}, {who.name}: {found["tokens_per_second"]:.1f} tokens/s')

    def rows(self, flops: float) -> list[dict]:
        """Grouped by cores, the peer first in each group."""
        found = []
        for cores in (2, 1):
            group = {who: runs for who, runs in self.runs.items() if who.layout.ranks * who.layout.threads == cores}
            base = next((runs for who, runs in group.items() if isinstance(who, Way)), None)
            found += [row(who, runs, base, flops) | {'cores': cores} for who, runs in group.items()]
        return found


def row(who: Way | Method, runs: list[dict], base: list[dict] | None, flops: float) -> dict:
    """Medians over the runs, beside those of the peer `base`."""
    found = {'system': 'peer' if isinstance(who, Way) else 'xorl-dist', 'name': who.name, 'layout': str(who.layout),
             'how': asdict(who)}
    for key in ('tokens_per_second', 'peak_rss_bytes', 'pss_bytes'):
        found[key] = median(runs, key)
        found[f'{key}_ratio'] = found[key] / median(base, key) if base else None
    found['max_loss_difference'] = max_difference(runs, base[0]['losses']) if base else None
    found['fraction_of_peak'] = statistics.median(flops * run['tokens_per_second'] / run['peak_flops'] for run in runs)
    found['comm_share'] = median(runs, 'comm_share') if runs[0]['comm_share'] is not None else None
    found['runs'] = [{key: run[key] for key in ('tokens_per_second', 'peak_rss_bytes', 'peak_flops')} for run in runs]
    found['losses'] = runs[0]['losses']
    return found


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def max_difference(runs: list[dict], losses: list[float]) -> float:
    return max(abs(a - b) for run in runs for a, b in zip(run['losses'], losses, strict=True))


def measure_case(name: str, args, results: 'Results') -> None:
    began = time.time()
    say(f'{name}: the peer\'s ways')
    stamp, material = machine.stamp(), Material(CASES[name], args)
    layouts = [LAYOUTS[layout] for layout in args.layouts]
    reused = {'same': name, None: None}.get(args.reuse_search, args.reuse_search)
    tried = results.get('cases', reused).get('search') if reused else None
    tried = tried or search(material, layouts)
    two_cores = fastest(tried, *(layout for layout in layouts if layout != ONE_CORE))
    one_core = fastest(tried, ONE_CORE) if ONE_CORE in layouts else None
    turns = Turns(material, layouts)
    turns.measure([two_cores if set(layouts) - {ONE_CORE} else None, one_core], args.methods)
    flops = flops_per_token(material)
    result = {**stamp, **asdict(material.case), 'steps': material.steps, 'warmup': args.warmup, 'repeats': args.repeats,
              'lora_rank': args.rank, 'flops_per_token': flops, 'search': tried, 'search_of': reused or name, 'rows': turns.rows(flops),
              'seconds': round(time.time() - began)}
    results.put('cases', name, result)
    print_case(name, result)


def print_case(name: str, result: dict) -> None:
    print(f'\n{name}: {result["model"]}, {result["batch"]} x {result["seq"]} tokens a core and step, r = {result["lora_rank"]}, bf16, '
          f'{result["steps"]} steps ({result["warmup"]} not counted), {result["repeats"]} runs each in turns, '
          f'{result["flops_per_token"] / 1e9:.3f} GFLOP a token\n{machine.line(result)}')
    print(f'{"":<19}{"":<55}{"tokens/s":>9}{"ratio":>7}{"VmHWM":>9}{"ratio":>7}{"sum PSS":>9}{"ratio":>7}{"loss diff":>11}'
          f'{"of peak":>9}{"comm":>7}')
    for row in result['rows']:
        print(f'{row["layout"]:<19}{row["name"]:<55}{row["tokens_per_second"]:>9.1f}{number(row["tokens_per_second_ratio"], 7)}'
              f'{row["peak_rss_bytes"] / 1e6:>6.0f} MB{number(row["peak_rss_bytes_ratio"], 7)}{row["pss_bytes"] / 1e6:>6.0f} MB'
              f'{number(row["pss_bytes_ratio"], 7)}{number(row["max_loss_difference"], 11, 5)}{row["fraction_of_peak"]:>9.3f}'
              f'{number(row["comm_share"], 7, 3)}')
    print(f'measured in {minutes(result["seconds"])}\n', flush=True)


def number(value: float | None, width: int, digits: int = 2) -> str:
    return f'{"-" if value is None else f"{value:.{digits}f}":>{width}}'


# --- other questions

def measure_losses(args, results: 'Results') -> None:
    """The same steps of both, on 2 ranks, and of ours in fp32, which tests/oracle.rs holds to transformers and PEFT in fp32: of both
    only rounding parts them from it."""
    stamp, case = machine.stamp(), replace(CASES[MAIN], steps=args.losses)
    material = Material(case, argparse.Namespace(**{**vars(args), 'steps': None}))
    say(f'losses of {args.losses} steps')
    who = [Method(TWO_RANKS, 'no_recompute', bf16=False), Way(TWO_RANKS, False, True),
           *(Method(TWO_RANKS, method) for method in args.methods)]
    losses = {}
    for one in who:
        found = (peer if isinstance(one, Way) else ours)(material, one, args.losses, 0)
        losses[one.name] = found['losses']
    base, *others = losses.values()
    differences = {name: {'max_absolute': max(abs(a - b) for a, b in zip(other, base, strict=True)),
                          'max_relative': max(abs(a - b) / abs(b) for a, b in zip(other, base, strict=True))}
                   for name, other in zip(list(losses)[1:], others)}
    results.put('losses', MAIN, {**stamp, 'steps': args.losses, 'losses': losses, 'differences': differences})

    print(f'\nlosses, {MAIN}, 2 ranks\n{machine.line(stamp)}')
    for i, name in enumerate(losses):
        print(f'  [{i}] {name}' + (f': differs by at most {differences[name]["max_absolute"]:.6f}, '
                                   f'relative {differences[name]["max_relative"]:.2e}' if i else ''))
    print(f'{"step":>4}' + ''.join(f'{f"[{i}]":>11}' for i in range(len(losses))))
    for step, at in enumerate(zip(*losses.values()), 1):
        print(f'{step:>4}' + ''.join(f'{loss:>11.5f}' for loss in at))
    print(flush=True)


def measure_two_jobs(args, results: 'Results') -> None:
    """2 ranks beside two jobs of one rank at once: all that working together costs. Each is bound to its core."""
    stamp, material = machine.stamp(), Material(CASES[MAIN], args)
    cores = sorted(os.sched_getaffinity(0))[:2]
    found = {}
    for method in args.methods:
        together, apart = [], []
        for _ in range(args.repeats):
            say(f'2 ranks and two jobs, {method}')
            together.append(ours(material, Method(TWO_RANKS, method), material.steps, args.warmup, cores=cores))
            apart.append(two_jobs(material, Method(ONE_CORE, method), cores))
        found[method] = {'ranks': median(together, 'tokens_per_second'), 'jobs': statistics.median(apart),
                         'comm_share': median(together, 'comm_share')}
        found[method]['ratio'] = found[method]['ranks'] / found[method]['jobs']
    results.put('two_jobs', MAIN, {**stamp, 'steps': material.steps, 'repeats': args.repeats, 'methods': found})

    print(f'\n2 ranks beside two jobs of 1 rank at once, {MAIN}, tokens/s\n{machine.line(stamp)}')
    print(f'{"":<24}{"2 ranks":>9}{"2 jobs":>9}{"ratio":>8}{"comm":>8}')
    for method, of in found.items():
        print(f'{method:<24}{of["ranks"]:>9.1f}{of["jobs"]:>9.1f}{of["ratio"]:>8.3f}{of["comm_share"]:>8.3f}')
    print(flush=True)


def two_jobs(material: Material, method: Method, cores: list[int]) -> float:
    """Tokens/s of both."""
    started = [start_ours(material, method, material.steps, cores=[core], job=job) for job, core in enumerate(cores)]
    done = run_together([process for process, _ in started])
    return sum(result_of_ours(process, out, material.args.warmup)['tokens_per_second']
               for process, (_, out) in zip(done, started))


def measure_start(args, results: 'Results') -> None:
    """Seconds from launch to the begin of the first step, files in the page cache."""
    stamp = machine.stamp()
    print(f'\nseconds from launch to the first step, 2 ranks\n{machine.line(stamp)}')
    print(f'{"":<14}{"weights":>9}{"peer":>8}{"ours":>8}{"ratio":>8}')
    for name, case in STARTS.items():
        material = Material(case, argparse.Namespace(**{**vars(args), 'steps': None}))
        weights = [path.read_bytes() for path in material.model.glob('*.safetensors')]
        size = sum(map(len, weights))
        del weights
        runs = [(peer(material, Way(TWO_RANKS, True, True), 1, 0), ours(material, Method(TWO_RANKS, args.methods[0]), 1, 0))
                for _ in range(args.repeats)]
        seconds = {who: statistics.median(pair[i]['start_seconds'] for pair in runs) for i, who in enumerate(('peer', 'ours'))}
        results.put('start', name, {**stamp, 'weights_bytes': size, 'seconds': seconds, 'repeats': args.repeats})
        print(f'{name:<14}{size / 1e9:>6.2f} GB{seconds["peer"]:>8.2f}{seconds["ours"]:>8.2f}'
              f'{seconds["ours"] / seconds["peer"]:>8.3f}', flush=True)
    print()


# --- all of it

class Results:
    """The JSON file: sections, in each the results by name. What is measured anew takes the place of what was there."""

    def __init__(self, path: Path):
        self.path = path
        self.sections = json.loads(path.read_text()) if path.exists() else {}

    def get(self, section: str, name: str) -> dict:
        return self.sections.get(section, {}).get(name, {})

    def put(self, section: str, name: str, result: dict) -> None:
        self.sections.setdefault(section, {})[name] = result
        unfinished = self.path.with_suffix('.tmp')
        unfinished.write_text(json.dumps(self.sections, indent=1) + '\n')
        unfinished.replace(self.path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    return f'{seconds // 60:.0f} min {seconds % 60:02.0f} s'


def everything(known) -> list[str]:
    return [name for name in known if name != 'smoke']


def names(known) -> Callable[[str], list[str]]:
    """Of an option that takes some of `known`, or all."""
    def parse(text: str) -> list[str]:
        found = everything(known) if text == 'all' else text.split(',')
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f'{unknown[0]!r} is none of {", ".join(known)}')
        return found
    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--binary', type=Path, default=ROOT / 'target/release/xorl-dist')
    parser.add_argument('--out', type=Path, default=ROOT / 'benches/side_by_side.json', help='the plot is written beside it')
    what = parser.add_argument_group('what to measure; without any of these, all cases')
    what.add_argument('--cases', type=names(CASES), help=f'all, or some of {", ".join(CASES)}')
    what.add_argument('--losses', type=int, metavar='STEPS', help=f'losses of so many steps of {MAIN} side by side')
    what.add_argument('--two-jobs', action='store_true', help='2 ranks beside two jobs of 1 rank at once')
    what.add_argument('--start', action='store_true', help='seconds from launch to the first step')
    how = parser.add_argument_group('how')
    how.add_argument('--methods', type=names(METHODS), default=METHODS,
                     help=f'gradient_checkpointing_method of ours: some of {", ".join(METHODS)}')
    how.add_argument('--layouts', type=names(LAYOUTS), default=list(LAYOUTS), help='processes x threads: some of 2x1, 1x2, 1x1')
    how.add_argument('--steps', type=int, help='of a run; by case where not given')
    how.add_argument('--warmup', type=int, default=2, help='steps of a run that do not count')
    how.add_argument('--repeats', type=int, default=3)
    how.add_argument('--compile-limit', type=float, default=300, metavar='SECONDS', help='for a try of torch.compile; 0: none')
    how.add_argument('--reuse-search', nargs='?', const='same', choices=['same', *CASES], metavar='CASE',
                     help='take the peer\'s ways from the JSON where the case is in it, or where CASE is')
    how.add_argument('--rank', type=int, default=16, help='of the adapter')
    how.add_argument('--lr', type=float, default=1e-4)
    how.add_argument('--seed', type=int, default=1)
    args = parser.parse_args()
    args.binary = args.binary.resolve()
    if args.steps is not None and args.steps <= args.warmup:
        parser.error(f'--steps {args.steps} leaves none to count after --warmup {args.warmup}')
    if not (args.cases or args.losses or args.two_jobs or args.start):
        args.cases = everything(CASES)
    return args


def main() -> None:
    args, began = arguments(), time.time()
    # Asked to end, it ends what it has started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('side_by_side: stopped by a signal'))
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(WORK / 'inductor')
    WORK.mkdir(parents=True, exist_ok=True)
    results = Results(args.out)
    try:
        for name in args.cases or []:
            measure_case(name, args, results)
            plot.draw(results.sections['cases'], args.out.with_suffix('.svg'))
        if args.losses:
            measure_losses(args, results)
        if args.two_jobs:
            measure_two_jobs(args, results)
        if args.start:
            measure_start(args, results)
    except Failed as failure:
        sys.exit(f'side_by_side: {failure}')
    print(f'{args.out}, in all {minutes(time.time() - began)}')


if __name__ == '__main__':
    main()
