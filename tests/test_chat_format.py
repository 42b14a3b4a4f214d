"""A model's own turns: read from its chat template, used by every stage, and given back."""

import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_convert import TEXT, from_hf, hf_model, hf_tokenizer, learn, load_hf, load_ours, to_hf
from test_parity import needed

import chat
import convert
import ppo
import reward
import sft
from data import conversation
from data.examples import load_pairs, load_prompts
from data.tokenizer import SPECIAL_TOKENS, Tokenizer
from utils.files import write_jsonl

transformers = needed("transformers")

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are an owl.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3 does it, the newest answer alone is preceded by thoughts, here empty ones.
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Llama 3's kind: a token that begins the text, and the role's name between two tokens.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header|>' + m['role'] + '<|body|>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|body|>\n\n' }}{% endif %}"
)
# Each with the split of the family that has such turns.
TEMPLATES = {
    "chatml": (CHATML, "smollm2"),
    "thinking": (THINKING, "qwen3"),
    "headers": (HEADERS, "llama3"),
}
SPECIALS = ["<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIALS += ["<|header|>", "<|body|>"]


def make_folder(path, template, split):
    """A folder of transformers, whose model has learned to answer with the beginning of TEXT."""
    theirs = hf_tokenizer(split, specials_first=SPECIALS)
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        chat_template=template,
    )
    model = hf_model("llama", theirs.get_vocab_size(), tied=True)
    learned = text_of(hf, QUESTION, add_generation_prompt=True) + TEXT[:40] + "<|im_end|>"
    learn(model, torch.tensor([theirs.encode(learned, add_special_tokens=False).ids]))
    model.generation_config.eos_token_id = hf.eos_token_id
    model.save_pretrained(path)
    hf.save_pretrained(path)
    return path


def said(role, content):
    return {"role": role, "content": content}


def text_of(hf, messages, **how):
    return hf.apply_chat_template(messages, tokenize=False, **how)


QUESTION = [said("user", "Where does the owl live?")]
TURNS = [
    said("system", "Be brief."),
    said("user", "naïve 東京 😀 12"),
    said("assistant", "In Dorvik."),
    said("user", "{{ braces }} {% and %}  two  spaces 'quotes'"),
    said("assistant", ""),
    said("user", "?"),
]
CONVERSATIONS = [QUESTION, TURNS, TURNS[1:], TURNS[:2], TURNS[1:4]]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """{kind of template: (folder, their model and tokenizer, ours)}"""
    pairs = {}
    for kind, (template, split) in TEMPLATES.items():
        folder = make_folder(tmp_path_factory.mktemp(kind) / "hf", template, split)
        from_hf(folder, folder.parent / "base.pt")
        pairs[kind] = folder.parent, load_hf(folder), load_ours(folder.parent / "base.pt")
    return pairs


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_prompts_have_the_ids_that_the_models_own_template_gives(converted, kind):
    _, (_, hf), (_, tokenizer) = converted[kind]
    for messages in CONVERSATIONS:
        theirs = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ours = conversation.render_prompt(messages, tokenizer)
        assert ours == theirs["input_ids"], hf.decode(ours)
    # none of this project's tokens was appended: only what the vocabulary lacked
    assert not set(SPECIAL_TOKENS) & set(tokenizer.rules["special_tokens"])
    assert tokenizer.vocab_size == len(hf)
    assert tokenizer.separator == hf.convert_tokens_to_ids("<|begin_of_text|>")
    assert tokenizer.end == hf.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_the_answers_and_their_end_tokens_train_and_no_line_break_after_them(converted, kind):
    _, _, (_, tokenizer) = converted[kind]
    tokens, mask = conversation.render([*TURNS, said("assistant", "Owls.")], tokenizer)
    assert len(tokens) == len(mask)
    trained = [token for token, trains in zip(tokens, mask) if trains]
    assert tokenizer.decode(trained) == "In Dorvik.<|im_end|><|im_end|>Owls.<|im_end|>"
    prompt = conversation.render_prompt(TURNS, tokenizer)
    assert tokens[: len(prompt)] == prompt and not any(mask[len(prompt) - 2 : len(prompt)])
    answer = tokens[len(prompt) :]
    assert tokenizer.decode(answer).rstrip("\n") == "Owls.<|im_end|>"
    answer = answer[: answer.index(tokenizer.end) + 1]
    assert conversation.decode_response(answer, tokenizer) == "Owls."


MARKS = ["<|im_end|>", "<|im_start|>", "<|header|>", "\n", "assistant", "user", "<think>"]


@given(contents=st.lists(st.lists(st.sampled_from(MARKS) | st.text()).map("".join), min_size=1))
def test_no_text_can_open_or_close_a_turn(converted, contents):
    for _, _, (_, tokenizer) in converted.values():
        messages = [said(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
        tokens, _ = conversation.render(messages, tokenizer)
        empty, _ = conversation.render([said(m["role"], "") for m in messages], tokenizer)
        rules = tokenizer.rules
        names = rules["special_tokens"].keys() - set(rules["text_tokens"])
        marks = {rules["special_tokens"][name] for name in names}
        assert [t for t in tokens if t in marks] == [t for t in empty if t in marks]


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_it_answers_in_chat_as_in_transformers_and_goes_back_there(converted, kind, tmp_path):
    folder, (theirs, hf), (ours, tokenizer) = converted[kind]
    config = chat.Config(temperature=0.0, max_new_tokens=45)
    pieces = []
    one = chat.Chat(folder / "base.pt", tiny.CPU)
    answer = one.answer(QUESTION[0]["content"], config, pieces.append)
    assert "".join(pieces) == answer == TEXT[:40]
    to_hf(folder / "base.pt", tmp_path / "back")
    back, its_tokenizer = load_hf(tmp_path / "back")
    assert its_tokenizer.eos_token_id == its_tokenizer.pad_token_id == tokenizer.end
    for model, other in ((theirs, hf), (back, its_tokenizer)):
        # no options: the folder itself must say what ends the answer
        prompt = other.apply_chat_template(
            QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=45, do_sample=False
        )[0, prompt.size(1) :]
        assert other.decode(ids, skip_special_tokens=True) == answer
        assert ids[-1] == tokenizer.end
    for messages in CONVERSATIONS:
        assert text_of(its_tokenizer, messages, add_generation_prompt=True) == text_of(
            hf, messages, add_generation_prompt=True
        )
    from_hf(tmp_path / "back", tmp_path / "again.pt")
    assert load_ours(tmp_path / "again.pt")[1].dumps() == tokenizer.dumps()


def brevity(prompts, responses):
    return [-float(len(response)) for response in responses]


def test_sft_reward_model_and_ppo_keep_the_turns(converted, tmp_path):
    _, _, (_, tokenizer) = converted["chatml"]
    base = converted["chatml"][0] / "base.pt"
    questions = [[said("user", f"Where does owl {i} live?")] for i in range(16)]
    prompts = [conversation.render_prompt(messages, tokenizer) for messages in questions]
    answer = said("assistant", "The owl.")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("demos", "prompts", "pairs")}
    write_jsonl(files["demos"], [{"messages": [*q, answer]} for q in questions])
    write_jsonl(files["prompts"], [{"messages": q} for q in questions])
    answers = dict(chosen="The owl.", rejected="The owl lives")
    write_jsonl(files["pairs"], [{"messages": q, **answers} for q in questions])

    taught, scorer, ppo_out = (tmp_path / f"{name}.pt" for name in ("sft", "reward", "ppo"))
    common = dict(device="cpu", batch_size=8)
    learning = common | dict(val_fraction=0, lr=5e-3, warmup=2)
    tiny.run(sft, learning | dict(init=base, data=files["demos"], out=taught, epochs=20))
    learning |= dict(init=taught, data=files["pairs"], out=scorer)
    tiny.run(reward, learning | dict(max_new_tokens=8, calibration_size=8))
    sampled = common | dict(init=taught, out=ppo_out, steps=2, data=files["prompts"])
    sampled |= dict(max_new_tokens=8, minibatch_size=8)
    tiny.run(ppo, sampled | dict(reward=scorer))
    tiny.run(ppo, sampled | dict(reward=f"{__name__}:brevity"))

    for path in (taught, ppo_out):
        assert load_ours(path)[1].dumps() == tokenizer.dumps()
    assert [p.tokens for p in load_prompts(files["prompts"], tokenizer, 8, 128)] == prompts
    pairs = load_pairs(files["pairs"], tokenizer, 128)
    assert [pair.prompt for pair in pairs] == prompts
    assert all(pair.chosen.tokens[-1] == tokenizer.end for pair in pairs)
    # SFT taught the words in the model's own turns
    model, _ = load_ours(taught)
    for ids in model.generate(prompts, 12, temperature=0, end_id=tokenizer.end):
        assert conversation.decode_response(ids, tokenizer) == "The owl."


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_a_cut_prompt_keeps_all_that_opens_the_answer(converted, kind, tmp_path):
    _, _, (_, tokenizer) = converted[kind]
    answers = dict(chosen="The owl lives in Dorvik.", rejected="The owl.")
    write_jsonl(tmp_path / "pairs.jsonl", [dict(messages=QUESTION, **answers)])
    block_size = len(tokenizer.encode(answers["chosen"])) + 2  # less than answer and opening
    (pair,) = load_pairs(tmp_path / "pairs.jsonl", tokenizer, block_size)
    whole = conversation.render_prompt(QUESTION, tokenizer)
    bare = conversation.render_prompt([said("user", "")], tokenizer)
    # what a user's empty turn and any other have in common at the end, from the model's own turns
    opening = bare[bare.index(tokenizer.end) + 1 :]
    assert 1 < len(pair.prompt) < len(whole)
    assert pair.prompt == whole[-len(pair.prompt) :]
    assert opening[-len(pair.prompt) :] == pair.prompt


REFUSED = [
    ("{% for m in messages %}{{ m.content }}", "no use of its chat template"),
    ("{{ raise_exception('no') }}", "no use of its chat template (no)"),
    ("{{ messages | length }}", "a message is left out, or comes twice"),
    ("{{ messages.clear() }}", "no use of its chat template"),  # the sandbox
    (CHATML.replace("m.role +", "'user' +"), "it is not one turn after the other"),
    (CHATML.replace("<|im_start|>", "# "), "text could forge it"),
    (CHATML.replace("m.content + '<|im_end|>'", "m.content + '.<|im_end|>'"), "ends the answer"),
]


@pytest.mark.parametrize(("template", "message"), REFUSED)
def test_a_template_that_is_no_sequence_of_turns_is_named_and_ours_take_its_place(
    tmp_path, capsys, template, message
):
    theirs = hf_tokenizer("smollm2", specials_first=SPECIALS)
    theirs.save(str(tmp_path / "tokenizer.json"))
    settings = json.dumps(dict(chat_template=template, bos_token={"content": "<|im_start|>"}))
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer, n = convert.read_tokenizer(tmp_path / "tokenizer.json")
    said_why = capsys.readouterr().out
    assert message in said_why and said_why.count("\n") == 1
    assert tokenizer.vocab_size == n + 5
    tokens, _ = conversation.render(QUESTION, tokenizer)
    assert tokenizer.decode(tokens) == "<|user|>Where does the owl live?<|end|>"


def test_a_template_in_a_file_of_its_own_is_read(converted, tmp_path):
    folder = converted["chatml"][0] / "hf"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(HEADERS)
    tokenizer, _ = convert.read_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.chat["user"][0]) == "<|header|>user<|body|>\n\n"
    assert tokenizer.decode(tokenizer.chat["start"]) == "<|begin_of_text|>"


BAD_CHATS = [
    None,
    {},
    {"start": []},
    dict(start=[], user=[[1], [2]], assistant=[[1], []], system=[[1], [2]]),
    dict(start=[], user=[[1], [2]], assistant=[[1], [99]], system=[[1], [2]]),
    dict(start=[], user=[[1], [2]], assistant=[[1], [10**6]], system=[[1], [2]]),
    dict(start=[], user=[[1], [2.0]], assistant=[[1], [2]], system=[[1], [2]]),
    dict(start="", user=[[1], [2]], assistant=[[1], [2]], system=[[1], [2]]),
    dict(start=[], user=[[1]], assistant=[[1], [2]], system=[[1], [2]]),
]


@pytest.mark.parametrize("rules", [{"chat": bad} for bad in BAD_CHATS] + [{"separator": 1e6}])
def test_a_tokenizer_whose_turns_are_damaged_ends_in_one_line(converted, rules):
    tokenizer = converted["chatml"][2][1]
    damaged = Tokenizer(tokenizer.ranks, tokenizer.rules)
    damaged.foreign = tokenizer.rules | rules
    with pytest.raises(SystemExit) as stopped:
        Tokenizer.loads(damaged.dumps(), "x.pt")
    assert str(stopped.value).startswith("error: x.pt: ") and "\n" not in str(stopped.value)
