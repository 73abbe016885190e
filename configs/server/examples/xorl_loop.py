"""The loop of xorl-client's README, with more phrases: an adapter learns Pig Latin, says a phrase, and is saved."""

import argparse
import sys
import time

import xorl_client
from transformers import AutoTokenizer
from xorl_client import types

PHRASES = {
    "hello world": "ello-hay orld-way",
    "good morning": "ood-gay orning-may",
    "red house": "ed-ray ouse-hay",
    "big river": "ig-bay iver-ray",
}


def datum(tokenizer, english, latin):
    prompt = tokenizer.encode(f"English: {english}\nPig Latin:")
    completion = tokenizer.encode(f" {latin}\n\n", add_special_tokens=False)
    tokens = prompt + completion
    weights = [0] * (len(prompt) - 1) + [1] * len(completion)
    return types.Datum(types.ModelInput.from_ints(tokens=tokens[:-1]), dict(weights=weights, target_tokens=tokens[1:]))


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--base-url", default="http://127.0.0.1:5555", help="address of the server")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    args = arguments.parse_args()

    service = xorl_client.ServiceClient(base_url=args.base_url)
    # The server knows its base, whose name stands here for any.
    (model,) = service.holder.get_sync("/api/v1/get_server_capabilities")["supported_models"]
    # Names of adapters are chosen by this client; a name that exists would go on where it is.
    name = f"pig-latin-{int(time.time())}"
    client = service.create_lora_training_client(model["model_name"], rank=16, alpha=32, model_id=name)
    # client.get_tokenizer() asks the hub; the server says where its own is.
    info = service.holder.post_sync("/api/v1/get_info", {"model_id": name})
    tokenizer = AutoTokenizer.from_pretrained(info["model_data"]["tokenizer_id"])

    data = [datum(tokenizer, english, latin) for english, latin in PHRASES.items()]
    losses = []
    for step in range(args.steps):
        passed = client.forward_backward(data, "cross_entropy").result()
        updated = client.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
        losses.append(passed.metrics["loss:mean"])
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:2}  loss {losses[-1]:.4f}  gradient norm {updated.metrics['grad_norm']:.3f}", flush=True)

    # The server is its own inference engine.
    sampler = client.save_weights_and_get_sampling_client(inference_base_url=args.base_url)
    english, latin = next(iter(PHRASES.items()))
    params = types.SamplingParams(max_tokens=16, temperature=0, stop=["\n"])
    sampled = sampler.sample(f"English: {english}\nPig Latin:", params).result()
    print(f"{english} -> {sampled.text.strip()}")

    print(f"saved {client.save_state('final').result().path}")
    client.unload().result()
    is_reached = losses[-1] < losses[0] / 5 and sampled.text.strip() == latin
    print(f"{'reached' if is_reached else 'NOT reached'}: a fifth of the first loss, and the phrase said right")
    sys.exit(0 if is_reached else 1)


if __name__ == "__main__":
    main()
