"""What transformers makes of configurations and checkpoints: the truth that tests/models.rs holds us against.

    python models.py OUT_DIR

defaults.json: for each family the fields of its config class with their values where they are absent. cases.json: a list of cases,
each a config.json, a folder of weights, what should come of it, and the logits of transformers (eager, fp32) for three documents, or null
where it refuses, lacks weights or was not asked. Fields of a case:

    expect   same: loaded, with equal logits; refused: by us; either: refused or equal logits
    words    that our one line has where it refuses
    warns    that our warnings have; empty: no warning
"""
import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

warnings.filterwarnings('ignore')
transformers.utils.logging.set_verbosity(60)
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

COMMON = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=24, initializer_range=0.3, rms_norm_eps=1e-3, bos_token_id=1, eos_token_id=2, pad_token_id=None)
QWEN_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True, mlp_only_layers=[1])
SLIDING = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
# The models whose fields are changed: the families, and those that slide a second time.
BASES = {
    'llama': ('Llama', dict(mlp_bias=True)),
    'mistral': ('Mistral', dict(sliding_window=9)),
    'mixtral': ('Mixtral', dict(num_local_experts=4, num_experts_per_tok=2)),
    'olmoe': ('Olmoe', dict(num_experts=4, num_experts_per_tok=2, clip_qkv=1.0, norm_topk_prob=True)),
    'qwen2': ('Qwen2', dict()),
    'qwen2_sliding': ('Qwen2', SLIDING),
    'qwen2_moe': ('Qwen2Moe', dict(**QWEN_MOE, shared_expert_intermediate_size=20)),
    'qwen2_moe_sliding': ('Qwen2Moe', dict(**QWEN_MOE, **SLIDING, shared_expert_intermediate_size=20)),
    'qwen3': ('Qwen3', dict(head_dim=8, attention_bias=True)),
    'qwen3_sliding': ('Qwen3', dict(**SLIDING, head_dim=8)),
    'qwen3_moe': ('Qwen3Moe', QWEN_MOE),
    'qwen3_moe_sliding': ('Qwen3Moe', dict(**QWEN_MOE, **SLIDING)),
}
FAMILIES = [name for name in BASES if not name.endswith('_sliding')]
# Changed values of fields; for any other field they follow from the value.
CHANGED = {
    'clip_qkv': [0.3, None],
    'decoder_sparse_step': [2, 3],
    'dtype': ['bfloat16', 'float16'],
    'head_dim': [4, 8, 16, None],
    'hidden_act': ['gelu', 'relu', 'swish'],
    'max_window_layers': [0, 2, 3],
    'num_experts_per_tok': [1, 3],
    'num_hidden_layers': [2, 4],
    'num_key_value_heads': [1, 4, None],
    'pad_token_id': [-1, 0, 31, 32],
    'problem_type': ['regression'],
    'rms_norm_eps': [1e-6, 0.1],
    'sliding_window': [4, 30, None],
    'transformers_version': ['4.40.0'],
}
# Lists that are no scalars and yet settings.
LISTS = {'layer_types': [['full_attention'] * 3, ['sliding_attention', 'full_attention', 'full_attention'], ['full_attention'] * 2],
         'mlp_only_layers': [[], [0, 2]]}
WINDOW_FIELDS = ['use_sliding_window', 'sliding_window', 'max_window_layers', 'layer_types']
LENGTHS = [12, 40, 50]
DOCUMENTS = [torch.randint(0, 32, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
ABSENT = object()


class Cases:
    def __init__(self, out):
        self.out, self.cases, self.asked, self.configs = out, [], {}, {}

    def base(self, name):
        """The folder of a base, made at the first call, and its config.json."""
        folder = self.out / name
        if not folder.exists():
            architecture, settings = BASES[name]
            torch.manual_seed(3)
            config = getattr(transformers, architecture + 'Config')(**{**COMMON, **settings})
            model = getattr(transformers, architecture + 'ForCausalLM')(config).float()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.dim() == 1:
                        parameter.normal_(mean=0.0 if key.endswith('bias') else 1.0, std=0.2)
                    elif key.endswith('mlp.gate.weight'):
                        parameter.normal_(std=1.0)
            model.save_pretrained(folder)
            self.configs[name] = json.loads((folder / 'config.json').read_text())
        return folder, self.configs[name]

    def add(self, name, changed, base='llama', weights=None, expect='same', words=(), warns=(), fields=()):
        """A case of `base`'s config with the fields `changed`, and of its weights or those of the folder `weights`."""
        folder, config = self.base(base)
        config = {key: value for key, value in {**config, **changed}.items() if value is not ABSENT}
        weights = weights or folder
        logits, error = (None, 'not asked') if expect == 'refused' else self.ask(weights, config)
        self.cases.append(dict(name=f'{base}: {name}', config=config, weights=str(weights), expect=expect, words=list(words), warns=list(warns),
                               fields=list(fields), logits=logits, error=error, base=base))

    def ask(self, weights, config):
        """transformers' logits of each document, or why there are none. What it would fill with random numbers counts as refused."""
        key = (str(weights), json.dumps(config, sort_keys=True))
        if key not in self.asked:
            at = self.out / 'asked'
            at.mkdir(exist_ok=True)
            (at / 'config.json').write_text(json.dumps(config))
            try:
                read = transformers.AutoConfig.from_pretrained(at)
                # Without it, transformers fails on its own tuples.
                read.return_dict = True
                model, info = transformers.AutoModelForCausalLM.from_pretrained(weights, config=read, dtype=torch.float32, attn_implementation='eager',
                                                                                output_loading_info=True)
                if info['missing_keys']:
                    raise KeyError(f'missing {sorted(info["missing_keys"])[:3]}')
                with torch.no_grad():
                    # From the shortest on, so that the state of dynamic rope types is that of a document alone.
                    answer = [rounded(model.eval()(torch.tensor([ids]), use_cache=False).logits) for ids in DOCUMENTS], None
            except Exception as error:  # noqa: BLE001 any refusal counts
                answer = None, f'{type(error).__name__}: {error}'[:300]
            self.asked[key] = answer
        return self.asked[key]


def rounded(logits):
    return [round(logit, 6) for logit in logits.flatten().tolist()]


def values_of(field, value):
    """Values of `field` other than `value`."""
    if field in CHANGED or field in LISTS:
        return [other for other in CHANGED.get(field, LISTS.get(field)) if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value]
    if isinstance(value, float):
        return [2 * value + 0.1]
    return [] if isinstance(value, (list, dict, str)) else [3]


def fields_of(config_class):
    return [field for field in dataclasses.fields(config_class) if not field.name.startswith('_') and field.name != 'model_type']


def write_defaults(out):
    defaults = {}
    for family in FAMILIES:
        config_class = getattr(transformers, BASES[family][0] + 'Config')
        scalars = {field.name: field.default for field in fields_of(config_class) if field.default is not dataclasses.MISSING}
        scalars = {name: value for name, value in scalars.items() if value is None or isinstance(value, (bool, int, float, str))}
        defaults[family] = dict(fields=scalars, rope_theta=config_class.default_theta)
    (out / 'defaults.json').write_text(json.dumps(defaults))


def matrix(cases):
    """Every scalar field of every family's config class, changed and absent."""
    for base in BASES:
        _, config = cases.base(base)
        config_class = getattr(transformers, BASES[base][0] + 'Config')
        cases.add('as it is', {}, base)
        for field in fields_of(config_class):
            name = field.name
            if base not in FAMILIES and name not in WINDOW_FIELDS or name in ('rope_parameters', 'architectures', 'id2label', 'label2id'):
                continue
            default = None if field.default is dataclasses.MISSING else field.default
            changes = [(json.dumps(value), value) for value in values_of(name, config.get(name, default))]
            for word, value in changes + [('absent', ABSENT)] * (name in config):
                cases.add(f'{name} {word}', {name: value}, base, expect='either', fields=[name])
                if base not in FAMILIES and name != 'layer_types':
                    cases.add(f'{name} {word}, no layer_types', {name: value, 'layer_types': ABSENT}, base, expect='either')


YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type='llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def longrope(pairs, **more):
    return dict(rope_type='longrope', short_factor=[1.0 + 0.1 * i for i in range(pairs)], long_factor=[1.5 + i for i in range(pairs)],
                original_max_position_embeddings=20, **more)


def rope(cases):
    """Rope types and spellings, with documents shorter and longer than every length that a config names."""
    def both(name, table, expect='same', base='llama', **more):
        words = more.pop('words', ())
        cases.add(f'rope_scaling {name}', dict(rope_parameters=ABSENT, rope_scaling=table, **more), base, expect=expect, words=words)
        cases.add(f'rope_parameters {name}', dict(rope_parameters=table, **more), base, expect=expect, words=words)

    both('default', dict(rope_type='default'))
    both('default with its theta', dict(rope_type='default', rope_theta=100.0))
    both('empty', {})
    both('linear', dict(rope_type='linear', factor=4.0))
    both('linear of the old name', dict(type='linear', factor=4.0))
    both('linear under both names', dict(type='linear', rope_type='linear', factor=4.0))
    both('linear with an integer factor', dict(rope_type='linear', factor=3))
    both('linear with its theta', dict(rope_type='linear', factor=4.0, rope_theta=100.0))
    both('linear with theta beside it', dict(rope_type='linear', factor=4.0), rope_theta=100.0)
    both('linear with the same theta beside it', dict(rope_type='linear', factor=4.0, rope_theta=100.0), rope_theta=100)
    both('dynamic', dict(rope_type='dynamic', factor=2.0))
    both('dynamic with its theta', dict(rope_type='dynamic', factor=3.5, rope_theta=500.0))
    both('dynamic of a longer model', dict(rope_type='dynamic', factor=2.0), max_position_embeddings=45)
    both('llama3', LLAMA3)
    both('llama3 without the original length', {key: value for key, value in LLAMA3.items() if key != 'original_max_position_embeddings'})
    both('llama3 with the original length beside it', {key: value for key, value in LLAMA3.items() if key != 'original_max_position_embeddings'},
         original_max_position_embeddings=12)
    both('yarn', YARN)
    both('yarn without the original length', dict(rope_type='yarn', factor=4.0))
    both('yarn with the original length beside it', dict(rope_type='yarn', factor=2.0), original_max_position_embeddings=10)
    both('yarn by the ratio', {**YARN, 'factor': None})
    both('yarn with betas', {**YARN, 'beta_fast': 8.0, 'beta_slow': 0.5})
    both('yarn with betas of 0', {**YARN, 'beta_fast': 0, 'beta_slow': 0})
    both('yarn with an attention factor', {**YARN, 'attention_factor': 1.5})
    both('yarn with mscale', {**YARN, 'mscale': 0.7})
    both('yarn with both mscales', {**YARN, 'mscale': 0.7, 'mscale_all_dim': 1.3})
    both('yarn not truncated', {**YARN, 'truncate': False})
    both('yarn of a large theta', {**YARN, 'rope_theta': 1e6})
    both('yarn of factor below 1', {**YARN, 'factor': 0.5})
    both('longrope', longrope(2))
    both('longrope with a factor', longrope(2, factor=8.0))
    both('longrope with an attention factor', longrope(2, attention_factor=0.8))
    both('longrope without the original length', {key: value for key, value in longrope(2).items() if key != 'original_max_position_embeddings'})
    both('longrope of integers', {**longrope(2), 'long_factor': [2, 5]})
    for base in ['qwen3', 'mistral', 'olmoe', 'qwen2_sliding', 'qwen2_moe', 'qwen3_moe']:
        pairs = 4 if base == 'qwen3' else 2
        for table in (dict(rope_type='linear', factor=2.0), dict(rope_type='dynamic', factor=2.0), YARN, LLAMA3, longrope(pairs)):
            both(table['rope_type'], table, base=base)
    # transformers computes these of Mixtral's null head_dim, which fails.
    for table in (dict(rope_type='linear', factor=2.0), dict(rope_type='dynamic', factor=2.0), YARN, LLAMA3, longrope(2)):
        both(table['rope_type'], table, base='mixtral', head_dim=4)

    for base in FAMILIES:
        cases.add('no rotary field', dict(rope_parameters=ABSENT), base)
        cases.add('theta alone', dict(rope_parameters=ABSENT, rope_theta=300.0), base)
    default = dict(rope_type='default', rope_theta=10000.0)
    used = ['rope_scaling is used']
    cases.add('rope_scaling beside a default', dict(rope_parameters=default, rope_scaling=dict(rope_type='linear', factor=4.0)), warns=used)
    cases.add('yarn beside a default', dict(rope_parameters=default, rope_scaling=YARN), warns=used)
    cases.add('the same twice', dict(rope_parameters={**YARN, 'rope_theta': 10000.0}, rope_scaling=YARN), warns=used)
    cases.add('an empty rope_scaling beside yarn', dict(rope_parameters=YARN, rope_scaling={}))
    cases.add('a null rope_scaling beside yarn', dict(rope_parameters=YARN, rope_scaling=None))

    def refused(name, words, **changed):
        cases.add(name, changed, expect='refused', words=words)

    both('two thetas', dict(rope_type='linear', factor=4.0, rope_theta=100.0), 'refused', rope_theta=200.0, words=['rope_theta 100', 'rope_theta 200'])
    both('two original lengths', YARN, 'refused', original_max_position_embeddings=17,
         words=['original_max_position_embeddings 16', 'original_max_position_embeddings 17'])
    both('two types', dict(rope_type='linear', type='dynamic', factor=4.0), 'refused', words=['rope_type "linear"', 'type "dynamic"'])
    both('an unknown type', dict(rope_type='su', factor=4.0), 'refused', words=['rope_type', '"su"', 'longrope'])
    both('an unknown key', {**YARN, 'beta_fats': 3.0}, 'refused', words=['beta_fats', 'rope type yarn'])
    both('a key of another type', dict(rope_type='linear', factor=4.0, beta_fast=3.0), 'refused', words=['beta_fast', 'rope type linear'])
    both('a factor without a type', dict(factor=4.0), 'refused', words=['factor', 'rope type default'])
    both('tables by layer type', dict(full_attention=default, sliding_attention=default), 'refused', words=['full_attention', 'sliding_attention'])
    both('linear without a factor', dict(rope_type='linear'), 'refused', words=['factor is missing'])
    both('yarn without a factor', dict(rope_type='yarn'), 'refused', words=['factor is missing'])
    both('llama3 without a frequency', {**LLAMA3, 'low_freq_factor': None}, 'refused', words=['low_freq_factor is missing'])
    both('llama3 with crossed frequencies', {**LLAMA3, 'low_freq_factor': 5.0}, 'refused', words=['high_freq_factor'])
    both('longrope with too few factors', {**longrope(2), 'short_factor': [1.0]}, 'refused', words=['short_factor', 'list of 2'])
    both('a factor in quotes', dict(rope_type='linear', factor='4.0'), 'refused', words=['factor', 'positive number'])
    both('a negative factor', dict(rope_type='linear', factor=-1.0), 'refused', words=['factor', 'positive number'])
    both('half of the columns', dict(rope_type='default', partial_rotary_factor=0.5), 'refused', words=['partial_rotary_factor'])
    both('half of the columns, scaled', dict(rope_type='linear', factor=2.0, partial_rotary_factor=0.5), 'refused', words=['partial_rotary_factor'])
    refused('half of the columns, beside', ['partial_rotary_factor'], partial_rotary_factor=0.5)
    refused('no object', ['rope_scaling', 'an object'], rope_scaling='yarn')
    refused('another theta is lost', ['rope_theta 10000', 'rope_theta 500000'], rope_parameters={**default, 'rope_theta': 500000.0},
            rope_scaling=dict(rope_type='linear', factor=4.0))
    refused('another type is lost', ['rope_parameters', 'rope_scaling'], rope_parameters=YARN, rope_scaling=dict(rope_type='linear', factor=4.0))


def fields(cases):
    """Fields as files from practice have them."""
    for name, changed in {
        'unsloth_version': dict(unsloth_version='2025.3.1', unsloth_fixed=True),
        'max_sequence_length': dict(max_sequence_length=4096, model_max_length=4096),
        'tokenizer_class': dict(tokenizer_class='PreTrainedTokenizerFast'),
        'max_window_layers without windows': dict(max_window_layers=2, use_sliding_window=False, sliding_window=None),
        'old sampling settings': dict(temperature=0.7, top_p=0.9, do_sample=True, repetition_penalty=1.1, max_length=20),
        'classes of another task': dict(num_labels=3, id2label={'0': 'a', '1': 'b', '2': 'c'}, label2id={'a': 0, 'b': 1, 'c': 2}),
        'a padding id of -1': dict(pad_token_id=-1),
        'several ends': dict(eos_token_id=[2, 3]),
        'dtype under both names': dict(torch_dtype='bfloat16', dtype='bfloat16'),
        'dtype of the old name': dict(torch_dtype='float16', dtype=ABSENT),
        'swish': dict(hidden_act='swish'),
        'rope_interleaved false': dict(rope_interleaved=False, is_llama_config=True),
    }.items():
        cases.add(name, changed)
    for base, field, other in (('mixtral', 'num_local_experts', 'num_experts'), ('olmoe', 'num_experts', 'num_local_experts'),
                               ('qwen3_moe', 'num_experts', 'num_local_experts')):
        given = cases.base(base)[1]
        experts = given.get(field, given.get(other))
        cases.add(f'{field} by its other name', {field: ABSENT, other: experts}, base)
        cases.add(f'{field} under both names', {field: experts, other: experts}, base)
        cases.add(f'{field} twice', {field: experts, other: 3}, base, expect='refused', words=[field, other, '3'])
    many = {f'unknown_{i}': i for i in range(5)}
    layers = ['sliding_attention', 'full_attention', 'full_attention']
    for name, base, words, changed in (
        ('a field that may change the maths', 'llama', ['logit_softcap', 'llama'], dict(logit_softcap=30.0)),
        ('five of them', 'llama', ['unknown_2 and 2 more'], many),
        ('interleaved rotation', 'llama', ['rope_interleaved', 'false'], dict(rope_interleaved=True)),
        ('windows in Llama', 'llama', ['sliding_window', 'null'], dict(sliding_window=8)),
        ("the routers' loss", 'mixtral', ['output_router_logits', 'false'], dict(output_router_logits=True)),
        ('a padding id that is no token', 'llama', ['pad_token_id', '32 tokens'], dict(pad_token_id=32)),
        ('two dtypes', 'llama', ['dtype', 'torch_dtype'], dict(torch_dtype='bfloat16', dtype='float32')),
        ('an unknown dtype', 'llama', ['dtype', 'float32, bfloat16 or float16'], dict(dtype='float8_e4m3fn')),
        ('fp8', 'llama', ['quantization_config.weight_block_size is null'], dict(quantization_config=dict(quant_method='fp8'))),
        ('bitsandbytes', 'llama', ['quantization_config.bnb_4bit_quant_type is null'], dict(quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True))),
        ('GPTQ', 'qwen2', ['quantization_config.quant_method is gptq'], dict(quantization_config=dict(quant_method='gptq', bits=4))),
        ('AWQ', 'qwen3', ['quantization_config.quant_method is awq'], dict(quantization_config=dict(quant_method='awq', bits=4))),
        ('compressed tensors', 'llama', ['compression_config'], dict(compression_config=dict(format='int-quantized'))),
        ('windows without a width', 'qwen2', ['sliding_window'], dict(layer_types=layers)),
        ('too few layer types', 'qwen3', ['layer_types', '3 of'], dict(layer_types=layers[:2])),
        ('an unknown layer type', 'qwen3', ['layer_types'], dict(layer_types=['chunked_attention'] * 3)),
        ('a switch of null', 'llama', ['attention_bias', 'true or false'], dict(attention_bias=None)),
        ('a switch that is a number', 'llama', ['mlp_bias', 'true or false'], dict(mlp_bias=1)),
        ('a size in quotes', 'llama', ['hidden_size', 'positive integer'], dict(hidden_size='16')),
        ('a size of null', 'llama', ['vocab_size is missing'], dict(vocab_size=None)),
        ('more experts a token than experts', 'olmoe', ['num_experts_per_tok', 'at most the 4'], dict(num_experts_per_tok=5)),
        ('too many layers', 'llama', ['num_hidden_layers', 'at most 10000'], dict(num_hidden_layers=10**9)),
        ('too many heads', 'llama', ['num_attention_heads', 'at most 65536'], dict(num_attention_heads=2**33, num_key_value_heads=1, head_dim=2**33)),
        ('too wide a head', 'llama', ['head_dim', 'at most 65536'], dict(head_dim=2**33)),
        ('too many experts', 'qwen3_moe', ['num_experts', 'at most 4096'], dict(num_experts=10**9, num_local_experts=10**9)),
        ('too many experts', 'mixtral', ['num_local_experts', 'at most 4096'], dict(num_local_experts=10**9)),
        ('too wide', 'llama', ['hidden_size', 'at most 16777216'], dict(hidden_size=2**39)),
        ('too many parameters', 'llama', ['parameters', 'at most 1e15'], dict(hidden_size=2**24, intermediate_size=2**24, head_dim=4)),
        ('an end in quotes', 'llama', ['eos_token_id', 'an id or a list of ids'], dict(eos_token_id='2')),
        ('an end that is no integer', 'llama', ['eos_token_id', 'an id or a list of ids'], dict(eos_token_id=2.0)),
        ('ends in quotes', 'llama', ['eos_token_id', 'an id or a list of ids'], dict(eos_token_id=['2'])),
        ('a family that is not built', 'llama', ['model_type is mamba', 'qwen3_moe'], dict(model_type='mamba')),
    ):
        cases.add(name, changed, base, expect='refused', words=words)


def checkpoints(cases):
    """Weights as folders from practice have them."""
    folder, config = cases.base('llama')
    tensors = load_file(folder / 'model.safetensors')

    def made(name, tensors):
        at = cases.out / 'weights' / name.replace(' ', '_')
        at.mkdir(parents=True)
        shutil.copy(folder / 'config.json', at)
        if tensors is not None:
            save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, at / 'model.safetensors', metadata={'format': 'pt'})
        return at

    def add(name, tensors, changed=None, **more):
        at = made(name, tensors)
        cases.add(name, changed or {}, weights=at, **more)
        return at

    def renamed(tensors, rename):
        return {rename(key): tensor for key, tensor in tensors.items()}

    add('without model.', renamed(tensors, lambda key: key.removeprefix('model.')))
    add('model. twice', renamed(tensors, lambda key: 'model.' + key))
    for prefix in ('_orig_mod.', 'base_model.model.', 'language_model.', 'module.'):
        add(f'prefix {prefix}', renamed(tensors, lambda key, prefix=prefix: prefix + key), expect='refused', words=[prefix, 'prefix'])
    add('prefix within', renamed(tensors, lambda key: key.replace('model.', 'model.language_model.', 1)), expect='refused', words=['language_model.'])
    add('compiled layers', renamed(tensors, lambda key: key.replace('.self_attn.', '._orig_mod.self_attn.', 1)), expect='refused', words=['_orig_mod.'])
    add('two weights for one', {**tensors, 'norm.weight': tensors['model.norm.weight']}, expect='refused', words=['norm.weight'])
    moe = load_file(cases.base('mixtral')[0] / 'model.safetensors')
    add('mixtral without model.', renamed(moe, lambda key: key.removeprefix('model.')), base='mixtral')

    tied = dict(tie_word_embeddings=True)
    body = {key: tensor for key, tensor in tensors.items() if key != 'lm_head.weight'}
    embedding = 'model.embed_tokens.weight'
    add('tied', body, tied)
    add('tied with a copy', {**body, 'lm_head.weight': tensors[embedding]}, tied)
    add('tied with another head', tensors, tied, warns=['tie_word_embeddings', 'lm_head.weight'])
    add('tied by the head', {**{key: tensor for key, tensor in body.items() if key != embedding}, 'lm_head.weight': tensors[embedding]}, tied)
    add('tied without model.', renamed(body, lambda key: key.removeprefix('model.')), tied)
    add('no head', body, expect='refused', words=['missing: lm_head.weight'])
    add('no norm', {key: tensor for key, tensor in tensors.items() if 'norm' not in key}, expect='refused', words=['missing: ', 'and 4 more'])

    extra = torch.ones(3)
    add('rotary buffers', {**tensors, 'model.layers.0.self_attn.rotary_emb.inv_freq': extra})
    add('a tensor of no module', {**tensors, 'mtp.fc.weight': extra}, warns=['mtp.fc.weight'])
    add('five of them', {**tensors, **{f'vision_tower.{i}.weight': extra for i in range(5)}}, warns=['vision_tower.2.weight and 2 more'])
    add('a layer too many', {**tensors, **{key.replace('layers.2.', 'layers.3.'): tensor for key, tensor in tensors.items() if 'layers.2.' in key}},
        warns=['model.layers.3.'])
    add('a bias that the config has not', {**tensors, 'model.layers.1.self_attn.q_proj.bias': torch.ones(16)}, expect='refused',
        words=['surplus: model.layers.1.self_attn.q_proj.bias'])
    add('another vocabulary', {**tensors, 'lm_head.weight': torch.ones(40, 16)}, expect='refused', words=['lm_head.weight is [40, 16]'])
    for dtype in (torch.bfloat16, torch.float16):
        add(f'in {dtype}', {key: tensor.to(dtype) for key, tensor in tensors.items()})
    for dtype, name in ((torch.float64, 'F64'), (torch.int8, 'I8'), (torch.float8_e4m3fn, 'F8_E4M3')):
        add(f'in {dtype}', {key: tensor.to(dtype) for key, tensor in tensors.items()}, expect='refused', words=[name, 'float32, bfloat16 and float16'])

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sharded = made('sharded', None)
    model.save_pretrained(sharded, max_shard_size='5KB')
    cases.add('shards', {}, weights=sharded)
    stale = made('stale index', {key: tensor + 0.1 for key, tensor in tensors.items()})
    for file in sharded.glob('model-*'):
        shutil.copy(file, stale)
    shutil.copy(sharded / 'model.safetensors.index.json', stale)
    cases.add('a single file beside an index of shards', {}, weights=stale, warns=['model.safetensors.index.json', 'not read'])
    whole = made('index of one file', tensors)
    (whole / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict.fromkeys(tensors, 'model.safetensors'))))
    cases.add('an index of the single file', {}, weights=whole)

    inside = made('adapter inside', tensors)
    (inside / 'adapter_config.json').write_text('{}')
    cases.add('an adapter beside the weights', {}, weights=inside, expect='refused', words=['adapter_config.json', 'lora.adapter_path', 'merge'])

    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n'
    for name, file, text, words in (
        ('an LFS pointer', 'model.safetensors', pointer, ['git-LFS pointer', 'git lfs pull']),
        ('an LFS pointer of an index', 'model.safetensors.index.json', pointer, ['git-LFS pointer', 'git lfs pull']),
        ('a pickle', 'pytorch_model.bin', '', ['pytorch_model.bin', 'save_pretrained']),
        ('pickles', 'pytorch_model.bin.index.json', '{}', ['pytorch_model.bin.index.json', 'save_pretrained']),
        ('an adapter', 'adapter_model.safetensors', '', ['adapter_model.safetensors', 'base']),
        ("Mistral's own format", 'consolidated.safetensors', '', ['consolidated.safetensors', 'HF format']),
        ('GGUF', 'model.Q4_K_M.gguf', '', ['model.Q4_K_M.gguf', 'HF format']),
        ('nothing', 'README.md', '', ['neither model.safetensors nor model.safetensors.index.json']),
    ):
        at = made(name, None)
        (at / file).write_text(text)
        cases.add(name, {}, weights=at, expect='refused', words=words)


def ends(cases):
    """Tokens that end a generation: folders, each with the ids of transformers, or null where a wrong type is to be refused."""
    folder, config = cases.base('llama')
    found = []
    for index, (eos, generation, is_right) in enumerate((
        (3, None, True), ([3, 4], None, True), (ABSENT, None, True), (None, None, True), (3, {'eos_token_id': 4}, True),
        (3, {'eos_token_id': [4, 5]}, True), (3, {'bos_token_id': 1}, True), (3, {'eos_token_id': None}, True), (ABSENT, {'eos_token_id': 4}, True),
        (3, {'eos_token_id': '4'}, False), (3, {'eos_token_id': 4.0}, False), (3, {'eos_token_id': ['4']}, False), (3, {'eos_token_id': True}, False),
    )):
        at = cases.out / 'ends' / str(index)
        shutil.copytree(folder, at)
        (at / 'generation_config.json').unlink(missing_ok=True)
        changed = {key: value for key, value in {**config, 'eos_token_id': eos}.items() if value is not ABSENT}
        (at / 'config.json').write_text(json.dumps(changed))
        if generation is not None:
            (at / 'generation_config.json').write_text(json.dumps(generation))
        right = None
        if is_right:
            right = transformers.AutoModelForCausalLM.from_pretrained(at).generation_config.eos_token_id
            right = right if isinstance(right, list) else [] if right is None else [right]
        found.append(dict(folder=str(at), right=right))
    return found


if __name__ == '__main__':
    out = Path(sys.argv[1])
    write_defaults(out)
    cases = Cases(out)
    for table in (matrix, rope, fields, checkpoints):
        table(cases)
    (out / 'cases.json').write_text(json.dumps(dict(documents=DOCUMENTS, cases=cases.cases, ends=ends(cases))))
