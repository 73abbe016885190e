#!/usr/bin/env python3
"""Runs the same trainings with two builds and compares their results bit for bit.

    same_bits.py BEFORE AFTER             all tiny models and SmolLM2-135M, worlds 1, 2 and 4, ep 1 and 2
    same_bits.py BEFORE AFTER --quick     tiny models on worlds 1 and 2 only

A training is 10 steps in fp32 on CPU ranks of one thread. Compared are, of metrics.jsonl, step, epoch, loss, grad_norm, lr, tokens
and the router's numbers; the bytes of adapter_model.safetensors; and the optimizer's state, parameter by parameter. SmolLM2 also
generates with the adapter it has learnt. Bytes received by collectives are compared too, but a difference is only counted.

A tiny model of each family has random weights, biases and norms in files of its own. Its cases run in turn through the LoRA targets
(one by one, fused, split GEMMs, shared factors of experts) and through the ways of computing (recompute, slots, reductions, packs).

BEFORE runs each case once for all calls (kept in --work, by the hash of the program); --fresh runs it again. Either may be a debug
build: fp32 results do not depend on the optimization level (all quick cases are equal between a release and a debug build). AFTER
may also be a script that calls a program with more arguments. Exit code 1: something differs.
"""
import argparse
import array
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10
LIMIT_SECONDS = 900
# Of metrics.jsonl: what depends on the machine, and the traffic, which is no result.
MACHINE = {'tokens_per_second', 'step_seconds', 'phase_seconds', 'peak_rss_bytes', 'device_memory_bytes'}
TRAFFIC = 'comm_bytes'

# --- models

# Padding of packs is stated: router statistics count it, and its default is not that of every build.
COMMON = {'pad_token_id': 0, 'vocab_size': 503, 'hidden_size': 48, 'intermediate_size': 80, 'num_hidden_layers': 2, 'num_attention_heads': 4,
          'num_key_value_heads': 2, 'head_dim': 16, 'rms_norm_eps': 1e-6, 'rope_theta': 10000.0, 'tie_word_embeddings': False}
LLAMA3_ROPE = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_max_position_embeddings': 8}
EXPERTS = {'num_experts': 12, 'num_experts_per_tok': 2}
MODELS = {
    'llama': {'attention_bias': True, 'mlp_bias': True, 'rope_scaling': LLAMA3_ROPE},
    'mistral': {'sliding_window': 6},
    'qwen2': {'tie_word_embeddings': True},
    'qwen3': {'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
    'mixtral': {'num_local_experts': 12, 'num_experts_per_tok': 2, 'intermediate_size': 24},
    'olmoe': {**EXPERTS, 'intermediate_size': 24, 'clip_qkv': 0.5, 'norm_topk_prob': False},
    'qwen2_moe': {**EXPERTS, 'moe_intermediate_size': 24, 'shared_expert_intermediate_size': 40, 'norm_topk_prob': False},
    'qwen3_moe': {**EXPERTS, 'moe_intermediate_size': 24, 'mlp_only_layers': [0], 'decoder_sparse_step': 1, 'norm_topk_prob': True},
}
MIXTURES = ['mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe']
# Files in bf16, which fp32 runs widen; the others are in fp32.
IN_BF16 = ['mistral', 'qwen2_moe']


def config_of(family: str) -> dict:
    return {**COMMON, 'model_type': family, **MODELS[family]}


def tensors_of(family: str) -> dict[str, list[int]]:
    """Names and shapes in the files of a tiny model, as Hugging Face has them."""
    config = config_of(family)
    hidden, wide, head = config['hidden_size'], config['intermediate_size'], config['head_dim']
    heads, kv_heads = config['num_attention_heads'] * head, config['num_key_value_heads'] * head
    shapes = {'model.embed_tokens.weight': [config['vocab_size'], hidden], 'model.norm.weight': [hidden]}
    if not config['tie_word_embeddings']:
        shapes['lm_head.weight'] = [config['vocab_size'], hidden]

    def mlp(block: str, width: int, names=('gate_proj', 'up_proj', 'down_proj')) -> None:
        gate, up, down = names
        shapes[f'{block}.{gate}.weight'] = shapes[f'{block}.{up}.weight'] = [width, hidden]
        shapes[f'{block}.{down}.weight'] = [hidden, width]

    for layer in range(config['num_hidden_layers']):
        at = f'model.layers.{layer}'
        shapes[f'{at}.input_layernorm.weight'] = shapes[f'{at}.post_attention_layernorm.weight'] = [hidden]
        for name, width in (('q', heads), ('k', kv_heads), ('v', kv_heads)):
            shapes[f'{at}.self_attn.{name}_proj.weight'] = [width, hidden]
            if family in ('llama', 'qwen2', 'qwen2_moe'):
                shapes[f'{at}.self_attn.{name}_proj.bias'] = [width]
        shapes[f'{at}.self_attn.o_proj.weight'] = [hidden, heads]
        if family == 'llama':
            shapes[f'{at}.self_attn.o_proj.bias'] = [hidden]
        if family in ('qwen3', 'qwen3_moe'):
            shapes[f'{at}.self_attn.q_norm.weight'] = shapes[f'{at}.self_attn.k_norm.weight'] = [head]
        if family == 'olmoe':
            shapes[f'{at}.self_attn.q_norm.weight'], shapes[f'{at}.self_attn.k_norm.weight'] = [heads], [kv_heads]
        if family not in MIXTURES or layer in config.get('mlp_only_layers', []):
            mlp(f'{at}.mlp', wide)
            if family == 'llama':
                shapes |= {f'{at}.mlp.{name}_proj.bias': [width] for name, width in (('gate', wide), ('up', wide), ('down', hidden))}
            continue
        block, names = (f'{at}.block_sparse_moe', ('w1', 'w3', 'w2')) if family == 'mixtral' else (f'{at}.mlp', None)
        experts = config.get('num_experts') or config['num_local_experts']
        shapes[f'{block}.gate.weight'] = [experts, hidden]
        for expert in range(experts):
            mlp(f'{block}.experts.{expert}', config.get('moe_intermediate_size', wide), *([names] if names else []))
        if family == 'qwen2_moe':
            mlp(f'{block}.shared_expert', config['shared_expert_intermediate_size'])
            shapes[f'{block}.shared_expert_gate.weight'] = [1, hidden]
    return shapes


def write_model(family: str, folder: Path) -> None:
    """config.json and model.safetensors: matrices N(0, 0.15²), biases N(0, 0.1²), norms around 1."""
    draw = random.Random(f'weights of {family}')
    header, data = {}, bytearray()
    for name, shape in tensors_of(family).items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        mean, deviation = (0, 0.15) if len(shape) > 1 else (0, 0.1) if name.endswith('bias') else (1, 0.1)
        values = array.array('f', (draw.gauss(mean, deviation) for _ in range(count)))
        raw = values.tobytes()
        if family in IN_BF16:
            raw = b''.join(raw[i + 2:i + 4] for i in range(0, len(raw), 4))
        header[name] = {'dtype': 'BF16' if family in IN_BF16 else 'F32', 'shape': shape,
                        'data_offsets': [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    (folder / 'config.json').write_text(json.dumps(config_of(family)))
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + data)


def write_rows(path: Path, vocabulary: int, rows: int, longest: int) -> None:
    """Token ids of different lengths from 3 on, the first two tokens of each row without a label."""
    draw = random.Random('rows')
    with path.open('w') as file:
        for row in range(rows):
            ids = [draw.randrange(vocabulary) for _ in range(3 + row * 5 % (longest - 2))]
            file.write(json.dumps({'input_ids': ids, 'labels': [-100, -100, *ids[2:]]}) + '\n')


# --- cases

ATTENTION, LEAVES = ['q_proj', 'k_proj', 'v_proj', 'o_proj'], ['gate_proj', 'up_proj', 'down_proj']
FUSED = ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj']
# Sections `model` and `lora` of run.yaml, by what is adapted.
DENSE_TARGETS = {
    'one by one': {'lora': {'lora_target_modules': ATTENTION + LEAVES}},
    'fused': {'lora': {'lora_target_modules': FUSED}},
    'split GEMMs': {'model': {'merge_qkv': False}, 'lora': {'unfuse_for_lora': True}},
    'some': {'lora': {'lora_target_modules': ['layers.1.*.q_proj', 'v_proj', 'gate_up_proj', 'layers.0.*.down_proj']}},
}
MIXTURE_TARGETS = {
    'one by one': DENSE_TARGETS['one by one'],
    'fused': DENSE_TARGETS['fused'],
    'shared factors': {'lora': {'lora_target_modules': ATTENTION + LEAVES, 'moe_hybrid_shared_lora': True}},
    'fused, shared factors': {'lora': {'lora_target_modules': FUSED, 'moe_hybrid_shared_lora': True}},
    'split GEMMs': DENSE_TARGETS['split GEMMs'],
}
PACKED = {'sample_packing_method': 'sequential', 'sample_packing_sequence_len': 40, 'pad_to_multiple_of': 8}
ALONE = {'sample_packing_method': 'none'}
# Sections `train` and `data`: taken by the cases in turn.
WAYS = {
    'recompute': {'train': {'gradient_checkpointing_method': 'recompute_full_layer', 'micro_batch_size': 2}, 'data': ALONE},
    'selective, 1 slot': {'train': {'gradient_checkpointing_method': 'selective', 'reduce_gradients': 'micro_batch', 'ring_slots': 1,
                                    'weight_decay': 0.01}, 'data': PACKED},
    'nothing again': {'train': {'enable_gradient_checkpointing': False, 'reshard_after_forward': False, 'lr_decay_style': 'cosine',
                                'lr_warmup_ratio': 0.2}, 'data': PACKED},
    'chunks': {'train': {'gradient_checkpointing_method': 'no_recompute', 'vocab_chunk_rows': 100, 'loss_chunk_tokens': 16,
                         'micro_batch_size': 3, 'ring_slots': 3, 'max_grad_norm': 0.0}, 'data': ALONE},
    'sgd': {'train': {'optimizer': 'sgd', 'lr': 0.5, 'reduce_gradients': 'micro_batch'}, 'data': PACKED},
}


@dataclass(frozen=True)
class Layout:
    world: int
    experts_over: int = 1
    replicas: int = 1

    def __str__(self) -> str:
        ep = f', ep {self.experts_over}' if self.experts_over > 1 else ''
        return f'{self.world} rank{"s" * (self.world > 1)}{ep}{f", {self.replicas} replicas" if self.replicas > 1 else ""}'


@dataclass(frozen=True)
class Case:
    model: str
    layout: Layout
    targets: str
    way: str

    def __str__(self) -> str:
        return f'{self.model}, {self.layout}, {self.targets}, {self.way}'

    @property
    def is_tiny(self) -> bool:
        return self.model != 'smollm2'

    def sections(self) -> list[dict]:
        known = MIXTURE_TARGETS if self.model in MIXTURES else DENSE_TARGETS
        return [known[self.targets], WAYS[self.way]]


def layouts_of(model: str, quick: bool) -> list[Layout]:
    dense, mixture = [Layout(1), Layout(2)], [Layout(1), Layout(2), Layout(2, 2)]
    if not quick:
        dense += [Layout(4), Layout(4, replicas=2)]
        mixture += [Layout(4), Layout(4, 2), Layout(4, 2, 2)]
    return mixture if model in MIXTURES else dense


def cases(quick: bool) -> list[Case]:
    """Quick: each model on each layout once. Otherwise with all targets. The ways come in turn."""
    found = []
    for i, model in enumerate(MODELS):
        targets = list(MIXTURE_TARGETS if model in MIXTURES else DENSE_TARGETS)
        for j, layout in enumerate(layouts_of(model, quick)):
            for name in [targets[(i + j) % len(targets)]] if quick else targets:
                # Families in turn begin with another way, so that a layout meets them all.
                found.append(Case(model, layout, name, list(WAYS)[(len(found) + i) % len(WAYS)]))
    if not quick:
        found += [Case('smollm2', Layout(world), targets, way) for world, targets, way in (
            (1, 'one by one', 'nothing again'), (1, 'fused', 'recompute'), (2, 'one by one', 'recompute'),
            (2, 'fused', 'selective, 1 slot'), (4, 'one by one', 'nothing again'))]
    return found


# --- runs

class Failed(Exception):
    """A run that did not end well."""


class Build:
    """A program and the folder of its results."""

    def __init__(self, program: Path, work: Path):
        self.program = program.resolve()
        self.work = work / hashlib.sha256(self.program.read_bytes()).hexdigest()[:16]
        self.work.mkdir(parents=True, exist_ok=True)

    def train(self, case: Case, material: 'Material', fresh: bool) -> Path:
        """The output directory of `case`; with `fresh` not one that is there already."""
        run = material.run_of(case)
        digest = hashlib.sha256(json.dumps([run, str(case.layout), material.digest(case)]).encode()).hexdigest()
        final = self.work / digest[:16]
        if final.is_dir() and not fresh:
            return final
        folder = Path(tempfile.mkdtemp(dir=self.work, prefix='unfinished-'))
        run['train']['output_dir'] = str(folder)
        (folder / 'run.json').write_text(json.dumps(run))
        self.call(case.layout.world, ['--device', 'cpu', '--config', folder / 'run.json'])
        if not case.is_tiny:
            prompts = folder / 'prompts.jsonl'
            prompts.write_text(json.dumps({'messages': [{'role': 'user', 'content': 'Count: 1, 2, 3'}]}) + '\n')
            self.call(case.layout.world, ['generate', '--model', material.folder(case.model), '--adapter', step_of(folder), '--device', 'cpu',
                                          '--chat-file', prompts, '--max-new-tokens', 8, '--dtype', 'float32', '--out',
                                          folder / 'completions.jsonl'])
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        return final

    def call(self, ranks: int, arguments: list) -> None:
        launch = ['mpirun', '-n', str(ranks)] if ranks > 1 else []
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'OMPI_ALLOW_RUN_AS_ROOT': '1',
                       'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1', 'OMPI_MCA_rmaps_base_oversubscribe': '1',
                       # A rank that waits must not keep a busy machine from the rank that it waits for.
                       'OMPI_MCA_mpi_yield_when_idle': '1'}
        command = [*launch, str(self.program), *map(str, arguments)]
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_SECONDS)
        if done.returncode != 0:
            raise Failed(f'{" ".join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}')


class Material:
    """Models and rows."""

    def __init__(self, work: Path, smollm2: Path, bf16: bool):
        self.work, self.smollm2, self.bf16 = work / 'material', smollm2, bf16
        self.digests: dict[str, str] = {}

    def folder(self, model: str) -> Path:
        """The directory of the model, made where it is missing; rows.jsonl of a tiny one is in it."""
        if model == 'smollm2':
            return self.smollm2
        # By this script: another version of it makes other models.
        folder = self.work / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16] / model
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
            write_model(model, unfinished)
            write_rows(unfinished / 'rows.jsonl', COMMON['vocab_size'], 60, 17)
            try:
                unfinished.rename(folder)
            except OSError:  # another call was first
                shutil.rmtree(unfinished)
        return folder

    def rows(self, model: str) -> Path:
        if model != 'smollm2':
            return self.folder(model) / 'rows.jsonl'
        path = self.work / 'smollm2.jsonl'
        self.work.mkdir(parents=True, exist_ok=True)
        write_rows(path, 49152, 20, 24)
        return path

    def digest(self, case: Case) -> str:
        if case.model not in self.digests:
            weights = sorted(self.folder(case.model).glob('*.safetensors'))
            of = hashlib.sha256()
            for path in [*weights, self.rows(case.model), self.folder(case.model) / 'config.json']:
                of.update(path.read_bytes())
            self.digests[case.model] = of.hexdigest()
        return self.digests[case.model]

    def run_of(self, case: Case) -> dict:
        """The configuration, but for its output_dir."""
        run = {
            'model': {'model_path': str(self.folder(case.model))},
            'data': {'datasets': [{'path': str(self.rows(case.model)), 'type': 'tokenized'}]},
            # A number of rows that the ranks do not divide.
            'train': {'max_steps': STEPS, 'num_train_epochs': 20, 'global_batch_size': 5 if case.is_tiny else 3, 'save_epochs': 0,
                      'lr': 5e-3 if case.is_tiny else 1e-3, 'max_grad_norm': 0.5, 'enable_mixed_precision': self.bf16,
                      'data_parallel_replicate_size': case.layout.replicas, 'expert_parallel_size': case.layout.experts_over},
            'lora': {'lora_rank': 4, 'lora_alpha': 8, 'lora_b_init_std': 0.05 if case.is_tiny else 0.01},
        }
        for more in case.sections():
            for section, fields in more.items():
                run[section].update(fields)
        return run


# --- what a run has left

def step_of(output: Path) -> Path:
    return output / f'weights/run/step_{STEPS}'


def safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> dtype, shape, bytes."""
    raw = path.read_bytes()
    length, = struct.unpack_from('<Q', raw)
    header = json.loads(raw[8:8 + length])
    header.pop('__metadata__', None)
    found = {}
    for name, entry in header.items():
        begin, end = entry['data_offsets']
        found[name] = entry['dtype'], entry['shape'], raw[8 + length + begin:8 + length + end]
    return found


def optimizer_state(step: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """`{parameter}.{state}` -> dtype, shape, bytes: put together from the pieces of all ranks."""
    state = json.loads((step / 'training_state/trainer_state.json').read_text())
    shards, world = state['shards'], state['world']
    files = [safetensors(step / f'training_state/optimizer-{shard}-of-{world}.safetensors') for shard in range(shards)]
    found = {}
    # Regions have names since format 3; before, their place in `units` was the key.
    for index, region in enumerate(state.get('regions') or state['units']):
        name = region.get('name', f'unit.{index}')
        groups = region.get('expert_groups', 1)
        each = shards // groups
        kinds = {kind for key in files[0] for owner, kind in [key.rsplit('.', 1)] if owner == name}
        for kind in kinds:
            # Shard s has piece s // groups of the group s mod groups; groups lie one after another.
            order = [piece % each * groups + piece // each for piece in range(shards)]
            flat = b''.join(files[shard][f'{name}.{kind}'][2] for shard in order)
            for parameter in region['parameters'] if flat else []:
                rows, columns = parameter['shape']
                at = 4 * parameter['first']
                found[f'{parameter["name"]}.{kind}'] = 'F32', parameter['shape'], flat[at:at + 4 * rows * columns]
    if not found:
        raise Failed(f'{step}: no optimizer state that this script can read (format {state.get("format")})')
    return found


class Comparison:
    """Counts, and the differences of a case in words."""

    def __init__(self):
        self.counts = {'cases': 0, 'cases_equal': 0, 'steps': 0, 'adapter_tensors': 0, 'state_tensors': 0, 'completions': 0,
                       'traffic_differs': 0}
        self.differences: list[str] = []

    def case(self, case: Case, before: Path, after: Path) -> list[str]:
        found = self._metrics(before, after)
        read = [safetensors(step_of(folder) / 'adapter_model.safetensors') for folder in (before, after)]
        found += self._tensors('adapter_tensors', *read)
        whole = [(step_of(folder) / 'adapter_model.safetensors').read_bytes() for folder in (before, after)]
        if not found and whole[0] != whole[1]:
            found.append('adapter_model.safetensors: equal tensors, another header')
        found += self._tensors('state_tensors', *(optimizer_state(step_of(folder)) for folder in (before, after)))
        if not case.is_tiny:
            self.counts['completions'] += 1
            if len({(folder / 'completions.jsonl').read_text() for folder in (before, after)}) > 1:
                found.append('completions.jsonl differs')
        self.counts['cases'] += 1
        self.counts['cases_equal'] += not found
        self.differences += [f'{case}: {words}' for words in found]
        return found

    def _metrics(self, before: Path, after: Path) -> list[str]:
        lines = [[json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()] for folder in (before, after)]
        if [len(of) for of in lines] != [STEPS, STEPS]:
            return [f'metrics.jsonl: {len(lines[0])} and {len(lines[1])} steps, not {STEPS}']
        found = []
        self.counts['traffic_differs'] += any(a.get(TRAFFIC) != b.get(TRAFFIC) for a, b in zip(*lines))
        for field in [field for field in lines[0][0] if field not in MACHINE | {TRAFFIC}]:
            # The first step that differs: later ones follow from it.
            for a, b in zip(*lines):
                if a[field] != b.get(field):
                    found.append(f'{field} of step {a["step"]}: {a[field]}, then {b.get(field)}')
                    break
        self.counts['steps'] += STEPS
        return found

    def _tensors(self, count: str, before: dict, after: dict) -> list[str]:
        self.counts[count] += len(before)
        found = [f'{name}: is there only {when}' for names, when in ((before.keys() - after, 'before'), (after.keys() - before, 'after'))
                 for name in sorted(names)]
        different = [name for name in before if name in after and before[name] != after[name]]
        if different:
            worst = max(different, key=lambda name: distance(before[name], after[name]))
            found.append(f'{len(different)} of {len(before)} {count} differ, most of all {worst}: '
                         f'relative L2 {distance(before[worst], after[worst]):.2e}')
        return found


def distance(before: tuple, after: tuple) -> float:
    """‖after - before‖ / ‖before‖; infinite where they are not fp32 of one shape."""
    if before[:2] != after[:2] or before[0] != 'F32':
        return float('inf')
    a, b = array.array('f', before[2]), array.array('f', after[2])
    norm = sum(x * x for x in a) ** 0.5
    return sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5 / norm if norm else float('inf')


# --- all of it

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', type=Path, metavar='BEFORE', help='a program xorl-dist')
    parser.add_argument('after', type=Path, metavar='AFTER', help='another one')
    parser.add_argument('--quick', action='store_true', help='tiny models on worlds 1 and 2, under a minute')
    parser.add_argument('--only', metavar='WORDS', help='only cases whose name, as printed, has these words')
    parser.add_argument('--bf16', action='store_true', help='compute in bf16, for which equal bits are not promised')
    parser.add_argument('--fresh', action='store_true', help='run BEFORE anew too')
    parser.add_argument('--work', type=Path, default=ROOT / 'target/same_bits', help='folder of models and results')
    parser.add_argument('--smollm2', type=Path, default=ROOT / 'models/smollm2', help='directory of SmolLM2-135M')
    return parser.parse_args()


def main() -> None:
    args, began = arguments(), time.time()
    material = Material(args.work.resolve(), args.smollm2.resolve(), args.bf16)
    before, after = Build(args.before, args.work.resolve()), Build(args.after, args.work.resolve() / 'after')
    comparison = Comparison()
    chosen = [case for case in cases(args.quick) if (args.only or '') in str(case)]
    for case in chosen:
        start = time.time()
        one, other = before.train(case, material, args.fresh), after.train(case, material, fresh=True)
        found = comparison.case(case, one, other)
        shutil.rmtree(other)
        print(f'{case}: {"DIFFERS" if found else "equal"} ({time.time() - start:.1f} s)', file=sys.stderr, flush=True)
        for words in found:
            print(f'    {words}', file=sys.stderr, flush=True)
    print(json.dumps({'same_bits': {**comparison.counts, 'seconds': round(time.time() - began), 'differences': comparison.differences}}))
    sys.exit(1 if comparison.differences or not chosen else 0)


if __name__ == '__main__':
    try:
        main()
    except (Failed, subprocess.TimeoutExpired) as failure:
        sys.exit(f'same_bits: {failure}')
