"""Every call of training, as users of a real tinker client write it, against a server.

    tinker_http.py ADDRESS KEY

ADDRESS is http://HOST:PORT. Prints "done" where all went as expected. TORCH_SITE is a folder with torch, which custom
losses need. The client goes through a proxy that can lose answers.
"""

import os
import pickle
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

sys.path.append(os.environ["TORCH_SITE"])

import tinker
from tinker import types

IS_OLD = tinker.__version__.startswith("0.24.")
ADDRESS, KEY = sys.argv[1:]


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on. Where a path is in `lost`, the server answers and the client loses its connection."""

    protocol_version = "HTTP/1.1"
    lost = []
    seen = []

    def hand_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = HTTPConnection(ADDRESS.removeprefix("http://"))
        server.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Connection"})
        reply = server.getresponse()
        content = reply.read()
        name = self.path.removeprefix("/api/v1/").split("?")[0]
        Proxy.seen.append((name, reply.status))
        if name in Proxy.lost:
            Proxy.lost.remove(name)
            self.close_connection = True
            return
        head = f"HTTP/1.1 {reply.status} {reply.reason}\r\nContent-Length: {len(content)}\r\n"
        head += f"Content-Type: {reply.getheader('content-type')}\r\n\r\n"
        self.wfile.write(head.encode() + content)

    do_GET = do_POST = do_PUT = do_DELETE = hand_on

    def log_message(self, *_):
        pass


def result(value):
    """Of a future, or of a client that is one."""
    return value.result() if hasattr(value, "result") else value


def datum(ids=(1, 2, 3), targets=(2, 3, 4), **inputs):
    tokens = types.ModelInput.from_ints(list(ids))
    return types.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": list(targets), **inputs})


def log_probs(output):
    return [list(one["logprobs"].data) for one in output.loss_fn_outputs]


def refused(call, *words):
    """The text with which `call` raises at once."""
    began = time.time()
    try:
        result(call())
    except Exception as error:
        text = str(error)
    else:
        raise AssertionError(f"not refused: {words}")
    assert all(word in text for word in words), text
    assert time.time() - began < 5, f"refused after {time.time() - began} s: {text}"
    return text


def passes(client):
    ones = result(client.forward([datum(), datum(targets=(2, -1, 4))], "cross_entropy"))
    assert log_probs(ones) == [[-0.5] * 3, [-0.5, 0, -0.5]], ones
    output = result(client.forward_backward([datum(weights=[0.0, 1.0, 2.0])], "cross_entropy"))
    assert output.metrics["loss:sum"] == 1.5, output.metrics
    columns = types.TensorData(data=[1, 2, 3, 4, 5, 6], dtype="int64", shape=[3, 2])
    tokens = types.ModelInput.from_ints([1, 2, 3])
    data = [types.Datum(model_input=tokens, loss_fn_inputs={"target_tokens": columns})]
    output = result(client.forward_backward(data, "cross_entropy"))
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3, 2], output
    policy = datum(logprobs=[-1.0, -1.0, -1.0], advantages=[1.0, 0.0, -1.0])
    result(client.forward_backward([policy], "ppo", {"clip_low_threshold": 0.9}))


def custom_loss(client):
    def loss(data, log_probs):
        return sum((one * one).sum() for one in log_probs), {"squares": 3.0}

    output = result(client.forward_backward_custom([datum(), datum(targets=(7, 8, 9))], loss))
    assert output.metrics["squares"] == 3.0, output.metrics


def updates(client):
    stepped = result(client.optim_step(types.AdamParams(learning_rate=2e-4, weight_decay=0.1, grad_clip_norm=1.0)))
    assert stepped.metrics["grad_norm"] == 1.25 and stepped.metrics["learning_rate"] == 2e-4, stepped


def many_data(client):
    """More data than one request may have: chunks that go at once, the first one last."""
    output = result(client.forward_backward([datum()] * 2100, "cross_entropy"))
    assert len(output.loss_fn_outputs) == 2100 and output.metrics["loss:sum"] == 3150.0, output.metrics


def lost_answers(client):
    """A client whose answer was lost sends the request again, and nothing is carried out twice."""
    for path, call in [
        ("forward_backward", lambda: client.forward_backward([datum(ids=(9, 9, 9))], "cross_entropy")),
        ("optim_step", lambda: client.optim_step(types.AdamParams(learning_rate=0.125))),
        ("save_weights", lambda: client.save_state("lost")),
        ("retrieve_future", lambda: client.forward_backward([datum(ids=(8, 8, 8))], "cross_entropy")),
    ]:
        Proxy.lost.append(path)
        count = sum(name == path for name, _ in Proxy.seen)
        result(call())
        assert not Proxy.lost and sum(name == path for name, _ in Proxy.seen) >= count + 2, path


def refusals(client):
    """A refused request uses up its number: the next one does not wait."""
    refused(lambda: client.forward_backward([datum(ids=(1, 2, 5000))], "cross_entropy"), "5000", "vocabulary")
    refused(lambda: client.save_state("a/b"), "a/b", "expected a name without")
    refused(lambda: client.forward_backward([datum()], "stable_reinforce"), "importance_sampling")
    began = time.time()
    updates(client)
    assert time.time() - began < 5


def saves(service, client):
    options = {} if IS_OLD else {"user_metadata": {"step": "7"}}
    saved = result(client.save_state("one", ttl_seconds=7200, **options)).path
    run = client.get_info().model_id
    assert saved == f"tinker://{run}/weights/one", saved
    refused(lambda: client.save_state("one"), "one")
    sampler = result(client.save_weights_for_sampler("one")).path
    assert sampler == f"tinker://{run}/sampler_weights/one", sampler
    assert result(client.load_state(saved)).path == saved
    assert result(client.load_state_with_optimizer(saved)).path == saved
    refused(lambda: client.load_state(f"tinker://{run}/weights/other"), "other")
    for make in (
        service.create_training_client_from_state,
        service.create_training_client_from_state_with_optimizer,
    ):
        other = result(make(saved, user_metadata={"renderer_name": "role_colon"}))
        info = other.get_info()
        assert info.model_id != run and info.lora_rank == 8 and info.model_data.model_name == "org/base", info
        assert info.model_data.tokenizer_id == "/models/base", info
        result(other.forward_backward([datum()], "cross_entropy"))
        updates(other)
    refused(lambda: service.create_training_client_from_state(f"tinker://{run}/weights/other"), "no such checkpoint")
    refused(lambda: service.create_training_client_from_state(f"tinker://{run}/weights/../../x"), "path")
    return run, saved


def sampling(service, client, run):
    """The engine gives continuation n of a prompt that begins with p the tokens p + n, p + n + 1, …"""
    prompt, params = types.ModelInput.from_ints([5, 6, 7]), types.SamplingParams(max_tokens=3, seed=1)
    sampler = result(client.save_weights_and_get_sampling_client())
    Proxy.lost.append("asample")
    many = result(sampler.sample(prompt, num_samples=3, sampling_params=params))
    assert not Proxy.lost
    assert [list(one.tokens) for one in many.sequences] == [[5, 6, 7], [6, 7, 8], [7, 8, 9]], many
    assert all(list(one.logprobs) == [-0.5] * 3 and one.stop_reason == "length" for one in many.sequences), many
    stopped = result(sampler.sample(prompt, 1, types.SamplingParams(max_tokens=3, stop=[6])))
    assert list(stopped.sequences[0].tokens) == [5, 6] and stopped.sequences[0].stop_reason == "stop", stopped
    assert result(sampler.compute_logprobs(prompt)) == [None, -0.5, -0.5]
    options = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    top = [(0, -0.5), (1, -0.5)]
    scored = result(sampler.sample(prompt, 1, params, **options))
    assert scored.topk_prompt_logprobs == [None, top, top], scored
    path = f"tinker://{run}/sampler_weights/one"
    for other in (
        service.create_sampling_client(base_model="org/base"),
        service.create_sampling_client(model_path=path),
        client.create_sampling_client(path),
    ):
        told = [result(result(other).sample(prompt, 1, params)) for _ in range(2)]
        assert all(list(one.sequences[0].tokens) == [5, 6, 7] for one in told), told
    refused(lambda: result(service.create_sampling_client(model_path=f"{path}_not")), "no such checkpoint")
    refused(lambda: sampler.sample(types.ModelInput.from_ints([1, 5000]), 1, params), "5000", "vocabulary")
    if IS_OLD:
        return
    assert ("retrieve_futures", 200) in Proxy.seen
    assert len({one.sequence_id for one in many.sequences}) == 3, many
    scored = result(sampler.sample(prompt, 1, params, topk_sample_logprobs=2))
    assert scored.sequences[0].topk_logprobs == [top] * 3, scored
    assert result(sampler.compute_logprobs(prompt, prompt_logprobs_last_n=1)) == [None, None, -0.5]
    targets = types.TensorData(data=[8, -1, 9, 10], dtype="int64", shape=[2, 2])
    scored = result(sampler.sample(prompt, 1, params, target_prompt_logprobs=targets))
    assert list(scored.target_prompt_logprobs.data) == [-0.5, 0.0, -0.5, -0.5], scored
    assert list(scored.target_prompt_logprobs.shape) == [2, 2], scored
    refused(lambda: sampler.sample(prompt, 1, params, prompt_alt_tokens_k=2), "prompt_alt_tokens_k")
    clone = pickle.loads(pickle.dumps(sampler))
    assert list(result(clone.sample(prompt, 1, params)).sequences[0].tokens) == [5, 6, 7]
    assert ("join_sampling_session", 200) in Proxy.seen, Proxy.seen[-9:]


def rest(service, client, run, saved):
    api = service.create_rest_client()
    found = result(api.get_training_run(run))
    assert (found.training_run_id, found.base_model, found.lora_rank) == (run, "org/base", 8), found
    assert found.user_metadata == {"renderer_name": "x"}, found
    assert found.model_owner == "lab" and found.last_checkpoint.checkpoint_type == "training", found
    assert found.last_sampler_checkpoint.tinker_path == f"tinker://{run}/sampler_weights/one", found
    assert result(api.get_training_run_by_tinker_path(saved)).training_run_id == run
    runs = result(api.list_training_runs(limit=2))
    assert len(runs.training_runs) == 2 and runs.cursor.total_count == 3, runs
    info = result(api.get_weights_info_by_tinker_path(saved))
    assert (info.base_model, info.lora_rank, info.train_mlp, info.train_attn) == ("org/base", 8, False, True), info

    listed = {one.checkpoint_id: one for one in result(api.list_checkpoints(run)).checkpoints}
    assert sorted(listed) == ["sampler_weights/one", "weights/lost", "weights/one"], listed
    one = listed["weights/one"]
    assert one.tinker_path == saved and one.size_bytes > 0 and not one.public, one
    assert getattr(one, "user_metadata", None) == (None if IS_OLD else {"step": "7"}), one
    assert 7100 < (one.expires_at - one.time).total_seconds() <= 7200, one

    def again():
        return next(one for one in result(api.list_checkpoints(run)).checkpoints if one.tinker_path == saved)

    result(api.publish_checkpoint_from_tinker_path(saved))
    assert again().public
    result(api.unpublish_checkpoint_from_tinker_path(saved))
    result(api.set_checkpoint_ttl_from_tinker_path(saved, None))
    assert not again().public and again().expires_at is None, again()
    result(api.set_checkpoint_ttl_from_tinker_path(saved, 3600))
    assert again().expires_at is not None
    everything = result(api.list_user_checkpoints(limit=2, offset=1))
    assert len(everything.checkpoints) == 2 and everything.cursor.total_count == 3, everything
    result(api.delete_checkpoint(run, "weights/lost"))
    result(api.delete_checkpoint_from_tinker_path(f"tinker://{run}/sampler_weights/one"))
    assert [one.checkpoint_id for one in result(api.list_checkpoints(run)).checkpoints] == ["weights/one"]
    refused(lambda: api.delete_checkpoint(run, "weights/lost"), "no such checkpoint")
    refused(lambda: api.get_training_run("sess-0:train:0"), "not known")

    sessions = result(api.list_sessions()).sessions
    assert run.split(":")[0] in sessions, sessions
    session = result(api.get_session(run.split(":")[0]))
    assert len(session.training_run_ids) == 3 and len(session.sampler_ids) == 4, session
    samplers = [result(api.get_sampler(sampler)) for sampler in session.sampler_ids]
    assert {one.base_model for one in samplers} == {"org/base"}, samplers
    assert [one.model_path for one in samplers].count(f"tinker://{run}/sampler_weights/one") == 2, samplers
    refused(lambda: api.get_sampler("s"), "is not known")
    if IS_OLD:
        return
    assert [one.model_name for one in result(api.get_server_capabilities()).supported_models] == ["org/base"]
    copied = result(api.copy_weights(saved, "project"))
    assert copied.endswith("/weights/one") and copied != saved, copied
    copy = copied.removeprefix("tinker://").split("/")[0]
    assert result(api.list_checkpoints(copy)).checkpoints[0].tinker_path == copied
    other = result(service.create_training_client_from_state(copied))
    assert other.get_info().lora_rank == 8


def external(service, client):
    if IS_OLD:
        return
    path = result(client.save_weights_external("out")).path
    assert path.endswith("/external_weights/out"), path
    answer = result(service.create_rest_client().get_external_weights_urls(path))
    assert sorted(answer.urls) == ["adapter_config.json", "metadata.json"], answer
    url = answer.urls["adapter_config.json"]
    with urllib.request.urlopen(url) as reply:
        assert b'"peft_type"' in reply.read()
    part = urllib.request.Request(url, headers={"Range": "bytes=2-10"})
    with urllib.request.urlopen(part) as reply:
        assert reply.status == 206 and reply.read() == b"peft_type"
    for bad in (url.replace("adapter_config.json", "metadata.json"), url.replace("/out/", "/one/")):
        try:
            urllib.request.urlopen(bad)
            raise AssertionError(bad)
        except urllib.error.HTTPError as error:
            assert error.code == 403, error
    refused(lambda: client.save_weights_external("secret", age_encryption_recipients=["age1x"]), "not encrypted")


def main():
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    base_url = f"http://127.0.0.1:{proxy.server_port}"
    service = tinker.ServiceClient(base_url=base_url, api_key=KEY, user_metadata={"who": "test"})
    assert service.get_server_capabilities().supported_models[0].model_name == "org/base"
    Proxy.lost.append("create_model")
    make = service.create_lora_training_client
    client = result(make("org/base", rank=8, seed=5, train_mlp=False, user_metadata={"renderer_name": "x"}))
    assert not Proxy.lost
    refused(lambda: make("org/other", rank=8), "org/other", "org/base")
    refused(lambda: make("org/base", rank=65), "max_lora_rank")
    passes(client)
    custom_loss(client)
    updates(client)
    many_data(client)
    lost_answers(client)
    refusals(client)
    run, saved = saves(service, client)
    sampling(service, client, run)
    rest(service, client, run, saved)
    external(service, client)
    session = run.split(":")[0]
    if IS_OLD:
        service.holder.close()
    else:
        service.close("success").result()
        assert (f"sessions/{session}/finish", 200) in Proxy.seen, Proxy.seen[-5:]
        assert ("telemetry", 200) in Proxy.seen, Proxy.seen
    print("done")


main()
