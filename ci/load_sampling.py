"""Clients of the load on a server (load.py) that sample while others train.

- A Keeper has one saved adapter, or the base, and asks for the same greedy texts over every wire, before restarts of the server and after:
  tokens stay the same. Between these it drops streams and requests in the middle, cancels samples, and samples from sessions that have
  ended. A tenant with another key asks for all that it has, in vain.
- A Policy trains over tinker's wire, freezes its values and samples: log-probabilities equal those of a forward, also of values that were
  trained on meanwhile.

Times and distances that are judged are in `Found`.
"""

import asyncio
import json
import math
import re
import time
from dataclasses import dataclass, field

from load_actors import Tinker, raw

import plan

OTHER_KEY = "tml-other"
PROMPTS, TOKENS, SECONDS = 3, 24, 120
# fp32 on as many ranks, but sums of a step are in another order beside other requests.
NEAR = 1e-4
# Between the two most likely tokens at each step, so that this order decides nothing.
GAP = 1e-3
ENDING = re.compile(r"the server is stopping|a rank of the server has failed|the engine ended before")


class Ended(Exception):
    """The server ends, or has ended."""


@dataclass
class Found:
    """What all clients together have seen."""

    compared: int = 0
    of_them_over_a_restart: int = 0
    by_library: int = 0
    tokens: int = 0
    largest_distance: float = 0.0
    ratios: int = 0
    largest_of_ratios: float = 0.0
    cancelled: int = 0
    longest_cancel: float = 0.0
    dropped: int = 0
    refused_to_others: int = 0
    seeded: int = 0
    seeded_that_differ: int = 0
    errors_500_at_an_end: int = 0
    one_of_these: str = ""
    statuses: dict = field(default_factory=dict)


class Client:
    """Calls on a connection each. What the server answers is counted."""

    def __init__(self, server, name, random, found):
        self.server, self.name, self.random, self.found = server, name, random, found

    async def call(self, method, path, body=None, wanted=(200,), key=None):
        """Status and reply, which must be one of `wanted`."""
        connection = raw.Connection(self.server.port)
        connection.key = key or connection.key
        try:
            status, told = await connection.call(method, path, body)
        except (OSError, EOFError) as error:
            raise Ended(repr(error)) from error
        finally:
            connection.close()
        self.found.statuses[status] = self.found.statuses.get(status, 0) + 1
        text = json.dumps(told)
        if status not in wanted and ENDING.search(text):
            if status == 500:
                self.found.errors_500_at_an_end += 1
                self.found.one_of_these = f"{method} {path}: {text[:300]}"
            raise Ended(text)
        if status not in wanted:
            raise AssertionError(f"{method} {path} {json.dumps(body)[:200]}: {status} {text[:300]}")
        return status, told

    async def post(self, name, body, **more):
        return (await self.call("POST", f"/api/v1/{name}", {"type": name, **body}, **more))[1]

    async def result(self, request_id):
        """A result, or the reason why there is none."""
        while True:
            status, told = await self.call("POST", "/api/v1/retrieve_future", {"request_id": request_id}, wanted=(200, 408))
            if status == 200:
                if ENDING.search(str(told.get("error", ""))):
                    raise Ended(told["error"])
                return told

    async def ask(self, name, body):
        told = await self.result((await self.post(name, body))["request_id"])
        if "error" in told:
            raise AssertionError(f"{name} {json.dumps(body)[:200]}: {told['error']}")
        return told

    async def turns(self, deadline, failures):
        """One turn after another until the time is over, and from the beginning where the server has ended."""
        while time.monotonic() < deadline and len(failures) < 20:
            await self.server.is_up.wait()
            generation = self.server.generation
            try:
                await self.turn()
            except Ended as error:
                for _ in range(600):
                    if self.server.generation != generation or time.monotonic() > deadline:
                        break
                    await asyncio.sleep(0.1)
                else:
                    failures.append(f"{self.name}: {error} though the server went on")
            except Exception as error:
                # What a new server does not know is no fault; an error of the server's own is.
                if self.server.generation == generation or re.search(r": 5\d\d ", str(error)):
                    failures.append(f"{self.name}: {type(error).__name__}: {error}")
            await asyncio.sleep(self.random.random() * 0.4)


@dataclass
class Truth:
    prompt: list
    ids: list
    log_probs: list
    text: str
    generation: int


class Keeper(Client):
    def __init__(self, server, name, random, found, of_base):
        super().__init__(server, name, random, found)
        self.of_base, self.path, self.truths, self.attempt, self.sampler = of_base, None, [], 0, None

    async def turn(self):
        if self.path is None and not self.of_base:
            await self.save()
        if len(self.truths) < PROMPTS:
            return await self.learn()
        truth = self.random.choice(self.truths)
        ways = [self.generates, self.completes, self.streams, self.samples, self.drops, self.leaves, self.cancels, self.seeds]
        ways += [] if self.of_base else [self.others]
        ways += [self.library] if Tinker.kind in self.server.args.kinds else []
        await self.random.choice(ways)(truth)

    async def save(self):
        """An adapter that differs from the base, and of which only the save is left."""
        self.attempt += 1
        model, adapter = f"{self.name}-{self.attempt}", self.random.randrange(1000)
        spec = {"rank": plan.RANKS[adapter % 8], "alpha": 16, "seed": adapter}
        connection = raw.Connection(self.server.port)
        try:
            await connection.ask("create_model", {"model_id": model, "lora_config": spec})
            for step in range(2):
                await connection.ask("forward_backward", raw.pass_body(model, plan.data(adapter, step)))
                settings = {**plan.settings(adapter), "learning_rate": 5e-2}
                await connection.ask("optim_step", {"model_id": model, "adam_params": settings})
            self.path = (await connection.ask("save_weights_for_sampler", {"model_id": model, "name": "kept"}))["path"]
            await connection.ask("unload_model", {"model_id": model})
        except raw.Refused as refused:
            raise (Ended if ENDING.search(str(refused)) else AssertionError)(str(refused)) from refused
        except (OSError, EOFError) as error:
            raise Ended(repr(error)) from error
        finally:
            connection.close()

    def tinker_path(self):
        return self.path.replace("xorl://", "tinker://")

    def body(self, prompt, **params):
        params = {"max_new_tokens": TOKENS, "temperature": 0, **params}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
        return {**body, **({"lora_path": self.path} if self.path else {})}

    def completion(self, prompt, **more):
        model = self.path or self.server.base_model
        return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}

    async def learn(self):
        """One more prompt whose text is well defined."""
        prompt = [self.random.randrange(3, plan.VOCABULARY) for _ in range(self.random.randrange(4, 24))]
        generation = self.server.generation
        _, told = await self.call("POST", "/generate", {**self.body(prompt), "top_logprobs_num": 2})
        best = told["meta_info"]["output_top_logprobs"]
        if any(first[0] - second[0] < GAP for first, second in best):
            return
        _, whole = await self.call("POST", "/v1/completions", self.completion(prompt))
        scores = [one[0] for one in told["meta_info"]["output_token_logprobs"]]
        self.truths.append(Truth(prompt, told["output_ids"], scores, whole["choices"][0]["text"], generation))

    def check(self, truth, way, got, wanted, log_probs=()):
        distance = max((abs(a - b) for a, b in zip(log_probs, truth.log_probs)), default=0.0)
        if got != wanted or not distance < NEAR:
            raise AssertionError(f"{way} of {self.path}, {truth.prompt}: {got}, {distance:.1e} apart, instead of {wanted}")
        self.found.compared += 1
        self.found.of_them_over_a_restart += truth.generation != self.server.generation
        self.found.tokens += len(truth.ids)
        self.found.largest_distance = max(self.found.largest_distance, distance)

    async def generates(self, truth):
        count = self.random.choice([1, 3])
        _, told = await self.call("POST", "/generate", self.body(truth.prompt, n=count))
        for one in told if count > 1 else [told]:
            self.check(truth, "generate", one["output_ids"], truth.ids, [pair[0] for pair in one["meta_info"]["output_token_logprobs"]])

    async def completes(self, truth):
        _, told = await self.call("POST", "/v1/completions", self.completion(truth.prompt, n=2))
        for choice in told["choices"]:
            self.check(truth, "completions", choice["text"], truth.text)

    async def events(self, body, most=None):
        """Data of a stream's events; the connection is dropped after `most`."""
        text, found = json.dumps(body), []
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {raw.Connection.key}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
            while most is None or len(found) < most:
                line = await reader.readline()
                if not line:
                    break
                if line.startswith(b"data: "):
                    found.append(line[6:].decode().strip())
        finally:
            writer.close()
        return found

    async def streams(self, truth):
        try:
            events = await self.events(self.completion(truth.prompt, stream=True))
        except OSError as error:
            raise Ended(repr(error)) from error
        if not events or events[-1] != "[DONE]" or any("error" in event for event in events):
            # Nothing tells a broken stream from one of a server that ends, but the server.
            raise Ended(f"a stream that ends so: {events[-1:]}")
        parts = [choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"]]
        self.check(truth, "stream", "".join(parts), truth.text)

    async def session(self):
        session = (await self.post("create_session", {"tags": []}))["session_id"]
        source = {"model_path": self.tinker_path()} if self.path else {"base_model": self.server.base_model}
        made = await self.post("create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, **source})
        return session, made["sampling_session_id"]

    async def finish(self, session):
        await self.post(f"sessions/{session}/finish", {})

    def sample(self, sampler, prompt, number, count=1, **params):
        params = {"max_tokens": TOKENS, "temperature": 0.0, "top_k": -1, "top_p": 1.0, **params}
        chunks = {"chunks": [{"tokens": prompt, "type": "encoded_text"}]}
        return {"sampling_session_id": sampler, "seq_id": number, "num_samples": count, "prompt": chunks, "sampling_params": params}

    async def samples(self, truth):
        """Over tinker's wire; a sample asked twice is one; then its session ends."""
        session, sampler = await self.session()
        body = self.sample(sampler, truth.prompt, 0, 2)
        taken, again = (await self.post("asample", body))["request_id"], (await self.post("asample", body))["request_id"]
        assert taken == again, (taken, again)
        told = await self.result(taken)
        for one in told["sequences"]:
            self.check(truth, "asample", one["tokens"], truth.ids, one["logprobs"])
        await self.finish(session)
        for name, more in [("asample", self.sample(sampler, truth.prompt, 1)), ("join_sampling_session", {"sampling_session_id": sampler})]:
            await self.post(name, more, wanted=(404,))

    async def library(self, truth):
        """By tinker's own client."""

        def sample():
            from tinker import types

            driver = Tinker.current(self.server)
            if self.sampler is None or self.sampler[0] is not driver:
                source = {"model_path": self.tinker_path()} if self.path else {"base_model": self.server.base_model}
                self.sampler = driver, driver.module.settled(driver.service.create_sampling_client(**source))
            params = types.SamplingParams(max_tokens=TOKENS, temperature=0.0)
            return self.sampler[1].sample(types.ModelInput.from_ints(truth.prompt), 2, params).result(timeout=SECONDS)

        try:
            told = await asyncio.to_thread(sample)
        except Exception as error:
            raise (Ended(str(error)) if ENDING.search(str(error)) else error) from error
        for one in told.sequences:
            self.check(truth, "tinker", list(one.tokens), truth.ids, list(one.logprobs))
        self.found.by_library += 1

    async def drops(self, truth):
        try:
            await self.events(self.completion(truth.prompt, stream=True, temperature=1, max_tokens=200, n=2), self.random.randrange(1, 6))
        except OSError as error:
            raise Ended(repr(error)) from error
        self.found.dropped += 1

    async def leaves(self, truth):
        path, body = self.random.choice(
            [("/generate", self.body(truth.prompt, max_new_tokens=200, n=4)), ("/v1/completions", self.completion(truth.prompt, n=4))]
        )
        connection = raw.Connection(self.server.port)
        try:
            await asyncio.wait_for(connection.call("POST", path, body), self.random.random() * 0.3)
        except (OSError, EOFError, asyncio.TimeoutError):
            pass
        finally:
            connection.close()
        self.found.dropped += 1

    async def cancels(self, truth):
        """A long sample that is cancelled: it says so soon, unless it was done before."""
        session, sampler = await self.session()
        body = self.sample(sampler, truth.prompt, 0, 4, temperature=1.0, max_tokens=400)
        taken = (await self.post("asample", body))["request_id"]
        await asyncio.sleep(self.random.random() * 0.5)
        began = time.monotonic()
        assert await self.post("cancel_future", {"request_id": taken}) == {}
        told = await self.result(taken)
        if "error" in told:
            assert "was cancelled" in told["error"], told
            self.found.cancelled += 1
            self.found.longest_cancel = max(self.found.longest_cancel, time.monotonic() - began)
        else:
            assert len(told["sequences"]) == 4, told
        await self.finish(session)

    async def seeds(self, truth):
        """The same seed, the same tokens, but where rounding decides; and its continuations are several texts."""
        session, sampler = await self.session()
        seed = self.random.randrange(1 << 40)
        first, second = [await self.ask("asample", self.sample(sampler, truth.prompt, n, 3, temperature=1.0, seed=seed)) for n in (0, 1)]
        texts = [[one["tokens"] for one in told["sequences"]] for told in (first, second)]
        self.found.seeded += 3
        self.found.seeded_that_differ += sum(a != b for a, b in zip(*texts))
        assert len({str(one) for one in texts[0]}) > 1, texts[0]
        await self.finish(session)

    async def others(self, truth):
        """Another tenant gets nothing of this one's."""
        session, sampler = await self.session()
        taken = (await self.post("asample", self.sample(sampler, truth.prompt, 0)))["request_id"]
        tinker_path = self.tinker_path()
        asked = [
            ("/generate", self.body(truth.prompt)),
            ("/v1/completions", self.completion(truth.prompt)),
            ("/v1/completions", self.completion(truth.prompt, model=tinker_path, stream=True)),
            ("/api/v1/asample", {"type": "asample", **self.sample(sampler, truth.prompt, 0)}),
            ("/api/v1/join_sampling_session", {"sampling_session_id": sampler}),
            ("/api/v1/retrieve_futures", {"target": {"sampling_session_id": sampler}, "timeout": 0}),
            ("/api/v1/retrieve_future", {"request_id": taken}),
            ("/api/v1/create_sampling_session", {"model_path": self.path}),
            ("/api/v1/create_sampling_session", {"session_id": session, "sampling_session_seq_id": 1, "model_path": tinker_path}),
        ]
        for path, body in asked:
            await self.call("POST", path, body, wanted=(400, 404), key=OTHER_KEY)
            self.found.refused_to_others += 1
        await self.call("POST", "/generate", self.body(truth.prompt), wanted=(401,), key="tml-nobody")
        _, models = await self.call("GET", "/v1/models", key=OTHER_KEY)
        assert self.name not in json.dumps(models), models
        # A stranger's cancel is answered, and does nothing.
        await self.call("POST", "/api/v1/cancel_future", {"request_id": taken}, key=OTHER_KEY)
        (one,) = (await self.result(taken))["sequences"]
        self.check(truth, "asample beside others", one["tokens"], truth.ids, one["logprobs"])
        await self.finish(session)


class Policy(Client):
    """A turn is the life of an adapter."""

    async def turn(self):
        session = (await self.post("create_session", {"tags": []}))["session_id"]
        adapter, self.number = self.random.randrange(1000), 0
        made = {"session_id": session, "model_seq_id": 0, "base_model": self.server.base_model, "lora_config": {"rank": 4, "seed": adapter}}
        self.model = (await self.ask("create_model", made))["model_id"]
        old = None
        for step in range(4):
            for data in (plan.data(adapter, step), plan.data(adapter, step + 100)):
                self.number += 1
                asked = {"data": [datum(*one) for one in data], "loss_fn": "cross_entropy"}
                body = {"model_id": self.model, "seq_id": self.number, "forward_backward_input": asked}
                await self.ask("forward_backward", body)
            self.number += 1
            settings = {**plan.settings(adapter), "learning_rate": 1e-2}
            await self.ask("optim_step", {"model_id": self.model, "seq_id": self.number, "adam_params": settings})
            if old is not None:
                self.near(await self.scores(old[0], 9, old[1]), old[2])
            self.number += 1
            frozen = {"model_id": self.model, "seq_id": self.number, "sampling_session_seq_id": step}
            sampler = (await self.ask("save_weights_for_sampler", frozen))["sampling_session_id"]
            old = await self.is_on_policy(sampler)
        await self.post(f"sessions/{session}/finish", {})
        # Models of a session that has ended stay.
        await self.ask("unload_model", {"model_id": self.model})

    async def is_on_policy(self, sampler):
        prompt = [self.random.randrange(3, plan.VOCABULARY) for _ in range(self.random.randrange(2, 20))]
        params = {"max_tokens": 12, "temperature": 1.0, "top_k": -1, "top_p": 1.0, "seed": self.random.randrange(1000)}
        chunks = {"chunks": [{"tokens": prompt, "type": "encoded_text"}]}
        body = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 3, "prompt": chunks, "sampling_params": params}
        told = await self.ask("asample", body)
        rows = [prompt + one["tokens"] for one in told["sequences"]]
        self.number += 1
        asked = {"data": [datum(row[:-1], row[1:], None) for row in rows], "loss_fn": "cross_entropy"}
        passed = await self.ask("forward", {"model_id": self.model, "seq_id": self.number, "forward_input": asked})
        for one, output in zip(told["sequences"], passed["loss_fn_outputs"]):
            self.near(one["logprobs"], output["logprobs"]["data"][len(prompt) - 1 :])
        return sampler, rows[0], await self.scores(sampler, 1, rows[0])

    async def scores(self, sampler, number, row):
        params = {"max_tokens": 1, "temperature": 0.0, "top_k": -1, "top_p": 1.0}
        chunks = {"chunks": [{"tokens": row, "type": "encoded_text"}]}
        body = {"sampling_session_id": sampler, "seq_id": number, "num_samples": 1, "prompt": chunks, "sampling_params": params}
        return (await self.ask("asample", {**body, "prompt_logprobs": True}))["prompt_logprobs"][1:]

    def near(self, ours, theirs):
        assert len(ours) == len(theirs), (ours, theirs)
        distance = max(abs(a - b) for a, b in zip(ours, theirs))
        self.found.ratios += len(ours)
        self.found.largest_of_ratios = max(self.found.largest_of_ratios, abs(math.expm1(distance)))
        assert distance < NEAR, f"{self.model}: log-probabilities are {distance:.1e} apart: {ours} {theirs}"


def datum(ids, targets, weights):
    def tensor(data, dtype):
        return {"data": data, "dtype": dtype, "shape": [len(data)]}

    inputs = {"target_tokens": tensor(targets, "int64"), **({"weights": tensor(weights, "float32")} if weights else {})}
    return {"model_input": {"chunks": [{"tokens": ids, "type": "encoded_text"}]}, "loss_fn_inputs": inputs}
