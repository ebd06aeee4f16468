"""Downloads from a real server on this machine: resumed, checked, unpacked whole or not at all."""

import base64
import hashlib
import io
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import layouts

from cts_fast.data import DamagedFile, MissingData, Storage, download, load_suite
from cts_fast.data.download import Archive, fetch, obtain, unpack
from cts_fast.data.paper import suite as paper

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes


class Server(ThreadingHTTPServer):
    """Serves `files`; how, say its attributes. `asked` holds the Range of every request."""

    daemon_threads = True
    ranges = True  # answers them
    cut_after = None  # bytes after which the first answers end
    cuts = 0  # how many still do
    shifts = 0  # how many answers to a Range still begin elsewhere
    hides_sizes = False  # tells with a Range neither where it begins nor how long the file is
    ends_at = None  # says of a Range that the file has so many bytes
    failing = 0  # answers with 503 before the first good one
    tells_md5 = None
    length = None  # its Content-Length, if not the true one

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {"/file.bin": CONTENT}, []

    def url(self, name="file.bin"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        content = server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        if server.failing:
            server.failing -= 1
            return self.send_error(503)
        if wanted and server.ends_at:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{server.ends_at}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            if not server.hides_sizes:
                self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if start and server.shifts:
            server.shifts -= 1
            start += 1
        self.send_response(206 if start else 200)
        if start and not server.hides_sizes:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", server.length or str(len(content) - start))
        if server.tells_md5:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={base64.b64encode(bytes.fromhex(server.tells_md5)).decode()}")
        self.end_headers()
        body = content[start:]
        if server.cuts:
            server.cuts -= 1
            body = body[: server.cut_after]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def md5(content=CONTENT):
    return hashlib.md5(content).hexdigest()


def test_a_file_arrives_whole_and_leaves_no_part(server, tmp_path):
    fetch(server.url(), tmp_path / "file.bin", md5())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"] and server.asked == [None]


def test_a_cut_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.cut_after, server.cuts = 300_000, 3
    fetch(server.url(), tmp_path / "file.bin", md5())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_part_of_an_earlier_run_is_gone_on_with(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    fetch(server.url(), tmp_path / "file.bin", md5())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and server.asked == ["bytes=1000-"]
    (tmp_path / "file.bin").rename(tmp_path / "again.bin.part")  # all was there before
    fetch(server.url(), tmp_path / "again.bin", md5())
    assert (tmp_path / "again.bin").read_bytes() == CONTENT
    (tmp_path / "more.bin.part").write_bytes(CONTENT + b"more")  # longer than the file
    fetch(server.url(), tmp_path / "more.bin", md5())
    assert (tmp_path / "more.bin").read_bytes() == CONTENT


def test_a_server_that_ignores_range_is_read_from_the_start(server, tmp_path):
    server.ranges, server.cut_after, server.cuts = False, 300_000, 1
    fetch(server.url(), tmp_path / "file.bin", md5())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and server.asked == [None, "bytes=300000-"]


def test_an_answer_that_begins_elsewhere_is_not_appended(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.shifts = 1
    fetch(server.url(), tmp_path / "file.bin", md5())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT and server.asked == ["bytes=1000-", None]


def test_a_server_that_never_gives_more_than_a_part_is_given_up(server, tmp_path):
    server.hides_sizes, server.cut_after, server.cuts = True, 30_000, 99
    with pytest.raises(OSError, match="file.bin cannot be fetched"):
        fetch(server.url(), tmp_path / "file.bin")
    assert len(server.asked) <= 2 * download.ATTEMPTS and not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize("length", ["many", "-1", "1_000"])
def test_a_length_that_is_no_number_is_told_and_nothing_taken_for_whole(server, tmp_path, length):
    server.length = length
    with pytest.raises(OSError, match=f"file.bin cannot be fetched .*Content-Length is '{length}'"):
        fetch(server.url(), tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()


def test_a_part_is_not_whole_because_the_server_says_so_later(server, tmp_path):
    server.cut_after, server.cuts, server.ends_at = 30_000, 99, 30_000
    with pytest.raises(OSError, match="file.bin cannot be fetched"):
        fetch(server.url(), tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()


def test_a_server_that_gives_nothing_is_named_and_the_part_kept(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.failing = 99
    with pytest.raises(OSError, match=r"file.bin cannot be fetched \(503.*part is kept: the same command"):
        fetch(server.url(), tmp_path / "file.bin", md5())
    assert len(server.asked) == download.ATTEMPTS
    server.failing = 2
    fetch(server.url(), tmp_path / "file.bin", md5())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_an_address_without_a_file_or_a_server_is_named(server, tmp_path):
    with pytest.raises(OSError, match=r"none.bin cannot be fetched \(404"):
        fetch(server.url("none.bin"), tmp_path / "x")
    assert len(server.asked) == 1
    with pytest.raises(OSError, match=r"127.0.0.1:9/x cannot be fetched \(.*refused"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x")


def test_a_wrong_md5_is_told_and_the_file_deleted(server, tmp_path):
    with pytest.raises(DamagedFile, match=f"arrived with md5 {md5()} where {'0' * 32} is expected: deleted"):
        fetch(server.url(), tmp_path / "file.bin", "0" * 32)
    assert not list(tmp_path.iterdir())
    server.tells_md5 = "1" * 32  # as the server itself says
    with pytest.raises(DamagedFile, match=f"where {'1' * 32} is expected"):
        fetch(server.url(), tmp_path / "file.bin")
    server.tells_md5 = md5()
    fetch(server.url(), tmp_path / "file.bin")


def packed(kind):
    """An archive of a folder "set" with two files."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("set/a.txt", "a")
            archive.writestr("set/deep/b.txt", "b")
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind != "tar" else "w") as archive:
            for name in ("set/a.txt", "set/deep/b.txt"):
                member = tarfile.TarInfo(name)
                member.size = 1
                archive.addfile(member, io.BytesIO(name[-5:-4].encode()))
    return buffer.getvalue()


@pytest.fixture(params=[True, False], ids=["filters", "none"])
def tar_filters(request, monkeypatch):
    """Older Pythons' tarfile has none."""
    if not request.param:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "tar.gz"])
def test_archives_are_unpacked_and_deleted(kind, tmp_path, tar_filters):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(packed(kind))
    unpack(path, tmp_path / "into")
    assert (tmp_path / "into/set/deep/b.txt").read_text() == "b" and not path.exists()
    assert [entry.name for entry in (tmp_path / "into").iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "link"])
def test_nothing_is_unpacked_outside_the_folder(name, tmp_path, tar_filters):
    path, member = tmp_path / "x.tar", tarfile.TarInfo(name)
    if name == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "../../out.txt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member)
    with pytest.raises(DamagedFile, match="x.tar cannot be unpacked"):
        unpack(path, tmp_path / "into")
    assert not list((tmp_path / "into").iterdir()) and not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "gz"])
def test_a_damaged_archive_is_named_and_leaves_nothing(kind, tmp_path):
    whole = packed(kind) if kind != "gz" else packed("tgz")
    path = tmp_path / f"x.{kind}"
    path.write_bytes(whole[: len(whole) - 30])
    with pytest.raises(DamagedFile, match=f"x.{kind} cannot be unpacked.*delete it"):
        unpack(path, tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


def test_what_is_there_is_never_replaced(server, tmp_path):
    server.files["/x.zip"] = packed("zip")
    archive = Archive(server.url("x.zip"), None, ".", ("set",))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "own.txt").write_text("own")
    obtain(archive, tmp_path)
    assert server.asked == []
    with pytest.raises(FileExistsError, match="set is there, but not whole: move it away"):
        obtain(Archive(server.url("x.zip"), None, ".", ("set/a.txt",)), tmp_path)
    assert (tmp_path / "set" / "own.txt").read_text() == "own"


def test_a_data_set_is_fetched_when_asked_and_what_is_there_of_it_is_kept(server, tmp_path, monkeypatch):
    import dataclasses

    layouts.fashion_mnist(tmp_path / "source")
    raw = tmp_path / "source/FashionMNIST/raw"
    archives = []
    for archive in paper.BY_NAME["fashion_mnist"].archives:
        server.files[f"/{archive.name}"] = content = layouts.gzipped(raw / archive.name.removesuffix(".gz"))
        archives.append(dataclasses.replace(archive, url=server.url(archive.name), md5=md5(content)))
    local = dataclasses.replace(paper.BY_NAME["fashion_mnist"], archives=tuple(archives), train=3, test=2)
    monkeypatch.setitem(paper.BY_NAME, "fashion_mnist", local)
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(MissingData, match="--download"):
        load_suite("paper", root, ["fashion_mnist"])
    assert server.asked == [] and not list(root.iterdir())  # nothing starts unasked
    task = load_suite("paper", root, ["fashion_mnist"], Storage(download=True))["fashion_mnist"]
    assert layouts.labels_of(task.train.images[:]) == [4, 0, 9] and len(server.asked) == 4
    assert sorted(path.name for path in (root / "FashionMNIST/raw").iterdir()) == sorted(p.name for p in raw.iterdir())
    gone = root / "FashionMNIST/raw/t10k-labels-idx1-ubyte"
    gone.unlink()
    load_suite("paper", root, ["fashion_mnist"], Storage(download=True))
    assert gone.exists() and len(server.asked) == 5
