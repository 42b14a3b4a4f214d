"""`ppo.py --reward package.module:function`: a Python function of the user's as the reward."""

import importlib
import inspect
import sys

import torch

from utils.cli import die


class RewardFunction:
    """Called with Prompts and responses (strings), gives scores (B,).

    The function gets the last user messages and the responses, two lists of strings, and the whole
    lists of messages if it has a parameter named conversations. It returns a float per response.
    """

    def __init__(self, name, device):
        self.name, self.device = name, device
        module, _, function = name.partition(":")
        sys.path.insert(0, "")  # the user's own file in the current folder
        try:
            self.function = getattr(importlib.import_module(module), function)
            parameters = inspect.signature(self.function).parameters
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            die(f"--reward {name}: {e!r:.200}; give a checkpoint or package.module:function")
        self.wants_conversations = "conversations" in parameters

    def __call__(self, prompts, responses):
        conversations = [prompt.messages for prompt in prompts]
        questions = [messages[-1]["content"] for messages in conversations]
        more = {"conversations": conversations} if self.wants_conversations else {}
        try:
            returned = self.function(questions, responses, **more)
            scores = torch.tensor(returned, dtype=torch.float32, device=self.device)  # (B,)
            if scores.shape != (len(prompts),) or not scores.isfinite().all():
                raise ValueError(f"it returned {returned}")
        except (Exception, SystemExit) as e:
            die(
                f"--reward {self.name}: {e!r:.200}; needed: {len(prompts)} finite floats, "
                "one per response; --debug shows where"
            )
        return scores
