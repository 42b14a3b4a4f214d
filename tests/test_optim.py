"""The learning rate's schedule, the optimizers and a clipped step, against formulas by hand."""

import math

import pytest
import tiny
import torch

from train.optim import lr_factor, make_optimizers, optimizer_step


def test_the_learning_rate_rises_over_the_warmup_and_falls_towards_0():
    """Linear both ways; the last step is the last above 0."""
    factors = [lr_factor(step, steps=10, warmup=4) for step in range(10)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [lr_factor(step, 4, warmup=0) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    # a run that ends within its warm-up, or with it
    assert [lr_factor(step, 3, warmup=20) for step in range(3)] == [1 / 20, 2 / 20, 3 / 20]
    assert [lr_factor(step, 2, warmup=2) for step in range(2)] == [0.5, 1]


def moved(model, optimizers, factor=1.0):
    """{name: weight after one step / weight before}, with gradients of 0."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_step(model, optimizers, factor)
    return {name: (p / before[name]).mean().item() for name, p in model.named_parameters()}


def test_weight_decay_shrinks_matrices_only_each_by_its_optimizers_learning_rate():
    """w *= 1 - lr wd (arXiv 1711.05101); Muon has the blocks' matrices and a rate of its own."""
    model = tiny.gpt()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    ratios = moved(model, make_optimizers(model, 0.1, muon_lr=0.02, weight_decay=0.5), 0.5)
    assert ratios.keys() >= {"embed.weight", "norm.weight", "blocks.1.mlp.up_proj.weight"}
    for name, ratio in ratios.items():
        is_matrix = "norm" not in name
        lr = 0.02 if "blocks" in name else 0.1
        assert ratio == pytest.approx(1 - 0.5 * lr * 0.5 * is_matrix), name
    ratios = moved(model, make_optimizers(model, 0.1, weight_decay=0.5))
    assert {round(ratio, 4) for ratio in ratios.values()} == {1.0, 0.95}
    assert set(moved(model, make_optimizers(model, 0.1, weight_decay=0)).values()) == {1.0}


def test_a_parameter_may_have_a_learning_rate_of_its_own_and_then_does_not_decay():
    """Adam's first step moves a weight by its learning rate, whatever the gradient."""
    model = tiny.gpt()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    own_lr = {"norm.weight": 0.25}
    optimizers = make_optimizers(model, 0.01, weight_decay=0.0, own_lr=own_lr)
    optimizer_step(model, optimizers, 0.5)
    for name, parameter in model.named_parameters():
        lr = own_lr.get(name, 0.01) * 0.5
        assert (before[name] - parameter).mean().item() == pytest.approx(lr, rel=1e-2), name


def test_without_more_said_it_is_adamw_with_gpt_3s_numbers():
    (optimizer,) = make_optimizers(tiny.gpt(), 0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("options", [{}, dict(betas=(0.5, 0.75), eps=0.3)])
def test_adamws_steps_are_those_of_the_paper(options):
    """m and v with bias correction (arXiv 1412.6980, algorithm 1), three steps of one weight."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    (optimizer,) = make_optimizers(model, 0.1, weight_decay=0.0, **options)
    (beta1, beta2), eps = options.get("betas", (0.9, 0.95)), options.get("eps", 1e-8)
    w, m, v = model.weight.item(), 0.0, 0.0
    for t, (gradient, factor) in enumerate([(0.3, 1.0), (-0.2, 0.5), (0.7, 0.25)], 1):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer_step(model, [optimizer], factor)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        step = m / (1 - beta1**t) / (math.sqrt(v / (1 - beta2**t)) + eps)
        w -= 0.1 * factor * step
        assert model.weight.item() == pytest.approx(w, rel=1e-6)


def test_muons_step_has_the_size_of_adamws_and_the_gradients_direction():
    """As long as 0.2 max(rows, columns)^0.5 times the orthogonal matrix (arXiv 2502.16982).

    Three Newton-Schulz steps make singular values of 0.4 to 1.3 of most, not yet 1.
    """
    model = tiny.gpt(n_embd=32)
    muon, _ = make_optimizers(model, 1.0, muon_lr=1.0, weight_decay=0.0)
    weight = model.blocks[0].attn.q_proj.weight  # (32, 32)
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradient = weight.grad.clone()
    optimizer_step(model, [muon], 1.0)
    change = (before - weight.detach()).double() / (0.2 * math.sqrt(32))
    u, _, v = torch.linalg.svd(gradient.double())
    along = (u.T @ change @ v.T).diagonal()  # Nesterov's first step is along the gradient
    assert along.min() > 0 and 0.6 < along.median() < 1.3
    assert muon.param_groups[0]["ns_steps"] == 3


@pytest.mark.parametrize("length, kept", [(0.5, 1.0), (4.0, 0.25)])
def test_a_step_is_clipped_to_norm_1_and_reports_the_norm_before(length, kept):
    """SGD: w -= lr factor g min(1, 1 / |g|), with g over all weights together."""
    model = tiny.gpt()
    parameters = list(model.parameters())
    n = sum(p.numel() for p in parameters)
    gradient = length / math.sqrt(n)
    groups = [dict(params=[p], lr=0.5, initial_lr=0.1) for p in parameters]
    optimizer = torch.optim.SGD(groups)
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, gradient)
    norm = optimizer_step(model, [optimizer], 0.3)
    assert norm.item() == pytest.approx(length, rel=1e-4)
    for parameter, old in zip(parameters, before):
        expected = old - 0.1 * 0.3 * gradient * kept
        torch.testing.assert_close(parameter.data, expected, atol=1e-7, rtol=0)
        assert parameter.grad is None
