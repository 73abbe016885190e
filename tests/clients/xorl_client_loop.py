"""The two examples of xorl-client's README, as its package prints them; only the server's port is another."""

import importlib.metadata
import re

PRINTED_URL = "http://localhost:5000"


def examples():
    """The blocks of Python in the README that use the client."""
    readme = importlib.metadata.metadata("xorl-client").get_payload()
    return re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)


def run(url):
    """Runs the examples in turn and returns what they leave, after checks of the outcome."""
    training, checkpoints = examples()
    assert training.count(PRINTED_URL) == 1, training
    left = {}
    exec(compile(training.replace(PRINTED_URL, url), "README training", "exec"), left)
    passed, stepped = left["fwdbwd_result"], left["optim_result"]
    tokens = left["input_tokens"]
    assert len(passed.loss_fn_outputs) == 1
    assert passed.loss_fn_outputs[0]["logprobs"].shape == [len(tokens)], passed.loss_fn_outputs
    assert stepped.metrics["grad_norm"] > 0, stepped.metrics
    # The example deletes one checkpoint by its two names, so it is saved again between.
    by_id, by_path = [line for line in checkpoints.splitlines() if ".delete_checkpoint(" in line]
    assert checkpoints.index(by_id) < checkpoints.index(by_path)
    first, second = checkpoints.split(by_path)
    exec(compile(first, "README checkpoints", "exec"), left)
    assert "weights/checkpoint_001" in [found.checkpoint_id for found in left["checkpoints"].checkpoints]
    left["training_client"].save_state("checkpoint_001").result()
    exec(compile(by_path + second, "README checkpoints", "exec"), left)
    remaining = left["rest_client"].list_checkpoints().result().checkpoints
    assert "weights/checkpoint_001" not in [found.checkpoint_id for found in remaining]
    return {"tokens": len(tokens), "grad_norm": stepped.metrics["grad_norm"]}
