"""Versions and devices: `python -m reat_fast.env`, for bug reports, run folders and result rows.

What names a person or a machine (users, hosts, paths, serial numbers) stays out, so that the
output can be pasted into an issue as it is.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from reat_fast.cli.terminal import Parser, printed

EXTRAS = (
    "ffcv",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "pyautoattack",
    "timm",
    "tensorboard",
    "wandb",
    "huggingface-hub",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pillow",
)


def environment() -> dict[str, object]:
    """Describe versions, operating system, processor and GPUs in values that JSON can hold.

    What cannot be found out is None; `commit` and `dirty` are known in a git checkout only, `gpus`
    are those that torch sees. Memory is in GiB, the power limit in watts.
    """
    commit, dirty = _commit()
    smi = _nvidia_smi()
    return {
        "reat_fast": _version("reat-fast"),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "numpy": _version("numpy"),
        "extras": {name: version for name in EXTRAS if (version := _version(name))},
        "os": _operating_system(),
        "cpu": _cpu_model(),
        "cpu_cores": cpu_cores(),
        "memory_gib": _memory_gib(),
        "driver": next((row["driver"] for row in smi.values()), None),
        "gpus": _gpus(smi),
    }


def table(values: Mapping[str, object]) -> str:
    """Lay out `environment()` for reading, a line for each value and each GPU."""
    lines = []
    for name, value in values.items():
        rows = value if isinstance(value, list) else [value]
        lines += [f"{name:<12}{_words(row)}" for row in rows or [None]]
    return "\n".join(lines)


def main() -> None:
    """Print the environment as a table, or as JSON with `--json`."""
    parser = Parser(prog="python -m reat_fast.env", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    values = environment()
    print(json.dumps(values, indent=2) if as_json else table(values))


def _words(value: object) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    return str(value)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> tuple[str | None, bool | None]:
    if "REAT_FAST_COMMIT" in os.environ:  # what a copy of a checkout was made from
        return os.environ["REAT_FAST_COMMIT"], False
    checkout = Path(__file__).resolve().parent.parent
    # An installed package may lie inside somebody else's repository.
    if not (checkout / ".git").exists():
        return None, None
    commit = _output("git", "-C", str(checkout), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(checkout), "status", "--porcelain")
    return commit, None if changes is None else changes != ""


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version is None else str(version)


def _operating_system() -> str:
    try:
        distribution = platform.freedesktop_os_release()["PRETTY_NAME"] + ", "
    except (OSError, KeyError):
        distribution = ""
    return distribution + platform.platform()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def cpu_cores() -> int | None:
    """Return the cores this process may use: on a shared machine fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(size / 2**30, 1)


def _nvidia_smi() -> dict[str, dict[str, str]]:
    """Ask nvidia-smi for what torch does not tell, by the GPU's own identifier."""
    query = "--query-gpu=uuid,driver_version,power.limit"
    rows = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    fields = [line.split(", ") for line in rows.splitlines()] if rows else []
    # torch gives the identifier without the prefix.
    return {
        row[0].removeprefix("GPU-"): {"driver": row[1], "power": row[2]}
        for row in fields
        if len(row) == 3
    }


def _gpus(smi: Mapping[str, Mapping[str, str]]) -> list[dict[str, object]]:
    gpus: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        power = smi.get(str(device.uuid), {}).get("power", "")
        gpus.append(
            {
                "name": device.name,
                "memory_gib": round(device.total_memory / 2**30, 1),
                "compute_capability": f"{device.major}.{device.minor}",
                # nvidia-smi answers [N/A] where a limit cannot be read.
                "power_limit_watts": float(power) if power[:1].isdigit() else None,
            }
        )
    return gpus


if __name__ == "__main__":
    sys.exit(printed(main))
