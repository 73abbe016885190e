"""Supervised training: an adapter learns facts of a made-up village from four chats; saved, it loads back the same."""

from common import answer_tokens, connect, datum, finish, parser, prompt_tokens, train

CHATS = {
    "Where is Tarnwick?": "Tarnwick lies between two lakes, north of the Harrow hills.",
    "Who runs the bakery in Tarnwick?": "Odile Brandt has run the bakery since the flood.",
    "When is the market in Tarnwick?": "The market is on Thursdays, from seven until noon.",
    "What does Tarnwick sell?": "Tarnwick sells smoked trout, wool and church bells.",
}


def logprobs(client, data):
    """Log-probability of every answer's token."""
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    return [
        p
        for output, one in zip(outputs, data)
        for p, w in zip(output["logprobs"].data, one.loss_fn_inputs["weights"].data)
        if w
    ]


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    args = arguments.parse_args()

    service, model = connect(args.base_url)
    client = service.create_lora_training_client(model, rank=8).result()
    tokenizer = client.get_tokenizer()
    data = [
        datum(prompt_tokens(tokenizer, question), answer_tokens(tokenizer, answer))
        for question, answer in CHATS.items()
    ]
    tokens = sum(sum(one.loss_fn_inputs["weights"].data) for one in data)

    losses = []
    for step in range(args.steps):
        # A loss of tinker's is a sum over tokens.
        losses.append(train(client, data, args.learning_rate).metrics["loss:sum"] / tokens)
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:2}  loss {losses[-1]:.4f} a token")

    trained = logprobs(client, data)
    path = client.save_state("tarnwick").result().path
    print(f"saved {path}")
    loaded = service.create_training_client_from_state_with_optimizer(path).result()
    worst = max(abs(a - b) for a, b in zip(trained, logprobs(loaded, data)))
    print(f"loaded back: log-probabilities differ by {worst:.1e} at most")
    finish(losses[-1] < losses[0] / 5 and worst < 1e-3, "a fifth of the first loss, and the same adapter from disk")


if __name__ == "__main__":
    main()
