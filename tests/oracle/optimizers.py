"""Steps of reference optimizers: torch's, SignSGD and AnyPrecisionAdamW by their formulas, Muon with momentum in bf16.
Reads {cases: [{optimizer, settings, ratio}], parameters: [{name, shape, start, gradients}]} from stdin and writes, for
each case, parameter and name, the parameter ("master") and the optimizer's state after every step. With a ratio other
than 1, PEFT's create_loraplus_optimizer sets the learning rates."""

import json
import sys

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.optim import _muon


class SignSGD(torch.optim.Optimizer):
    """p <- (1 - lr wd) p - lr sign(g)"""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(torch.sign(p.grad), alpha=-group["lr"])


class AnyPrecisionAdamW(torch.optim.Optimizer):
    """AdamW with moments in a dtype of their own, without Kahan summation (torchdistx, llama-recipes)."""

    def __init__(self, params, lr, betas, eps, weight_decay=0.0, dtype="bfloat16"):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.dtype = getattr(torch, dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, dtype=self.dtype)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=self.dtype)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                p.mul_(1 - lr * group["weight_decay"])
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                corrections = [1 - beta ** state["step"] for beta in (beta1, beta2)]
                denominator = (v.sqrt() / corrections[1] ** 0.5).add_(group["eps"])
                p.addcdiv_(m, denominator, value=-lr / corrections[0])


class MuonBf16(torch.optim.Muon):
    """torch's Muon with its momentum, and what is orthogonalised, in bf16, as xorl has it by default."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p, dtype=torch.bfloat16)
                buffer, gradient = state["momentum_buffer"], p.grad.bfloat16()
                buffer.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                update = _muon._zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = _muon._adjust_lr(group["lr"], group["adjust_lr_fn"], p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


OWN = dict(SignSGD=SignSGD, AnyPrecisionAdamW=AnyPrecisionAdamW, MuonBf16=MuonBf16)


class Adapted(torch.nn.Module):
    """Parameters by the names that PEFT gives them: {module}.lora_A.default."""

    def __init__(self, parameters):
        super().__init__()
        self.by_name = {}
        for asked in parameters:
            module, kind = asked["name"].replace("layer.", "").split(".")
            if not hasattr(self, module):
                self.add_module(module, torch.nn.Module())
            value = torch.nn.Parameter(torch.tensor(asked["start"], dtype=torch.float32).view(asked["shape"]))
            self.get_submodule(module).add_module(kind, torch.nn.ParameterDict({"default": value}))
            self.by_name[asked["name"]] = value


asked = json.load(sys.stdin)
told = []
for case in asked["cases"]:
    model = Adapted(asked["parameters"])
    kind = OWN.get(case["optimizer"]) or getattr(torch.optim, case["optimizer"])
    settings = case["settings"]
    if case["ratio"] == 1:
        optimizer = kind(model.parameters(), **settings)
    else:
        settings["loraplus_weight_decay"] = settings.pop("weight_decay")
        optimizer = create_loraplus_optimizer(model, kind, loraplus_lr_ratio=case["ratio"], **settings)
    story = {name: {} for name in model.by_name}
    for step in range(len(asked["parameters"][0]["gradients"])):
        for parameter in asked["parameters"]:
            value = model.by_name[parameter["name"]]
            value.grad = torch.tensor(parameter["gradients"][step], dtype=torch.float32).view(parameter["shape"])
        optimizer.step()
        for name, value in model.by_name.items():
            tensors = {key: tensor for key, tensor in optimizer.state[value].items() if key != "step"}
            for key, tensor in {"master": value, **tensors}.items():
                if tensor is not None:
                    story[name].setdefault(key, []).append(tensor.detach().double().flatten().tolist())
    told.append(story)
json.dump(told, sys.stdout)
