"""Which packages there are and where they stand; everything else is in pyproject.toml.

`kernels` and `loaders` stand at the top of the checkout. The links reat_fast/kernels and
reat_fast/loaders show them to tools that read the tree; package_dir puts them into wheels and
serves clones whose links became text files.
"""

from setuptools import setup

PARTS = (
    *("cli", "engine", "evaluation", "kernels", "loaders", "methods", "networks", "parity"),
    *("reporting", "sharing", "sources", "storage", "training"),
)

setup(
    packages=["reat_fast", *(f"reat_fast.{part}" for part in PARTS)],
    package_dir={"reat_fast.kernels": "kernels", "reat_fast.loaders": "loaders"},
    package_data={"reat_fast": ["py.typed"]},
)
