"""Chat templates: what stands around the turns of a conversation, a row for each.

    {system_turn} {user} <image> {image_separator}{question} {assistant}{answer}{stop} {separator} {user} ...

Names of control tokens in a row's `tokens` become these tokens' ids; all else is text. Chosen by `config.data.chat_template`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """system: the system prompt, where the config gives none; it takes the place of `{system}` in `system_turn`, which opens the
    conversation. user, assistant: what stands before the image, and before the answer (a space at its end goes with the answer's
    first word). image_separator: between image and question. stop: the token that ends an answer; empty: the tokenizer's end of a
    text. separator: between an answer's stop and the next turn. tokens: control tokens that these texts name."""

    system: str
    system_turn: str
    user: str
    assistant: str
    image_separator: str = "\n"
    stop: str = ""
    separator: str = ""
    tokens: tuple[str, ...] = ()


CHAT_TEMPLATES: dict[str, ChatTemplate] = {}


def register_chat_template(name: str, template: ChatTemplate) -> None:
    """Add a row. Raises ValueError for a name that is taken, and for a `system_turn` that does not say where the words go."""
    if name in CHAT_TEMPLATES:
        raise ValueError(f"chat template {name}: is registered already; choose another name")
    if "{system}" not in template.system_turn:
        raise ValueError(f"chat template {name}: system_turn lacks {{system}}; write it where the system prompt goes")
    CHAT_TEMPLATES[name] = template


def unknown_template(name: str) -> str:
    """What is wrong with a name that no row has: the nearest one, or else all."""
    near = difflib.get_close_matches(name.casefold(), CHAT_TEMPLATES, 1)
    return f"is {name!r}; " + (f"did you mean {near[0]}?" if near else f"use one of {', '.join(CHAT_TEMPLATES)}")


register_chat_template(
    "vicuna",
    ChatTemplate(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system_turn="{system} ",
        user="USER: ",
        assistant=" ASSISTANT: ",
    ),
)
register_chat_template(  # LLaVA, LISA and GLaMM
    "llava",
    ChatTemplate(
        system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        system_turn="{system} ",
        user="USER: ",
        assistant=" ASSISTANT: ",
    ),
)
register_chat_template(  # Qwen, SmolLM
    "chatml",
    ChatTemplate(
        system="You are a helpful assistant.",
        system_turn="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        stop="<|im_end|>",
        separator="\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
)
