"""What all commands share: typed flags, one line for bad input, the choice of the device."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import tyro

from reat_fast.cli.terminal import READER_GONE, keep_outputs, one_line, reader_has_gone
from reat_fast.engine.distributed import World
from reat_fast.engine.stopping import exit_code

Flags = TypeVar("Flags")

START_SECONDS = 20.0
"""By which the first process of a machine may start later than another that is refused."""


def run_command(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; errors of the user become one line on stderr and exit code 2."""
    keep_outputs()
    try:
        code = main(arguments)
        sys.stdout.flush()  # what fails at the end of the program itself is no error of ours
        return code
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and reader_has_gone(error):
            return READER_GONE
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory: take a smaller model, smaller images or fewer at a time "
            f"({one_line(error)[:200]})",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as interrupt:
        print("stopped", file=sys.stderr)
        return exit_code(interrupt)


@contextlib.contextmanager
def refused_once(world: World) -> Iterator[None]:
    """Let one process of a machine tell what all of them would refuse, before they are joined."""
    try:
        yield
    except (ValueError, OSError):
        if world.local_rank > 0:
            time.sleep(START_SECONDS)  # where the first is refused too, torchrun ends this one
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, which PyTorch tells in several ways."""
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "size calculation")
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(s in text for s in signs)


def flag(name: str) -> str:
    """Write a field's name as its flag on the command line."""
    return "--" + name.replace("_", "-")


def refuse_below(least: int, options: object, *names: str) -> None:
    """Raise ValueError for the first of these fields that is below the least; None is unset."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{flag(name)} {value}: must be at least {least}")


def parse_flags(
    flags: type[Flags], arguments: list[str], program: str, default: Flags | None = None
) -> Flags:
    """Read flags into a dataclass; --help prints them and ends the program.

    Errors: ValueError with one line for a flag that does not exist or a value that cannot be.
    """
    _refuse_empty(arguments)
    # Neither may be the terminal: tyro would colour its text.
    printed, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(shown):
            if default is None:
                return tyro.cli(flags, prog=program, args=arguments)
            return tyro.cli(flags, prog=program, args=arguments, default=default)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_one_line(shown.getvalue())) from None
        print(printed.getvalue(), end="", flush=True)
        raise


def _refuse_empty(arguments: list[str]) -> None:
    """Raise ValueError for an argument that is empty: a path would be taken for this folder."""
    for before, given in zip(["", *arguments], arguments, strict=False):
        bare = given.startswith("--") and given.endswith("=")
        if not given or bare:
            name = given[:-1] if bare else before if before.startswith("--") else "an argument"
            raise ValueError(f"{name}: is empty, as a variable that is not set; give a value")


def _one_line(box: str) -> str:
    """Turn the box that tyro draws round an error, in ASCII or not, into one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"\s*[─-]{5,}\s*", " ".join(line for line in lines if line))
    if "╭" not in box:
        sections.pop(0)  # the title, which a drawn box carries in its frame
    text, ours = re.subn(r"^Error parsing [A-Z]\w*: ", "", sections[0])
    if ours:  # a check of the dataclass, which says itself what to do
        return text
    text = text.removeprefix("Error parsing ")
    # What is wrong by each type of a value that may also be None says less than the value.
    text = re.sub(
        r"no type matching (?:\{None\}\|)?(.+?) could be instantiated from \[(.*?)\]\..*",
        r"\2 is no \1",
        text,
    )
    near = re.findall(r"(--[\w-]+)", sections[1]) if "Perhaps" in box else []
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    return f"{text}{hint} (--help lists every flag)"


def choose_device(name: str) -> torch.device:
    """Turn --device into a device: auto is the first CUDA device where there is one, else the CPU.

    Errors: ValueError for a name torch does not know and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(
            f"--device {name}: this machine has {found} CUDA devices; try --device cpu"
        )
    if device.index:
        torch.cuda.set_device(device)  # on which streams are made and that is waited for
    return device


def choose_own_device(name: str, world: World) -> torch.device:
    """Turn --device into the device of this process: each has a GPU of its own.

    Errors: ValueError as choose_device, and for fewer GPUs than processes.
    """
    device = choose_device(name)
    if world.size == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(f"--device {name}: each process takes its own GPU; leave it out")
    found = torch.cuda.device_count()
    if world.local_size > found:  # all of them say so: the first, which speaks, has a GPU
        raise ValueError(
            f"torchrun --nproc-per-node {world.local_size}: this machine has {found} CUDA devices; "
            "start one process for each"
        )
    return choose_device(f"cuda:{world.local_rank}")
