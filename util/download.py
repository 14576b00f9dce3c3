"""Fetch the published weights from the Hugging Face hub to where the commands expect them.

python -m util.download {vae,large,huge,vq,detok,...} ...

Until its checksum is the hub's, a file is NAME.CHECKSUM.part, with which the same command goes on
after an interruption; `hf_hub_download` would begin gigabytes anew.
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from util import dist
from util.args import Parser
from util.errors import UserError, as_user_error
from util.files import check_writable, flush, listed, only_job_in, sha256

REPOSITORY = "Epiphqny/TokenBridge"
# Of others; licences are those that the pages of the repositories state.
REPOSITORIES = {"vq": "FoundationVision/LlamaGen"}
REPOSITORIES |= dict.fromkeys(
    ("detok", "detok_tuned", "detok_mar_base", "detok_mar_large"), "jjiaweiyang/l-DeTok"
)
# Where the published commands look for each. Of a repository's file the end of its path is known:
# kl16.ckpt, but checkpoint-last.pth only in the folder of its model.
PLACES = {
    "vae": "vae/kl16.ckpt",
    "large": "tokenbridge/tokenbridge_large/checkpoint-last.pth",
    "huge": "tokenbridge/tokenbridge_huge/checkpoint-last.pth",
    "vq": "vq/vq_ds16_c2i.pt",
    "detok": "detok/detok-BB-gamm3.0-m0.7.pth",
    "detok_tuned": "detok/detok-BB-gamm3.0-m0.7-decoder_tuned.pth",
    "detok_mar_base": "detok/mar_base.pth",
    "detok_mar_large": "detok/mar_large.pth",
}
HUB_ERRORS = (errors.HTTPError, OSError, ValueError)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="+", choices=PLACES, help="tokenizers and models")
    add = parser.add_argument_group("hub").add_argument
    add("--repo", help="repository of the hub; default: that of each")
    add("--revision", default="main", help="branch, tag or commit")
    add("--endpoint", default=constants.ENDPOINT, help="address; also HF_ENDPOINT")
    add("--file", help="name in the repository, where it is not the usual one")
    add("--output_dir", default="pretrained_models", help="folder to put them in")
    return parser


def main() -> None:
    args = make_parser().parse()
    if args.file and len(set(args.what)) > 1:
        raise UserError(f"--file {args.file} is one file, and {', '.join(args.what)} are several")
    check_writable(args.output_dir, "--output_dir")
    for name in args.what:
        fetch_one(args, name)


def fetch_one(args: argparse.Namespace, name: str) -> None:
    """Raises UserError."""
    repo = args.repo or REPOSITORIES.get(name, REPOSITORY)
    path, revision = Path(args.output_dir, PLACES[name]), args.revision
    where = f"--repo {repo} --revision {revision} of {args.endpoint}"
    by_hand = f"without a network, fetch it elsewhere and put it at {path}"
    with as_user_error(f"{where} ({by_hand})", (*HUB_ERRORS, TypeError, LookupError)):
        api = HfApi(args.endpoint)
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=20)
    with as_user_error(f"--repo {repo}"):
        file = choose(info.siblings or [], args.file or PLACES[name].partition("/")[2])
    if not path.exists():
        url = hf_hub_url(repo, file.rfilename, revision=info.sha, endpoint=args.endpoint)
        with only_job_in(path.parent, "--output_dir"):
            fetch(url, file, path)
    elif sha256(path) != file.lfs.sha256:
        raise UserError(f"{path} is there, but is not the hub's {file.rfilename}; move it away")
    print(f"{path}: complete, SHA-256 {file.lfs.sha256}")


def choose(files: list[RepoSibling], name: str) -> RepoSibling:
    """The one file whose path ends so. Raises UserError if it or its SHA-256 is not there."""
    found = [file for file in files if file.lfs and f"/{file.rfilename}".endswith(f"/{name}")]
    found = [file for file in found if file.rfilename == name] or found
    if len(found) != 1:
        names = listed(file.rfilename for file in files)
        raise UserError(f"it has no single large file {name}; name one by --file: {names}")
    return found[0]


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
        flush(part)
        part.replace(path)
        flush(path.parent)


if __name__ == "__main__":
    dist.run(main)
