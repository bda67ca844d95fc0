"""The named data sets: their classes, where they lie on a machine, and how they get there.

A download goes to NAME.part, goes on where it broke off, and takes its name only once its checksum
is right, so that a file under its final name is whole.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reat_fast.sources import cifar, formats
from reat_fast.sources.formats import DataError

TIMEOUT_SECONDS = 10.0  # to connect, and between two blocks
ATTEMPTS = 4  # per address, each going on where the last one broke off
BLOCK = 1 << 18


_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
tulip turtle wardrobe whale willow_tree wolf woman worm"""
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_FASHION = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot"
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": tuple(_CIFAR10.split()),
    "cifar100": tuple(_CIFAR100.split()),
    "fashion-mnist": tuple(_FASHION.split()),
}
SHAPES = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "fashion-mnist": (28, 28, 1)}
"""Height, width and channels of their images."""
FILES = {
    "cifar10": "cifar-10-python.tar.gz, cifar-10-batches-py or their binary versions",
    "cifar100": "cifar-100-python.tar.gz, cifar-100-python or their binary versions",
    "fashion-mnist": "train-images-idx3-ubyte.gz and the three others, also unpacked",
}
"""What is looked for, in words."""


@dataclass(frozen=True)
class Remote:
    """Name a file and the checksum that makes it the right one.

    digest: md5 of the file, or with `unpacked` the sha256 of what the .gz holds, which is the same
    however it was packed (Debian's are packed anew).
    """

    name: str
    urls: tuple[str, ...]
    digest: str
    unpacked: bool = False


_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist
_FASHION_HOMES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
)
_FASHION_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz"

REMOTES: dict[str, tuple[Remote, ...]] = {
    "fashion-mnist": tuple(
        Remote(f"{name}.gz", tuple(f"{home}/{name}.gz" for home in _FASHION_HOMES), digest, True)
        for name, digest in zip(formats.IDX_FILES, _FASHION_SHA256, strict=True)
    ),
} | {
    name: (Remote(file, (f"{_CIFAR_HOME}/{file}",), digest),)
    for name, file, digest in (
        ("cifar10", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        ("cifar100", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    )
}


def cache_folder() -> Path:
    """Return the folder that downloads go to, honouring XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reat_fast"


def search_folders(name: str) -> list[Path]:
    """Return where a named set is looked for: $REAT_FAST_DATA, ./data, the cache, Debian's."""
    chosen = os.environ.get("REAT_FAST_DATA")
    debian = [_DEBIAN] if name == "fashion-mnist" else []
    return [*([Path(chosen)] if chosen else []), Path("data"), cache_folder(), *debian]


def find(name: str, folders: Iterable[Path]) -> Path | None:
    """Return the first place at or under `folders` that holds the named set, or None."""
    for folder in folders:
        if name == "fashion-mnist":
            place = formats.find_idx(folder)
        else:
            place = cifar.find_cifar(folder, len(CLASS_NAMES[name]))
        if place is not None:
            return place
    return None


def read(name: str, place: Path) -> formats.Source:
    """Read the named set from where `find` found it; raises DataError."""
    if name == "fashion-mnist":
        source = formats.read_idx_folder(place)
    else:
        source = cifar.read_cifar(place, len(CLASS_NAMES[name]))
    return source._replace(class_names=CLASS_NAMES[name])


def fetch_dataset(name: str, folder: Path) -> Path:
    """Download the named set into `folder` and return the place to load it from.

    Fashion-MNIST comes from Debian's archive where apt-get reaches it, else from public mirrors.
    Raises DataError: one line with all that was tried, and how to do it by hand.
    """
    remotes = REMOTES[name]
    target = folder / name if len(remotes) > 1 else folder
    failures = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        if name == "fashion-mnist":
            failures = _take_from_debian(remotes, target)
        for remote in remotes:
            download(remote, target)
    except (OSError, DataError) as error:
        tried = "; ".join([*failures, str(error)])
        files = ", ".join(remote.name for remote in remotes)
        hand = f"by hand: put {files} into {target}, or say where it is with --data PATH"
        raise DataError(f"{name} could not be fetched: {tried}; {hand}") from error
    return target if len(remotes) > 1 else target / remotes[0].name


def download(remote: Remote, folder: Path) -> Path:
    """Fetch one file from the first address that has it, unless it is there; raises DataError."""
    path = folder / remote.name
    part = folder / f"{remote.name}.part"
    if path.is_file() and is_right(path, remote):
        return path
    failures = []
    for url in remote.urls:
        try:
            _transfer_on(url, part)
            if is_right(part, remote):
                part.replace(path)
                return path
            with part.open("rb") as file:
                what = "a web page came" if file.read(64).lstrip()[:1] == b"<" else "wrong checksum"
            part.unlink()
            failures.append(f"{url}: {what}, deleted")
        except (OSError, http.client.HTTPException) as error:
            reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
            failures.append(f"{url}: {reason or type(error).__name__}")
    raise DataError("; ".join(failures))


def is_right(path: Path, remote: Remote) -> bool:
    """Say whether a file is the one meant, by its checksum."""
    digest = hashlib.sha256() if remote.unpacked else hashlib.md5(usedforsecurity=False)
    try:
        with gzip.open(path) if remote.unpacked else path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except (OSError, EOFError, zlib.error):
        return False
    return digest.hexdigest() == remote.digest


def _transfer_on(url: str, part: Path) -> None:
    """Fetch `url` into `part`, again after a break as long as each attempt gets further."""
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(part)
        try:
            return _transfer(url, part)
        except (OSError, http.client.HTTPException):
            if attempt == ATTEMPTS or _size(part) <= before:
                raise


def _transfer(url: str, part: Path) -> None:
    size = _size(part)
    headers = {"User-Agent": "reat_fast"} | ({"Range": f"bytes={size}-"} if size else {})
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        if error.code != 416 or not size:
            raise
        if error.headers.get("Content-Range") == f"bytes */{size}":
            return  # the part is whole
        part.unlink()
        return _transfer(url, part)
    with answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        start = size if answer.status == 206 and goes_on else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, disable=None
        )  # disable=None: shown on a terminal only
        with bar, part.open("ab" if start else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and _size(part) < total:
        raise ConnectionError(f"broke off at {_size(part)} of {total} bytes; run it again to go on")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _take_from_debian(remotes: Sequence[Remote], target: Path) -> list[str]:
    """Put the files of Debian's package into `target`; return what failed, nothing where no apt."""
    if all((target / remote.name).is_file() for remote in remotes):
        return []
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return []
    package = "dataset-fashion-mnist"
    quick = ["-o", "Acquire::Retries=0", "-o", f"Acquire::http::Timeout={TIMEOUT_SECONDS:.0f}"]
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        failure = _run(["apt-get", *quick, "download", package], scratch)
        if "Unable to locate" in failure and os.geteuid() == 0:  # no package lists yet
            failure = _run(["apt-get", *quick, "update"], scratch)
            failure = failure or _run(["apt-get", *quick, "download", package], scratch)
        for deb in Path(scratch).glob("*.deb"):
            failure = _run(["dpkg", "-x", deb.name, "."], scratch)
        for remote in remotes:
            file = Path(scratch, _DEBIAN.relative_to("/"), remote.name)
            if is_right(file, remote):
                file.replace(target / remote.name)
    return [failure] if failure else []


def _run(command: list[str], folder: str) -> str:
    """Run a command in silence; return why it failed in one line, or nothing."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return f"{command[0]}: {last}" if done.returncode else ""
