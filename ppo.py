"""Stage 3b, PPO: the policy responds, the reward model judges, the policy moves a little.

    python ppo.py                       # the default world, against out/reward.pt
    python ppo.py --show                # print episodes token by token, then stop
    python ppo.py --reward my_rewards:brevity --missing_eos_score -20 --out out/brief.pt

--data holds one prompt per line: {"messages": [… ending in a user message]}
--reward is a reward model's checkpoint, or package.module:function with
    function(prompts, responses) -> list of floats
where prompts are the last user messages. A parameter named conversations gets all messages.

An episode is a prompt and its response; an action is one token of the response. Column t of
every tensor (B, T) here is the action "choose token t+1"; tokens are (B, T+1).
    logprobs[:, t] = log pi(tokens[:, t+1] | tokens[:, :t+1])
    values[:, t]   = V(tokens[:, :t+1]), before that action
    mask[:, t]     is True where token t+1 is part of the response, its end token included
"""

import copy
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import conversation
from data.examples import load_prompts
from model import GPT, last_true, scatter, token_logprobs
from reward import RewardModel, from_gpt
from train import parallel, show
from train.batches import Batches, hold_out, in_parts, micro_batches, pad_rows, rows_at_once, split
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint
from train.device import autocast, compiled, setup, to_device
from train.loop import Run
from train.optim import lr_factor, make_optimizers, optimizer_step
from train.reward_function import RewardFunction
from utils.cli import die, parse_config


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that becomes policy and reference
    reward: str = "out/reward.pt"  # reward model checkpoint, or package.module:function
    data: str = "out/world/prompts.jsonl"  # prompts, one a line
    out: str = "out/ppo.pt"  # checkpoint to write
    resume: str = ""  # continue an interrupted run; "previous": from the older state
    steps: int = 100  # iterations of rollout and update
    batch_size: int = 128  # episodes per iteration
    minibatch_size: int = 64  # episodes per optimizer step
    micro_batch_size: int = 0  # episodes per forward pass; 0: all of a rollout or minibatch
    epochs: int = 2  # passes over a rollout; 4 take twice the time and gain nothing here
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of sampling and of all log-probabilities
    lr: float = 1.5e-4  # peak, linear to 0; a model of a billion parameters wants 3e-6
    beta: float = 0.2  # weight of the KL penalty
    kl_target: float = 0.0  # nats per response that beta slowly adapts to; 0: beta stays
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda (arXiv 1506.02438)
    clip: float = 0.2  # the ratio is not pushed beyond 1 +- clip (arXiv 1707.06347)
    value_clip: float = 0.2  # a value is not pushed further than this from its old one
    value_coef: float = 0.1  # weight of the value loss; see the note at update
    missing_eos_score: float = -3.0  # of a response without end; below those of usual ones
    min_score: float = -math.inf  # floor of all scores
    val_size: int = 512  # prompts held out at the end; at most a quarter
    log_every: int = 5  # iterations between log lines
    save_every: int = 20  # iterations between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool | None = None  # torch.compile the losses; None: on CUDA yes, elsewhere no
    seed: int = 0  # prompt order and sampling
    show: bool = False  # print episodes of the first two iterations and exit

    def __post_init__(self):
        if self.temperature < 1e-3:
            die(f"--temperature {self.temperature:g}: nothing is explored; give 0.001 or more")


# ---- rewards and advantages


def masked_mean(x, mask):
    """The mean of x (B, T) over the mask (B, T)."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """x (B, T) shifted and scaled to mean 0 and variance 1 over the mask, 0 elsewhere."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """-beta (log pi - log pi_ref) at each action, plus the score (B,) at the last one: (B, T).

    The sum over a response is the objective of arXiv 2203.02155, equation 2, with its gamma 0. Of
    the estimators of KL from d = log pi - log pi_ref, this is k1 = d. k3 = exp(-d) - 1 + d has the
    same mean, but a reward is not differentiated: only with k1 does the term that this leaves out
    have mean 0. k2 = d^2 / 2 or k3 would move the optimum (tests/test_planted_bugs.py).
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask  # (B, T)
    return rewards.scatter_add(1, last_true(mask)[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438): advantages and returns, (B, T) each.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    Outside the mask all are 0: V is 0 once the response has ended.
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage).where(mask[:, t], 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def compute_advantages(batch, beta, config):
    """rewards, advantages, returns and whitened_advantages of a rollout, (B, T) each."""
    mask = batch["mask"]
    rewards = token_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, beta)
    advantages, returns = gae(rewards, batch["values"], mask, config.gamma, config.lam)
    return dict(
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        whitened_advantages=whiten(advantages, mask),
    )


def adapt_beta(beta, kl, kl_target, n_episodes, horizon=10_000):
    """Adaptive KL controller (arXiv 1909.08593, section 2.2).

    Its K_beta is n_episodes / horizon, as in the paper's code.
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return beta * (1 + error * n_episodes / horizon)


# ---- losses


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (arXiv 1707.06347), the mean over the actions; all (B, T)."""
    ratio = torch.exp(logprobs - old_logprobs)
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return masked_mean(losses, mask)


def value_loss(values, old_values, returns, mask, clip):
    """0.5 max((V - R)^2, (clip(V) - R)^2), the mean over the actions; all (B, T)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---- forward passes


@compiled
def response_logprobs(model, tokens, mask, temperature):
    """log pi of each action: (B, T), 0 outside the mask. tokens (B, T+1), mask (B, T)"""
    places = mask.nonzero(as_tuple=True)  # rows and columns of the actions, (N,) each
    hidden = model.hidden(tokens[:, :-1])[places]  # (N, C): only the actions need logits
    logits = model.logits(hidden) / temperature  # (N, V)
    return scatter(token_logprobs(logits, tokens[:, 1:][places]), places, mask)


def action_values(critic, tokens, mask):
    """V before each action: (B, T). tokens (B, T+1), mask (B, T)"""
    token_mask = F.pad(mask, (1, 0))  # (B, T+1): column t is token t here, as in reward.py
    return critic(tokens, token_mask)[:, :-1]


# ---- rollout


def generate_responses(policy, prompt_ids, uniforms, tokenizer, config):
    """Samples a response to each prompt, [ids]; uniforms (B, max_new_tokens).

    Returns tokens (B, T+1) and mask (B, T), padded on the right, and the responses as lists.
    """
    responses, size = [], config.batch_size  # validation has more prompts than a step
    for prompts, u in zip(split(prompt_ids, size), split(uniforms, size)):
        responses += policy.generate(
            prompts, config.max_new_tokens, config.temperature, end_id=tokenizer.end, uniforms=u
        )
    rows = [prompt + response for prompt, response in zip(prompt_ids, responses)]
    masks = [[0] * len(p) + [1] * len(r) for p, r in zip(prompt_ids, responses)]
    tokens = pad_rows(rows, tokenizer.pad, policy.device)  # (B, T+1)
    mask = pad_rows(masks, 0, policy.device)[:, 1:].bool()  # (B, T)
    return tokens, mask, responses


@torch.no_grad()
def rollout(policy, ref, critic, score, prompts, tokenizer, config):
    """The policy responds to the Prompts; the other networks read the responses.

    Returns a dict of tokens (B, T+1); mask, logprobs, ref_logprobs and values (B, T); scores and
    ended (B,).
    """
    # drawn for all prompts, so that the number of processes changes no sample
    uniforms = torch.rand(len(prompts), config.max_new_tokens, device=policy.device)
    prompts, uniforms = parallel.shard(prompts, uniforms)  # this process's B of them
    prompt_ids = [prompt.tokens for prompt in prompts]
    with autocast(policy.device):
        # (B, T+1), (B, T) and B lists
        tokens, mask, responses = generate_responses(
            policy, prompt_ids, uniforms, tokenizer, config
        )
        # not the sampler's, which rounds differently from the training forward; (B, T) each
        size, args = rows_at_once(config), (tokens, mask, config.temperature)
        logprobs = in_parts(response_logprobs, size, policy, *args)
        ref_logprobs = in_parts(response_logprobs, size, ref, *args)
        values = in_parts(action_values, size, critic, tokens, mask)
    texts = [conversation.decode_response(response, tokenizer) for response in responses]
    scores = score(tokens, mask, prompts, texts)  # (B,)
    ended = [response[-1] == tokenizer.end for response in responses]
    ended = to_device(torch.tensor(ended), scores.device)  # (B,)
    scores = scores.where(ended, config.missing_eos_score).clamp(min=config.min_score)
    columns = dict(mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    return parallel.gather(dict(tokens=tokens, scores=scores, ended=ended) | columns)


def rollout_metrics(batch):
    """What to look at in a rollout."""
    mask, scores, logprobs = batch["mask"], batch["scores"], batch["logprobs"]
    kl = (logprobs - batch["ref_logprobs"]).sum(1)  # (B,), the estimator k1
    variance = scores.var(correction=0) / max(len(scores) - 1, 1)  # of the mean
    return dict(
        score=scores.mean().item(),
        score_se=variance.sqrt().item(),
        kl_ref=kl.mean().item(),  # KL(pi || ref), nats per response
        entropy=-masked_mean(logprobs, mask).item(),  # of pi, nats per token
        length=mask.sum(1).float().mean().item(),  # tokens per response
        missing_eos=1 - batch["ended"].float().mean().item(),  # fraction of the responses
    )


# ---- update


def ppo_loss(policy, critic, batch, config):
    """Policy and value loss, a mean over the actions; and metrics, scalar tensors."""
    tokens, mask, old_logprobs = batch["tokens"], batch["mask"], batch["logprobs"]
    with autocast(policy.device):
        logprobs = response_logprobs(policy, tokens, mask, config.temperature)  # (B, T)
        values = action_values(critic, tokens, mask)  # (B, T)
    advantages = batch["whitened_advantages"]
    pg_loss = policy_loss(logprobs, old_logprobs, advantages, mask, config.clip)
    v_loss = value_loss(values, batch["values"], batch["returns"], mask, config.value_clip)
    with torch.no_grad():
        log_ratio = logprobs - old_logprobs  # (B, T)
        ratio = log_ratio.exp()  # (B, T)
        metrics = dict(
            policy_loss=pg_loss.detach(),
            value_loss=v_loss.detach(),
            # KL(rollout's policy || policy), nats per token, by the estimator k3
            approx_kl=masked_mean(ratio - 1 - log_ratio, mask),
            clip_fraction=masked_mean(((ratio - 1).abs() > config.clip).float(), mask),
        )
    return pg_loss + config.value_coef * v_loss, metrics


def update(policy, critic, optimizers, batch, factor, config):
    """config.epochs passes of minibatch steps over the rollout. Returns the metrics' means.

    Policy and critic are separate networks with an optimizer each, and Adam does not see the
    scale of a loss: value_coef acts only through the clipping of gradients and Adam's eps.
    """
    policy_optimizer, critic_optimizer = optimizers
    sums, grad_norms = defaultdict(float), []
    for _ in range(config.epochs):
        order = to_device(torch.randperm(len(batch["mask"])), policy.device)  # (B,)
        for minibatch in split(order, config.minibatch_size):
            # forward and backward; the mean runs over the actions of the whole minibatch
            n_actions = batch["mask"][minibatch].sum()
            for rows in micro_batches(minibatch, config.micro_batch_size):
                micro = {name: x[rows] for name, x in batch.items()}  # (b, ..) each
                loss, metrics = ppo_loss(policy, critic, micro, config)
                weight = micro["mask"].sum() / n_actions
                (loss * weight).backward()
                for name, value in metrics.items():
                    sums[name] += value * weight

            # one step of each network
            policy_norm = optimizer_step(policy, [policy_optimizer], factor)
            critic_norm = optimizer_step(critic, [critic_optimizer], factor)
            grad_norms.append(torch.stack([policy_norm, critic_norm]))  # (2,)
    means = parallel.all_reduce_sum(torch.stack(list(sums.values()))) / len(grad_norms)
    policy_norm, critic_norm = torch.stack(grad_norms).mean(0).tolist()
    norms = dict(policy_grad_norm=policy_norm, critic_grad_norm=critic_norm)
    return dict(zip(sums, means.tolist())) | norms


# ---- the networks


def load_score(name, tokenizer, device, size):
    """(score, reward model or None); score(tokens, mask, prompts, responses) -> (B,).

    prompts is a list of Prompt, responses a list of strings; a reward model reads size at once.
    """
    if re.fullmatch(r"[\w.]+:\w+", name):
        function = RewardFunction(name, device)
        return lambda tokens, mask, prompts, responses: function(prompts, responses), None
    model, its_tokenizer = load_checkpoint(name, ["reward"], RewardModel, device)
    if its_tokenizer.dumps() != tokenizer.dumps():
        die(f"{name}: its tokenizer is not the policy's; train the reward model from the same base")
    model.requires_grad_(False)

    def score(tokens, mask, prompts, responses):
        token_mask = F.pad(mask, (1, 0))  # (B, T+1)
        with autocast(device):
            return in_parts(RewardModel.score, size, model, tokens, token_mask)

    return score, model


def make_critic(policy, reward_model):
    """The value network: it starts as the reward model, or without one at values of 0."""
    if reward_model:
        return copy.deepcopy(reward_model).requires_grad_(True)
    critic = from_gpt(policy, logprob_term=True)
    torch.nn.init.zeros_(critic.head.weight)
    return critic


# ---- the run


def explained_variance(batch):
    """The fraction of the returns' variance that the critic predicted."""
    returns = batch["returns"][batch["mask"]]  # (N,)
    errors = returns - batch["values"][batch["mask"]]  # (N,)
    variance = returns.var(correction=0).clamp(min=1e-8)  # returns may all be the same
    return (1 - errors.var(correction=0) / variance).item()


def seed_draws(config, step):
    """Every random draw of an iteration follows from seed and step."""
    torch.manual_seed(config.seed * 1_000_003 + step + 1)


def validate(policy, ref, critic, score, prompts, tokenizer, config):
    """The metrics of a rollout on held-out prompts, with the same draws each time."""
    if not prompts:
        return {}
    torch.manual_seed(config.seed)
    batch = rollout(policy, ref, critic, score, prompts, tokenizer, config)
    return {f"val_{name}": value for name, value in rollout_metrics(batch).items()}


def show_iterations(policy, ref, critic, score, optimizers, batches, tokenizer, config):
    """Two iterations: in the first the policy is still its own reference, and every KL is 0."""
    for step in range(2):
        seed_draws(config, step)
        batch = rollout(policy, ref, critic, score, batches[step], tokenizer, config)
        batch |= compute_advantages(batch, config.beta, config)
        factor = lr_factor(step, config.steps, warmup=0)
        update(policy, critic, optimizers, batch, factor, config)
        with torch.no_grad(), autocast(policy.device):
            tokens, mask = batch["tokens"], batch["mask"]
            new_logprobs = response_logprobs(policy, tokens, mask, config.temperature)  # (B, T)
        show.episodes(step, batch, new_logprobs, tokenizer, config)


def main():
    config = parse_config(Config, __doc__)
    device = setup(config)

    # models: the policy, its frozen reference, reward model or function, the critic
    policy, tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
    ref = copy.deepcopy(policy).requires_grad_(False)
    score, reward_model = load_score(config.reward, tokenizer, device, rows_at_once(config))
    critic = make_critic(policy, reward_model)
    policy.next_logits = compiled(policy.next_logits)  # for the rollouts
    adam = dict(weight_decay=0.0, betas=(0.9, 0.999), eps=1e-5)
    optimizers = make_optimizers(policy, config.lr, **adam)
    optimizers += make_optimizers(critic, config.lr, **adam)

    # data
    block_size = policy.config.block_size
    prompts = load_prompts(config.data, tokenizer, config.max_new_tokens, block_size)
    train, val = hold_out(prompts, size=min(config.val_size, len(prompts) // 4))
    prompt_lengths = [len(prompt.tokens) for prompt in train]
    batches = Batches(train, config.batch_size, config.seed, config.data, prompt_lengths)
    print(f"{policy.n_params():,} parameters in the policy, {len(train):,} + {len(val)} prompts")
    if config.show:
        return show_iterations(policy, ref, critic, score, optimizers, batches, tokenizer, config)

    # metrics before training; a reward that fails here costs no earlier log
    initial = {}
    if not config.resume:
        initial = validate(policy, ref, critic, score, val, tokenizer, config)
    run = Run(config, config.steps, [policy, critic], optimizers, batches, beta=config.beta)
    if initial:
        run.log(0, **initial)
    for step in run:
        # rollout
        seed_draws(config, step)
        start = time.time()
        with run.sampling(step + 1):
            batch = rollout(policy, ref, critic, score, batches[step], tokenizer, config)
        metrics = rollout_metrics(batch)

        # advantages
        beta = run.state["beta"]
        batch |= compute_advantages(batch, beta, config)
        metrics["explained_variance"] = explained_variance(batch)

        # update
        updating = time.time()
        factor = lr_factor(step, config.steps, warmup=0)
        metrics |= update(policy, critic, optimizers, batch, factor, config)
        run.watch(metrics["policy_grad_norm"] + metrics["critic_grad_norm"])

        # the KL penalty's weight
        if config.kl_target:
            kl = metrics["kl_ref"]
            run.state["beta"] = adapt_beta(beta, kl, config.kl_target, config.batch_size)

        # log
        if run.is_due(step, config.log_every):
            seconds = dict(rollout_s=updating - start, update_s=time.time() - updating)
            speed = config.batch_size / sum(seconds.values())
            run.log(step + 1, **metrics, beta=beta, **seconds, episodes_per_s=speed)

    # metrics after training, and one more rollout for the report's picture
    with run.sampling(config.steps):
        if final := validate(policy, ref, critic, score, val, tokenizer, config):
            run.log(config.steps, **final)
        seed_draws(config, config.steps)
        batch = rollout(policy, ref, critic, score, batches[config.steps], tokenizer, config)
    batch |= compute_advantages(batch, run.state["beta"], config)
    episodes = show.extremes(batch, tokenizer)
    save_checkpoint(config.out, "ppo", policy, tokenizer, config, episodes=episodes)


if __name__ == "__main__":
    main()
