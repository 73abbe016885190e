"""Every public method of tinker's clients, 0.38 and 0.24, called against a server."""

import math
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import tinker
import torch
from methods import Table, settled
from safetensors import safe_open
from tinker import types
from tinker.lib.api_future_impl import QueueState
from tinker.lib.public_interfaces import rest_client

import plan

try:
    from tinker import AdminClient
except ImportError:
    AdminClient = None

# Half of the methods are deprecated names of the other half.
warnings.simplefilter("ignore")
CLASSES = [tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, rest_client.RestClient, AdminClient]
TABLE = Table(
    f"tinker {tinker.__version__}",
    [cls for cls in CLASSES if cls],
    hide=[r"sess[a-z]*-[0-9A-Za-z-]+", r"http://127\.0\.0\.1:\d+", r"[0-9a-f]{8}-[0-9a-f-]{27}"],
)
KEY = "tml-test"
STEP = types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
DAY = 86400


def datums(data):
    return [
        types.Datum(types.ModelInput.from_ints(ids), {"target_tokens": targets, "weights": weights}) for ids, targets, weights in data
    ]


DATA = datums(plan.data(0, 0))


class Driver:
    """What equality.py asks of a client."""

    divides = False

    def __init__(self, url, output_dir, base_model):
        self.url, self.output_dir, self.base_model = url, Path(output_dir), base_model
        self.service = tinker.ServiceClient(base_url=url, api_key=KEY, user_metadata={"test": "clients"})
        self.rest = self.service.create_rest_client()

    def create(self, _, adapter):
        rank, seed = plan.RANKS[adapter], plan.seed(adapter)
        return settled(self.service.create_lora_training_client(self.base_model, rank=rank, seed=seed))

    def another(self, **more):
        """A new adapter for checks."""
        return settled(self.service.create_lora_training_client(self.base_model, rank=4, seed=1, **more))

    def forward_backward(self, client, data):
        return client.forward_backward(datums(data), "cross_entropy")

    def loss(self, future):
        return future.result(timeout=60).metrics["loss:sum"]

    def optim_step(self, client, settings):
        return client.optim_step(types.AdamParams(**settings))

    def save(self, client, name):
        return self.folder(settled(client.save_state(name)).path)

    def folder(self, uri):
        """The folder of a saved adapter."""
        run, kind, name = uri.removeprefix("tinker://").split("/")
        return self.output_dir / kind / urllib.parse.quote(run) / name


def session_of(service):
    holder = service.holder
    return holder.get_session_id() if hasattr(holder, "get_session_id") else holder._session_id


def run_id(client):
    return settled(client.get_info()).model_id


def values(passed):
    return [value for output in passed.loss_fn_outputs for value in output["logprobs"].data]


def logprobs(client):
    return values(settled(client.forward(DATA, "cross_entropy")))


def train(client):
    passed = client.forward_backward(DATA, "cross_entropy")
    stepped = client.optim_step(STEP)
    return settled(passed), settled(stepped)


def is_near(ours, theirs):
    assert len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(ours, theirs)), (ours, theirs)


def differs(ours, theirs):
    assert any(abs(a - b) > 1e-4 for a, b in zip(ours, theirs)), ours


def both(owner, name, *arguments, **more):
    """Results of a method and of its asynchronous form."""
    return settled(getattr(owner, name)(*arguments, **more)), settled(getattr(owner, f"{name}_async")(*arguments, **more))


def pair(*names):
    return [name + end for name in names for end in ("", "_async")]


# --- ServiceClient


@TABLE.works(
    *pair("ServiceClient.create_lora_training_client", "TrainingClient.forward", "TrainingClient.forward_backward"),
    *pair("TrainingClient.optim_step"),
)
def trains_adapters(driver):
    clients = both(driver.service, "create_lora_training_client", driver.base_model, rank=4, seed=1)
    for client in clients:
        passed = both(client, "forward", DATA, "cross_entropy")
        is_near(values(passed[0]), values(passed[1]))
        assert [output["logprobs"].shape for output in passed[0].loss_fn_outputs] == [[datum.model_input.length] for datum in DATA]
        weights = [weight for datum in DATA for weight in datum.loss_fn_inputs["weights"].data]
        total = -sum(weight * value for weight, value in zip(weights, values(passed[0])))
        assert math.isclose(passed[0].metrics["loss:sum"], total, rel_tol=1e-5), (passed[0].metrics, total)
        both(client, "forward_backward", DATA, "cross_entropy")
        settled(client.optim_step(STEP))
        # Without a gradient this is an update all the same.
        settled(client.optim_step_async(STEP))
        differs(logprobs(client), values(passed[0]))
    # The same seed and data.
    is_near(logprobs(clients[0]), logprobs(clients[1]))


@TABLE.works("ServiceClient.create_rest_client", "RestClient.get_server_capabilities", *pair("ServiceClient.get_server_capabilities"))
def says_what_it_trains(driver):
    capabilities = [*both(driver.service, "get_server_capabilities")]
    rest = driver.service.create_rest_client()
    if hasattr(rest, "get_server_capabilities"):
        capabilities.append(settled(rest.get_server_capabilities()))
    for told in capabilities:
        assert [model.model_name for model in told.supported_models] == [driver.base_model], told


def state_case(driver):
    """An adapter saved after a step and trained on; its path, log-probabilities then, and after one more step."""
    client = driver.another()
    train(client)
    path, then = settled(client.save_state("mid")).path, logprobs(client)
    train(client)
    return path, then, logprobs(client)


def continues(client, then, after, with_optimizer):
    is_near(logprobs(client), then)
    train(client)
    if with_optimizer:
        is_near(logprobs(client), after)
    else:
        differs(logprobs(client), after)


@TABLE.works(*pair("ServiceClient.create_training_client_from_state"))
def goes_on_from_values(driver):
    path, then, after = state_case(driver)
    for client in both(driver.service, "create_training_client_from_state", path):
        continues(client, then, after, False)


@TABLE.works(*pair("ServiceClient.create_training_client_from_state_with_optimizer"))
def goes_on_from_state(driver):
    path, then, after = state_case(driver)
    for client in both(driver.service, "create_training_client_from_state_with_optimizer", path):
        continues(client, then, after, True)


@TABLE.works("ServiceClient.get_telemetry", "TrainingClient.get_telemetry", "RestClient.get_telemetry", "AdminClient.get_telemetry")
def has_telemetry(driver):
    for owner in [driver.service, driver.another(), driver.rest, *([AdminClient(base_url=driver.url, api_key=KEY)] if AdminClient else [])]:
        owner.get_telemetry()
    assert driver.service.get_telemetry() is not None


@TABLE.works("ServiceClient.holder")
def has_a_session(driver):
    session = session_of(driver.service)
    assert session in settled(driver.rest.list_sessions(limit=1000)).sessions


@TABLE.works("ServiceClient.get_console_url", "TrainingClient.get_console_url")
def has_a_console(driver):
    # The client builds them; no server is asked.
    assert driver.service.get_console_url().startswith("http")
    client = driver.another()
    assert run_id(client) in urllib.parse.unquote(client.get_console_url())


@TABLE.works("ServiceClient.close")
def closes_a_session(driver):
    with tinker.ServiceClient(base_url=driver.url, api_key=KEY) as service:
        train(settled(service.create_lora_training_client(driver.base_model, rank=2)))
    service = tinker.ServiceClient(base_url=driver.url, api_key=KEY)
    settled(service.create_lora_training_client(driver.base_model, rank=2))
    settled(service.close("success", detail="done"))


def weighted(logprobs, weights):
    loss = -(logprobs * weights).sum()
    return loss, {"custom/weighted:sum": loss}


@TABLE.works("ServiceClient.create_custom_loss")
def traces_a_loss(driver):
    handle = settled(driver.service.create_custom_loss(weighted, {"logprobs": 1, "weights": 1}))
    passed = settled(driver.another().forward_backward_custom(DATA, handle))
    assert any("weighted" in name for name in passed.metrics), passed.metrics


@TABLE.works("ServiceClient.copy_weights", *pair("RestClient.copy_weights"))
def copies(driver):
    client = driver.another()
    train(client)
    path = settled(client.save_state("a")).path
    service = tinker.ServiceClient(base_url=driver.url, api_key=KEY, project_id="project-1")
    copied = [settled(service.copy_weights(path)), *both(driver.rest, "copy_weights", path, "project-1")]
    for copy in copied:
        assert copy != path and settled(driver.rest.get_weights_info_by_tinker_path(copy)).lora_rank == 4
        is_near(logprobs(settled(driver.service.create_training_client_from_state(copy))), logprobs(client))


# --- TrainingClient


def custom(data, logprobs):
    """Half the mean over tokens of cross-entropy, squared: no sum of terms."""
    mean = torch.cat(list(logprobs)).mean()
    return 0.5 * mean**2, {"mean": mean.item()}


@TABLE.works(*pair("TrainingClient.forward_backward_custom"))
def trains_by_a_loss_of_its_own(driver):
    client = driver.another()
    data = [types.Datum(datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"]}) for datum in DATA]
    losses = []
    for how in ("forward_backward_custom", "forward_backward_custom_async") * 2:
        passed = settled(getattr(client, how)(data, custom))
        losses.append(passed.metrics["mean"])
        settled(client.optim_step(STEP))
    assert losses == sorted(losses) and losses[-1] > losses[0], losses


@TABLE.works(*pair("TrainingClient.get_info"), "TrainingClient.get_tokenizer")
def knows_its_base(driver):
    client = driver.another()
    for info in both(client, "get_info"):
        assert (info.model_data.model_name, info.is_lora, info.lora_rank) == (driver.base_model, True, 4), info
    tokenizer = client.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@TABLE.works(*pair("TrainingClient.load_state"))
def loads_values(driver):
    path, then, after = state_case(driver)
    for how in pair("load_state"):
        client = driver.another()
        settled(getattr(client, how)(path))
        continues(client, then, after, False)


@TABLE.works(*pair("TrainingClient.load_state_with_optimizer"))
def loads_state(driver):
    path, then, after = state_case(driver)
    client = driver.another()
    for how in pair("load_state_with_optimizer"):
        settled(getattr(client, how)(path))
        continues(client, then, after, True)


@TABLE.works(
    *pair("TrainingClient.save_state", "TrainingClient.save_weights_for_sampler"),
    *pair("RestClient.list_checkpoints", "RestClient.list_user_checkpoints"),
    *pair("RestClient.delete_checkpoint", "RestClient.delete_checkpoint_from_tinker_path"),
)
def saves_lists_and_deletes(driver):
    client = driver.another()
    run = run_id(client)
    train(client)
    saved = [
        settled(client.save_state("a", ttl_seconds=DAY)).path,
        settled(client.save_state_async("b")).path,
        settled(client.save_weights_for_sampler("a")).path,
        settled(client.save_weights_for_sampler_async("b")).path,
    ]
    assert saved == [f"tinker://{run}/{kind}/{name}" for kind in ("weights", "sampler_weights") for name in "ab"], saved
    for path in saved:
        assert (driver.folder(path) / "adapter_config.json").is_file(), path
    lists = [*both(driver.rest, "list_checkpoints", run), *both(driver.rest, "list_user_checkpoints", limit=1000)]
    for listed in lists:
        found = {one.tinker_path: one for one in listed.checkpoints if one.tinker_path in saved}
        assert [found[path].checkpoint_type for path in saved] == ["training"] * 2 + ["sampler"] * 2
        assert found[saved[0]].expires_at is not None and found[saved[1]].expires_at is None
        assert all(one.size_bytes > 0 for one in found.values())
    # A name is taken once, unless the client says that it may be replaced.
    train(client)
    try:
        settled(client.save_state("a"))
    except tinker.TinkerError as error:
        assert "overwrite" in str(error) or "exists" in str(error), error
    else:
        raise AssertionError("a save was replaced unasked")
    assert settled(client.save_state("a", overwrite=True)).path == saved[0]
    settled(driver.rest.delete_checkpoint(run, "weights/a"))
    settled(driver.rest.delete_checkpoint_async(run, "sampler_weights/a"))
    settled(driver.rest.delete_checkpoint_from_tinker_path(saved[1]))
    assert [one.tinker_path for one in settled(driver.rest.list_checkpoints(run)).checkpoints] == [saved[3]]
    settled(driver.rest.delete_checkpoint_from_tinker_path_async(saved[3]))
    assert settled(driver.rest.list_checkpoints(run)).checkpoints == []
    assert not driver.folder(saved[3]).exists()


@TABLE.works(*pair("TrainingClient.save_weights_external", "RestClient.get_external_weights_urls"))
def gives_files_away(driver):
    client = driver.another()
    paths = [one.path for one in (settled(client.save_weights_external("a")), settled(client.save_weights_external_async("b")))]
    assert paths == [f"tinker://{run_id(client)}/external_weights/{name}" for name in "ab"], paths
    for told in both(driver.rest, "get_external_weights_urls", paths[0]):
        assert {"adapter_model.safetensors", "adapter_config.json"} <= told.urls.keys(), told
        file, _ = urllib.request.urlretrieve(told.urls["adapter_model.safetensors"])
        with safe_open(file, "numpy") as tensors:
            assert any("lora_A" in name for name in tensors.keys())


# --- SamplingClient

PROMPT = DATA[0].model_input
PARAMS = types.SamplingParams(max_tokens=4, seed=3)


def forward_on(client, ids):
    """The log-probability of each token but the first, by the model that trains."""
    inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
    return values(settled(client.forward([types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs)], "cross_entropy")))


def tokens_of(sampled):
    return [list(one.tokens) for one in sampled.sequences]


@TABLE.works(
    *pair("TrainingClient.save_weights_and_get_sampling_client", "SamplingClient.sample", "SamplingClient.compute_logprobs"),
)
def samples_as_it_was_trained(driver):
    client = driver.another()
    train(client)
    ids = PROMPT.to_ints()
    then = forward_on(client, ids)
    for sampler in both(client, "save_weights_and_get_sampling_client"):
        one, other = both(sampler, "sample", PROMPT, 3, PARAMS)
        assert tokens_of(one) == tokens_of(other) and len(one.sequences) == 3, (one, other)
        for sequence in one.sequences:
            tokens = list(sequence.tokens)
            assert 1 <= len(tokens) <= 4 and (len(tokens) == 4 or sequence.stop_reason == "stop"), sequence
            # The ratio of the first step of reinforcement learning is 1.
            is_near(list(sequence.logprobs), forward_on(client, ids + tokens)[-len(tokens) :])
        for scored in both(sampler, "compute_logprobs", PROMPT):
            assert scored[0] is None and len(scored) == len(ids)
            is_near(scored[1:], then)
    # It keeps the values that it was made with.
    train(client)
    is_near(settled(sampler.compute_logprobs(PROMPT))[1:], then)


@TABLE.works(
    *pair("ServiceClient.create_sampling_client", "TrainingClient.create_sampling_client", "SamplingClient.get_base_model"),
    *pair("RestClient.get_sampler"),
    "SamplingClient.create",
    "SamplingClient.get_telemetry",
    "SamplingClient.get_tokenizer",
    "SamplingClient.on_queue_state_change",
)
def samples_from_saves_and_the_base(driver):
    client = driver.another()
    train(client)
    path = settled(client.save_weights_for_sampler("a")).path
    base = both(driver.service, "create_sampling_client", base_model=driver.base_model)
    saved = [*both(driver.service, "create_sampling_client", model_path=path), *both(client, "create_sampling_client", path)]
    for sampler in [*base, *saved]:
        assert both(sampler, "get_base_model") == (driver.base_model, driver.base_model)
        tokenizer = sampler.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
        sampler.get_telemetry()
        sampler.on_queue_state_change(QueueState.ACTIVE, None)
    for sampler in saved:
        is_near(settled(sampler.compute_logprobs(PROMPT))[1:], forward_on(client, PROMPT.to_ints()))
    assert tokens_of(settled(base[0].sample(PROMPT, 2, PARAMS))) == tokens_of(settled(base[1].sample(PROMPT, 2, PARAMS)))
    session = settled(driver.rest.get_session(session_of(driver.service)))
    told = [one for sampler in session.sampler_ids for one in both(driver.rest, "get_sampler", sampler)]
    assert {one.base_model for one in told} == {driver.base_model}, told
    assert [one.model_path for one in told].count(path) == 8, told


@TABLE.works("SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle")
def is_given_to_other_processes(driver):
    sampler = settled(driver.service.create_sampling_client(base_model=driver.base_model))
    clone = settled(tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=KEY))
    assert tokens_of(settled(clone.sample(PROMPT, 2, PARAMS))) == tokens_of(settled(sampler.sample(PROMPT, 2, PARAMS)))


# --- RestClient


@TABLE.works(
    *pair("RestClient.get_training_run", "RestClient.get_training_run_by_tinker_path", "RestClient.list_training_runs"),
    "RestClient.get_weights_info_by_tinker_path",
)
def describes_runs(driver):
    client = driver.another(user_metadata={"renderer_name": "role_colon"})
    run = run_id(client)
    path = settled(client.save_state("a")).path
    runs = [*both(driver.rest, "get_training_run", run), *both(driver.rest, "get_training_run_by_tinker_path", path)]
    for listed in both(driver.rest, "list_training_runs", limit=1000):
        assert listed.cursor.total_count >= len(listed.training_runs)
        runs += [one for one in listed.training_runs if one.training_run_id == run]
    assert len(runs) == 6
    for told in runs:
        assert (told.training_run_id, told.base_model, told.is_lora, told.lora_rank) == (run, driver.base_model, True, 4), told
        assert told.last_checkpoint.tinker_path == path and told.user_metadata == {"renderer_name": "role_colon"}, told
    assert len(settled(driver.rest.list_training_runs(limit=1)).training_runs) == 1
    info = settled(driver.rest.get_weights_info_by_tinker_path(path))
    assert (info.base_model, info.is_lora, info.lora_rank) == (driver.base_model, True, 4), info


@TABLE.works(*pair("RestClient.list_sessions", "RestClient.get_session"))
def lists_sessions(driver):
    client = driver.another()
    session = session_of(driver.service)
    for listed in both(driver.rest, "list_sessions", limit=1000):
        assert session in listed.sessions
    for told in both(driver.rest, "get_session", session):
        assert run_id(client) in told.training_run_ids, told
        assert all(sampler.startswith(f"{session}:sample:") for sampler in told.sampler_ids), told


@TABLE.works(
    *pair("RestClient.publish_checkpoint_from_tinker_path", "RestClient.unpublish_checkpoint_from_tinker_path"),
    *pair("RestClient.set_checkpoint_ttl_from_tinker_path"),
)
def publishes_and_expires(driver):
    client = driver.another()
    path = settled(client.save_state("a")).path
    rest = driver.rest

    def told():
        (only,) = settled(rest.list_checkpoints(run_id(client))).checkpoints
        return only.public, only.expires_at is not None

    for end in ("", "_async"):
        settled(getattr(rest, f"publish_checkpoint_from_tinker_path{end}")(path))
        settled(getattr(rest, f"set_checkpoint_ttl_from_tinker_path{end}")(path, DAY))
        assert told() == (True, True)
        settled(getattr(rest, f"unpublish_checkpoint_from_tinker_path{end}")(path))
        settled(getattr(rest, f"set_checkpoint_ttl_from_tinker_path{end}")(path, None))
        assert told() == (False, False)


# --- What is refused: what only the makers' own service has

OTHERS = {
    "assign_session_project": ("session", "project"),
    "export_session_trace": ("session",),
    "get_audit_log": (),
    "get_billing_usage": ("2026-01-01", "2026-02-01"),
    "get_current_checkpoint_storage_usage": (),
    "get_checkpoint_archive_url": ("run", "weights/a"),
    "get_checkpoint_archive_url_from_tinker_path": ("tinker://run/weights/a",),
}
# This form of 0.24 fails before it asks the server, whatever loop awaits it.
BROKEN = ["get_audit_log_async"] if tinker.__version__.startswith("0.24.") else []
for name, arguments in OTHERS.items():
    for end in ("", "_async"):
        TABLE.refused(
            f"RestClient.{name}{end}",
            "incorrect event loop" if name + end in BROKEN else "is not served",
            lambda driver, name=name + end, arguments=arguments: getattr(driver.rest, name)(*arguments),
        )
        TABLE.refused(
            f"AdminClient.{name}{end}",
            "is not served",
            lambda driver, name=name + end, arguments=arguments: getattr(AdminClient(base_url=driver.url, api_key=KEY), name)(*arguments),
        )
TABLE.refused("RestClient.whoami", "requires JWT auth", lambda driver: driver.rest.whoami())
TABLE.refused(
    "RestClient.search_sessions", "is not served", lambda driver: driver.rest.search_sessions(types.SessionSearchRequest())
)
