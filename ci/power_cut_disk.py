"""The model of a disk that keeps what fsync promised, and the replay of a program's calls on it (see power_cut.py)."""

import os
import random
import re
import sys
from pathlib import Path

CALLS = (
    "open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,fsync,fdatasync,sync,syncfs,"
    "sync_file_range,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,"
    "copy_file_range,sendfile"
)


class Node:
    """A file or a folder, as programs see it and as it is on the disk."""

    def __init__(self, is_folder: bool):
        self.is_folder = is_folder
        self.entries: dict[str, Node] = {}
        self.stored: dict[str, Node] = {}
        # Changes of the entries since the last fsync: {name: node or None} each.
        self.changes: list[dict[str, Node | None]] = []
        self.data = b""
        self.synced: bytes | None = None
        # Bytes at the beginning that no call has touched since the last fsync: a cut leaves them alone.
        self.intact = 0

    def set(self, changed: dict) -> None:
        self.changes.append(changed)
        for name, node in changed.items():
            if node is None:
                self.entries.pop(name, None)
            else:
                self.entries[name] = node

    def sync(self, data: bytes | None = None) -> None:
        if self.is_folder:
            self.stored, self.changes = dict(self.entries), []
        else:
            self.synced = self.data if data is None else data
            self.intact = len(self.synced)


class Disk:
    """The folder `root` and what is below."""

    def __init__(self, root: str):
        self.root = root
        self.top = Node(True)

    def find(self, path: str) -> Node | None:
        if path == self.root:
            return self.top
        if not path.startswith(self.root + "/"):
            return None
        node = self.top
        for name in path[len(self.root) + 1 :].split("/"):
            if name in ("", "."):
                continue
            if not node.is_folder or name not in node.entries:
                return None
            node = node.entries[name]
        return node

    def place(self, path: str) -> tuple[Node | None, str]:
        folder, name = os.path.split(path.rstrip("/"))
        return self.find(folder), name


def text_of(quoted: str) -> bytes:
    """The bytes of a string that strace has printed, in hexadecimal or not."""
    out, at = bytearray(), 0
    raw = quoted.encode("latin-1")
    plain = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"v": b"\v", b"f": b"\f", b'"': b'"', b"\\": b"\\"}
    if raw and raw.replace(b"\\x", b"").isalnum() and raw.startswith(b"\\x") and len(raw) == 4 * raw.count(b"\\x"):
        return bytes.fromhex(raw.replace(b"\\x", b"").decode())
    while at < len(raw):
        if raw[at : at + 2] == b"\\x":
            out += bytes.fromhex(raw[at + 2 : at + 4].decode())
            at += 4
        elif raw[at : at + 1] == b"\\":
            out += plain[raw[at + 1 : at + 2]]
            at += 2
        else:
            out += raw[at : at + 1]
            at += 1
    return bytes(out)


STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(\.\.\.)?')
AT = re.compile(r"^(?:AT_FDCWD|\d+)<([^>]*)>")


def calls(trace: Path):
    """The calls of a trace that did not fail, in the order of their ends: name, arguments, thread. Of fsync also the
    beginning, as `begin`: data that are written meanwhile may not be on the disk."""
    begun: dict[str, str] = {}
    with trace.open(encoding="latin-1") as lines:
        for line in lines:
            process, rest = line.rstrip("\n").split(None, 1)
            if rest.endswith("<unfinished ...>"):
                begun[process] = rest[: -len("<unfinished ...>")].rstrip()
                name, _, arguments = begun[process].partition("(")
                if name in ("fsync", "fdatasync"):
                    yield "begin", arguments, process
                continue
            resumed = re.match(r"<\.\.\. \w+ resumed>(.*)$", rest)
            if resumed:
                rest = begun.pop(process, "") + resumed.group(1)
            call = re.match(r"^(\w+)\((.*)\)\s+= (-?\d+)", rest)
            if call and int(call.group(3)) >= 0:
                yield call.group(1), call.group(2), process


def strings(arguments: str) -> list[bytes]:
    found = STRING.findall(arguments)
    if any(cut for _, cut in found):
        sys.exit("power_cut.py: strace has cut a string short")
    return [text_of(text) for text, _ in found]


def folder_of(arguments: str) -> str:
    at = AT.match(arguments.strip())
    return text_of(at.group(1)).decode() if at else ""


def path_in(folder: str, name: bytes) -> str:
    return os.path.normpath(os.path.join(folder, name.decode()))


class Replay:
    """Carries the calls of a trace out on a disk, whose root is the current folder of the program."""

    def __init__(self, root: str, without: str | None):
        self.disk = Disk(root)
        # Paths of which an fsync does nothing.
        self.without = re.compile(without) if without else None
        self.waiting: dict[str, tuple[Node, bytes]] = {}
        self.saved: int | None = None

    def apply(self, call: str, arguments: str, process: str) -> bool:
        """True if the disk may now be another than before."""
        disk = self.disk
        if call in ("write", "writev", "pwrite64", "pwritev", "pwritev2"):
            path = folder_of(arguments)
            data = b"".join(strings(arguments[arguments.index(">") :]))
            for step in re.findall(rb"saved \S*step_(\d+)", data):
                self.saved = int(step)
            node = disk.find(path)
            if node is None:
                return False
            at = len(node.data)
            if call.startswith("pw"):
                at = int(arguments.rsplit(",", 1)[1])
            node.data = node.data[:at].ljust(at, b"\0") + data + node.data[at + len(data) :]
            node.intact = min(node.intact, at)
            return True
        if call in ("begin", "fsync", "fdatasync"):
            path = folder_of(arguments)
            node = disk.find(path)
            if self.without is not None and self.without.search(path):
                return False
            if call == "begin":
                if node is not None:
                    self.waiting[process] = (node, node.data)
                return False
            begun = self.waiting.pop(process, None)
            if node is None:
                return False
            node.sync(begun[1] if begun and begun[0] is node else None)
            return True
        if call in ("open", "openat", "creat"):
            if call == "creat":
                sys.exit("power_cut.py: creat is not modelled")
            flags = arguments.rsplit('"', 1)[1]
            path = path_in(folder_of(arguments) or disk.root, strings(arguments)[0])
            node = disk.find(path)
            if node is not None and "O_TRUNC" in flags:
                node.data, node.intact = b"", 0
                return True
            folder, name = disk.place(path)
            if node is None and folder is not None and "O_CREAT" in flags:
                folder.set({name: Node(False)})
                return True
            return False
        if call == "ftruncate":
            node = disk.find(folder_of(arguments))
            if node is None:
                return False
            size = int(arguments.rsplit(",", 1)[1])
            node.data = node.data[:size].ljust(size, b"\0")
            node.intact = min(node.intact, size)
            return True
        if call in ("mkdir", "mkdirat"):
            folder, name = disk.place(path_in(folder_of(arguments) or disk.root, strings(arguments)[0]))
            if folder is None:
                return False
            folder.set({name: Node(True)})
            return True
        if call in ("unlink", "unlinkat", "rmdir"):
            folder, name = disk.place(path_in(folder_of(arguments) or disk.root, strings(arguments)[0]))
            if folder is None:
                return False
            folder.set({name: None})
            return True
        if call in ("rename", "renameat", "renameat2", "link", "linkat"):
            behind = arguments.split('", ', 1)[1]
            old, new = strings(arguments)
            old = path_in(folder_of(arguments) or disk.root, old)
            new = path_in(folder_of(behind) or disk.root, new)
            (source, old_name), (target, new_name) = disk.place(old), disk.place(new)
            if target is None:
                return False
            if source is None or old_name not in source.entries:
                # A link to a file of the base, which has long been on the disk.
                node = Node(False)
                node.data = Path(old).read_bytes()
                node.sync()
            else:
                node = source.entries[old_name]
            if call.startswith("link"):
                target.set({new_name: node})
            elif source is target:
                target.set({old_name: None, new_name: node})
            else:
                source.set({old_name: None})
                target.set({new_name: node})
            return True
        # Of other calls none may touch the folder.
        if disk.root in text_of(arguments.replace('"', "")).decode("latin-1"):
            sys.exit(f"power_cut.py: {call} is not modelled")
        return False


def left_of(node: Node, draw: random.Random) -> list[bytes]:
    """Contents that a cut may leave of a file."""
    new, kept = node.data, node.intact
    part = draw.randint(kept, len(new))
    return [node.synced or b"", new, new[:part], new[:kept], new[:part].ljust(len(new), b"\0")]


def state_of(node: Node, policy: str, draw: random.Random, path: str = "", out: dict | None = None) -> dict:
    """Files below `node` after a cut, by path; None for a folder."""
    out = {} if out is None else out
    entries = dict(node.stored)
    count = {"least": 0, "mixed": draw.randint(0, len(node.changes))}.get(policy, len(node.changes))
    for changed in node.changes[:count]:
        for name, child in changed.items():
            if child is None:
                entries.pop(name, None)
            else:
                entries[name] = child
    for name, child in entries.items():
        place = f"{path}{name}"
        if child.is_folder:
            out[place] = None
            state_of(child, policy, draw, place + "/", out)
        elif policy == "all" or child.data is child.synced:
            out[place] = child.data
        else:
            out[place] = draw.choice(left_of(child, draw)) if policy == "mixed" else child.synced or b""
    return out
