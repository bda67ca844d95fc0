"""python -m tests.soak --kills 100: kill and resume a run many times and compare every bit."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from killed_run import differences, kill_and_resume, run_once  # noqa: E402
from made_data import made_npz  # noqa: E402


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = made_npz(folder / "made.npz")
        assert run_once(data, folder / "whole") == 0
        kills, runs = kill_and_resume(data, folder, options.kills, options.seed)
        different = 0
        for number in range(1, runs + 1):
            found = differences(folder / "whole", folder / f"run-{number}")
            different += bool(found)
            print(f"run {number}: {', '.join(found) or 'equal to the last bit'}")
    print(f"{kills} kills in {runs} runs; {different} runs differ from one never killed")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
