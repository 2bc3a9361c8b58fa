"""What is used of jax beyond its public interface, on the version that is installed."""

from mimo_jax import jax_internals


def test_no_cluster_and_no_client_where_a_process_is_alone(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    assert jax_internals.find_cluster() is None
    assert jax_internals.coordination_client() is None


def test_a_cluster_that_jax_recognises_is_found(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert jax_internals.find_cluster() == jax_internals.Cluster("SlurmCluster", 1, 2)
