"""The life of an adapter under load (load.py): what its client does with it, the ledger of what was acknowledged, and how both go on after a
restart of the server.
"""

import asyncio
import random
import re
import urllib.parse
from dataclasses import dataclass, field

from load_actors import LOST, Lost, NotTaken, Raw, Tinker, Unknown, raw

NAMED = re.compile(r"its last saved state is step (\d+), (\S+?://\S+?);")
SAVES = 0.2


def tally(applied):
    """Updates, and passes since the last."""
    steps = [index for index, (kind, _) in enumerate(applied) if kind == "step"]
    return len(steps), len(applied) - (steps[-1] + 1 if steps else 0)


@dataclass
class Life:
    server: object
    actor: object
    adapter: int
    random: random.Random
    # Operations that were acknowledged: ("pass", number of its data) or ("step", …).
    applied: list = field(default_factory=list)
    # Saved states: path and length of the ledger then.
    saves: dict = field(default_factory=dict)
    # Lengths of the ledger at which the server itself may have saved.
    stops: set = field(default_factory=set)
    generation: int = 0
    restarts: int = 0
    final: str | None = None

    async def live(self, pause, steps):
        self.generation = self.server.generation
        await self._until_acknowledged(self.actor.create)
        number = 0
        while tally(self.applied)[0] < steps:
            for _ in range(self.random.randrange(1, 3)):
                await self._do(("pass", number))
                number += 1
                await pause()
            if tally(self.applied)[1] == 0:
                # What was accumulated is lost with the adapter.
                continue
            await self._do(("step", number))
            await pause()
            if self.random.random() < SAVES and tally(self.applied)[1] == 0:
                await self._save(f"s{number}")
        await self._notice()
        try:
            found = await self._counts()
        except Lost as lost:
            await self._recover(str(lost))
            found = tally(self.applied)
        if found != tally(self.applied):
            raise AssertionError(f"{self.actor.model}: {found} at the end, acknowledged were {tally(self.applied)}")
        self.final = await self._save("final")
        try:
            await self.actor.unload()
        except (Lost, NotTaken, Unknown):
            # The server ends in this moment: the adapter is gone, or stays with nobody to use it.
            pass

    async def _do(self, operation):
        """Has an operation carried out, once. It is given up where the adapter is lost."""
        begun = None
        while True:
            if await self._notice():
                return
            generation = self.server.generation
            if begun != generation:
                # A new server knows no numbers of requests.
                self.actor.begin(operation)
                begun = generation
            try:
                await self.actor.perform()
                self.applied.append(operation)
                if self.server.generation != generation:
                    # A library that went on by itself: it was carried out by the old server or by the new one.
                    self.stops |= {len(self.applied) - 1, len(self.applied)}
                return
            except Lost as lost:
                return await self._recover(str(lost), operation)
            except (Unknown, NotTaken) as error:
                await self._back(generation)
                if self.server.generation != generation:
                    if await self._notice(operation):
                        return
                elif not isinstance(self.actor, Raw):
                    raise AssertionError(f"{error} though the server went on") from error

    async def _save(self, name):
        """Saves; again under another name where the adapter was lost meanwhile, or nobody knows of the save."""
        attempt = 0

        async def save():
            nonlocal attempt
            attempt += 1
            length = len(self.applied)
            path = await self.actor.save(f"{name}-{attempt}" if attempt > 1 else name)
            self.saves[path] = length
            return path

        return await self._until_acknowledged(save)

    async def _until_acknowledged(self, call):
        while True:
            await self._notice()
            generation = self.server.generation
            try:
                return await call()
            except Lost as lost:
                await self._recover(str(lost))
            except (Unknown, NotTaken):
                await self._back(generation)

    async def _back(self, generation):
        """Waits for the next server, or for this one to show that it goes on."""
        for _ in range(40):
            if self.server.generation != generation:
                break
            await asyncio.sleep(0.05)
        await self.server.is_up.wait()

    async def _notice(self, pending=None):
        """After a restart: sees where the server has the adapter. True: `pending` is carried out, or the adapter was lost."""
        if self.generation == self.server.generation or self.actor.model is None:
            return False
        self.generation = self.server.generation
        self.restarts += 1
        try:
            found = await self._counts()
        except Lost as lost:
            await self._recover(str(lost), pending)
            return True
        if found is None:
            if self.applied or self.saves:
                raise AssertionError(f"{self.actor.model} is not known after a restart; acknowledged were {tally(self.applied)}")
            await self._make(None)
            return False
        is_done = pending is not None and found == tally([*self.applied, pending])
        if is_done:
            self.applied.append(pending)
            self.server.counts["operations seen after a restart"] += 1
        elif found != tally(self.applied) and len(self.applied) not in self.stops:
            raise AssertionError(f"{self.actor.model}: {found} after a restart, acknowledged were {tally(self.applied)}, then {pending}")
        elif pending is not None and self.actor.taken:
            raise AssertionError(f"{self.actor.model}: {pending} was taken before a stop, and is lost")
        self.stops.add(len(self.applied))
        return is_done

    async def _counts(self):
        """Updates and passes since the last, as the server has them; None: it knows no such adapter."""
        query = urllib.parse.urlencode({"model_id": self.actor.model})
        while True:
            connection = raw.Connection(self.server.port)
            try:
                status, told = await connection.call("GET", f"/api/v1/session_info?{query}")
                break
            except (OSError, EOFError):
                await self.server.is_up.wait()
                await asyncio.sleep(0.1)
            finally:
                connection.close()
        if status == 200:
            return told["step"], told["accumulated_passes"]
        detail = str(told.get("detail") if isinstance(told, dict) else told)
        if LOST.search(detail):
            raise Lost(detail)
        return None

    async def _recover(self, text, pending=None):
        """Goes on from the state that the server names, which must be the newest that the ledger has."""
        self.server.counts["adapters lost in the kill"] += 1
        named = NAMED.search(text)
        told = f"{text!r}; acknowledged were {tally(self.applied)}, saves {self.saves}, stops {self.stops}, then {pending}"
        if named is None:
            if self.saves or self.stops:
                raise AssertionError(told)
            self.applied = []
            return await self._make(None)
        step, uri = int(named[1]), named[2]
        if uri in self.saves:
            ledgers = [self.applied[: self.saves[uri]]]
        else:
            # Saved by the server at a stop, perhaps one that this client has slept through.
            ledgers = [self.applied[:length] for length in sorted({*self.stops, len(self.applied)})]
            ledgers += [[*self.applied, pending]] if pending else []
        ledgers = [ledger for ledger in ledgers if tally(ledger)[0] == step]
        if not ledgers or len(ledgers[-1]) < max(self.saves.values(), default=0):
            raise AssertionError(told)
        await self._make(uri)
        found = await self._counts()
        fitting = [ledger for ledger in ledgers if tally(ledger) == found]
        if not fitting:
            raise AssertionError(f"{told}; after a load of {uri} it is at {found}")
        self.applied = fitting[-1]

    async def _make(self, uri):
        while True:
            generation = self.server.generation
            try:
                # A tinker client makes the adapter by loading it.
                if not (uri and isinstance(self.actor, Tinker)):
                    await self.actor.create()
                if uri:
                    await self.actor.load(uri)
                return
            except (Unknown, NotTaken):
                await self._back(generation)
