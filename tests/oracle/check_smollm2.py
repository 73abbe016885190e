"""The converted quickstart model against transformers' own reading of the same GGUF file.

    check_smollm2.py MODEL_DIR

Every weight equals the dequantised one rounded to bf16, under the same name; the tokenizer gives the same ids and gives the
text back; the chat model answers a question. Exits non-zero at the first difference.
"""
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'launch/quickstart'))
from convert_smollm2 import packaged_gguf  # noqa: E402

directory, gguf = sys.argv[1], packaged_gguf()
ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
weights = dict(theirs.named_parameters())
assert set(weights) == set(dict(ours.named_parameters()))
for name, weight in ours.named_parameters():
    assert torch.equal(weight, weights[name].bfloat16().float()), f'{name} differs'
for key in ('rope_parameters', 'num_attention_heads', 'num_key_value_heads', 'hidden_act', 'tie_word_embeddings'):
    assert getattr(ours.config, key) == getattr(theirs.config, key), key
assert abs(ours.config.rms_norm_eps - theirs.config.rms_norm_eps) < 1e-11

ours_tokenizer = AutoTokenizer.from_pretrained(directory)
theirs_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def reference_ids(text):
    """transformers does not read GGUF's pre-tokenizer, which splits off every digit; the rest it has."""
    pieces = (piece for piece in re.split(r'(\d)', text) if piece)
    return [i for piece in pieces for i in theirs_tokenizer(piece, add_special_tokens=False).input_ids]


text = ''.join(path.read_text(encoding='utf-8') for path in sorted((ROOT / 'src').glob('*.rs')))
for sample in (text, "It's  1999-12-31, é漢字 🙂\n\t x**2", '<|im_start|>user\nhi<|im_end|>'):
    ids = ours_tokenizer(sample, add_special_tokens=False).input_ids
    assert ids == reference_ids(sample), 'token ids differ'
    assert ours_tokenizer.decode(ids) == sample, 'tokenizer does not give the text back'

chat = ours_tokenizer.apply_chat_template([{'role': 'user', 'content': 'What is the capital of France?'}],
                                          add_generation_prompt=True, return_tensors='pt', return_dict=True)
answer = ours_tokenizer.decode(ours.generate(**chat, max_new_tokens=12, do_sample=False)[0, chat['input_ids'].shape[1]:])
assert answer == 'The capital of France is Paris.<|im_end|>', answer
print(f'{directory}: equals the GGUF file ({len(weights)} tensors); "{answer}"')
