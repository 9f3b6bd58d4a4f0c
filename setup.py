"""Which folders a wheel holds: the package, and inside it what lies beside it in a clone."""

from setuptools import find_packages, setup

BESIDE = ("experiments", "datasets")

setup(
    packages=[*find_packages(include=["harmony", "harmony.*"]), *(f"harmony.{folder}" for folder in BESIDE)],
    package_dir={f"harmony.{folder}": folder for folder in BESIDE},
)
