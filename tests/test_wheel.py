"""The package as others get it: built, installed elsewhere and run away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from made_data import made_npz

CHECKOUT = Path(__file__).resolve().parent.parent
OUTER = ("kernels", "loaders")
INNER = [init.parent.name for init in sorted((CHECKOUT / "reat_fast").glob("*/__init__.py"))]
PACKAGES = {
    "reat_fast": "reat_fast",
    **{name: f"reat_fast/{name}" for name in OUTER},
    **{f"reat_fast/{name}": f"reat_fast/{name}" for name in INNER if name not in OUTER},
}
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(*arguments: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_wheel(source: Path, folder: Path) -> Path:
    # Without isolation and index: the tests need no network.
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run("-m", "pip", "wheel", *offline, "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def names(wheel: Path) -> list[str]:
    files = zipfile.ZipFile(wheel).namelist()
    return sorted(name for name in files if ".dist-info/" not in name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what is under version control: building leaves files behind, and reads old ones."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    made = (".*", "build", "dist", "data", "runs", "wandb", "*.egg-info", "__pycache__")
    shutil.copytree(CHECKOUT, copy, symlinks=True, ignore=shutil.ignore_patterns(*made))
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run("-c", BUILD_SDIST, folder, cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pip_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_every_module_once_and_nothing_else(source: Path, wheel: Path) -> None:
    modules = [
        f"{package}/{file.name}"
        for folder, package in PACKAGES.items()
        for file in (source / folder).glob("*.py")
    ]
    assert names(wheel) == sorted([*modules, "reat_fast/py.typed"])


def test_the_sdist_needs_no_links_and_makes_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    assert {"Makefile", "scripts/venv.sh", "tests/test_wheel.py"} <= {
        member.name.partition("/")[2] for member in members
    }
    assert names(pip_wheel(sdist, tmp_path)) == names(wheel)


def test_the_installed_package_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    modules = [package.replace("/", ".") for package in PACKAGES.values()]
    imports = (
        "from importlib import import_module;"
        f"print(*(import_module(name).__file__ for name in {modules}), sep='\\n')"
    )
    files = run("-c", imports, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert files == [str(installed / package / "__init__.py") for package in PACKAGES.values()]
    printed = run("-m", "reat_fast.env", "--json", cwd=tmp_path, PYTHONPATH=str(installed))
    values = json.loads(printed)
    assert f"reat_fast-{values['reat_fast']}.dist-info" in os.listdir(installed)
    assert values["commit"] is None


def test_the_installed_package_trains(installed: Path, tmp_path: Path) -> None:
    data, run_dir = made_npz(tmp_path / "made.npz", train=20), tmp_path / "run"
    options = ["reat", "--fused", "--dataset", "npz", "--data", data, "--run-dir", run_dir]
    options += ["--model", "resnet8", "--width", "8", "--epochs", "1", "--steps", "1"]
    options += ["--imbalance", "0.5", "--batch-size", "32"]
    run("-m", "reat_fast.train", *options, cwd=tmp_path, PYTHONPATH=str(installed))
    assert (run_dir / "evaluation.json").exists()
    shown = run("-m", "reat_fast.evaluate", run_dir, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "pgd20" in shown
