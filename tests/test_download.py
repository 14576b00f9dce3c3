"""python -m util.download against a stand-in for the hub on loopback."""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from tests.hub import Hub, running
from tests.runs import call, contents, flags, free_port, refused
from util import download
from util.download import PLACES, REPOSITORY
from util.download import REPOSITORIES as OTHERS

LARGE = PLACES["large"]
CONTENT = {name: np.random.default_rng(i).bytes(300_000) for i, name in enumerate(PLACES.values())}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB, what a break may lose
    monkeypatch.setattr("time.sleep", lambda _, sleep=time.sleep: sleep(0.01))
    repositories = {repo: {"README.md": b"weights"} for repo in (REPOSITORY, *OTHERS.values())}
    for name, place in PLACES.items():
        repositories[OTHERS.get(name, REPOSITORY)][place] = CONTENT[place]
    with running(Hub(repositories)) as hub:
        yield hub


def command(hub: Hub, folder: Path, *what: str, **changes) -> list[str]:
    return [*what, *flags(folder, {"endpoint": hub.url, "output_dir": folder} | changes)]


def fetch(*args, **changes) -> None:
    call(download.main, *command(*args, **changes))


def part(folder: Path, content: bytes = b"") -> Path:
    """What is there of the large model's file before it is complete; written if it has content."""
    path = folder / f"{LARGE}.{hashlib.sha256(CONTENT[LARGE]).hexdigest()[:12]}.part"
    if content:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    return path


def test_all_come_to_their_places_and_are_verified_when_there(hub, tmp_path, capsys):
    fetch(hub, tmp_path, *PLACES)
    assert contents(tmp_path) == CONTENT
    said = capsys.readouterr()
    assert all(hashlib.sha256(content).hexdigest() in said.out for content in CONTENT.values())
    before = (tmp_path / PLACES["vae"]).stat()
    fetch(hub, tmp_path, "vae")
    assert (tmp_path / PLACES["vae"]).stat().st_mtime_ns == before.st_mtime_ns
    assert len(hub.ranges(PLACES["vae"])) == 1 and "complete" in capsys.readouterr().out
    (tmp_path / PLACES["vae"]).write_bytes(b"mine")
    line = refused(capsys, download.main, *command(hub, tmp_path, "vae"))
    assert str(tmp_path / PLACES["vae"]) in line and "move it away" in line
    assert contents(tmp_path) == CONTENT | {PLACES["vae"]: b"mine"}


def test_a_broken_connection_is_tried_again_and_the_same_command_goes_on(hub, tmp_path, capsys):
    hub.cut = [100_000] + [0] * 50
    line = refused(capsys, download.main, *command(hub, tmp_path, "large"), alone=False)
    assert "start the same command again" in line
    assert hub.ranges(LARGE)[:2] == [None, "bytes=100000-"]
    assert part(tmp_path).read_bytes() == CONTENT[LARGE][:100_000] and len(contents(tmp_path)) == 1
    hub.cut = []
    fetch(hub, tmp_path, "large")
    assert hub.ranges(LARGE)[-1] == "bytes=100000-"
    assert contents(tmp_path) == {LARGE: CONTENT[LARGE]}


@pytest.mark.parametrize("began", [b"", bytes(1000)])
def test_a_damaged_transfer_is_refused_and_thrown_away(hub, tmp_path, capsys, began):
    """Also where the damage is in what an earlier attempt left."""
    part(tmp_path, began)
    hub.damaged = set() if began else {LARGE}
    line = refused(capsys, download.main, *command(hub, tmp_path, "large"), alone=False)
    assert "checksum" in line and "start the same command again" in line
    assert contents(tmp_path) == {}


def test_files_may_lie_elsewhere_in_a_repository(hub, tmp_path):
    hub.repos["a/b"] = {"kl16.ckpt": b"vae", "step9.pth": b"huge", "old/step9.pth": b"older"}
    hub.repos["a/b"]["weights/tokenbridge_large/checkpoint-last.pth"] = b"large"
    fetch(hub, tmp_path, "vae", "large", repo="a/b")
    fetch(hub, tmp_path, "huge", repo="a/b", file="step9.pth")
    found = [contents(tmp_path)[PLACES[what]] for what in ("vae", "large", "huge")]
    assert found == [b"vae", b"large", b"huge"]


def test_what_cannot_be_is_told_in_one_line_with_what_to_fetch(hub, tmp_path, capsys):
    for changes, fragments in (
        ({"repo": "no/where"}, ["--repo no/where", "Repository Not Found"]),
        ({"revision": "v9"}, ["--revision v9", "Revision Not Found"]),
        ({"repo": "a/b"}, ["kl16.ckpt", "--file", "one/vae.ckpt, other.txt"]),
        ({"repo": "a/b", "file": "gone"}, ["gone", "--file"]),
        ({"output_dir": "/proc/x"}, ["--output_dir /proc/x"]),
    ):
        hub.repos["a/b"] = {"one/vae.ckpt": b"", "other.txt": b""}
        line = refused(capsys, download.main, *command(hub, tmp_path, "vae", **changes))
        assert all(fragment in line for fragment in fragments), line
    nobody = Hub(url=f"http://127.0.0.1:{free_port()}")
    line = refused(capsys, download.main, *command(nobody, tmp_path, "vae"))
    assert nobody.url in line and REPOSITORY in line and str(tmp_path / PLACES["vae"]) in line
