"""How much FID noise in texture's latents costs, and how much of it a denoiser takes out again.

``python -m bench.experiments.texture_noise --images 10000``: real images of CIFAR-10 are encoded, their normalised
latents get Gaussian noise, and what is decoded is compared with the same images: FID 0 without noise and loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from bench.science.table import markdown
from fastasync.data import load_images
from fastasync.evaluation import FeatureExtractor, InceptionFeatures, frechet_distance
from fastasync.probe.generation import gaussian_statistics
from fastasync.representations import Representation, build

NOISES = (0.0, 0.05, 0.1, 0.2)


def figures(
    texture: Representation, images: Tensor, extractor: FeatureExtractor, noises: tuple[float, ...] = NOISES
) -> list[dict[str, float]]:
    """A row for each deviation of the noise, in those of the latents' channels; images uint8 [N, C, H, W], anywhere."""
    device = next(iter([*texture.parameters(), *texture.buffers(), torch.zeros(())])).device
    latents = torch.cat([texture.encode(part.to(device)) for part in images.split(500)])
    deviation = latents.std((0, 2, 3))[:, None, None]
    generator = torch.Generator(device).manual_seed(0)
    reference, rows = gaussian_statistics(extractor(images)), []
    for noise in noises:
        drawn = torch.randn(latents.shape, generator=generator, device=device)
        noisy = latents + noise * deviation * drawn
        with torch.no_grad():
            decoded = torch.cat([texture.decode(part).cpu() for part in noisy.split(500)])
        error = (decoded.double() - images.double()).square().mean()
        distance = frechet_distance(gaussian_statistics(extractor(decoded)), reference)
        rows.append({"noise": noise, "FID": distance, "PSNR": float(10 * torch.log10(255**2 / error))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[48, 24, 16], help="48: the pixels")
    parser.add_argument("--denoiser", type=int, nargs="+", default=[0, 2000], help="training steps; 0: none")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("weights/inception.pt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    images = load_images("cifar10", arguments.data, "train").images
    extractor = InceptionFeatures(arguments.weights, arguments.device)
    spread = images[torch.arange(arguments.images) * len(images) // arguments.images]
    rows = []
    for steps in arguments.denoiser:
        for channels in arguments.channels:
            options = {"channels": channels} if channels < 48 else {}
            texture = build("texture", (3, 32, 32), 8, **options, **({"denoiser": {"steps": steps}} if steps else {}))
            texture.to(arguments.device).fit(images, 0)
            found = figures(texture, spread, extractor)
            rows += [{"channels": channels, "denoiser": steps, **row} for row in found]
            print(markdown(list(rows[0]), rows[-len(found) :]), flush=True)


if __name__ == "__main__":
    main()
