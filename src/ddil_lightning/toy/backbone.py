"""The toy as a `Backbone`: exact teacher, students that start from it, classes as prompts, and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.network import Network
from ddil_lightning.bounds import above, seeds, within
from ddil_lightning.data.captions import Captions
from ddil_lightning.diffusion.analytic import Mixture
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import Context
from ddil_lightning.toy.networks import Ensemble, Exact
from ddil_lightning.toy.problems import PROBLEMS, sample

PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 800, 256, 3e-3


class Toy(Backbone):
    """A problem of PROBLEMS as a pipeline: its exact teacher, students, prompts "class 0", "class 1", ..., and data.

    A student starts from the exact unguided teacher, as far as an MLP learns it in 800 steps.

    Args:
        problem: a name of PROBLEMS: points in the plane with known classes and modes.
        scale: of the problem, in units of the prior's standard deviation.
        members: seeds trained at once, `seed`, `seed` + 1, ...
        guidance: what the pipeline recommends.
        width: of the students' MLPs, in units of a layer.
        depth: of the students' MLPs, in hidden layers.
        size: points of every member's data set.
        seed: the first member's, by default the run's.
    """

    samples = "points"

    def __init__(
        self,
        problem: str = "ring8c",
        scale: float = 2.0,
        members: int = 3,
        guidance: float = 3.0,
        width: int = 48,
        depth: int = 3,
        size: int = 16384,
        seed: int | None = None,
    ) -> None:
        if problem not in PROBLEMS:
            raise ValueError(f"no toy problem is called {problem!r}: known are {', '.join(PROBLEMS)}")
        within(1, 10_000, members=members, width=width)
        within(1, 100, depth=depth)
        within(1, 10**8, size=size)
        within(0, 1000, guidance=guidance)
        above(0, scale=scale)
        seeds(seed=seed)
        first = torch.initial_seed() % 2**31 if seed is None else seed
        self.seeds = tuple(range(first, first + members))
        self.problem, schedule = PROBLEMS[problem](scale), NoiseSchedule.scaled_linear()
        self.mixture = Mixture(self.problem.weights, self.problem.means, self.problem.sd, self.problem.classes, schedule)
        self.exact = Exact(self.mixture, schedule).requires_grad_(False).eval()
        about = {"guidance": guidance, "previews": [f"class {k}" for k in range(self.mixture.num_classes)]}
        super().__init__(f"toy2d/{problem}", schedule, "v", (2, members), about)
        self._shape, self._size = (problem, scale, width, depth), size

    def parts(self) -> list[nn.Module]:
        """The exact teacher alone, for the toy has no encoders."""
        return [self.exact]

    def to(self, device: torch.device) -> Toy:
        """The toy itself, after the exact teacher has been moved to `device`."""
        self.exact.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the exact teacher."""
        return self.mixture.means.device

    @property
    def captions(self) -> Captions:
        """The data set of all members, drawn anew at every call and always the same."""
        return Points(self, self._size)

    def network(self) -> Network:
        """The network of the exact teacher: the posterior mean of the mixture, as v."""
        return self.exact

    def trainable(self, w_conditioned: bool = False, name: str = "student", s_conditioned: bool = False) -> Network:
        """A trainable ensemble whose members start as MLPs that have learned the exact unguided teacher."""
        made = self.ensemble(w_conditioned, s_conditioned)
        made.load_state_dict(_pretrained(self.seeds, *self._shape), strict=False)
        return made.requires_grad_(True).train()

    def head(self, layers: Sequence[str] = (), name: str = "teacher") -> nn.Module:
        """A discriminator's head on the critic's hidden layers, by default the last."""
        return self.ensemble().head(layers)

    def ensemble(self, w_conditioned: bool = False, s_conditioned: bool = False) -> Ensemble:
        """MLPs of the students' shape with random weights."""
        _, _, width, depth = self._shape
        law = (self.mixture.num_classes, self.problem.second_moment, self.schedule)
        return Ensemble(self.seeds, *law, width, depth, w_conditioned, s_conditioned)

    def encode_text(self, prompts: Sequence[str], truncate: bool = False, sizes: Tensor | None = None) -> Context:
        """One-hot classes of the prompts "class 0" ..., and zeros for the empty prompt. Raises ValueError for another prompt."""
        names = ["", *self.about["previews"]]
        unknown = [p for p in prompts if p not in names]
        if unknown:
            raise ValueError(f"the toy has the prompts {', '.join(names[1:])} and the empty one, not {unknown[0]!r}")
        rows = torch.tensor([names.index(p) for p in prompts], device=self.device)
        return Context(F.one_hot(rows, len(names))[:, None, 1:].float())

    def encoders(self) -> str:
        """The problem's name and shape, since nothing else makes its latents and contexts."""
        return f"{self.path} {self._shape}"

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises nothing: a prompt of the toy names a class, and none is too long."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """The points [B, 2, S] themselves, on the toy's device: they are their own latents."""
        return pixels.to(self.device)

    def decode(self, latents: Tensor, gradients: bool = False) -> Tensor:
        """Raises ValueError in any case, since points are no pictures."""
        raise ValueError("the toy's samples are points, not images: set previews.every to 0, and give no loss of images")

    def measured(self, method: Any, test: Any, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Rows of results against the toy's own law (`toy.scores`), for its points need no suite."""
        from ddil_lightning.toy.scores import method_rows

        return method_rows(method, test.teacher_steps, test.student_steps or method.deployment.steps, test.n, test.seed, say)


class Points(Captions):
    """`n` classes, drawn by the problem's weights and common to all members, and every member's own points of these classes."""

    def __init__(self, toy: Toy, n: int) -> None:
        problem, generator = toy.problem, torch.Generator().manual_seed(toy.seeds[0])
        self._names = toy.about["previews"]
        self.classes = problem.classes[torch.multinomial(problem.weights, n, replacement=True, generator=generator)]
        self.points = sample(toy.mixture, self.classes, [seed + 7_000_000 for seed in toy.seeds])

    def __len__(self) -> int:
        return len(self.points)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The classes of the rows `index`."""
        return [self._names[k] for k in self.classes[list(index)].tolist()]

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The points of the rows `index`, [B, 2, S]."""
        return self.points[list(index)]


@lru_cache(maxsize=8)
def _pretrained(seeds: tuple[int, ...], problem: str, scale: float, width: int, depth: int) -> dict[str, Tensor]:
    """The members' common start: Adam on |v - v_exact|^2 / E v^2 over all times, unguided. Depends on each member's seed alone."""
    toy = Toy(problem, scale, len(seeds), width=width, depth=depth, size=1, seed=seeds[0])
    network = toy.ensemble()
    adam = torch.optim.Adam(network.parameters(), lr=PRETRAIN_LR, fused=True)
    shared = torch.Generator().manual_seed(11)  # times and classes: the same for every member, and for every group of members
    own = [torch.Generator().manual_seed(seed + 9_000_000) for seed in seeds]
    chunk = 50  # steps whose data are made in one go
    for step in range(PRETRAIN_STEPS):
        if step % chunk == 0:
            batches = _unguided(toy, chunk * PRETRAIN_BATCH, shared, own)
        x_t, t, c, v = (x[step % chunk :: chunk] for x in batches)
        error = (network(x_t, t, Context(c)) - v) / network.scales[t, 1].view(-1, 1, 1)
        for group in adam.param_groups:
            group["lr"] = PRETRAIN_LR * (1 - step / PRETRAIN_STEPS)
        adam.zero_grad()
        error.square().mean((0, 1)).sum().backward()
        adam.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


def _unguided(toy: Toy, n: int, shared: torch.Generator, own: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t [n, 2, S], t [n], classes [n, 1, C], exact v [n, 2, S]) at uniform times."""
    problem, schedule = toy.problem, toy.schedule
    t = torch.randint(schedule.steps, (n,), generator=shared)
    mode = torch.multinomial(problem.weights, n, replacement=True, generator=shared)
    noise = torch.stack([torch.randn(2, n, 2, generator=g) for g in own], 3)
    x_t = schedule.add_noise(problem.means[mode][..., None] + problem.sd * noise[0], noise[1], t)
    c = F.one_hot(problem.classes[mode], toy.mixture.num_classes)[:, None].float()
    return x_t, t, c, toy.exact(x_t, t, Context(c))
