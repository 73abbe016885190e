"""What transformers makes of the chats in tests/data/chat: texts, token ids and assistant masks.

    chat_oracle.py OUT_DIR            writes OUT_DIR/expected.json
    chat_oracle.py --tokenizers DIR   writes the two small test tokenizers into DIR (their output is committed)

The committed tests/data/chat/expected.json is the output of the first form.
"""

import datetime
import json
import pathlib
import re
import sys

DATA = pathlib.Path(__file__).resolve().parents[1] / "data" / "chat"
SPECIAL = """<s> </s> <unk> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST]
<think> </think> <tool_call> </tool_call> [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]""".split()


class July2024(datetime.datetime):
    """The clock of the templates: the date that the trainer gives them."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, tzinfo=tz)


def write_tokenizers(out):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    corpus = [path.read_text() for path in sorted(DATA.rglob("*.jinja"))] + [(DATA / "conversations.json").read_text()]
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))

    # As the Llama 2 and Mistral tokenizers: one word, spaces as U+2581, bytes for what is unknown.
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.normalizer = normalizer
    words = pre_tokenizers.Split(re.escape("\u2581"), "merged_with_next")
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split("\n", "isolated")])
    letters = list("\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?{}[]()<>|_/\\'\"-+*%")
    ascii_only = ["".join(c for c in text if c.isascii()) for text in corpus]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *bytes_], initial_alphabet=letters)
    trained.train_from_iterator(ascii_only, trainer)
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    sentence = Tokenizer(models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    sentence.normalizer = normalizer
    sentence.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for name, tokenizer in {"byte_level": byte_level, "sentence": sentence}.items():
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        # As in many checkpoints; a chat must be neither cut nor padded.
        tokenizer.enable_truncation(16)
        tokenizer.enable_padding(length=16)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n")
        eos = {"__type": "AddedToken", "content": "</s>", "special": True, "normalized": False}
        eos |= {"lstrip": False, "rstrip": False, "single_word": False}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos, "pad_token": None}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def covered(offsets, start, end):
    """1 for the tokens from the first to the last that stand for a character of a span."""
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return [int(bool(inside) and inside[0] <= i <= inside[-1]) for i in range(len(offsets))]


def rows(render, encode, messages, text):
    """Rows of a chat: the chat, and each answer that is rendered otherwise when messages follow. A mask is null where
    the generation prompt does not say where an answer begins."""
    whole, own = [], []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:index], True), render(messages[: index + 1], False)
            span = (len(before), len(after)) if after.startswith(before) else None
            if text.startswith(after):
                whole.append(span)
            else:
                own.append((after, [span]))
    found = []
    for rendered, spans in ([(text, whole)] if whole or not own else []) + own:
        ids, offsets = encode(rendered)
        masks = [covered(offsets, *span) for span in spans if span]
        mask = [max(column) for column in zip(*masks)] if masks else [0] * len(ids)
        found.append({"ids": ids, "mask": mask if all(spans) else None})
    return found


def main(out):
    import jinja2
    import transformers
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = July2024
    transformers.logging.set_verbosity_error()
    conversations = json.loads((DATA / "conversations.json").read_text())
    expected = {}
    for name in ["byte_level", "sentence"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / name)
        for path in sorted((DATA / "templates").glob("*.jinja")):
            tokenizer.chat_template = path.read_text()
            marked = path.stem == "chatml_generation"
            for chat, conversation in conversations.items():
                messages, tools = conversation["messages"], conversation.get("tools")

                def render(some, prompt, tokenizer=tokenizer, tools=tools):
                    return tokenizer.apply_chat_template(some, tools, tokenize=False, add_generation_prompt=prompt)

                entry = expected.setdefault(f"{path.stem}/{chat}", {})
                try:
                    entry["text"] = render(messages, False)
                    entry["prompt"] = render(messages, True)
                except (jinja2.exceptions.TemplateError, TypeError) as error:
                    entry["error"] = type(error).__name__
                    continue
                def encode(text, tokenizer=tokenizer):
                    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                    return encoded["input_ids"], encoded["offset_mapping"]

                encoded = tokenizer.apply_chat_template(
                    messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
                )
                ids = encoded["input_ids"]
                if marked:
                    found = [{"ids": ids, "mask": encoded["assistant_masks"]}]
                else:
                    found = rows(render, encode, messages, entry["text"])
                entry[name] = {"ids": ids, "rows": found, "decoded": tokenizer.decode(ids, skip_special_tokens=True)}
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(entry, ensure_ascii=False)}" for key, entry in expected.items()]
    (out / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--tokenizers":
        write_tokenizers(pathlib.Path(sys.argv[2]))
    else:
        main(pathlib.Path(sys.argv[1]))
