"""python -m reat_fast, or reat-fast once installed: what commands there are, and any of them.

`reat-fast train reat --fused` is `python -m reat_fast.train reat --fused`.
"""

from __future__ import annotations

import difflib
import runpy
import sys

from reat_fast import __version__
from reat_fast.cli.terminal import printed

COMMANDS = {
    "train": "train, evaluate, and leave a run folder behind",
    "evaluate": "attack a trained classifier: accuracy overall, per class and on the tail",
    "report": "show one run or several as an HTML page, pictures and a table",
    "sweep": "train and evaluate a list of runs with several seeds, in one table",
    "export": "write a trained classifier as safetensors, ONNX or a Hub folder",
    "data": "download a data set, or say where each one is",
    "convert": "write a data set as .beton or .npz, long-tailed if wanted",
    "verify": "hold every fast path against the reference on this machine",
    "env": "print versions and devices, for bug reports",
}


def main() -> None:
    """Run the command that is named first, or list all of them; exits with its code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        sys.exit(printed(_list))
    if name == "--version":
        sys.exit(printed(lambda: print(f"reat-fast {__version__}")))
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"error: no command {name!r}{hint} ({', '.join(COMMANDS)})", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"reat_fast.{name}", *arguments]
    runpy.run_module(f"reat_fast.{name}", run_name="__main__", alter_sys=True)


def _list() -> None:
    print("usage: python -m reat_fast COMMAND ..., with --help for its flags; --version\n")
    for command, what in COMMANDS.items():
        print(f"  {command:10} {what}")


if __name__ == "__main__":
    main()
