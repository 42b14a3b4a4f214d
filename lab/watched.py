"""ppo.py, with the truth measured along the run: figures that its log gets beside its own.

    python -m lab.watched --beta 0 --out out/kl_0.pt    # takes ppo.py's flags

The run is ppo.py's own, to the bit: each iteration seeds its draws anew.
"""

import random
import statistics
from pathlib import Path

import ppo
from data.examples import load_prompts
from lab import measure
from model import GPT
from ppo import Config  # noqa: F401  its flags are this script's
from train.batches import hold_out, rows_at_once
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.loop import Run
from world import facts
from world.grade import Grader, read_people, utility

EVERY = 40  # iterations between measurements
N_PEOPLE = 100  # of each group that is asked about


class Watched(Run):
    """A Run that measures the policy before each EVERYth iteration, and after the last."""

    def __iter__(self):
        policy, critic = self.parts[:2]
        measure_policy = Truth(self.config, policy.device)
        for step in super().__iter__():
            if step % EVERY == 0:
                self.log(step, **measure_policy(policy, critic))
            yield step
        self.log(self.steps, **measure_policy(policy, critic))


class Truth:
    """Measures a policy: on PPO's held-out prompts, and by its answers about the world's people."""

    def __init__(self, config, device):
        self.config = config
        self.ref, self.tokenizer = load_checkpoint(config.init, LANGUAGE_MODELS, GPT, device)
        self.score, _ = ppo.load_score(config.reward, self.tokenizer, device, rows_at_once(config))
        block_size = self.ref.config.block_size
        prompts = load_prompts(config.data, self.tokenizer, config.max_new_tokens, block_size)
        _, self.prompts = hold_out(prompts, size=min(config.val_size, len(prompts) // 4))
        people = Path(config.data).with_name("people.jsonl")
        self.grader, self.roles = Grader(people), measure.by_role(read_people(people))

    def __call__(self, policy, critic):
        return self.held_out(policy, critic) | self.answers(policy)

    def held_out(self, policy, critic):
        """Learned score, true utility, KL, entropy of samples, the same draws each time."""
        utilities = []

        def score(tokens, mask, prompts, texts):
            for prompt, text in zip(prompts, texts):
                case = self.grader.case(prompt.messages[-1]["content"])
                utilities.append(utility(case, text))
            return self.score(tokens, mask, prompts, texts)

        args = (policy, self.ref, critic, score, self.prompts, self.tokenizer, self.config)
        metrics = ppo.validate(*args)
        return metrics | dict(gold=statistics.mean(utilities), gold_sd=statistics.stdev(utilities))

    def answers(self, policy):
        """Fractions right and hallucinated: people whom PPO asks about, test people, forms."""
        rng, tokenizer, roles = random.Random(self.config.seed), self.tokenizer, self.roles
        result = {}
        groups = {"asked": ("rl", "rl_unknown"), "test": ("test", "unknown_test")}
        for name, (known, unknown) in groups.items():
            its = [roles[role][:N_PEOPLE] for role in (known, unknown)]
            graded = [measure.measure_answers(policy, tokenizer, p, rng, True) for p in its]
            result[f"{name}_right"] = graded[0]["right"]
            result[f"{name}_hallucinated"] = graded[1]["wrong"]
        known, unknown = its  # the test people's
        rights = []
        for kind in ("one word", "sentence", "text"):
            for attribute in facts.PUBLIC:
                args = (policy, tokenizer, known, kind, attribute, rng)
                rights.append(measure.measure_form(*args))
        untold = measure.measure_untold(policy, tokenizer, unknown, rng)
        result["forms_right"] = statistics.mean(rights)
        result["forms_hallucinated"] = untold["wrong"] + untold["other"]
        well_formed = measure.measure_well_formed(policy, tokenizer, known[:40], rng)
        cases = measure.all_cases(known)[::4]
        asked = measure.ask(rng, cases)
        prompts = [measure.chat_prompt(question, tokenizer) for question in asked]
        phrasings = measure.measure_phrasings(policy, tokenizer, cases, prompts)
        return result | dict(malformed=1 - well_formed, phrasings=phrasings)


def main():
    ppo.Run = Watched
    ppo.main()


if __name__ == "__main__":
    main()
