"""Turn images into the statistics that --fid_stats compares with.

python -m util.fid_stats --image_dir IMAGENET/train --output fid_stats/in256.npz
python -m util.fid_stats --image_dir samples.npz --output fid_stats/samples.npz
torchrun --nproc_per_node=8 -m util.fid_stats --image_dir IMAGENET/train

images -> centre crop, as for training -> features -> mu [D], sigma [D, D]

The features are summed up and not kept, so there may be millions of images.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import dist
from util.args import (
    add_device_flags,
    add_distributed_flags,
    add_extractor_flags,
    add_loader_flags,
    positive_int,
)
from util.data.arrays import ImageArray
from util.data.images import Loading
from util.dist import run
from util.errors import UserError
from util.evaluation.extractor import Extractor, load_extractor
from util.evaluation.features import batch_ranges, folder_batches, upsampled
from util.evaluation.reference import open_images, write_statistics
from util.files import check_writable
from util.parser import Parser


def make_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("statistics")
    add = group.add_argument
    add(
        "--image_dir",
        default="./data/imagenet/train",
        metavar="FOLDER",
        help="images, in folders or not; or an npz file of them, arr_0 uint8 [N, H, W, 3]",
    )
    add("--output", default="fid_stats/statistics.npz", metavar="FILE", help="to write")
    add(
        "--img_size",
        type=positive_int,
        default=256,
        help="pixels, as of the generated images; of an npz file its own, unless it is given",
    )
    add("--batch_size", type=positive_int, default=64, help="images a batch")
    add_extractor_flags(group)
    add_loader_flags(parser)
    add_device_flags(parser)
    add_distributed_flags(parser)
    return parser


class Moments:
    """Sums of features in float64: enough for mean and covariance of any number of images."""

    def __init__(self, width: int):
        self.count = 0
        self.first = torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: [N, D]."""
        wide = features.double()
        self.count += len(wide)
        self.first += wide.sum(dim=0)
        self.second += wide.T @ wide

    def gathered(self) -> "Moments | None":
        """Everybody's together, on the main process."""
        parts = dist.gather_to_main((self.count, self.first, self.second))
        if parts is None:
            return None
        whole = Moments(len(self.first))
        for count, first, second in parts:
            whole.count, whole.first, whole.second = (
                whole.count + count,
                whole.first + first,
                whole.second + second,
            )
        return whole

    def statistics(self) -> dict[str, np.ndarray]:
        """mu [D] and sigma [D, D]."""
        mu = self.first / self.count
        sigma = (self.second - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return {"mu": mu.numpy(), "sigma": sigma.numpy()}


def main() -> None:
    args = make_parser().parse()
    device = dist.init(args.device, args.dist_url, args.dist_on_itp)
    output = Path(args.output)
    if output.suffix != ".npz":
        raise UserError(f"--output {output} is not the name of an npz file")
    check_writable(output.parent, "--output")
    files = open_images(args.image_dir, "--image_dir")
    if isinstance(files, ImageArray) and "img_size" not in args.explicit:
        args.img_size = files.side
    extractor = load_extractor(args.feature_extractor, args.inception_weights, device)
    if extractor is None:
        raise UserError("statistics need the extractor's weights: name a file, --inception_weights")
    layer = extractor.layers.get("fid")
    if layer is None:
        raise UserError(
            f"--feature_extractor {args.feature_extractor} declares no layer for a Frechet "
            "distance, so statistics of it are of no use"
        )
    moments = measure(extractor, layer, files, args)
    if moments is not None:
        width = len(moments.first)
        if moments.count < 2:
            raise UserError(f"--image_dir {args.image_dir}: a covariance takes two images")
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"layer": layer, "count": moments.count, "img_size": args.img_size}
        write_statistics(output, moments.statistics(), extractor.identity() | facts)
        print(f"{output}: {moments.count} images of {args.img_size} px, {width} features")
        tell_doubts(files, moments, args.img_size)
    dist.barrier()
    dist.cleanup()


def measure(
    extractor: Extractor,
    layer: str,
    files: list[Path] | ImageArray,
    args: argparse.Namespace,
) -> Moments | None:
    """The sums over all images, on the main process; every process takes its share of batches."""
    moments = Moments(extractor.width("fid", args.img_size))
    batches = batch_ranges(len(files), args.batch_size)
    wanted = range(len(batches))
    shares = folder_batches(files, args.img_size, batches, wanted, Loading.of(args))
    for number, ids, images in shares:
        dist.beat(f"batch {number + 1} of {len(batches)} of --image_dir")
        if ids:
            moments.add(extractor(images)[layer])
    return moments.gathered()


def tell_doubts(files: list[Path] | ImageArray, moments: Moments, size: int) -> None:
    """What a distance to these statistics would mean, where that is not what a reader expects."""
    smaller = upsampled(files, size)
    if smaller:
        print(f"warning: {smaller} and were enlarged: FID will measure the blur of that too")
    width = len(moments.first)
    if moments.count <= width:
        print(
            f"warning: {moments.count} images are not more than the {width} features: their "
            "covariance is singular and FID to them far too large"
        )


if __name__ == "__main__":
    run(main)
