"""What transformers and PEFT compute for tiny random models, or for a model that is given: the truth that tests/oracle.rs holds
us against.

    python reference.py OUT_DIR [MODEL_DIR]

Per family, or for that model, one directory: the model in HF form, a PEFT adapter with random A and B, and expected.safetensors with
the logits of the first rows, the LoRA gradients of the first step, the losses, the gradient norms and the adapter
after 20 AdamW steps with clipping. fp32, eager attention, one thread.
"""
import json, sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
STEPS, ROWS, DECAY, MAX_NORM, RANK, ALPHA = 20, 3, 0.01, 0.5, 3, 6
SPLIT = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']

COMMON = dict(vocab_size=1003, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15, attn_implementation='eager')
LLAMA3 = dict(rope_type='llama3', rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MODELS = {
    'llama_llama3_rope': (LlamaForCausalLM, LlamaConfig(**COMMON, rope_parameters=LLAMA3)),
    'llama_tied_with_biases': (LlamaForCausalLM, LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True,
                                                             mlp_bias=True)),
    'mistral_sliding': (MistralForCausalLM, MistralConfig(**COMMON, head_dim=24, sliding_window=8)),
    'qwen2_tied': (Qwen2ForCausalLM, Qwen2Config(**COMMON, tie_word_embeddings=True)),
    'qwen2_sliding': (Qwen2ForCausalLM, Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=6,
                                                    max_window_layers=1)),
    'qwen3_wide_heads': (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=32)),
}


def rows_of(step, vocab_size):
    """Rows of one step: lengths differ, and part of each row carries no loss."""
    generator = torch.Generator().manual_seed(1000 + step)
    rows = []
    for row in range(ROWS):
        length = 5 + (7 * row + 3 * step) % 17
        ids = torch.randint(0, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + row] = -100
        rows.append((ids, labels))
    return rows


def step_loss(model, rows):
    """Σ token losses ÷ valid tokens of the whole step, the shift inside each row."""
    valid = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    total = 0.0
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction='sum')
    return total / valid


def random_model(architecture, config):
    model = architecture(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.0 if key.endswith('bias') else 1.0))
    return model


def write(directory, model, lr):
    model.save_pretrained(directory)
    vocab_size = model.config.vocab_size
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=SPLIT, task_type='CAUSAL_LM'))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if 'lora_B' in key:
                parameter.normal_(std=0.05)
    model.save_pretrained(directory / 'adapter')
    trained = {k.replace('.default', ''): p for k, p in model.named_parameters() if p.requires_grad}

    expected = {}
    for i, (ids, _) in enumerate(rows_of(0, vocab_size)):
        expected[f'logits.{i}'] = model(input_ids=ids[None]).logits[0].detach().contiguous()
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = step_loss(model, rows_of(step, vocab_size))
        loss.backward()
        if step == 0:
            expected |= {f'gradient.{k}': p.grad.clone() for k, p in trained.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), MAX_NORM).item())
        optimizer.step()
        losses.append(loss.item())
    expected |= {f'final.{k}': p.detach().clone() for k, p in trained.items()}
    save_file(expected, directory / 'expected.safetensors')
    steps = [[[ids.tolist(), labels.tolist()] for ids, labels in rows_of(step, vocab_size)] for step in range(STEPS)]
    run = dict(losses=losses, norms=norms, steps=steps, rank=RANK, alpha=ALPHA, lr=lr, weight_decay=DECAY,
               max_norm=MAX_NORM)
    (directory / 'expected.json').write_text(json.dumps(run))


if __name__ == '__main__':
    out = Path(sys.argv[1])
    for path in map(Path, sys.argv[2:]):
        torch.manual_seed(7)
        write(out / path.name, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation='eager'), 1e-4)
    for name, (architecture, config) in MODELS.items() if len(sys.argv) == 2 else ():
        torch.manual_seed(sum(map(ord, name)))
        write(out / name, random_model(architecture, config), 1e-3)
