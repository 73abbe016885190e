"""Every public method of xorl-client, called against a server."""

import math
import urllib.parse
from pathlib import Path

import xorl_client
from methods import Table, settled
from xorl_client import types
from xorl_client.exceptions import RequestFailedError

import plan

TABLE = Table(
    f"xorl-client {xorl_client.__version__}",
    [xorl_client.ServiceClient, xorl_client.TrainingClient, xorl_client.SamplingClient, xorl_client.RestClient],
    hide=[r"http://localhost:\d+|http://127\.0\.0\.1:\d+", r"step-\d+"],
)
STEP = types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)


def datums(data):
    return [
        types.Datum(types.ModelInput.from_ints(tokens=ids), dict(weights=weights, target_tokens=targets))
        for ids, targets, weights in data
    ]


DATA = datums(plan.data(0, 0))


class Driver:
    """What equality.py asks of a client."""

    divides = True

    def __init__(self, url, output_dir, base_model):
        self.url, self.output_dir, self.base_model = url, Path(output_dir), base_model
        self.service = xorl_client.ServiceClient(base_url=url)
        self.fresh = 0

    def create(self, name, adapter):
        rank, alpha = plan.RANKS[adapter], plan.alpha(adapter)
        return self.service.create_lora_training_client(self.base_model, rank=rank, alpha=alpha, model_id=name)

    def another(self, name):
        """A new adapter for checks."""
        return self.service.create_lora_training_client(self.base_model, rank=4, model_id=f"check-{name}")

    def forward_backward(self, client, data):
        return client.forward_backward(datums(data), "cross_entropy")

    def loss(self, future):
        return future.result(timeout=60).metrics["loss:sum"]

    def optim_step(self, client, settings):
        return client.optim_step(types.AdamParams(**settings))

    def save(self, client, name):
        return self.folder(client.save_state(name).result(timeout=60).path)

    def folder(self, uri):
        """The folder of a saved adapter."""
        parts = urllib.parse.urlsplit(uri)
        kind, name = parts.path.strip("/").split("/")
        return self.output_dir / kind / parts.netloc / name


def logprobs(client):
    passed = client.forward(DATA).result(timeout=60)
    return [value for output in passed.loss_fn_outputs for value in output["logprobs"].data]


def train(client):
    client.forward_backward(DATA, "cross_entropy").result(timeout=60)
    return client.optim_step(STEP).result(timeout=60)


def is_near(ours, theirs):
    assert len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(ours, theirs)), (ours, theirs)


def differs(ours, theirs):
    assert any(abs(a - b) > 1e-4 for a, b in zip(ours, theirs)), ours


def ids_of(listed):
    return [found.checkpoint_id for found in listed.checkpoints]


# --- ServiceClient


@TABLE.works("ServiceClient.create_lora_training_client", "TrainingClient.optim_step", "TrainingClient.forward_backward")
def trains_an_adapter(driver):
    client = driver.another("lora")
    before = logprobs(client)
    stepped = train(client)
    assert stepped.metrics["grad_norm"] > 0 and stepped.metrics["step"] == 1, stepped.metrics
    differs(logprobs(client), before)


@TABLE.works("ServiceClient.create_lora_training_client_async")
async def creates_lora_later(driver):
    client = await driver.service.create_lora_training_client_async(driver.base_model, rank=2, model_id="check-lora-async")
    assert client.model_id == "check-lora-async"
    # It asks through the same loop, so this thread may wait.
    assert train(client).metrics["step"] == 1


@TABLE.works("ServiceClient.create_training_client")
def creates_without_a_rank(driver):
    assert train(driver.service.create_training_client(driver.base_model, model_id="check-full")).metrics["step"] == 1


@TABLE.works("ServiceClient.create_training_client_async")
async def creates_without_a_rank_later(driver):
    client = await driver.service.create_training_client_async(driver.base_model, model_id="check-full-async")
    assert train(client).metrics["step"] == 1


def state_case(driver, name):
    """An adapter saved after a step and trained on; its path, log-probabilities then, and losses of two more steps."""
    client = driver.another(name)
    train(client)
    path, then = client.save_state("mid").result(timeout=60).path, logprobs(client)
    train(client)
    return path, then, logprobs(client)


def continues(client, then, after, with_optimizer):
    is_near(logprobs(client), then)
    train(client)
    if with_optimizer:
        is_near(logprobs(client), after)
    else:
        differs(logprobs(client), after)


@TABLE.works("ServiceClient.create_training_client_from_state")
def goes_on_from_values(driver):
    path, then, after = state_case(driver, "from")
    continues(driver.service.create_training_client_from_state(path), then, after, False)


@TABLE.works("ServiceClient.create_training_client_from_state_async")
async def goes_on_from_values_later(driver):
    path, then, after = state_case(driver, "from-async")
    continues(await driver.service.create_training_client_from_state_async(path), then, after, False)


@TABLE.works("ServiceClient.create_training_client_from_state_with_optimizer")
def goes_on_from_state(driver):
    path, then, after = state_case(driver, "from-state")
    continues(driver.service.create_training_client_from_state_with_optimizer(path), then, after, True)


@TABLE.works("ServiceClient.create_training_client_from_state_with_optimizer_async")
async def goes_on_from_state_later(driver):
    path, then, after = state_case(driver, "from-state-async")
    continues(await driver.service.create_training_client_from_state_with_optimizer_async(path), then, after, True)


TABLE.refused(
    "ServiceClient.get_server_capabilities", "not yet implemented", lambda driver: driver.service.get_server_capabilities()
)


@TABLE.works("ServiceClient.shutdown")
def shuts_down(driver):
    service = xorl_client.ServiceClient(base_url=driver.url)
    service.create_lora_training_client(driver.base_model, rank=4, model_id="check-lora")
    service.shutdown()


# --- TrainingClient


@TABLE.works("TrainingClient.forward", "TrainingClient.forward_async")
def forward_alone_trains_nothing(driver):
    client = driver.another("forward")
    first = client.forward(DATA, "cross_entropy").result(timeout=60)
    second = settled(client.forward_async(DATA, "cross_entropy"))
    assert [output["logprobs"].shape for output in first.loss_fn_outputs] == [[datum.model_input.length] for datum in DATA]
    # Data of other clients may share the pass: the same but for rounding.
    is_near([first.metrics["loss:sum"]], [second.metrics["loss:sum"]])
    assert first.metrics["loss:sum"] > 0
    # Nothing is there that an update could be divided by.
    try:
        client.optim_step(STEP).result(timeout=60)
    except RequestFailedError as error:
        assert "send forward_backward" in str(error), error
    else:
        raise AssertionError("a forward alone has left a gradient")
    is_near(logprobs(client), [value for output in first.loss_fn_outputs for value in output["logprobs"].data])


@TABLE.works("TrainingClient.get_tokenizer")
def finds_the_tokenizer(driver):
    tokenizer = driver.another("tokenizer").get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@TABLE.works("TrainingClient.health_check")
def is_healthy(driver):
    health = driver.another("health").health_check()
    assert health["status"] == "ok" and health["engine_running"], health


@TABLE.works(
    "TrainingClient.save_state",
    "TrainingClient.save_state_async",
    "TrainingClient.save_weights_for_sampler",
    "TrainingClient.save_weights_for_sampler_async",
    "TrainingClient.list_checkpoints",
    "TrainingClient.list_checkpoints_async",
    "TrainingClient.delete_checkpoint",
    "TrainingClient.delete_checkpoint_async",
    "TrainingClient.delete_checkpoint_from_xorl_path",
    "TrainingClient.delete_checkpoint_from_xorl_path_async",
)
def saves_lists_and_deletes(driver):
    client = driver.another("saves")
    train(client)
    saved = [
        client.save_state("a").result(timeout=60).path,
        settled(client.save_state_async("b")).path,
        client.save_weights_for_sampler("a").result(timeout=60).path,
        settled(client.save_weights_for_sampler_async("b")).path,
    ]
    unnamed = client.save_state().result(timeout=60).path
    expected = [f"xorl://check-saves/{kind}/{name}" for kind in ("weights", "sampler_weights") for name in "ab"]
    assert saved == expected, saved
    for path in [*saved, unnamed]:
        assert (driver.folder(path) / "adapter_config.json").is_file(), path
    listed = client.list_checkpoints().result(timeout=60)
    assert ids_of(listed) == ids_of(settled(client.list_checkpoints_async()))
    named = {found.path: found for found in listed.checkpoints}
    assert named.keys() == {*saved, unnamed}, named.keys()
    assert [named[path].checkpoint_type for path in saved] == ["training"] * 2 + ["sampler"] * 2
    assert all(found.size_bytes > 0 for found in listed.checkpoints)
    assert client.delete_checkpoint("weights/a").result(timeout=60).success
    assert settled(client.delete_checkpoint_async("sampler_weights/a")).success
    assert client.delete_checkpoint_from_xorl_path(saved[1]).result(timeout=60).success
    assert settled(client.delete_checkpoint_from_xorl_path_async(unnamed)).success
    assert ids_of(client.list_checkpoints().result(timeout=60)) == ["sampler_weights/b"]
    assert not driver.folder(saved[0]).exists() and driver.folder(saved[3]).exists()


@TABLE.works("TrainingClient.load_state", "TrainingClient.load_state_async")
def loads_values(driver):
    path, then, after = state_case(driver, "load")
    client = driver.another("load")
    assert client.load_state(path).result(timeout=60).path == path
    continues(client, then, after, False)
    assert settled(client.load_state_async(path)).path == path
    is_near(logprobs(client), then)


@TABLE.works("TrainingClient.load_state_with_optimizer", "TrainingClient.load_state_with_optimizer_async")
def loads_state(driver):
    path, then, after = state_case(driver, "load-state")
    client = driver.another("load-state")
    for load in (client.load_state_with_optimizer, client.load_state_with_optimizer_async):
        assert settled(load(path)).path == path
        continues(client, then, after, True)


@TABLE.works("TrainingClient.unload", "TrainingClient.unload_async")
def forgets(driver):
    for how in ("unload", "unload_async"):
        client = driver.another(how)
        train(client)
        assert settled(getattr(client, how)()).model_id == f"check-{how}"
        try:
            train(client)
        except xorl_client.BadRequestError as error:
            assert "create_model" in str(error), error
        else:
            raise AssertionError("an adapter that was forgotten trains")


@TABLE.works("TrainingClient.kill_session", "TrainingClient.kill_session_async")
def ends_a_session(driver):
    client = driver.another("kill")
    train(client)
    then = logprobs(client)
    killed = client.kill_session().result(timeout=60)
    assert killed.success and killed.checkpoint_path, killed
    again = driver.service.create_training_client_from_state(killed.checkpoint_path)
    is_near(logprobs(again), then)
    assert settled(again.kill_session_async(save_checkpoint=False)).success


@TABLE.works("TrainingClient.save_full_weights_safetensors", "TrainingClient.save_full_weights_safetensors_async")
def saves_whole_models(driver):
    """The models are compared with PEFT's by peft_alone.py, when the server has gone."""
    client = driver.another("merged")
    train(client)
    then = logprobs(client)
    adapter = driver.folder(client.save_state("adapter").result(timeout=60).path)
    single = client.save_full_weights_safetensors("single", dtype="float32").result(timeout=60)
    half = settled(client.save_full_weights_safetensors_async("half"))
    assert (single.dtype, half.dtype, single.num_shards, half.num_shards) == ("float32", "bfloat16", 1, 1), (single, half)
    assert Path(single.path) == driver.folder("xorl://check-merged/full_weights/single").resolve(), single
    assert logprobs(client) == then
    driver.merged = {"adapter": str(adapter), "single": single.path, "half": half.path}
    listed = {found.checkpoint_id: found for found in client.list_checkpoints().result(timeout=60).checkpoints}
    assert listed.keys() == {"weights/adapter", "full_weights/single", "full_weights/half"}, listed.keys()
    full = [listed[f"full_weights/{name}"] for name in ("single", "half")]
    assert [found.checkpoint_type for found in full] == ["full"] * 2 and full[0].size_bytes > 1.8 * full[1].size_bytes, full
    for more, words in [
        (dict(name="single"), "is saved already"),
        (dict(name="other", base_model_path="somewhere/else"), "base_model_path \"somewhere/else\": this server trains"),
        (dict(name="other", dtype="float16"), "dtype: unknown variant `float16`"),
        (dict(name="a/b"), "are saved under a name without '/'"),
    ]:
        try:
            client.save_full_weights_safetensors(**more).result(timeout=60)
        except xorl_client.BadRequestError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{more} is not refused")
    client.save_full_weights_safetensors("gone", base_model_path=driver.base_model).result(timeout=60)
    assert client.delete_checkpoint("full_weights/gone").result(timeout=60).success
    assert not driver.folder("xorl://check-merged/full_weights/gone").exists()


for method, arguments in {
    "add_inference_endpoint": ("host", 1),
    "connect_inference_endpoint": (),
    "disconnect_inference_endpoint": (),
    "list_inference_endpoints": (),
    "remove_inference_endpoint": ("host", 1),
    "sync_inference_weights": (),
    "sync_weights_to_inference": (),
    "update_dedicated_endpoint": ("name", "endpoint", "key", "token"),
    "update_serverless_weights": ("name", "key", "token", "base"),
}.items():
    TABLE.refused(
        f"TrainingClient.{method}",
        "is not served",
        lambda driver, method=method, arguments=arguments: getattr(driver.another("a"), method)(*arguments),
    )


# --- SamplingClient

PROMPT = DATA[0].model_input
PARAMS = types.SamplingParams(max_tokens=4, seed=3)


def forward_on(client, ids):
    """The log-probability of each token but the first, by the model that trains."""
    datum = datums([(ids[:-1], ids[1:], [1.0] * (len(ids) - 1))])
    (output,) = client.forward(datum).result(timeout=60).loss_fn_outputs
    return output["logprobs"].data


def samples_as_trained(sampler, client):
    """Samples of a saved adapter are scored as the one that trains scores them; the same seed gives the same."""
    ids = PROMPT.to_ints()
    one, other = sampler.sample(PROMPT, PARAMS, num_samples=3).result(), settled(sampler.sample_async(PROMPT, PARAMS, num_samples=3))
    assert [sequence.tokens for sequence in one.sequences] == [sequence.tokens for sequence in other.sequences], (one, other)
    assert len(one.sequences) == 3
    for sequence in one.sequences:
        tokens = sequence.tokens
        assert 1 <= len(tokens) <= 4 and (len(tokens) == 4 or sequence.stop_reason == "stop"), sequence
        is_near(sequence.logprobs, forward_on(client, ids + tokens)[-len(tokens) :])


@TABLE.works(
    "TrainingClient.save_weights_and_get_sampling_client",
    "TrainingClient.save_weights_and_get_sampling_client_async",
    "SamplingClient.sample",
    "SamplingClient.sample_async",
)
def samples_as_it_was_trained(driver):
    client = driver.another("samples")
    train(client)
    samples_as_trained(client.save_weights_and_get_sampling_client("own", driver.url), client)
    samples_as_trained(settled(client.save_weights_and_get_sampling_client_async("own-async", driver.url)), client)


@TABLE.works("ServiceClient.create_sampling_client", "SamplingClient.sample_batch", "SamplingClient.sample_batch_async")
def samples_from_a_save(driver):
    client = driver.another("samples-saved")
    train(client)
    path = client.save_weights_for_sampler("saved").result(timeout=60).path
    sampler = driver.service.create_sampling_client(driver.url, path)
    samples_as_trained(sampler, client)
    prompts = [PROMPT, "hello"]
    for told in (sampler.sample_batch(prompts, PARAMS), sampler.sample_batch_async(prompts, PARAMS)):
        told = settled(told)
        assert not told.failed and sorted(index for index, _ in told.completed) == [0, 1], told
        texts = [one.text for _, response in told.completed for one in response.sequences]
        assert all(isinstance(text, str) for text in texts), texts


@TABLE.works("SamplingClient.close", "SamplingClient.close_async")
def closes_a_sampling_client(driver):
    settled(xorl_client.SamplingClient(base_url=driver.url).close_async())
    xorl_client.SamplingClient(base_url=driver.url).close()


# --- RestClient


@TABLE.works(
    "ServiceClient.create_rest_client",
    "RestClient.list_checkpoints",
    "RestClient.list_checkpoints_async",
    "RestClient.delete_checkpoint",
    "RestClient.delete_checkpoint_async",
    "RestClient.get_weights_info",
    "RestClient.get_weights_info_async",
    "RestClient.get_weights_info_by_xorl_path",
    "RestClient.get_weights_info_by_xorl_path_async",
    "RestClient.list_training_runs",
    "RestClient.list_training_runs_async",
)
def describes_lists_and_deletes(driver):
    client = driver.another("rest")
    path = client.save_state("a").result(timeout=60).path
    client.save_weights_for_sampler("a").result(timeout=60)
    rest = driver.service.create_rest_client("check-rest")
    for call in ("list_checkpoints", "list_checkpoints_async"):
        assert sorted(ids_of(settled(getattr(rest, call)()))) == ["sampler_weights/a", "weights/a"]
    for call in ("get_weights_info", "get_weights_info_async", "get_weights_info_by_xorl_path", "get_weights_info_by_xorl_path_async"):
        info = settled(getattr(rest, call)(path))
        assert (info.base_model, info.is_lora, info.lora_rank) == (driver.base_model, True, 4), info
    for call in ("list_training_runs", "list_training_runs_async"):
        listed = settled(getattr(rest, call)(limit=1000))
        run = next(run for run in listed.training_runs if run.training_run_id == "check-rest")
        assert (run.base_model, run.is_lora, run.lora_rank) == (driver.base_model, True, 4), run
        assert listed.cursor.total_count >= len(listed.training_runs)
    assert len(rest.list_training_runs(limit=1).result(timeout=60).training_runs) == 1
    assert rest.delete_checkpoint("sampler_weights/a").result(timeout=60).success
    assert settled(rest.delete_checkpoint_async(path)).success
    assert ids_of(rest.list_checkpoints().result(timeout=60)) == []
