"""Checkpoints that tools have quantised, beside the same in plain numbers, and models merged from them.

    packed.py make OUT                          writes OUT/plain, and by format OUT/FORMAT as its tool writes it and OUT/FORMAT_plain with
                                                the numbers that it has then, in fp32
    packed.py compare OUT FORMAT ADAPTER MERGED ...
                                                prints a line of JSON for each three: the furthest logit of MERGED from OUT/FORMAT_plain with
                                                ADAPTER in PEFT; of a MERGED that is packed, from what that has once it is merged and packed, and how
                                                many weights are others
"""
import json
import pathlib
import shutil
import sys

import bitsandbytes
import bitsandbytes.functional as bnb
import peft
import torch
import transformers
from dequantized import FORMATS, dequantize, padded
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
VOCAB = 503
IDS = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(5))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def load(path, **more):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation='eager', **more).eval()


def by_tool(out, name, tensors):
    """A checkpoint of `tensors` with the settings of its tool, and tensors of its own in the place of each matrix."""
    if name == 'nf4':
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')
        load(out / 'plain', quantization_config=config, device_map='cpu').save_pretrained(out / name)
        return
    made, settings = dict(tensors), dict(quant_method='modelopt', quant_algo='NVFP4', ignore=['lm_head'], producer=dict(name='modelopt'))
    for matrix in [matrix for matrix in tensors if matrix.endswith('_proj.weight')]:
        weight = tensors[matrix]
        if name == 'block_fp8':
            scale = padded(weight, 128, 128).abs().amax((1, 3)) / 448
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:weight.shape[0], :weight.shape[1]]
            made[matrix], made[f'{matrix}_scale_inv'] = (weight / wide).to(torch.float8_e4m3fn), scale
            settings = dict(quant_method='fp8', weight_block_size=[128, 128], activation_scheme='dynamic', modules_to_not_convert=['lm_head'])
        else:
            scale = per_tensor_amax_to_scale(weight.abs().max())
            scales, codes = nvfp4_quantize(weight, 16, scale)
            made[matrix], made[f'{matrix}_scale_2'] = codes, scale
            made[f'{matrix}_scale'] = scales.view(torch.float8_e4m3fn).reshape(weight.shape[0], -1)
    (out / name).mkdir()
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, out / name / 'model.safetensors', metadata=dict(format='pt'))
    config = json.loads((out / 'plain/config.json').read_text())
    (out / name / 'config.json').write_text(json.dumps(config | dict(quantization_config=settings)))


def make(out):
    torch.manual_seed(0)
    # Whole blocks of 128: transformers reads no other FP8 on CPUs.
    config = transformers.Qwen3Config(vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=4, head_dim=32, initializer_range=0.1, tie_word_embeddings=False)
    plain = transformers.Qwen3ForCausalLM(config).float()
    plain.save_pretrained(out / 'plain')
    tokenizer = Tokenizer(models.WordLevel({f'w{i}': i for i in range(VOCAB)}, unk_token='w0'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(out / 'plain/tokenizer.json'))
    (out / 'plain/tokenizer_config.json').write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tensors = load_file(out / 'plain/model.safetensors')
    for name in FORMATS:
        by_tool(out, name, tensors)
        model = load(out / 'plain')
        dequantize(model, name)
        model.save_pretrained(out / f'{name}_plain')
        for other in (name, f'{name}_plain'):
            for file in ('tokenizer.json', 'tokenizer_config.json'):
                shutil.copy(out / 'plain' / file, out / other)


def modelopt(path, like):
    """The model `like` with the numbers of ModelOpt's files, which transformers does not read."""
    stored = load_file(f'{path}/model.safetensors')
    state = {key: tensor for key, tensor in stored.items() if tensor.dtype == torch.float32 and not key.endswith('_scale_2')}
    for key in [key for key in stored if key.endswith('_scale_2')]:
        matrix = key.removesuffix('_scale_2')
        codes, scales = stored[matrix], stored[f'{matrix}_scale'].float() * stored[key]
        each = torch.stack([codes & 15, codes >> 4], 2).flatten(1).long()
        state[matrix] = E2M1[each & 7] * torch.where(each > 7, -1, 1) * scales.repeat_interleave(16, 1)
    model = load(like)
    model.load_state_dict(state)
    return model


def merged_by_transformers(path, like):
    settings = json.loads(pathlib.Path(path, 'config.json').read_text()).get('quantization_config', {})
    if settings.get('quant_method') == 'modelopt':
        return modelopt(path, like), settings['quant_method']
    model = load(path, **dict(device_map='cpu') if settings else {})
    state = {key: tensor for key, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    packed = {path: module.weight for path, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    if packed:
        # The layers themselves compute in bf16 on CPUs.
        state |= {f'{path}.weight': bnb.dequantize_4bit(weight.data, weight.quant_state).float() for path, weight in packed.items()}
        model = load(like)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model, settings.get('quant_method')


@torch.no_grad()
def compare(out, words):
    for how, adapter, path in zip(words[::3], words[1::3], words[2::3]):
        like = out / f'{how}_plain'
        merged, method = merged_by_transformers(path, like)
        expected = peft.PeftModel.from_pretrained(load(like), adapter).eval()
        if method:
            expected = expected.merge_and_unload()
            dequantize(expected, how)
        found, logits = merged(IDS).logits, expected(IDS).logits
        weights = merged.state_dict()
        # A sum that lies between two codes may get the other one from another order of fp32 sums.
        others = sum(((weights[key] - tensor).abs() > 1e-5).sum().item() for key, tensor in expected.state_dict().items()) if method else 0
        print(json.dumps(dict(method=method, apart=(found - logits).abs().max().item(), largest=logits.abs().max().item(), others=others)))


command, out, *rest = sys.argv[1:]
make(pathlib.Path(out)) if command == 'make' else compare(pathlib.Path(out), rest)
