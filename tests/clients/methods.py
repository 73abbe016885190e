"""A table of every public method of a client's classes, found by reflection: each works, as a function shows that calls it and looks at
the outcome, or is refused with a text. A method that has neither is missing from the table, which fails.
"""

import asyncio
import concurrent.futures
import inspect
import re
import sys
import time
import traceback


def public_methods(cls):
    """Names of the methods and properties that a user may call."""
    named = [name for name in dir(cls) if not name.startswith("_")]
    return {name: inspect.getattr_static(cls, name) for name in named}


def code_of(member):
    """The code that runs when the member is used, below its decorators."""
    member = member.fget if isinstance(member, property) else member
    member = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    return inspect.unwrap(member).__code__


def settled(value):
    """The result of a future, of a coroutine, or the value itself."""
    while True:
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        elif isinstance(value, concurrent.futures.Future) or hasattr(value, "result_async"):
            value = value.result(timeout=60)
        else:
            return value


class Table:
    def __init__(self, client, classes, hide=()):
        """`hide` holds patterns of what differs from run to run in the texts of errors."""
        self.client, self.hide = client, hide
        self.members = {f"{cls.__name__}.{name}": m for cls in classes for name, m in public_methods(cls).items()}
        self.checks = []
        self.rows = {}

    def works(self, *names):
        """Registers a function that calls the methods `names` and asserts their outcome. It takes what `run` is given."""

        def register(function):
            self.checks.append((names, function, None))
            return function

        return register

    def refused(self, name, words, call):
        """Registers `call`, which must raise an error that has `words` in its text."""
        self.checks.append(((name,), call, words))

    def run(self, context):
        for names, function, words in self.checks:
            # Client versions differ in what they have.
            here = [name for name in names if name in self.members]
            if not here:
                continue
            began, entered = time.monotonic(), set()
            state, error = self._call(function, context, words, entered)
            for name in here:
                if state != "fails" and code_of(self.members[name]) not in entered:
                    state, error = "fails", f"{function.__name__} does not call it"
                self.rows[name] = {"state": state, "error": error, "seconds": time.monotonic() - began}
        for name in self.members:
            self.rows.setdefault(name, {"state": "missing", "error": "no function calls it"})
        return [{"client": self.client, "method": name, **row} for name, row in sorted(self.rows.items())]

    def _call(self, function, context, words, entered):
        def profile(frame, event, _):
            if event == "call":
                entered.add(frame.f_code)

        sys.setprofile(profile)
        try:
            settled(function(context))
        except Exception as error:
            sys.setprofile(None)
            if words is not None and words in str(error):
                return "refused", self._shown(error)
            return "fails", "".join(traceback.format_exception(error, limit=-3))
        finally:
            sys.setprofile(None)
        return ("works", None) if words is None else ("fails", f"was not refused; expected {words!r}")

    def _shown(self, error):
        text = f"{type(error).__name__}: {error}"
        for pattern in self.hide:
            text = re.sub(pattern, "…", text)
        return text
