"""Downloads, from a server on this machine: whole, resumed, broken off, wrong, and not at all."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_sources import idx_bytes

from reat_fast.data import load_dataset
from reat_fast.sources import download, formats
from reat_fast.sources.download import Remote
from reat_fast.sources.formats import DataError

CONTENT = np.random.default_rng(0).bytes(1_000_003)


@dataclass
class Site:
    """A web site: its files, its faults, and what it was asked for (path and Range)."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    break_after: int | None = None
    """Bytes of a body after which the connection is cut; None never cuts it."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            content = site.files.get(self.path)
            if content is None:
                return self.send_error(404)
            start = 0
            if wanted and site.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = len(content) if site.break_after is None else start + site.break_after
            self.wfile.write(content[start:end])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def remote(site: Site, *paths: str) -> Remote:
    urls = tuple(site.url + path for path in paths)
    return Remote("set.bin", urls, hashlib.md5(CONTENT).hexdigest())


def test_a_file_comes_whole_and_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    site.files["/set"] = CONTENT
    for _ in range(2):
        path = download.download(remote(site, "/set"), tmp_path)
        assert path == tmp_path / "set.bin" and path.read_bytes() == CONTENT
    assert site.asked == [("/set", None)]
    assert os.listdir(tmp_path) == ["set.bin"]


def test_a_wrong_file_under_the_final_name_is_replaced(site: Site, tmp_path: Path) -> None:
    site.files["/set"] = CONTENT
    (tmp_path / "set.bin").write_bytes(CONTENT[:-1])
    assert download.download(remote(site, "/set"), tmp_path).read_bytes() == CONTENT


def test_a_broken_transfer_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.files["/set"], site.break_after = CONTENT, 400_000
    assert download.download(remote(site, "/set"), tmp_path).read_bytes() == CONTENT
    assert site.asked == [("/set", None), ("/set", "bytes=400000-"), ("/set", "bytes=800000-")]


def test_a_transfer_that_keeps_breaking_says_how_far_it_came(site: Site, tmp_path: Path) -> None:
    site.files["/set"], site.break_after = CONTENT, 100_000
    with pytest.raises(DataError, match=r"broke off at 400000 of 1000003 bytes; run it again"):
        download.download(remote(site, "/set"), tmp_path)
    assert os.listdir(tmp_path) == ["set.bin.part"]
    site.break_after = None
    assert download.download(remote(site, "/set"), tmp_path).read_bytes() == CONTENT
    assert site.asked[-1] == ("/set", "bytes=400000-")


def test_a_server_that_sends_nothing_is_not_asked_for_ever(site: Site, tmp_path: Path) -> None:
    site.files["/set"], site.break_after = CONTENT, 0
    with pytest.raises(DataError, match="broke off at 0 of 1000003"):
        download.download(remote(site, "/set"), tmp_path)
    assert len(site.asked) == 1


def test_a_server_without_ranges_sends_the_file_anew(site: Site, tmp_path: Path) -> None:
    site.files["/set"], site.ranges = CONTENT, False
    (tmp_path / "set.bin.part").write_bytes(CONTENT[:1000])
    assert download.download(remote(site, "/set"), tmp_path).read_bytes() == CONTENT
    assert site.asked == [("/set", "bytes=1000-")]


def test_a_whole_part_is_taken_and_a_too_long_one_dropped(site: Site, tmp_path: Path) -> None:
    site.files["/set"] = CONTENT
    part = tmp_path / "set.bin.part"
    part.write_bytes(CONTENT)
    assert download.download(remote(site, "/set"), tmp_path).read_bytes() == CONTENT
    (tmp_path / "set.bin").unlink()
    part.write_bytes(CONTENT + b"more")
    assert download.download(remote(site, "/set"), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["bytes=1000003-", "bytes=1000007-", None]


def test_a_wrong_checksum_deletes_the_part_and_the_next_address_is_tried(
    site: Site, tmp_path: Path
) -> None:
    site.files |= {"/other": CONTENT[::-1], "/page": b"\n<!doctype html>please log in"}
    with pytest.raises(DataError) as caught:
        download.download(remote(site, "/other", "/page", "/none"), tmp_path)
    assert str(caught.value) == (
        f"{site.url}/other: wrong checksum, deleted; {site.url}/page: a web page came, deleted; "
        f"{site.url}/none: HTTP Error 404: Not Found"
    )
    assert not os.listdir(tmp_path)
    site.files["/set"] = CONTENT
    path = download.download(remote(site, "/other", "/page", "/set"), tmp_path)
    assert path.read_bytes() == CONTENT


def test_a_part_of_another_file_does_not_spoil_the_next_attempt(site: Site, tmp_path: Path) -> None:
    site.files["/set"] = CONTENT
    (tmp_path / "set.bin.part").write_bytes(b"of another file")
    assert download.download(remote(site, "/set", "/set"), tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in site.asked] == ["bytes=15-", None]


def test_a_silent_server_runs_into_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, answers nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/set"
        with pytest.raises(DataError, match="timed out"):
            download.download(Remote("set.bin", (url,), ""), tmp_path)


def test_no_progress_is_shown_off_a_terminal(
    site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site.files["/set"] = CONTENT
    download.download(remote(site, "/set"), tmp_path)
    assert capfd.readouterr() == ("", "")


# Whole data sets


@pytest.fixture
def fashion(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Put a made Fashion-MNIST of 20 + 10 images on the site, hide apt-get, return the files."""
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (20, 28, 28), np.uint8),
        np.arange(20, dtype=np.uint8) % 10,
        random.integers(0, 256, (10, 28, 28), np.uint8),
        np.arange(10, dtype=np.uint8),
    ]
    files = {name: idx_bytes(array) for name, array in zip(formats.IDX_FILES, arrays, strict=True)}
    site.files = {f"/{name}.gz": gzip.compress(content) for name, content in files.items()}
    remotes = tuple(
        Remote(f"{name}.gz", (f"{site.url}/{name}.gz",), hashlib.sha256(content).hexdigest(), True)
        for name, content in files.items()
    )
    monkeypatch.setitem(download.REMOTES, "fashion-mnist", remotes)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return files


def test_fashion_mnist_comes_from_a_mirror_and_loads(
    site: Site, fashion: dict[str, bytes], tmp_path: Path
) -> None:
    for _ in range(2):
        place = download.fetch_dataset("fashion-mnist", tmp_path / "new" / "cache")
        assert place == tmp_path / "new" / "cache" / "fashion-mnist"
    assert len(site.asked) == 4
    dataset = load_dataset("fashion-mnist", place)
    assert dataset.train.images.shape == (20, 28, 28, 1)
    assert idx_bytes(dataset.test.images[..., 0]) == fashion["t10k-images-idx3-ubyte"]
    (place / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"damaged"))
    download.fetch_dataset("fashion-mnist", tmp_path / "new" / "cache")
    assert len(site.asked) == 5


def test_cifar_comes_as_one_archive(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site.files["/set"] = CONTENT
    monkeypatch.setitem(download.REMOTES, "cifar10", (remote(site, "/set"),))
    assert download.fetch_dataset("cifar10", tmp_path).read_bytes() == CONTENT


def test_without_network_one_line_says_what_was_tried_and_how_to_do_it_by_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nowhere = ("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")
    for name, remotes in download.REMOTES.items():
        closed = tuple(Remote(item.name, nowhere, item.digest, item.unpacked) for item in remotes)
        monkeypatch.setitem(download.REMOTES, name, closed)
        with pytest.raises(DataError) as caught:
            download.fetch_dataset(name, tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{name} could not be fetched: {nowhere[0]}: ")
        assert nowhere[1] in message and "Connection refused" in message and "\n" not in message
        files = ", ".join(item.name for item in remotes)
        target = tmp_path / name if len(remotes) > 1 else tmp_path
        assert f"by hand: put {files} into {target}, or" in message and "--data PATH" in message


def test_a_folder_that_cannot_be_made_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cifar10 could not be fetched: .*Not a directory"):
        download.fetch_dataset("cifar10", tmp_path / "file" / "cache")


# Debian's package, with stand-ins for apt-get and dpkg


def program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\nimport os, pathlib, sys\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


APT_GET = """
log = pathlib.Path({log!r})
log.write_text(log.read_text() + sys.argv[-1] + "\\n" if log.exists() else sys.argv[-1] + "\\n")
print("Get:1 chatter"); print("W: chatter", file=sys.stderr)
if "update" in sys.argv:
    sys.exit(pathlib.Path({lists!r}).touch())
if not pathlib.Path({lists!r}).exists():
    sys.exit("E: Unable to locate package dataset-fashion-mnist")
pathlib.Path("dataset-fashion-mnist_1_all.deb").write_bytes(b"")
"""
DPKG = """
assert sys.argv[1] == "-x" and sys.argv[2].endswith(".deb") and os.path.isfile(sys.argv[2])
target = pathlib.Path(sys.argv[3], "usr/share/datasets/fashion-mnist")
target.mkdir(parents=True)
for file in pathlib.Path({package!r}).iterdir():
    (target / file.name).write_bytes(file.read_bytes())
"""


@dataclass
class Debian:
    log: Path
    lists: Path
    package: Path

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().split()


@pytest.fixture
def debian(fashion: dict[str, bytes], tmp_path: Path) -> Debian:
    debian = Debian(tmp_path / "log", tmp_path / "lists", tmp_path / "package")
    debian.package.mkdir()
    for name, content in fashion.items():
        (debian.package / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    texts = {key: str(value) for key, value in vars(debian).items()}
    program(tmp_path / "bin" / "apt-get", APT_GET.format(**texts))
    program(tmp_path / "bin" / "dpkg", DPKG.format(**texts))
    return debian


@pytest.mark.parametrize("relative", [False, True])
def test_debians_package_is_taken_first_and_in_silence(
    relative: bool,
    site: Site,
    debian: Debian,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    debian.lists.touch()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cache = Path("cache") if relative else tmp_path / "cache"
        place = download.fetch_dataset("fashion-mnist", cache)
    assert debian.asked == ["dataset-fashion-mnist"] and not site.asked
    assert sorted(os.listdir(place)) == sorted(f"{name}.gz" for name in formats.IDX_FILES)
    assert len(load_dataset("fashion-mnist", place).train) == 20
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("user", [0, 1000])
def test_only_root_renews_empty_package_lists_and_once(
    site: Site, debian: Debian, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, user: int
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    download.fetch_dataset("fashion-mnist", tmp_path / "cache")
    if user == 0:
        assert debian.asked == ["dataset-fashion-mnist", "update", "dataset-fashion-mnist"]
        assert not site.asked
    else:
        assert debian.asked == ["dataset-fashion-mnist"]
        assert len(site.asked) == 4


def test_a_file_of_the_package_that_is_wrong_comes_from_a_mirror(
    site: Site, debian: Debian, tmp_path: Path
) -> None:
    debian.lists.touch()
    (debian.package / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"other"))
    mirrored = site.files.pop("/train-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match="404"):
        download.fetch_dataset("fashion-mnist", tmp_path / "cache")
    kept = os.listdir(tmp_path / "cache" / "fashion-mnist")
    assert len(kept) == 3 and "train-labels-idx1-ubyte.gz" not in kept
    site.files["/train-labels-idx1-ubyte.gz"] = mirrored
    place = download.fetch_dataset("fashion-mnist", tmp_path / "cache")
    assert {path for path, _ in site.asked} == {"/train-labels-idx1-ubyte.gz"}
    assert len(load_dataset("fashion-mnist", place).test) == 10


def test_what_apt_get_said_last_is_told_if_all_fails(
    site: Site, debian: Debian, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    site.files.clear()
    with pytest.raises(DataError) as caught:
        download.fetch_dataset("fashion-mnist", tmp_path / "cache")
    said = "apt-get: E: Unable to locate package dataset-fashion-mnist; http://127.0.0.1"
    assert said in str(caught.value) and "chatter" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_named_set_has_its_classes_addresses_and_checksums() -> None:
    assert download.REMOTES.keys() == download.CLASS_NAMES.keys() == download.FILES.keys()
    sizes = {name: len(set(classes)) for name, classes in download.CLASS_NAMES.items()}
    assert sizes == {"cifar10": 10, "cifar100": 100, "fashion-mnist": 10}
    assert list(download.CLASS_NAMES["cifar100"]) == sorted(download.CLASS_NAMES["cifar100"])
    for item in (item for remotes in download.REMOTES.values() for item in remotes):
        assert re.fullmatch("[0-9a-f]{64}" if item.unpacked else "[0-9a-f]{32}", item.digest)
        assert item.urls and all(
            url.startswith("https://") and url.endswith(f"/{item.name}") for url in item.urls
        )
