"""Losses over pairs in TRL, on a tiny model.

    preference.py train CHAT OUT        makes OUT/model with a tokenizer and a template of CHAT, OUT/rows.jsonl and OUT/start
                                        (an adapter, which is the reference too); trains it for 20 steps of 2 pairs with each
                                        of CASES and with SimPO and writes losses and rewards to OUT/CASE.json, logits to OUT/CASE.pt
    preference.py check OUT CASE=DIR... loads the adapter in each DIR and compares its logits with those

SimPO has the loss of TRL's CPO trainer in its DPO trainer, which tokenises otherwise."""

import copy
import json
import os
import random
import sys
from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

STEPS, PAIRS = 20, 2
CASES = {
    "dpo": {},
    "norm": {"loss_type": ["sigmoid_norm"], "beta": 0.5},
    "hinge": {"loss_type": ["hinge"], "beta": 0.05},
    "ipo": {"loss_type": ["ipo"], "beta": 0.3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
}
SIMPO = {"beta": 2.0, "simpo_gamma": 0.5}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDS = "the a red blue green chair table stands falls near under slowly today and then it is not".split()
TOLD = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"}


def sentence(words):
    return " ".join(random.choice(WORDS) for _ in range(words))


def make(chat, out):
    random.seed(3)
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(f"{chat}/byte_level")
    tokenizer.pad_token = tokenizer.eos_token
    with open(f"{chat}/templates/chatml.jinja") as file:
        tokenizer.chat_template = file.read()
    tokenizer.save_pretrained(f"{out}/model")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=40, intermediate_size=56, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=False)
    base = AutoModelForCausalLM.from_config(config).float()
    base.save_pretrained(f"{out}/model")
    with open(f"{out}/rows.jsonl", "w") as file:
        for row in range(STEPS * PAIRS):
            prompt = [{"role": "user", "content": sentence(2 + row % 5)}]
            answers = [[{"role": "assistant", "content": sentence(1 + (row * by) % 7)}] for by in (3, 5)]
            file.write(json.dumps({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}) + "\n")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(f"{out}/start")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 43).view(2, 20)).logits


def train(out, name):
    import datasets
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOTrainer

    losses, rewards = [], []

    class Recording(DPOTrainer):
        def compute_loss(self, *given, **named):
            loss = super().compute_loss(*given, **named)
            losses.append(loss.item())
            return loss

    class Simpo(DPOTrainer):
        def compute_loss(self, model, inputs, **_):
            ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
            of_tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            means = (of_tokens * mask).sum(1) / mask.sum(1)
            settings = SimpleNamespace(**SIMPO, loss_type="simpo", label_smoothing=0.0, alpha=0.0, accelerator=self.accelerator)
            loss, chosen, rejected = CPOTrainer.cpo_loss(settings, *means.chunk(2))
            losses.append(loss.mean().item())
            rewards.append({"rewards/chosen": chosen.mean().item(), "rewards/rejected": rejected.mean().item()})
            return loss.mean()

    model = AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, f"{out}/start", is_trainable=True)
    args = DPOConfig(output_dir=f"{out}/{name}", per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=3e-3,
                     lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0,
                     max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
                     gradient_checkpointing=False, train_sampling_strategy="sequential", dataloader_drop_last=True,
                     disable_tqdm=True, max_length=512, **CASES.get(name, {}))
    rows = datasets.load_dataset("json", data_files=f"{out}/rows.jsonl", split="train")
    trainer = (Simpo if name == "simpo" else Recording)(
        model=model, args=args, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(f"{out}/model"))
    trainer.train()
    told = [{key: value for key, value in line.items() if key in TOLD} for line in trainer.state.log_history if "loss" in line]
    with open(f"{out}/{name}.json", "w") as file:
        json.dump({"losses": losses, "rewards": rewards or told}, file)
    torch.save(logits(trainer.model), f"{out}/{name}.pt")


what, *arguments = sys.argv[1:]
if what == "train":
    chat, out = arguments
    os.makedirs(out, exist_ok=True)
    make(chat, out)
    for name in [*CASES, "simpo"]:
        train(out, name)
else:
    out, *folders = arguments
    untrained = logits(AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32))
    for name, folder in (argument.split("=", 1) for argument in folders):
        base = AutoModelForCausalLM.from_pretrained(f"{out}/model", dtype=torch.float32)
        found = logits(PeftModel.from_pretrained(base, folder))
        expected = torch.load(f"{out}/{name}.pt")
        apart, moved = (found - expected).abs().max().item(), (untrained - expected).abs().max().item()
        assert apart < 1e-3 * moved, f"{name}: logits are {apart} from those of TRL, which moved by {moved}"
        print(name, apart, moved)
