"""A conversation as tokens, and the mask of those that train; both made in one pass.

<|user|>Where was Rosa Malsen born?<|end|><|assistant|>Dorvik.<|end|>
                                                       ^^^^^^^^^^^^^^ mask 1

A model that convert.py brought has turns of its own (tokenizer.chat): <|im_start|>user and a line
end open a question there, <|im_end|> and a line end close it.
"""

from data.tokenizer import Tokenizer


def check(messages):
    """What is wrong with the messages, in a few words, or None."""
    if not isinstance(messages, list) or not messages:
        return "messages must be a list of at least one message"
    for number, message in enumerate(messages, 1):
        parts = message if isinstance(message, dict) else {}
        if not all(isinstance(parts.get(key), str) for key in ("role", "content")):
            return f'message {number} must be {{"role": "…", "content": "…"}}'
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        return f"roles must be an optional system, then user and assistant in turn, not {roles}"


def check_prompt(messages, tokenizer: Tokenizer, max_new_tokens, block_size):
    """What is wrong with messages that a model of block_size is to answer, or None."""
    if wrong := check(messages):
        return wrong
    if messages[-1]["role"] != "user":
        return "messages must end in a user message"
    n = len(render_prompt(messages, tokenizer))
    if n + max_new_tokens > block_size:
        sizes = f"{n} tokens + {max_new_tokens} new ones do not fit in the model's {block_size}"
        return f"{sizes}; shorten it or leave it out"


def render(messages, tokenizer: Tokenizer):
    """messages -> (tokens, mask): mask is 1 on the assistant's content and its end token."""
    if wrong := check(messages):
        raise ValueError(wrong)
    has_system = messages[0]["role"] == "system"
    tokens = [] if has_system else list(tokenizer.chat["start"])
    mask = [0] * len(tokens)
    for message in messages:
        opening, closing = tokenizer.chat[message["role"]]
        content = tokenizer.encode(message["content"])
        tokens += opening + content + closing
        if message["role"] == "assistant":  # closing begins with the end token
            mask += [0] * len(opening) + [1] * (len(content) + 1) + [0] * (len(closing) - 1)
        else:
            mask += [0] * len(opening + content + closing)
    return tokens, mask


def render_prompt(messages, tokenizer: Tokenizer):
    """messages that end in a user turn -> tokens up to where the assistant's answer begins."""
    tokens, _ = render(messages, tokenizer)
    if messages[-1]["role"] != "user":
        raise ValueError("a prompt must end in a user message")
    return tokens + tokenizer.chat["assistant"][0]


def decode_response(tokens, tokenizer: Tokenizer):
    """Generated tokens -> the answer's text, without its end token."""
    ended = tokens and tokens[-1] == tokenizer.end
    return tokenizer.decode(tokens[:-1] if ended else tokens)
