"""Programs beside each other: how many, on which share of the machine, and how they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from reat_fast.engine.stopping import exit_code
from reat_fast.training import sweep_launch, sweep_programs
from reat_fast.training.sweep_programs import Programs, share_of, what_ended


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def told_to_stop(name: str, folder: Path) -> list[str]:
    """A program that says it has begun, and ends a moment after it was told to, with 0."""
    return python(f"""
import pathlib, signal, time
folder = pathlib.Path({str(folder)!r})
def tell(number, _):
    with open(folder / "{name}-told", "a") as file: print(number, file=file)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, tell)
(folder / "{name}-begun").touch()
while not (folder / "{name}-told").exists(): time.sleep(0.01)
time.sleep(0.2)
(folder / "{name}-saved").touch()
""")


def await_file(file: Path) -> None:
    """Wait until a program has made a file, but not for ever."""
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.01)


def test_a_program_gives_its_exit_code_and_shows_what_it_prints(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with Programs() as programs:
        said = "import os; print(os.getsid(0) == os.getpid()); raise SystemExit(7)"
        programs.start("one", python(said), None)
        assert programs.busy and not programs.has_room
        assert programs.wait() == ("one", 7)
        assert programs.has_room and not programs.busy
    assert capfd.readouterr().out == "True\n"  # in a session of its own, which Ctrl-C leaves alone


def test_as_many_run_at_a_time_as_are_asked_for_and_the_first_to_end_makes_room(
    tmp_path: Path,
) -> None:
    quick = python("import sys; print('out'); print('error', file=sys.stderr)")
    slow = python(f"""
import pathlib, time
while not pathlib.Path({str(tmp_path / "go")!r}).exists(): time.sleep(0.01)
""")
    with Programs(2) as programs:
        programs.start("slow", slow, tmp_path / "slow.log")
        assert programs.has_room
        programs.start("quick", quick, tmp_path / "quick.log")
        assert not programs.has_room
        assert programs.wait() == ("quick", 0)
        assert programs.has_room and programs.busy
        programs.start("again", quick, tmp_path / "quick.log")
        assert programs.wait() == ("again", 0)
        (tmp_path / "go").touch()
        assert programs.wait() == ("slow", 0)
    assert sorted((tmp_path / "quick.log").read_text().split()) == ["error"] * 2 + ["out"] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_all_programs_are_told_to_stop_once_and_may_save(
    tmp_path: Path, number: int, request: pytest.FixtureRequest
) -> None:
    if number == signal.SIGHUP:  # the tests themselves may run under nohup
        outside = signal.signal(number, signal.SIG_DFL)
        request.addfinalizer(lambda: signal.signal(number, outside))
    before = signal.getsignal(number)

    def stop() -> None:
        while len(list(tmp_path.glob("*-begun"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        while not list(tmp_path.glob("*-told")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)  # impatience changes nothing

    thread = threading.Thread(target=stop)
    with pytest.raises(KeyboardInterrupt) as interrupt, Programs(3) as programs:
        for name in ("one", "two"):
            programs.start(name, told_to_stop(name, tmp_path), tmp_path / f"{name}.log")
        thread.start()
        programs.wait()
    thread.join()
    passed_on = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert exit_code(interrupt.value) == 128 + number
    for name in ("one", "two"):
        assert (tmp_path / f"{name}-told").read_text() == f"{passed_on:d}\n"
        assert (tmp_path / f"{name}-saved").exists()
    assert signal.getsignal(number) == before


def test_a_program_that_was_stopped_by_another_stops_the_rest(tmp_path: Path) -> None:
    stopped = python(f"""
import pathlib, time
while not pathlib.Path({str(tmp_path / "other-begun")!r}).exists(): time.sleep(0.01)
raise SystemExit(143)
""")
    with pytest.raises(KeyboardInterrupt) as interrupt, Programs(2) as programs:
        programs.start("other", told_to_stop("other", tmp_path), None)
        programs.start("stopped", stopped, None)
        programs.wait()
    assert exit_code(interrupt.value) == 143
    assert (tmp_path / "other-saved").exists()


def test_a_signal_between_two_programs_stops_too() -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt, Programs() as programs:
        os.kill(os.getpid(), signal.SIGTERM)
        assert not programs.has_room
        programs.wait()
    assert exit_code(interrupt.value) == 143


def test_nohup_keeps_a_closed_terminal_from_ending_the_programs(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Programs() as programs:
            programs.start("one", python("print('done')"), tmp_path / "one.log")
            os.kill(os.getpid(), signal.SIGHUP)
            assert programs.wait() == ("one", 0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_leaves_no_program_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"), Programs(2) as programs:
        programs.start("one", told_to_stop("one", tmp_path), None)
        while not (tmp_path / "one-begun").exists():
            time.sleep(0.01)
        raise ValueError("damaged")
    assert (tmp_path / "one-saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels tell no child")
def test_a_program_is_told_to_stop_and_may_save_when_its_sweep_was_killed(tmp_path: Path) -> None:
    sweep = f"""
from pathlib import Path
from reat_fast.training.sweep_programs import Programs
with Programs() as programs:
    programs.start("one", {told_to_stop("one", tmp_path)!r}, Path({str(tmp_path / "one.log")!r}))
    programs.wait()
"""
    paths = os.pathsep.join([str(Path(sweep_programs.__file__).parents[2]), *sys.path])
    with subprocess.Popen(python(sweep), env={**os.environ, "PYTHONPATH": paths}) as process:
        await_file(tmp_path / "one-begun")
        process.kill()
    await_file(tmp_path / "one-saved")
    # Linux may tell it again with the next thread of the sweep that ends: see sweep_launch.
    assert set((tmp_path / "one-told").read_text().split()) == {str(int(signal.SIGTERM))}


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels tell no child")
def test_a_program_whose_sweep_is_gone_before_it_begins_does_not_begin(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    program = python(f"import pathlib; pathlib.Path({str(begun)!r}).touch()")
    module = [sys.executable, "-m", sweep_launch.__name__]
    gone = subprocess.Popen(python(""))
    gone.wait()
    assert (
        subprocess.run([*module, str(gone.pid), *program]).returncode == 143 and not begun.exists()
    )
    assert subprocess.run([*module, str(os.getpid()), *program]).returncode == 0 and begun.exists()


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("epoch 1/2\nerror: no space\na warning of a library\n", "error: no space"),
        ("error: first\nerror: last\n", "error: last"),
        ("epoch 1/2\nValueError: of Python\n", "ValueError: of Python"),
        ("", "one.log holds nothing of it"),
    ],
)
def test_what_ended_a_program_is_read_from_its_own_lines(
    written: str, told: str, tmp_path: Path
) -> None:
    log = tmp_path / "one.log"
    log.write_text("error: of the program before\n")
    before = log.stat().st_size
    with log.open("a") as file:
        file.write(written)
    assert what_ended(log, before).endswith(told)


@pytest.mark.parametrize(
    ("environment", "gpus", "shares"),
    [
        ({}, 0, [{}, {}, {}]),
        ({}, 1, [{}, {}, {}]),
        ({}, 2, [{"CUDA_VISIBLE_DEVICES": n} for n in ("0", "1", "0")]),
        (
            {"CUDA_VISIBLE_DEVICES": "5, GPU-a"},
            2,
            [{"CUDA_VISIBLE_DEVICES": n} for n in ("5", "GPU-a", "5")],
        ),
        ({"CUDA_VISIBLE_DEVICES": ""}, 4, [{"CUDA_VISIBLE_DEVICES": ""}] * 3),
        ({"OMP_NUM_THREADS": "5"}, 0, [{"OMP_NUM_THREADS": "5"}] * 3),
    ],
)
def test_gpus_and_cores_are_shared_out(
    environment: Mapping[str, str],
    gpus: int,
    shares: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sweep_programs, "cpu_cores", lambda: 8)
    kept = {"HOME": "here", **environment}
    found = [share_of(slot, 3, True, kept) for slot in range(3)]
    assert found == [{"OMP_NUM_THREADS": "2", **kept, **share} for share in shares]
    assert share_of(0, 1, True, kept) == kept
    # A run that names its GPU gets it.
    assert share_of(1, 3, False, kept) == {"OMP_NUM_THREADS": "2", **kept}
    assert share_of(0, 9, False, {})["OMP_NUM_THREADS"] == "1"
