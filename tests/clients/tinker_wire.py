"""Bodies that a real tinker client sends and reads.

    tinker_wire.py requests DIR    writes DIR/NAME of each case and DIR/cases.json: what each says, from the case itself
    tinker_wire.py replies DIR     reads our DIR/NAME.reply, writes DIR/seen.json: what the client gives its user
    tinker_wire.py answers DIR     reads our DIR/answers.json, writes DIR/seen.json: the class that took each
    tinker_wire.py calls DIR       writes DIR/calls.json: JSON bodies of the client's own request classes

Client 0.24 writes and reads passes as JSON, newer ones as protobuf.
"""

import json
import pathlib
import sys

import numpy as np
import tinker
from tinker import types
from tinker.lib import api_future_impl, chunked_fwdbwd_helpers
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_output import ForwardBackwardOutput
from tinker.types.forward_backward_request import ForwardBackwardRequest

IS_JSON = tinker.__version__.startswith("0.24.")


def csr(array):
    """What the client makes of a torch tensor of two dimensions, for which it would need torch."""
    rows, columns = np.nonzero(array)
    crow = [0, *np.cumsum(np.bincount(rows, minlength=len(array)))]
    dtype = "int64" if array.dtype.kind == "i" else "float32"
    return types.TensorData(
        data=array[rows, columns],
        dtype=dtype,
        shape=list(array.shape),
        sparse_crow_indices=[int(i) for i in crow],
        sparse_col_indices=[int(i) for i in columns],
    )


def datum(chunks, inputs, sparse=()):
    return {"chunks": chunks, "inputs": {k: np.asarray(v) for k, v in inputs.items()}, "sparse": sparse}


def random_datum(random, tokens, k, sparse=()):
    shape = (tokens,) if k is None else (tokens, k)
    targets = random.integers(1, 500, shape) * random.integers(0, 2, shape)
    weights = (random.normal(size=shape) * random.integers(0, 2, shape)).astype(np.float32)
    ids = random.integers(0, 500, tokens).tolist()
    cut = tokens // 3
    return datum([ids[:cut], ids[cut:]], {"target_tokens": targets, "weights": weights}, sparse)


def cases():
    random = np.random.default_rng(21)
    rl = {"target_tokens": [2, 0, 4], "logprobs": [-0.5, 0.0, -2.5], "advantages": [1, 0, -1]}
    bounds = {"clip_low_threshold": [0.7, 0.8, 0.9], "clip_high_threshold": [1.1, 1.2, 1.3]}
    both = ("target_tokens", "weights")
    yield "one", [datum([[1, 2, 3]], {"target_tokens": [2, 3, 0], "weights": [1, 0.25, 0]})], "cross_entropy", None
    yield "without_weights", [datum([[7]], {"target_tokens": [8]})], "cross_entropy", None
    yield "ppo", [datum([[1], [2, 3]], rl), datum([[3, 2, 1]], rl)], "ppo", {"clip_low_threshold": 0.9}
    yield "bounds_by_token", [datum([[1, 2, 3]], {**rl, **bounds})], "ppo", {"clip_high_threshold": 1.5}
    yield "columns", [random_datum(random, n, 3) for n in (5, 1, 4)], "cross_entropy", None
    yield "one_column", [random_datum(random, 4, 1)], "cross_entropy", None
    yield "sparse", [random_datum(random, n, 9, both) for n in (6, 3)], "cross_entropy", None
    yield "sparse_targets", [random_datum(random, 6, 9, ("target_tokens",))], "cross_entropy", None
    mixed = [random_datum(random, n, k) for n, k in ((3, None), (2, None), (4, 2), (3, 5), (6, 5), (2, None))]
    yield "mixed_columns", mixed, "cross_entropy", None
    if not IS_JSON:
        yield "text_config", [datum([[1, 2, 3]], rl)], "custom", {"loss_id": "loss-1", "scale": 2.0}


def to_client(case):
    inputs = {k: csr(v) if k in case["sparse"] else v.tolist() for k, v in case["inputs"].items()}
    chunks = [types.EncodedTextChunk(tokens=tokens) for tokens in case["chunks"]]
    return types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs=inputs)


def expected(case):
    inputs = {k: v for k, v in case["inputs"].items() if k != "target_tokens"}
    targets = case["inputs"]["target_tokens"]
    return {
        "ids": [token for chunk in case["chunks"] for token in chunk],
        "targets": targets.flatten().tolist(),
        "columns": targets.shape[1] if targets.ndim == 2 else None,
        "inputs": {k: v.astype(np.float32).flatten().tolist() for k, v in inputs.items()},
    }


def body(request, forward_only):
    if not IS_JSON:
        from tinker.proto.request_conv import forward_backward_request_to_proto

        message = forward_backward_request_to_proto(request)
        message.forward_only = forward_only
        return message.SerializeToString()
    from tinker._compat import model_dump
    from tinker.lib._pydantic_conv import to_pydantic_request
    from tinker.types.forward_request import ForwardRequest

    if forward_only:
        request = ForwardRequest(request.forward_backward_input, request.model_id, request.seq_id)
    dumped = model_dump(to_pydantic_request(request), exclude_unset=False, exclude_none=True, mode="json")
    return json.dumps(dumped).encode()


def write_requests(folder):
    table = []
    for seq_id, (name, data, loss_fn, config) in enumerate(cases(), 1):
        forward_only = seq_id % 3 == 0
        sent = ForwardBackwardInput([to_client(case) for case in data], loss_fn, config)
        request = ForwardBackwardRequest(sent, "sess-1:train:0", seq_id)
        (folder / name).write_bytes(body(request, forward_only))
        case = {"name": name, "seq_id": seq_id, "backward": not forward_only, "loss_fn": loss_fn}
        table.append({**case, "config": config or {}, "data": [expected(case) for case in data]})
    (folder / "cases.json").write_text(json.dumps(table))


def read_reply(reply):
    if not IS_JSON:
        return api_future_impl.deserialize_proto_response(reply, ForwardBackwardOutput)
    return api_future_impl.deserialize_json_response(json.loads(reply), ForwardBackwardOutput)


def number(value):
    """JSON has no other numbers."""
    return value if np.isfinite(value) else repr(value)


def seen(output):
    outputs = output.loss_fn_outputs
    tensors = [{k: {"shape": v.shape, "data": [number(x) for x in v.data]} for k, v in o.items()} for o in outputs]
    metrics = {k: number(v) for k, v in output.metrics.items()}
    return {"type": output.loss_fn_output_type, "outputs": tensors, "metrics": metrics}


def read_replies(folder):
    table = {}
    for path in folder.glob("*.reply"):
        output = read_reply(path.read_bytes())
        # Chunks of a pass; a key against the rule of endings raises here.
        combined = chunked_fwdbwd_helpers.combine_fwd_bwd_output_results([output, output])
        table[path.stem] = {**seen(output), "combined_metrics": seen(combined)["metrics"]}
    (folder / "seen.json").write_text(json.dumps(table))


ANSWERS = {
    "client_config": types.ClientConfigResponse,
    "created_session": types.CreateSessionResponse,
    "heartbeat": types.SessionHeartbeatResponse,
    "telemetry": types.TelemetryResponse,
    "health": types.HealthResponse,
    "created_model": types.CreateModelResponse,
    "unloaded_model": types.UnloadModelResponse,
    "model_info": types.GetInfoResponse,
    "stepped": types.OptimStepResponse,
    "saved_weights": types.SaveWeightsResponse,
    "saved_sampler_weights": types.SaveWeightsForSamplerResponse,
    "loaded_weights": types.LoadWeightsResponse,
    "weights_info": types.WeightsInfoResponse,
    "capabilities": types.GetServerCapabilitiesResponse,
    "training_runs": types.TrainingRunsResponse,
    "training_run": types.TrainingRun,
    "checkpoints": types.CheckpointsListResponse,
    "sessions": types.ListSessionsResponse,
    "session": types.GetSessionResponse,
}


def read_answers(folder):
    answers = json.loads((folder / "answers.json").read_text())
    table = {name: ANSWERS[name].model_validate(answer).model_dump(mode="json") for name, answer in answers.items()}
    (folder / "seen.json").write_text(json.dumps(table))


def write_calls(folder):
    lora = types.LoraConfig(rank=8, seed=-3, train_mlp=False)
    calls = {
        "create_session": types.CreateSessionRequest(tags=[], user_metadata={"a": 1}, sdk_version="1"),
        "create_model": types.CreateModelRequest(
            session_id="sess-1", model_seq_id=2, base_model="org/base", lora_config=lora, user_metadata={"r": "x", "n": 3}
        ),
        "optim_step": types.OptimStepRequest(
            model_id="m", seq_id=7, adam_params=types.AdamParams(learning_rate=0.25, grad_clip_norm=2)
        ),
        "optim_step_defaults": types.OptimStepRequest(model_id="m", seq_id=8, adam_params=types.AdamParams()),
        "save_weights": types.SaveWeightsRequest(model_id="m", path="a", seq_id=3, ttl_seconds=3600),
        "save_named": types.SaveWeightsForSamplerRequest(model_id="m", path="a", seq_id=3),
        "save_ephemeral": types.SaveWeightsForSamplerRequest(model_id="m", sampling_session_seq_id=0, seq_id=4),
        "load_new": types.LoadWeightsRequest(session_id="sess-1", model_seq_id=4, path="tinker://a/weights/b", optimizer=True),
        "load_old": types.LoadWeightsRequest(model_id="m", seq_id=1, path="tinker://a/weights/b", optimizer=False),
        "get_info": types.GetInfoRequest(model_id="m"),
    }
    if not IS_JSON:
        dimuon = types.DimuonParams(learning_rate=0.1)
        calls["optim_step_dimuon"] = types.OptimStepRequest(model_id="m", seq_id=9, optim_params=dimuon)
    dump = tinker._compat.model_dump
    bodies = {k: dump(v, exclude_unset=False, exclude_none=True, mode="json") for k, v in calls.items()}
    (folder / "calls.json").write_text(json.dumps(bodies))


if __name__ == "__main__":
    actions = {"requests": write_requests, "replies": read_replies, "answers": read_answers, "calls": write_calls}
    actions[sys.argv[1]](pathlib.Path(sys.argv[2]))
