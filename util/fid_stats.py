"""Turn images into the statistics that --fid_stats compares with.

python -m util.fid_stats --image_dir IMAGENET/train --output fid_stats/in256.npz
python -m util.fid_stats --image_dir samples.npz --output fid_stats/samples.npz
torchrun --nproc_per_node=8 -m util.fid_stats --image_dir IMAGENET/train

images -> centre crop, as for training -> features -> mu [D], sigma [D, D], and sFID's

The features are summed up and not kept, so there may be millions of images.
"""

from pathlib import Path

from util import dist
from util.args import EXTRACTOR, Flag, Parser, auto, positive_int
from util.data.images import reading_flags
from util.errors import UserError
from util.evaluation.extractor import load_extractor
from util.evaluation.folder import batch_ranges
from util.evaluation.metrics import Accumulator, few_for_covariance
from util.evaluation.reference import image_batches, open_images
from util.files import check_writable


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_flags(
        "statistics",
        Flag("image_dir", str, "./data/imagenet/train", "images in folders, or an npz file"),
        Flag("output", str, "fid_stats/statistics.npz", "to write"),
        auto("img_size", positive_int, 256, "pixels; of an npz file its own, unless given"),
        Flag("batch_size", positive_int, 64, "images a batch"),
        *EXTRACTOR,
    )
    parser.add_loader_flags()
    parser.add_device_flags()
    return parser


def main() -> None:
    args = make_parser().parse()
    device = dist.init(args.device, args.dist_url, args.dist_on_itp, args.dist_timeout)
    output = Path(args.output)
    if output.suffix != ".npz":
        raise UserError(f"--output {output} does not end with .npz")
    check_writable(output.parent, "--output")
    images = open_images(args.image_dir, args.img_size, "--image_dir", **reading_flags(args))
    extractor = load_extractor(args.feature_extractor, args.inception_weights, device)
    if extractor is None or "fid" not in extractor.layers:
        raise UserError(
            f"--feature_extractor {args.feature_extractor}: statistics need its weights "
            "(--inception_weights), and a layer for a Frechet distance"
        )
    layers = {name: layer for name, layer in extractor.layers.items() if name in ("fid", "sfid")}
    sums, batches = Accumulator(layers, groups=1), batch_ranges(len(images), args.batch_size)
    for _, _, pixels in image_batches(images, batches, range(len(batches)), args.num_workers):
        sums.update(extractor(pixels))
    for moments in sums.moments.values():
        moments.gather()
    if dist.is_main():
        if (count := sums.moments["fid"].count) < 2:
            raise UserError(f"--image_dir {args.image_dir}: a covariance takes two images")
        output.parent.mkdir(parents=True, exist_ok=True)
        sums.save_statistics(output, extractor, images.size)
        width = sums.moments["fid"].first.shape[1]
        print(f"{output}: {count} images of {images.size} px, {width} features")
        if few := few_for_covariance(count, width):
            print(f"warning: {few}")
    dist.barrier()
    dist.cleanup()


if __name__ == "__main__":
    dist.run(main)
