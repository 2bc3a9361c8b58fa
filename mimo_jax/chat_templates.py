"""Chat templates: the text around the turns of a conversation.

    {system_turn} {user} <image> {image_separator}{question} {assistant}{answer}{stop} {separator} {user} ...

Control tokens listed in `tokens` are encoded as these tokens; everything else is text. `config.data.chat_template` selects a template.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """system: the default system prompt; it replaces `{system}` in `system_turn`, which opens the conversation. user, assistant: the text
    before the image, and before the answer (a space at its end belongs to the answer's first word). image_separator: the text between
    image and question. stop: the token that ends an answer; "": the tokenizer's end-of-text token. separator: the text between an
    answer's stop token and the next turn. tokens: the control tokens in these texts."""

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
    """Register a template. Raises ValueError for a name that is taken, and for a `system_turn` without {system}."""
    if name in CHAT_TEMPLATES:
        raise ValueError(f"chat template {name}: is already registered; choose another name")
    if "{system}" not in template.system_turn:
        raise ValueError(f"chat template {name}: system_turn lacks {{system}}; insert it where the system prompt belongs")
    CHAT_TEMPLATES[name] = template


def unknown_template(name: str) -> str:
    """The error message for an unknown name: suggests the nearest template, or else lists all."""
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
