from pathlib import Path

from setuptools import find_packages, setup

evaluation = ["scipy", "matplotlib", "tensorboard"]     # tensorboard: reads TensorFlow's graph files

setup(
    name="guided-pixels",
    version="0.1.0",
    description="Guidance of pixel diffusion models: SAG, classifier guidance and more, reproducible end to end",
    long_description=Path(__file__).with_name("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*", "evaluations", "evaluations.*"]),
    package_data={"guided_diffusion": ["models/*", "models/depth/*"], "evaluations": ["models/*"]},
    install_requires=["torch>=2.4", "numpy", "safetensors", "PyYAML", "tqdm", "Pillow"],
    extras_require={
        "mpi": ["mpi4py", "mpich"],
        "blob": ["blobfile"],           # checkpoints at gs:// and az://
        "eval": evaluation,
        "tf": ["tensorflow"],
        "tf-cpu": ["tensorflow-cpu"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "dev": ["pytest", "ruff", "selenium", *evaluation],     # selenium: looks at reports in Chromium
    },
)
