"""Mistakes in a method of one's own that would pass in silence, or end far from where they were made: each is named."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning.callbacks import AnnealPrior, Checkpoints
from ddil_lightning.callbacks.stages import staged
from ddil_lightning.commands.checks import cautions, check_steps
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import encode
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.transitions import Transition, ddim, renoise
from ddil_lightning.errors import one_line
from ddil_lightning.feed import Wants, unmoved
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.prior import Piecewise, SamplingPrior
from ddil_lightning.records import LatentBatch
from ddil_lightning.runs.checkpoint import check_readable
from ddil_lightning.streams import Streams
from ddil_lightning.toy import Toy
from ddil_lightning.training import completeness
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.optimisation import Optimizer
from ddil_lightning.training.plan import Stage
from suite import BY_NAME, FORWARD, MIXED, Run, StopAt, build, equal, fit


class Own(Distillation):
    """A student that follows its teacher, and a critic that follows the student in every batch, with an optimiser each."""

    takes_turns = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        student = self.role("student")
        self.grid = Grid.named("trailing", 4)
        self.cast(student=student, critic=self.role("critic"), former=student.copied("former"), teacher=self.role("teacher"))
        self.policies = Policies(Policy(self.student, renoise), Policy(self.teacher))

    def configure_optimizers(self) -> Any:
        return [self.optimizer_of(self.student.weights(), self.lr), self.optimizer_of(self.critic.weights(), self.lr)]

    def training_step(self, b: LatentBatch, i: int) -> None:
        student, critic = self.optimizers()
        x = self.student(b.x_t, b.t, b.c).x0
        if self.descend(student, self.feedback(b, self.loss(b, x))):
            self.advance()
        self.follow(critic, b, x.detach())

    def loss(self, b: LatentBatch, x: Tensor) -> Tensor:
        return mse(x, self.teacher(b.x_t, b.t, b.c).x0.detach())

    def follow(self, critic: Any, b: LatentBatch, x: Tensor) -> None:
        y, eps = self.noised(x)
        self.descend(critic, mse(self.critic(y, b.t, b.c).eps, eps).mean(), "critic_loss")

    def noised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g = Streams(self.feed.seed, self.student_updates).local("noise", x.device)
        eps = torch.randn(x.shape, generator=g, device=x.device)
        return 0.7 * x + 0.7 * eps, eps

    def deploy(self, student: Any) -> Deployment:
        return Deployment(Policy(student, renoise), partial(Grid.named, "trailing"), (4,), self.eval_guidance)


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy(members=1, width=8, size=64)


def trained(kind: type[Own], toy: Toy, prior: Any = FORWARD, updates: int = 2, data: Any = None, **kwargs: Any) -> Run:
    """`kind` on the toy in float32 for so many updates, always from the same weights."""
    torch.manual_seed(1)
    method = kind(**{"pipeline": toy, "updates": updates, "optimizer": Optimizer(lr=1e-2), "log_every": 1} | kwargs)
    return fit(method, data or DDILDataModule(encode(toy.captions, toy), prior, batch_size=4))


# What never learns --------------------------------------------------------------------------------------------------------------------


class OneOptimiser(Own):
    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self.student.weights(), self.lr)


class FrozenOptimiser(Own):
    def configure_optimizers(self) -> Any:
        return [self.optimizer_of(self.student.weights(), self.lr), self.optimizer_of(self.former.weights(), self.lr)]


class Unheard(Own):
    def follow(self, critic: Any, b: LatentBatch, x: Tensor) -> None:
        with torch.no_grad():
            self.critic(x, b.t, b.c)
        self.descend(critic, mse(self.student(b.x_t, b.t, b.c).x0, x + 1).mean(), "critic_loss")


class Detached(Own):
    def follow(self, critic: Any, b: LatentBatch, x: Tensor) -> None:
        self.descend(critic, mse(self.critic(x, b.t, b.c).x0.detach(), x).mean(), "critic_loss")


class Beside(Own):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vision = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OneOptimiser, "^OneOptimiser's critic has trained weights that no optimiser moves"),
        (Beside, "^Beside's vision has trained weights that no optimiser moves"),
        (FrozenOptimiser, "^an optimiser was asked for without any weights to move"),
        (Unheard, "^the critic_loss of Unheard reaches none of the weights that its optimiser moves"),
        (Detached, "^Detached's critic_loss hangs on no trained weights"),
    ],
)
def test_what_would_never_learn_is_named(kind: type[Own], said: str, toy: Toy) -> None:
    with pytest.raises(ValueError, match=said):
        trained(kind, toy)
    assert trained(Own, toy).method.student_updates == 2


class ByItself(Own):
    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.student.parameters()), super().configure_optimizers()[1]]


class Scheduled(Own):
    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        return made, [torch.optim.lr_scheduler.ConstantLR(made[0])]

    def advance(self) -> None:
        super().advance()
        self.lr_schedulers().step()


class Attached(Own):
    def follow(self, critic: Any, b: LatentBatch, x: Tensor) -> None:
        super().follow(critic, b, self.held)

    def loss(self, b: LatentBatch, x: Tensor) -> Tensor:
        self.held = x
        return super().loss(b, x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ByItself, r"^ByItself.configure_optimizers makes its Adam by itself, .*: use self.optimizer_of\(parameters, lr\), which"),
        (Attached, r"^the critic_loss of Attached hangs on the graph of a loss that was descended before it: hand it x.detach\(\)"),
    ],
)
def test_optimisers_and_graphs_of_ones_own(kind: type[Own], said: str, toy: Toy) -> None:
    """They ended in a KeyError, and in a sentence of torch's about retain_graph."""
    with pytest.raises(ValueError, match=said):
        trained(kind, toy)


def test_schedulers_of_ones_own_are_told_who_sets_the_rate(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    """Those that a method steps itself, too: each update has the rate of the clock."""
    with caplog.at_level(logging.WARNING):
        assert trained(Scheduled, toy).method.student_updates == 2
    assert sum("Scheduled.configure_optimizers returns learning-rate schedulers, whose rates hold" in said for said in caplog.messages) == 1


# How it is deployed --------------------------------------------------------------------------------------------------------------------


class Undeployed(Own):
    def deploy(self, student: Any) -> Any:
        """As if `return` had been forgotten."""


@pytest.mark.parametrize("steps", [4, (), (0,), ("4",)])
def test_how_a_student_is_deployed_is_said_in_full(steps: Any, toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"^Undeployed.deploy\(student\) returns None: it returns a Deployment$"):
        check_steps(Undeployed(pipeline=toy), CONFIG)
    with pytest.raises(ValueError, match=r"^Deployment takes the step counts .* as a tuple, such as \(4,\) or \(4, 2\), not"):
        replace(Own(pipeline=toy).deployment, steps=steps)


@dataclass(frozen=True)
class Halfway(Transition):
    """Half the noise of x_t, half fresh noise: a sampler of one's own."""

    def __call__(self, schedule: Any, x_t: Tensor, p: Any, t: Tensor, s: Tensor, generator: Any = None) -> Tensor:
        return schedule.add_noise(p.x0, (p.eps + torch.randn(p.eps.shape)) / 2**0.5, s)


def test_a_sampler_of_ones_own_is_told_the_way_out(tiny: Path) -> None:
    """Which is one: with DDIM's scheduler and `without` there is something to export, which says what it does."""
    method = build(BY_NAME["lcm-fixed-guidance"], tiny)
    own, near = (Policy(method.deployment.denoiser, transition) for transition in (Halfway(), ddim))
    scheduler = partial(method.backbone.scheduler, own.transition, "eps", "trailing", 4)
    said = r"a sampler of your own is exported with another's scheduler, as Deployment\(.*\).without\(Policy\(student, ddim\), 'what"
    grid = partial(Grid.named, "trailing", total=method.student.schedule.steps)
    for made in (scheduler, None):
        with pytest.raises(ValueError, match=said):
            Deployment(own, grid, (4,), 2.0, made).made_scheduler(4)
    scheduler = partial(method.backbone.scheduler, ddim, "eps", "trailing", 4)
    deployment = Deployment(own, grid, (4,), 2.0, scheduler).without(near, "It steps as DDIM.")
    assert type(deployment.made_scheduler(4)).__name__ == "DDIMScheduler" and deployment.exported.policy is near


# Gradients of another loss -------------------------------------------------------------------------------------------------------------


class Leaking(Own):
    """Both losses reach the other's network as well, by terms that move no weight of their own optimiser's."""

    def loss(self, b: LatentBatch, x: Tensor) -> Tensor:
        return super().loss(b, x) + self.elsewhere(self.critic, b)

    def follow(self, critic: Any, b: LatentBatch, x: Tensor) -> None:
        y, eps = self.noised(x)
        own = mse(self.critic(y, b.t, b.c).eps, eps)
        self.descend(critic, (own + self.elsewhere(self.student, b)).mean(), "critic_loss")

    def elsewhere(self, role: Any, b: LatentBatch) -> Tensor:
        return 100 * role(b.x_t, b.t, b.c).x0.square().flatten(1).mean(1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradients_of_another_loss_move_nothing(accumulate: int, toy: Toy) -> None:
    """The other's term has gradients a hundred times as large: weights are those of a run without it, bit by bit."""
    optimizer = Optimizer(lr=1e-2, clip=0.0, accumulate=accumulate)
    kinds = (Own, Leaking) if accumulate == 1 else (Turns, LeakingTurns)
    alone, leaking = (trained(kind, toy, optimizer=optimizer, updates=3).method.state_dict() for kind in kinds)
    assert equal(dict(alone), dict(leaking))


class OneForTwo(Own):
    def configure_optimizers(self) -> Any:
        both = self.optimizer_of([*self.student.weights(), *self.critic.weights()], self.lr)
        return [both]

    def training_step(self, b: LatentBatch, i: int) -> None:
        optimizer = self.optimizers()
        x = self.student(b.x_t, b.t, b.c).x0
        if self.descend(optimizer, self.feedback(b, self.loss(b, x))):
            self.advance()
        self.follow(optimizer, b, x.detach())


def test_two_losses_of_one_optimiser_are_refused(toy: Toy) -> None:
    """With several micro-batches the first of one would clear what the other has gathered."""
    with pytest.raises(ValueError, match="^OneForTwo descends loss and critic_loss by one optimiser, and each clears the"):
        trained(OneForTwo, toy)


class Turns(Own):
    """All micro-batches of the student's update come before those of the critic's."""

    def training_step(self, b: LatentBatch, i: int) -> None:
        student, critic = self.optimizers()
        if i // 2 % 2:
            self.follow(critic, b, self.student(b.x_t, b.t, b.c).x0.detach())
        elif self.descend(student, self.feedback(b, self.loss(b, self.student(b.x_t, b.t, b.c).x0))):
            self.advance()


class LeakingTurns(Turns, Leaking):
    """The same, where both leak."""


# A clock that stands, and losses of another shape ---------------------------------------------------------------------------------------


class Silent(Own):
    def training_step(self, b: LatentBatch, i: int) -> None:
        self.descend(self.optimizers()[0], self.feedback(b, self.loss(b, self.student(b.x_t, b.t, b.c).x0)))


def test_a_forgotten_advance_is_told_at_the_first_update(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"^Silent.training_step descends its loss and never calls advance\(\)"):
        trained(Silent, toy, optimizer=Optimizer(accumulate=2))


class ReturnsLoss(Own):
    """As Lightning's own loop would have it."""

    def training_step(self, b: LatentBatch, i: int) -> Any:
        return self.feedback(b, self.loss(b, self.student(b.x_t, b.t, b.c).x0))


class CriticOnly(Own):
    def training_step(self, b: LatentBatch, i: int) -> None:
        self.follow(self.optimizers()[1], b, self.student(b.x_t, b.t, b.c).x0.detach())


class CriticFirst(CriticOnly):
    def training_step(self, b: LatentBatch, i: int) -> None:
        Own.training_step(self, b, i) if i >= 3 else CriticOnly.training_step(self, b, i)


def test_a_clock_that_will_never_move_is_told(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a run went on for ever without a word. A critic may have its first updates to itself."""
    with pytest.raises(ValueError, match="^ReturnsLoss.training_step returns its loss, which nobody descends, for updates are made by"):
        trained(ReturnsLoss, toy)
    monkeypatch.setattr(completeness, "PATIENCE", 200)
    with pytest.raises(ValueError, match="^CriticOnly has not updated its student in the first 200 batches, and its run ends by that"):
        trained(CriticOnly, toy)
    with pytest.raises(ValueError, match="^CriticOnly has not updated its student in the first 300 batches"):
        trained(CriticOnly, toy, optimizer=Optimizer(accumulate=3))
    monkeypatch.setattr(completeness, "PATIENCE", 4)
    assert trained(CriticFirst, toy).method.student_updates == 2


# Hooks, and what goes into checkpoints --------------------------------------------------------------------------------------------------


HOOKS = [name for name, hook in vars(Distillation).items() if getattr(hook, "__code__", None) is completeness.ours(print).__code__]
AT_ONCE = {"setup", "configure_model", "configure_callbacks", "on_fit_start"}


def announced(hook: Any) -> Any:
    """A decorator without functools.wraps."""
    return lambda self, *given, **named: hook(self, *given, **named)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_in_the_place_of_the_bases_is_refused(name: str, toy: Toy, tmp_path: Path) -> None:
    """It switched off what the base does in it: the box, the clock, a checkpoint's own. Whatever way leads to the base's is one."""
    bare: dict[str, Any] = {"bare": lambda self, *given, **named: None}
    bare["added"] = lambda self, *given, **named: getattr(super(kinds["added"], self), name)(*given, **named)
    bare["named"] = eval(f"lambda self, *given, **named: Own.{name}(self, *given, **named)", {"Own": Own})
    bare["decorated"] = announced(bare["named"])
    begin = lambda self, *given, **named: getattr(super(kinds["by another"], self), name)(*given, **named)  # noqa: E731
    bare["by another"] = lambda self, *given, **named: self._begin(*given, **named)
    kinds = {how: type("Hooked", (Own,), {name: hook, "_begin": begin}) for how, hook in bare.items()}
    mixed = type("Inherits", (type("Mixin", (), {name: bare["bare"]}), Own), {})
    ckpt = tmp_path / "1.ckpt" if name == "on_load_checkpoint" else None

    def run(kind: type[Own]) -> Distillation:
        method = kind(pipeline=toy, updates=2, optimizer=Optimizer(lr=1e-2))
        data = DDILDataModule(encode(toy.captions, toy), FORWARD, batch_size=4)
        try:
            fit(method, data, ckpt=ckpt)
        finally:
            assert method.student_updates == 0 or name not in AT_ONCE or kind not in (kinds["bare"], mixed)
        return method

    if ckpt is not None:
        fit(Own(pipeline=toy, updates=2), DDILDataModule(encode(toy.captions, toy), FORWARD, batch_size=4), StopAt(1, ckpt))
    for kind, named in ((kinds["bare"], "Hooked"), (mixed, "Mixin")):
        said = rf"{named}\.{name} never calls super\(\)\.{name}\("
        with pytest.raises(ValueError, match=said if name == "advance" else rf"^{said}\.\.\.\), without which parts of a run"):
            run(kind)
    assert all(run(kinds[how]).student_updates == 2 for how in bare if how != "bare")


def test_callbacks_that_are_made_and_not_returned_are_lost(toy: Toy) -> None:
    def forgets(self: Own) -> list[Any]:
        Own.configure_callbacks(self)
        return []

    with pytest.raises(
        ValueError,
        match=r"^Forgets.configure_callbacks drops what super\(\).* returns, the clock of the run: return that with yours added$",
    ):
        trained(type("Forgets", (Own,), {"configure_callbacks": forgets}), toy)


def test_an_advance_that_moves_the_clock_by_itself_is_refused(toy: Toy) -> None:
    """The average stood still, and no measure was told."""

    def counts(self: Own) -> None:
        self.student_updates += 1

    with pytest.raises(ValueError, match=r"^Counts.advance never calls super\(\).advance\(...\), without which parts of a run are off"):
        trained(type("Counts", (Own,), {"advance": counts}), toy)


class Hyper(Own):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Overwrites(Own):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"] = {"critic_updates": 3}


class Pickles(Own):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["solvers"] = [Solver()]


class Remembers(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"path": Solver()}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Hyper, r"Hyper: its hyper_parameters.pipeline is a Toy, and a checkpoint holds tensors.*; leave save_hyperparameters\(\) out"),
        (Overwrites, "Overwrites: its on_save_checkpoint leaves out ddil.student_updates; call super"),
        (Pickles, "Pickles: its solvers holds a Solver, and a checkpoint holds tensors"),
        (Own, "Own: its callbacks.Remembers holds a Solver, and .* write in its state_dict what it holds"),
    ],
)
def test_a_checkpoint_that_nobody_could_read_is_refused_before_the_first_update(
    kind: type[Own], said: str, toy: Toy, tmp_path: Path
) -> None:
    """It was found by the run that was to go on from it."""
    method = kind(pipeline=toy, updates=1)
    data = DDILDataModule(encode(toy.captions, toy), FORWARD, batch_size=4)
    more = [Remembers()] if kind is Own else []
    with pytest.raises(ValueError, match=f"^no run could go on from a checkpoint of {said}"):
        fit(method, data, Checkpoints(folder=str(tmp_path)), *more)
    assert method.student_updates == 0 and not list(tmp_path.glob("*.ckpt"))


class Begun(Own):
    """Its checkpoints hold what its training begins with, and what its first step makes."""

    def on_train_start(self) -> None:
        self.began = 3

    def training_step(self, b: LatentBatch, i: int) -> None:
        super().training_step(b, i)
        self.stepped = 4

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["own"] = [self.began, self.stepped]


@pytest.mark.parametrize("stepped", [True, False])
def test_a_checkpoint_of_what_the_training_makes_is_written(stepped: bool, toy: Toy, tmp_path: Path) -> None:
    """It was asked for before there was a training; what cannot be read is refused as soon as it can be asked for."""
    kind = Begun if stepped else type("Begun", (Begun,), {"stepped": Solver()})
    method, data = kind(pipeline=toy, updates=1), DDILDataModule(encode(toy.captions, toy), FORWARD, batch_size=4)
    if stepped:
        fit(method, data, Checkpoints(folder=str(tmp_path)))
        assert torch.load(tmp_path / "updates=1.ckpt", weights_only=True)["own"] == [3, 4]
    else:
        with pytest.raises(ValueError, match="^no run could go on from a checkpoint of Begun: its own holds a Solver"):
            fit(method, data, Checkpoints(folder=str(tmp_path)))


class Later(Own):
    """Its first step makes what its checkpoints hold, an object of a class."""

    def training_step(self, b: Any, i: int) -> None:
        self.plan = SimpleNamespace(steps=4)
        super().training_step(b, i)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["plan"] = self.plan


def test_what_the_first_step_makes_is_looked_at_after_it(toy: Toy, tmp_path: Path) -> None:
    """The run had gone on to its end, and left checkpoints that none could be resumed from."""
    method, data = Later(pipeline=toy, updates=3), DDILDataModule(encode(toy.captions, toy), FORWARD, batch_size=4)
    with pytest.raises(ValueError, match="^no run could go on from a checkpoint of Later: its plan "):
        fit(method, data, Checkpoints(folder=str(tmp_path)))
    assert method.student_updates == 1


class Late(Callback):
    """Has its state at the second update, before any checkpoint."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.student_updates == 2:
            self.best = 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}


def test_a_state_that_is_there_by_the_first_checkpoint_is_in_time(toy: Toy, tmp_path: Path) -> None:
    method, data = Own(pipeline=toy, updates=3), DDILDataModule(encode(toy.captions, toy), FORWARD, batch_size=4)
    fit(method, data, Late(), Checkpoints(every=3, folder=str(tmp_path)))
    assert method.student_updates == 3
    kept = torch.load(tmp_path / "updates=3.ckpt", weights_only=True)
    assert {"best": 0.5} in kept["callbacks"].values()


def test_what_a_checkpoint_would_hold_is_not_written_to_find_that_it_can_be_read(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    large, written = torch.zeros(2**20), list[int]()
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: written.append(file.getbuffer().nbytes) or real(file, **how))
    kind = type(
        "Large", (Own,), {"on_save_checkpoint": lambda self, made: Own.on_save_checkpoint(self, made) or made.update(own=[{"x": large}])}
    )
    check_readable(kind(pipeline=toy))
    assert written and max(written) < 2**16


# Who acts, and who moves ----------------------------------------------------------------------------------------------------------------


class Alone(Own):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.policies = Policies(Policy(self.student, renoise))


def test_a_share_of_a_teacher_that_cannot_act_is_refused_at_the_start(toy: Toy) -> None:
    """Of the prior, and of the last one of a schedule: it ended in a roll-out, after days."""
    said = "^the prior gives 0.25 to teacher latents, and Alone has no teacher that acts: set self.policies = Policies"
    with pytest.raises(ValueError, match=said):
        trained(Alone, toy, MIXED)
    annealed = AnnealPrior(Piecewise([FORWARD, MIXED], [0, 999]))
    with pytest.raises(ValueError, match=said):
        annealed.setup(SimpleNamespace(), Alone(pipeline=toy, updates=1000), "fit")
    assert trained(Alone, toy, SamplingPrior(0.5, 0.5)).method.student_updates == 2


class Undeclared(Own):
    takes_turns = False


def test_two_optimisers_are_declared(toy: Toy) -> None:
    """Of one process too: under DDP each backward pass waits for the gradients of both."""
    with pytest.raises(ValueError, match="^Undeclared has 2 optimisers, and the backward pass of one leaves the weights of the others wit"):
        trained(Undeclared, toy)


SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "column": (lambda e: e.flatten(1).mean(1, keepdim=True), "feedback(b, loss) losses of shape [4, 1]"),
    "whole": (lambda e: e, "feedback(b, loss) losses of shape [4, 2, 1]"),
    "scalar": (lambda e: e.mean(), "feedback(b, loss) losses of shape []"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_losses_of_another_shape_are_refused(name: str, toy: Toy) -> None:
    how, said = SHAPES[name]
    own = type("Shaped", (Own,), {"loss": lambda self, b, x: how(x.square())})
    with pytest.raises(ValueError, match=re.escape(f"Shaped hands {said}: it takes one number of each of the 4 samples, [4]")):
        trained(own, toy)


class Raw(Own):
    def feedback(self, b: LatentBatch, loss: Tensor) -> Tensor:
        return loss


def test_a_loss_that_is_no_scalar_is_refused(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"^Raw hands descend a loss of shape \[4\]: it takes a scalar.*self.feedback\(b, loss\)"):
        trained(Raw, toy)


# Kept answers ---------------------------------------------------------------------------------------------------------------------------


class Asking(Own):
    """`asks`: what the targets are asked of, a function of the method and the batch."""

    asks: Callable[[Any, LatentBatch], Any]

    def loss(self, b: LatentBatch, x: Tensor) -> Tensor:
        return mse(x, type(self).asks(self, b))

    def one(self, b: LatentBatch) -> Tensor:
        return self.teacher(b.x_t, b.t, b.c).x0

    def other(self, b: LatentBatch) -> Tensor:
        return 0 * self.former(b.x_t, b.t, b.c).x0 + 7

    def both(self, b: LatentBatch) -> tuple[Tensor, Tensor]:
        return self.one(b), self.other(b)

    def by(self, network: Any, b: LatentBatch) -> Tensor:
        return network(b.x_t, b.t, b.c).x0

    def advance(self) -> None:
        super().advance()
        self.roles["target"].follow(self.student, 0.5) if "target" in self.roles else None


TWO: dict[str, Callable[[Any, LatentBatch], Any]] = {
    "methods": lambda m, b: [m.feed.answered(b, ask) for ask in (m.one, m.other)][-1],
    "lambdas": lambda m, b: m.feed.answered(b, lambda b: m.one(b)) + m.feed.answered(b, lambda b: m.other(b)),
    "one lambda in a loop": lambda m, b: [m.feed.answered(b, lambda b, n=n: n(b)) for n in (m.one, m.other)][-1],
    "partials": lambda m, b: [m.feed.answered(b, partial(m.by, n)) for n in (m.teacher, m.former)][-1],
    "in turns": lambda m, b: m.feed.answered(b, m.one if m.student_updates % 2 else m.other),
}


def asking(asks: Any, **more: Any) -> type[Own]:
    return type("Asking", (Asking,), {"asks": asks, **more})


@pytest.mark.parametrize("name", TWO)
def test_a_second_question_is_refused(name: str, toy: Toy) -> None:
    """It was given the first one's answers."""
    with pytest.raises(ValueError, match=r"^feed.answered asks .* and .*: ask both in one answer\(b\), which returns a tuple$"):
        trained(asking(TWO[name]), toy, MIXED)


ONE: dict[str, Callable[[Any, LatentBatch], Any]] = {
    "a tuple": lambda m, b: m.feed.answered(b, m.both)[0],
    "twice": lambda m, b: m.feed.answered(b, m.one) + 0 * m.feed.answered(b, m.one),
    "a lambda": lambda m, b: m.feed.answered(b, lambda b: m.one(b)),
    "a partial": lambda m, b: m.feed.answered(b, partial(m.by, m.former)),
}


@pytest.mark.parametrize("name", ONE)
def test_one_question_is_answered(name: str, toy: Toy) -> None:
    assert trained(asking(ONE[name]), toy, MIXED, updates=3).method.student_updates == 3


def test_two_networks_are_asked_through_one_tuple(toy: Toy) -> None:
    """Of replayed states too both answers are their own."""
    seen: list[Tensor] = []

    def asks(method: Asking, b: LatentBatch) -> Tensor:
        one, other = method.feed.answered(b, method.both)
        torch.testing.assert_close(one, method.one(b).detach())
        seen.append(other)
        return one

    run = trained(asking(asks), toy, MIXED, updates=6)
    assert len(seen) == 6 and all(bool((x == 7).all()) for x in seen)
    assert run.method.evaluations["former"] < 6 * 4  # some were kept


def test_a_second_method_on_the_same_data_asks_its_own_question(toy: Toy) -> None:
    seen: list[Tensor] = []

    def asks(method: Asking, b: LatentBatch) -> Tensor:
        seen.append(method.feed.answered(b, method.other))
        return seen[-1]

    run = trained(asking(ONE["a lambda"]), toy, MIXED, updates=3)
    trained(asking(asks, __qualname__="Another"), toy, MIXED, updates=3, data=run.data)
    assert len(seen) == 3 and all(bool((x == 7).all()) for x in seen)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_an_answer_of_another_kind_is_named_where_it_would_be_kept(kind: str, toy: Toy) -> None:
    """It ended in an AttributeError; where nothing is kept a method may answer itself as it likes."""

    def asks(method: Asking, b: LatentBatch) -> Tensor:
        found = method.feed.answered(b, lambda b: {"x": method.one(b)} if kind == "dict" else (method.one(b), None))
        return found["x"] if kind == "dict" else found[0]

    assert trained(asking(asks), toy).method.student_updates == 2
    said = rf"lambda> answers with a {kind}, and what is kept is a tensor \[B, ...\] or a tuple of such$"
    with pytest.raises(ValueError, match=said):
        trained(asking(asks), toy, MIXED)
    grad = torch.ones(2, requires_grad=True)
    for moving in ({"x": grad}, (None, grad), [grad]):
        with pytest.raises(ValueError, match=MOVED):
            unmoved(moving, lambda b: None)


class Averaged(Asking):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cast(target=self.student.copied("target"))


@pytest.mark.parametrize("network", ["student", "critic", "target", "average"])
def test_a_target_that_moves_is_not_kept(network: str, toy: Toy) -> None:
    def asks(method: Asking, b: LatentBatch) -> Any:
        role = method.averaging.role if network == "average" else method.roles[network]
        return method.feed.answered(b, partial(method.by, role)).detach()

    with pytest.raises(ValueError, match=MOVED):
        trained(type("Moving", (Averaged,), {"asks": asks}), toy, MIXED, updates=3, ema=0.5)


MOVED = "asks its student, or another network that training moves, through feed.answered"


class Copied(Averaged):
    """Its target is the student of the last update."""

    def advance(self) -> None:
        super().advance()
        self.target.follow(self.student, 0.0)


def test_a_target_that_is_copied_in_every_step_is_not_kept(toy: Toy) -> None:
    asks = lambda m, b: m.feed.answered(b, partial(m.by, m.target))  # noqa: E731
    with pytest.raises(ValueError, match=MOVED):
        trained(type("Moving", (Copied,), {"asks": asks}), toy, MIXED, updates=3)


class Renewed(Averaged):
    """Its target is the student of every third update; where it `flushes`, roll-outs of before do not outlive a copy."""

    flushes = True

    def advance(self) -> None:
        Own.advance(self)
        if self.student_updates % 3 == 0:
            self.target.follow(self.student)
            if self.flushes:
                self.feed.flush()


def test_a_target_that_is_copied_now_and_then_is_kept_up_to_a_flush(toy: Toy) -> None:
    """A run that had forgotten what the former weights answered stopped at the next batch all the same."""

    def asks(method: Renewed, b: LatentBatch) -> Tensor:
        found: Tensor = method.feed.answered(b, partial(method.by, method.target))
        torch.testing.assert_close(found, method.by(method.target, b).detach())
        return found

    run = trained(type("Renewing", (Renewed,), {"asks": asks}), toy, MIXED, updates=8)
    assert run.method.evaluations["target"] < 2 * 8 * 4  # some were kept
    with pytest.raises(ValueError, match=rf"{MOVED}.* now and then, in self.feed.flush\(\)$"):
        trained(type("Renewing", (Renewed,), {"asks": asks, "flushes": False}), toy, MIXED, updates=8)


class Headed(Asking):
    """A trained module beside the roles."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cast(head=torch.nn.Linear(1, 1))

    def configure_optimizers(self) -> Any:
        _, critic = super().configure_optimizers()
        return [self.optimizer_of([*self.student.weights(), *self.head.parameters()], self.lr), critic]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("capacity", [64, 0])
def test_a_trained_module_that_is_no_role_is_not_kept(grad: bool, capacity: int, toy: Toy) -> None:
    """Its answers went stale, and its gradient was that of the rows asked anew; without a buffer there are none to go stale."""

    def asks(method: Headed, b: LatentBatch) -> Tensor:
        with torch.set_grad_enabled(grad):
            found: Tensor = method.feed.answered(b, lambda b: method.head(method.one(b)))
        return found

    kind = type("Moving", (Headed,), {"asks": asks})
    data = DDILDataModule(encode(toy.captions, toy), MIXED, batch_size=4, buffer=Buffer(capacity=capacity))
    if grad or capacity:
        with pytest.raises(ValueError, match=MOVED):
            trained(kind, toy, data=data)
    else:
        assert trained(kind, toy, data=data).method.student_updates == 2


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_trained_module_that_is_counted_is_compiled_once(fullgraph: bool, toy: Toy) -> None:
    """The count was a guard, so that every call was another graph."""
    method, graphs = Headed(pipeline=toy), list[Any]()
    method.head.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=fullgraph)
    for _ in range(4):
        method.head(torch.ones(3, 1)).sum().backward()
    assert len(graphs) == 1 and method.asked_of_moving == 4


class Counting(Asking):
    """The counter of CONTRIBUTING."""

    critic_updates = 0

    def advance(self) -> None:
        super().advance()
        self.critic_updates += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"]["critic_updates"] = self.critic_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.critic_updates = checkpoint["ddil"]["critic_updates"]


def test_a_counter_of_ones_own_is_no_setting(toy: Toy, tmp_path: Path) -> None:
    """A resumed run asked its teacher again for all that it had kept."""

    def run(*callbacks: Any, ckpt: Path | None = None) -> Run:
        torch.manual_seed(1)
        method = type("Counted", (Counting,), {"asks": ONE["a lambda"]})(pipeline=toy, updates=6, optimizer=Optimizer(lr=1e-2))
        data = DDILDataModule(encode(toy.captions, toy), MIXED, batch_size=4, buffer=Buffer(capacity=64), rollouts=Rollouts(every=6))
        return fit(method, data, *callbacks, ckpt=ckpt)

    straight, _ = run(), run(StopAt(3, tmp_path / "3.ckpt"))
    resumed = run(ckpt=tmp_path / "3.ckpt")
    assert resumed.method.critic_updates == 6
    assert resumed.method.evaluations == straight.method.evaluations
    assert equal(dict(resumed.method.state_dict()), dict(straight.method.state_dict()))


@dataclass(frozen=True)
class Solver:
    """Options of one's own."""

    steps: int = 4
    kinds: dict[str, list[float]] = field(default_factory=dict, repr=False)


class Recorded(Own):
    def __init__(self, solver: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.solver, self.modules_of_mine = solver, [torch.nn.Linear(1, 1)]


def test_answers_hang_on_all_settings(toy: Toy) -> None:
    """Records, lists and dicts of options too: with another one a resumed run asks anew."""
    settings = [Solver(), Solver(8), Solver(kinds={"a": [1.0]}), Solver(kinds={"a": [2.0]}), [1, 2], [1, 3], {"a": (1,)}, {"b": (1,)}, None]
    asked = [Recorded(solver, pipeline=toy).question for solver in settings]
    assert len(set(asked)) == len(settings)
    assert asked[2] == Recorded(Solver(kinds={"a": [1.0]}), pipeline=toy).question
    assert asked[0] == Recorded(Solver(), pipeline=toy, updates=7, log_every=3, optimizer=Optimizer(lr=0.5)).question


# What is declared -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"want": Wants(ends=True)}, "Named.want is read by nobody: did you mean wants?"),
        ({"source": ("forward",)}, "Named.source is read by nobody: did you mean sources?"),
        ({"take_turns": True}, "Named.take_turns is read by nobody: did you mean takes_turns?"),
        ({"sources": "forward"}, "Named.sources is 'forward': give a tuple of forward, student, teacher, such as (\"forward\",)"),
        ({"sources": ("forward", "rolled")}, "Named.sources is ('forward', 'rolled'): give a tuple of forward, student, teacher"),
    ],
)
def test_declarations_that_nobody_would_read(declared: dict[str, Any], said: str, toy: Toy) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(said)}"):
        trained(type("Named", (Own,), declared), toy)


def test_what_has_a_name_like_a_declaration_is_the_methods_own(toy: Toy) -> None:
    theirs = {"resources": ("arXiv:2310.04378",), "source": "a paper", "want": 3, "sources": ("forward",)}
    assert trained(type("Named", (Own,), theirs), toy).method.student_updates == 2


def test_a_range_of_guidance_is_for_a_student_that_is_told_it(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"^Own's student is not told the guidance: give one number, not 1.0 to 3.0$"):
        trained(Own, toy, guidance=[1.0, 3.0])
    told = type(
        "Told",
        (Own,),
        {"role": lambda self, name, **k: Own.role(self, name, **k, **({"w_conditioned": True} if name == "student" else {}))},
    )
    assert trained(told, toy, guidance=[1.0, 3.0]).method.student_updates == 2


class Ends(Own):
    def loss(self, b: LatentBatch, x: Tensor) -> Tensor:
        return mse(x, b.end)


class Sizes(Own):
    wants = Wants(real=False)

    def loss(self, b: LatentBatch, x: Tensor) -> Tensor:
        return mse(x, x.new_zeros(b._replace(real=None).noise.shape))


@pytest.mark.parametrize(
    ("kind", "said"), [(Ends, r"\(b.end is None here: a method asks for it by wants = Wants\(ends=True\)\)"), (Sizes, "$")]
)
def test_latents_that_were_not_asked_for_are_named(kind: type[Own], said: str, toy: Toy) -> None:
    """Where the line names one of the batch; of another record nothing is guessed."""
    with pytest.raises((TypeError, AttributeError), match="NoneType") as failed:
        trained(kind, toy)
    assert re.search(rf"NoneType[^(]*{said}", one_line(failed.value))


# Options ---------------------------------------------------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(
    test=SimpleNamespace(student_steps=[4]),
    previews=SimpleNamespace(every=0),
    export_steps=4,
    trainer=SimpleNamespace(callbacks=None),
    data=SimpleNamespace(prior=MIXED),
)


class Reflecting(Own):
    def role(self, name: str, **kwargs: Any) -> Any:
        return super().role(name, **kwargs, **({"reflection": self.reflection} if name == "teacher" else {}))


def test_a_reflection_that_nobody_asks_is_told(toy: Toy) -> None:
    (said,) = cautions(Own(pipeline=toy, reflect="static"), CONFIG)
    assert said.startswith("model.reflect = static has no effect, unless Own asks self.reflection itself")
    assert [*cautions(Own(pipeline=toy), CONFIG), *cautions(Reflecting(pipeline=toy, reflect="static"), CONFIG)] == []


def test_an_option_of_the_name_of_a_plan_is_none(toy: Toy) -> None:
    """`stages: 3` ended in a TypeError of the checks."""

    class Stages(Own):
        def __init__(self, stages: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.stages = stages

    assert list(cautions(Stages(3, pipeline=toy), CONFIG)) == []
    assert [staged(Stages(plan, pipeline=toy)) for plan in (3, [3], [], [Stage(steps=4, updates=1)])] == [False, False, False, True]
