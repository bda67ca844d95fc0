"""Sets of image files: class folders, lists of paths with labels, and Tiny-ImageNet's layout.

With an image size they are lazy: the files are decoded when they are read. Class folders of equal
images may do without and are then held in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reat_fast.cli.terminal import counted, one_line, some
from reat_fast.sources.formats import PARTS, Array, DataError, Source, reading
from reat_fast.sources.lazy import FileImages, decoding, find_damaged, require_pillow

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
NAMED = 10  # files that a message names at most
NO_SIZE = (
    "dataset list needs --image-size N, the pixels a side that images are resized and cut to, 224 "
    "for ImageNet-LT"
)


def read_image_folder(path: Path, size: int | None = None, skip_bad: bool = False) -> Source:
    """Read train/CLASS/* of SUFFIXES and test/CLASS/...; needs pillow.

    Classes are the sorted folder names of train/. Without a size the images, which must be equally
    large, are read at once: RGB, or grey where all of them are. Raises DataError.
    """
    train, test = _class_files(path / "train"), _class_files(path / "test")
    class_names = sorted({file.parent.name for file in train})
    for file in test:
        if file.parent.name not in class_names:
            raise DataError(f"{file.parent}: there is no such class in {path / 'train'}; add it")
    classes = {name: label for label, name in enumerate(class_names)}
    parts = [(files, [classes[file.parent.name] for file in files]) for files in (train, test)]
    if size is not None:
        return _lazy(path, parts, size, skip_bad, tuple(class_names))
    images, damaged = _decode(train + test)
    notes = refuse_or_note(damaged, len(train + test), skip_bad)
    labels = np.array(parts[0][1] + parts[1][1], np.int64)
    arrays = []
    for files in (range(len(train)), range(len(train), len(labels))):
        whole = [at for at in files if at in images]
        pixels = np.stack([images[at] for at in whole]) if whole else np.empty((0, 0, 0), np.uint8)
        arrays += [pixels, labels[whole]]
    return Source(arrays, _names(path), tuple(class_names), notes)


def read_lists(path: Path, size: int | None, skip_bad: bool = False) -> Source:
    """Read train.txt and test.txt of a folder, as ImageNet-LT and Places-LT are given.

    A line is `path label`; paths are relative to the folder, or to ROOT where the first line of a
    list is `# root: ROOT`. Also found: one *_train.txt and one *_test.txt or *_val.txt. Lazy; needs
    pillow. Raises DataError.
    """
    if size is None:
        raise DataError(NO_SIZE)
    lists = [_find_list(path, ["train"]), _find_list(path, ["test", "val"])]
    parts = [_parse_list(file) for file in lists]
    return _lazy(path, parts, size, skip_bad, None, [str(file) for file in lists])


def read_tiny_imagenet(path: Path, size: int | None = None, skip_bad: bool = False) -> Source:
    """Read train/WNID/images/*.JPEG and, as the test set, val/images with val_annotations.txt.

    Classes are the lines of wnids.txt, sorted, named by words.txt where it is there. Lazy; size is
    64 unless given; needs pillow. Raises DataError.
    """
    wnids = sorted(_lines(path / "wnids.txt"))
    classes = {wnid: label for label, wnid in enumerate(wnids)}
    files, labels = [], []
    for wnid, label in classes.items():
        found = _image_files(path / "train" / wnid / "images")
        files += found
        labels += [label] * len(found)
    annotations = path / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in _lines(annotations)]
    wrong = [at for at, row in enumerate(rows, 1) if len(row) < 2 or row[1] not in classes]
    _refuse_lines(annotations, wrong, "`file<TAB>wnid`, the wnid being one of wnids.txt")
    val = [path / "val" / "images" / row[0] for row in rows]
    _refuse_missing(annotations, val, path / "val" / "images")
    parts = [(files, labels), (val, [classes[row[1]] for row in rows])]
    words = path / "words.txt"
    listed = [line.partition("\t") for line in _lines(words)] if words.is_file() else []
    titles = {wnid: title.split(",")[0] for wnid, _, title in listed}
    class_names = tuple(titles.get(wnid, wnid) for wnid in wnids)
    return _lazy(path, parts, 64 if size is None else size, skip_bad, class_names)


READERS: dict[str, Callable[[Path, int | None, bool], Source]] = {
    "folder": read_image_folder,
    "list": read_lists,
    "tiny-imagenet": read_tiny_imagenet,
}


def refuse_or_note(damaged: dict[int, str], total: int, skip_bad: bool) -> tuple[str, ...]:
    """Raise DataError naming images that cannot be decoded or, with skip_bad, return a note.

    damaged: position -> reason, as `lazy.find_damaged` gives it.
    """
    if not damaged:
        return ()
    reasons = list(damaged.values())
    shown = some([reason.rpartition("; ")[0] or reason for reason in reasons], NAMED)
    if skip_bad:
        note = f"left out {len(damaged)} of {total} images that cannot be decoded: {shown}"
        return (one_line(note),)
    if len(damaged) == 1:
        raise DataError(reasons[0])
    cure = "replace them, or leave them out with --skip-bad"
    raise DataError(f"{len(damaged)} of {total} images cannot be decoded: {shown}; {cure}")


def _lazy(
    path: Path,
    parts: Sequence[tuple[list[Path], list[int]]],
    size: int,
    skip_bad: bool,
    class_names: tuple[str, ...] | None,
    names: Sequence[str] = (),
) -> Source:
    """Make a source of the files and labels for training and testing; only skip_bad decodes."""
    arrays: list[object] = []
    notes: tuple[str, ...] = ()
    for files, listed in parts:
        images, labels = FileImages(files, size), np.array(listed, np.int64)
        damaged = find_damaged(images) if skip_bad else {}
        if damaged:
            notes += refuse_or_note(damaged, len(images), skip_bad)
            whole = np.setdiff1d(np.arange(len(images)), list(damaged))
            images, labels = images.take(whole), labels[whole]
        arrays += [images, labels]
    named = [name for name in names for _ in range(2)] or _names(path)
    return Source(arrays, named, class_names, notes)


def _names(path: Path) -> list[str]:
    return [f"{path} ({part})" for part in PARTS]


def _class_files(folder: Path) -> list[Path]:
    cure = "make it train/CLASS/*.png and test/CLASS/*.png"
    if folder.name == "test" and (folder.parent / "val").is_dir():
        cure = "rename val to test, if that is what runs are to be tested on"
    with reading(folder, cure):
        entries = [entry for entry in sorted(folder.iterdir()) if entry.name[0] != "."]
    files = [file for entry in entries if entry.is_dir() for file in _image_files(entry)]
    if not files:
        raise DataError(f"{folder}: no class folders inside; put images into {folder}/CLASS/")
    return files


def _image_files(folder: Path) -> list[Path]:
    with reading(folder, "add it, with the images of its class"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    shown = [entry for entry in entries if entry.name[0] != "."]
    for entry in shown:
        if entry.is_dir() and _holds_images(entry.path):
            cure = "move them into the folder of their class, or take it away"
            raise DataError(f"{entry.path}: holds images, deeper than train/CLASS/*.png; {cure}")
    entries = [entry for entry in shown if entry.name.lower().endswith(SUFFIXES)]
    if not entries:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} inside; add some or remove it")
    if lost := [entry.name for entry in entries if not entry.is_file()]:
        raise DataError(
            f"{folder}: {some(lost, NAMED)} leads to no file; put it there or remove the name"
        )
    return [folder / entry.name for entry in entries]


def _holds_images(folder: str) -> bool:
    names = (name for _, _, names in os.walk(folder) for name in names if name[0] != ".")
    return any(name.lower().endswith(SUFFIXES) for name in names)


def _decode(files: list[Path]) -> tuple[dict[int, Array], dict[int, str]]:
    """Return the images, [H, W] where all are grey, else [H, W, 3], and why others are damaged."""
    require_pillow()
    decoded: dict[int, Array] = {}
    damaged: dict[int, str] = {}
    for at, file in enumerate(files):
        try:
            with decoding(file) as image:
                decoded[at] = np.asarray(image if image.mode == "L" else image.convert("RGB"))
        except DataError as error:
            damaged[at] = str(error)
            continue
        first, pixels = next(iter(decoded)), decoded[at]
        if pixels.shape[:2] != decoded[first].shape[:2]:
            sizes = "{1}x{0} pixels, but {3}x{2}".format(*pixels.shape[:2], *decoded[first].shape)
            cure = "give --image-size N to resize them"
            raise DataError(f"{file}: {sizes} in {files[first]}; all must be equal, {cure}")
    if any(pixels.ndim == 3 for pixels in decoded.values()):
        grey = [at for at, pixels in decoded.items() if pixels.ndim == 2]
        decoded |= {at: np.dstack([decoded[at]] * 3) for at in grey}
    return decoded, damaged


def _find_list(folder: Path, parts: list[str]) -> Path:
    for part in parts:
        plain = folder / f"{part}.txt"
        found = [plain] if plain.is_file() else sorted(folder.glob(f"*_{part}.txt"))
        if len(found) > 1:
            raise DataError(
                f"{folder}: {some(found, NAMED)} are all lists; leave one, or name it {plain}"
            )
        if found:
            return found[0]
    names = " or ".join(f"{part}.txt or *_{part}.txt" for part in parts)
    raise DataError(f"{folder}: no {names} inside; add it, each line `path label`")


def _parse_list(file: Path) -> tuple[list[Path], list[int]]:
    lines = _lines(file)
    header = re.fullmatch(r"#\s*root:\s*(.+)", lines[0]) if lines else None
    root = file.parent / header[1].strip() if header else file.parent
    first = 1 if header else 0
    if not lines[first:]:
        raise DataError(f"{file}: lists no image; write lines `path label` into it")
    rows = [re.fullmatch(r"(.*\S)\s+(\d{1,9})", line) for line in lines]
    wrong = [at for at, row in enumerate(rows[first:], first + 1) if row is None]
    _refuse_lines(file, wrong, "`path label`, the label a number from 0")
    matches = [row for row in rows[first:] if row is not None]
    paths = [root / row[1] for row in matches]
    _refuse_missing(file, paths, root)
    return paths, [int(row[2]) for row in matches]


def _lines(file: Path) -> list[str]:
    """Return the lines of a text file, stripped, without the empty ones at its end."""
    with reading(file, "add it, or write it again as text in UTF-8"):
        return [line.strip() for line in file.read_text("utf-8-sig").rstrip().splitlines()]


def _refuse_lines(file: Path, wrong: list[int], wanted: str) -> None:
    if wrong:
        numbers = some(wrong, NAMED)
        found = counted(len(wrong), "line")
        raise DataError(f"{file}: {found} not of the form {wanted} (line {numbers}); mend that")


def _refuse_missing(file: Path, paths: list[Path], root: Path) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        shown = [path.relative_to(root) if root in path.parents else path for path in missing]
        count = f"{len(missing)} of {len(paths)} images are not there"
        raise DataError(
            f"{file}: {count} (under {root}: {some(shown, NAMED)}); put them there or mend the list"
        )
