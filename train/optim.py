"""The learning rate's schedule, the optimizers and one clipped step."""

import torch

from train import parallel


def lr_factor(step, steps, warmup):
    """Linear warm-up, then linear to 0, which is at least as good as cosine (arXiv 2502.15938)."""
    rise = (step + 1) / warmup if warmup else 1.0
    fall = (steps - step) / max(steps - warmup, 1)
    return min(rise, fall, 1.0)


def make_optimizers(
    model, lr, muon_lr=0.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, own_lr=None
):
    """[AdamW]; or with muon_lr [Muon for the blocks' matrices, AdamW for the rest].

    The loss stays on a plateau before the model learns facts; Muon (torch.optim.Muon) leaves it
    after about half as many tokens as AdamW. 3 of its Newton-Schulz steps do as well as the usual
    5. Weight decay is for matrices only. The schedule scales each group's initial_lr.
    own_lr: {name of a parameter: learning rate}
    """
    block_matrices, matrices, vectors, others = [], [], [], []
    for name, parameter in model.named_parameters():
        if own_lr and name in own_lr:
            others.append({"params": [parameter], "weight_decay": 0.0, "lr": own_lr[name]})
        elif parameter.dim() != 2:
            vectors.append(parameter)
        elif muon_lr and "blocks." in name:
            block_matrices.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        *others,
    ]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)]
    if muon_lr:
        muon = torch.optim.Muon(
            block_matrices,
            lr=muon_lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
            ns_steps=3,
        )
        optimizers.insert(0, muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def optimizer_step(model, optimizers, factor, clip=1.0):
    """One clipped step at initial_lr * factor. Returns the gradient norm before the clipping."""
    parallel.sum_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm
