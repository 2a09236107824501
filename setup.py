"""Which packages there are: those of the folders, the commands as `guided_pixels`, and the configurations.

All else stands in pyproject.toml, which cannot list found packages and mapped ones together.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["guided_diffusion*", "evaluations*"]), "guided_pixels",
                "guided_diffusion.configs"])
