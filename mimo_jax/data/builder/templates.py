"""The wordings of questions and answers, in two sets: CORE, which phantoms use, and FULL, which extends CORE.

In a phrase {the} stands for "the liver" or "the liver and the spleen", {The} for the same at its beginning, {is} for "is" or
"are"; other placeholders are explained where they are used. A phrase of CORE is never changed: models and measurements depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

UNMARKED = "Nothing is marked in this image."
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five")
SHOWN = "This is the {}."
METHODS = {"fundus": "fundus photography", "pathology": "microscopy"}  # names of modalities within a sentence, where they differ


@dataclass(frozen=True)
class TemplateSet:
    """A set of wordings, and how many samples per image are generated with them. {} is a name, {a} a name with its article."""

    numbers: tuple[int, int, int, int]  # of I, II, III, IV
    absent_share: float  # share of I and III that asks for an absent entity
    even: bool  # entities are asked for equally often when shown and when absent, so that a name reveals nothing
    relations: int  # maximum number of relation questions of III, and of IV
    extended: bool  # III and IV also ask for location, neighbours, findings, modality and kind
    segment: tuple[tuple[str, str], ...]  # question, answer
    name: tuple[str, ...]
    role: tuple[str, ...]
    lies_in: tuple[str, ...]
    near_prompt: tuple[str, ...]
    other_side: tuple[str, ...]
    holds: tuple[str, ...]
    contains: tuple[str, ...]
    nearest: tuple[str, ...]
    presence: tuple[str, ...]
    count: tuple[str, ...]
    modality: tuple[str, ...]
    inventory: tuple[str, ...]


CORE = TemplateSet(
    numbers=(4, 4, 3, 3),
    absent_share=0.35,
    even=False,
    relations=0,
    extended=False,
    segment=(
        ("segment {the}", "{The} {is} outlined."),
        ("Segment {the}.", "{The} {is} outlined."),
        ("Outline {the}.", "{The} {is} outlined."),
        ("Show {the}.", "Here {is} {the}."),
        ("Where {is} {the}?", "Here {is} {the}."),
        ("Find {the}.", "Here {is} {the}."),
    ),
    name=("What is this?", "Name this structure.", "What is marked here?", "Which structure is this?", "Identify the marked structure."),
    role=("What does the marked structure do?", "What is known of this structure?", "What is this, and what does it do?"),
    lies_in=("What does this lesion lie in?", "Where does the marked lesion lie?"),
    near_prompt=("What is the marked lesion nearest to?", "Which structure lies nearest to this?"),
    other_side=("What is the twin of this structure?", "What matches this structure on the other side?"),
    holds=("Is there a lesion in the marked organ?", "What lies in this organ?"),
    contains=("Which organ contains the {}?", "Where does the {} lie?"),
    nearest=("Which structure is the {} nearest to?", "What lies nearest to the {}?"),
    presence=("Is there {a} in this image?", "Does this image show {a}?", "Can {a} be seen here?"),
    count=("How many {} are there?", "Count the {}."),
    modality=("Which modality is this?", "How was this image made?", "What kind of image is this?"),
    inventory=("Which structures can be seen?", "What does this image show?", "List what is visible."),
)

FULL = replace(
    CORE,
    numbers=(4, 4, 4, 4),
    even=True,
    relations=2,
    extended=True,
    segment=(
        *CORE.segment,
        ("Please segment {the} in this image.", "{The} {is} outlined."),
        ("Mark {the}.", "{The} {is} marked."),
        ("Highlight {the} for me.", "{The} {is} highlighted."),
        ("Delineate {the}.", "{The} {is} delineated."),
        ("Can you outline {the}?", "Yes, {the} {is} outlined."),
        ("Could you show me {the}?", "Here {is} {the}."),
        ("Where can I find {the}?", "Here {is} {the}."),
        ("Where in the image {is} {the}?", "Here {is} {the}."),
        ("Point out {the}.", "Here {is} {the}."),
        ("Locate {the} in the image.", "{The} {is} located here."),
        ("Draw the outline of {the}.", "Here {is} {the}."),
        ("I need a mask of {the}.", "{The} {is} outlined."),
        ("Give me the extent of {the}.", "{The} {is} outlined."),
        ("Which pixels belong to {the}?", "{The} {is} outlined."),
    ),
    name=(
        *CORE.name,
        "What am I pointing at?",
        "What is this structure called?",
        "What is inside the marked region?",
        "Can you name what is marked?",
        "Which structure does the mark show?",
        "Tell me what this is.",
        "What do we see at the marked place?",
    ),
    role=(
        *CORE.role,
        "What should I know of the marked structure?",
        "Tell me about the marked structure.",
        "Name this structure and say what matters about it.",
    ),
    lies_in=(*CORE.lies_in, "Which organ holds the marked lesion?", "In which structure is this lesion?"),
    near_prompt=(*CORE.near_prompt, "Which landmark is closest to the marked lesion?"),
    other_side=(*CORE.other_side, "What is the counterpart of the marked structure?"),
    holds=(*CORE.holds, "Does the marked structure hold a lesion?"),
    contains=(*CORE.contains, "Which structure holds the {}?", "In which structure is the {}?"),
    nearest=(*CORE.nearest, "Which landmark is closest to the {}?"),
    presence=(*CORE.presence, "Is {a} visible?", "Do you see {a}?", "Is {a} shown in this image?"),
    count=(*CORE.count, "How many {} can you count?", "What is the number of {}?"),
    modality=(*CORE.modality, "What imaging modality is this?", "With which technique was this image taken?"),
    inventory=(*CORE.inventory, "What can be made out in this image?", "Name all the structures that you can see."),
)

# Only in the extended style.
SHOWN_ONE = "This is {a}."  # in place of SHOWN if the image shows several of a kind
SEEN = ("What does this image show?", "What can be seen here?", "What is seen in this image?")  # inventory of labels that are not complete
HALVES = {  # axis -> questions with the names of the two halves
    0: ("Is the {} in the left or the right half of the image?", "In which half of the image is the {}, left or right?"),
    1: ("Is the {} in the upper or the lower half of the image?", "In which half of the image is the {}, upper or lower?"),
}
ABOUT_HOW_MANY = ("About how many {} are there?", "Roughly how many {} does this image show?")
SHOWS_ONE_THAT = ("Is there a structure in this image that {}?", "Does this image show a structure that {}?")
FACT = ("What is known of the {}?", "What should I know about the {}?", "Tell me about the {}.")

# Only in the extended style. Questions of III about structures that are not named; `{}` is a fact about them.
LOCATION = ("Which structure lies {}?", "What lies {}?")
FINDINGS = ("Where may {} be found?", "Which structure may show {}?")
NEIGHBOR = ("Which structure usually lies next to the {}?", "Name a usual neighbor of the {}.")
# Questions of IV about the marked structure.
WHERE = ("What is this, and where does it lie?", "Name the marked structure and its usual place.", "Where does this structure usually lie?")
SHOWS = ("What may be found in this structure?", "What is this, and what may be found in it?", "Which findings are usual here?")
IMAGED = ("What is this, and how is it usually imaged?", "Which modality is usual for the marked structure?")
KIND = ("What is this, and what does it belong to?", "What kind of structure is marked?")
BORDERS = ("What usually lies next to this structure?", "Name this structure and a usual neighbor of it.")

# Relations read from the masks. Questions of III between named structures …
TOUCHING = ("Which of the two touches the {}: the {} or the {}?", "What borders on the {} here: the {} or the {}?")
LARGEST = ("Which covers more of this image, the {} or the {}?", "Which is larger here, the {} or the {}?")
SMALLEST = ("Which covers less of this image, the {} or the {}?", "Which is smaller here, the {} or the {}?")
LEFTMOST = (
    "Which lies further to the patient's {side}, the {} or the {}?",
    "Seen from the patient, what lies further {side}: the {} or the {}?",
)
CONTAINING = ("What surrounds the {}?", "Inside which structure does the {} lie?")
# … and of IV between the marked structure and named ones.
TOUCHES_THIS = ("Which of the two touches the marked structure: the {} or the {}?", "What borders on this: the {} or the {}?")
SIZE_OF_THIS = ("Is the marked structure larger or smaller than the {}?", "How does this compare in size with the {}?")
SIDE_OF_THIS = (
    "On which side of the marked structure does the {} lie for the patient?",
    "Is the {} to the patient's left or right of this?",
)
INSIDE_THIS = ("What lies inside the marked structure?", "What does the marked region enclose?")


def render(phrase: str, entities: list[str], plural: bool = False) -> str:
    """A phrase with the entities named in it: "Where {is} {the}?" → "Where are the liver and the spleen?". plural: whether the name
    of a single one is in the plural."""
    return phrase.format(**_words([f"the {entity}" for entity in entities], plural))


def placeholders(phrase: str, number: int, plural: bool = False) -> str:
    """A phrase with a placeholder `{}` for each of `number` entities: "Here {is} {the}." → "Here are the {} and the {}."."""
    return phrase.format(**_words(["the {}"] * number, plural))


def listed(texts: list[str], last: str = "and") -> str:
    """ "a, b and c"."""
    return f" {last} ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def with_article(name: str, mass: bool = False) -> str:
    if mass:
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('ut', 'ur', 'eu', 'uni')) else 'a'} {name}"


def _words(names: list[str], plural: bool) -> dict[str, str]:
    text = listed(names)
    return {"the": text, "The": text[0].upper() + text[1:], "is": "is" if len(names) == 1 and not plural else "are"}
