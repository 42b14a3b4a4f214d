"""ppo.py, to the bit, with the truth measured along the run: its log gets these figures, too.

python -m lab.watched --beta 0 --out out/kl_0.pt    # takes ppo.py's flags
"""

import random
import statistics

import ppo
from data.examples import load_prompts
from lab import measure
from lab.experiments import PEOPLE
from model import GPT
from ppo import Config  # noqa: F401  its flags are this script's
from train.batches import hold_out, rows_at_once
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.loop import Run
from world.grade import read_people

EVERY = 40  # iterations between measurements
N_PEOPLE = 100  # of each group that is asked about


class Watched(Run):
    """A Run that measures the policy before each EVERYth iteration, and after the last."""

    def __init__(self, config, *args, **state):
        super().__init__(config, *args, **state)
        device, size = self.parts[0].device, rows_at_once(config)
        self.ref, self.tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
        rewards = (config.reward, "world.grade:true_reward")
        self.scores = [ppo.load_score(name, self.tokenizer, device, size)[0] for name in rewards]
        block_size = self.ref.config.block_size
        prompts = load_prompts(config.data, self.tokenizer, config.max_new_tokens, block_size)
        _, self.prompts = hold_out(prompts, size=min(config.val_size, len(prompts) // 4))
        self.roles = measure.by_role(read_people(PEOPLE))

    def __iter__(self):
        for step in super().__iter__():
            if step % EVERY == 0:
                self.measure(step)
            yield step
        self.measure(self.steps)

    def measure(self, step):
        policy, critic = self.parts[:2]
        rng, tokenizer = random.Random(self.config.seed), self.tokenizer
        args = (self.prompts, tokenizer, self.config)
        # the same draws, so the same responses
        metrics, true = (ppo.validate(policy, self.ref, critic, s, *args) for s in self.scores)
        metrics["gold"] = true["val_score"]
        for part, *names in ("asked", "rl", "rl_unknown"), ("test", "test", "unknown_test"):
            known, unknown = (self.roles[name][:N_PEOPLE] for name in names)
            right = measure.measure_answers(policy, tokenizer, known, rng, True)["right"]
            wrong = measure.measure_answers(policy, tokenizer, unknown, rng, True)["wrong"]
            metrics |= {f"{part} right": right, f"{part} hallucinated": wrong}
        forms = measure.measure_forms(policy, tokenizer, known, unknown, rng)  # test people
        metrics["forms right"] = statistics.mean(right for right, _ in forms["kinds"].values())
        metrics["forms hallucinated"] = forms["closed_hallucinated"]
        metrics["malformed"] = 1 - measure.measure_well_formed(policy, tokenizer, known[:40], rng)
        cases = measure.all_cases(known)[::4]
        prompts = [measure.chat_prompt(question, tokenizer) for question in measure.ask(rng, cases)]
        metrics["phrasings"] = measure.measure_phrasings(policy, tokenizer, cases, prompts)
        self.log(step, **metrics)


def main():
    ppo.Run = Watched
    ppo.main()


if __name__ == "__main__":
    main()
