"""Methods on a flow: Stable Diffusion 3's in miniature, trained, resumed, exported and released; and what is another formula there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.diffusion.analytic import Gaussian
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.methods import DMD2, LADD, LCM, PCM, PD, TCD, MomentMatching, UFOGen
from ddil_lightning.methods.pd import one_step
from ddil_lightning.records import END, Context
from ddil_lightning.runs import export
from ddil_lightning.runs.checkpoint import check_fits
from ddil_lightning.runs.release import Release, release
from ddil_lightning.training.adversary import Critic
from ddil_lightning.training.plan import Stage
from ddil_lightning.training.sharing import leave_to_each_process, shared_names
from options import options
from suite import LORA, MIXED, Entry, build, captions, equal, fit, state, train

PROMPTS = ["a handwritten one", "a small red circle"]
EVEN: dict[str, Any] = {"w_conditioned": False, "guidance": 3.0, "solver_steps": 40, "rollouts": (2, 4)}
PLAN = [Stage(steps=8, updates=2), Stage(steps=4, updates=2)]
HALVING: dict[str, Any] = {"stages": PLAN, "teacher_steps": 16, "w_conditioned": False, "guidance": 3.0}
GAN = {"weight": 5e-3, "critic_weight": 1e-2, "layers": ("block1", "block2")}
MATCHING: dict[str, Any] = {"guidance": 3.0, "critic": {"steps": 2, "pull": 0.02}, "gan": GAN}
ENTRIES = [
    Entry("lcm", LCM, EVEN),
    Entry("lcm-lora", LCM, {**EVEN, "adapter": LORA}),
    Entry("pd", PD, HALVING),
    Entry("dmd2", DMD2, MATCHING),
    Entry("dmd2-lora", DMD2, {**MATCHING, "adapter": LORA}),
]
SOME_SLOW = [pytest.param(e, marks=() if e.name == "lcm" else pytest.mark.slow, id=e.name) for e in ENTRIES]
HELD = {  # class of the scheduler, its nodes at 4 steps
    "lcm": "FlowMatchLCMScheduler",
    "pd": "FlowMatchEulerDiscreteScheduler",
    "dmd2": "FlowMatchLCMScheduler",
}


@pytest.mark.parametrize("entry", SOME_SLOW)
def test_a_student_resumes_exactly_and_is_exported_as_it_samples(entry: Entry, sd3: Path, tmp_path: Path) -> None:
    """With roll-outs of student and teacher; through the folder, at every step count, by the plain call of diffusers' own pipeline."""
    run = fit(build(entry, sd3, updates=6), captions(sd3, MIXED), Checkpoints(every=3, keep=9, folder=str(tmp_path)))
    again = fit(build(entry, sd3, updates=6), captions(sd3, MIXED), ckpt=tmp_path / "updates=3.ckpt")
    assert all(equal(part, state(again)[name]) for name, part in state(run).items()) and again.rows == run.rows[3:]
    assert all(torch.isfinite(p).all() for p in run.method.student.parameters())
    for steps in run.method.deployment.steps:
        assert export.deliver(run.method, tmp_path / f"{steps}", PROMPTS, steps) < 1e-5
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "4")
    assert type(pipe.scheduler).__name__ == HELD[entry.name.removesuffix("-lora")]
    pipe.set_progress_bar_config(disable=True)
    for height, width in ((16, 16), (16, 8)):  # trained nodes at every resolution
        pipe(PROMPTS, num_inference_steps=4, guidance_scale=1.0, height=height, width=width, output_type="latent")
        torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), rtol=0, atol=2e-6)
        torch.testing.assert_close(pipe.scheduler.timesteps, torch.tensor([1000.0, 900.0, 750.0, 500.0]))
    about = json.loads((tmp_path / "4" / "ddil.json").read_text())
    assert (about["made_for"], about["shift"], about["sigmas"]) == ([4], 3.0, [1.0, 0.9, 0.75, 0.5])
    assert "| nodes | sigma 1, 0.9, 0.75, 0.5 at 4 steps |" in (tmp_path / "4" / "README.md").read_text()
    student = Pipeline(str(tmp_path / "4"))
    assert student.shift == 3.0 and torch.equal(student.schedule.sigmas, run.method.backbone.schedule.sigmas)  # the same times again


def test_a_student_of_an_odd_training_grid_is_made_for_its_roll_outs() -> None:
    """Neither 4 nor 2 even steps are on it: the counts that are trained had been refused as others than 1."""
    for rollouts, steps in (((5,), (5, 1)), ((1, 5, 25), (25, 5, 1))):
        made = LCM(pipeline="builtin/flow", **{**EVEN, "solver_steps": 25, "rollouts": rollouts}).deployment
        assert made.steps == steps
        for n in rollouts:
            export.check_steps(made, n)
    assert LCM(pipeline="builtin/flow", **EVEN).deployment.steps == (4, 2, 1)


@pytest.mark.parametrize("name", ["lcm", "pd"])
def test_an_exported_scheduler_is_called_in_its_own_step_count(name: str, tmp_path: Path) -> None:
    """In another it walks other nodes than the trained ones, in one step no numbers; in memory the trainer samples in all of them."""
    (entry,) = [entry for entry in ENTRIES if entry.name == name]
    own = {**entry.kwargs, "stages": PLAN[1:], "teacher_steps": 8} if name == "pd" else entry.kwargs
    method = build(Entry(name, entry.method, own), "builtin/flow")
    student = Pipeline(str(export.export(method, tmp_path / "p", 4)))
    student.check_steps(4)
    for n in (1, 2, 3, 8):
        said = rf"holds the nodes of 4 steps, .* \(ddil-export --steps {n}\), where its method makes one"
        with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
            warnings.simplefilter("error")
            student.check_steps(n)
    assert "holds the nodes of this one step count" in (tmp_path / "p" / "README.md").read_text()
    assert [len(method.deployment.sampler(n)[1]) for n in (4, 2, 1)] == [4, 2, 1]
    if name == "pd":
        with pytest.raises(ValueError, match="the student is made for 4 steps alone"):
            export.check_steps(method.deployment, 8)
    else:
        export.check_steps(method.deployment, 2)


@pytest.mark.slow
def test_a_lora_is_released_in_the_pipelines_own_format(sd3: Path, tmp_path: Path) -> None:
    """With rank and alpha in its header; the scheduler that the card spells out, and the files alone, sample as the student does."""
    method = train(Entry("lcm", LCM, {**EVEN, "adapter": LORA}), sd3).method
    made = dict(release(method, Release(tmp_path, ("diffusers", "lora"), "sd3", 4, PROMPTS)))
    assert all(difference < 1e-5 for difference in made.values()) and len(made) == 2
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys)
    assert {".".join(key.split(".")[4:-2]) for key in keys} == {
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    card = (tmp_path / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("pipe.scheduler ="))
    assert line.startswith("pipe.scheduler = FlowMatchLCMScheduler(shift=2.004") and "shift_terminal=0.5" in line
    with pytest.raises(ValueError, match="--format kohya is for U-Nets, and this student is a SD3: choose"):
        list(release(method, Release(tmp_path, ("kohya",), "sd3", 4, PROMPTS)))


def test_adapters_share_the_table_of_positions(sd3: Path) -> None:
    """Half a GiB of Stable Diffusion 3.5's: once, in no checkpoint, and DDP sends it to nobody; nor buffers of whole copies."""
    method = build(Entry("lcm", LCM, {**EVEN, "adapter": LORA, "ema": 0.9}), sd3)
    method._apply(lambda x: x.clone())  # as a move to another device does
    base = method.backbone.network().model.pos_embed.pos_embed
    roles = [method.student, method.roles["target"], method.averaging.role, method.teacher]
    assert base.ndim == 3 and all(role.network.model.pos_embed.pos_embed is base for role in roles)
    assert not any("pos_embed.pos_embed" in name for name in method.state_dict())
    (mine,) = [name for name in shared_names(method) if name.startswith("student.") and name.endswith("pos_embed.pos_embed")]
    before = {**method.state_dict(), mine: base.clone()}  # of a run that began before they were shared
    check_fits(Path("old.ckpt"), {"state_dict": before}, method)
    method.load_state_dict(before)
    for made in (method, build(Entry("lcm", LCM, EVEN), sd3)):
        leave_to_each_process(made)
        left = {name for name, _ in made.named_buffers()} - set(made._ddp_params_and_buffers_to_ignore)
        assert left == {"reflection.lo", "reflection.hi"}
    assert any("pos_embed.pos_embed" in name for name in made.state_dict())


@pytest.mark.parametrize(("kind", "own"), [(LCM, EVEN), (PD, HALVING)], ids=["lcm", "pd"])
@pytest.mark.slow
def test_half_precision_samples_alike(kind: Any, own: dict[str, Any], sd3: Path, tmp_path: Path) -> None:
    """Adapters on a base in bfloat16: one network answers both samplers, which then differ by nothing but what they are told."""
    kwargs = {**own, "adapter": LORA, "memory": {"teacher_dtype": "bfloat16", "gradient_checkpointing": True}}
    method = fit(kind(pipeline=str(sd3), **options(kind, {"updates": 2, "log_every": 1}, kwargs)), captions(sd3, MIXED)).method
    assert method.backbone.dtype == torch.bfloat16
    assert export.deliver(method, tmp_path / "p", PROMPTS, method.deployment.steps[0], torch.bfloat16) < 1e-5


# Formulas --------------------------------------------------------------------------------------------------------------------------------


def test_the_consistency_function_has_no_boundary_scalings(sd3: Path) -> None:
    """f(x, t) = x - sigma v: x itself at sigma = 0, and nothing is left to force."""
    method = build(Entry("lcm", LCM, EVEN), sd3)
    b = next(iter_batches(method, sd3))
    p = method.student(b.x_t, b.t, b.c)
    f = method.f(method.student, b.x_t, b.t, b)
    sigma = method.backbone.schedule.sigmas[b.t].float().view(-1, 1, 1, 1)
    velocity = method.student.network(b.x_t, method.backbone.schedule.time(b.t), b.c)
    assert torch.equal(f, p.x0)
    torch.testing.assert_close(f, b.x_t - sigma * velocity)
    assert method.boundary is None and method.deployment.steps == (4, 2, 1)


def iter_batches(method: Any, folder: Path) -> Any:
    """One batch of forward latents, by hand."""
    from ddil_lightning.records import LatentBatch

    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    node = torch.tensor([3, 20])
    t, s = method.grid.times[node], method.grid.times[node + 1]
    x_t = method.backbone.schedule.add_noise(x0, torch.randn_like(x0), t)
    c = method.backbone.encode_text(PROMPTS)
    fields = {"x_t": x_t, "t": t, "s": s, "node": node, "c": c}
    yield LatentBatch(**{name: fields.get(name) for name in LatentBatch._fields})  # type: ignore[arg-type]


def test_one_step_lands_where_two_do_on_the_linear_path() -> None:
    """PD's target in closed form, Salimans & Ho's x0 from its two ends, at pure noise and at the end too."""
    schedule = NoiseSchedule.flow(1000, 3.0)
    x_t, x_s = torch.randn(2, 4, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([999, 749, 499, 249]), torch.tensor([749, 499, 249, END])
    v = one_step(schedule, x_t, x_s, t, s)
    sigma_t, sigma_s = (schedule.sigmas[i].view(-1, 1, 1, 1) for i in (t, s))
    x0 = x_t - sigma_t * (x_t - x_s) / (sigma_t - sigma_s)  # a straight line, whose slope is the velocity
    p = schedule.from_x0(x_t, t, x0)
    torch.testing.assert_close(v, p.v)
    torch.testing.assert_close(ddim(schedule, x_t, p, t, s), x_s)


def test_an_exact_flow_is_its_own_velocity() -> None:
    """What a perfect network of a Gaussian answers as a flow is eps - x0 of its posterior means, in every space the same prediction."""
    schedule = NoiseSchedule.flow(1000, 3.0)
    law = Gaussian(torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.7, 1.3], dtype=torch.float64), schedule)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999, 800, 500, 200, 20, 0])
    p = schedule.from_x0(x, t, law(x, t, Context(torch.zeros(6, 1, 1))))
    again = schedule.prediction("flow", x, t, schedule.output("flow", p))
    torch.testing.assert_close(again.x0, p.x0)
    torch.testing.assert_close(schedule.output("flow", p), (x - p.x0) / schedule.sigmas[t].view(-1, 1))


# The critic's pull -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
def test_the_critic_is_pulled_after_each_student_update(adapter: Any, sd3: Path) -> None:
    """critic <- 0.75 critic + 0.25 student, every trained weight, and none of what both share."""
    more = {} if adapter is None else {"adapter": adapter}
    method = build(Entry("dmd2", DMD2, {"guidance": 3.0, "critic": {"pull": 0.25}, **more}), sd3)
    with torch.no_grad():
        for i, p in enumerate(method.critic.weights()):
            p.add_(0.1 * i)
    critic, student = ([p.clone() for p in role.weights()] for role in (method.critic, method.student))
    shared = [p.clone() for p in method.critic.shared]
    method.advance()
    for p, before, mine in zip(method.critic.weights(), critic, student, strict=True):
        torch.testing.assert_close(p, 0.75 * before + 0.25 * mine)
    assert all(torch.equal(p, before) for p, before in zip(method.critic.shared, shared, strict=True))
    assert method.student_updates == 1


def test_nothing_is_pulled_unless_asked_for(sd3: Path) -> None:
    method = build(Entry("dmd2", DMD2, {"guidance": 3.0}), sd3)
    with torch.no_grad():
        for p in method.critic.weights():
            p.add_(0.1)
    before = [p.clone() for p in method.critic.weights()]
    method.advance()
    assert Critic().pull == 0 and all(torch.equal(a, b) for a, b in zip(before, method.critic.weights(), strict=True))


def test_a_pull_needs_a_critic_of_the_students_kind(sd3: Path) -> None:
    pulled: dict[str, Any] = {"guidance": 3.0, "critic": {"pull": 0.02}}
    with pytest.raises(ValueError, match="critic.pull needs a critic of the student's architecture, both whole or both adapters"):
        build(Entry("dmd2", DMD2, {**pulled, "adapter": {"rank": 4, "whole": ("critic",)}}), sd3)
    for method, more in ((LADD, {}), (PCM, {"w_conditioned": False}), (UFOGen, {}), (MomentMatching, {})):
        with pytest.raises(ValueError, match="critic.pull is for a critic that is a denoiser, and this method has none"):
            build(Entry("x", method, {**pulled, **more}), sd3)
    with pytest.raises(ValueError, match="critic.pull"):
        Critic(pull=1.5)


# What a flow's pipeline cannot hold ------------------------------------------------------------------------------------------------------


def test_a_student_that_no_flow_scheduler_steps_as_is_refused(sd3: Path, tmp_path: Path) -> None:
    method = build(Entry("tcd", TCD, {"w_conditioned": False, "guidance": 3.0}), sd3)
    with pytest.raises(ValueError, match=r"no scheduler of diffusers steps by TCD\(gamma=0.3\) on a flow: known are Renoise"):
        export.export(method, tmp_path / "p", 4)
    with pytest.raises(ValueError, match="holds velocities and the nodes of one step count, not v on trailing"):
        method.backbone.scheduler(ddim, "v", "trailing", 4)
    assert not sampling.noise(1, (1,), 0).isnan().any() and not (tmp_path / "p").exists()
