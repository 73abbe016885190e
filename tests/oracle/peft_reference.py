#!/usr/bin/env python3
"""What transformers and PEFT compute for a model directory and rows of token ids: the truth that our tests compare with.

    peft_reference.py make-adapter MODEL_DIR OUT_DIR [--rank 16] [--alpha 32] [--targets q_proj,…]
                                                   [--parameters mlp.experts.gate_up_proj,…] [--seed 1] [--b-std 0.02]
    peft_reference.py logits MODEL_DIR OUT --rows ROWS.jsonl [--adapter DIR]
    peft_reference.py grads  MODEL_DIR OUT --rows ROWS.jsonl --adapter DIR
    peft_reference.py train  MODEL_DIR OUT --rows ROWS.jsonl --adapter DIR --rows-per-step N [--steps N] [--lr LR[,LR…]]
                             [--weight-decay 0] [--max-grad-norm 1]
                             [--merge-every N --fresh PREFIX --merged DIR [--reset] [--packed nf4|block_fp8|nvfp4]]

A row is {"input_ids", "labels", "document_lengths"}: labels are aligned with the ids (-100: no loss) and default to them;
documents of a packed row run apart, as if they were rows.
After every N-th step `--merge-every` adds the adapter to its base in fp32 and goes on with the one in PREFIX{step}, with a fresh
optimizer if `--reset`; the base of the end goes to DIR. With `--packed` the linear layers of the base have the numbers of that format,
from the start and after every merge. All rows of `grads` are one step; `train` takes N rows a step,
in the order of the file. The loss of a step is the mean over its valid tokens, counted after the shift.

OUT.safetensors holds fp32 tensors, OUT.json numbers:
    logits  logits.{row} [tokens, vocab]
    grads   gradient.{key} for every adapter tensor; {loss, valid_tokens, grad_norm}
    train   final.{key} for every adapter tensor; {losses, valid_tokens, grad_norms} a step, norms before clipping
Keys are those of adapter_model.safetensors. fp32, deterministic; threads as OMP_NUM_THREADS says.
"""
import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SPLIT = 'q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj'
IGNORE = -100


def load(args, trainable: bool = False):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=args.attention)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=trainable)
    return model.eval()


def documents(row: dict):
    """(ids [tokens], labels [tokens]) of every document of a row."""
    ids = torch.tensor(row['input_ids'])
    labels = torch.tensor(row.get('labels', row['input_ids']))
    lengths = row.get('document_lengths') or [len(ids)]
    assert len(labels) == len(ids) == sum(lengths), 'labels and document_lengths must cover input_ids'
    return zip(ids.split(lengths), labels.split(lengths))


def valid_tokens(rows: list[dict]) -> int:
    return sum(int((labels[1:] != IGNORE).sum()) for row in rows for _, labels in documents(row))


def backward(model, rows: list[dict]) -> float:
    """Adds the gradients of the step and returns its loss. One document at a time, so long steps fit in memory."""
    valid, loss = valid_tokens(rows), 0.0
    for row in rows:
        for ids, labels in documents(row):
            if not (labels[1:] != IGNORE).any():
                continue
            logits = model(input_ids=ids[None]).logits[0, :-1]
            part = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction='sum') / valid
            part.backward()
            loss += part.item()
    return loss


def adapter_parameters(model) -> dict[str, torch.nn.Parameter]:
    """By the names that PEFT saves."""
    return {name.replace('.default.', '.'): p for name, p in model.named_parameters() if p.requires_grad}


def norm(tensors) -> float:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt().item()


def write(out: str, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
    """Under the final names last and whole: a killed run leaves nothing that looks like a result."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for name, save in ((f'{out}.safetensors', lambda path: save_file(tensors, path)),
                       (f'{out}.json', lambda path: Path(path).write_text(json.dumps(numbers)))):
        save(f'{name}.tmp')
        Path(f'{name}.tmp').replace(name)


def make_adapter(args) -> None:
    """PEFT's own start for A, and a B that is not zero, so that every gradient and every delta counts."""
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=args.targets.split(','),
                                             target_parameters=args.parameters and args.parameters.split(','),
                                             task_type='CAUSAL_LM'))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_B' in name:
                parameter.normal_(std=args.b_std)
    model.save_pretrained(args.out)


def logits(args, rows: list[dict]) -> None:
    model = load(args)
    with torch.no_grad():
        found = {f'logits.{i}': torch.cat([model(input_ids=ids[None]).logits[0] for ids, _ in documents(row)]).contiguous()
                 for i, row in enumerate(rows)}
    write(args.out, found, {'rows': len(rows)})


def grads(args, rows: list[dict]) -> None:
    model = load(args, trainable=True)
    loss = backward(model, rows)
    found = {f'gradient.{name}': p.grad for name, p in adapter_parameters(model).items()}
    write(args.out, found, {'loss': loss, 'valid_tokens': valid_tokens(rows), 'grad_norm': norm(found.values())})


@torch.no_grad()
def merge(model, packed: str | None) -> None:
    """Adds every delta to its base weight, by PEFT's own formula; the adapter stays as it is."""
    for module in list(model.modules()):
        if isinstance(module, LoraLayer) and module.lora_A:
            is_expert = hasattr(module, 'get_param')
            weight = module.get_param() if is_expert else module.get_base_layer().weight
            weight += module.get_delta_weight('default')
            if packed:
                repack(weight, packed, module.parameter_name if is_expert else 'weight')


def repack(weight, how: str, name: str) -> None:
    """The numbers of format `how`; imported late, as it needs bitsandbytes."""
    from dequantized import requantize
    requantize(weight, how, name)


def train(args, rows: list[dict]) -> None:
    model = load(args, trainable=True)
    if args.packed:
        from dequantized import dequantize
        dequantize(model, args.packed)
    parameters = adapter_parameters(model)
    rates = [float(rate) for rate in args.lr.split(',')]
    steps = args.steps or len(rows) // args.rows_per_step
    assert steps * args.rows_per_step <= len(rows), f'{steps} steps of {args.rows_per_step} need more than {len(rows)} rows'
    optimizer = torch.optim.AdamW(parameters.values(), lr=rates[0], betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay)
    numbers = {'losses': [], 'valid_tokens': [], 'grad_norms': []}
    for step in range(steps):
        batch = rows[step * args.rows_per_step:(step + 1) * args.rows_per_step]
        optimizer.zero_grad()
        numbers['losses'].append(backward(model, batch))
        numbers['valid_tokens'].append(valid_tokens(batch))
        numbers['grad_norms'].append(norm(p.grad for p in parameters.values()))
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters.values(), args.max_grad_norm)
        for group in optimizer.param_groups:
            group['lr'] = rates[min(step, len(rates) - 1)]
        optimizer.step()
        if args.merge_every and (step + 1) % args.merge_every == 0:
            merge(model, args.packed)
            set_peft_model_state_dict(model, load_file(f'{args.fresh}{step + 1}/adapter_model.safetensors'))
            if args.reset:
                optimizer.state.clear()
    if args.merged:
        finals = {name: p.detach().clone() for name, p in parameters.items()}
        assert all(not p.any() for name, p in finals.items() if 'lora_B' in name), 'the base is whole right after a merge'
        write(args.out, {}, numbers)
        return model.merge_and_unload().save_pretrained(args.merged)
    write(args.out, {f'final.{name}': p.detach().clone() for name, p in parameters.items()}, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    def command(name: str, **options):
        sub = commands.add_parser(name)
        sub.add_argument('model')
        sub.add_argument('out')
        for option, settings in options.items():
            sub.add_argument('--' + option.replace('_', '-'), **settings)
        return sub

    rows = dict(rows=dict(required=True), attention=dict(default='eager', choices=['eager', 'sdpa']))
    command('make-adapter', rank=dict(type=int, default=16), alpha=dict(type=float, default=32), targets=dict(default=SPLIT), parameters={},
            seed=dict(type=int, default=1), b_std=dict(type=float, default=0.02))
    command('logits', adapter={}, **rows)
    command('grads', adapter=dict(required=True), **rows)
    command('train', adapter=dict(required=True), rows_per_step=dict(type=int, required=True), steps=dict(type=int),
            lr=dict(default='1e-4', help='one, or one a step; the last holds on'), weight_decay=dict(type=float, default=0.0),
            max_grad_norm=dict(type=float, default=1.0, help='0: no clipping'), merge_every=dict(type=int), fresh={}, merged={}, packed={},
            reset=dict(action='store_true'), **rows)
    args = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    if args.command == 'make-adapter':
        return make_adapter(args)
    with open(args.rows, encoding='utf-8') as file:
        given = [json.loads(line) for line in file if line.strip()]
    {'logits': logits, 'grads': grads, 'train': train}[args.command](args, given)


if __name__ == '__main__':
    main()
