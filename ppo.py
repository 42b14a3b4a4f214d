"""Stage 3b, PPO: the policy answers, the reward model judges, credit is assigned to tokens, the policy moves a little.

    python ppo.py                                                   # the default world, against out/reward.pt
    python ppo.py --reward my_rewards:brevity --data mine.jsonl --out out/mine.pt
    python ppo.py --show                                            # episodes with the credit of each token, then stop

--data holds {"messages": [… ending in a user message]} a line. --reward is a reward model's checkpoint or
package.module:function, any Python function (prompts, responses) -> list of floats over two lists of strings.

Index frame of all tensors (B, T) here: entry t belongs to the action "choose token t+1 after tokens 0..t", so
logprobs[:, t] = log pi(tokens[:, t+1] | tokens[:, :t+1]), values[:, t] = V(tokens[:, :t+1]), and mask[:, t] is
True where token t+1 is part of the response, its end token included. tokens itself is (B, T+1).
"""

import copy
import importlib
import math
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import loop
import parallel
import show
from data import conversation
from model import GPT, last_true, token_logprobs
from reward import RewardModel


@dataclass
class Config:
    init: str = "out/sft.pt"  # checkpoint that becomes policy and reference
    reward: str = "out/reward.pt"  # reward model checkpoint, or package.module:function
    data: str = "data/world/prompts.jsonl"  # prompts, one a line
    out: str = "out/ppo.pt"  # checkpoint to write
    resume: str = ""  # go on with an interrupted run: from <out>.resume, or with "previous" from the state before
    steps: int = 80  # iterations of rollout and update
    batch_size: int = 128  # episodes an iteration
    minibatch_size: int = 64  # episodes an optimizer step
    micro_batch_size: int = 64  # episodes a forward pass, for GPUs that cannot hold a minibatch; changes no result
    epochs: int = 2  # passes over an iteration's episodes; 4 cost twice the time and abstain a little more often
    max_new_tokens: int = 16  # longest response
    temperature: float = 1.0  # of the sampling and of every log-probability; no top-k or top-p: the KL would be wrong
    lr: float = 2e-4  # peak learning rate of policy and critic, linear to 0; a billion parameters want 3e-6
    beta: float = 0.05  # weight of the KL penalty
    kl_target: float = 0.0  # nats a response; if not 0, beta adapts to hold it (arXiv 1909.08593)
    gamma: float = 1.0  # discount
    lam: float = 0.95  # GAE's lambda (arXiv 1506.02438)
    clip: float = 0.2  # the ratio stays within 1 +- clip (arXiv 1707.06347)
    value_clip: float = 0.2  # new values stay this near the rollout's
    value_coef: float = 0.1  # weight of the value loss
    no_end_score: float = -3.0  # score of a response that does not end, in place of the reward model's
    min_score: float = -math.inf  # lower scores are raised to it; 0: no negative feedback, an experiment's control
    val_prompts: int = 512  # prompts, the file's last, held out for the score before and after; at most a quarter
    log_every: int = 5  # iterations between log lines
    save_every: int = 20  # iterations between states for --resume
    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile the forward passes: pays on CUDA, not on CPU
    seed: int = 0  # prompt order and sampling
    show: bool = False  # print episodes of the first batch and exit; writes nothing


# ---- credit assignment


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """x (B, T) shifted and scaled to mean 0 and variance 1 over the mask, 0 elsewhere."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """-beta (log pi - log pi_ref) at each action, plus the score (B,) at the last one: (B, T).

    This k1 estimate is the right one inside the reward, where its sum is the response's KL term; k2 or k3 here
    would move the optimum (arXiv 2203.02155 equation 2).
    """
    rewards = -beta * (logprobs - ref_logprobs) * mask
    return rewards.scatter_add(1, last_true(mask)[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (arXiv 1506.02438): advantages and returns, (B, T) each, 0 outside the mask.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t
    """
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)  # V is 0 once the response has ended
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage).where(mask[:, t], 0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def credit(batch, beta, config):
    """The rollout's batch with rewards, advantages (whitened, and raw) and returns, (B, T) each."""
    rewards = token_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], batch["mask"], beta)
    advantages, returns = gae(rewards, batch["values"], batch["mask"], config.gamma, config.lam)
    whitened = whiten(advantages, batch["mask"])
    return batch | dict(rewards=rewards, raw_advantages=advantages, advantages=whitened, returns=returns)


def adapt_beta(beta, kl, kl_target, n_episodes, horizon=10_000):
    """Adaptive KL controller (arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return beta * (1 + error * n_episodes / horizon)


# ---- losses


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (arXiv 1707.06347), the mean over the actions; all (B, T)."""
    ratio = torch.exp(logprobs - old_logprobs)
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return masked_mean(losses, mask)


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error, the worse of the new value's and of the new value's kept near the old; all (B, T)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---- forward passes


def response_logprobs(model, tokens, mask, temperature, with_entropy=False):
    """log pi of each action (B, T), 0 outside the mask, and the mean entropy of the policy there or None; tokens (B, T+1)."""
    hidden = model.hidden(tokens[:, :-1])[mask]  # (N, C): only the response's positions need logits
    logits = model.logits(hidden) / temperature  # (N, V)
    taken = token_logprobs(logits, tokens[:, 1:][mask])  # (N,)
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy().mean() if with_entropy else None
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, taken), entropy


def action_values(critic, tokens, mask):
    """V before each action: (B, T); tokens (B, T+1)."""
    return critic(tokens, F.pad(mask, (1, 0)))[:, :-1]


def generate_responses(policy, prompts, tokenizer, config):
    """Samples a response to each prompt (token lists): tokens (B, T+1), padded on the right, mask (B, T), token lists."""
    options = dict(end_id=tokenizer.end, rand=parallel.rand(len(prompts)))
    mine = policy.generate(parallel.mine(prompts), config.max_new_tokens, config.temperature, **options)
    responses = parallel.gather(mine)
    n_missed = max(map(len, responses)) - max(map(len, mine))  # steps in which only other processes had a row to go on with
    torch.rand(n_missed * len(prompts), device=policy.device)  # so that all go on with the same random numbers
    tokens = common.pad_rows([p + r for p, r in zip(prompts, responses)], tokenizer.pad, policy.device)  # (B, T+1)
    mask = common.pad_rows([[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses)], 0, policy.device)[:, 1:].bool()  # (B, T)
    return tokens, mask, responses


def load_reward(name, tokenizer, device):
    """score(tokens, mask, prompts, responses) -> (B,), and the reward model behind it or None."""
    if ":" in name:
        module, _, function_name = name.partition(":")
        sys.path.insert(0, "")  # the user's own file in the current folder
        try:
            function = getattr(importlib.import_module(module), function_name)
        except Exception as e:  # the user's own code may raise anything, here and when called
            common.die(f"--reward {name}: {e!r:.200}; give a checkpoint or package.module:function")

        def score(tokens, mask, prompts, responses):
            try:
                returned = function(prompts, responses)
                scores = torch.tensor(returned, dtype=torch.float32, device=device)  # (B,)
                if scores.shape != (len(prompts),) or not scores.isfinite().all():
                    raise ValueError(f"it returned {returned}")
            except Exception as e:
                common.die(f"--reward {name}: {e!r:.200}; needed: {len(prompts)} finite floats, one a response; --debug shows where")
            return scores

        return score, None
    model, reward_tokenizer = common.load_checkpoint(name, ["reward"], RewardModel, device)
    if reward_tokenizer.dumps() != tokenizer.dumps():
        common.die(f"{name}: its tokenizer is not the policy's; train the reward model from the same base")
    model.requires_grad_(False)

    def score(tokens, mask, prompts, responses):
        with common.autocast(device):
            return model.score(tokens, F.pad(mask, (1, 0)))  # (B,)

    return score, model


# ---- one iteration: rollout, then update


@torch.no_grad()
def rollout(policy, ref, critic, score, prompts, texts, tokenizer, config):
    """Experience of one iteration as a dict of tensors, figures of it, and the seconds of generation and scoring."""
    t0 = time.time()
    with common.autocast(policy.device):
        tokens, mask, responses = generate_responses(policy, prompts, tokenizer, config)
        t1 = time.time()
        mine = parallel.mine(tokens), parallel.mine(mask)
        # not the sampler's log-probabilities: it rounds otherwise
        logprobs, entropy = response_logprobs(policy, *mine, config.temperature, with_entropy=True)
        ref_logprobs, _ = response_logprobs(ref, *mine, config.temperature)
        values = action_values(critic, *mine)
    scores = score(*mine, parallel.mine(texts), [conversation.decode_response(r, tokenizer) for r in parallel.mine(responses)])  # (B,)
    logprobs, ref_logprobs, values, scores = map(parallel.gather, (logprobs, ref_logprobs, values, scores))
    ended = torch.tensor([r[-1] == tokenizer.end for r in responses], device=scores.device)  # (B,)
    scores = scores.where(ended, config.no_end_score).clamp(min=config.min_score)
    figures = dict(
        score=scores.mean().item(),
        score_se=(scores.var(correction=0) / max(len(scores) - 1, 1)).sqrt().item(),  # 0 for a single one
        kl_ref=(logprobs - ref_logprobs).sum(1).mean().item(),  # nats a response, from the reference
        entropy=parallel.total(entropy * (mine[1].sum() / mask.sum())).item(),  # nats a token
        length=mask.sum(1).float().mean().item(),
        no_end=1 - ended.float().mean().item(),
        non_pad=(tokens != tokenizer.pad).float().mean().item(),  # share of the batch
    )
    batch = dict(tokens=tokens, mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores)
    return batch, figures, (t1 - t0, time.time() - t1)


def update(policy, critic, optimizers, batch, lr_factor, config):
    """config.epochs passes of minibatch steps over the iteration's episodes; returns the diagnostics' means."""
    diagnostics, lengths = [], last_true(batch["mask"]).cpu() + 1  # (B,): columns up to a row's last action
    for _ in range(config.epochs):
        for minibatch in torch.randperm(len(lengths)).split(config.minibatch_size):
            n_actions, mine = batch["mask"][minibatch].sum(), parallel.mine(minibatch)
            for micro in mine[lengths[mine].argsort(stable=True)].split(config.micro_batch_size):  # of like length: few pads
                T = lengths[micro].max().item()
                b = {name: x[micro, : T + (name == "tokens")] if x.dim() > 1 else x[micro] for name, x in batch.items()}
                with common.autocast(policy.device):
                    logprobs, _ = response_logprobs(policy, b["tokens"], b["mask"], config.temperature)  # (B, T)
                    values = action_values(critic, b["tokens"], b["mask"])  # (B, T)
                pg_loss = policy_loss(logprobs, b["logprobs"], b["advantages"], b["mask"], config.clip)
                v_loss = value_loss(values, b["values"], b["returns"], b["mask"], config.value_clip)
                share = b["mask"].sum() / n_actions  # so that the mean runs over the step's actions: no mean of means
                ((pg_loss + config.value_coef * v_loss) * share).backward()
                log_ratio = (logprobs - b["logprobs"]).detach()
                approx_kl = masked_mean(log_ratio.exp() - 1 - log_ratio, b["mask"])  # k3, from the rollout's policy
                clip_fraction = masked_mean(((log_ratio.exp() - 1).abs() > config.clip).float(), b["mask"])
                diagnostics.append(torch.stack([pg_loss.detach(), v_loss.detach(), approx_kl, clip_fraction]) * share)
            for model, optimizer in zip((policy, critic), optimizers):
                common.optimizer_step(model, [optimizer], lr_factor)
    means = parallel.total(torch.stack(diagnostics).sum(0)) / (config.epochs * math.ceil(len(lengths) / config.minibatch_size))
    return dict(zip(("policy_loss", "value_loss", "approx_kl", "clip_fraction"), means.tolist()))


def load_prompts(path, tokenizer, config, block_size):
    """Token lists, the texts of the last user messages, and the numbers of the lines."""
    records = common.read_jsonl(path, lambda r: conversation.check_prompt(r.get("messages"), tokenizer, config.max_new_tokens, block_size))
    prompts = [conversation.render_prompt(r["messages"], tokenizer) for r in records]
    return prompts, [r["messages"][-1]["content"] for r in records], [r.line for r in records]


def main():
    config = common.parse_config(Config, __doc__)
    device = common.setup(config)
    policy, tokenizer = common.load_checkpoint(config.init, ["base", "sft", "ppo"], GPT, device)
    if config.temperature < 1e-3:
        common.die(f"--temperature {config.temperature:g}: a greedy policy explores nothing, its log-probabilities overflow; give 0.001 or more")
    ref = copy.deepcopy(policy).requires_grad_(False)
    score, reward_model = load_reward(config.reward, tokenizer, device)
    critic = copy.deepcopy(reward_model).requires_grad_(True) if reward_model else RewardModel(policy.config).to(device)
    if not reward_model:  # a function has no weights to start from: the policy's trunk, values 0
        critic.trunk.load_state_dict(policy.state_dict())
        torch.nn.init.zeros_(critic.head.weight)
        torch.nn.init.zeros_(critic.likelihood_weight)
    if config.compile:
        for model in (policy, ref, critic.trunk):
            model.hidden = torch.compile(model.hidden)
    prompts, texts, lines = load_prompts(config.data, tokenizer, config, policy.config.block_size)
    n_val = min(config.val_prompts, len(prompts) // 4)
    train, val = common.hold_out(range(len(prompts)), n_val)
    if len(train) < config.batch_size or 0 < n_val < parallel.size:
        common.die(f"{config.data}: {len(train)} + {n_val} prompts are fewer than --batch_size {config.batch_size}, or than processes")
    batches = common.Batches([0] * len(train), config.batch_size, config.seed)
    # Adam's usual second beta here: rewards are noisier than next-token losses
    optimizers = [common.make_optimizers(m, config.lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-5)[0] for m in (policy, critic)]
    print(f"{policy.n_params():,} parameters in the policy, {len(train):,} + {n_val} prompts, {config.batch_size} episodes a step")
    log = loop.Log(config.out, lambda step: f"{config.data}, lines {sorted(lines[train[i]] for i in batches[step])}")

    def run(rows, step):
        try:
            return rollout(policy, ref, critic, score, [prompts[i] for i in rows], [texts[i] for i in rows], tokenizer, config)
        except FloatingPointError as e:
            log.stop(step, e)

    def run_step(step):
        torch.manual_seed(config.seed * 1_000_003 + step + 1)  # every random draw of an iteration follows from seed and step
        return run([train[i] for i in batches[step]], step + 1)

    def validate(step):
        """Score and KL on the held-out prompts, with the same random draws each time."""
        torch.manual_seed(config.seed)
        return {f"val_{name}": value for name, value in run(val, step)[1].items()}

    if config.show:
        for step in range(2):  # in the first iteration the policy is still its own reference, and every kl 0
            batch = credit(run_step(step)[0], config.beta, config)
            update(policy, critic, optimizers, batch, common.lr_factor(step, config.steps, 0), config)
            with torch.no_grad(), common.autocast(device):
                new_logprobs, _ = response_logprobs(policy, batch["tokens"], batch["mask"], config.temperature)
            show.episodes(step, batch, new_logprobs, tokenizer, config)
        return

    state = torch.nn.Module()  # what changes during the run beside the networks, in a form that can be saved
    state.register_buffer("beta", torch.tensor(config.beta, dtype=torch.float64))
    initial = validate(0) if n_val and not config.resume else {}  # before the log is opened: a reward function that fails costs no earlier log
    parts = dict(policy=policy, critic=critic, policy_optimizer=optimizers[0], critic_optimizer=optimizers[1], state=state)
    for step in loop.train_steps(config, config.steps, parts, log):
        if step == 0 and n_val:
            log(0, **initial)
        batch, figures, (generate_s, score_s) = run_step(step)
        start = time.time()
        batch = credit(batch, state.beta, config)
        diagnostics = update(policy, critic, optimizers, batch, common.lr_factor(step, config.steps, 0), config)
        seconds = dict(generate_s=generate_s, score_s=score_s, update_s=time.time() - start)
        if config.kl_target:
            state.beta = adapt_beta(state.beta, figures["kl_ref"], config.kl_target, config.batch_size)

        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            returns, values = batch["returns"][batch["mask"]], batch["values"][batch["mask"]]  # (N,) each
            variance = returns.var(correction=0).clamp(min=1e-8)  # returns may all be the same
            explained_variance = (1 - (returns - values).var(correction=0) / variance).item()
            seconds["episodes_per_s"] = config.batch_size / sum(seconds.values())
            log(step + 1, **figures, **diagnostics, explained_variance=explained_variance, beta=state.beta.item(), **seconds)
    if n_val:
        log(config.steps, **validate(config.steps))
    batch = credit(run_step(config.steps)[0], state.beta, config)  # one more rollout, for the report's picture of its credit
    common.save_checkpoint(config.out, "ppo", policy, tokenizer, config, episodes=show.extremes(batch, tokenizer))


if __name__ == "__main__":
    main()
