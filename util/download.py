"""Fetch the published weights from the Hugging Face hub to where the commands expect them.

python -m util.download {vae,large,huge} ...

What a repository holds, and the checksum of each file, is asked of the hub at the time. A file
takes its name when it is complete and its checksum is right; until then it is NAME.CHECKSUM.part
beside it, with which the same command goes on after an interruption. A file that is there is
verified and left as it is.
"""

import argparse
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # that of the library it asks with: httpx, since version 2 httpx2
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from util.dist import run
from util.errors import UserError, as_user_error
from util.files import check_writable, flush_file, flush_folder, only_job_in
from util.parser import Parser

REPOSITORY = "Epiphqny/TokenBridge"
# Where the published commands look for each, under --output_dir.
PLACES = {
    "vae": "vae/kl16.ckpt",
    "large": "tokenbridge/tokenbridge_large/checkpoint-last.pth",
    "huge": "tokenbridge/tokenbridge_huge/checkpoint-last.pth",
}
ELSEWHERE = {"vae": "; MAR's README, https://github.com/LTH14/mar, links to a kl16.ckpt, too"}
HUB = "https://huggingface.co"
HUB_ERRORS = (HTTPError, OSError, ValueError)
NO_ANSWER = (*HUB_ERRORS, TypeError, LookupError)  # an answer that is no hub's fails in many ways
ANSWER_SECONDS = 20.0
SHOWN = 12  # of a repository's files, in a message


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit. sha256: of large files; else git's own sha1, blob."""

    name: str
    url: str
    size: int
    sha256: str | None
    blob: str | None

    @property
    def checksum(self) -> str:
        return self.sha256 or self.blob or ""

    def matches(self, path: Path) -> bool:
        """Whether a file has this size and this checksum; git hashes a header of the size, too."""
        size = path.stat().st_size
        if size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size)
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest() == self.checksum


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="+", choices=PLACES, help="the VAE, and the two models")
    group = parser.add_argument_group("hub")
    group.add_argument("--repo", default=REPOSITORY, help="repository of the hub")
    group.add_argument("--revision", default="main", help="branch, tag or commit")
    group.add_argument("--endpoint", default=constants.ENDPOINT, help="address; also HF_ENDPOINT")
    group.add_argument("--file", help="name in the repository, where it is not the usual one")
    group.add_argument("--output_dir", default="pretrained_models", help="folder to put them in")
    return parser


def main() -> None:
    args = make_parser().parse()
    wanted = list(dict.fromkeys(args.what))
    if args.file and len(wanted) > 1:
        raise UserError(f"--file {args.file} is one file, and {', '.join(wanted)} are several")
    check_writable(args.output_dir, "--output_dir")
    listed = list_files(args, wanted)
    chosen = {what: choose(listed, what, args) for what in wanted}
    for what, remote in chosen.items():
        fetch(remote, Path(args.output_dir) / PLACES[what], args.output_dir)


def list_files(args: argparse.Namespace, wanted: list[str]) -> list[RemoteFile]:
    """The repository's files at the commit that --revision is now.

    Raises UserError: without the hub, with what to fetch by hand and where to put it.
    """
    api = HfApi(endpoint=args.endpoint)
    try:
        info = api.model_info(
            args.repo, revision=args.revision, files_metadata=True, timeout=ANSWER_SECONDS
        )
    except GatedRepoError as error:
        raise UserError(
            f"--repo {args.repo}: access is granted on request, at {args.endpoint}/{args.repo}; "
            "then hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--repo {args.repo}: {args.endpoint} has no such repository, or shows it only to "
            "those who are logged in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"--revision {args.revision}: {args.repo} has no such revision") from error
    except HFValidationError as error:
        raise UserError(f"--repo {args.repo}: not of the form NAMESPACE/NAME") from error
    except NO_ANSWER as error:
        reason = first_line(error)
        raise UserError(
            f"cannot ask {args.endpoint} ({reason}); {by_hand(args, wanted)}"
        ) from error
    return [_remote(args, info.sha, sibling) for sibling in info.siblings or []]


def _remote(args: argparse.Namespace, commit: str, sibling) -> RemoteFile:
    """Raises UserError if the hub does not say the checksum."""
    if sibling.size is None or (sibling.lfs is None and sibling.blob_id is None):
        raise UserError(f"--endpoint {args.endpoint}: says no checksum of {sibling.rfilename}")
    return RemoteFile(
        name=sibling.rfilename,
        url=hf_hub_url(args.repo, sibling.rfilename, revision=commit, endpoint=args.endpoint),
        size=sibling.size,
        sha256=sibling.lfs.sha256 if sibling.lfs else None,
        blob=sibling.blob_id,
    )


def first_line(error: Exception) -> str:
    """What a library says, short enough for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def by_hand(args: argparse.Namespace, wanted: list[str]) -> str:
    """What to fetch on another machine, and where to put it."""
    places = {what: Path(args.output_dir) / PLACES[what] for what in wanted}
    missing = {what: path for what, path in places.items() if not path.exists()}
    if not missing:
        return f"{', '.join(map(str, places.values()))}: there already, but not verified"
    steps = ", ".join(f"{'/'.join(path.parts[-2:])} as {path}" for path in missing.values())
    others = "".join(ELSEWHERE.get(what, "") for what in missing)
    return f"where there is a network, fetch from {HUB}/{args.repo}, and put here: {steps}{others}"


def choose(listed: list[RemoteFile], what: str, args: argparse.Namespace) -> RemoteFile:
    """The one file whose path ends as the place does. Raises UserError if there is none."""
    endings = [args.file] if args.file else endings_of(PLACES[what])
    for ending in endings:
        found = [remote for remote in listed if f"/{remote.name}".endswith(f"/{ending}")]
        exact = [remote for remote in found if remote.name == ending]
        if len(exact or found) == 1:
            return (exact or found)[0]
    names = ", ".join(remote.name for remote in listed[:SHOWN])
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    raise UserError(
        f"--repo {args.repo} has no single file {' or '.join(endings)}; name one by --file: "
        f"{names or 'it is empty'}{more}{ELSEWHERE.get(what, '')}"
    )


def endings_of(place: str) -> list[str]:
    """From vae/kl16.ckpt also kl16.ckpt; checkpoint-last.pth alone would not say which model."""
    folder, name = Path(place).parts[-2:]
    return [f"{folder}/{name}"] + ([name] if folder == "vae" else [])


def fetch(remote: RemoteFile, path: Path, output_dir: str) -> None:
    """Download to a path, or verify what is there. Raises UserError, nothing left half-written."""
    if path.exists():
        print(f"{path}: verifying", flush=True)
        if not remote.matches(path):
            raise UserError(
                f"{path} is there, but is not {remote.name} of the hub ({remote.size} bytes, "
                f"checksum {remote.checksum}); move it away to fetch that"
            )
        print(f"{path}: complete, checksum {remote.checksum}")
        return
    with only_job_in(path.parent, "--output_dir"):
        part = path.with_name(f"{path.name}.{remote.checksum[:12]}.part")
        transfer(remote, part)
        if not remote.matches(part):
            part.unlink()
            raise UserError(
                f"{path}: what came from {remote.url} has another checksum than the hub says "
                f"({remote.checksum}); it was damaged on the way: start the same command again"
            )
        with as_user_error(f"--output_dir {output_dir}: cannot write", (OSError,)):
            flush_file(part)
            part.replace(path)
            flush_folder(path.parent)
    print(f"{path}: fetched, {remote.size} bytes, checksum {remote.checksum}")


def transfer(remote: RemoteFile, part: Path) -> None:
    """Fetch what is missing of a part. It stays if the connection breaks for good."""
    done = part.stat().st_size if part.exists() else 0
    if done > remote.size:  # no part of this file
        part.unlink()
        done = 0
    free = shutil.disk_usage(part.parent).free
    if remote.size - done > free:
        raise UserError(f"{part.parent}: {remote.size - done} bytes are to come, {free} are free")
    after = f", going on after {done / 1e6:.2f} MB" if done else ""
    print(f"fetching {remote.url} ({remote.size / 1e6:.2f} MB{after})", flush=True)
    try:
        with open(part, "ab") as file:
            http_get(
                remote.url,
                file,
                resume_size=done,
                headers=build_hf_headers(),
                expected_size=remote.size,
                displayed_filename=remote.name,
            )
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{remote.name}: broke off after {part.stat().st_size} of {remote.size} bytes "
            f"({first_line(error)}); start the same command again to go on"
        ) from error


if __name__ == "__main__":
    run(main)
