"""The big configs, without their arrays: sizes as published, and shapes that fit together."""

import pytest

from mimo_jax import pathtree
from mimo_jax.config_flags import find_config, read_config_file
from mimo_jax.models import mimo


def counts(name: str) -> dict[str, int]:
    config = read_config_file(find_config(f"configs/{name}.py"))
    config.validate()
    made: dict[str, int] = {}
    for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items():
        root = path.split("/")[0]
        made["lora" if "/lora_" in path else "grounding" if path.endswith("/grounding") else root] = (
            made.get("lora" if "/lora_" in path else "grounding" if path.endswith("/grounding") else root, 0) + leaf.size
        )
    return made


def sam(made: dict[str, int]) -> int:
    return made["sam_encoder"] + made["sam_prompt"] + made["sam_decoder"]


def test_mimo_7b_has_the_published_sizes():
    made = counts("mimo_7b")
    assert made["vision"] == pytest.approx(630.8e6, rel=1e-3)
    assert made["llm"] + made["embedding"] + made["lm_head"] == 6_738_415_616
    assert sam(made) == pytest.approx(641.09e6, rel=1e-4)
    assert made["lora"] == 32 * 2 * 8 * (4096 + 4096)
    assert made["grounding"] == 2 * 3 * 4096


def test_lisa_7b_has_the_published_sizes():
    made = counts("lisa_7b")
    assert made["vision"] == pytest.approx(303.2e6, rel=2e-3)
    assert made["aligner"] == 1024 * 4096 + 4096
    assert made["seg_projection"] == 4096 * 4096 + 4096 + 4096 * 256 + 256
    assert made["grounding"] == 2 * 4096 and "prompt" not in made


def test_small_has_the_sizes_of_its_parts():
    made = counts("small")
    assert made["llm"] + made["embedding"] + made["lm_head"] == pytest.approx(1.1e9, rel=1e-3)
    assert sam(made) == pytest.approx(93.7e6, rel=1e-2)
    assert made["vision"] == pytest.approx(86e6, rel=1e-2)
