"""Statistics of a batch that enter a loss: two processes with half a batch each weigh as one does with all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.methods import CTM
from ddil_lightning.methods.dmd2 import emphasis
from ddil_lightning.methods.ladd import Ends
from ddil_lightning.records import STUDENT, TEACHER
from ddil_lightning.training.measures import Measures
from ddil_lightning.training.scores import scale
from known import latents, noise
from pair import Pair

N = 8


class Layer(nn.Linear):
    """A network of a layer, which is its last."""

    def last_layer(self) -> Tensor:
        return self.weight


def weights(rows: slice) -> dict[str, Tensor]:
    """What each of these rows of one fixed batch is weighed by, as a process sees it that has them alone."""
    x, real = 3 * noise(N, 2), noise(N, 2, seed=4)
    source = torch.tensor([TEACHER, STUDENT, STUDENT, STUDENT, TEACHER, TEACHER, TEACHER, STUDENT])
    b = latents(x, 999, end=real, source=STUDENT)._replace(source=source, weight=torch.linspace(0.5, 2, N).double())
    part = b._replace(**{name: getattr(b, name)[rows] for name in ("x_t", "end", "source", "weight")})
    found = {"emphasis": emphasis(x[rows, :1], "kl", 2), "LADD's ends": Ends.real(SimpleNamespace(), part)[2]}  # type: ignore[arg-type,index]
    found["normaliser"] = scale(x[rows], real[rows], "batch").expand(len(x[rows]), -1)

    net = Layer(2, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(noise(2, 2, seed=5))
    soft = net(x[rows]).square().mean(1)
    known = torch.arange(N)[rows] < N // 2  # of the second half no row has a term, nor a gradient
    term = torch.where(known, (net(real[rows]) - 1).square().mean(1), 0.0) if bool(known.any()) else torch.zeros(len(known)).double()
    method: Any = SimpleNamespace(student=SimpleNamespace(network=net), measures=Measures())
    found["CTM's terms"] = CTM.as_large(method, soft, term, part)
    return {name: value.detach() for name, value in found.items()}


def half(rank: int) -> dict[str, Tensor]:
    return weights(slice(rank * N // 2, (rank + 1) * N // 2))


def test_two_half_batches_weigh_as_one_whole_batch(pair: Pair) -> None:
    first, second = pair.run(half)
    for name, whole in weights(slice(None)).items():
        torch.testing.assert_close(torch.cat([first[name], second[name]]), whole, msg=lambda text, name=name: f"{name}: {text}")
    alone = half(0)
    assert all(not torch.allclose(alone[name], first[name], rtol=1e-2) for name in alone)


@pytest.mark.parametrize("source", [STUDENT, TEACHER])
def test_ends_of_nobody_have_no_weight(source: int) -> None:
    found = Ends.real(SimpleNamespace(), latents(noise(4), 999, end=noise(4), source=source))  # type: ignore[arg-type]
    assert found is not None and found[2].tolist() == [float(source == TEACHER)] * 4
