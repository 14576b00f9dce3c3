"""python -m util.download against a stand-in for the hub on loopback."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from tests.conftest import ROOT, environment
from tests.hub import Hub, git_blob, running
from tests.runs import call, free_port, refused
from util import download
from util.download import PLACES, REPOSITORY
from util.errors import EXIT_STOPPED

LARGE = "tokenbridge/tokenbridge_large/checkpoint-last.pth"
CONTENT = {
    name: np.random.default_rng(i).bytes(300_000 + i)
    for i, name in enumerate(("vae/kl16.ckpt", LARGE, LARGE.replace("large", "huge")))
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB, what a break may lose
    with running(Hub({REPOSITORY: {"README.md": b"weights", **CONTENT}})) as hub:
        yield hub


def fetch(hub: Hub, folder: Path, *what: str, **flags) -> None:
    call(download.main, *command(hub, folder, *what, **flags))


def command(hub: Hub, folder: Path, *what: str, **flags) -> list[str]:
    flags = {"endpoint": hub.url, "output_dir": folder} | flags
    return [*what, *(str(word) for k, v in flags.items() for word in (f"--{k}", v))]


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def part(folder: Path) -> Path:
    """The name of what is there of the large model's file before it is complete."""
    digest = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    return folder / f"{LARGE}.{digest[:12]}.part"


def test_all_three_come_to_the_places_that_the_published_commands_name(hub, tmp_path, capsys):
    fetch(hub, tmp_path, "vae", "large", "huge")
    assert files(tmp_path) == CONTENT
    assert set(PLACES.values()) == set(CONTENT)
    said = capsys.readouterr().out
    assert all(hashlib.sha256(content).hexdigest() in said for content in CONTENT.values())


def test_progress_is_shown_on_a_terminal(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch(hub, tmp_path, "vae")
    said = capsys.readouterr()
    assert "fetching" in said.out and "0.30 MB" in said.out
    assert "kl16.ckpt: 100%" in said.err


def test_a_complete_file_is_verified_and_left(hub, tmp_path, capsys):
    fetch(hub, tmp_path, "vae")
    before = (tmp_path / PLACES["vae"]).stat()
    fetch(hub, tmp_path, "vae")
    assert (tmp_path / PLACES["vae"]).stat().st_mtime_ns == before.st_mtime_ns
    assert len(hub.ranges("vae/kl16.ckpt")) == 1
    assert "complete" in capsys.readouterr().out


def test_a_file_of_another_content_is_refused_and_left(hub, tmp_path, capsys):
    path = tmp_path / PLACES["vae"]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * len(CONTENT["vae/kl16.ckpt"]))
    line = refused(capsys, download.main, *command(hub, tmp_path, "vae"))
    assert str(path) in line and "move it away" in line
    assert files(tmp_path) == {PLACES["vae"]: b"x" * len(CONTENT["vae/kl16.ckpt"])}


def test_a_broken_connection_goes_on_where_it_broke(hub, tmp_path):
    hub.cut = [100_000]
    fetch(hub, tmp_path, "large")
    first, second = hub.ranges(LARGE)
    assert first is None and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 100_000
    assert files(tmp_path) == {LARGE: CONTENT[LARGE]}


def test_an_interrupted_download_goes_on_with_its_part(hub, tmp_path):
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(CONTENT[LARGE][:123_456])
    fetch(hub, tmp_path, "large")
    assert hub.ranges(LARGE) == ["bytes=123456-"]
    assert files(tmp_path) == {LARGE: CONTENT[LARGE]}


def test_a_server_without_ranges_sends_it_all_again(hub, tmp_path):
    hub.ignore_ranges = True
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(CONTENT[LARGE][:123_456])
    fetch(hub, tmp_path, "large")
    assert files(tmp_path) == {LARGE: CONTENT[LARGE]}


def test_a_connection_that_breaks_for_good_leaves_the_part(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut = [100_000] + [0] * 50
    line = refused_at_the_end(capsys, hub, tmp_path, "large")
    assert "100000 of 300001 bytes" in line and "start the same command again" in line
    assert files(tmp_path) == {
        part(tmp_path).relative_to(tmp_path).as_posix(): CONTENT[LARGE][:100_000]
    }
    hub.cut = []
    fetch(hub, tmp_path, "large")
    assert hub.ranges(LARGE)[-1] == "bytes=100000-"
    assert files(tmp_path) == {LARGE: CONTENT[LARGE]}


def refused_at_the_end(capsys, hub: Hub, folder: Path, *what: str) -> str:
    """The last line, after what the progress bar and the library have said."""
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["download.py", *command(hub, folder, *what)])
        download.run(download.main)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("began", [0, 1000])
def test_a_damaged_transfer_is_refused_and_thrown_away(hub, tmp_path, capsys, began):
    """Also where the damage is in what an earlier attempt left."""
    if began:
        part(tmp_path).parent.mkdir(parents=True)
        part(tmp_path).write_bytes(bytes(began))
    else:
        hub.damaged = {LARGE}
    line = refused_at_the_end(capsys, hub, tmp_path, "large")
    assert "checksum" in line and "start the same command again" in line
    assert files(tmp_path) == {}
    hub.damaged = set()
    fetch(hub, tmp_path, "large")
    assert files(tmp_path) == {LARGE: CONTENT[LARGE]}


def test_a_signal_stops_it_and_the_same_command_goes_on(hub, tmp_path):
    """In a process of its own: what it has fetched by then stays."""
    hub.repos[REPOSITORY][LARGE] = big = CONTENT[LARGE] * 100
    stalled = Path(f"{LARGE}.{hashlib.sha256(big).hexdigest()[:12]}.part")
    hub.stall = 20_000_000
    process = subprocess.Popen(
        [sys.executable, "-m", "util.download", *command(hub, tmp_path, "large")],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / stalled).exists() or (tmp_path / stalled).stat().st_size < 1:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == EXIT_STOPPED, process.stderr.read()
    finally:
        process.kill()
    hub.stall = None
    kept = (tmp_path / stalled).stat().st_size
    assert 0 < kept < len(big)
    fetch(hub, tmp_path, "large")
    assert hub.ranges(LARGE)[-1] == f"bytes={kept}-"
    assert files(tmp_path) == {LARGE: big}


def test_files_may_lie_elsewhere_in_a_repository(hub, tmp_path):
    hub.repos["a/b"] = {
        "kl16.ckpt": b"vae",
        "weights/tokenbridge_large/checkpoint-last.pth": b"large",
        "step9.pth": b"huge",
    }
    fetch(hub, tmp_path, "vae", "large", repo="a/b")
    fetch(hub, tmp_path, "huge", repo="a/b", file="step9.pth")
    assert [files(tmp_path)[PLACES[what]] for what in PLACES] == [b"vae", b"large", b"huge"]


def test_files_that_git_keeps_itself_are_verified_by_its_own_checksum(hub, tmp_path, capsys):
    hub.repos["a/b"] = {"vae.bin": b"some bytes"}
    fetch(hub, tmp_path, "vae", repo="a/b", file="vae.bin")
    assert git_blob(b"some bytes") in capsys.readouterr().out
    (tmp_path / PLACES["vae"]).unlink()
    hub.damaged = {"vae.bin"}
    assert "checksum" in refused_at_the_end(
        capsys, hub, tmp_path, "vae", "--repo", "a/b", "--file", "vae.bin"
    )
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"repo": "no/where"}, ["--repo no/where", "hf auth login"]),
        ({"repo": "too/many/parts"}, ["--repo too/many/parts", "NAMESPACE/NAME"]),
        ({"revision": "v9"}, ["--revision v9"]),
        ({"repo": "a/b"}, ["kl16.ckpt", "--file", "one/vae.ckpt, other.txt", "MAR"]),
        ({"repo": "a/b", "file": "gone"}, ["gone", "--file"]),
        ({"output_dir": "/proc/x"}, ["--output_dir /proc/x"]),
    ],
)
def test_what_cannot_be_is_told_in_one_line(hub, tmp_path, capsys, flags, fragments):
    hub.repos["a/b"] = {"one/vae.ckpt": b"", "other.txt": b""}
    line = refused(capsys, download.main, *command(hub, tmp_path, "vae", **flags))
    assert all(fragment in line for fragment in fragments), line
    assert files(tmp_path) == {}


def test_one_file_is_not_several(hub, tmp_path, capsys):
    assert "--file x" in refused(
        capsys, download.main, *command(hub, tmp_path, "vae", "large", file="x")
    )


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(tmp_path, capsys):
    nobody = Hub(url=f"http://127.0.0.1:{free_port()}")
    line = refused(capsys, download.main, *command(nobody, tmp_path, "vae", "huge"))
    assert nobody.url in line and f"https://huggingface.co/{REPOSITORY}" in line
    assert str(tmp_path / PLACES["vae"]) in line and str(tmp_path / PLACES["huge"]) in line
    assert "tokenbridge_huge/checkpoint-last.pth as" in line and "LTH14/mar" in line
    assert files(tmp_path) == {}


def test_without_a_network_what_is_there_is_not_asked_for(tmp_path, capsys):
    (tmp_path / "vae").mkdir()
    (tmp_path / PLACES["vae"]).write_bytes(b"x")
    nobody = Hub(url=f"http://127.0.0.1:{free_port()}")
    line = refused(capsys, download.main, *command(nobody, tmp_path, "vae"))
    assert "there already, but not verified" in line
    line = refused(capsys, download.main, *command(nobody, tmp_path, "vae", "large"))
    assert "tokenbridge_large" in line and "kl16" not in line


def test_a_server_that_is_no_hub_is_told(hub, tmp_path, capsys):
    line = refused(capsys, download.main, *command(hub, tmp_path, "vae", endpoint=f"{hub.url}/x"))
    assert f"{hub.url}/x" in line
