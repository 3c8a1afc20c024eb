"""Released models: download against a local server, hashes, and archives that mean harm."""

import hashlib
import io
import os
import re
import stat
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from madry_compat import archives, releases
from madry_compat.archives import FetchError, unpack
from madry_compat.files import default_cache_dir
from madry_compat.releases import RELEASES, Release, fetch

NAME = "mnist/secret"


def zip_bytes(entries, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of (name or ZipInfo, data) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


# Does not compress, so that there is something to cut.
WEIGHTS = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(3000))
ARCHIVE = zip_bytes(
    [
        ("models/", b""),
        ("models/secret/checkpoint", b'model_checkpoint_path: "checkpoint-24900"'),
        ("models/secret/checkpoint-24900.index", b"index"),
        ("models/secret/checkpoint-24900.data-00000-of-00001", WEIGHTS),
        ("config.json", b"{}"),
    ]
)
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `body` and records each request's Range and If-Range."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = ARCHIVE
        self.etag: str | None = '"v1"'
        self.status: int | None = None
        self.ranges = True
        self.content_range: str | None = None
        self.cut_after: int | None = None
        self.requests: list[tuple[str | None, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/secret.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):  # noqa: N802 - the name is http.server's
        server = self.server
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.requests.append((asked, condition))
        body, start, status = server.body, 0, server.status or 200
        if asked and server.ranges and condition in (None, server.etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206 if start < len(body) else 416
        self.send_response(status)
        if status == 206:
            default = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.send_header("Content-Range", server.content_range or default)
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(body)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.cut_after])


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def get(server, cache, sha256=SHA256, **kwargs):
    return fetch(NAME, cache, releases={NAME: Release(server.url, sha256)}, **kwargs)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def begin_download(server, cache):
    """Leave a download that was cut; returns its file and the range that is asked for next."""
    server.cut_after = len(server.body) // 2
    with pytest.raises(FetchError, match="the download stopped at .* Fetch again to go on"):
        get(server, cache)
    server.cut_after = None
    server.requests.clear()
    part = cache / "mnist" / "secret.zip.part"
    begun = part.read_bytes()
    assert begun and server.body.startswith(begun)
    return part, f"bytes={len(begun)}-"


def test_the_releases_have_the_published_hashes():
    assert len(RELEASES) == 6
    assert {name for name, release in RELEASES.items() if release.sha256 is None} == {
        "cifar10/natural",
        "cifar10/adv_trained",
    }
    for release in RELEASES.values():
        assert release.url.startswith("https://")
        assert release.sha256 is None or re.fullmatch("[0-9a-f]{64}", release.sha256)


def test_a_download_is_verified_unpacked_and_kept(server, cache):
    bar = tqdm(file=io.StringIO())
    folder = get(server, cache, progress=bar)
    assert folder == cache / "mnist" / "secret" / "models" / "secret"
    assert (folder / "checkpoint-24900.data-00000-of-00001").read_bytes() == WEIGHTS
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE
    assert (bar.n, bar.total) == (len(ARCHIVE), len(ARCHIVE))
    assert files_below(cache / "mnist") == [
        "secret.zip",
        "secret/config.json",
        "secret/models/secret/checkpoint",
        "secret/models/secret/checkpoint-24900.data-00000-of-00001",
        "secret/models/secret/checkpoint-24900.index",
    ]
    assert server.requests == [(None, None)]

    assert get(server, cache) == folder
    assert len(server.requests) == 1


def test_an_archive_put_there_by_hand_needs_no_network(cache):
    archive = cache / "mnist" / "secret.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(ARCHIVE)
    releases = {NAME: Release("http://127.0.0.1:9/secret.zip", SHA256)}
    assert (fetch(NAME, cache, releases=releases) / "checkpoint").is_file()


def test_without_a_network_the_error_says_which_file_to_put_where(cache):
    url = "http://127.0.0.1:9/secret.zip"
    with pytest.raises(FetchError) as refused:
        fetch(NAME, cache, releases={NAME: Release(url, SHA256)})
    message = str(refused.value)
    assert f"put {url} at {cache / 'mnist' / 'secret.zip'}" in message
    assert "\n" not in message


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_cut_download_goes_on_where_it_stopped(server, cache, etag):
    server.etag = etag
    _, rest = begin_download(server, cache)
    folder = get(server, cache)
    assert server.requests == [(rest, etag)]
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE
    assert (folder / "checkpoint").is_file()
    assert not list(cache.rglob("*.part*"))


def test_a_download_that_was_complete_but_not_renamed(server, cache):
    part, _ = begin_download(server, cache)
    part.write_bytes(ARCHIVE)
    get(server, cache)
    assert server.requests[0] == (f"bytes={len(ARCHIVE)}-", '"v1"')
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, cache):
    _, rest = begin_download(server, cache)
    server.ranges = False
    get(server, cache)
    assert server.requests == [(rest, '"v1"')]
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE


def test_a_file_that_changed_on_the_server_is_read_from_the_start(server, cache):
    server.body = b"an older archive" * 10_000
    _, rest = begin_download(server, cache)
    server.body, server.etag = ARCHIVE, '"v2"'
    get(server, cache)
    assert server.requests == [(rest, '"v1"')]
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE


@pytest.mark.parametrize("wrong", ["bytes 0-999/96000", "bytes 1001-2000/9", "nonsense", "bytes 9"])
def test_a_wrong_content_range_starts_afresh(server, cache, wrong):
    _, rest = begin_download(server, cache)
    server.content_range = wrong
    get(server, cache)
    assert server.requests == [(rest, '"v1"'), (None, None)]
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE


def test_a_partial_file_longer_than_the_server_s_starts_afresh(server, cache):
    part, _ = begin_download(server, cache)
    part.write_bytes(b"x" * (len(ARCHIVE) + 1))
    get(server, cache)
    assert [asked for asked, _ in server.requests] == [f"bytes={len(ARCHIVE) + 1}-", None]
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE


def test_a_wrong_hash_is_put_aside_and_never_unpacked(server, cache):
    with pytest.raises(FetchError, match=f"sha256 {SHA256}, expected {'0' * 64}"):
        get(server, cache, sha256="0" * 64)
    assert files_below(cache) == ["mnist/secret.zip.rejected"]
    # The next call starts afresh.
    get(server, cache)
    assert server.requests == [(None, None), (None, None)]


def test_a_wrong_hash_of_an_archive_put_there_by_hand(cache):
    archive = cache / "mnist" / "secret.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"something else")
    releases = {NAME: Release("http://127.0.0.1:9/secret.zip", SHA256)}
    with pytest.raises(FetchError, match="moved to .*secret.zip.rejected"):
        fetch(NAME, cache, releases=releases)
    assert files_below(cache) == ["mnist/secret.zip.rejected"]


def test_an_unknown_hash_is_printed_as_unverified(server, cache, capsys):
    get(server, cache, sha256=None)
    printed = capsys.readouterr().out
    assert SHA256 in printed
    assert "unverified" in printed


@pytest.mark.parametrize("status", [404, 500, 204])
def test_a_server_that_has_no_archive(server, cache, status):
    server.status, server.body = status, b""
    with pytest.raises(FetchError, match=f"answered {status}, expected"):
        get(server, cache)


def test_a_server_that_is_busy_keeps_what_has_arrived(server, cache):
    part, rest = begin_download(server, cache)
    begun = part.read_bytes()
    server.status, server.ranges = 503, False
    with pytest.raises(FetchError, match="answered 503"):
        get(server, cache)
    assert part.read_bytes() == begun
    server.status, server.ranges = None, True
    get(server, cache)
    assert server.requests[-1] == (rest, '"v1"')
    assert (cache / "mnist" / "secret.zip").read_bytes() == ARCHIVE


def test_an_archive_over_the_size_bound_is_not_downloaded(server, cache, monkeypatch):
    monkeypatch.setattr(releases, "MAX_ARCHIVE_BYTES", len(ARCHIVE) - 1)
    with pytest.raises(FetchError, match=f"has {len(ARCHIVE)} bytes, allowed"):
        get(server, cache)
    assert not (cache / "mnist" / "secret.zip").exists()


def test_two_downloads_of_one_model_do_not_mix(server, cache):
    part, _ = begin_download(server, cache)
    with part.open("ab") as file:
        releases.fcntl.flock(file, releases.fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="written by another process"):
            get(server, cache)
    get(server, cache)


def test_only_the_web_is_fetched(cache, tmp_path):
    (tmp_path / "secret.zip").write_bytes(ARCHIVE)
    releases = {NAME: Release((tmp_path / "secret.zip").as_uri(), SHA256)}
    with pytest.raises(FetchError, match="No connection adapters"):
        fetch(NAME, cache, releases=releases)


def test_an_unknown_model_lists_the_options(cache):
    with pytest.raises(ValueError, match="'mnist/natural'.*got 'mnist/best'"):
        fetch("mnist/best", cache)


def test_a_changed_model_folder_is_not_passed_off_as_the_release(server, cache):
    folder = get(server, cache)
    (folder / "events.out").write_bytes(b"files beside the release's own are no change")
    assert get(server, cache) == folder
    (folder / "checkpoint-24900.index").write_bytes(b"INDEX")
    with pytest.raises(FetchError, match="differs from .*secret.zip"):
        get(server, cache)
    assert (folder / "checkpoint-24900.index").read_bytes() == b"INDEX"


def test_a_cache_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match="cache folder .* cannot be used"):
        get(server, tmp_path / "file")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGIT_REG_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LOGIT_REG_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "logit_reg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / ".cache" / "logit_reg"


def entry(name, mode=stat.S_IFREG | 0o644):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def nul_name() -> bytes:
    """An archive whose entry is named "evil", NUL, "x"; zipfile itself cannot write one."""
    return zip_bytes([("evil_x", b"")]).replace(b"evil_x", b"evil\0x")


def encrypted() -> bytes:
    data = bytearray(zip_bytes([("a", b"text")]))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    return bytes(data)


def lies_about_its_size() -> bytes:
    """2,000,000 zeros whose entry claims 2,000."""
    data = zip_bytes([("a", b"\0" * 2_000_000)])
    return data.replace(struct.pack("<I", 2_000_000), struct.pack("<I", 2_000))


HARMFUL = {
    "parent": (zip_bytes([("../evil", b"x")]), "leads outside"),
    "parent below": (zip_bytes([("a/../../evil", b"x")]), "leads outside"),
    "absolute": (zip_bytes([("/tmp/evil", b"x")]), "leads outside"),
    "drive": (zip_bytes([("C:evil", b"x")]), "leads outside"),
    "backslash": (zip_bytes([("..\\evil", b"x")]), "leads outside"),
    "empty part": (zip_bytes([("a//evil", b"x")]), "leads outside"),
    "control character": (zip_bytes([("a\x1b[2J", b"x")]), "not portable"),
    "nul": (nul_name(), "leads outside"),
    "symlink": (zip_bytes([(entry("evil", stat.S_IFLNK | 0o777), b"/etc")]), "is a link"),
    "device": (zip_bytes([(entry("evil", stat.S_IFCHR | 0o666), b"")]), "is a link or special"),
    "folder as file": (zip_bytes([(entry("evil", stat.S_IFDIR | 0o755), b"x")]), "is a link or"),
    "below a file": (zip_bytes([("a", b"x"), ("a/evil", b"x")]), "lies below a file"),
    "ratio": (zip_bytes([("a", b"\0" * 20_000_000)]), "a zip bomb"),
    "ratio of one": (zip_bytes([("a", WEIGHTS), ("b", b"\0" * 5_000_000)]), "'b' unpacks to"),
    "ratio of many": (
        zip_bytes([(f"{n}", b"\0" * 900_000) for n in range(30)]),
        "a zip bomb",
    ),
    "many": (zip_bytes([(f"{n}", b"") for n in range(1001)]), "has 1001 entries, allowed 1000"),
    "lzma": (zip_bytes([("a", b"x")], zipfile.ZIP_LZMA), "neither stored nor deflated"),
    "encrypted": (encrypted(), "entry 'a' is encrypted"),
    "lies": (lies_about_its_size(), "cannot be unpacked"),
    "truncated": (ARCHIVE[:-30], "cannot be unpacked"),
    "flipped": (ARCHIVE[:5000] + b"\xff\x00\xff" + ARCHIVE[5003:], "cannot be unpacked"),
    "no zip": (b"<html>not found</html>", "cannot be unpacked"),
    "empty": (b"", "cannot be unpacked"),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_harmful_archive_is_refused_and_nothing_is_written(tmp_path, case):
    data, message = HARMFUL[case]
    folder = tmp_path / "inner" / "cache"
    folder.mkdir(parents=True)
    (folder / "evil.zip").write_bytes(data)
    with pytest.raises(FetchError, match=message) as refused:
        unpack(folder / "evil.zip", folder / "model")
    assert str(refused.value).isprintable()
    # Neither outside nor inside, nor a half-unpacked folder.
    assert files_below(tmp_path) == ["inner/cache/evil.zip"]
    assert not (folder / "model").exists()
    assert len(list(folder.iterdir())) == 1


def test_an_entry_that_stands_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zip_bytes([("a", b"first"), ("a", b"second")])
    (tmp_path / "evil.zip").write_bytes(data)
    with pytest.raises(FetchError, match="'a' is there twice"):
        unpack(tmp_path / "evil.zip", tmp_path / "model")
    assert files_below(tmp_path) == ["evil.zip"]


def test_the_unpacked_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", len(WEIGHTS))
    (tmp_path / "a.zip").write_bytes(ARCHIVE)
    with pytest.raises(FetchError, match=f"allowed {len(WEIGHTS)}"):
        unpack(tmp_path / "a.zip", tmp_path / "model")


def test_a_plain_archive_is_accepted(tmp_path):
    data = zip_bytes(
        [
            (entry("models/", stat.S_IFDIR | 0o755), b""),
            # No archive of strangers makes a program or a set-user-id file here.
            (entry("models/checkpoint", stat.S_IFREG | 0o4755), b"x"),
            ("models/empty", b""),
        ],
        zipfile.ZIP_STORED,
    )
    (tmp_path / "a.zip").write_bytes(data)
    (tmp_path / "model").mkdir()
    unpack(tmp_path / "a.zip", tmp_path / "model")
    assert files_below(tmp_path / "model") == ["models/checkpoint", "models/empty"]
    assert not os.access(tmp_path / "model" / "models" / "checkpoint", os.X_OK)


def test_what_is_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "a.zip").write_bytes(ARCHIVE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_bytes(b"")
    with pytest.raises(FetchError, match="in the way"):
        unpack(tmp_path / "a.zip", tmp_path / "model")
    assert files_below(tmp_path) == ["a.zip", "model/mine"]


SMALL = zip_bytes(
    [("models/", b""), ("models/checkpoint", b"text " * 20), ("config.json", b"{}")],
)


@settings(max_examples=300, deadline=None)
@given(
    position=st.integers(0, len(SMALL)),
    length=st.integers(0, 12),
    replacement=st.binary(max_size=12),
)
def test_a_mutated_archive_is_unpacked_or_refused(tmp_path_factory, position, length, replacement):
    base = tmp_path_factory.mktemp("mutated")
    cache = base / "inner"
    cache.mkdir()
    (cache / "a.zip").write_bytes(SMALL[:position] + replacement + SMALL[position + length :])
    try:
        unpack(cache / "a.zip", cache / "model")
    except FetchError as error:
        assert str(error).isprintable()
        assert files_below(base) == ["inner/a.zip"]
    else:
        assert all(
            name == "inner/a.zip" or name.startswith("inner/model/") for name in files_below(base)
        )
