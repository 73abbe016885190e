"""Variants of LoRA in PEFT, on a tiny model.

    variants.py train OUT CASE...       makes OUT/model and OUT/rows.jsonl, and for each case OUT/CASE/start (an adapter)
                                        where training starts from one; trains it for 20 steps and writes the losses to
                                        OUT/CASE/losses.json and logits of the result to OUT/CASE/logits.pt
    variants.py check OUT CASE=DIR...   loads the adapter in each DIR on OUT/model and compares its logits with those; of a
                                        case in bf16 its magnitudes with those that PEFT has trained

The base of a case in bf16 is in bf16, its adapter in fp32, as PEFT has it by default.
Dropout has the masks of src/ops/linear/dropout.rs in place of PEFT's own."""

import copy
import hashlib
import json
import os
import sys

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

SEED, RATE, STEPS, ROWS = 42, 0.3, 20, 2
CASES = {"dropout": {"lora_dropout": RATE}, "pissa": {"init_lora_weights": "pissa"}, "dora": {"use_dora": True},
         "dora_bf16": {"use_dora": True}}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 43).view(2, 20)
place = {}


def key(name):
    return np.uint64(int.from_bytes(hashlib.sha256(SEED.to_bytes(8, "little") + name.encode()).digest()[:8], "little"))


def bits(key, index):
    """SplitMix64 of a counter, as src/rng.rs."""
    z = key + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Masked(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.key = key(f"dropout {path}")

    def forward(self, x):
        _, tokens, width = x.shape
        of_tokens = bits(key(f"dropout step {place['step']} row {place['row']}"), np.arange(tokens, dtype=np.uint64))
        uniform = bits((self.key ^ of_tokens)[:, None], np.arange(width, dtype=np.uint64)[None])
        uniform = (uniform >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        mask = np.where(uniform < np.float32(RATE), np.float32(0), np.float32(1 / (1 - RATE)))
        return x * torch.from_numpy(mask.astype(np.float32))[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(out, name, base, rows):
    os.makedirs(f"{out}/{name}", exist_ok=True)
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **CASES[name])
    base = copy.deepcopy(base)
    model = get_peft_model(base.bfloat16() if name.endswith("bf16") else base, config)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    if name != "pissa":
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(f"{out}/{name}/start")
    if name == "dropout":
        for path, module in model.named_modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = Masked(path.removeprefix("base_model.model."))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4 if name.endswith("bf16") else 3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        own = range(step * ROWS, (step + 1) * ROWS)
        tokens = sum(len(rows[i]) - 1 for i in own)
        optimizer.zero_grad()
        losses.append(0.0)
        for i in own:
            place.update(step=step, row=i)
            of_row = model(input_ids=rows[i][None]).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(of_row, rows[i][1:], reduction="sum") / tokens
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with open(f"{out}/{name}/losses.json", "w") as file:
        json.dump(losses, file)
    for module in model.modules():
        if hasattr(module, "lora_dropout") and name == "dropout":
            module.lora_dropout["default"] = torch.nn.Identity()
    torch.save(logits(model), f"{out}/{name}/logits.pt")
    model.save_pretrained(f"{out}/{name}/end")


def check_magnitudes(case, *files):
    """Magnitudes moved by less than bf16 can show, and as PEFT's did."""
    names = [name for name in files[1] if "magnitude" in name]
    found, expected, start = (torch.cat([file[name].flatten() for name in names]) for file in files)
    apart = ((found - expected).norm() / (expected - start).norm()).item()
    hidden = (expected.bfloat16() == start.bfloat16()).float().mean().item()
    print(case, apart, hidden)
    assert apart < 0.1 and hidden > 0.3, f"{case}: magnitudes are {apart} from PEFT's, of which bf16 would show {1 - hidden}"


np.seterr(over="ignore")
what, out, *arguments = sys.argv[1:]
if what == "train":
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=101, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=False)
    base = AutoModelForCausalLM.from_config(config).float()
    base.save_pretrained(f"{out}/model")
    rows = [torch.randint(0, 101, (5 + i % 7,)) for i in range(STEPS * ROWS)]
    with open(f"{out}/rows.jsonl", "w") as file:
        file.writelines(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows)
    for name in arguments:
        train(out, name, base, rows)
else:
    base = AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32)
    untrained = logits(base)
    for name, folder in (argument.split("=", 1) for argument in arguments):
        if name.endswith("bf16"):
            check_magnitudes(name, *(load_file(f"{at}/adapter_model.safetensors") for at in (folder, f"{out}/{name}/end", f"{out}/{name}/start")))
            continue
        found = logits(PeftModel.from_pretrained(copy.deepcopy(base), folder))
        expected = torch.load(f"{out}/{name}/logits.pt")
        apart, moved = (found - expected).abs().max().item(), (untrained - expected).abs().max().item()
        assert apart < 1e-3 * moved, f"{name}: logits are {apart} from those of PEFT, which moved by {moved}"
        print(name, apart, moved)
