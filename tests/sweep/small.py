"""A base config and ablations of a few seconds, for tests: both `get_config` and `get_ablations`."""

from tests.tiny_config import quick_config

ABLATIONS = BASE = __file__


def get_config():
    return quick_config()


def get_ablations(base):
    return {"mine": {"plain": {}, "rare": {"data.fraction": 1e-6}}}
