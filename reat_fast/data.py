"""Data sets as arrays of bytes, and the long-tailed splits drawn from them.

    python -m reat_fast.data --list            what there is, and where
    python -m reat_fast.data fashion-mnist     download it into the cache folder

The draws themselves are in sources/splits.py and sources/longtail.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reat_fast.cli.terminal import Parser, one_line, printed
from reat_fast.sources import download, formats, lists
from reat_fast.sources.beton_folder import read as read_beton_folder
from reat_fast.sources.formats import DataError as DataError
from reat_fast.sources.formats import Source
from reat_fast.sources.image_set import Dataset as Dataset
from reat_fast.sources.image_set import Images as Images
from reat_fast.sources.image_set import ImageSet as ImageSet
from reat_fast.sources.image_set import spread as spread
from reat_fast.sources.longtail import Indices as Indices
from reat_fast.sources.longtail import head_body_tail as head_body_tail
from reat_fast.sources.longtail import held_out_split as held_out_split
from reat_fast.sources.longtail import longtail_counts as longtail_counts
from reat_fast.sources.longtail import longtail_indices as longtail_indices
from reat_fast.sources.splits import AS_IS as AS_IS
from reat_fast.sources.splits import UNEVEN as UNEVEN
from reat_fast.sources.splits import Splits as Splits
from reat_fast.sources.splits import make_splits as make_splits

if TYPE_CHECKING:
    from reat_fast.config import Config

OWN = {
    "npz": "FILE.npz",
    "folder": "FOLDER of train/CLASS/*.png and test/CLASS/*.png",
    "list": "FOLDER of train.txt and test.txt, each line `path label`",
    "tiny-imagenet": "FOLDER of train/, val/ and wnids.txt",
    "beton": "FOLDER written by `python -m reat_fast.convert`",
}
"""Sets that only --data leads to, and what it must be."""

DATASETS: dict[str, tuple[str, ...]] = {**download.CLASS_NAMES, **dict.fromkeys(OWN, ())}
"""Names that `load_dataset` knows, each with its class names where these are fixed."""


def load_dataset(
    name: str,
    path: str | Path | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Load and check a data set.

    name: one of DATASETS. path: an .npz file (read as the named set), the folder of one's own set,
    or where a named set lies, by default in `download.search_folders(name)`. image_size: pixels a
    side that image files are resized and cut to; such a set is lazy. skip_bad: leave out files that
    cannot be decoded, with a note, instead of raising. Raises DataError.
    """
    place = find_dataset(name, None if path is None else Path(path), image_size)
    own_names = DATASETS[name]
    source = formats.checked(_read(name, place, image_size, skip_bad), own_names)
    train, test = ImageSet(*source.arrays[:2]), ImageSet(*source.arrays[2:])
    class_names = tuple(map(one_line, source.class_names or ()))  # which tables show
    if own_names:
        _refuse_another(name, place, class_names, train.images.shape[1:])
    return Dataset(name, train, test, class_names, source.notes)


def _refuse_another(
    name: str, place: Path, class_names: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    """Raise DataError where what lies at a place is not the named set but another of one's own."""
    own_names, own_shape = DATASETS[name], download.SHAPES[name]
    found = ""
    if len(class_names) != len(own_names):
        found = f"has {len(class_names)} classes, {name} has {len(own_names)}"
    elif shape != own_shape:
        found = f"has images of {_sides(shape)}, {name} has {_sides(own_shape)}"
    elif class_names != own_names:
        pairs = zip(class_names, own_names, strict=True)
        first, usual = next(pair for pair in pairs if pair[0] != pair[1])
        found = f"has a class {first} where {name} has {usual}"
    if found:
        raise DataError(f"--data {place}: {found}; give --dataset npz")


def _sides(shape: tuple[int, ...]) -> str:
    height, width, channels = shape
    return f"{height}x{width} in {'colour' if channels == 3 else 'grey'}"


def load_run_data(
    config: Config,
    name: str | None = None,
    path: Path | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Load the data set of a run, or one in its place, as the run reads it.

    name, path, image_size: what to take instead of the run's. Image files are cut to the size that
    the run has them in, whichever set they are of. skip_bad: leave out what cannot be decoded, also
    where the run does not. Raises DataError.
    """
    name = name or config.dataset
    if path is None and name == config.dataset:
        path = config.data
    are_files = name in lists.READERS and (path is None or path.suffix != ".npz")
    if image_size is None and are_files:
        image_size = config.image_size
    return load_dataset(name, path, image_size, skip_bad or config.skip_bad)


def find_dataset(name: str, path: Path | None = None, image_size: int | None = None) -> Path:
    """Say where a data set is, without reading it; see load_dataset. Raises DataError."""
    if name not in DATASETS:
        raise DataError(f"--dataset {name}: is unknown; give one of {', '.join(DATASETS)}")
    if path is not None and not path.exists():
        raise DataError(f"--data {path}: no such file or folder")
    is_npz = path is not None and path.suffix == ".npz"
    if name in OWN and (path is None or is_npz != (name == "npz")):
        found = "" if path is None else f", got {path}"
        raise DataError(f"dataset {name} needs --data {OWN[name]}{found}")
    if image_size is not None and (is_npz or name not in lists.READERS):
        raise DataError(f"--image-size: the images of {name} have one size already; leave it out")
    if name == "list" and not is_npz and image_size is None:
        raise DataError(lists.NO_SIZE)  # before a sweep comes to it
    if path is not None and (is_npz or name in OWN):
        return path
    folders = download.search_folders(name) if path is None else [path]
    place = download.find(name, folders)
    if place is None:
        where = ", ".join(map(str, folders))
        cure = f"fetch it with `python -m reat_fast.data {name}`, or give --data PATH"
        raise DataError(f"{name} not found in {where} ({download.FILES[name]}): {cure}")
    return place


def _read(name: str, place: Path, image_size: int | None, skip_bad: bool) -> Source:
    if place.suffix == ".npz":
        return formats.read_npz(place)
    if name in lists.READERS:
        return lists.READERS[name](place, image_size, skip_bad)
    return read_beton_folder(place) if name == "beton" else download.read(name, place)


def main(arguments: Sequence[str] | None = None) -> None:
    """Download a data set, or list all; exit with code 2 and one line on failure."""
    parser = Parser(prog="python -m reat_fast.data", description=main.__doc__)
    parser.add_argument("name", nargs="?", help=", ".join(download.CLASS_NAMES))
    parser.add_argument("--list", action="store_true", help="say what there is, and where")
    parser.add_argument("--to", type=Path, metavar="DIR", help="instead of the cache folder")
    options = parser.parse_args(arguments)
    try:
        if not options.list and options.name not in download.CLASS_NAMES:
            names = ", ".join(download.CLASS_NAMES)
            raise DataError(f"NAME must be one of {names}; or give --list")
        for name in DATASETS if options.list else [options.name]:
            print(_describe(name) if options.list else _obtain(name, options.to))
    except DataError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _describe(name: str) -> str:
    if name in OWN:
        return f"{name:14} your own images: --dataset {name} --data {OWN[name]}"
    place = download.find(name, download.search_folders(name))
    return f"{name:14} {len(DATASETS[name])} classes: {place or 'not here; NAME downloads it'}"


def _obtain(name: str, to: Path | None) -> str:
    place = download.find(name, download.search_folders(name) if to is None else [to])
    verb = "already there" if place else "downloaded"
    place = place or download.fetch_dataset(name, to or download.cache_folder())
    dataset = load_dataset(name, place)
    sizes = f"{len(dataset.train)} training and {len(dataset.test)} test images"
    return f"{name} {verb}: {place} ({sizes}, {dataset.num_classes} classes)"


if __name__ == "__main__":
    sys.exit(printed(main))
