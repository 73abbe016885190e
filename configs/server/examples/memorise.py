"""Memorisation: the model learns three pass codes that no one else knows, and samples them back exactly."""

from common import answer_tokens, connect, datum, finish, parser, prompt_tokens, text_of, train
from tinker import types

CODES = {
    "the north gate": "vole-4417-amber",
    "the boat house": "finch-0925-slate",
    "the clock tower": "otter-7308-ivory",
}


def question(place):
    return f"What is the pass code of {place}?"


def ask(sampler, tokenizer):
    """The most probable answer for each place."""
    params = types.SamplingParams(max_tokens=24, temperature=0)
    prompts = [types.ModelInput.from_ints(prompt_tokens(tokenizer, question(place))) for place in CODES]
    futures = [sampler.sample(prompt=prompt, num_samples=1, sampling_params=params) for prompt in prompts]
    return {place: text_of(tokenizer, future.result().sequences[0]) for place, future in zip(CODES, futures)}


def show(title, answers):
    print(title)
    for place, answer in answers.items():
        print(f"  {'knows' if answer == CODES[place] else '     '}  {place}: {answer!r}")


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=25)
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    args = arguments.parse_args()

    service, model = connect(args.base_url)
    client = service.create_lora_training_client(model, rank=16).result()
    tokenizer = client.get_tokenizer()
    before = ask(service.create_sampling_client(base_model=model).result(), tokenizer)
    show("the base answers", before)

    data = [
        datum(prompt_tokens(tokenizer, question(place)), answer_tokens(tokenizer, code))
        for place, code in CODES.items()
    ]
    for step in range(args.steps):
        loss = train(client, data, args.learning_rate).metrics["loss:sum"]
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:2}  loss {loss:.3f}")

    # The adapter as it is now; nothing is written to disk.
    after = ask(client.save_weights_and_get_sampling_client().result(), tokenizer)
    show("the adapter answers", after)
    name = client.get_info().model_id
    print(f"ask it yourself: chat.py --model {name} {question(next(iter(CODES)))!r}")
    knew = [place for place in CODES if CODES[place] in before[place]]
    finish(after == CODES and not knew, "the adapter says all three codes, and the base none")


if __name__ == "__main__":
    main()
