"""Adapters as they are met, and what PEFT computes with each.

    adapters.py make OUT         writes models and adapters, logits.safetensors beside each that PEFT loads, and OUT/cases.json
    adapters.py reload OUT ...   prints for each `MODEL ADAPTER` pair of arguments; logits go to ADAPTER/logits.safetensors

cases.json lists {kind, name, field, model, path, loads, same}: `loads` says if PEFT loads it, `same` if its logits are those of the
adapter that was changed. Kind `field` is one changed field of LoraConfig, kind `input` something whole.
"""
import dataclasses
import json
import os
import shutil
import sys
import warnings

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

SIZES = dict(vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=256)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(3, 131, (1, 24), generator=torch.Generator().manual_seed(5))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base(model):
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def logits(model, adapter):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base(model), adapter).eval()(IDS).logits[0]


class Maker:
    def __init__(self, out):
        self.out, self.cases = out, []
        self.models = {"llama": self.model("Llama"),
                       "moe": self.model("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)}

    def model(self, family, **more):
        torch.manual_seed(0)
        config = getattr(transformers, family + "Config")(**{**SIZES, **more})
        path = f"{self.out}/{family}"
        getattr(transformers, family + "ForCausalLM")(config).float().save_pretrained(path)
        return path

    def adapter(self, name, model="llama", **settings):
        """An adapter of PEFT whose every A and B counts."""
        torch.manual_seed(7)
        fields = dict(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(base(self.models[model]), peft.LoraConfig(**{**fields, **settings}))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        path = f"{self.out}/{name.replace(' ', '_')}"
        adapted.save_pretrained(path)
        return path

    def changed(self, name, of, **fields):
        """A copy of the adapter `of` with other fields in its configuration; `...` takes one out."""
        path = f"{self.out}/{name.replace(' ', '_').replace('/', '_')}"
        shutil.copytree(of, path)
        config = json.load(open(f"{path}/{CONFIG}"))
        for field, value in fields.items():
            config[field] = value
            if value is ...:
                del config[field]
        json.dump(config, open(f"{path}/{CONFIG}", "w"))
        return path

    def case(self, path, name, accept, kind="input", field="", model="llama", like=None):
        try:
            found = logits(self.models[model], path)
            save_file({"logits": found.contiguous()}, f"{path}/logits.safetensors")
        except Exception:
            found = None
        same = found is not None and like is not None and torch.equal(found, like)
        self.cases.append(dict(kind=kind, name=name, field=field, model=self.models[model], path=path, accept=accept,
                               loads=found is not None, same=same))


# Values of fields of which another one cannot be told by the type.
VALUES = {
    "r": [8], "lora_alpha": [16, 3.5], "peft_type": ["IA3"], "task_type": ["SEQ_CLS"], "bias": ["all", "lora_only"],
    "target_modules": [None, ["q_proj"], ".*q_proj", r".*\.(self_attn|mlp)\.\w+_proj", "all-linear", []],
    "exclude_modules": [["q_proj"], r".*layers\.1\..*", ["lm_head"]], "modules_to_save": [["lm_head"]],
    "init_lora_weights": [False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "lora_ga", "mica"],
    "layers_to_transform": [1, [0, 2], [0, 1, 2], []], "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 8}, {"nothing": 8}],
    "alpha_pattern": [{"q_proj": 32}, {r"layers\.1\.self_attn.q_proj": 2.5, "q_proj": 1}],
    "megatron_config": [{"x": 1}], "megatron_core": ["megatron.other"], "trainable_token_indices": [[1, 2]],
    "loftq_config": [{"loftq_bits": 4}], "eva_config": [{"rho": 2.0}], "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArBr"}], "velora_config": [{"num_groups": 2}], "alora_invocation_tokens": [[1, 2, 3]],
    "monteclora_config": [{"num_samples": 4}], "layer_replication": [[[0, 2], [1, 3]]], "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}], "kasa_config": [{"beta": 1e-3}], "runtime_config": [{"ephemeral_gpu_offload": True}],
    "target_parameters": [["self_attn.q_proj.weight"]], "auto_mapping": [{"base_model_class": "X"}], "peft_version": ["0.9.0"],
    "base_model_name_or_path": ["elsewhere"], "revision": ["v2"],
}


def fields(maker):
    """Every field of LoraConfig with another value, over tensors that stay as they are."""
    plain = maker.adapter("plain")
    like = logits(maker.models["llama"], plain)
    for field in dataclasses.fields(peft.LoraConfig):
        default = json.load(open(f"{plain}/{CONFIG}")).get(field.name)
        by_type = [not default] if isinstance(default, bool) else [default + 1] if isinstance(default, (int, float)) else []
        values = VALUES.get(field.name) or by_type
        assert values, f"no other value is known for {field.name}"
        for number, value in enumerate(values):
            path = maker.changed(f"field_{field.name}_{number}", plain, **{field.name: value})
            maker.case(path, f"{field.name} = {json.dumps(value)}", None, kind="field", field=field.name, like=like)


def rewrite(path, change):
    tensors = change(load_file(f"{path}/{WEIGHTS}"))
    save_file(tensors, f"{path}/{WEIGHTS}")


def pickled(path, change=lambda tensors: tensors, **how):
    torch.save(change(load_file(f"{path}/{WEIGHTS}")), f"{path}/adapter_model.bin", **how)
    os.remove(f"{path}/{WEIGHTS}")


def inputs(maker):
    plain = f"{maker.out}/plain"

    def made(name, accept=True, model="llama", **settings):
        maker.case(maker.adapter(name, model, **settings), name, accept, model=model)

    def copied(name, accept, then=None, **changes):
        path = maker.changed(name, plain, **changes)
        if then:
            then(path)
        maker.case(path, name, accept)

    made("rslora", use_rslora=True)
    made("ranks by leaf", rank_pattern={"q_proj": 8, "down_proj": 2})
    made("ranks by expression, the first counts", rank_pattern={r"layers\.1\..*v_proj": 6, "v_proj": 3})
    made("ranks by path as EVA names them", rank_pattern={"model.layers.2.mlp.up_proj": 7, "model.layers.0.self_attn.o_proj": 1})
    made("alphas by leaf and by layer", alpha_pattern={r"layers\.0\..*": 1.5, "gate_proj": 20})
    made("ranks and alphas with rslora", use_rslora=True, rank_pattern={"k_proj": 9, "mlp.*": 2}, alpha_pattern={"k_proj": 5})
    made("expression with look-ahead", target_modules=r"model\.layers\.(?!1\.)\d+\..*(q|v|up)_proj")
    made("two layers", layers_to_transform=[0, 2])
    made("one layer of a named list", layers_to_transform=1, layers_pattern="layers")
    made("modules left out", exclude_modules=["k_proj", "layers.1.mlp.up_proj"])
    made("modules left out by expression", exclude_modules=r".*\.2\.self_attn\..*")
    made("whole paths", target_modules=["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"])
    made("all-linear", target_modules="all-linear")
    made("gaussian start", init_lora_weights="gaussian")
    made("fraction as alpha", lora_alpha=2.5)
    made("experts", model="moe", target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS)
    made("experts of another rank", model="moe", target_modules=["q_proj"], target_parameters=EXPERTS,
         rank_pattern={"experts.gate_up_proj": 8, "q_proj": 2})
    made("experts of another rank, with a dot escaped", model="moe", target_modules=["q_proj"], target_parameters=EXPERTS,
         rank_pattern={r".*experts\.gate_up_proj": 8})
    made("experts of another alpha", model="moe", target_modules=["q_proj"], target_parameters=EXPERTS,
         alpha_pattern={"experts.down_proj": 3, "experts.gate_up_proj": 20})
    made("experts with rslora", model="moe", target_modules=["v_proj"], target_parameters=EXPERTS, use_rslora=True,
         rank_pattern={r"layers\.1\.mlp\.experts\.down_proj": 2})

    default = {f".lora_{x}.weight": f".lora_{x}.default.weight" for x in "AB"}

    def renamed(tensors):
        for short, long in default.items():
            tensors = {key.replace(short, long): value for key, value in tensors.items()}
        return tensors

    copied("keys with .default.", True, lambda path: rewrite(path, renamed))
    copied("bf16", True, lambda path: rewrite(path, lambda t: {k: v.bfloat16() for k, v in t.items()}))
    copied("fp16", True, lambda path: rewrite(path, lambda t: {k: v.half() for k, v in t.items()}))
    copied("pickled", True, pickled)
    copied("pickled bf16 parameters", True,
           lambda path: pickled(path, lambda t: {k: torch.nn.Parameter(v.bfloat16()) for k, v in t.items()}))
    copied("few fields", True, lora_alpha=..., peft_version=..., task_type=..., bias=..., rank_pattern=..., alpha_pattern=...,
           init_lora_weights=..., use_rslora=..., target_parameters=...)
    copied("fields of ms-swift", True, lora_dtype="bfloat16", lorap_lr_ratio=16.0, lorap_emb_lr=1e-6)

    copied("pickled before torch 1.6", False, lambda path: pickled(path, _use_new_zipfile_serialization=False))
    copied("pickled with code", False, lambda path: pickled(path, lambda t: {**t, "more": dataclasses.field}))
    copied("a pointer of Git LFS", False,
           lambda path: open(f"{path}/{WEIGHTS}", "w").write("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"))
    copied("no tensors", False, lambda path: os.remove(f"{path}/{WEIGHTS}"))
    copied("keys twice", False, lambda path: rewrite(path, lambda t: {**t, **renamed({k: v.clone() for k, v in t.items()})}))
    copied("keys without a prefix", False,
           lambda path: rewrite(path, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}))
    copied("keys of modules that are no targets", False, target_modules=["q_proj", "v_proj"])
    copied("modules that the file lacks", True, lambda path: rewrite(path, lambda t: {k: v for k, v in t.items() if "layers.1." not in k}))
    copied("no peft_type", False, peft_type=...)
    copied("null as peft_type", False, peft_type=None)
    apart(maker, "experts apart", True, ["q_proj", "gate_proj", "up_proj", "down_proj"])
    apart(maker, "experts apart, by expression", True, r".*(q_proj|experts\.\d+\.\w+_proj)")
    apart(maker, "experts apart that are no targets", False, ["q_proj"])
    apart(maker, "experts apart of which one leaf is no target", False, ["q_proj", "gate_proj", "down_proj"])
    apart(maker, "experts apart in layers that are left out", False, ["q_proj", "gate_proj", "up_proj", "down_proj"], layers_to_transform=[0])
    apart(maker, "experts apart, excluded", False, ["q_proj", "gate_proj", "up_proj", "down_proj"], exclude_modules=["experts.0.up_proj"])
    copied("a field of the future", False, use_new_thing=True)
    copied("a field of the future that is off", False, use_new_thing=False)
    copied("rank 0 for a module", False, rank_pattern={"q_proj": 0})
    copied("no regular expression", False, target_modules="(q_proj")
    copied("expression and layers", False, target_modules=".*_proj", layers_to_transform=[1])
    copied("layers_pattern alone", False, layers_pattern="layers")
    copied("a list as alpha", False, lora_alpha=[8])
    copied("null as rank", False, r=None)
    made("PiSSA", False, init_lora_weights="pissa")
    made("OLoRA", False, init_lora_weights="olora")
    made("DoRA", True, use_dora=True)
    made("a bias of B", False, lora_bias=True)
    made("a head that is saved", False, modules_to_save=["lm_head"])
    made("tokens that are trained", False, trainable_token_indices=[3, 4])
    made("biases that are saved", False, bias="all")


def apart(maker, name, accept, targets, **fields):
    """An adapter with a module for each expert, as PEFT made before experts were fused; merged by hand."""
    path, model = f"{maker.out}/{name.replace(' ', '_')}", maker.models["moe"]
    os.makedirs(path)
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **fields)
    json.dump(config, open(f"{path}/{CONFIG}", "w"))
    weights, tensors, numbers = load_file(f"{model}/model.safetensors"), {}, torch.Generator().manual_seed(3)
    for key, weight in list(weights.items()):
        if ".experts." in key or key.endswith("q_proj.weight"):
            rows, columns = weight.shape
            a, b = torch.randn(4, columns, generator=numbers) * 0.2, torch.randn(rows, 4, generator=numbers) * 0.2
            stem = "base_model.model." + key.removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            weights[key] = weight + 2 * b @ a
    save_file(tensors, f"{path}/{WEIGHTS}")
    merged = f"{path}/merged"
    shutil.copytree(model, merged)
    save_file(weights, f"{merged}/model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        save_file({"logits": base(merged)(IDS).logits[0].contiguous()}, f"{path}/logits.safetensors")
    maker.cases.append(dict(kind="input", name=name, field="", model=model, path=path, accept=accept, loads=accept, same=False))


def main():
    command, out, *pairs = sys.argv[1:]
    if command == "reload":
        for model, adapter in zip(pairs[::2], pairs[1::2]):
            save_file({"logits": logits(model, adapter).contiguous()}, f"{adapter}/logits.safetensors")
        return
    maker = Maker(out)
    fields(maker)
    inputs(maker)
    json.dump({"ids": IDS[0].tolist(), "cases": maker.cases}, open(f"{out}/cases.json", "w"))


main()
