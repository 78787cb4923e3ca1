"""What noise in texture's latents costs: no loss without noise, more with more, and exactly the noise's error."""

import math

import pytest
import torch

from bench.experiments.texture_noise import figures
from fastasync.evaluation import ClassifierFeatures
from fastasync.representations import Classifier, build


def test_noise_costs_what_it_should():
    images = torch.randint(60, 190, (300, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(0)
    model = Classifier((3, 16, 16), 10, (16, 16), 8).requires_grad_(False).eval()
    extractor = ClassifierFeatures(model, "features", torch.device("cpu"))
    rows = figures(build("texture", (3, 16, 16), 8), images, extractor, (0.0, 0.1, 0.3))
    assert rows[0]["FID"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["PSNR"] == math.inf
    assert rows[0]["FID"] < rows[1]["FID"] < rows[2]["FID"]
    # uniform pixels of 130 values: variance 130^2 / 12; rounding adds 1 / 12
    expected = 10 * math.log10(255**2 / (0.01 * 130**2 / 12 + 1 / 12))
    assert rows[1]["PSNR"] == pytest.approx(expected, abs=0.1)
