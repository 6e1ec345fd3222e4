from __future__ import annotations

import errno
import hashlib
import io
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from surestep import UserError, data
from surestep.data import cifar, download
from surestep.data.download import Archive


def make_archive(folder: Path, members: dict[str, bytes], name: str = "set") -> Archive:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return Archive(path.as_uri(), md5, name)


@pytest.fixture
def archive(tmp_path) -> Archive:
    return make_archive(tmp_path / "web", {"set/a.bin": b"abc"})


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"


def test_an_archive_is_fetched_checked_and_unpacked(archive, root):
    folder = download.fetch((archive,), root)
    assert folder == root / "set"
    assert (folder / "a.bin").read_bytes() == b"abc"
    assert [p.name for p in root.iterdir()] == ["set"]  # nothing temporary is left


def test_an_archive_put_there_by_hand_is_used_and_kept(archive, root, tmp_path):
    root.mkdir()
    hand = make_archive(root, {"second/b": b""}, "second")
    folder = download.fetch((replace(archive, url="http://127.0.0.1:1/none.tar.gz"), hand), root)
    assert folder == root / "second"
    assert (root / "second.tar.gz").exists()


def test_what_another_process_unpacked_meanwhile_is_taken(archive, root):
    download.fetch((archive,), root)
    gone = replace(archive, url="http://127.0.0.1:1/none.tar.gz")
    assert (download.fetch((gone,), root) / "a.bin").read_bytes() == b"abc"


def test_two_at_a_time_fetch_once(archive, root, monkeypatch):
    began = []
    stream = download._stream

    def slow(*args):
        began.append(1)
        time.sleep(0.3)
        return stream(*args)

    monkeypatch.setattr(download, "_stream", slow)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: download.fetch((archive,), root), range(2)))
    assert folders == [root / "set"] * 2
    assert began == [1]
    assert [p.name for p in root.iterdir()] == ["set"]


def check_failure(refused, archive: Archive, root: Path, *words: str) -> None:
    refused(lambda: download.fetch((archive,), root), archive.file, str(root), "by hand", *words)
    assert not (root / archive.folder).exists()
    assert not list(root.glob(".*"))


def test_a_wrong_checksum(refused, archive, root):
    check_failure(refused, replace(archive, md5="0" * 32), root, "expected 000", "damaged")
    assert not list(root.iterdir())


def test_a_wrong_checksum_of_a_file_put_there(refused, archive, root):
    root.mkdir()
    (root / archive.file).write_bytes(b"nonsense")
    check_failure(refused, archive, root, "damaged")
    assert (root / archive.file).exists()  # the user's file is the user's


def test_no_network(refused, archive, root):
    for url in ("http://127.0.0.1:1/set.tar.gz", "file:///nowhere/set.tar.gz"):
        check_failure(refused, replace(archive, url=url), root, "no connection to", url)


class Handler(BaseHTTPRequestHandler):
    def __init__(self, *args, status: int, body: bytes, length: int):
        self.status, self.body, self.length = status, body, length
        super().__init__(*args)

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.length))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format, *args):
        pass


@pytest.mark.parametrize(
    ("status", "body", "length", "words"),
    [
        (200, b"<!DOCTYPE html>", 15, ["a web page instead"]),
        (200, b"quota", 5, ["something else instead"]),
        (404, b"", 0, ["answered 404"]),
        (200, b"\x1f\x8b123", 5000, ["stopped after 5 of 5000"]),
        (200, b"", 0, ["damaged"]),
    ],
)
def test_what_a_server_can_do_wrong(refused, archive, root, status, body, length, words):
    handler = partial(Handler, status=status, body=body, length=length)
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/set.tar.gz"
        check_failure(refused, replace(archive, url=url), root, *words)
        thread.join()


def test_a_full_disk(refused, archive, root, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_stream", full)
    check_failure(refused, archive, root, "full")


@pytest.mark.parametrize(
    ("members", "words"),
    [({"../evil": b"x", "set/a": b""}, ["unpacked"]), ({"other/a": b""}, ["does not hold"])],
)
def test_odd_archives(refused, tmp_path, root, members, words):
    check_failure(refused, make_archive(tmp_path / "web", members), root, *words)
    assert not (tmp_path / "evil").exists()


def test_a_root_that_is_a_file(refused, archive, tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: download.fetch((archive,), tmp_path / "file"), "by hand")


def test_cifar_is_downloaded_where_it_is_missing(tmp_path, root, monkeypatch):
    record = np.zeros((5, 3073), np.uint8).tobytes()
    folder = "cifar-10-batches-bin"
    archive = make_archive(
        tmp_path / "web", {f"{folder}/{n}.bin": record for n in ("data_batch_1", "test_batch")},
        folder,
    )  # fmt: skip
    dataset = cifar._DATASETS["cifar10"]
    form = replace(dataset.formats[0], archive=archive)
    monkeypatch.setitem(cifar._DATASETS, "cifar10", replace(dataset, formats=(form,)))
    monkeypatch.setenv("SURESTEP_DATA", str(root))
    assert download.default_root() == root
    assert len(data.load("cifar10")) == 4
    (tmp_path / "web" / archive.file).unlink()  # the second time, nothing is fetched
    assert len(data.load("cifar10", "test")) == 5


def test_the_default_place(monkeypatch):
    monkeypatch.delenv("SURESTEP_DATA", raising=False)
    assert download.default_root() == Path.home() / ".cache" / "surestep"
    monkeypatch.setenv("SURESTEP_DATA", "~nobody-of-that-name/data")
    with pytest.raises(UserError, match="set SURESTEP_DATA to a folder, or give --data"):
        download.default_root()
