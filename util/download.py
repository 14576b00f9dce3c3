"""Fetch the published weights from the Hugging Face hub to where the commands expect them.

python -m util.download {vae,large,huge} ...

Names and checksums are the hub's. Until its checksum is right a file is NAME.CHECKSUM.part, with
which the same command goes on after an interruption, where `hf_hub_download` would begin gigabytes
anew. A file that is there is verified and left as it is.
"""

from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from util import dist
from util.args import Parser
from util.errors import UserError, as_user_error
from util.files import check_writable, flush_file, flush_folder, only_job_in, sha256

REPOSITORY = "Epiphqny/TokenBridge"
# Where the published commands look for each. Of a repository's file the end of its path is known:
# kl16.ckpt, but checkpoint-last.pth only in the folder of its model.
PLACES = {
    "vae": "vae/kl16.ckpt",
    "large": "tokenbridge/tokenbridge_large/checkpoint-last.pth",
    "huge": "tokenbridge/tokenbridge_huge/checkpoint-last.pth",
}
HUB_ERRORS = (errors.HTTPError, OSError, ValueError)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="+", choices=PLACES, help="the VAE, and the two models")
    add = parser.add_argument_group("hub").add_argument
    add("--repo", default=REPOSITORY, help="repository of the hub")
    add("--revision", default="main", help="branch, tag or commit")
    add("--endpoint", default=constants.ENDPOINT, help="address; also HF_ENDPOINT")
    add("--file", help="name in the repository, where it is not the usual one")
    add("--output_dir", default="pretrained_models", help="folder to put them in")
    return parser


def main() -> None:
    args = make_parser().parse()
    if args.file and len(set(args.what)) > 1:
        raise UserError(f"--file {args.file} is one file, and {', '.join(args.what)} are several")
    places = [PLACES[name] for name in args.what]
    paths = {place.partition("/")[2]: Path(args.output_dir, place) for place in places}
    check_writable(args.output_dir, "--output_dir")
    try:
        api = HfApi(args.endpoint)
        info = api.model_info(args.repo, revision=args.revision, files_metadata=True, timeout=20)
    except (*HUB_ERRORS, TypeError, LookupError) as error:  # refused, no answer, or none of a hub
        steps = ", ".join(f"{name} as {path}" for name, path in paths.items())
        raise UserError(
            f"--repo {args.repo} --revision {args.revision} of {args.endpoint}: "
            f"{' '.join(str(error).split())[:300] or type(error).__name__}; where there is no "
            f"network, fetch https://huggingface.co/{args.repo} elsewhere and put here: {steps}"
        ) from error
    with as_user_error(f"--repo {args.repo}"):
        chosen = [choose(info.siblings or [], args.file or name) for name in paths]
    for file, path in zip(chosen, paths.values(), strict=True):
        url = hf_hub_url(args.repo, file.rfilename, revision=info.sha, endpoint=args.endpoint)
        if path.exists():
            verify(path, file)
        else:
            with only_job_in(path.parent, "--output_dir"):
                fetch(url, file, path)


def choose(files: list[RepoSibling], name: str) -> RepoSibling:
    """The one file whose path ends so. Raises UserError if it or its SHA-256 is not there."""
    found = [file for file in files if file.lfs and f"/{file.rfilename}".endswith(f"/{name}")]
    found = [file for file in found if file.rfilename == name] or found
    if len(found) != 1:
        names = ", ".join(file.rfilename for file in files[:12]) or "it is empty"
        raise UserError(f"it has no single large file {name}; name one by --file: {names}")
    return found[0]


def verify(path: Path, file: RepoSibling) -> None:
    """Raises UserError if it is another file than the hub's."""
    print(f"{path}: verifying", flush=True)
    if sha256(path) != file.lfs.sha256:
        raise UserError(f"{path} is there, but is not the hub's {file.rfilename}; move it away")
    print(f"{path}: complete, SHA-256 {file.lfs.sha256}")


def fetch(url: str, file: RepoSibling, path: Path) -> None:
    """Download what is missing of a file. Raises UserError; the part stays unless it is damaged."""
    part = path.with_name(f"{path.name}.{file.lfs.sha256[:12]}.part")
    print(f"fetching {url} ({file.size / 1e6:.2f} MB)", flush=True)
    with as_user_error(f"{path}: start the same command again to go on", HUB_ERRORS):
        with open(part, "ab") as output:
            done, headers = output.tell(), build_hf_headers()
            http_get(url, output, resume_size=done, headers=headers, expected_size=file.size)
        if sha256(part) != file.lfs.sha256:
            part.unlink()
            raise ValueError(f"damaged, its checksum is not {file.lfs.sha256}")
        flush_file(part)
        part.replace(path)
        flush_folder(path.parent)
    print(f"{path}: fetched, SHA-256 {file.lfs.sha256}")


if __name__ == "__main__":
    dist.run(main)
