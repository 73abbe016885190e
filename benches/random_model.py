"""Makes a Hugging Face model directory of random bf16 weights in the shape of a Qwen3 or Qwen3-MoE, or of a named model.

    random_model.py NAME OUT_DIR      NAME is one of SHAPES; OUT_DIR appears whole or not at all

Drawn on a GPU where there is one, which has other numbers than a CPU. STREAMED shapes are written in shards, so that no
more than one shard is in memory: norms 1, biases 0, the rest normal with deviation 0.02.
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON = dict(rms_norm_eps=1e-6, max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=True, bos_token_id=1,
              eos_token_id=2, pad_token_id=2)
HEADS = dict(num_attention_heads=16, num_key_value_heads=8, head_dim=128)
SHAPES = {
    # Qwen3-0.6B with 24 of its 28 layers: 0.53 B parameters, 30 % of them in the embedding, which is the head too.
    'qwen3-0.5b': dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=24, **HEADS),
    # 1.02 B parameters, 2 GB, next to nothing in the embedding.
    'qwen3-2gb': dict(vocab_size=32000, hidden_size=2048, intermediate_size=6144, num_hidden_layers=19, **HEADS),
    # 0.23 B parameters in 32 experts a layer, of which a token meets 4.
    'qwen3-moe-0.23b': dict(vocab_size=32000, hidden_size=512, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8,
                            num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256,
                            norm_topk_prob=True),
    # 2.8 B: four of Qwen3-30B-A3B's 48 layers, all 128 experts of each, 8 a token; its head, tied.
    'qwen3-moe-2.8b': dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=4, num_attention_heads=32,
                           num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
                           norm_topk_prob=True),
}
# As config.json of the model that is named has them; of Llama without its limit of 4096 positions.
STREAMED = {
    'qwen2.5-1.5b': dict(model_type='qwen2', vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768,
                         tie_word_embeddings=True, bos_token_id=151643, eos_token_id=151645),
    'llama-2-7b': dict(model_type='llama', vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5, max_position_embeddings=32768,
                       tie_word_embeddings=False, bos_token_id=1, eos_token_id=2),
}
SHARD_BYTES = 1 << 30


def stream(name: str, out: Path) -> None:
    shape = dict(STREAMED[name])
    config = AutoConfig.for_model(shape.pop('model_type'), dtype='bfloat16', **shape)
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(config)
    tied = {'lm_head.weight'} if config.tie_word_embeddings else set()
    shapes = {key: value.shape for key, value in model.state_dict().items() if key not in tied}
    config.architectures = [type(model).__name__]
    unfinished = out.with_name(out.name + '.tmp')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config.save_pretrained(unfinished)
    generator = torch.Generator().manual_seed(0)
    shard, files = {}, {}

    def write() -> None:
        file = f'model-{len(set(files.values())) + 1:05}.safetensors'
        save_file(shard, unfinished / file, metadata={'format': 'pt'})
        files.update(dict.fromkeys(shard, file))
        shard.clear()

    for key, shape in shapes.items():
        if len(shape) == 1:
            fill = torch.zeros if key.endswith('bias') else torch.ones
            shard[key] = fill(shape, dtype=torch.bfloat16)
        else:
            shard[key] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if sum(value.numel() * 2 for value in shard.values()) >= SHARD_BYTES:
            write()
    if shard:
        write()
    elements = sum(shape.numel() for shape in shapes.values())
    index = {'metadata': {'total_size': 2 * elements}, 'weight_map': files}
    (unfinished / 'model.safetensors.index.json').write_text(json.dumps(index))
    unfinished.rename(out)
    print(f'{out}: {elements / 1e9:.2f} B parameters')


def make(name: str, out: Path) -> None:
    if name in STREAMED:
        return stream(name, out)
    torch.manual_seed(0)
    torch.set_default_device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_default_dtype(torch.bfloat16)
    shape = COMMON | SHAPES[name]
    if 'num_experts' in shape:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(dtype='bfloat16', **shape))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(dtype='bfloat16', **shape))
    unfinished = out.with_name(out.name + '.tmp')
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    unfinished.rename(out)
    print(f'{out}: {sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} B parameters')


if __name__ == '__main__':
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES | STREAMED:
        sys.exit(f'{__doc__}\nNAME: {" ".join(SHAPES | STREAMED)}')
    make(sys.argv[1], Path(sys.argv[2]))
