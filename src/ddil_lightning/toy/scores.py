"""What a sampler of the toy is worth: measures in the plane with a known law, one value per member."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ddil_lightning.diffusion.analytic import Mixture
from ddil_lightning.diffusion.denoiser import Denoiser, to_w
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.evaluation.metrics.prdc import density_coverage
from ddil_lightning.evaluation.suite import make_row
from ddil_lightning.imitation.shift import energy_distance
from ddil_lightning.records import Context
from ddil_lightning.toy.problems import Problem, sample

if TYPE_CHECKING:
    from ddil_lightning.training.method import Distillation

Scores = dict[str, list[float]]
"""Values of the members, by measure."""

TEACHER_STEPS = 32
SIGMAS = 4  # a sample within so many standard deviations of a mode of its class counts as of high quality
REAL, NOISE, AGAIN, RENOISE = (k * 1_000_000 for k in range(1, 5))  # what is added to a member's seed for each purpose


class Law(Protocol):
    """What an exam asks of a toy (`toy.Toy`): its law, its teacher and its seeds."""

    problem: Problem
    mixture: Mixture
    seeds: tuple[int, ...]
    schedule: NoiseSchedule
    predicts: Predicts
    about: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The device of the exact teacher."""
        ...

    def network(self) -> Any:
        """The network of the exact teacher, whose outputs are in the space `predicts`."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Context:
        """The context of prompts, which are names of classes."""
        ...

    def null(self) -> Context:
        """The context that names no class: the unconditional branch of guidance."""
        ...


class Exam:
    """Held-out points of the true law and the teacher's samples, against which a toy's samplers are scored.

    `n` samples per member, classes by the law's weights; `g`: guidance of teacher and students; `near`: samples in density, coverage and
    the shift. Every sampler starts from the same noise per member, so differences between students are paired; the teacher's samples
    that a law is compared with come from noise of their own.
    """

    def __init__(self, toy: Law, g: float, n: int = 2000, near: int = 1000, seed: int = 0) -> None:
        self.toy, self.g, self.near = toy, g, min(near, n)
        problem = toy.problem
        generator = torch.Generator().manual_seed(seed)
        # Two draws: with one list of classes for both, the samples would not be independent and every distance biased downwards.
        drawn = torch.multinomial(problem.weights, 2 * n, replacement=True, generator=generator)
        self.classes, self.real_classes = problem.classes[drawn].chunk(2)
        self.seeds = [member + 13 * seed for member in toy.seeds]
        self.real = sample(toy.mixture, self.real_classes, [s + REAL for s in self.seeds])
        self.noise, again = (self._normal(n, offset) for offset in (NOISE, AGAIN))
        teacher = Denoiser(toy.network(), toy.schedule, toy.predicts, null=toy.null())
        fine = Policy(teacher, ddim), Grid.named("trailing", TEACHER_STEPS, toy.schedule.steps)
        self.paired = self._walk(*fine, self.noise, self.classes)[-1]  # the teacher's answer to the students' own noise
        self._fine, self._again = fine, again
        self._reference: dict[tuple[int, ...], list[Tensor]] = {}

    def score(self, policy: Policy, grid: Grid) -> Scores:
        """All measures of one sampler:

        `energy_distance` to the law, `energy_class` (the mean over classes) and `energy_teacher` (to the 32-step teacher under guidance),
        all unbiased; `density`, `coverage`; `mode_kl` = KL(true weights || shares of the modes), large where a mode is lost;
        `high_quality`: share within 4 sd of a mode of its class; `outside`: share beyond the outermost modes by more than 4 sd;
        `teacher_rmse` from the same noise; `shift@t`: energy distance between the latents at node t and the teacher's own there, from
        independent noise, for every node after the first; `shift`: their mean, 0 where there is none.
        """
        states, reference = self._walk(policy, grid, self.noise, self.classes), self.teacher_states(grid)
        times = grid.nodes.tolist()[1:]
        return merge([self._member(m, times, [s[..., m] for s in states], [r[..., m] for r in reference]) for m in range(len(self.seeds))])

    @property
    def protocol(self) -> dict[str, Any]:
        """What a number must be quoted with, in the form of `Suite.protocol`."""
        n = len(self.classes)
        return {
            "n": n,
            "prompts": "classes by the weights of the law",
            "reference": {"source": "points of the true law", "points": n, "near": self.near},
            "resize": None,
            "networks": {},
            "seeds": {"members": self.seeds},
        }

    def teacher_states(self, grid: Grid) -> list[Tensor]:
        """The teacher's latents at the nodes of `grid` after the first and at its end, from noise of its own; made once per grid."""
        key = tuple(grid.times.tolist())
        if key not in self._reference:
            policy = Policy(self._fine[0].denoiser, ddim, fine=self._fine[1])
            self._reference[key] = self._walk(policy, grid, self._again, self.real_classes)
        return self._reference[key]

    def _member(self, m: int, times: list[int], states: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        problem, k = self.toy.problem, self.near
        x, y = states[-1], self.real[..., m]
        classes = [(self.classes == c, self.real_classes == c) for c in range(self.toy.mixture.num_classes)]
        density, coverage = density_coverage(y[:k], x[:k])
        pairs = zip(times, states[:-1], reference[:-1], strict=True)
        shifts = {f"shift@{t}": energy_distance(a[:k], b[:k]) for t, a, b in pairs}
        return {
            "energy_distance": energy_distance(x, y),
            "energy_class": mean([energy_distance(x[i], y[j]) for i, j in classes if min(int(i.sum()), int(j.sum())) >= 4]),
            "energy_teacher": energy_distance(x, reference[-1]),
            "density": density,
            "coverage": coverage,
            "mode_kl": mode_kl(x, problem),
            "high_quality": high_quality(x, self.classes, problem),
            "outside": outside(x, problem),
            "teacher_rmse": float((x - self.paired[..., m]).square().mean().sqrt()),
            "shift": mean(list(shifts.values())) if shifts else 0.0,
            **shifts,
        }

    def context(self, classes: Tensor) -> Context:
        """The guided context of classes [N]."""
        return self.toy.encode_text([self.toy.about["previews"][k] for k in classes.tolist()]).guided(to_w(self.g))

    @torch.no_grad()
    def _walk(self, policy: Policy, grid: Grid, x_T: Tensor, classes: Tensor) -> list[Tensor]:
        c = self.context(classes)
        generator = torch.Generator(self.toy.device).manual_seed(self.seeds[0] + RENOISE)
        return [x.float().cpu() for x in policy.walk(x_T.to(self.toy.device), grid, c, generator)]

    def _normal(self, n: int, offset: int) -> Tensor:
        return torch.stack([torch.randn(n, 2, generator=torch.Generator().manual_seed(s + offset)) for s in self.seeds], 2)


def mode_kl(x: Tensor, problem: Problem) -> float:
    """KL(w || p) of the true weights w and the shares p of points [N, 2] by their nearest mode, with half a point added to each mode."""
    counts = torch.cdist(x, problem.means).argmin(1).bincount(minlength=len(problem.means)).double() + 0.5
    w = problem.weights.double()
    return float((w * (w / (counts / counts.sum())).log()).sum())


def high_quality(x: Tensor, classes: Tensor, problem: Problem) -> float:
    """The share of points [N, 2] that lie within 4 sd of a mode of their class [N]."""
    own = problem.classes == classes[:, None]
    distance = torch.cdist(x, problem.means).masked_fill(~own, torch.inf).amin(1)
    return float((distance < SIGMAS * problem.sd).float().mean())


def outside(x: Tensor, problem: Problem) -> float:
    """The share of points [N, 2] with a coordinate more than 4 sd beyond all modes."""
    low, high = problem.means.amin(0) - SIGMAS * problem.sd, problem.means.amax(0) + SIGMAS * problem.sd
    return float(((x < low) | (x > high)).any(1).float().mean())


def merge(rows: Sequence[dict[str, float]]) -> Scores:
    """The members' dicts of numbers as one dict of lists, an entry a member."""
    return {key: [row[key] for row in rows] for key in rows[0]}


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)


def method_rows(
    method: Distillation,
    teacher_steps: Sequence[int],
    student_steps: Sequence[int],
    n: int = 2000,
    seed: int = 0,
    say: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Rows of results of a method on the toy, teacher@N and student@N, each number the mean over members.

    `n`: samples per member; `seed`: of the exam and its noise. `say` hears of each row before it is measured.
    """
    toy: Any = method.backbone
    exam, rows = Exam(toy, method.deployment.guidance, n=n, seed=seed), []
    c = exam.context(exam.classes)
    wanted = [("teacher", k, method.baseline) for k in teacher_steps] + [("student", k, method.deployment) for k in student_steps]
    for role, steps, deployment in wanted:
        say(f"{role}@{steps}")
        policy, grid = deployment.sampler(steps)
        denoiser = next(m for m in policy.modules() if isinstance(m, Denoiser))
        before, start = denoiser.evaluations, time.perf_counter()
        policy.sample(exam.noise.to(toy.device), grid, c, torch.Generator(toy.device).manual_seed(seed))
        seconds, nfe = (time.perf_counter() - start) / n, round((denoiser.evaluations - before) / n)
        metrics = {key: mean(values) for key, values in exam.score(policy, grid).items()}
        rows.append(make_row(f"{role}@{steps}", steps, exam.g, nfe, seconds, metrics, exam.protocol))
    return rows
