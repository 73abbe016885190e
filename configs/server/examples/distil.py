"""Distillation: a student learns to answer without an instruction as its teacher, the base, answers with it.

The teacher's k most probable tokens at each place of an answer come from prompt log-probabilities. They are targets
of shape (N, K) of cross_entropy, their probabilities its weights: the loss is KL(teacher, student) plus the teacher's
entropy.
"""

import numpy as np
from common import connect, finish, parser, prompt_tokens, text_of, train
from tinker import types

INSTRUCTION = "You are a sailor. Answer in one short sentence and speak of the sea."
QUESTIONS = ["How was your day?", "What is for lunch?", "Where do you live?", "What do you fear?"]


def teach(teacher, tokenizer, question, k, max_tokens):
    """An answer of the teacher, as data whose targets [N, k] are its k likeliest tokens at each place."""
    told = prompt_tokens(tokenizer, ("system", INSTRUCTION), question)
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=1)
    sampled = (
        teacher.sample(prompt=types.ModelInput.from_ints(told), num_samples=1, sampling_params=params)
        .result()
        .sequences[0]
    )
    # The whole text as a prompt: one pass of the model scores it.
    scored = teacher.sample(
        prompt=types.ModelInput.from_ints(told + sampled.tokens),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=k,
    ).result()
    rows = scored.topk_prompt_logprobs[len(told) :]
    print(f"  {question} {text_of(tokenizer, sampled)!r}")

    prompt = prompt_tokens(tokenizer, question)
    tokens = prompt + sampled.tokens[:-1]
    targets = np.zeros((len(tokens), k), np.int64)
    weights = np.zeros((len(tokens), k), np.float32)
    for place, row in enumerate(rows, len(prompt) - 1):
        probabilities = np.exp([logprob for _, logprob in row])
        targets[place, : len(row)] = [token for token, _ in row]
        # Of the k alone, so that they sum to 1.
        weights[place, : len(row)] = probabilities / probabilities.sum()
    return types.Datum(types.ModelInput.from_ints(tokens), {"target_tokens": targets, "weights": weights})


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--k", type=int, default=8)
    arguments.add_argument("--max-tokens", type=int, default=24, help="of an answer")
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    args = arguments.parse_args()

    service, model = connect(args.base_url)
    client = service.create_lora_training_client(model, rank=16).result()
    tokenizer = client.get_tokenizer()
    teacher = service.create_sampling_client(base_model=model).result()
    print("the teacher answers, as a sailor")
    data = [teach(teacher, tokenizer, question, args.k, args.max_tokens) for question in QUESTIONS]

    weights = np.concatenate([one.loss_fn_inputs["weights"].to_numpy().ravel() for one in data])
    weights = weights[weights > 0]
    places, entropy = weights.sum(), -(weights * np.log(weights)).sum()
    kls = []
    for step in range(args.steps):
        # The mean over places: loss is the cross-entropy, summed.
        kls.append((train(client, data, args.learning_rate).metrics["loss:sum"] - entropy) / places)
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:2}  KL {kls[-1]:.4f}", flush=True)
    finish(0 < kls[-1] < kls[0] / 4, f"KL from {kls[0]:.3f} to under a quarter of it, {kls[-1]:.3f}")


if __name__ == "__main__":
    main()
