"""Stage 3b, PPO: the policy answers, the reward model judges, credit is assigned to tokens, the policy moves a little.

    python ppo.py                                                   # the default world, against out/reward.pt
    python ppo.py --reward my_rewards:length_reward --data mine.jsonl --out out/mine.pt

--data holds {"messages": [… ending in a user message]} a line. --reward is a reward model's checkpoint or
package.module:function, any Python function (prompts, responses) -> list of floats over lists of strings.

Index frame of everything here, (B, T): entry t belongs to the action "choose token t+1 after tokens 0..t". So
logprobs[:, t] = log pi(tokens[:, t+1] | tokens[:, :t+1]), values[:, t] = V(tokens[:, :t+1]), and mask[:, t]
is True where token t+1 is part of the response, its end token included.
"""

import copy
import importlib
import time
from dataclasses import dataclass

import torch

import common
from data import conversation
from model import GPT, token_logprobs
from reward import RewardModel


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that becomes policy and reference
    reward: str = "out/reward.pt"  # reward model checkpoint, or package.module:function
    data: str = "data/world/prompts.jsonl"  # prompts, one a line
    out: str = "out/ppo.pt"  # checkpoint to write
    resume: bool = False  # continue an interrupted run from <out>.resume
    steps: int = 100  # iterations of rollout and update
    batch_size: int = 128  # episodes an iteration
    minibatch_size: int = 64  # episodes an optimizer step
    micro_batch_size: int = 64  # episodes a forward pass, for GPUs that cannot hold a minibatch; changes no result
    epochs: int = 4  # passes over an iteration's episodes
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of the sampling and of every log-probability; no top-k or top-p: they would make the KL wrong
    lr: float = 1e-4  # peak learning rate of policy and critic, linear to 0; a billion parameters want 3e-6
    beta: float = 0.05  # weight of the KL penalty
    kl_target: float = 0.0  # nats a response; not 0: beta adapts to hold it (arXiv 1909.08593)
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda (arXiv 1506.02438)
    clip: float = 0.2  # the ratio stays within 1 +- clip (arXiv 1707.06347)
    value_clip: float = 0.2  # new values stay this near the old ones
    value_coef: float = 0.1  # weight of the value loss
    no_end_score: float = -3.0  # score of a response that did not end, in place of the reward model's
    val_prompts: int = 256  # prompts held out for the score before and after
    log_every: int = 5  # iterations between log lines
    save_every: int = 25  # iterations between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile the forward passes: pays on CUDA, not on CPU
    seed: int = 0  # prompt order and sampling


# ---- credit assignment


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """x (B, T) with mean 0 and variance 1 over the mask, 0 elsewhere."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def last_action(mask):
    """Index of each row's last True: (B, T) -> (B,)."""
    return mask.size(1) - 1 - mask.int().flip(1).argmax(1)


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """r_t = -beta (log pi - log pi_ref), plus the score (B,) at the last action: (B, T).

    This k1 estimate is the right one inside the reward: its sum is the sequence's KL term. k2 or k3 here
    would move the optimum (tests/test_ppo_optimum.py).
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask  # (B, T)
    return rewards.scatter_add(1, last_action(mask)[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438): advantages and returns, each (B, T), 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t
    """
    rewards, values = rewards * mask, values.where(mask, 0)  # after the last action the value is 0
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


# ---- losses


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (arXiv 1707.06347), the mean over response tokens: all (B, T)."""
    ratio = torch.exp(logprobs - old_logprobs)
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return masked_mean(losses, mask)


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, the worse of the new value and of the new value kept near the rollout's: all (B, T)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---- rollout


def response_logprobs(model, tokens, mask, temperature):
    """log pi of the actions in the mask (B, T), 0 elsewhere, and the mean entropy there; tokens (B, T+1)."""
    hidden = model.hidden(tokens[:, :-1])[mask]  # (N, C): only the response's positions need logits
    logits = model.logits(hidden) / temperature  # (N, V)
    taken = token_logprobs(logits, tokens[:, 1:][mask])  # (N,)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy().mean()
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, taken), entropy


def generate_responses(policy, prompts, tokenizer, config, generator):
    """Samples a response to each prompt (token lists): tokens (B, T+1), padded on the right, and mask (B, T)."""
    responses = policy.generate(prompts, config.max_new_tokens, config.temperature, end_id=tokenizer.end, generator=generator)
    rows = [p + r for p, r in zip(prompts, responses)]
    masks = [[0] * (len(p) - 1) + [1] * len(r) for p, r in zip(prompts, responses)]  # the last prompt token's action is the first
    tokens = common.pad_rows(rows, tokenizer.pad, policy.device)  # (B, T+1)
    mask = common.pad_rows([m + [0] for m in masks], 0, policy.device)[:, :-1].bool()  # (B, T)
    return tokens, mask, responses


def load_reward(name, device):
    """scores(tokens, mask, prompts, responses) -> (B,) from a checkpoint or from package.module:function."""
    if ":" not in name:
        reward_model, tokenizer = common.load_checkpoint(name, ["reward"], RewardModel, device)

        def scores(tokens, mask, prompts, responses):
            with common.autocast(device):
                return reward_model.score(tokens, torch.nn.functional.pad(mask, (1, 0)))  # (B,)

        return scores, reward_model, tokenizer
    module, _, function = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        common.die(f"--reward {name}: {e}; give a checkpoint or package.module:function")

    def scores(tokens, mask, prompts, responses):
        return torch.tensor(function(prompts, responses), dtype=torch.float32, device=device)  # (B,)

    return scores, None, None


@torch.no_grad()
def rollout(policy, ref, critic, scores_of, prompts, texts, tokenizer, config, generator):
    """One iteration's experience, as a dict of tensors (B, T), and figures of it."""
    t0 = time.time()
    with common.autocast(policy.device):
        tokens, mask, responses = generate_responses(policy, prompts, tokenizer, config, generator)
    t1 = time.time()
    with common.autocast(policy.device):
        logprobs, entropy = response_logprobs(policy, tokens, mask, config.temperature)  # recomputed: the sampler rounds otherwise
        ref_logprobs, _ = response_logprobs(ref, tokens, mask, config.temperature)
        values = critic(tokens, torch.nn.functional.pad(mask, (1, 0)))[:, :-1]  # (B, T)
    answers = [conversation.decode_response(r, tokenizer) for r in responses]
    scores = scores_of(tokens, mask, texts, answers)  # (B,)
    ended = torch.tensor([r[-1] == tokenizer.end for r in responses], device=scores.device)
    scores = scores.where(ended, config.no_end_score)
    t2 = time.time()
    figures = dict(
        score=scores.mean().item(),
        score_std=scores.std().item(),
        kl=((logprobs - ref_logprobs) * mask).sum(1).mean().item(),  # nats a response, policy to reference
        entropy=entropy.item(),
        length=mask.sum(1).float().mean().item(),
        no_end=1 - ended.float().mean().item(),
    )
    return dict(tokens=tokens, mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores), figures, (t1 - t0, t2 - t1)


# ---- update


def update(policy, critic, optimizers, batch, factor, config):
    """config.epochs passes of minibatch steps over the iteration's episodes; returns the means of the diagnostics."""
    stats = []
    B = len(batch["tokens"])
    for _ in range(config.epochs):
        for minibatch in torch.randperm(B).split(config.minibatch_size):
            n_actions = batch["mask"][minibatch].sum()
            for micro in minibatch.split(config.micro_batch_size):
                b = {name: x[micro] for name, x in batch.items()}
                with common.autocast(policy.device):
                    logprobs, _ = response_logprobs(policy, b["tokens"], b["mask"], config.temperature)
                    values = critic(b["tokens"], torch.nn.functional.pad(b["mask"], (1, 0)))[:, :-1]
                pg_loss = policy_loss(logprobs, b["logprobs"], b["advantages"], b["mask"], config.clip)
                v_loss = value_loss(values, b["values"], b["returns"], b["mask"], config.value_clip)
                share = b["mask"].sum() / n_actions  # the mean is over the optimizer step's tokens, not a mean of means
                ((pg_loss + config.value_coef * v_loss) * share).backward()
                with torch.no_grad():
                    log_ratio = logprobs - b["logprobs"]
                    stats.append(torch.stack([
                        pg_loss, v_loss,
                        masked_mean(log_ratio.exp() - 1 - log_ratio, b["mask"]),  # k3
                        masked_mean(((log_ratio.exp() - 1).abs() > config.clip).float(), b["mask"]),
                    ]))
            for model, optimizer in zip((policy, critic), optimizers):
                common.optimizer_step(model, [optimizer], factor)
    means = torch.stack(stats).mean(0).tolist()
    return dict(zip(("policy_loss", "value_loss", "approx_kl", "clip_fraction"), means))


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    policy, tokenizer = common.load_checkpoint(config.init, ["base", "sft", "ppo"], GPT, device)
    ref = copy.deepcopy(policy).requires_grad_(False)
    scores_of, reward_model, reward_tokenizer = load_reward(config.reward, device)
    if reward_model is None:
        critic = RewardModel(policy.config).to(device)
        critic.trunk.load_state_dict(policy.state_dict())
        torch.nn.init.zeros_(critic.head.weight)
    else:
        critic = copy.deepcopy(reward_model)
        reward_model.requires_grad_(False)
    prompts = common.read_jsonl(config.data, lambda r: conversation.check(r.get("messages")))
    texts = [r["messages"][-1]["content"] for r in prompts]
    prompts = [conversation.render_prompt(r["messages"], tokenizer) for r in prompts]
    val, train = slice(0, config.val_prompts), range(config.val_prompts, len(prompts))
    batches = common.Batches([0] * len(train), config.batch_size, config.seed)
    optimizers = [common.make_optimizers(m, config.lr, weight_decay=0.0, eps=1e-5, betas=(0.9, 0.999))[0] for m in (policy, critic)]
    beta = config.beta

    def val_score(model):
        generator = torch.Generator(device).manual_seed(config.seed)
        _, figures, _ = rollout(model, ref, critic, scores_of, prompts[val], texts[val], tokenizer, config, generator)
        return figures
    before = val_score(policy)
    print({k: round(v, 3) for k, v in before.items()})
    log = common.Log(config.out)
    parts = {"policy": policy, "critic": critic, "optimizer0": optimizers[0], "optimizer1": optimizers[1]}
    for step in common.train_steps(config, config.steps, parts, log):
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + step)
        torch.manual_seed(config.seed * 1_000_003 + step)
        rows = [train[i] for i in batches[step]]
        start = time.time()
        batch, figures, (generate_s, score_s) = rollout(policy, ref, critic, scores_of, [prompts[i] for i in rows], [texts[i] for i in rows], tokenizer, config, generator)
        rewards = token_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], batch["mask"], beta)
        advantages, batch["returns"] = gae(rewards, batch["values"], batch["mask"], config.gamma, config.lam)
        batch["advantages"] = whiten(advantages, batch["mask"])
        t = time.time()
        stats = update(policy, critic, optimizers, batch, common.lr_factor(step, config.steps, 0), config)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            m = batch["mask"]
            ev = 1 - (batch["returns"] - batch["values"])[m].var() / batch["returns"][m].var()
            now = time.time()
            log(step + 1, **figures, **stats, explained_variance=ev.item(), generate_s=generate_s, score_s=score_s, update_s=now - t, eps_s=config.batch_size / (now - start))
    print({k: round(v, 3) for k, v in val_score(policy).items()})
    common.save_checkpoint(config.out, "ppo", policy, tokenizer, config)


if __name__ == "__main__":
    main()
