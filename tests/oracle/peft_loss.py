"""Prints the mean token loss of PEFT adapters over tokenized rows, as transformers and PEFT compute it in fp32, a line each, and writes
the logits of each row, `[tokens, vocab]` named by its number.

    python peft_loss.py [MODEL_DIR ADAPTER_DIR ROWS.jsonl LOGITS.safetensors]...

Experts that the file keeps apart (`experts.{e}.gate_proj`, as vLLM reads them) or stacked (`experts.w1`, as SGLang does), by the names of
the model's files, are none that PEFT knows: there every B·A is added to the weights.
"""
import json
import re
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def merge(model, tensors, scale):
    """Adds scale · B·A of every pair of `tensors` to the weight that its key names."""
    parameters = dict(model.named_parameters())
    for key, a in tensors.items():
        if '.lora_A.' not in key:
            continue
        b = tensors[key.replace('.lora_A.', '.lora_B.')]
        path = key.removeprefix('base_model.model.').removesuffix('.lora_A.weight')
        expert = re.fullmatch(r'(.*\.experts)\.(?:(\d+)\.)?(\w+)', path)
        if expert is None:
            parameters[path + '.weight'] += scale * b @ a
            continue
        experts, number, leaf = expert.groups()
        experts = experts.replace('block_sparse_moe', 'mlp')
        leaf = {'w1': 'gate_proj', 'w3': 'up_proj', 'w2': 'down_proj'}.get(leaf, leaf)
        weight = parameters[f'{experts}.{"down_proj" if leaf == "down_proj" else "gate_up_proj"}']
        if number is not None:
            weight = weight[int(number)]
        if leaf != 'down_proj':
            weight = weight.chunk(2, -2)[leaf == 'up_proj']
        weight += scale * b @ a


def loss(model_dir, adapter_dir, rows, out):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation='eager')
    tensors, config = load_file(f'{adapter_dir}/adapter_model.safetensors'), json.load(open(f'{adapter_dir}/adapter_config.json'))
    if any('.experts.' in key for key in tensors) and not config['target_parameters']:
        with torch.no_grad():
            merge(model, tensors, config['lora_alpha'] / config['r'])
    else:
        model = PeftModel.from_pretrained(model, adapter_dir)
    model.eval()
    total, valid, all_logits = 0.0, 0, {}
    with torch.no_grad():
        for index, line in enumerate(open(rows)):
            row = json.loads(line)
            ids, labels = torch.tensor(row['input_ids']), torch.tensor(row['labels'])
            all_logits[str(index)] = model(input_ids=ids[None]).logits[0].contiguous()
            logits = all_logits[str(index)][:-1]
            total += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction='sum').item()
            valid += int((labels[1:] != -100).sum())
    save_file(all_logits, out)
    return total / valid


for first in range(1, len(sys.argv), 4):
    print(repr(loss(*sys.argv[first:first + 4])))
