"""Prints the mean token loss of a PEFT adapter over tokenized rows, as transformers and PEFT compute it in fp32, and writes the
logits of each row, `[tokens, vocab]` named by its number.

    python peft_loss.py MODEL_DIR ADAPTER_DIR ROWS.jsonl LOGITS.safetensors
"""
import json, sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model_dir, adapter_dir, rows, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation='eager')
model = PeftModel.from_pretrained(model, adapter_dir).eval()
total, valid, all_logits = 0.0, 0, {}
with torch.no_grad():
    for index, line in enumerate(open(rows)):
        row = json.loads(line)
        ids, labels = torch.tensor(row['input_ids']), torch.tensor(row['labels'])
        all_logits[str(index)] = model(input_ids=ids[None]).logits[0].contiguous()
        logits = all_logits[str(index)][:-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction='sum').item()
        valid += int((labels[1:] != -100).sum())
print(repr(total / valid))
save_file(all_logits, out)
