"""Convert a data set into .beton files or an .npz, long-tailed where asked.

    python -m reat_fast.convert cifar10 --to data/cifar10-lt --imbalance 0.02 --check
    python -m reat_fast.convert tiny-imagenet --data tiny-imagenet-200 --to data/tiny --field jpg
    python -m reat_fast.convert folder --data photos --image-size 64 --to data/photos.npz

The result is written beside its place and moved there only when it is whole.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from tqdm import tqdm

from reat_fast.cli.command import parse_flags, run_command
from reat_fast.data import DATASETS, Dataset, ImageSet, Indices, load_dataset, make_splits
from reat_fast.engine.stopping import ended_by_sigterm
from reat_fast.sources import beton_folder, formats
from reat_fast.sources.beton_file import read_beton
from reat_fast.sources.formats import DataError
from reat_fast.sources.lazy import Bytes, decode_all
from reat_fast.sources.lists import refuse_or_note
from reat_fast.storage.whole_files import replacing

Progress = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """Convert a data set into a folder of .beton files, or into an .npz file."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """cifar10, cifar100, fashion-mnist, npz, folder, list, tiny-imagenet or beton."""
    to: Path
    """Folder to write, or FILE.npz."""
    data: Path | None = None
    """Where the source is; unset: where a named set is usually found."""
    image_size: int | None = None
    """Pixels a side that image files are resized and cut to."""
    field: Literal["raw", "jpg"] = "raw"
    """How a .beton keeps RGB images; grey ones are always raw."""
    quality: int = 95
    """Quality of JPEG, 1 to 100."""
    imbalance: float | None = None
    """Smallest / largest class of a long-tailed training set; unset: every image."""
    imbalance_profile: Literal["exp", "step"] = "exp"
    """How class sizes fall off: exponentially, or in one step after half of the classes."""
    largest: int | None = None
    """Images of class 0; unset: the size of the smallest class."""
    split: Literal["apply", "index"] = "apply"
    """Write only the long-tailed images, or all of them and a list of positions beside them."""
    split_seed: int = 0
    """Seed of the long-tailed subset; 0 is the subset that the official code draws."""
    skip_bad: bool = False
    """Leave out image files that cannot be decoded."""
    check: bool = False
    """Read all images and labels again and compare them with the source."""
    force: bool = False
    """Replace what an earlier conversion left there."""

    def __post_init__(self) -> None:
        npz = self.to.suffix == ".npz"
        known = ", ".join(DATASETS)
        checks = {
            f"SOURCE {self.source}: is unknown; give one of {known}": self.source in DATASETS,
            f"--quality {self.quality}: not in 1..100": 1 <= self.quality <= 100,
            "--field jpg: an .npz keeps plain pixels; leave it out": not npz or self.field == "raw",
            "--split index: needs a folder, not an .npz": not npz or self.split == "apply",
            "--split index: needs --imbalance": self.imbalance is not None or self.split == "apply",
            f"--split-seed {self.split_seed}: must lie in [0, 2^32)": 0 <= self.split_seed < 2**32,
            f"--largest {self.largest}: must be at least 1": self.largest is None
            or self.largest >= 1,
            "--largest: needs --imbalance": self.imbalance is not None or self.largest is None,
            "--split-seed: needs --imbalance": self.imbalance is not None or not self.split_seed,
            "--quality: needs --field jpg": self.field == "jpg" or self.quality == 95,
        }
        for message, good in checks.items():
            if not good:
                raise ValueError(message)


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m reat_fast.convert")
    target = options.to.resolve()
    _refuse_to_replace(target, options.force)
    if options.data is not None and options.data.resolve() == target:
        raise DataError(f"--to {target}: is the source itself; name another place")
    dataset = load_dataset(options.source, options.data, options.image_size, options.skip_bad)
    for note in dataset.notes:
        print(note, file=sys.stderr)
    rows = _long_tail(dataset, options)
    train = dataset.train if rows is None or options.split == "index" else dataset.train.take(rows)
    parts = {"train": train, "test": dataset.test}
    total = sum(map(len, parts.values()))
    quality = options.quality if options.field == "jpg" else None
    loss = ""
    with ended_by_sigterm(), replacing(target, beton_folder.FILES) as place:
        with _bar("writing", total) as bar:
            if target.suffix == ".npz":
                write_npz(place, parts, dataset.class_names, bar.update)
            else:
                description = _describe(dataset, rows, options)
                index = rows if options.split == "index" else None
                beton_folder.write(place, parts, description, index, quality, bar.update)
        if options.check:
            with _bar("checking", total) as bar:
                ratio = check(place, parts, quality, bar.update)
            loss = ", checked" + (f": JPEG at {ratio:.1f} dB PSNR" if ratio < math.inf else "")
    counts = np.bincount(dataset.train.labels if rows is None else dataset.train.labels[rows])
    print(
        f"{options.to} written: {len(train)} training and {len(dataset.test)} test images of "
        f"{'x'.join(map(str, train.images.shape[1:]))}, "
        f"{counts.max()} to {counts.min()} a class for training{loss}"
    )
    return 0


def _long_tail(dataset: Dataset, options: Options) -> Indices | None:
    if options.imbalance is None:
        return None
    splits = make_splits(
        dataset,
        imbalance=options.imbalance,
        profile=options.imbalance_profile,
        largest=options.largest,
        held_out=0,
        seed=options.split_seed,
    )
    return splits.train_indices


def _describe(dataset: Dataset, rows: Indices | None, options: Options) -> dict[str, Any]:
    """Return what dataset.json says beside what the files hold."""
    longtail: dict[str, Any] | None = None
    if rows is not None:
        flags = ("imbalance", "imbalance_profile", "largest", "split", "split_seed")
        longtail = {flag: getattr(options, flag) for flag in flags}
        longtail["counts"] = np.bincount(dataset.train.labels[rows]).tolist()
    return {
        "source": dataset.name,
        "class_names": list(dataset.class_names),
        "field": options.field,
        "quality": options.quality if options.field == "jpg" else None,
        "longtail": longtail,
    }


def write_npz(
    file: Path,
    parts: dict[str, ImageSet],
    class_names: tuple[str, ...],
    progress: Progress = lambda: None,
) -> None:
    """Write x_train, y_train, x_test, y_test and class_names, images one after another.

    Equal data gives equal bytes. Raises DataError naming all images that cannot be decoded.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for part, image_set in parts.items():
            damaged: dict[int, str] = {}
            header = {"descr": "|u1", "fortran_order": False, "shape": image_set.images.shape}
            with archive.open(f"x_{part}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for at, image in enumerate(decode_all(image_set.images)):
                    progress()
                    if isinstance(image, str):
                        damaged[at] = image
                    else:
                        member.write(image.tobytes())
            refuse_or_note(damaged, len(image_set), skip_bad=False)
            _add(archive, f"y_{part}", image_set.labels)
        _add(archive, "class_names", np.array(class_names))


def _add(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _refuse_to_replace(target: Path, force: bool) -> None:
    is_npz = target.suffix == ".npz"
    if not target.exists():
        return
    if target.is_dir() == is_npz:
        raise DataError(f"--to {target}: is a {'folder' if is_npz else 'file'}; name another place")
    names = [] if is_npz else [file.name for file in target.iterdir()]
    others = sorted(set(names) - set(beton_folder.FILES))
    if others:
        raise DataError(f"--to {target}: holds {others[0]}, no conversion; name another folder")
    if (is_npz or names) and not force:
        raise DataError(f"--to {target}: is there already; replace it with --force")


def check(
    place: Path,
    parts: dict[str, ImageSet],
    quality: int | None = None,
    progress: Progress = lambda: None,
) -> float:
    """Read a conversion again and compare every label and pixel with the source.

    quality: of JPEG, whose pixels must be those of the source after the same encoding. Returns the
    peak signal-to-noise ratio in dB, infinite where nothing is lost. Raises DataError.
    """
    npz = formats.read_npz(place).arrays if place.is_file() else None
    squares = pixels = 0
    for at, (part, image_set) in enumerate(parts.items()):
        if npz is not None:
            file, images, labels = place, npz[2 * at], npz[2 * at + 1]
        else:
            file = place / f"{part}.beton"
            beton = read_beton(file)
            images, labels = beton.images, beton.labels
        if not np.array_equal(labels, image_set.labels):
            raise DataError(f"{file}: labels differ from the source; convert again")
        pairs = zip(decode_all(image_set.images), decode_all(images), strict=True)
        for position, (source, found) in enumerate(pairs):
            progress()
            if isinstance(source, str) or isinstance(found, str):
                raise DataError(source if isinstance(source, str) else str(found))
            wanted = source if quality is None else _recoded(source, quality)
            if not np.array_equal(wanted, found):
                raise DataError(f"{file}: image {position} differs from the source; convert again")
            squares += int(np.square(found.astype(np.int64) - source).sum())
            pixels += source.size
    return 10 * math.log10(255**2 * pixels / squares) if squares else math.inf


def _recoded(image: Bytes, quality: int) -> Bytes:
    from ffcv.fields.rgb_image import encode_jpeg
    from PIL import Image

    with Image.open(io.BytesIO(encode_jpeg(image, quality).tobytes())) as decoded:
        return np.asarray(decoded)


def _bar(what: str, total: int) -> Any:
    return tqdm(desc=what, total=total, unit=" images", leave=False, disable=None)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
