"""Preference training (DPO) by a loss that this program computes: forward_backward_custom differentiates it with torch.

The reference is the base, which a new adapter equals: its log-probabilities are taken before the first update. The
margin of a pair is

    beta * ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)))
"""

import torch
import torch.nn.functional as F
from common import answer_tokens, connect, datum, finish, parser, prompt_tokens
from tinker import types

# A question, the answer that is preferred, and the other.
PAIRS = [
    ("Is the shop open on Sunday?", "No, it is closed on Sunday.", "I am an AI and I do not know about shops."),
    ("Can I return a lamp?", "Yes, within thirty days.", "As an AI language model I cannot return lamps."),
    ("How much is delivery?", "Delivery is free above forty euros.", "I cannot help you with that request."),
    ("Do you sell batteries?", "Yes, of every size.", "I am not able to browse what a shop sells."),
]


def log_likelihoods(data, logprobs):
    """Sums of the answers' log-probabilities, chosen and rejected by turns, as [2, pairs]."""
    sums = [(p * torch.tensor(one.loss_fn_inputs["weights"].data)).sum() for one, p in zip(data, logprobs)]
    return torch.stack([torch.stack(sums[0::2]), torch.stack(sums[1::2])])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=10)
    arguments.add_argument("--beta", type=float, default=0.1)
    arguments.add_argument("--learning-rate", type=float, default=2e-4)
    args = arguments.parse_args()

    service, model = connect(args.base_url)
    client = service.create_lora_training_client(model, rank=8).result()
    tokenizer = client.get_tokenizer()
    data = []
    for question, *answers in PAIRS:
        prompt = prompt_tokens(tokenizer, question)
        data += [datum(prompt, answer_tokens(tokenizer, answer)) for answer in answers]
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    reference = log_likelihoods(data, [torch.tensor(output["logprobs"].data) for output in outputs])

    def loss(data, logprobs):
        chosen, rejected = log_likelihoods(data, logprobs) - reference
        margins = args.beta * (chosen - rejected)
        told = {"margin": margins.mean().item(), "least": margins.min().item(), "chosen": chosen.mean().item()}
        return -F.logsigmoid(margins).mean(), told

    history = []
    for step in range(args.steps):
        passed = client.forward_backward_custom(data, loss)
        # Without a norm to clip to, one step of a rate like this could leave the reference far behind.
        client.optim_step(types.AdamParams(learning_rate=args.learning_rate, grad_clip_norm=1.0)).result()
        history.append(passed.result().metrics)
        told = history[-1]
        print(
            f"step {step:2}  loss {told['loss:sum']:.4f}  margin {told['margin']:.3f}  chosen {told['chosen']:+.2f}",
            flush=True,
        )

    first, last = history[0], history[-1]
    print(f"least margin of a pair: {first['least']:.3f} at first, {last['least']:.3f} at last")
    finish(abs(first["margin"]) < 0.01 and last["least"] > 0.5, "margins from 0 to over 0.5 in every pair")


if __name__ == "__main__":
    main()
