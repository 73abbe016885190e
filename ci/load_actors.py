"""Clients of the load on a server (load.py): raw HTTP with mischief, and the real ones. Each has one adapter at a time.

An actor performs an operation and returns when the server has acknowledged it. It raises Lost where the server says that it lost the
adapter, Refused where the operation was not taken, and Unknown where nobody can tell.
"""

import asyncio
import re
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/clients")]
import raw  # noqa: E402

import plan  # noqa: E402

SECONDS = 120
LOST = re.compile(r"the server ended before it could save model_id (\S+): (.*)", re.DOTALL)


# Of a session of tinker's.
ENDED = "has ended, or the server was started after it"


class Unknown(Exception):
    """The operation may have been carried out."""


class NotTaken(Exception):
    """The server is stopping; the operation was not taken."""


class Lost(Exception):
    """The adapter is gone, the text says what is left."""


def judge(error, detail):
    """The exception for an error text of the server's."""
    if LOST.search(detail):
        return Lost(detail)
    if "request_id" in detail and "is not known" in detail:
        return Unknown(detail)
    if "the server is stopping" in detail or "a rank of the server has failed" in detail:
        return NotTaken(detail)
    return error


class Raw:
    """The wire of xorl-client by hand: breaks connections in the middle of a request, asks twice, and repeats what was answered."""

    kind = "raw"

    def __init__(self, server, name, adapter, random, mischief=True):
        self.server, self.model, self.adapter, self.random, self.mischief = server, name, adapter, random, mischief
        self.connection = raw.Connection(server.port)
        self.seq, self.body, self.call, self.taken = 0, None, None, False
        self.counts = server.counts

    def close(self):
        self.connection.close()

    def _does(self, name, chance):
        if not self.mischief or self.random.random() >= chance:
            return False
        self.counts[name] += 1
        return True

    async def create(self):
        spec = {"rank": plan.RANKS[self.adapter % 8], "alpha": plan.alpha(self.adapter), "seed": plan.seed(self.adapter)}
        self.seq = 0
        await self._guarded(lambda: self.connection.ask("create_model", {"model_id": self.model, "lora_config": spec}))

    async def load(self, uri):
        self.seq += 1
        body = {"model_id": self.model, "seq_id": self.seq, "path": uri, "optimizer": True}
        await self._guarded(lambda: self.connection.ask("load_weights", body))

    async def save(self, name):
        self.seq += 1
        body = {"model_id": self.model, "seq_id": self.seq, "path": name}
        return (await self._guarded(lambda: self.connection.ask("save_weights", body)))["path"]

    async def unload(self):
        try:
            await self._guarded(lambda: self.connection.ask("unload_model", {"model_id": self.model}))
        except raw.Refused as refused:
            # Asked twice, because nobody knew of the first.
            if "create_model" not in refused.detail:
                raise

    def begin(self, operation):
        """The request of an operation; it is sent until it is acknowledged."""
        self.seq += 1
        self.taken = False
        kind, index = operation
        if kind == "pass":
            self.call, self.body = "forward_backward", raw.pass_body(self.model, plan.data(self.adapter, index), self.seq)
        else:
            body = {"model_id": self.model, "seq_id": self.seq, "adam_params": plan.settings(self.adapter)}
            self.call, self.body = "optim_step", body

    async def perform(self):
        return await self._guarded(self._perform)

    async def _perform(self):
        connection = self.connection
        if self._does("cancelled submits", 0.05):
            await self._half_a_call()
        if self._does("reconnects", 0.05):
            connection.close()
        try:
            submitted = (await connection.post(self.call, self.body))["request_id"]
        except raw.Refused:
            raise
        except BaseException as error:
            raise Unknown(repr(error)) from error
        self.taken = True
        if self._does("cancelled polls", 0.05):
            await self._half_a_poll(submitted)
        if self._does("repeats before the result", 0.05):
            again = (await connection.post(self.call, self.body))["request_id"]
            assert again == submitted, (again, submitted)
        result = await connection.result(submitted)
        if self._does("repeats after the result", 0.05):
            again = (await connection.post(self.call, self.body))["request_id"]
            assert again == submitted and await connection.result(again) == result, (again, submitted)
        if self._does("other bodies", 0.03):
            other = {**self.body, "other": self.random.random()}
            status, told = await connection.call("POST", f"/api/v1/{self.call}", other)
            assert status in (400, 503), (status, told)
        return result

    async def _half_a_call(self):
        """Sends the request and goes away before the answer; the same is sent again after that."""
        other = raw.Connection(self.server.port)
        try:
            asyncio.get_running_loop().call_later(self.random.random() * 0.01, other.close)
            await other.call("POST", f"/api/v1/{self.call}", self.body)
        except (OSError, EOFError, AttributeError, asyncio.IncompleteReadError):
            pass
        finally:
            other.close()

    async def _half_a_poll(self, request_id):
        other = raw.Connection(self.server.port)
        try:
            await asyncio.wait_for(other.result(request_id), self.random.random() * 0.02)
        except (OSError, EOFError, asyncio.TimeoutError, raw.Refused):
            pass
        finally:
            other.close()

    async def _guarded(self, call):
        try:
            return await call()
        except raw.Refused as refused:
            raise judge(refused, str(refused)) from refused
        except (OSError, EOFError) as error:
            self.connection.close()
            raise Unknown(repr(error)) from error


class Library:
    """An unmodified client, in a thread."""

    kind = "library"

    def __init__(self, server, name, adapter, random, mischief=True):
        self.server, self.name, self.adapter = server, name, adapter
        self.client, self.taken = None, False
        self.operation = None

    def close(self):
        pass

    def begin(self, operation):
        self.operation = operation

    async def _call(self, function):
        try:
            return await asyncio.to_thread(function)
        except NotTaken:
            raise
        except Exception as error:
            judged = judge(error, str(error))
            if judged is error and not self._is_refusal(error):
                judged = Unknown(repr(error))
            raise judged from error

    async def perform(self):
        kind, index = self.operation
        if kind == "pass":
            data = self.driver.module.datums(plan.data(self.adapter, index))
            return await self._call(lambda: self.client.forward_backward(data, "cross_entropy").result(timeout=SECONDS))
        return await self._call(lambda: self.driver.optim_step(self.client, plan.settings(self.adapter)).result(timeout=SECONDS))

    async def save(self, name):
        return await self._call(lambda: self.client.save_state(name).result(timeout=SECONDS).path)


class XorlClient(Library):
    kind = "xorl-client"
    driver = None

    def __init__(self, server, name, adapter, random, mischief=True):
        super().__init__(server, name, adapter, random)
        import xorl_client_methods as module

        if XorlClient.driver is None:
            XorlClient.driver = module.Driver(server.url, server.output_dir, server.base_model)
            XorlClient.driver.module = module
        self.model = name

    def _is_refusal(self, error):
        import xorl_client
        from xorl_client.exceptions import RequestFailedError

        return isinstance(error, (xorl_client.BadRequestError, xorl_client.NotFoundError, RequestFailedError))

    async def create(self):
        self.client = await self._call(lambda: self.driver.create(self.model, self.adapter % 8))

    async def load(self, uri):
        await self._call(lambda: self.client.load_state_with_optimizer(uri).result(timeout=SECONDS))

    async def unload(self):
        await self._call(lambda: self.client.unload().result(timeout=SECONDS))


class Tinker(Library):
    kind = "tinker"
    driver = None
    lock = threading.Lock()

    def __init__(self, server, name, adapter, random, mischief=True):
        super().__init__(server, name, adapter, random)
        self.model = None

    def _is_refusal(self, error):
        import tinker

        return isinstance(error, (tinker.BadRequestError, tinker.NotFoundError, tinker.RequestFailedError))

    @classmethod
    def current(cls, server):
        """The driver of this server's session; sessions end with their server."""
        import tinker_methods as module

        with cls.lock:
            if cls.driver is None or cls.generation != server.generation:
                cls.driver = module.Driver(server.url, server.output_dir, server.base_model)
                cls.driver.module = module
                cls.generation = server.generation
            return cls.driver

    def _made(self, make):
        """A client that `make` makes."""
        import tinker

        Tinker.current(self.server)
        try:
            self.client = make()
        except tinker.BadRequestError as error:
            if ENDED in str(error):
                Tinker.driver = None
                raise NotTaken(str(error)) from error
            raise
        self.model = self.client.get_info().model_id

    async def create(self):
        await self._call(lambda: self._made(lambda: self.driver.create(self.name, self.adapter % 8)))

    async def load(self, uri):
        def make():
            made = Tinker.driver.service.create_training_client_from_state_with_optimizer(uri)
            return Tinker.driver.module.settled(made)

        await self._call(lambda: self._made(make))

    async def unload(self):
        """By hand: this client leaves its adapters to the end of the session."""
        connection = raw.Connection(self.server.port)
        try:
            await connection.ask("unload_model", {"model_id": self.model, "type": "unload_model"})
        except raw.Refused as refused:
            raise judge(refused, str(refused)) from refused
        except (OSError, EOFError) as error:
            raise Unknown(repr(error)) from error
        finally:
            connection.close()
