"""A tiny random model, and what PEFT alone makes of the adapters that clients trained through the server.

    peft_alone.py model DIR TOKENIZER [EXPERTS]     a llama of two layers in fp32, with the tokenizer's files, and a like mixture of experts
    peft_alone.py compare REPORT...                 prints the largest distances, as JSON

A report NAME_WORLD.json has `model`, the folder of the base, and `train`: for each adapter and way the adapter before, the adapter after,
the losses of the steps. Adapters are held against those that the first report of NAME has trained alone. `merged`, of xorl-client, names an
adapter and whole models that the server made of it, in fp32 and in bf16.
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import plan

torch.set_num_threads(1)


COMMON = dict(vocab_size=plan.VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)


def write_models(tokenizer, folder, experts=None):
    for at, model, config in [
        (folder, LlamaForCausalLM, LlamaConfig(**COMMON)),
        (experts, Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, **EXPERTS)),
    ]:
        if at is not None:
            torch.manual_seed(21)
            model(config).float().save_pretrained(at)
            for file in Path(tokenizer).iterdir():
                shutil.copy(file, at)


def train(base, told):
    """Losses of the steps as sums, and the adapter after them by the names that PEFT saves."""
    model = PeftModel.from_pretrained(base, told["start"], is_trainable=True).eval()
    trained = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    asked = plan.settings(told["adapter"])
    optimizer = torch.optim.AdamW(trained.values(), lr=asked["learning_rate"], betas=(asked["beta1"], asked["beta2"]), eps=asked["eps"],
                                  weight_decay=asked["weight_decay"])
    losses = []
    for step in range(plan.STEPS):
        total, valid = 0.0, 0.0
        for ids, targets, weights in plan.data(told["adapter"], step):
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            by_token = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
            total, valid = total + (by_token * torch.tensor(weights)).sum(), valid + sum(weights)
        (total / valid if told["divide"] else total).backward()
        if asked["grad_clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(trained.values(), asked["grad_clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    final = {name: p.detach().clone() for name, p in trained.items()}
    model.unload()
    return losses, final


def apart(ours, theirs):
    """‖a − b‖ / ‖b‖ over all tensors, and the largest relative distance of two losses."""
    (our_losses, our_tensors), (their_losses, their_tensors) = ours, theirs
    assert our_tensors.keys() == their_tensors.keys(), sorted(our_tensors.keys() ^ their_tensors.keys())
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(tensors)]) for tensors in (our_tensors, their_tensors)]
    losses = max(abs(a - b) / abs(b) for a, b in zip(our_losses, their_losses))
    return max(losses, ((flat[0] - flat[1]).norm() / flat[1].norm()).item())


def of_file(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


@functools.cache
def base_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def check_merged(base, adapter, single, half):
    """A whole model of fp32 has the logits of base and adapter in PEFT; that of bf16 is the same, rounded once."""
    ids = torch.tensor([[token % plan.VOCABULARY for token in range(3, 60)]])
    adapted = PeftModel.from_pretrained(base_of(base), adapter).eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        model = adapted.unload()
        before, found = (one(input_ids=ids).logits for one in (model, AutoModelForCausalLM.from_pretrained(single, attn_implementation="eager")))
    apart, moved = ((logits - expected).abs().max().item() / expected.abs().max().item() for logits in (found, before))
    assert apart < 1e-5 and moved > 1e-2, f"{single}: {apart} from PEFT, which moved by {moved}"
    assert json.loads((Path(half) / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(half).encode("hello") == AutoTokenizer.from_pretrained(base).encode("hello")
    tensors, rounded = (load_file(Path(folder) / "model.safetensors") for folder in (single, half))
    assert tensors.keys() == rounded.keys() and len(tensors) > 20
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor.bfloat16(), rounded[name]), name


def compare(reports):
    table, references = {}, {}
    for path in map(Path, reports):
        told = json.loads(path.read_text())
        if path.stem.startswith("xorl_"):
            check_merged(told["model"], **told["merged"])
        alone = {one["adapter"]: one for one in told["train"] if one["way"] == "alone"}
        alone = references.setdefault(path.stem.rsplit("_", 1)[0], alone)
        for one in told["train"]:
            key = f"{path.stem} {one['way']}"
            ours, reference = (one["losses"], of_file(one["end"])), alone[one["adapter"]]
            row = table.setdefault(key, {"adapters": 0, "alone": 0.0, "peft": 0.0, "moved": 1e9})
            row["adapters"] += 1
            row["alone"] = max(row["alone"], apart(ours, (reference["losses"], of_file(reference["end"]))))
            row["peft"] = max(row["peft"], apart(ours, train(base_of(told["model"]), one)))
            # Zero would mean that nothing was trained.
            row["moved"] = min(row["moved"], apart((one["losses"], of_file(one["start"])), ours))
    print(json.dumps(table))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "model":
        folder, tokenizer, *experts = arguments
        write_models(tokenizer, folder, *experts)
        # Where torch is: a client without one borrows it.
        print(Path(torch.__file__).parent.parent)
    else:
        compare(arguments)
