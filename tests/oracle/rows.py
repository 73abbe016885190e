"""What transformers makes of the tables in tests/data/rows.

    rows.py DIR

DIR has a folder tokenizers/N for each tokenizer, and ours.json with our rows of the tokenized table. Writes DIR/right.json.
"""

import json
import pathlib
import sys

import jinja2
import torch
import transformers
from transformers.utils import chat_template_utils

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
SWITCHES = ["weight", "train", "training", "trainable", "loss", "loss_mask"]
FIRST = {"role": "user", "content": "hi", "n": 10**20, "f": 1.5, "l": [2**64, -(2**63) - 1], "z": 0}


def render(template, tokenizer, messages, prompt=False, marks=False):
    texts, marked = chat_template_utils.render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marks,
        **tokenizer.special_tokens_map,
    )
    return (texts[0], marked[0]) if marks else texts[0]


def is_trained(message):
    off = any(message.get(key) is not None and not message[key] for key in SWITCHES) or message.get("masked")
    return message["role"] == "assistant" and not off


def answer_begins(template, tokenizer, messages, index, text):
    """Behind the generation prompt, or where the answer's own words stand."""
    try:
        prompt = render(template, tokenizer, messages[:index], True)
        if text.startswith(prompt):
            return len(prompt)
    except (jinja2.exceptions.TemplateError, IndexError):
        pass
    if index == 0 and "<think>" in text:
        return text.index("<think>") + len("<think>\n\n</think>\n\n")
    words = messages[index]["content"].split("</think>")[-1]
    return text.rindex(words if words in text else words.strip())


def rows(case, tokenizer):
    template, messages = case["template"], case["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = [i for i in answers if is_trained(messages[i]) and (case["turns"] == "all" or i == answers[-1])]
    if "{% generation %}" in template:
        text, spans = render(template, tokenizer, messages, marks=True)
        owners = case.get("blocks", answers)
        assert len(owners) == len(spans)
        return [(text, [span for i, span in zip(owners, spans) if i in chosen])]
    whole, own = render(template, tokenizer, messages), []
    spans = []
    for index in chosen:
        text = render(template, tokenizer, messages[: index + 1])
        span = (answer_begins(template, tokenizer, messages, index, text), len(text))
        if whole.startswith(text):
            spans.append(span)
        else:
            own.append((text, [span]))
    return ([(whole, spans)] if spans or not own else []) + own


def encoded(tokenizer, text, spans):
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(a < end and b > start for start, end in spans)) for a, b in found["offset_mapping"]]
    return {"ids": found["input_ids"], "mask": mask, "text": text}


def losses(table, ours):
    """Losses of a tiny model, on the fields of a row and on the documents that we make of it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).float().eval()

    def loss(ids, labels, **fields):
        fields = {name: torch.tensor([values]) for name, values in fields.items()}
        with torch.no_grad():
            return float(model(torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False, **fields).loss)

    found = []
    for case, row in zip(table, ours):
        fields = case["row"]
        labels = list(fields.get("labels", fields["input_ids"]))
        for name in ["loss_mask", "completion_mask", "assistant_masks"]:
            labels = [label if keep else -100 for label, keep in zip(labels, fields.get(name, [1] * len(labels)))]
        attention = fields.get("attention_mask")
        if attention:
            labels = [label if keep else -100 for label, keep in zip(labels, attention)]
        passed = {name: fields[name] for name in ["attention_mask", "position_ids"] if name in fields}
        right = loss(fields["input_ids"], labels, **passed)
        total, count, at = 0.0, 0, 0
        for length in row["documents"]:
            part = slice(at, at + length)
            valid = sum(label != -100 for label in row["labels"][part][1:])
            if valid:
                total += loss(row["ids"][part], row["labels"][part]) * valid
            count, at = count + valid, at + length
        found.append({"right": right, "ours": total / count})
    return found


ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)


def alpaca(row):
    """As axolotl's AlpacaPrompter and torchtune's alpaca_dataset write it."""
    row = {"instruction": row.get("question"), "output": row.get("answer"), **row}
    given = row.get("input")
    context = ", paired with an input that provides further context" if given else ""
    prompt = ALPACA.format(context, row["instruction"], f"### Input:\n{given}\n\n" if given else "")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]


def typed(case, tokenizer):
    """Ids and trained tokens of a row of any type: chats by the template, texts as TRL's SFTTrainer does it."""
    row = {**case["row"]}
    for ours, theirs in case.get("entry", {}).get("columns", {}).items():
        row[ours] = row.pop(theirs)
    if "template" not in case:
        prompt, rest = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
        rest += "" if rest.endswith(tokenizer.eos_token) else tokenizer.eos_token
        before = tokenizer(prompt)["input_ids"] if prompt else []
        ids = tokenizer(prompt + rest)["input_ids"]
        assert ids[: len(before)] == before
        return {"ids": ids, "mask": [0] * len(before) + [1] * (len(ids) - len(before))}
    messages, tools = case.get("messages") or alpaca(row), case.get("tools")
    template = (DATA / "chat" / "templates" / f"{case['template']}.jinja").read_text()

    def text(messages, prompt=False):
        return tokenizer.apply_chat_template(
            messages, tools, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )

    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = case.get("trained", answers)
    spans = [(len(text(messages[:i], True)), len(text(messages[: i + 1]))) for i in trained]
    return encoded(tokenizer, text(messages), spans)


def classes():
    """Tokenizer classes that do not take tokenizer.json as it is."""
    backend = transformers.TokenizersBackend
    for name in dir(transformers):
        found = getattr(transformers, name) if name.endswith("Tokenizer") else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase):
            is_own = "__init__" in found.__dict__ or not issubclass(found, backend)
            if is_own and found.__name__ != "PythonBackend":
                yield name


def main(folder):
    transformers.logging.set_verbosity_error()
    cases = json.loads((DATA / "rows" / "cases.json").read_text())
    plain = transformers.AutoTokenizer.from_pretrained(DATA / "chat" / "byte_level")
    right = {"tokenizers": [], "expressions": [], "chats": [], "classes": list(classes())}
    for index, case in enumerate(cases["tokenizers"]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizers" / str(index))
        ids = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        names = dict(tokenizer.special_tokens_map)
        right["tokenizers"].append({"ids": ids, "names": names})
    for line in (DATA / "rows" / "expressions.txt").read_text().splitlines():
        try:
            right["expressions"].append(render(line, plain, [FIRST]))
        except Exception as error:  # noqa: BLE001
            right["expressions"].append({"error": f"{type(error).__name__}: {error}"})
    for case in cases["chats"]:
        right["chats"].append([encoded(plain, text, spans) for text, spans in rows(case, plain)])
    types = json.loads((DATA / "rows" / "types.json").read_text())
    for name in ["plain", "begun"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "types" / name)
        right[f"types of {name}"] = [typed(case, tokenizer) for case in types]
    right["tokenized"] = losses(cases["tokenized"], json.loads((folder / "ours.json").read_text()))
    (folder / "right.json").write_text(json.dumps(right, ensure_ascii=False))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
