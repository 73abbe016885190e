"""What the figures were measured on, with what, when, and how fast this machine multiplies bf16 matrices.

    machine.py      prints all of it, the peak of one and of two cores too
"""
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'amx_tile')
SIZE, TRIES = 4096, 10
WORKER = f'''
import time, torch
a, b = (torch.randn({SIZE}, {SIZE}).bfloat16() for _ in range(2))
torch.mm(a, b)
print("ready", flush=True)
input()
seconds = []
for _ in range({TRIES}):
    begin = time.perf_counter()
    torch.mm(a, b)
    seconds.append(time.perf_counter() - begin)
print(2 * {SIZE} ** 3 / min(seconds))
'''


def describe() -> dict:
    """CPU, what of it matters to bf16, cores, memory, and how busy the machine is."""
    cpu = Path('/proc/cpuinfo').read_text()
    flags = set(re.search(r'^flags\s*:(.*)$', cpu, re.MULTILINE)[1].split()) if 'flags' in cpu else set()
    model = re.search(r'^model name\s*:\s*(.*)$', cpu, re.MULTILINE)
    memory = int(re.search(r'MemTotal:\s+(\d+)', Path('/proc/meminfo').read_text())[1])
    return {'cpu': model[1] if model else platform.machine(), 'flags': {flag: flag in flags for flag in FLAGS},
            'cores': len(os.sched_getaffinity(0)), 'memory_gb': round(memory / 1e6, 1), 'kernel': platform.release(),
            'load_before': round(os.getloadavg()[0], 2)}


def versions() -> dict:
    mpi = output(['mpirun', '--version']).splitlines()
    packages = {name: metadata.version(name) for name in ('torch', 'transformers', 'peft', 'numpy')}
    return {'python': platform.python_version(), **packages, 'mpi': mpi[0] if mpi else 'none'}


def stamp() -> dict:
    """Goes with every result."""
    commit, changed = output(['git', 'rev-parse', '--short', 'HEAD']).strip(), output(['git', 'status', '--porcelain', '-uno'])
    return {'date': time.strftime('%Y-%m-%d %H:%M'), 'commit': commit + ('+changes' if changed.strip() else ''),
            'machine': describe(), 'versions': versions()}


def line(stamp: dict) -> str:
    machine, versions = stamp['machine'], stamp['versions']
    flags = ', '.join(('' if has else 'no ') + flag for flag, has in machine['flags'].items())
    return (f'{machine["cpu"]}, {machine["cores"]} cores ({flags}), {machine["memory_gb"]:.0f} GB, load {machine["load_before"]}; '
            f'torch {versions["torch"]}, transformers {versions["transformers"]}, peft {versions["peft"]}, {versions["mpi"]}; '
            f'commit {stamp["commit"]}, {stamp["date"]}')


def peak(processes: int, threads: int) -> float:
    """FLOP/s of bf16 torch.mm, the best of each process, all at once, summed."""
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
    workers = [subprocess.Popen([sys.executable, '-c', WORKER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True) for _ in range(processes)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write('\n')
        worker.stdin.flush()
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit('machine: a process that measures the peak has failed, see above')
    return sum(map(float, answers))


def output(command: list[str]) -> str:
    """Empty where the command is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    except OSError:
        return ''


if __name__ == '__main__':
    peaks = {f'{processes}x{threads}': round(peak(processes, threads) / 1e9, 1) for processes, threads in ((1, 1), (2, 1), (1, 2))}
    print(json.dumps({**stamp(), 'peak_gflops': peaks}, indent=1))
