"""DMD2 in training: turns and what they touch, the mixture on both, resuming inside a cycle, data, backward simulation, export."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from lightning.pytorch import Callback
from torch import Tensor, nn

from commandline import refused
from ddil_lightning.backbones import sampling
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import roll
from ddil_lightning.methods import DMD2
from ddil_lightning.records import FORWARD, SOURCES, Context, LatentBatch
from ddil_lightning.runs import export
from ddil_lightning.training.adversary import Adversary
from suite import MIXED, Entry, StopInside, backbone, build, captions, equal, fit, pictures, state, train

SD = NoiseSchedule.scaled_linear()
ENTRY = Entry("dmd2", DMD2, {"guidance": 2.0, "critic": {"steps": 3}, "ema": 0.0})


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


def weights(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


class Turns(Callback):
    """The batches with their turn, the weights before every batch, and the gradients of every optimiser step."""

    def __init__(self) -> None:
        self.batches: list[tuple[bool, LatentBatch]] = []
        self.before: list[tuple[list[Tensor], list[Tensor]]] = []
        self.steps: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((pl_module.adversary.student_turn, batch))
        self.before.append((weights(pl_module.student), weights(pl_module.critic, pl_module.head)))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        sides = [[pl_module.student], [pl_module.critic, pl_module.head]]
        self.steps.append(tuple(all(p.grad is not None for m in side for p in m.parameters()) for side in sides))  # type: ignore[arg-type]
        assert sum(any(p.grad is not None for m in side for p in m.parameters()) for side in sides) == 1


# Turns --------------------------------------------------------------------------------------------------------------------------------


def test_every_third_batch_updates_the_student_and_every_batch_the_critic(tiny: Path) -> None:
    """At every optimiser step one side has all of its gradients and the other none."""
    seen = Turns()
    run = train(ENTRY, tiny, seen, updates=3)
    critic, student = (False, True), (True, False)
    assert seen.steps == [critic, critic, student, critic] * 3
    assert [turn for turn, _ in seen.batches] == [False, False, True] * 3
    assert (run.method.student_updates, run.method.adversary.updates, run.data.done) == (3, 9, 9)
    moved = [not equal(a[0], b[0]) for a, b in zip(seen.before, seen.before[1:], strict=False)]
    assert moved == [False, False, True] * 2 + [False, False]  # the student stands still on the critic's turns
    assert all(not equal(a[1], b[1]) for a, b in zip(seen.before, seen.before[1:], strict=False))
    assert len({row["lr"] for row in run.rows}) == 3 and run.rows[0]["critic_loss"] > 0


def test_a_critic_that_is_asked_once_on_the_students_turn_is_asked_for_a_forward_less(tiny: Path) -> None:
    """Of three turns' 3 forwards and 3 encoder passes over real images, one more forward for matching and one encoder pass for realism; the
    first student update is the same, the critic's step on its batch another one."""
    seen = Turns(), Turns()
    once, twice = (train(ENTRY, tiny, turns, updates=2, scores={"share": share}) for turns, share in zip(seen, (True, False), strict=True))
    size = len(seen[0].batches[0][1].t)
    asked = [run.method.evaluations["critic"] / size for run in (once, twice)]
    assert asked == [2 * 7, 2 * 8] and seen[0].steps == seen[1].steps
    (mine, critics), (theirs, others) = (turns.before[3] for turns in seen)
    assert equal(mine, theirs) and not equal(critics, others) and equal(seen[0].before[2][1], seen[1].before[2][1])


def nothing(self: Adversary, x: Tensor, b: LatentBatch, *judged: Any) -> Tensor:
    """A loss of the critic with a gradient of zero, so that its optimiser moves nothing that has no other gradient."""
    assert not x.requires_grad
    return sum((0 * p.sum() for m in (self.critic, self.head) for p in m.parameters()), torch.zeros(()))  # type: ignore[union-attr]


def test_the_students_turn_moves_no_weight_of_critic_and_head(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Adversary, "following", nothing)
    start = build(ENTRY, tiny)
    run = train(ENTRY, tiny, updates=2, optimizer={"accumulate": 2}, gan={"weight": 1.0})
    assert equal(weights(run.method.critic, run.method.head), weights(start.critic, start.head))
    assert not equal(weights(run.method.student), weights(start.student))


def test_the_critics_turn_moves_no_weight_of_the_student(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DMD2, "matching", lambda self, x, b, *heard: 0 * x.flatten(1).mean(1))
    start = build(ENTRY, tiny)
    run = train(ENTRY, tiny, updates=2, gan={"weight": 0.0})
    assert equal(weights(run.method.student), weights(start.student))
    assert not equal(weights(run.method.critic), weights(start.critic)) and not equal(weights(run.method.head), weights(start.head))


@pytest.mark.slow
def test_both_turns_draw_from_the_same_mixture(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources and nodes of the student's and the critic's batches; and the student's turn gives both losses the same outputs."""
    outputs: dict[str, list[Tensor]] = {"matching": [], "following": []}

    def keep(name: str) -> Any:
        def loss(self: Any, x: Tensor, b: LatentBatch, *judged: Any) -> Tensor:
            outputs[name].append(x.detach())
            return 0 * x.flatten(1).mean(1) if name == "matching" else nothing(self, x, b)

        return loss

    for name in outputs:
        monkeypatch.setattr(DMD2 if name == "matching" else Adversary, name, keep(name))
    seen = Turns()
    settings = {"updates": 40, "critic": {"steps": 2}, "gan": {"weight": 0.0}, "teacher_steps": 4}
    run = train(ENTRY, tiny, seen, prior=SamplingPrior(0.25, 0.5, 0.25), **settings)
    assert all(torch.equal(x, outputs["following"][2 * k + 1]) for k, x in enumerate(outputs["matching"]))
    shares = []
    for turn in (True, False):
        tags = torch.cat([b.source for student, b in seen.batches[9:] if student == turn])
        nodes = torch.cat([b.node for student, b in seen.batches[9:] if student == turn])
        shares.append(torch.cat([torch.bincount(tags, minlength=len(SOURCES)), torch.bincount(nodes, minlength=4)]) / len(tags))
    assert all(share[FORWARD] == 0.25 for share in shares) and float((shares[0] - shares[1]).abs().max()) < 0.15
    assert bool((shares[0][[1, 2, 3]] > 0.02).all()) and bool((shares[0][4:] > 0.12).all())
    assert set(torch.cat([b.t for _, b in seen.batches]).tolist()) == {999, 749, 499, 249}
    assert run.method.evaluations["critic"] == 0


def test_the_first_rung_is_pure_noise_and_real_keeps_its_captions(tiny: Path) -> None:
    seen = Turns()
    fit(build(ENTRY, tiny, updates=4), captions(tiny, SamplingPrior(0.5, 0.5, 0.0)), seen)
    first = torch.cat([b.x_t[b.node == 0] for _, b in seen.batches])
    assert len(first) > 4 and float(first.std()) == pytest.approx(1.0, abs=0.05)
    signal = torch.cat([(b.x_t * b.real)[(b.node == 0) & (b.source == FORWARD)] for _, b in seen.batches])
    assert len(signal) and abs(float(signal.mean())) < 4 * float(signal.std()) / signal.numel() ** 0.5
    data = pictures(tiny)
    for _, b in seen.batches:
        rows = [int((data.latents - x).abs().flatten(1).sum(1).argmin()) for x in b.real]
        assert torch.equal(data[rows].c.text, b.real_c.text) and b.real_c.w is None
    assert any(not torch.equal(b.c.text, b.real_c.text) for _, b in seen.batches)  # roll-outs of the buffer have captions of their own


# Resuming -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "share"), [(1, False), (2, False), (2, True)])
@pytest.mark.slow
def test_resuming_inside_a_cycle_is_exact(accumulate: int, share: bool, tiny: Path, tmp_path: Path) -> None:
    def parts(seed: int) -> tuple[Any, Any]:
        own = {"updates": 4, "optimizer": {"accumulate": accumulate}, "ema": 0.9, "scores": {"share": share}}
        return build(ENTRY, tiny, seed, **own), captions(tiny, MIXED)

    straight = fit(*parts(0))
    for done in (4, 5)[: 3 - accumulate]:
        file = tmp_path / f"{done}.ckpt"
        cut = fit(*parts(0), StopInside(done, file))
        assert cut.method.adversary.updates == done and cut.method.student_updates == 1
        resumed = fit(*parts(1), ckpt=file)  # another seed: weights and the seed of the noise come from the checkpoint
        resumed.data.seed = straight.data.seed
        assert equal(state(straight), state(resumed)) and resumed.method.adversary.updates == 12


# Data ---------------------------------------------------------------------------------------------------------------------------------

CONFIG = """
model: {{class_path: DMD2, init_args: {{pipeline: {pipeline}, updates: 2, reflect: static}}}}
data: {{batch_size: 1, prior: {{forward: 0.0, student: 1.0}}, captions: {{class_path: Prompts, init_args: {{path: words.txt}}}}}}
test: {{n: 0}}
previews: {{every: 0}}
"""


def test_a_gan_without_data_is_refused_in_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("a handwritten seven\na zero\n")
    Path("c.yaml").write_text(CONFIG.format(pipeline=tiny))
    said = refused(capsys, "--config", "c.yaml")
    assert said.startswith("DMD2's GAN compares with data, but the data set has no images") and said.endswith("gan.critic_weight to 0")
    said = refused(capsys, "--config", "c.yaml", "model.guidance=[1.0,3.0]")
    assert said == "DMD2's student is not told the guidance: give one number, not 1.0 to 3.0"


def test_without_a_gan_captions_are_enough(tiny: Path) -> None:
    data = captions(tiny, SamplingPrior(0, 0.5, 0.5))
    data.captions = Encoded(None, pictures(tiny).c)
    run = fit(build(ENTRY, tiny, updates=2, gan={"weight": 0.0, "critic_weight": 0.0}, box=[[-4.0] * 4, [4.0] * 4]), data)
    assert run.method.student_updates == 2 and run.method.head is None


WRONG = {
    "steps": ({"steps": 3}, "steps = 3 does not divide the schedule's 1000 times: take 2 or 4"),
    "teacher": ({"teacher_steps": 6}, "teacher_steps = 6 is no multiple of steps = 4"),
    "critic": ({"critic": {"steps": 0}}, "critic.steps is 0: give a number from 1"),
    "tau": ({"scores": {"tau": (0.9, 0.1)}}, "0 <= tau"),
    "weights": ({"gan": {"critic_weight": 0.0}}, "needs a discriminator that learns"),
    "pull": ({"scores": {"share": True}, "critic": {"pull": 0.1}}, "scores.share keeps an answer of the critic, which critic.pull"),
    "share": ({"scores": {"share": True}, "critic": {"steps": 1}}, "at times of scores.tau alone: set it to false, or"),
    "rollouts": ({"rollouts": (8,)}, "8 steps does not fit on the 4 nodes"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_settings_outside_their_range_are_refused(fault: str, tiny: Path) -> None:
    kwargs, words = WRONG[fault]
    with pytest.raises(ValueError, match=words):
        build(ENTRY, tiny, **kwargs)


# Backward simulation ------------------------------------------------------------------------------------------------------------------


def test_backward_simulation_makes_j_student_calls_on_the_trained_nodes(tiny: Path) -> None:
    """Node 0 is pure noise; a peer lost it, another simulated every rung whatever rung was drawn."""
    method = build(ENTRY, tiny)
    assert method.grid.nodes.tolist() == [999, 749, 499, 249] == Grid.named("trailing", 4).nodes.tolist()
    c, times = backbone(tiny).encode_text(["a", "a zero", "a one"]).guided(1.0), []
    method.student.network.register_forward_hook(lambda net, args, out: times.append(args[1].unique().tolist()))
    for j in range(4):
        times.clear()
        walk = method.grid.rollout(random.Random(0))
        made = roll(method.policies, walk, [True] * 4, c, (4, 8, 8), torch.Generator().manual_seed(5), upto=j)
        assert times == [[t] for t in (999, 749, 499, 249)[:j]] and made.t[-1] == (999, 749, 499, 249)[j]
        assert torch.equal(made.x_t[:3], torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert method.student.evaluations == 3 * (0 + 1 + 2 + 3) and method.teacher.evaluations == 0


def test_renoising_is_independent(tiny: Path) -> None:
    """A student that answers zero shows the noise of every node: that of no two nodes is correlated (DMD2 issue 9)."""
    method = build(ENTRY, tiny)
    method.student.network.forward = lambda x, t, c: SD.at(t, x)[0] / SD.at(t, x)[1] * x  # v of x0 = 0
    n = 400
    c = Context(torch.zeros(n, 1, 1))
    made = roll(method.policies, method.grid, [True] * 4, c, (4, 8, 8), torch.Generator().manual_seed(0))
    noises = (made.x_t / SD.at(made.t, made.x_t)[1]).view(4, -1)
    noises[0] = made.x_t[:n].flatten()
    correlation = noises.corrcoef()
    assert float((correlation - torch.eye(4)).abs().max()) < 4 / (n * 256) ** 0.5
    assert noises[1:].std(1).tolist() == pytest.approx([1.0] * 3, abs=0.01)


def test_the_teachers_rollout_is_its_sampler(tiny: Path) -> None:
    """All of its 32 DDIM steps under guidance, recorded at the student's nodes."""
    method = build(ENTRY, tiny, reflect="off")
    c = backbone(tiny).encode_text(["a", "a zero"]).guided(1.0)
    made = roll(method.policies, method.grid, [False] * 4, c, (4, 8, 8), torch.Generator().manual_seed(5))
    policy, fine = method.baseline.sampler(32)
    walk = list(policy.walk(made.x_t[:2], fine, c))
    for j in (1, 2, 3):
        torch.testing.assert_close(made.x_t[2 * j : 2 * j + 2], walk[8 * j - 1])


# Deployment ---------------------------------------------------------------------------------------------------------------------------


def test_trained_nodes_are_the_exported_ones(tiny: Path) -> None:
    """Bit-equal for 4, 2 and 1 steps, with diffusers' defaults: 499, not 500; LCM's own 999, 759, 499, 259 were never trained."""
    method = build(ENTRY, tiny)
    scheduler = LCMScheduler.from_config(method.deployment.scheduler().config)
    for steps, nodes in {4: [999, 749, 499, 249], 2: [999, 499], 1: [999]}.items():
        scheduler.set_timesteps(steps)
        _, grid = method.deployment.sampler(steps)
        assert scheduler.timesteps.tolist() == grid.nodes.tolist() == nodes
        method.grid.rows(grid.nodes)  # all of them are training nodes
    for t in (999, 749, 499, 249):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        assert float(skip) < 1e-12 and float(out) == pytest.approx(1.0, abs=1e-6)


def test_the_exported_folder_samples_as_dmd2_does(tiny: Path, tmp_path: Path) -> None:
    """diffusers alone, the trainer's sampler, and the loop of DMD2 by hand."""
    method, folder, prompts = build(ENTRY, tiny).eval(), tmp_path / "out", ["a handwritten one", "", "a small red circle"]
    torch.manual_seed(7)
    with torch.no_grad():
        for p in method.deployment.network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert export.deliver(method, folder, prompts, 4) < 1e-4
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 2, 4):
        assert export.verify(method, folder, prompts, steps) < 1e-4
    x, generators = sampling.noise(3, (4, 8, 8), 0), sampling.renoising(3, 0)
    c, bar = backbone(tiny).encode_text(prompts), pipe.scheduler.alphas_cumprod
    with torch.no_grad():
        for t, s in ((999, 749), (749, 499), (499, 249), (249, None)):
            x0 = bar[t].sqrt() * x - (1 - bar[t]).sqrt() * method.student.network(x, torch.full((3,), t), c)
            fresh = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
            x = x0 if s is None else bar[s].sqrt() * x0 + (1 - bar[s]).sqrt() * fresh
    assert export.relative(x, sampling.pipeline_latents(method.backbone.sharing(pipe), prompts, 4, 1.0)) < 1e-4


def test_the_noise_of_its_losses_follows_the_runs_seed_alone(tiny: Path) -> None:
    """Not torch's own numbers, wherever they stand when the method is made."""
    found = []
    for own, seed in ((0, 5), (1, 5), (0, 6)):
        method = build(ENTRY, tiny, seed=own)
        method.feed = captions(tiny, seed=seed)
        found.append(method.adversary.diffuse(torch.zeros(2, 4, 8, 8), "critic")[2])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
