"""Reinforcement learning with a reward that a program checks: the model learns to answer with one word and stop.

A batch is some questions with several samples each. The advantage of an answer is its reward less the mean of its
question's answers, over their standard deviation. Sampled log-probabilities go back with the tokens, for
importance_sampling. Sampler and trainer have the same weights, so ratios are 1 but for rounding, which is checked at
every step: in fp32 they are within 1e-5 in the mean, in bf16 within some percent.
"""

import math
import re
import statistics
import time

from common import connect, finish, parser, prompt_tokens, text_of, train
from tinker import types

QUESTIONS = [
    "Name an animal that lives in the sea.",
    "Name a colour.",
    "What do bees make?",
    "Name a fruit.",
    "What is the capital of France?",
    "Name a tool.",
    "Which season comes after winter?",
    "What do cows drink?",
]


def reward(text, stop_reason):
    """1 for one word, perhaps with a full stop, after which the model stopped by itself; else 0."""
    return float(stop_reason == "stop" and re.fullmatch(r"[A-Za-z]+\.?", text) is not None)


def datum(prompt, sequence, advantage):
    """A sample as data for importance_sampling; targets that are of the prompt have advantage 0."""
    before = len(prompt) - 1
    return types.Datum(
        types.ModelInput.from_ints(prompt + sequence.tokens[:-1]),
        {
            "target_tokens": prompt[1:] + sequence.tokens,
            "logprobs": [0.0] * before + sequence.logprobs,
            "advantages": [0.0] * before + [advantage] * len(sequence.tokens),
        },
    )


def off_policy(data, outputs):
    """How far from 1 the importance ratios are in the mean: of the trainer's and the sampler's log-probabilities."""
    distances = []
    for one, output in zip(data, outputs):
        sampled, advantages = one.loss_fn_inputs["logprobs"].data, one.loss_fn_inputs["advantages"].data
        distances += [abs(math.exp(p - q) - 1) for p, q, a in zip(output["logprobs"].data, sampled, advantages) if a]
    return statistics.mean(distances)


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=30, help="at most; it ends when the goal is reached")
    arguments.add_argument("--samples", type=int, default=8, help="for each question")
    arguments.add_argument("--learning-rate", type=float, default=3e-4)
    arguments.add_argument("--tolerance", type=float, default=0.1, help="of ratios; 1e-5 for a server in fp32")
    args = arguments.parse_args()

    service, model = connect(args.base_url)
    client = service.create_lora_training_client(model, rank=16).result()
    tokenizer = client.get_tokenizer()
    prompts = [prompt_tokens(tokenizer, f"{question} Answer with one word.") for question in QUESTIONS]

    means, apart = [], [0.0]
    for step in range(args.steps):
        began = time.monotonic()
        sampler = client.save_weights_and_get_sampling_client().result()
        futures = []
        for i, prompt in enumerate(prompts):
            params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=step * len(prompts) + i)
            asked = types.ModelInput.from_ints(prompt)
            futures.append(sampler.sample(prompt=asked, num_samples=args.samples, sampling_params=params))

        data, rewards, shown = [], [], ""
        for prompt, future in zip(prompts, futures):
            group = future.result().sequences
            values = [reward(text_of(tokenizer, sequence), sequence.stop_reason) for sequence in group]
            rewards += values
            shown = shown or text_of(tokenizer, group[0])
            mean, spread = statistics.mean(values), statistics.pstdev(values)
            # A group whose rewards are all the same teaches nothing.
            if spread > 0:
                data += [datum(prompt, sequence, (value - mean) / spread) for sequence, value in zip(group, values)]
        means.append(statistics.mean(rewards))
        if data:
            outputs = train(client, data, args.learning_rate, "importance_sampling").loss_fn_outputs
            apart.append(off_policy(data, outputs))
        told = f"mean reward {means[-1]:.3f}  ratios 1 ± {apart[-1]:.0e}  {time.monotonic() - began:4.1f} s"
        print(f"step {step:2}  {told}  {shown!r}", flush=True)
        if min(means[-2:]) > 0.8:
            break

    is_on_policy = max(apart) < args.tolerance
    print(f"mean reward {means[0]:.3f} at first, {means[-1]:.3f} at last; ratios 1 ± {max(apart):.0e}")
    is_reached = means[0] < 0.3 and means[-1] > 0.8 and is_on_policy
    finish(is_reached, f"from under 0.3 to over 0.8, and ratios 1 ± {args.tolerance}")


if __name__ == "__main__":
    main()
