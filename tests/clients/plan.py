"""Adapters and their data, for what is trained through the server and by PEFT alone."""

import random

STEPS = 5
VOCABULARY = 503
# Of eight adapters.
RANKS = [4, 8, 16, 2, 3, 5, 1, 6]


def seed(adapter):
    return 40 + adapter


def alpha(adapter):
    return [8, 4, 32, 3][adapter % 4]


def data(adapter, step):
    """The data of a step: (ids, targets that are shifted already, weights of 0 and 1)."""
    generator = random.Random(f"{adapter} {step}")
    data = []
    for index in range(3):
        tokens = [generator.randrange(VOCABULARY) for _ in range(6 + (5 * index + 3 * step + adapter) % 9)]
        weights = [float(at >= 1 + index) for at in range(len(tokens) - 1)]
        data.append((tokens[:-1], tokens[1:], weights))
    return data


def settings(adapter):
    """Those of AdamW by the clients' names. Every other adapter clips. Beside `eps`, a gradient of the size of rounding moves nothing."""
    clip = 0.3 if adapter % 2 else 0.0
    return {"learning_rate": 2e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.01, "grad_clip_norm": clip}
