"""The other side of bench.run's PPO rows: TRL's PPOTrainer, one iteration for each line on stdin. Run by the interpreter of --trl_python.

TRL had a PPOTrainer up to version 1.12: pip install trl==1.12.0
"""

import copy
import json
import sys
import tempfile
from types import SimpleNamespace

import tokenizers
import torch
import transformers
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer


class OddIds(torch.nn.Module):
    """The reward function as TRL wants it, a network: a backbone whose hidden states are the ids, and a score at each token."""

    base_model_prefix = "backbone"

    def backbone(self, input_ids, **kwargs):
        return SimpleNamespace(hidden_states=[input_ids])  # (B, T)

    def score(self, ids):
        return (ids % 2).float().cumsum(1)[..., None]  # (B, T, 1)


class OnDemand(transformers.TrainerCallback):
    """Says on stdout when an iteration is over, and starts the next one at the next line of stdin."""

    def on_train_begin(self, *args, **kwargs):
        print("ready", flush=True)
        if not sys.stdin.readline():
            sys.exit()

    on_step_end = on_train_begin


def main():
    size = json.loads(sys.argv[1])
    V = size["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=size["n_embd"], intermediate_size=size["n_inner"], num_hidden_layers=size["n_layer"],
        num_attention_heads=size["n_head"], max_position_embeddings=size["prompt"] + size["new_tokens"], tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    policy = transformers.LlamaForCausalLM(config)
    ref = copy.deepcopy(policy)
    critic = transformers.LlamaForSequenceClassification(config)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(V)}, unk_token="1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", padding_side="left")
    prompts = torch.randint(2, V, (4 * size["batch"], size["prompt"])).tolist()
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder, use_cpu=size["device"] == "cpu", bf16=size["bf16"], gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", num_sample_generations=0, disable_tqdm=True, total_episodes=1000 * size["batch"],
            per_device_train_batch_size=size["batch"], num_mini_batches=size["batch"] // size["minibatch"],
            local_rollout_forward_batch_size=size["batch"], num_ppo_epochs=size["epochs"], response_length=size["new_tokens"],
            temperature=1.0, learning_rate=1e-5,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": prompts})
        PPOTrainer(args, tokenizer, policy, ref, OddIds(), data, critic, callbacks=[OnDemand()]).train()


if __name__ == "__main__":
    main()
