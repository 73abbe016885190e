#!/usr/bin/env python3
"""Writes the first inputs of the fuzz targets, from the repository's fixtures and configurations: seeds.py [CORPUS]

Inputs that were findings lie beside them, named after what they were; this leaves them alone.
"""

import gzip
import hashlib
import json
import pathlib
import struct
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORPUS = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/fuzz/corpus"
BORDER = b"\n%%%%\n"
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def put(target: str, name: str, *parts: bytes | str | dict) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)

    def text(part: bytes | str | dict) -> bytes:
        part = json.dumps(part) if isinstance(part, dict) else part
        return part.encode() if isinstance(part, str) else part

    (folder / name).write_bytes(BORDER.join(map(text, parts)))


def tensors(named: dict, metadata: dict | None = None) -> bytes:
    """A safetensors file of {name: (dtype, shape, bytes)}."""
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, (dtype, shape, part) in named.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def frames() -> None:
    def frame(kind: int, payload: bytes) -> bytes:
        return b"XC\x01" + bytes([kind]) + struct.pack("<I", len(payload)) + payload

    def part(sequence: int, total: int, offset: int, piece: bytes) -> bytes:
        return frame(2, struct.pack("<QQQ", sequence, total, offset) + piece)

    status = {"step": 3, "slow": None, "groups": [{"name": "world", "color": 0, "entered": 7, "operation": "barrier"}],
              "inside": {"group": 0, "number": 7, "seconds": 0.5, "on_device": False}, "fault": None}  # fmt: skip
    messages = ['"Bye"', '"Welcome"', '"Alive"', '{"Acknowledge":1}', '{"End":"rank 1 has died"}', json.dumps({"Alive": status})]
    put("frames", "messages", b"\x05" + b"".join(frame(1, text.encode()) for text in messages))
    put("frames", "commands", b"\x40" + part(1, 6, 0, b"abcd") + frame(1, b'"Alive"') + part(1, 6, 4, b"ef") + part(2, 0, 0, b""))
    put("frames", "long", b"\x40" + part(1, 1 << 28, 0, b"abcd"))
    put("frames", "web", b"\x07GET / HTTP/1.1\r\n\r\n")


def weights() -> None:
    layer = "model.layers.0.mlp.up_proj.weight"
    plain = {"a": ("F32", [2, 3], floats(1, 2, 3, 4, 5, 6)), "b": ("BF16", [3], b"\x80\x3f" * 3), "c": ("F16", [], b"\0\x3c")}
    put("weights", "plain", "{}", tensors(plain, {"format": "pt"}))
    nf4 = {"bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "quant_method": "bitsandbytes"}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 20]}
    nested = state | {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    for name, told in (("nf4", state), ("nested", nested)):
        text = json.dumps(told).encode()
        stored = {
            layer: ("U8", [40, 1], bytes(range(40))),
            f"{layer}.quant_map": ("F32", [16], floats(*NF4)),
            f"{layer}.quant_state.bitsandbytes__nf4": ("U8", [len(text)], text),
        }
        if name == "nf4":
            stored[f"{layer}.absmax"] = ("F32", [2], floats(1, 2))
        else:
            stored[f"{layer}.absmax"] = ("U8", [2], b"\x01\x02")
            stored[f"{layer}.nested_quant_map"] = ("F32", [256], floats(*(i / 256 for i in range(256))))
            stored[f"{layer}.nested_absmax"] = ("F32", [1], floats(0.25))
        put("weights", name, {"quantization_config": nf4}, tensors(stored))
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    for dtype, scales in (("F32", floats(0.5, 0.25)), ("F8_E8M0", b"\x7f\x80")):
        stored = {layer: ("F8_E4M3", [2, 130], bytes(i % 120 for i in range(260))), f"{layer}_scale_inv": (dtype, [1, 2], scales)}
        put("weights", f"fp8_{dtype.lower()}", {"quantization_config": fp8}, tensors(stored))
    codes, groups = bytes(range(32)), ("F8_E4M3", [2, 2], b"\x38\x39\x3a\x3b")
    modelopt = {layer: ("U8", [2, 16], codes), f"{layer}_scale": groups, f"{layer}_scale_2": ("F32", [], floats(0.5)),
                f"{layer}.input_scale": ("F32", [], floats(1))}  # fmt: skip
    put("weights", "modelopt", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, tensors(modelopt))
    compressed = {f"{layer}_packed": ("U8", [2, 16], codes), f"{layer}_scale": groups, f"{layer}_global_scale": ("F32", [1], floats(2))}
    group = {"num_bits": 4, "type": "float", "group_size": 16, "symmetric": True, "strategy": "tensor_group"}
    told = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {"weights": group}}}
    put("weights", "compressed", {"quantization_config": told}, tensors(compressed))
    put("index", "two", {"metadata": {"total_size": 8}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    put("index", "outside", {"weight_map": {"x": "../a.safetensors"}})


def data() -> None:
    fixtures = ROOT / "tests/fixtures/data"
    endings = ["jsonl", "json", "csv", "tsv", "txt", "jsonl.gz", "jsonl.zst", "data"]
    kinds = ["auto", "chat", "tokenized", "preference", "alpaca", "completion", "text"]

    def rows(name: str, ending: str, kind: str, content: bytes) -> None:
        put("rows", name, bytes([endings.index(ending) * len(kinds) + kinds.index(kind)]) + content)

    for kind in ("chat", "alpaca", "completion", "text", "tokenized"):
        for ending in ("jsonl", "csv", "tsv"):
            rows(f"{kind}_{ending}", ending, kind, (fixtures / kind / f"rows.{ending}").read_bytes())
        lines = (fixtures / kind / "rows.jsonl").read_bytes()
        rows(f"{kind}_list", "json", "auto", b"[" + b",\n".join(lines.splitlines()) + b"]")
        rows(f"{kind}_wrapped", "json", "auto", b'{"version": 1,\n"data": [' + b",".join(lines.splitlines()) + b"]}")
        put("tables", f"{kind}_snappy", bytes([kinds.index("auto")]) + (fixtures / kind / "snappy.parquet").read_bytes())
    rows("text_txt", "txt", "text", (fixtures / "text/rows.txt").read_bytes())
    rows("chat_gz", "jsonl.gz", "auto", gzip.compress((fixtures / "chat/rows.jsonl").read_bytes(), mtime=0))
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    messages = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}  # fmt: skip
    rows("pairs", "jsonl", "preference", json.dumps(pair).encode() + b"\n" + json.dumps(messages).encode() + b"\n")
    share = {"conversations": [{"from": "human", "value": "a", "weight": 0}, {"from": "gpt", "value": "b", "train": True}]}
    rows("share_gpt", "data", "auto", json.dumps(share).encode() + b'\n{"a": 123456789012345678901234567890, "b": -0}\n')
    whole = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "weights": [0, 0.5, 1, 1], "position_ids": [0, 1, 0, 1]}
    rows("positions", "jsonl", "tokenized", json.dumps(whole).encode() + b"\n")
    for name in ("brotli.parquet", "gzip.parquet", "lz4.parquet", "zstd.parquet", "lz4.arrow", "file.arrow", "stream.arrow"):
        put("tables", f"chat_{name.replace('.', '_')}", b"\x01" + (fixtures / "chat" / name).read_bytes())


def models() -> None:
    for name in ("llama3_8b", "qwen2_1_5b", "qwen3_8b", "qwen3_30b_a3b"):
        generation = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_k": 20}
        put("hf_config", name, (ROOT / f"tests/fixtures/{name}/config.json").read_bytes(), generation)
    put("hf_config", "step", (ROOT / "tests/fixtures/steps/mixture/config.json").read_bytes())
    for kind in ("byte_level", "sentence"):
        folder = ROOT / "tests/data/chat" / kind
        config = (folder / "tokenizer_config.json").read_bytes()
        put("tokenizer", kind, (folder / "tokenizer.json").read_bytes(), config, "{}", "Once upon a <|im_end|> t\u00e4me")
    small = {"version": "1.0", "added_tokens": [{"id": 3, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}], "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"},
             "behavior": "Isolated", "invert": False}, "model": {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0, "b": 1,
             "##b": 2}, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}  # fmt: skip
    put("tokenizer", "words", small, '{"add_bos_token": true, "bos_token": "<s>"}', "{}", "a ab b")
    unigram = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581",
               "prepend_scheme": "always", "split": True}, "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}, "model": {"type": "Unigram", "unk_id": 0,
               "vocab": [["<unk>", 0.0], ["a", -1.0], ["\u2581a", -2.0]], "byte_fallback": False}}  # fmt: skip
    put("tokenizer", "unigram", unigram, "{}", "{}", "a aa")
    conversations = json.loads((ROOT / "tests/data/chat/conversations.json").read_text())
    chats = [json.dumps(chat) for chat in conversations.values()]
    for i, path in enumerate(sorted((ROOT / "tests/data/chat/templates").iterdir())):
        put("template", path.stem, path.read_bytes(), chats[i % len(chats)], '{"eos_token": "</s>", "bos_token": "<s>"}')
    methods = "{% for m in messages %}{{ m.content.split('a') | map('upper') | join(',') }}{{ m.get('role', 'x')[::-1] }}{% endfor %}"
    put("template", "methods", methods + "{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{{ 'a' * 3 }}", chats[0], "{}")


def checkpoints() -> None:
    for name in ("dense", "mixture"):
        step = ROOT / f"tests/fixtures/steps/{name}/out/weights/run/step_6"
        read = lambda file, step=step: (step / file).read_bytes()  # noqa: E731
        put("adapter", name, read("adapter_config.json"), read("adapter_model.safetensors"))
        pieces = read("training_state/optimizer-0-of-2.safetensors")
        put("state", name, read("manifest.json"), read("training_state/trainer_state.json"), pieces)
        lines = (ROOT / f"tests/fixtures/steps/{name}/out/metrics.jsonl").read_bytes()
        config = (ROOT / f"tests/fixtures/steps/{name}/run.yaml").read_bytes()
        summary = {"global_step": 6, "total_train_steps": 12, "final_loss": 1.5, "loss_history": [1.0, None]}
        put("metrics", name, lines, config, summary, '{"model":"a","state":"Saved"}\n{"model":"b","state":"Lost"}\n')
    patterns = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ".*_proj", "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"^model.*k_proj$": 3}, "layers_to_transform": [0], "layers_pattern": "layers"}  # fmt: skip
    put("adapter", "patterns", patterns, tensors({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("BF16", [2, 4], b"\0" * 16)}))


def configs() -> None:
    for kind, folder in ((0, "configs/local"), (1, "configs/server")):
        for path in sorted((ROOT / folder).glob("*.yaml"))[:6]:
            put("config", path.stem, bytes([kind]) + path.read_bytes())
    put("config", "flag", b"\x02train.lr 1e-5")
    put("config", "flag_list", b"\x02lora.lora_target_modules q_proj k_proj")
    put("config", "flag_json", b'\x02data.datasets [{"path": "a", "type": "chat"}]')
    put("config", "flag_server", b"\x03server.api_port 80")
    put("config", "deep", b"\x00train: {a: [[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]}")


def bodies() -> None:
    datum = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
             "loss_fn_inputs": {"target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
                                "weights": {"data": [0.0, 1.0, 0.5], "dtype": "float32", "shape": [3]}}}  # fmt: skip
    put("bodies", "pass", {"model_id": "a:train:0", "seq_id": 1, "forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy",
        "loss_fn_config": {"clip": 0.2}}})  # fmt: skip
    put("bodies", "batches", {"batches": [{"input_ids": [[1, 2], [3, 4]], "labels": [[-100, 2], [3, 4]], "weights": [1, 1]}]})
    put("bodies", "sample", {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "num_samples": 2, "sampling_params":
        {"max_tokens": 4, "stop": ["a"], "top_k": 3}, "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [1, 2]}})  # fmt: skip
    put("bodies", "csr", {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}, "sampling_params": {},
        "target_prompt_logprobs": {"data": [1, 2], "dtype": "int64", "shape": [2, 4], "sparse_crow_indices": [0, 1, 2],
                                   "sparse_col_indices": [0, 3]}})  # fmt: skip
    put("bodies", "adam", {"model_id": "a", "seq_id": 2, "adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}})
    put("bodies", "create", {"session_id": "s", "model_seq_id": 0, "base_model": "base", "lora_config": {"rank": 8, "seed": 3}})
    put("bodies", "load", {"path": "tinker://a/weights/b", "optimizer": True, "model_id": "a:train:0", "seq_id": 3})
    put("bodies", "save", {"model_id": "a", "seq_id": 4, "path": "b", "ttl_seconds": 60, "sampling_session_seq_id": 1})
    put("bodies", "chat", {"model": "base", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant",
        "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]}], "stop": "x", "logprobs": True})  # fmt: skip
    put("bodies", "completion", {"model": "base", "prompt": [[1, 2], [3]], "max_tokens": 4, "n": 2, "stream_options": {"include_usage": True}})
    put("bodies", "generate", {"text": "a", "sampling_params": {"max_new_tokens": 4, "stop": ["b"]}, "return_logprob": True})

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    tensor = lambda ids: field(1, struct.pack(f"<{len(ids)}q", *ids))  # noqa: E731
    entry = field(1, b"target_tokens") + field(2, tensor([2, 3]))
    proto_datum = field(1, field(1, field(1, struct.pack("<2i", 1, 2)))) + field(2, entry)
    put("bodies", "protobuf", field(1, b"a:train:0") + b"\x10\x01" + field(3, proto_datum) + field(4, b"cross_entropy"))


def prepared() -> None:
    words = lambda *values: struct.pack(f"<{len(values)}I", *values)  # noqa: E731
    arrays = {"tokens": ("U32", [3], words(1, 2, 3)), "labels": ("U32", [3], words(2**32 - 1, 2, 3)),
              "document_lengths": ("U32", [2], words(2, 1)), "row_documents": ("U32", [1], words(2)),
              "input.weights": ("U32", [3], words(0, 0, 0))}  # fmt: skip
    digest = hashlib.sha256()
    for name, (_, shape, part) in arrays.items():
        if name.startswith("input."):
            text = name.removeprefix("input.").encode()
            digest.update(struct.pack("<Q", len(text)) + text)
        digest.update(struct.pack("<Q", shape[0]) + part)
    summary = {"samples": 1, "dropped": 0, "rows": 1, "tokens": 3, "padding_tokens": 0, "valid_tokens": 1, "longest_row": 3,
               "remarks": [], "sources": []}  # fmt: skip
    text = json.dumps(summary)
    stated = hashlib.sha256(digest.digest() + text.encode()).hexdigest()
    put("prepared", "whole", tensors(arrays, {"xorl-dist rows": f"{stated} {text}"}))
    put("prepared", "wrong_hash", tensors(arrays, {"xorl-dist rows": "0" * 64 + " {}"}))


for seeds in (frames, weights, data, models, checkpoints, configs, bodies, prepared):
    seeds()
