"""Steps of torch's optimizers. Reads {cases: [{optimizer, settings}], start, gradients} from stdin and writes, for each
case and step, the parameter and the optimizer's state by name."""

import json
import sys

import torch

asked = json.load(sys.stdin)
told = []
for case in asked["cases"]:
    parameter = torch.nn.Parameter(torch.tensor(asked["start"], dtype=torch.float32))
    optimizer = getattr(torch.optim, case["optimizer"])([parameter], **case["settings"])
    steps = []
    for gradient in asked["gradients"]:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        state = optimizer.state[parameter]
        tensors = {name: state[name].tolist() for name in ("exp_avg", "exp_avg_sq") if name in state}
        steps.append({"master": parameter.tolist(), **tensors})
    told.append(steps)
json.dump(told, sys.stdout)
