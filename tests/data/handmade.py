"""Records small enough to check by eye, and a tokenizer for them."""

import io
import json

import numpy as np
import tokenizers
from PIL import Image

from mimo_jax.data.schema import Record, Sample, Target, Turn, encode_mask
from mimo_jax.data.tokenizer import Tokenizer, add_grounding, train_tokenizer

HEIGHT, WIDTH = 40, 56
CORPUS = [
    "Segment the liver.", "The liver is outlined.", "What is this?", "This is the spleen.", "Which organ makes bile?",
    "The liver makes bile, the spleen does not.", "What does it do?", "Is there a liver?", "Yes.", "USER: ASSISTANT:",
] * 3  # fmt: skip


def tokenizer(folder, vocab_size: int = 512) -> Tokenizer:
    return train_tokenizer(CORPUS, vocab_size, folder / "tokenizer.json")


def lisa_tokenizer(folder, vocab_size: int = 512) -> Tokenizer:
    """A vocabulary as LISA's: `<im_start>` and `<im_end>` are the base's last, `<SEG>` alone follows."""
    train_tokenizer(CORPUS, vocab_size - 2, folder / "base.json")
    values = json.loads((folder / "base.json").read_text())
    kind = values["added_tokens"][-1]
    values["added_tokens"] += [{**kind, "id": vocab_size - 2 + i, "content": name} for i, name in enumerate(("<im_start>", "<im_end>"))]
    (folder / "base.json").write_text(json.dumps(values))
    return add_grounding(folder / "base.json", folder / "tokenizer.json", vocab_size, ("<SEG>",))


def byte_level_tokenizer(folder, vocab_size: int = 512) -> Tokenizer:
    """As SmolLM's: byte-level BPE with ChatML's tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "base.json"))
    return add_grounding(folder / "base.json", folder / "tokenizer.json", vocab_size)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def answer(text: str, **targets: list[str]) -> tuple[str, list[Target]]:
    """A sentence and its targets: name=mask ids, spanned where the name first stands."""
    return text, [Target(1, name, [text.index(name), text.index(name) + len(name)], ids) for name, ids in targets.items()]


def sample(name: str, perspective: str, question: str, message: tuple[str, list[Target]], prompted=()) -> Sample:
    return Sample(name, perspective, [Turn("user", question, list(prompted)), Turn("assistant", message[0])], message[1])


def record(number: int = 0, split: str = "train") -> Record:
    """A noisy image with a liver, left, and a spleen, right; samples 4 × I, 2 × II, and one each of III, IV and vqa."""
    rng = np.random.default_rng(number)
    liver, spleen = np.zeros((2, HEIGHT, WIDTH), bool)
    top, left = rng.integers(0, 12, 2)
    liver[top : top + 20, left : left + 16] = True
    spleen[top + 4 : top + 14, left + 24 : left + 32] = True
    pixels = rng.integers(0, 64, (HEIGHT, WIDTH, 3), np.uint8)
    pixels[liver], pixels[spleen] = 200, 120
    name = f"image{number:03d}"
    samples = [
        *[sample(f"{name}/I{i}", "I", f"Segment the {e}.", answer(f"The {e} is outlined.", **{e: [e[0]]}))
          for i, e in enumerate(["liver", "spleen"] * 2)],
        *[sample(f"{name}/II{i}", "II", "What is this?", answer(f"This is the {e}.", **{e: [e[0]]}), [e[0]])
          for i, e in enumerate(["liver", "spleen"])],
        sample(f"{name}/III", "III", "Which organ makes bile?",
               answer("The liver makes bile, the spleen does not.", liver=["l"], spleen=["s"])),
        sample(f"{name}/IV", "IV", "What does it do?", answer("This is the spleen.", spleen=["s"]), ["s"]),
        sample(f"{name}/vqa", "vqa", "Is there a liver?", ("Yes.", [])),
    ]  # fmt: skip
    return Record(
        id=name, image=png(pixels), format="png", height=HEIGHT, width=WIDTH, modality="CT", dataset="handmade", split=split,
        group=f"case{number:03d}", masks=[encode_mask(liver, "l", "liver"), encode_mask(spleen, "s", "spleen")], samples=samples,
        licence="CC0-1.0",
    )  # fmt: skip
