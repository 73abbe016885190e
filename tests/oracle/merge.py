"""Models with PEFT adapters, and a comparison of merged ones with what PEFT makes of them.

    merge.py make OUT                     writes models and adapters, and OUT/cases.json: [{name, model, adapter}]
    merge.py compare OUT NAME MERGED ...  prints a line of JSON for each pair: the furthest logit from base + adapter in PEFT, and the
                                          furthest weight from that of merge_and_unload in fp32, in units of half a bf16 step
"""
import json
import sys
import warnings

import peft
import torch
import transformers

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

SIZES = dict(vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=256)
MOE = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION, EXPERTS = ["q_proj", "o_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.randint(3, 131, (1, 24), generator=torch.Generator().manual_seed(5))


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def make(out):
    cases = []

    def model(name, family, dtype=torch.float32, original=True, **more):
        torch.manual_seed(0)
        config = getattr(transformers, family + "Config")(**{**SIZES, **more})
        made = getattr(transformers, family + "ForCausalLM")(config).to(dtype)
        made.config.dtype = dtype
        made.save_pretrained(f"{out}/{name}", max_shard_size="20KB", save_original_format=original)
        for file in ["tokenizer.json", "tokenizer_config.json"]:
            open(f"{out}/{name}/{file}", "w").write("{}")
        open(f"{out}/{name}/chat_template.jinja", "w").write("{{ messages }}")

    def adapter(name, model, std=0.1, **settings):
        torch.manual_seed(7)
        fields = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=ALL)
        adapted = peft.get_peft_model(load(f"{out}/{model}"), peft.LoraConfig(**{**fields, **settings}))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.add_(torch.randn_like(parameter) * std)
        adapted.save_pretrained(f"{out}/{name}")
        cases.append(dict(name=name, model=f"{out}/{model}", adapter=f"{out}/{name}"))

    model("llama", "Llama")
    model("half", "Qwen3", torch.bfloat16, head_dim=8, tie_word_embeddings=True)
    model("moe", "Qwen3Moe", **MOE)
    model("mixtral", "Mixtral", torch.bfloat16, num_local_experts=4, num_experts_per_tok=2)
    model("fused", "Qwen3Moe", original=False, **MOE)
    model("fused_mixtral", "Mixtral", original=False, num_local_experts=4, num_experts_per_tok=2)
    adapter("dense", "llama", rank_pattern={"q_proj": 8}, use_rslora=True)
    adapter("dense_bf16", "half")
    adapter("tiny", "half", std=1e-6)
    adapter("experts", "moe", target_modules=ATTENTION, target_parameters=EXPERTS)
    adapter("experts_bf16", "mixtral", target_modules=ATTENTION, target_parameters=EXPERTS)
    adapter("experts_fused", "fused", target_modules=ATTENTION, target_parameters=EXPERTS)
    adapter("mixtral_fused", "fused_mixtral", target_modules=ATTENTION, target_parameters=EXPERTS)
    json.dump(cases, open(f"{out}/cases.json", "w"))


def compare(out, pairs):
    cases = {case["name"]: case for case in json.load(open(f"{out}/cases.json"))}
    expected = {}
    for name, path in zip(pairs[::2], pairs[1::2]):
        if name not in expected:
            adapted = peft.PeftModel.from_pretrained(load(cases[name]["model"]), cases[name]["adapter"]).eval()
            with torch.no_grad():
                logits = adapted(IDS).logits
            expected[name] = logits, adapted.merge_and_unload().state_dict()
        logits, weights = expected[name]
        merged = load(path)
        found = merged.state_dict()
        assert found.keys() == weights.keys(), found.keys() ^ weights.keys()
        steps = max(((found[key] - weights[key]).abs() / (weights[key].abs() * 2**-8 + 1e-5)).max().item() for key in weights)
        with torch.no_grad():
            apart = (merged(IDS).logits - logits).abs().max().item()
        print(json.dumps(dict(name=name, logits=apart, steps=steps, largest=logits.abs().max().item(),
                              dtype=str(transformers.AutoConfig.from_pretrained(path).dtype))))


command, out, *rest = sys.argv[1:]
make(out) if command == "make" else compare(out, rest)
