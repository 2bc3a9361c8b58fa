"""The only uses of jax beyond its public interface; tests/test_jax_internals.py checks them on every supported version."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax._src import clusters, distributed

_PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


class Cluster(NamedTuple):
    """The cluster that this process belongs to, as jax detects it: its kind, the index of this process, and the number of processes."""

    kind: str
    process: int
    count: int


def find_cluster() -> Cluster | None:
    """The cluster that jax detects, None if there is none. Raises what jax's code for that cluster raises."""
    kinds = (kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
    kind = next((kind for kind in kinds if kind.is_env_present()), None)
    if kind is None:
        return None
    count = kind.get_process_count()
    return Cluster(kind.__name__, 0 if count == 1 else kind.get_process_id(), count)


def preemption_noticed() -> bool:
    """Whether any process of the run has received a preemption notice, which jax then stores for all. Needs a coordination client."""
    try:
        return bool(coordination_client().key_value_try_get(_PREEMPTION_NOTICE))
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return False
        raise


def coordination_client() -> Any:
    """The client of jax's coordination service, None in a process that has not joined others."""
    return distributed.global_state.client
