"""Makes a PEFT adapter and continues chats with it greedily in fp32, as transformers and PEFT do.

    python generate.py MODEL_DIR ADAPTER_OUT CHATS.jsonl MAX_NEW_TOKENS

Every chat ends with an assistant message: what is continued is all before it, its loss (end of turn included) is taken. Prints a
line of JSON per chat: completion, loss_sum, loss_tokens, and margin, the smallest gap between the best two logits on the way.
"""
import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model_dir, adapter_out, chats, limit = sys.argv[1:]
torch.manual_seed(5)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=['q_proj', 'v_proj', 'gate_proj', 'down_proj']))
for name, parameter in model.named_parameters():
    if 'lora_B' in name:
        torch.nn.init.normal_(parameter, std=0.02)
model.save_pretrained(adapter_out)
model.eval()
for line in open(chats):
    messages = json.loads(line)['messages']
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)['input_ids']
    whole = tokenizer.apply_chat_template(messages, return_dict=True)['input_ids']
    assert whole[:len(prompt)] == prompt
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1:-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(prompt):]), reduction='sum').item()
        out = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                             max_new_tokens=int(limit), do_sample=False, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    print(json.dumps({
        'completion': tokenizer.decode(out.sequences[0, len(prompt):], skip_special_tokens=True),
        'loss_sum': loss, 'loss_tokens': len(whole) - len(prompt), 'margin': (best[:, 0] - best[:, 1]).min().item(),
    }))
