"""The student's benchmark numbers while it is trained: what a table says at the end, over student updates."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ddil_lightning.bounds import at_least, lengths, seeds
from ddil_lightning.diffusion.denoiser import evaluating
from ddil_lightning.processes import Processes
from ddil_lightning.runs.finish import Test
from ddil_lightning.training.randomness import undisturbed

if TYPE_CHECKING:
    from ddil_lightning.evaluation.protocols import Protocol
    from ddil_lightning.evaluation.suite import Suite
    from ddil_lightning.feed import Feed

LEAST = 16
"""Prompts without which numbers mean nothing."""


class Validation(Callback):
    """Measures the student on a protocol of `ddil-test` after every `every` updates and after the last.

    Publishes validation/KEY_STEPS, such as validation/frechet_4: for the loggers, for `Alerts` (of a coverage that falls), for a prior that
    is `GatedBy` one, and for `checkpoints.best`. The prompts and their noise are the same ones every time, and others than those of the
    test at the end where the seed is another: a checkpoint that is chosen by these numbers is not flattered by those. Several processes
    share the images; of a student that fsdp2 has split each draws all of them, for it answers all processes together.

    Args:
        every: student updates between two measurements.
        n: prompts, at least 16; null for as many as the protocol has.
        steps: of the student's sampler; null for those that the student of the present stage is made for.
        protocol: a packaged one by its name, or a YAML file; null for the built-in data that the pipeline was trained on.
        data: where the protocol's files lie, a folder or a file of captions, as for `ddil-test --data`.
        images: the folder of the images that the captions name, if it is not below `data`.
        metrics: keys of the numbers; null for those of the protocol, else for those that tables show. Those of diversity and mode coverage
            draw more images.
        seed: of the noise; of built-in data of the prompts, too.
    """

    def __init__(
        self,
        every: int = 500,
        n: int | None = 256,
        steps: list[int] | None = None,
        protocol: str | None = None,
        data: str | None = None,
        images: str | None = None,
        metrics: list[str] | None = None,
        seed: int = 1,
    ) -> None:
        at_least(1, every=every, steps=steps)
        at_least(LEAST, n=n)
        lengths(steps=steps, metrics=metrics)
        seeds(seed=seed)
        if protocol is None and (data is not None or images is not None):
            raise ValueError("Validation: data and images are where a protocol's files lie: give the protocol, too")
        self.every, self.n, self.steps, self.seed = every, n, steps, seed
        self.protocol, self.data, self.images, self.metrics = protocol, data, images, metrics
        self._suite: Suite | None = None
        self._processes = Processes()
        self._measured: int | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the prompts, for runs that are not started by ddil-fit, which does so earlier."""
        if stage == "fit":
            self.check(pl_module.backbone, pl_module.feed)

    def check(self, backbone: Any, feed: Feed) -> None:
        """Raises ValueError or Refusal for what can be known without real images.

        That is a protocol that is none, files that are not there, a key that is no metric's, too few prompts, and one that would be cut,
        unless `feed` cuts its captions too.
        """
        from ddil_lightning.evaluation.captioned import choice, read_set
        from ddil_lightning.evaluation.protocols import BUILTIN
        from ddil_lightning.evaluation.registry import wanted

        if backbone.samples == "points":
            return
        made, _ = self.asked(backbone)
        wanted(made.metrics)
        if made.prompts.source not in BUILTIN:
            prompts = choice(read_set(made.prompts, there=False), made.prompts).prompts
            if len(prompts) < LEAST:
                raise ValueError(f"Validation: the protocol {made.name} has {len(prompts)} prompts, and {LEAST} are the least")
            if not feed.truncate:
                backbone.check_length(prompts)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the real images, the first process before the others, which find its statistics.

        Raises ValueError on all of them for what cannot be measured. What is due at the clock that a run goes on from was measured before
        the stop.
        """
        self._measured, together = pl_module.student_updates, Processes(trainer)
        if pl_module.backbone.samples != "points":
            self._suite = None
            together.by_first(lambda: self._look(pl_module))
            if not together.first:
                self._look(pl_module)
        self._processes = Processes() if pl_module.shards.split else together

    def _look(self, method: Any) -> None:
        self._suite = self.suite(method)

    def asked(self, backbone: Any) -> tuple[Protocol, dict[str, Any]]:
        """The protocol with its files in their places, and what of it is not its own. Raises ValueError or Refusal where there is none."""
        from ddil_lightning.evaluation.placing import named_protocol, placed
        from ddil_lightning.evaluation.protocols import BUILTIN, PromptSource, Protocol

        own = backbone.about.get("dataset")
        if self.protocol is None and own is None:
            raise ValueError(f"Validation: the pipeline {backbone.path} names no data set: give a protocol, a packaged one or a YAML file")
        made = Protocol(PromptSource(str(own))) if self.protocol is None else named_protocol(self.protocol)
        made, changed = made.differing(self.n, self.seed)
        if made.prompts.source not in BUILTIN:
            made = placed(made, self.data, self.images)
        elif self.data is not None or self.images is not None:
            raise ValueError(f"Validation: {made.prompts.source} has its own images: leave data and images out")
        return replace(made, metrics=self.metrics or made.metrics), changed

    def suite(self, method: Any) -> Suite:
        """What the student is measured by. Raises ValueError where it cannot be."""
        from ddil_lightning.evaluation.suite import Suite

        backbone, (made, changed) = method.backbone, self.asked(method.backbone)
        suite = Suite.of(made, device=method.device, changed=changed).for_pipeline(backbone)
        if made.metrics is None:
            suite = replace(suite, asked=[c.key for metric in suite.measured() for c in metric.columns if c.shown])
        suite.measured()  # raises for what cannot be measured
        return suite

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure what is due and publish it. All processes sample together."""
        clock = pl_module.student_updates
        if clock == self._measured or (clock % self.every and clock < pl_module.updates) or clock == 0:
            return
        self._measured, begun = clock, time.perf_counter()
        network = pl_module.deployment.network
        with torch.no_grad(), undisturbed(pl_module.device), trainer.precision_plugin.forward_context(), evaluating(network):
            found = dict(self.measure(pl_module))
        values = {f"validation/{key}_{n}": value for n, numbers in found.items() for key, value in numbers.items()}
        pl_module.measures.publish(clock, values)
        if trainer.is_global_zero:
            print(f"validation after {clock} updates, {time.perf_counter() - begun:.0f} s: {told(found)}", flush=True)

    @property
    def of(self) -> str:
        """What is measured, in words: two numbers of one key can be compared where these are the same."""
        return f"{self.protocol or 'the data of the pipeline'}, n {self.n}, seed {self.seed}, data {self.data}"

    def measure(self, method: Any) -> Iterator[tuple[int, dict[str, float]]]:
        """(steps, numbers) of the present student, those of the suite that it is measured by or, of points, of their own law."""
        from ddil_lightning.evaluation.rows import policy_source

        deployment = method.deployment
        for n in self.steps or deployment.steps:
            if self._suite is None:
                row = method.backbone.measured(method, Test(self.n or 256, [], [n], self.seed), lambda name: None)[0]["metrics"]
            else:
                policy, grid = deployment.sampler(n)
                source = policy_source(method.backbone, f"student@{n}", policy, grid, deployment.quoted)
                row = self._suite.score(source.sample, self._processes)
            asked = self.metrics if self._suite is None else self._suite.asked
            yield n, {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and (asked is None or k in asked)}


def told(found: Mapping[int, Mapping[str, float]]) -> str:
    """The numbers that say most, of every step count, in words."""
    from ddil_lightning.evaluation.columns import POINTS, number
    from ddil_lightning.evaluation.registry import columns

    main = {c.key: c.short or c.label for c in columns() if c.headline} | {POINTS[0].key: POINTS[0].label}
    said = []
    for n, numbers in found.items():
        chosen = [key for key in numbers if key in main] or list(numbers)[:2]
        values = ", ".join(f"{main.get(key, key)} {number(numbers[key])}" for key in chosen)
        said.append(f"{n} step{'s' * (n > 1)}: {values}")
    return "; ".join(said)
