"""Questions and answers as token ids, and generated ids as text, in the chat template of the config; vicuna's is

    {system} USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: <image>\\n{question} ASSISTANT: {answer}</s>

Axis letters: T tokens, Q queries of X_q, R user turns.

`<image>` stands for the Q positions of that turn's X_q. Three pieces are encoded separately: the text before the image, the text between
it and the answer, and the answer; so training and generation tokenise in the same way. With `data.image_tokens`, X_q is placed between two
tokens of the base vocabulary, and white space next to these is stripped, as by the slow Llama tokenizer of transformers 4.31, with which
LISA was trained:

    {system} USER:<im_start><image><im_end>{question} ASSISTANT: {answer}</s>

Grounding tokens are inserted between the tokens of the clean answer, with the space before a phrase inside the phrase:
"The liver is" -> ▁The <p> ▁liver <SEG> </p> ▁is. (Outside the phrase, Llama would encode the space as a separate token. GLaMM's
tokenizer, transformers 4.28 with its stripping of spaces around added tokens, gave the same ids.) `model.seg_position` sets the position
of <SEG>; with "bare" there is no phrase: ▁The ▁liver <SEG> ▁is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mimo_jax.chat_templates import CHAT_TEMPLATES, ChatTemplate
from mimo_jax.config import Config
from mimo_jax.data.schema import Sample
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.model_config import GROUNDING_TOKENS

_TAG = re.compile("|".join(re.escape(token) for token in GROUNDING_TOKENS))
_TAG_LENGTH = max(map(len, GROUNDING_TOKENS))
_NO_SPACE_BEFORE = tuple(".,;:!?)")


class SampleError(UserError):
    """A sample that this model cannot encode; the message names the sample and the remedy. Nothing is truncated silently."""


@dataclass
class Rendered:
    """One sample as ids. Arrays have length T, unpadded."""

    input_ids: np.ndarray  # int32; 0 at the positions of X_q
    query_index: np.ndarray  # int32; turn * Q + q at the positions of X_q, else -1
    loss_mask: np.ndarray  # float32; 1 on the assistant's tokens and the stop token of each answer
    instructions: list[list[int]]  # per user turn, at most `aligner.max_text` ids
    prompted: list[list[str]]  # per user turn, ids of the prompted masks
    seg_positions: list[int]  # position of each <SEG>
    seg_targets: list[list[str]]  # ids of the masks of each <SEG>
    answer_masks: list[list[str] | None]  # per user turn, ids of all masks that the answer is about; None: unknown or unused


def check_question(question: object) -> None:
    """Raise UserError for an empty question."""
    if not isinstance(question, str) or not question.strip():
        raise UserError("question: is empty; ask something, such as 'Segment the liver.'")


def render(sample: Sample, tokenizer: Tokenizer, config: Config) -> Rendered:
    """Ids, loss mask and `<SEG>` positions of a sample.

    Targets that share a span share one `<SEG>`. Raises SampleError for turns that do not alternate, more than
    `model.max_turns` of them, more than `model.max_segs` spans, overlapping spans, or more tokens than the largest bucket.
    """
    model = config.model
    name = f"sample {sample.sample_id}"
    roles = [turn.role for turn in sample.turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise SampleError(f"{name}: its turns are {', '.join(roles) or 'none'}; user and assistant must alternate, user first")
    if len(roles) // 2 > model.max_turns:
        raise SampleError(f"{name}: has {len(roles) // 2} user turns; raise config.model.max_turns ({model.max_turns}) or split it")
    ids: list[int] = []
    query_index: list[int] = []
    loss: list[float] = []
    seg_targets: list[list[str]] = []
    for number, (user, assistant) in enumerate(zip(sample.turns[::2], sample.turns[1::2], strict=True)):
        prompt, queries = encode_user_turn(tokenizer, config, user.text, number, number == 0)
        spans = _spans(sample, 2 * number + 1)
        answer = encode_answer(tokenizer, config, assistant.text, list(spans))
        ids += prompt + answer
        query_index += queries + [-1] * len(answer)
        loss += [0.0] * len(prompt) + [1.0] * len(answer)
        seg_targets += spans.values()
    if len(seg_targets) > model.max_segs:
        raise SampleError(f"{name}: has {len(seg_targets)} grounded spans; raise config.model.max_segs ({model.max_segs}) or split it")
    if len(ids) > config.buckets()[-1]:
        raise SampleError(f"{name}: has {len(ids)} tokens; raise the largest of config.data.buckets ({config.data.buckets}) or shorten it")
    input_ids = np.array(ids, np.int32)
    users = sample.turns[::2]
    return Rendered(
        input_ids=input_ids,
        query_index=np.array(query_index, np.int32),
        loss_mask=np.array(loss, np.float32),
        instructions=[instruction_ids(tokenizer, config, turn.text) for turn in users],
        prompted=[turn.prompted for turn in users],
        answer_masks=[_answer_masks(sample, 2 * number + 1) if config.train.loss.attention_map else None for number in range(len(users))],
        seg_positions=np.flatnonzero(input_ids == tokenizer.seg).tolist(),
        seg_targets=seg_targets,
    )


def _answer_masks(sample: Sample, turn: int) -> list[str] | None:
    """Ids of the masks that an assistant turn is about, [] if it says that the entity is absent; None if the turn has no target."""
    targets = [target for target in sample.targets if target.turn == turn]
    return sorted({mask_id for target in targets for mask_id in target.mask_ids}) if targets else None


def template_text(config: Config, turns: Sequence[str]) -> str:
    """The words of a conversation in its template, for training a tokenizer. turns: texts of user and assistant, alternating."""
    template = CHAT_TEMPLATES[config.data.chat_template]
    names = [re.sub(_any_of(template.tokens), "", name).strip() for name in (template.user, template.assistant)]
    return " ".join([config.system_prompt(), *(f"{names[i % 2]} {text}" for i, text in enumerate(turns))])


def encode_user_turn(tokenizer: Tokenizer, config: Config, question: str, turn_index: int, first: bool) -> tuple[list[int], list[int]]:
    """(ids, query_index) of one user turn up to the answer. turn_index: the turn's row in X_q. first: whether it opens the conversation,
    with <s> and the system prompt. Raises TokenizerError for a control token that the tokenizer lacks."""
    queries = config.model.query_tokens()
    template = CHAT_TEMPLATES[config.data.chat_template]
    system = config.system_prompt() if first else ""
    opening = template.separator if not first else template.system_turn if system else ""
    before = _pieces(template, opening + template.user, system=system)
    after = _pieces(template, template.image_separator + "{question}" + template.assistant.removesuffix(" "), question=question)
    if around := [tokenizer.id_of(name) for name in config.image_tokens()]:
        before[-1], after[0] = before[-1].rstrip(), after[0].lstrip()
    bos = [tokenizer.bos] if first and tokenizer.bos is not None else []
    before = bos + _encode_pieces(tokenizer, template, before) + around[:1]
    after = around[1:] + _encode_pieces(tokenizer, template, after)
    spliced = range(turn_index * queries, (turn_index + 1) * queries)
    return before + [0] * queries + after, [-1] * len(before) + [*spliced] + [-1] * len(after)


def _pieces(template: ChatTemplate, text: str, **fields: str) -> list[str]:
    """A text of the template, split at its control tokens, which get odd indices, and then filled in, so that a user's text is never
    mistaken for a control token."""
    pieces = re.split(f"({_any_of(template.tokens)})", text)
    for name, value in fields.items():
        pieces = [piece.replace(f"{{{name}}}", value) for piece in pieces]
    return pieces


def _any_of(tokens: Sequence[str]) -> str:
    """A regex that matches any of these tokens, or nothing if there are none."""
    return "|".join(map(re.escape, tokens)) or r"(?!)"


def _encode_pieces(tokenizer: Tokenizer, template: ChatTemplate, pieces: Sequence[str]) -> list[int]:
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            ids.append(tokenizer.id_of(piece, "data.chat_template"))
        elif piece or len(pieces) == 1:
            ids += tokenizer.encode(piece, continued=number > 0 or not tokenizer.dummy_prefix)
    return ids


def stop_id(tokenizer: Tokenizer, config: Config) -> int:
    """The token that ends an answer."""
    stop = CHAT_TEMPLATES[config.data.chat_template].stop
    return tokenizer.id_of(stop, "data.chat_template") if stop else tokenizer.eos


def instruction_ids(tokenizer: Tokenizer, config: Config, question: str) -> list[int]:
    """The part of a turn that the aligner reads: its first `aligner.max_text` ids. (The language model reads all of it.)"""
    return tokenizer.encode(question)[: config.model.aligner.max_text]


def encode_answer(tokenizer: Tokenizer, config: Config, text: str, spans: Iterable[Sequence[int]] = ()) -> list[int]:
    """Ids of an answer in clean text with one `<SEG>` for each [start, end) of `spans`, and the stop token. Spans must not overlap."""
    position, seg, p_close = config.model.seg_position, tokenizer.seg, tokenizer.p_close
    closing = {"inside": [seg, p_close], "after": [p_close, seg], "bare": [seg]}[position]
    ids: list[int] = []
    at = 0
    started = not CHAT_TEMPLATES[config.data.chat_template].assistant.endswith(" ")

    def emit(part: str) -> None:
        nonlocal started
        if part:
            ids.extend(tokenizer.encode(part, continued=started))
            started = True

    for start, end in sorted(spans):
        if position != "bare":
            before = text[at:start].rstrip(" ")
            emit(before)
            ids.append(tokenizer.p_open)
            at += len(before)
        emit(text[at:end])
        ids.extend(closing)
        at = end
    emit(text[at:])
    return [*ids, stop_id(tokenizer, config)]


def _spans(sample: Sample, turn: int) -> dict[tuple[int, int], list[str]]:
    """Span -> mask ids of one assistant turn, in reading order."""
    spans: dict[tuple[int, int], list[str]] = {}
    for target in sample.targets:
        if target.turn != turn or target.absent or sample.perspective == "vqa":
            continue
        if target.span is None:
            raise SampleError(f"sample {sample.sample_id}: target {target.entity} has masks but no span; add that of its name")
        ids = spans.setdefault((target.span[0], target.span[1]), [])
        ids += [mask_id for mask_id in target.mask_ids if mask_id not in ids]
    ordered = sorted(spans)
    for (_, end), (start, _) in zip(ordered, ordered[1:], strict=False):
        if start < end:
            raise SampleError(f"sample {sample.sample_id}: spans overlap at character {start} of turn {turn}")
    return {span: spans[span] for span in ordered}


def show(tokenizer: Tokenizer, ids: Sequence[int], query_index: Sequence[int]) -> str:
    """The text of a sequence as the model receives it, with `<image>` for each X_q block and special tokens; for logs and goldens."""
    names = {i: name for name, i in tokenizer.control.items() if i != tokenizer.pad or i == tokenizer.eos}
    shown, run, previous = [], [], -1
    for token, query in zip(ids, query_index, strict=True):
        if query < 0 and token not in names:
            run.append(token)
        else:
            shown.append(_verbatim(tokenizer, run))
            run = []
            if query < 0:
                shown.append(names[token])
            elif query != previous + 1 or previous < 0:
                shown.append("<image>")
        previous = query
    return "".join([*shown, _verbatim(tokenizer, run)])


def _verbatim(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The decoded text with its leading space."""
    return tokenizer.decode([tokenizer.seg, *ids])[len("<SEG>") :]


def parse_answer(text: str) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
    """Text with tags -> (clean text, parts, phrases). Never raises, even for malformed tags.

    phrases[k] = (phrase, start, end) in the clean text belongs to the k-th `<SEG>`: the `<p>` … `</p>` around it, else the one closed
    directly before it, else an empty phrase at its position. parts = [{"text", "seg": k or None}]: the clean text split at the phrases,
    in order, each k once.
    """
    pieces: list[str] = []
    at = 0
    for tag in _TAG.finditer(text):
        pieces += [text[at : tag.start()], tag.group()]
        at = tag.end()
    return _assemble([*pieces, text[at:]], set(GROUNDING_TOKENS))


def parse_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
    """`parse_answer` of generated ids: only real grounding tokens are tags; text that merely spells a tag is dropped, so that
    phrases[k] always belongs to the k-th `<SEG>` id."""
    tags = dict(enumerate(tokenizer.grounding, tokenizer.vocab_size))
    return _assemble([_TAG.sub(" ", p) if isinstance(p, str) else tags[p] for p in tokenizer.pieces(ids)], set(tags.values()))


def _assemble(pieces: list[str], tags: set[str]) -> tuple[str, list[dict], list[tuple[str, int, int]]]:
    clean = ""
    gap = ""  # white space before the next piece
    spans: list[list[int]] = []  # [start, end] of each <SEG>
    opened: int | None = None  # start of the open <p>
    inside: list[int] = []  # indices of the <SEG>s within it
    closed: list[int] | None = None  # the phrase that </p> closed directly before
    for piece in pieces:
        if piece not in tags:
            added = _joiner(clean, gap, piece)
            clean += added.rstrip()
            gap = added[len(added.rstrip()) :]
            if added.strip():
                closed = None
        elif piece == "<p>":
            opened, inside, closed = len(clean), [], None
        elif piece == "</p>":
            if opened is not None:
                closed = [opened, len(clean)]
                for k in inside:
                    spans[k] = list(closed)
            opened = None
        else:
            if opened is not None:
                inside.append(len(spans))
            here = len(clean)
            spans.append([opened, here] if opened is not None else list(closed or (here, here)))

    phrases: list[tuple[str, int, int]] = []
    parts: list[dict] = []
    at = 0
    for k, (start, end) in enumerate(spans):
        while start < end and clean[start].isspace():
            start += 1
        phrases.append((clean[start:end], start, end))
        if start > at:
            parts.append({"text": clean[at:start], "seg": None})
        parts.append({"text": clean[max(start, at) : end], "seg": k})
        at = max(at, end)
    if at < len(clean):
        parts.append({"text": clean[at:], "seg": None})
    return clean, parts, phrases


def _joiner(clean: str, gap: str, text: str) -> str:
    """The text to append to `clean` for `text`, given the white space in between: one space if a tag was between two, none
    before punctuation, none at the start."""
    if not clean:
        return text.lstrip()
    if not text.strip():
        return gap or text
    if gap.endswith(" ") and text[0] == " ":
        gap = gap.rstrip(" ")
    elif not gap.strip(" ") and text.startswith(_NO_SPACE_BEFORE):
        gap = ""
    joiner = gap + text
    if _TAG.search(clean[1 - _TAG_LENGTH :] + joiner[: _TAG_LENGTH - 1]):  # "<" + "p>" must not become a tag
        joiner = " " + joiner
    return joiner
