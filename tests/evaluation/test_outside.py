"""Our distances against the packages that papers take them from, on the same rows and pictures: prdc, clean-fid, torch-fidelity."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import cleanfid.fid
import cleanfid.resize
import numpy as np
import prdc
import pytest
import scipy.linalg
import torch
from torch_fidelity import metric_fid, metric_kid

from ddil_lightning.diffusion.gaussians import frechet_distance, moments
from ddil_lightning.evaluation.kernels import cubic, squared_mmd
from ddil_lightning.evaluation.metrics.prdc import density_coverage, precision_recall
from ddil_lightning.evaluation.networks.inception import clean


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Real and generated features, unequal in number, not centred and of correlated columns."""
    draw = torch.Generator().manual_seed(5)
    mix = torch.randn(12, 12, generator=draw) / 3
    real = torch.randn(160, 12, generator=draw) @ mix + 2
    return real.double(), (torch.randn(120, 12, generator=draw) @ mix * 1.1 + 2.1).double()


def test_precision_recall_density_and_coverage_are_prdc_s(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    real, fake = rows
    with redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(real_features=real.numpy(), fake_features=fake.numpy(), nearest_k=5)
    ours = dict(
        zip(("precision", "recall", "density", "coverage"), (*precision_recall(real, fake), *density_coverage(real, fake)), strict=True)
    )
    assert ours == pytest.approx(theirs) and 0 < theirs["recall"] < 1 and 0 < theirs["coverage"] < 1


def test_the_frechet_distance_is_clean_fid_s_and_torch_fidelity_s(
    rows: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scipy.linalg.sqrtm
    # clean-fid 0.1.35 asks scipy for an error estimate beside the root, which scipy from 1.18 on does not give
    monkeypatch.setattr(cleanfid.fid.linalg, "sqrtm", lambda matrix, disp=True: root(matrix) if disp else (root(matrix), 0.0))
    ours = frechet_distance(*rows)
    (mean, covariance), (mean_, covariance_) = ((m.numpy() for m in moments(x)) for x in rows)
    assert ours == pytest.approx(float(cleanfid.fid.frechet_distance(mean, covariance, mean_, covariance_)), rel=1e-6)
    theirs = metric_fid.fid_statistics_to_metric(*(metric_fid.fid_features_to_statistics(x) for x in rows), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6) and ours > 0.05


def test_the_kernel_distance_is_the_mean_of_clean_fid_s_and_torch_fidelity_s_subsets(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A subset as large as both sets is the sets, in another order."""
    real, fake = rows[0][:120], rows[1]
    ours = squared_mmd(cubic, real, fake)
    assert ours == pytest.approx(cleanfid.fid.kernel_distance(real.numpy(), fake.numpy(), num_subsets=2, max_subset_size=120), rel=1e-9)
    theirs = metric_kid.kid_features_to_metric(real, fake, kid_subsets=2, kid_subset_size=120, verbose=False)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6) and ours > 0.01
    few = metric_kid.kid_features_to_metric(real, fake, kid_subsets=400, kid_subset_size=30, verbose=False)
    spread = few["kernel_inception_distance_std"] / 400**0.5
    assert ours == pytest.approx(few["kernel_inception_distance_mean"], abs=4 * spread)


@pytest.mark.parametrize("side", [64, 299, 330])
def test_the_clean_resize_is_clean_fid_s(side: int) -> None:
    """Pillow on each channel, as float: of smaller and of larger pictures."""
    resize = cleanfid.resize.build_resizer("clean")
    levels = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)
    theirs = torch.from_numpy(np.stack([resize(x.permute(1, 2, 0).numpy()) for x in levels])).permute(0, 3, 1, 2)
    torch.testing.assert_close(clean(levels), theirs, atol=0.01, rtol=0)
