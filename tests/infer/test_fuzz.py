"""Whatever is asked, there comes an answer or one clear line. (benchmarks/fuzz.py asks 10,000 times.)"""

from mimo_jax.infer.predictor import Mimo
from tests.data.handmade import tokenizer as make_tokenizer
from tests.infer.fuzzing import Fuzz
from tests.tiny_config import random_params, tiny_config


def test_every_request_ends_in_an_answer_or_one_line(tmp_path):
    config = tiny_config(max_turns=2)
    config.generate.max_new_tokens = 12
    fuzz = Fuzz(Mimo(config, random_params(config), make_tokenizer(tmp_path)), tmp_path, seed=0)
    for _ in range(150):
        fuzz.once()
    assert not fuzz.faults, fuzz.faults[:5]
    assert fuzz.answers > 30 and fuzz.refused > 30
