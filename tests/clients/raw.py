"""The server's calls over plain HTTP/1.1, one connection each: for what measures the server or ill-treats it. Calls are those of
`xorl-client`, in JSON.
"""

import asyncio
import json


class Refused(Exception):
    """A reply that is no success, or a result that is an error."""

    def __init__(self, status, detail):
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


class Connection:
    """A connection that opens when it is needed and again after it broke. Calls go one after another."""

    # For a server that asks for one.
    key = None

    def __init__(self, port):
        self.port = port
        self.reader = self.writer = None

    def close(self):
        """Breaks the connection: what is under way stays the server's."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    async def send(self, head, body=b""):
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    async def reply(self):
        """Status and body of the next reply."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        body = await self.reader.readexactly(int(fields.get("content-length", 0)))
        if fields.get("connection") == "close":
            self.close()
        return int(head.split(" ", 2)[1]), body

    async def call(self, method, path, body=None):
        """Status and the reply's JSON. A connection that breaks raises OSError or EOFError."""
        text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        key = f"X-API-Key: {self.key}\r\n" if self.key else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{key}Content-Length: {len(text)}\r\n\r\n"
        try:
            await self.send(head, text)
            status, reply = await self.reply()
        except BaseException:
            self.close()
            raise
        try:
            return status, json.loads(reply)
        except ValueError:
            return status, reply.decode(errors="replace")

    async def post(self, name, body):
        status, reply = await self.call("POST", f"/api/v1/{name}", body)
        if status != 200:
            raise Refused(status, reply.get("detail", reply) if isinstance(reply, dict) else reply)
        return reply

    async def result(self, request_id):
        """Waits for the result of a request."""
        while True:
            try:
                result = await self.post("retrieve_future", {"request_id": request_id})
            except Refused as refused:
                if refused.status == 408:
                    continue
                raise
            if "error" in result:
                raise Refused(200, result["error"])
            return result

    async def ask(self, name, body):
        """Submits a request and waits for its result."""
        return await self.result((await self.post(name, body))["request_id"])


def pass_body(model, data, seq_id=None):
    """A `forward_backward` of cross_entropy: data of (ids, targets that are shifted already, weights or None)."""

    def datum(ids, targets, weights):
        inputs = {"target_tokens": targets} if weights is None else {"target_tokens": targets, "weights": weights}
        return {"model_input": {"input_ids": ids}, "loss_fn_inputs": inputs}

    numbered = {} if seq_id is None else {"seq_id": seq_id}
    asked = {"data": [datum(*one) for one in data], "loss_fn": "cross_entropy"}
    return {"model_id": model, "forward_backward_input": asked, **numbered}
