"""The other side of bench.run's PPO rows: TRL's PPOTrainer, an iteration for each line on stdin.

Run by the interpreter of --trl_python. TRL had a PPOTrainer up to version 1.12:
pip install trl==1.12.0
"""

import copy
import json
import sys
import tempfile
from types import SimpleNamespace

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from trl.experimental.ppo import PPOConfig, PPOTrainer


class OddIds(torch.nn.Module):
    """The reward function as the network that TRL wants: the hidden states are the ids."""

    base_model_prefix = "backbone"

    def backbone(self, input_ids, **kwargs):
        return SimpleNamespace(hidden_states=[input_ids])  # (B, T)

    def score(self, ids):
        return (ids % 2).float().cumsum(1)[..., None]  # (B, T, 1)


class OnDemand(transformers.TrainerCallback):
    """Says on stdout when an iteration is over, and starts the next one at a line of stdin."""

    def on_train_begin(self, *args, **kwargs):
        print("ready", flush=True)
        if not sys.stdin.readline():
            sys.exit()

    on_step_end = on_train_begin


def main():
    size = json.loads(sys.argv[1])
    V, B = size["config"]["vocab_size"], size["batch"]

    # models
    config = transformers.LlamaConfig(**size["config"], num_labels=1)
    policy = transformers.LlamaForCausalLM(config)
    ref = copy.deepcopy(policy)
    critic = transformers.LlamaForSequenceClassification(config)

    # data
    words = Tokenizer(models.WordLevel({str(i): i for i in range(V)}, unk_token="1"))
    names = dict(pad_token="0", eos_token="1", padding_side="left")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    prompts = torch.randint(2, V, (4 * B, size["prompt"])).tolist()
    prompts = Dataset.from_dict({"input_ids": prompts})

    # iterations
    settings = dict(use_cpu=size["device"] == "cpu", bf16=size["bf16"], learning_rate=1e-5)
    settings |= dict(gradient_checkpointing=False, temperature=1.0, total_episodes=1000 * B)
    settings |= dict(response_length=size["new_tokens"], num_ppo_epochs=size["epochs"])
    settings |= dict(per_device_train_batch_size=B, local_rollout_forward_batch_size=B)
    settings |= dict(num_mini_batches=B // size["minibatch"], num_sample_generations=0)
    quiet = dict(report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(output_dir=folder, **settings, **quiet)
        parts = (args, tokenizer, policy, ref, OddIds(), prompts, critic)
        PPOTrainer(*parts, callbacks=[OnDemand()]).train()


if __name__ == "__main__":
    main()
