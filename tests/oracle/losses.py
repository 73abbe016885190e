"""Losses of policies by torch's autograd in fp64, each written from its published formula. Reads a list of cases {loss,
params, lengths, k, targets, logits, inputs} from stdin and writes, for each, the loss, its derivative by every log p and
its statistics."""

import json
import sys

import torch

torch.set_default_dtype(torch.float64)


def surrogate(ratio, advantages, low, high):
    """Schulman et al., 2017: min(rA, clip(r)A), negated."""
    return -torch.minimum(ratio * advantages, torch.clamp(ratio, low, high) * advantages)


def sequence_ratio(new, old, mask, owner, bound=None):
    """Zheng et al., 2025: the geometric mean of a sequence's ratios, with the gradient of each token's own."""
    log_ratio = torch.zeros_like(new)
    for sequence in owner.unique():
        own = owner == sequence
        weight = mask[own].sum()
        mean = ((new - old)[own] * mask[own]).sum() / weight if weight != 0 else torch.tensor(0.0)
        log_ratio = torch.where(own, mean.detach(), log_ratio)
    log_ratio = log_ratio + new - new.detach()
    return torch.exp(log_ratio if bound is None else torch.clamp(log_ratio, -bound, bound))


def policy_loss(case, new):
    """Terms of each target, with what the statistics need: ratio, clipped and left-out targets."""
    name, params, given = case["loss"], case["params"], case["inputs"]
    old, a, owner = given["logprobs"], given["advantages"], case["owner"]
    zeros = torch.zeros_like(new)
    ratio = torch.exp(new - old)
    found = {"ratio": ratio, "clipped": zeros, "left_out": None, "stale": None, "divergence": None}

    def thresholds(low, high):
        return given.get("clip_low_threshold", zeros + low), given.get("clip_high_threshold", zeros + high)

    if name == "importance_sampling":
        terms = -ratio * a
    elif name == "ppo":
        low, high = thresholds(params.get("clip_low_threshold", 0.8), params.get("clip_high_threshold", 1.2))
        terms = surrogate(ratio, a, low, high)
        found["clipped"] = ((ratio > high) & (a > 0)) | ((ratio < low) & (a < 0))
    elif name == "cispo":
        low, high = thresholds(params.get("clip_low_threshold", 0.0), params.get("clip_high_threshold", 4.0))
        terms = -torch.clamp(ratio, low, high).detach() * a * new
        found["clipped"] = (ratio < low) | (ratio > high)
    elif name == "dro":
        terms = -(a * new - 0.5 * params.get("beta", 0.05) * (new - old) ** 2)
    elif name == "gspo":
        low, high = thresholds(params.get("clip_low_threshold", 0.8), params.get("clip_high_threshold", 1.2))
        ratio = sequence_ratio(new, old, given.get("sequence_ratio_mask", (a != 0).double()), owner)
        terms = surrogate(ratio, a, low, high)
        found["clipped"] = ((ratio > high) & (a > 0)) | ((ratio < low) & (a < 0))
    elif name == "policy_loss":
        ratio = torch.exp(torch.clamp(new - old, -20, 20))
        low, high = thresholds(1 - params.get("eps_clip", 0.2), 1 + params.get("eps_clip_high", 0.2))
        terms = torch.maximum(-ratio * a, -torch.clamp(ratio, low, high) * a)
        clipped = ((ratio > high) & (a > 0)) | ((ratio < low) & (a < 0))
        if "eps_clip_c" in params:
            c = params["eps_clip_c"]
            clipped |= (a < 0) & (terms > -c * a)
            terms = torch.where(a < 0, torch.minimum(-c * a, terms), terms)
        if "icepop_beta" in params:
            beta = params["icepop_beta"]
            found["left_out"] = (ratio < 1 / beta) | (ratio > beta)
            terms = terms * (~found["left_out"]).double()
        if params.get("use_tis"):
            limits = params.get("tis_clip_low", 0.1), params.get("tis_clip_high", 2.0)
            stale = torch.exp(torch.clamp(new - given["rollout_logprobs"], -20, 20)).detach()
            terms = terms * torch.clamp(stale, *limits)
            found["stale"] = (stale, limits)
        found["clipped"] = clipped
    elif name == "drgrpo":
        low, high = thresholds(1 - params.get("clip_low", 0.2), 1 + params.get("clip_high", 0.28))
        if params.get("ratio_type", "token") == "token":
            ratio = torch.exp(torch.clamp(new - old, -20, 20))
        else:
            ratio = sequence_ratio(new, old, given.get("sequence_ratio_mask", (a != 0).double()), owner, 20)
        terms = torch.maximum(-ratio * a, -torch.clamp(ratio, low, high) * a)
        found["clipped"] = ((ratio > high) & (a > 0)) | ((ratio < low) & (a < 0))
        beta = params.get("beta", 0.0)
        if beta > 0:
            d = new - given["ref_logprobs"]
            inverse = torch.clamp(-d, -10, 10)
            kinds = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(inverse) - inverse - 1}
            found["divergence"] = kinds[params.get("kl_type", "k3")]
            terms = terms + beta * found["divergence"]
    else:
        raise ValueError(name)
    found["ratio"] = ratio
    # A target without an advantage belongs to a prompt; dro draws every target to q.
    counted = torch.ones_like(a, dtype=torch.bool) if name == "dro" else a != 0
    return torch.where(counted, terms, zeros), counted, found


def statistics(case, new, counted, found):
    old = case["inputs"]["logprobs"]
    new, old = new.detach()[counted], old[counted]

    def mean(values):
        return values.double()[counted].mean().item()

    ratio = found["ratio"].detach()[counted].clamp(torch.e**-20, torch.e**20)
    log_ratio = torch.clamp(new - old, -20, 20)
    told = {
        "ratio_mean:mean": ratio.mean().item(),
        "ratio_min:min": ratio.min().item(),
        "ratio_max:max": ratio.max().item(),
        "pg_clipfrac:mean": mean(found["clipped"]),
        "kl_sample_train_k3:mean": (torch.exp(log_ratio) - log_ratio - 1).mean().item(),
        "entropy_sample:mean": -old.mean().item(),
    }
    if found["left_out"] is not None:
        told["icepop_maskfrac:mean"] = mean(found["left_out"])
    if found["divergence"] is not None:
        told["kl_ref:mean"] = mean(found["divergence"].detach())
    if found["stale"] is not None:
        stale, (low, high) = found["stale"]
        told["tis_mean:mean"] = mean(stale)
        told["tis_min:min"] = stale[counted].min().item()
        told["tis_max:max"] = stale[counted].max().item()
        told["tis_clipfrac:mean"] = mean((stale < low) | (stale > high))
    return told


def solve(case):
    k, targets = case["k"], torch.tensor(case["targets"])
    present = targets >= 0
    logits = torch.tensor(case["logits"], requires_grad=True).view(len(targets) // k, -1)
    log_p = torch.log_softmax(logits, 1).gather(1, targets.clamp_min(0).view(-1, k)).view(-1)
    log_p.retain_grad()
    new = log_p[present]
    owner = torch.repeat_interleave(torch.arange(len(case["lengths"])), torch.tensor(case["lengths"]) * k)
    case["owner"] = owner[present]
    case["inputs"] = {name: torch.tensor(values)[present] for name, values in case["inputs"].items()}
    told = {}
    if case["loss"] in ("cross_entropy", "causallm_loss"):
        loss = -(case["inputs"].get("weights", torch.ones_like(new)) * new).sum()
    else:
        terms, counted, found = policy_loss(case, new)
        loss = terms.sum()
        told = statistics(case, new, counted, found)
    loss.backward()
    return {"loss": loss.item(), "coefficients": log_p.grad.tolist(), "statistics": told}


json.dump([solve(case) for case in json.load(sys.stdin)], sys.stdout)
