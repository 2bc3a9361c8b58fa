"""What every test, and every process that a test starts, runs under."""

import os
from importlib.metadata import version
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# What one run compiled, the next one reads.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("MIMO_HOME", str(ROOT / ".jax_cache" / "mimo"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Most of the time goes into compiling: unoptimised code of tiny models is ready in a third of it, and runs as fast.
# (benchmarks/parity_full_width.py holds optimised code against the same libraries.)
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # later ones have no other emitters to turn off
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

# Two processes share two cores: time says nothing about a case.
settings.register_profile("mimo", deadline=None)
settings.load_profile("mimo")
