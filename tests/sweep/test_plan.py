"""Names, hashes and directories of runs; every ablation as a model that makes a step."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import pytest

from mimo_jax import config_flags, files
from mimo_jax.config import Config, ConfigError, SourceConfig
from mimo_jax.data.builder.phantom_set import build_phantoms
from mimo_jax.data.loading.loader import make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from mimo_jax.models import mimo, scan
from mimo_jax.parameters import multipliers
from mimo_jax.sweep.plan import SharedSettings, SweepError, base_config, check_folders, make_sweep
from mimo_jax.train import losses
from mimo_jax.train.loop import _corpus
from tests.sweep.small import ABLATIONS, BASE

SOURCES = {"phantom": SourceConfig(path="/data/phantom")}


def plan(
    ablations="configs/ablations.py", base="configs/tiny.py", shared=(), sources=SOURCES, data=("data/phantom",), workdir="runs", **options
):
    return make_sweep(ablations, Path(workdir), sources, SharedSettings(base, data, tuple(shared), "/data/phantom", None), **options)


def test_the_base_runs_once_for_all_groups_and_first():
    sweep = plan(only=["aligner", "queries"], seeds=[0, 7])
    aligner, queries = sweep.groups["aligner"], sweep.groups["queries"]
    assert list(aligner) == ["cross_attention", "cross_attention_no_map_loss", "none"]
    assert list(queries) == ["8", "2", "4", "16"]  # the baseline before the others
    assert queries["8"] == aligner["cross_attention"] == [sweep.runs[0].name, sweep.runs[6].name]
    assert len(sweep.runs) == 2 * 6 and len({run.name for run in sweep.runs}) == 12
    assert [(run.config.train.seed, run.config.data.seed) for run in sweep.runs] == [(0, 0)] * 6 + [(7, 7)] * 6
    for run in sweep.runs:
        assert run.folder == Path("runs") / run.name and run.config.data.sources == SOURCES


def test_names_are_readable_and_depend_on_the_overrides_alone():
    first = plan(only=["aligner"]).runs
    assert [run.name.rpartition("-")[0] for run in first] == ["base-s0", "aligner-cross-attention-no-map-loss-s0", "aligner-none-s0"]
    again = plan(only=["seg_position", "aligner"], shared=["--config.train.steps=7"]).runs
    assert {run.name for run in first} <= {run.name for run in again}
    assert len({run.name[-8:] for run in again}) == len(again)


def test_the_aligner_of_no_kind_gets_longer_sequences():
    run = plan(only=["aligner"]).runs[2]
    assert run.config.model.aligner.kind == "none" and run.config.buckets() == (56 + 144 + 16 + 8 - 8,)
    assert run.overrides == (
        "--config.data.buckets=216", "--config.model.aligner.kind=none", "--config.train.loss.attention_map=0.0", "--config.data.seed=0",
        "--config.train.seed=0",
    )  # fmt: skip
    assert run.train() == [
        *("train", "--config", "configs/tiny.py", "--data", "data/phantom", "--workdir", str(run.folder)),
        *run.overrides,
    ]


@pytest.mark.parametrize("base", ["tiny", "tiny_finetune", "tiny_lora", "small", "mimo_7b"])
def test_every_ablation_of_every_packaged_config_is_valid(base):
    sweep = plan(base=f"configs/{base}.py")
    assert len(sweep.groups) == 13
    for group, variants in sweep.groups.items():
        assert len({tuple(names) for names in variants.values()}) == len(variants) > 1, group  # each is another run
        assert next(iter(variants.values())) == [sweep.runs[0].name]


def test_what_a_start_from_weights_may_lack_begins_from_the_seed():
    runs = {run.name.rpartition("-s0")[0]: run for run in plan(base="tiny_lora", shared=["--config.init.path=/import"]).runs}
    assert runs["aligner-none"].config.init.reinit == "lora_[ab]$|^aligner/"
    assert runs["base"].config.init.reinit == "lora_[ab]$"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    build_phantoms(folder, 24, seed=5, progress=False)
    return {"phantom": SourceConfig(path=str(folder))}


@pytest.mark.slow
def test_every_ablation_has_a_loss_on_batches_made_for_it(data, tmp_path):
    """Shapes alone, for nothing here depends on numbers; of what differs in a number, one variant."""
    sweep = plan(base=BASE, sources=data)
    alike = {"data", "perspective", "queries", "lora_rank", "lora_targets", "prompts", "mask_side"}
    names = {
        name for group, variants in sweep.groups.items() for runs in list(variants.values())[-1 if group in alike else 0 :] for name in runs
    }
    for run in (run for run in sweep.runs if run.name in names):
        config = run.config
        file = tmp_path / f"{config.model.seg_position}.json"
        sources = open_sources(config, "train")
        if not file.exists():
            train_tokenizer(_corpus(config, sources), config.model.llm.vocab_size, file, config.model.grounding_tokens())
        loader = make_loader(config, load_tokenizer(file, config.model), sources)
        batch = next(loader)
        loader.close()
        assert batch["sample_weight"].all(), run.name
        graphdef, params = mimo.abstract(config)
        assert None in multipliers(config, params).values()
        forward = functools.partial(losses.batch_sums, chunk=config.train.loss_chunk)
        sums = jax.eval_shape(lambda params, batch, g=graphdef, f=forward: f(scan.bind(g, params), batch), params, batch)
        assert {value.shape for value in sums.values()} == {()}, run.name


def test_a_directory_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    run = dataclasses.replace(plan(only=["aligner"]).runs[0], folder=tmp_path)
    check_folders([run])
    files.write_json(tmp_path / "config.json", run.config.to_dict())
    check_folders([run])
    other = Config.from_dict(run.config.to_dict())
    other.train.steps, other.data.weights["IV"] = 7, 0.0
    files.write_json(tmp_path / "config.json", other.to_dict())
    with pytest.raises(SweepError, match=r"has another config: config\.data\.weights\.IV \(0\.0 there, 1\.0 here\), config\.train\.steps"):
        check_folders([run])


def test_a_report_counts_only_if_it_is_of_what_is_asked(tmp_path):
    run = dataclasses.replace(plan(only=["aligner"]).runs[0], folder=tmp_path)
    about = {"data": "/data/phantom", "split": "test", "limit": None}
    assert run.report() is None and [words[0] for words in run.remaining()] == ["train", "eval"]
    (tmp_path / "test.json").write_text(json.dumps(about))
    assert run.report() == about and run.remaining() == []
    (tmp_path / "test.json").write_text(json.dumps(about | {"limit": 5}))
    assert run.report() is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x = 1", "does not define BASE and get_ablations"),
        ("BASE = 'configs/tiny.py'\ndef get_ablations(base):\n    return base.modle", "'Config' object has no attribute 'modle'"),
        ("BASE = 'configs/tinny.py'\ndef get_ablations(base):\n    return {}", r"--config configs/tinny\.py: no such file"),
        (
            "BASE = 'tiny'\ndef get_ablations(base):\n    return {'a': {'b': {'train.stesp': 1}}}",
            r"config\.train\.stesp: is unknown; did you",
        ),
        (
            "BASE = 'tiny'\ndef get_ablations(base):\n    return {'a': {'b': {'train.steps': 0}}}",
            r"config\.train\.steps: must be at least 1",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(text, answer, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises((SweepError, ConfigError), match=answer):
        plan(str(file), base_config(str(file)))


def test_an_unknown_group_is_named_with_those_that_there_are():
    with pytest.raises(
        SweepError, match=r"--only alinger: is not a group of configs/ablations\.py; its groups are aligner, data, perspective"
    ):
        plan(only=["data", "alinger"])


def test_the_small_ablations_of_these_tests_are_found():
    assert base_config(ABLATIONS) == BASE and config_flags.find_config(BASE).is_file()
