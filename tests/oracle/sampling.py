"""What transformers and PEFT make of prompts, with two adapters and without: the truth that tests/sampling.rs holds us against.

    python sampling.py OUT_DIR

OUT_DIR/{dense,experts}: a random model, adapter0 and adapter1, and expected.json: a list with an entry for each prompt and adapter
(null for none): log-probabilities of the prompt's tokens from the second on, the five most likely tokens at each of these
positions, a greedy continuation with its log-probabilities, and at each of its tokens the gap of logits between the best two.
"""
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

COMMON = dict(vocab_size=503, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
              rms_norm_eps=1e-6, initializer_range=0.15, tie_word_embeddings=False, max_position_embeddings=128, eos_token_id=None, bos_token_id=None)
# One layer sees a window.
SLIDING = dict(use_sliding_window=True, sliding_window=9, max_window_layers=2)
MODELS = {
    'dense': (Qwen3ForCausalLM, Qwen3Config(**COMMON, **SLIDING), {}),
    'experts': (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
                                                    mlp_only_layers=[0], decoder_sparse_step=1),
                dict(target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'])),
}
LENGTHS = [1, 5, 16, 17, 40]
NEW = 20
TOP = 5


def write(folder, architecture, config, more):
    model = architecture(config).eval()
    model.save_pretrained(folder)
    for i, (rank, modules) in enumerate([(4, ['q_proj', 'k_proj', 'v_proj', 'o_proj']), (6, ['v_proj', 'o_proj'])]):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=12, target_modules=modules, task_type='CAUSAL_LM', **more))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if 'lora_B' in name:
                    parameter.normal_(std=0.1)
        adapted.save_pretrained(folder / f'adapter{i}')
    prompts = [torch.randint(0, config.vocab_size, (n,)).tolist() for n in LENGTHS]
    entries = []
    for adapter in [None, 0, 1]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
        if adapter is not None:
            model = PeftModel.from_pretrained(model, folder / f'adapter{adapter}')
        model.eval()
        for prompt in prompts:
            ids, gaps = list(prompt), []
            with torch.no_grad():
                for _ in range(NEW):
                    logits = model(torch.tensor([ids])).logits[0]
                    best = logits[-1].topk(2)
                    gaps.append((best.values[0] - best.values[1]).item())
                    ids.append(best.indices[0].item())
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            told = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            top = log_probs[:len(prompt) - 1].topk(TOP)
            entries.append(dict(adapter=adapter, prompt=prompt, prompt_log_probs=told[:len(prompt) - 1], top_ids=top.indices.tolist(),
                                top_log_probs=top.values.tolist(), new=ids[len(prompt):], new_log_probs=told[len(prompt) - 1:], gaps=gaps))
    (folder / 'expected.json').write_text(json.dumps(entries))


out = Path(sys.argv[1])
for name, (architecture, config, more) in MODELS.items():
    torch.manual_seed(sum(map(ord, name)))
    write(out / name, architecture, config, more)
