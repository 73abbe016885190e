"""What transformers and PEFT compute for tiny random models, or for a model that is given: the truth that tests/oracle.rs holds
us against.

    python reference.py OUT_DIR [MODEL_DIR]

Per family, or for that model, one directory: the model in HF form, a PEFT adapter with random A and B in adapter/, expected.safetensors
with the logits of the first rows, and in expected.json losses and gradient norms of 20 AdamW steps with clipping. gradient/ and final/
hold the LoRA gradients of the first step and the adapter after the last, in the form of the adapter. fp32, eager attention, one thread.

Of a mixture of experts the smallest distance of a token's last chosen logit from the first that was not chosen is given too: rounding must
not choose for it.
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from dequantized import dequantize
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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
EXPERTS = COMMON | dict(num_experts_per_tok=2)
QWEN3_MOE = COMMON | dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40, mlp_only_layers=[1], norm_topk_prob=True,
                          head_dim=32)
QWEN2_MOE = COMMON | dict(num_experts=6, num_experts_per_tok=1, moe_intermediate_size=40, shared_expert_intermediate_size=56,
                          decoder_sparse_step=2)
# `independent` in the name: gate and up of the experts are adapters of their own; otherwise one, as PEFT's
# target_parameters are.
# `hybrid`: experts share A of gate and up, and B of down.
MIXTURES = {
    'qwen3_moe': (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_MOE)),
    'qwen3_moe_independent': (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_MOE | dict(norm_topk_prob=False))),
    'qwen3_moe_hybrid': (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_MOE)),
    'mixtral': (MixtralForCausalLM, MixtralConfig(**EXPERTS, num_local_experts=4)),
    'olmoe_clipped': (OlmoeForCausalLM, OlmoeConfig(**EXPERTS, num_experts=8, clip_qkv=1.5)),
    'olmoe_independent': (OlmoeForCausalLM, OlmoeConfig(**EXPERTS | dict(num_experts_per_tok=3), num_experts=6)),
    'qwen2_moe_independent': (Qwen2MoeForCausalLM, Qwen2MoeConfig(**QWEN2_MOE)),
    'qwen2_moe_independent_hybrid': (Qwen2MoeForCausalLM, Qwen2MoeConfig(**QWEN2_MOE)),
    'qwen2_moe': (Qwen2MoeForCausalLM, Qwen2MoeConfig(**QWEN2_MOE | dict(norm_topk_prob=True, num_experts_per_tok=2))),
}
# On a quantised base: of bitsandbytes, which decodes rows of whole blocks alone as it should, or with the numbers of a
# format, where rows and columns are no multiples of blocks.
WHOLE = dict(hidden_size=64, intermediate_size=192, head_dim=32)
RAGGED = dict(hidden_size=72, intermediate_size=100, head_dim=20)
QUANTIZED = {
    'quantized_bitsandbytes_nf4': (Qwen3ForCausalLM, Qwen3Config(**COMMON | WHOLE)),
    'quantized_nf4': (Qwen2MoeForCausalLM, Qwen2MoeConfig(**QWEN2_MOE | dict(num_experts_per_tok=2, hidden_size=72))),
    'quantized_block_fp8': (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_MOE | RAGGED)),
    'quantized_nvfp4': (Qwen3MoeForCausalLM, Qwen3MoeConfig(**QWEN3_MOE | RAGGED)),
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
            elif key.endswith('mlp.gate.weight'):
                # Some families start routers at zero; wide ones choose clearly.
                parameter.normal_(std=0.5)
    return model


def adapter_config(model, independent):
    """The seven projections; beside experts, MLPs only as parameters, or PEFT drops them."""
    names = [name for name, _ in model.named_parameters()]
    if not any('mlp.experts.' in name for name in names):
        return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=SPLIT, task_type='CAUSAL_LM')
    fused = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
    linear = {name.split('.', 3)[3] for name in names if '.mlp.' in name and name.endswith('_proj.weight')}
    twice = {'.*experts\\.gate_up_proj': 2} if independent else {}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=SPLIT[:4], target_parameters=fused + sorted(linear), task_type='CAUSAL_LM',
                      rank_pattern={key: n * RANK for key, n in twice.items()},
                      alpha_pattern={key: n * ALPHA for key, n in twice.items()})


def experts_of(model):
    return getattr(model.config, 'num_experts', None) or model.config.num_local_experts


class Tied:
    """The factors that experts share: one parameter each, of which PEFT's holds a copy for every expert."""

    def __init__(self, model, trained, hybrid):
        self.trained, self.experts, self.shared = trained, experts_of(model) if hybrid else 0, {}
        for name, parameter in trained.items() if hybrid else ():
            if name.endswith(('experts.base_layer.lora_A.weight', 'experts.lora_B.weight')):
                self.shared[name] = torch.nn.Parameter(self._by_expert(name, parameter.detach())[0].clone())
        self.copy()

    def _by_expert(self, name, tensor):
        """`[experts, ...]`: A is expert by expert, B has the experts of a rank side by side."""
        if 'lora_A' in name:
            return tensor.view(self.experts, -1, tensor.shape[1])
        return tensor.view(tensor.shape[0], -1, self.experts).permute(2, 0, 1)

    def parameters(self):
        return [self.shared.get(name, parameter) for name, parameter in self.trained.items()]

    @torch.no_grad()
    def copy(self):
        for name, parameter in self.shared.items():
            self._by_expert(name, self.trained[name]).copy_(parameter.expand(self.experts, -1, -1))

    def sum_gradients(self):
        """A shared parameter's gradient is the sum of its copies', which then all show it."""
        for name, parameter in self.shared.items():
            copies = self._by_expert(name, self.trained[name].grad)
            parameter.grad = copies.sum(0)
            copies.copy_(parameter.grad.expand(self.experts, -1, -1))


def off_diagonal(model, trained, independent):
    """Of adapters of twice the rank, where gate's rows of B meet up's ranks and the other way round: (B, mask)."""
    masks = {}
    for name, parameter in trained.items() if independent else ():
        if name.endswith('mlp.experts.base_layer.lora_B.weight'):
            mask = torch.zeros_like(parameter).view(2, -1, 2, RANK * experts_of(model))
            mask[0, :, 1], mask[1, :, 0] = 1, 1
            masks[name] = mask.view_as(parameter).bool()
    return masks


class Margins:
    """The smallest margin of any router's choice."""

    def __init__(self, model):
        self.least = float('inf')
        for name, module in model.named_modules():
            if name.endswith('mlp.gate'):
                module.register_forward_hook(self._look)

    def _look(self, router, _, output):
        logits, chosen = output[0].log(), router.top_k
        best = logits.topk(chosen + 1, dim=-1).values
        self.least = min(self.least, (best[:, chosen - 1] - best[:, chosen]).min().item())


def quantized(model, directory):
    """The model with the base that the directory's name asks for."""
    kind, _, how = directory.name.partition('_')
    if kind != 'quantized':
        return model
    if how == 'bitsandbytes_nf4':
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation='eager', device_map='cpu',
                                                     quantization_config=config)
        # In evaluation it would repack weights, which not all of these shapes allow.
        return model.train()
    dequantize(model, how)
    return model


def write_adapter(directory, tensors):
    directory.mkdir()
    shutil.copy(directory.parent / 'adapter' / 'adapter_config.json', directory)
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, directory / 'adapter_model.safetensors')


def write(directory, model, lr):
    model.save_pretrained(directory)
    model = quantized(model, directory)
    vocab_size = model.config.vocab_size
    margins = Margins(model)
    independent, hybrid = 'independent' in directory.name, 'hybrid' in directory.name
    model = get_peft_model(model, adapter_config(model, independent))
    trained = {k.replace('.default', ''): p for k, p in model.named_parameters() if p.requires_grad}
    masks = off_diagonal(model, trained, independent)
    with torch.no_grad():
        for key, parameter in trained.items():
            if 'lora_B' in key:
                parameter.normal_(std=0.05)
            if key in masks:
                parameter[masks[key]] = 0
    tied = Tied(model, trained, hybrid)
    model.save_pretrained(directory / 'adapter')

    logits = {}
    for i, (ids, _) in enumerate(rows_of(0, vocab_size)):
        logits[f'logits.{i}'] = model(input_ids=ids[None]).logits[0].detach().contiguous()
    save_file(logits, directory / 'expected.safetensors')
    optimizer = torch.optim.AdamW(tied.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        loss = step_loss(model, rows_of(step, vocab_size))
        loss.backward()
        for key, mask in masks.items():
            trained[key].grad[mask] = 0
        tied.sum_gradients()
        if step == 0:
            write_adapter(directory / 'gradient', {k: p.grad for k, p in trained.items()})
        norms.append(torch.nn.utils.clip_grad_norm_(tied.parameters(), MAX_NORM).item())
        optimizer.step()
        tied.copy()
        losses.append(loss.item())
    write_adapter(directory / 'final', trained)
    steps = [[[ids.tolist(), labels.tolist()] for ids, labels in rows_of(step, vocab_size)] for step in range(STEPS)]
    run = dict(losses=losses, norms=norms, steps=steps, rank=RANK, alpha=ALPHA, lr=lr, weight_decay=DECAY, max_norm=MAX_NORM,
               margin=margins.least if margins.least < float('inf') else None)
    (directory / 'expected.json').write_text(json.dumps(run))
    return margins.least


if __name__ == '__main__':
    out = Path(sys.argv[1])
    for path in map(Path, sys.argv[2:]):
        torch.manual_seed(7)
        write(out / path.name, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation='eager'), 1e-4)
    alone = len(sys.argv) == 2
    for name, (architecture, config) in MODELS.items() if alone else ():
        torch.manual_seed(sum(map(ord, name)))
        write(out / name, random_model(architecture, config), 1e-3)
    for name, (architecture, config) in (MIXTURES | QUANTIZED).items() if alone else ():
        # Another seed where rounding might choose.
        for attempt in range(5):
            torch.manual_seed(sum(map(ord, name)) + attempt)
            shutil.rmtree(out / name, ignore_errors=True)
            if write(out / name, random_model(architecture, config), 1e-3) > 1e-4:
                break
