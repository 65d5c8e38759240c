"""What ddil-probe measures: a student against its teacher at every node, and both of them mixed (appendix E; METHODS 6)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.samplers import context_of
from ddil_lightning.counting import counted
from ddil_lightning.data.raw import digest
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.evaluation.findings import Findings
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.paired import every, grouped
from ddil_lightning.evaluation.rows import provenance
from ddil_lightning.evaluation.suite import Probes, Suite
from ddil_lightning.imitation.gaps import Seen, nodes, see
from ddil_lightning.imitation.mixing import Actor, Actors, Bernoulli, Mixing, Switch, mix_all
from ddil_lightning.runs.trends import trends

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""The teacher's probabilities in the sweep."""

ASKED = 32
"""Samples of which losses and recovery are measured, for which the teacher walks from every node: means of many numbers each."""


@dataclass(frozen=True, eq=False)
class Contest:
    """A student and its teacher on the student's nodes. `scales`: the guidance_scale of each; both read prompts by their own encoders."""

    student: Pipeline
    teacher: Pipeline
    policies: Policies
    grid: Grid
    scales: tuple[float, float]

    @cached_property
    def question(self) -> dict[str, Any]:
        """All that latents of the two depend on besides prompts, noise and who acts when."""
        times, substeps = self.grid.times.tolist(), self.policies.teacher.substeps  # type: ignore[union-attr]
        student, teacher = provenance(self.student, len(self.grid), self.scales[0]), provenance(self.teacher, substeps, self.scales[1])
        said = {"times": times, "substeps": substeps, "scales": self.scales, "dtype": str(self.student.dtype)}
        return said | {"student": student["digest"], "teacher": teacher["digest"]}

    def actors(self, prompts: Sequence[str]) -> Actors:
        """Both, and what they are told of the prompts."""
        teacher: Policy = self.policies.teacher  # type: ignore[assignment]
        return Actors(
            Actor(self.policies.student, context_of(self.student, prompts, self.scales[0])),
            Actor(teacher, context_of(self.teacher, prompts, self.scales[1])),
        )

    def parts(self, n: int) -> Iterator[slice]:
        """Batches of `n` samples, smaller the larger their latents are."""
        size = sampling.batch(self.student.latent_shape)
        return (slice(i, min(i + size, n)) for i in range(0, n, size))

    def forward(self, pictures: Callable[[int], Iterator[Tensor]]) -> Tensor:
        """The teacher's latents [N, C, h, w] of pictures, on the CPU. `pictures`: of a number B, [B, 3, H, W] in [-1, 1] at a time.

        So many are in memory, and all are read before anything is sampled.
        """
        size = sampling.batch(self.student.latent_shape)
        return torch.cat([self.teacher.encode_images(part).cpu() for part in pictures(size)])

    def mixed(
        self, prompts: Sequence[str], mixings: Sequence[Mixing], seed: int, findings: Findings, seen: Sequence[Seen] = ()
    ) -> Generator[Tensor, None, None]:
        """Final latents [K, B, C, h, w] of K mixtures of the two, on the CPU, by parts, each kept in `findings` as it comes.

        `seen`: by part, where the teacher has walked.
        """
        parts = list(self.parts(len(prompts)))
        for i, part in enumerate(counted(parts, len(parts), "sweeps")):
            own, first = list(prompts[part]), seed + part.start
            question = {**self.question, "mixings": [repr(mixing) for mixing in mixings], "prompts": own, "seed": first}
            yield findings.tensor(question, partial(self._mix, own, mixings, first, seen[i].teacher if seen else None))

    def _mix(self, prompts: Sequence[str], mixings: Sequence[Mixing], seed: int, walk: Mapping[int, Tensor] | None) -> Tensor:
        return mix_all(self.actors(prompts), mixings, self.grid, self.student.latent_shape, seed, walk).cpu()

    def costs(self, prompt: str) -> Tensor:
        """[2, N] network evaluations of a sample in every interval, of the teacher and of the student: counted on one."""
        actors, found = self.actors([prompt]), torch.zeros(2, len(self.grid))
        x, times = torch.zeros(1, *self.student.latent_shape, device=self.student.device), self.grid.times.tolist()
        for k, (policy, c) in enumerate((actors.teacher, actors.student)):
            denoiser = next(m for m in policy.modules() if isinstance(m, Denoiser))
            for j in range(len(self.grid)):
                before = denoiser.evaluations
                with torch.no_grad():
                    policy(x, times[j], times[j + 1], c)
                found[k, j] = denoiser.evaluations - before
        return found


def probed(contest: Contest, prompts: Sequence[str], data: Tensor | None, seed: int) -> list[Seen]:
    """What `gaps.nodes` makes its rows of, by parts. `data`: latents [N, C, h, w] of the prompts' pictures, for forward latents.

    The teacher's noise is that of the sweeps, the student's another, so that the two sets are independent.
    """
    n, shape, seen = len(prompts), contest.student.latent_shape, []
    parts = list(contest.parts(n))
    for part in counted(parts, len(parts), "nodes"):
        latents = None if data is None else data[part].to(contest.teacher.device)
        own = part.start + seed
        asked = max(0, min(part.stop, ASKED) - part.start)
        found = see(contest.actors(prompts[part]), contest.grid, shape, (own + n, own, own + 2 * n), latents, asked)
        seen.append(found._replace(student=_cpu(found.student), teacher=_cpu(found.teacher), forward=_cpu(found.forward)))
    return seen


def noded(
    contest: Contest, prompts: Sequence[str], data: Tensor | None, seed: int, findings: Findings
) -> tuple[list[Seen], list[dict[str, Any]]]:
    """What `probed` sees, and the rows of the nodes. A call that goes on has the rows from `findings`, and has seen nothing."""
    seen: list[Seen] = []

    def make() -> list[dict[str, Any]]:
        seen.extend(probed(contest, prompts, data, seed))
        return nodes(seen, contest.grid)

    content = None if data is None else digest([data.contiguous().numpy().tobytes()])
    said = {"prompts": list(prompts), "seed": seed, "data": content, "asked": ASKED}
    rows: list[dict[str, Any]] = findings.answer({**contest.question, "nodes": said}, make)
    return seen, rows


def _cpu(latents: dict[int, Tensor]) -> dict[int, Tensor]:
    return {t: x.cpu() for t, x in latents.items()}


class Window:
    """Latents of K mixtures that come by `parts` [K, B, ...], of which no more is held than is being asked for."""

    def __init__(self, parts: Iterator[Tensor]) -> None:
        self.parts, self.start, self.held = parts, 0, next(parts)

    def __call__(self, k: int, start: int, n: int) -> Tensor:
        """[n, ...] of the mixture `k` from number `start` on. What lies before is forgotten: the others are asked for no less."""
        self.held, self.start = self.held[:, start - self.start :], start
        while self.held.shape[1] < n:
            self.held = torch.cat([self.held, next(self.parts)], 1)
        return self.held[k, :n]


def swept(contest: Contest, suite: Suite, parts: Sequence[str], findings: Findings, seen: Sequence[Seen] = ()) -> dict[str, Any]:
    """The rows of the sweeps among `parts`: `mixing` over the teacher's probability, `switch` over the inner nodes, in both orders.

    `trends` are what is said of them, by sweep. `seen`: what `probed` has found of these prompts.
    """
    suite = replace(suite, probes=Probes())  # one image a prompt, as the paper's tables have it
    asked: list[tuple[str, dict[str, Any], Mixing]] = []
    if "mixing" in parts:
        asked += [("mixing", {"p_teacher": p}, Bernoulli(p)) for p in SHARES]
    if "switch" in parts:
        inner = contest.grid.nodes.tolist()[1:]
        asked += [("switch", {"first": who, "at": t}, Switch(who, t)) for who in ("teacher", "student") for t in inner]  # type: ignore[arg-type]
    rows: dict[str, list[dict[str, Any]]] = {"mixing": [], "switch": []}
    if not asked:  # a student of one step has no node to switch at
        return rows | {"trends": trends([], [])}
    values: list[dict[str, Tensor]] = []
    groups: list[Tensor | None] = []

    def look(metrics: Sequence[Metric]) -> None:
        values.append(every(metrics))
        groups.append(grouped(metrics))

    with closing(contest.mixed(suite.prompts, [mixing for *_, mixing in asked], suite.seed, findings, seen)) as latents:
        window = Window(latents)

        def sample(k: int, prompts: list[str], seed: int) -> Tensor:
            made = window(k, seed - suite.seed, len(prompts))  # the suite's seed of a batch is that of its first prompt
            return sampling.decoded(contest.teacher, made.to(contest.teacher.device))

        samplers = [partial(sample, k) for k in range(len(asked))]
        found = suite.score_all(samplers, look=look)
    costs = contest.costs(suite.prompts[0])
    for (sweep, said, mixing), metrics in zip(asked, found, strict=True):
        measured = {key: value for key, value in metrics.items() if value is not None}
        by_student = mixing.by_student(contest.grid, len(suite.prompts), suite.seed).float().mean(0)
        nfe = round(float(((1 - by_student) * costs[0] + by_student * costs[1]).sum()), 1)
        rows[sweep].append({**said, "nfe": nfe, "metrics": measured})
    return rows | {"trends": trends([*rows["mixing"], *rows["switch"]], values, groups[0])}
