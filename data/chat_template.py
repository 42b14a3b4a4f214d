"""A model's chat template, a program in Jinja, read as the texts around each role's contents.

A template is read by running it, in Jinja's sandbox, on a few conversations. It is refused where
turns put one after the other do not give the same text.
"""

import re

# torch and transformers bring it
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.tokenizer import ROLES

# The orders of roles that what was read must reproduce, each up to where the answer begins.
ORDERS = (
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
)
CONTENT = "CONTENT{}!"


def refuse(message):
    """What templates call raise_exception."""
    raise TemplateError(message)


class Template:
    """A template; variables are what it may use beside the messages, such as bos_token."""

    def __init__(self, text, variables):
        # the settings of transformers
        extensions = ["jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        environment.globals["raise_exception"] = refuse
        self.program, self.variables = environment.from_string(text), variables

    def expand(self, roles, prompt=True):
        """The text of a conversation of these roles; with prompt, an answer is to follow."""
        messages = []
        for i, role in enumerate(roles):
            messages.append({"role": role, "content": CONTENT.format(i)})
        given = dict(messages=messages, add_generation_prompt=prompt)
        return self.program.render(**given, **self.variables)

    def around(self, *roles, prompt=True):
        """The texts before, between and after the contents: len(roles) + 1 of them."""
        texts = re.split(CONTENT.format(r"\d"), self.expand(roles, prompt))
        if len(texts) != len(roles) + 1:
            raise ValueError("a message is left out, or comes twice")
        return texts


def compose(turns, roles):
    """What Template.expand gives, from what read_turns read."""
    text = "" if roles[0] == "system" else turns["start"]
    for i, role in enumerate(roles):
        opening, closing = turns[role]
        text += opening + CONTENT.format(i) + closing
    return text + turns["assistant"][0]


def split_turns(template):
    """{"start": text, role: [text before a content, text after it]} of a Template."""
    # the same text stands before a first question and later ones, after "start"
    before_question, after_question = template.around("user", prompt=False)
    after_answer = template.around("user", "assistant", prompt=False)[-1]
    _, answer_to_question, _ = template.around("user", "assistant", "user")[1:]
    question = answer_to_question.removeprefix(after_answer)
    _, question_to_answer = template.around("user")
    before_system, system_to_question, _ = template.around("system", "user")
    return {
        "start": before_question.removesuffix(question),
        "user": [question, after_question],
        "assistant": [question_to_answer.removeprefix(after_question), after_answer],
        "system": [before_system, system_to_question.removesuffix(question)],
    }


def read_turns(text, variables):
    """The turns of a template's text; raises a ValueError that says why it cannot be used."""
    try:
        template = Template(text, variables)
        turns = split_turns(template)
        is_same = all(compose(turns, roles) == template.expand(roles) for roles in ORDERS)
    except Exception as e:  # a program can raise anything
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(reason) from e
    if not is_same:
        raise ValueError("it is not one turn after the other")
    return turns


def to_ids(turns, tokenizer, names):
    """The turns as ids, as Tokenizer.chat; names: the special tokens that they may hold."""
    how = dict(allowed_special=set(names), disallowed_special=())
    chat = {"start": tokenizer.encoding.encode(turns["start"], **how)}
    for role in ROLES:
        chat[role] = [tokenizer.encoding.encode(text, **how) for text in turns[role]]
    unforgeable = set(names) - set(tokenizer.rules["text_tokens"])
    special_ids = {tokenizer.rules["special_tokens"][name] for name in unforgeable}
    openings = [chat[role][0] for role in ROLES]
    if not all(special_ids.intersection(opening) for opening in openings):
        raise ValueError("a role begins with no special token, so text could forge it")
    if not special_ids.intersection(chat["assistant"][1][:1]):
        raise ValueError("no special token ends the answer")
    return chat
