"""Runs a command and watches it: its lines with their times, the memory of its ranks, a time limit.

Benches and the scripts of ci/ that start ranks use it.
"""
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

# Of memory. Reading smaps_rollup makes the kernel walk the page tables of a process: for ranks of 2 GB that was 7 % of
# a core, so runs whose speed counts are not watched.
SAMPLE_SECONDS = 0.5
STOP_SECONDS = 15


class Failed(Exception):
    """A command that ended with an error, or was stopped at its limit. `reason` is one line."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


class Process:
    """A command that has been started. Its ranks are the processes whose command line begins with `program`, perhaps
    behind an interpreter; with `watch`, the largest sum of their PSS is kept."""

    def __init__(self, command: list, environment: dict[str, str], program: Path | str, watch: bool):
        self.command = [str(word) for word in command]
        self.program = str(program)
        self.lines: list[tuple[float, str]] = []
        self.pss_bytes: int | None = 0 if watch else None
        self.errors = tempfile.TemporaryFile('w+')
        self.began = time.time()
        self.process = subprocess.Popen(self.command, env={**os.environ, **environment}, text=True, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.reader.start()
        if watch:
            self.watcher.start()

    def wait(self, limit: float | None = None) -> 'Process':
        """Until its end, which must be a good one and come before `limit` seconds."""
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop()
            raise self._failed(f'not done after {limit:.0f} s') from None
        except BaseException:
            self.stop()
            raise
        self.reader.join()
        if self.watcher.is_alive():
            self.watcher.join()
        if status != 0:
            raise self._failed(None, status)
        return self

    def stop(self) -> None:
        """Ends it and all that it started; by id, and nothing else."""
        family = [self.process.pid, *descendants(self.process.pid)]
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                pass
        for pid in family[1:]:
            # A number may have been given to another process meanwhile.
            if self.program and self.program in command_line(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip('\n')))

    def _watch(self) -> None:
        while self.process.poll() is None:
            pids = [self.process.pid, *descendants(self.process.pid)]
            ranks = [pid for pid in pids if self.program in command_line(pid)[:3]]
            self.pss_bytes = max(self.pss_bytes, sum(pss_bytes(pid) for pid in ranks))
            try:
                self.process.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                pass

    def _failed(self, reason: str | None, status: int | None = None) -> Failed:
        self.errors.seek(0)
        errors = self.errors.read()
        output = '\n'.join(line for _, line in self.lines)
        reason = reason or first_error(errors) or f'exit status {status}'
        return Failed(reason, f'{reason}: {" ".join(self.command)}\n{output[-2000:]}\n{errors[-6000:]}')


def run(command: list, environment: dict[str, str] | None = None, program: Path | str = '', watch: bool = False,
        limit: float | None = None) -> Process:
    """From start to a good end."""
    return Process(command, environment or {}, program, watch).wait(limit)


def run_together(processes: list[Process]) -> list[Process]:
    """Waits for all; where one fails, the others are stopped."""
    try:
        return [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.process.poll() is None:
                process.stop()


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, of all threads."""
    found = []
    for task in Path(f'/proc/{pid}/task').glob('*/children'):
        for child in map(int, read(task).split()):
            found += [child, *descendants(child)]
    return found


def command_line(pid: int) -> list[str]:
    return read(Path(f'/proc/{pid}/cmdline')).split('\0')


def pss_bytes(pid: int) -> int:
    found = re.search(r'^Pss:\s+(\d+) kB', read(Path(f'/proc/{pid}/smaps_rollup')), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def resident_bytes(pid: int) -> int:
    fields = read(Path(f'/proc/{pid}/statm')).split()
    return int(fields[1]) * os.sysconf('SC_PAGE_SIZE') if fields else 0


def open_files(pid: int) -> int:
    """Files, sockets and pipes that it has open; 0 where it has ended."""
    try:
        return len(os.listdir(f'/proc/{pid}/fd'))
    except OSError:
        return 0


def growth(values: list[int]) -> tuple[int, float]:
    """What the values grew by from their second quarter to their last, by medians, and the share of it."""
    quarter = len(values) // 4
    before, after = (sorted(part)[len(part) // 2] for part in (values[quarter : 2 * quarter], values[-quarter:]))
    return after - before, after / before - 1


def read(path: Path) -> str:
    """Empty where the process has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ''


def first_error(text: str) -> str | None:
    """The line that names a Python exception, if there is one."""
    found = re.search(r'^(?:\[rank\d+\]: ?)?((?!.*ChildFailedError)(?:[\w.]+(?:Error|Exception|Unsupported)\b|error:).*)$', text, re.MULTILINE)
    return found[1][:200] if found else None
