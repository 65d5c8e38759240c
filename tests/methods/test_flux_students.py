"""Students of Flux.1: dev's are told the guidance by its own embedding, schnell's have none; trained, resumed, exported, released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.methods import DMD2, LADD, LCM, PD
from ddil_lightning.records import MIXED as MIXTURE
from ddil_lightning.records import STUDENT, TEACHER
from ddil_lightning.runs import export
from ddil_lightning.runs.release import Release, release
from ddil_lightning.training.plan import Stage
from distilled import each
from fluxes import make_flux
from options import options
from suite import LORA, MIXED, Entry, build, captions, equal, fit, state

PROMPTS = ["a handwritten one", "a small red circle"]
EVEN: dict[str, Any] = {"solver_steps": 40, "rollouts": (2, 4)}
HALVING: dict[str, Any] = {"stages": [Stage(steps=8, updates=2), Stage(steps=4, updates=2)], "teacher_steps": 16}
MATCHING: dict[str, Any] = {
    "critic": {"steps": 2, "pull": 0.03},
    "gan": {"weight": 5e-3, "critic_weight": 1e-2, "layers": ("block1", "block3")},
}
RANGE = {"guidance": [2.0, 5.0]}
ENTRIES = [
    Entry("lcm", LCM, {**EVEN, **RANGE}),
    Entry("lcm-lora", LCM, {**EVEN, **RANGE, "adapter": LORA}),
    Entry("pd", PD, {**HALVING, "guidance": 3.5}),
    Entry("dmd2", DMD2, {**MATCHING, **RANGE}),
    Entry("dmd2-lora", DMD2, {**MATCHING, "guidance": 3.5, "adapter": LORA, "scores": {"guidance": 1.0}}),
]
HELD = {"lcm": "FlowMatchLCMScheduler", "pd": "FlowMatchEulerDiscreteScheduler", "dmd2": "FlowMatchLCMScheduler"}


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("flux") / "schnell", dev=False)


def nodes_at(pipe: Any, size: tuple[int, int], **guidance: Any) -> torch.Tensor:
    """Where a plain call of the pipeline at a size has gone."""
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS, num_inference_steps=4, height=size[0], width=size[1], output_type="latent", **guidance)
    return pipe.scheduler.sigmas  # type: ignore[no-any-return]


@pytest.mark.parametrize("entry", each({entry.name: entry for entry in ENTRIES}))
def test_a_student_of_dev_resumes_exactly_and_is_exported_as_it_samples(entry: Entry, flux: Path, tmp_path: Path) -> None:
    """Told its guidance, whatever the method; trained nodes at every size, though its pipeline hands sigmas and mu to the scheduler."""
    run = fit(build(entry, flux, updates=4), captions(flux, MIXED), Checkpoints(every=2, keep=9, folder=str(tmp_path)))
    again = fit(build(entry, flux, updates=4), captions(flux, MIXED), ckpt=tmp_path / "updates=2.ckpt")
    assert all(equal(part, state(again)[name]) for name, part in state(run).items()) and again.rows == run.rows[2:]
    rolled = {source for chunk in run.data.buffer._chunks for source in chunk.states.source.tolist()}
    assert rolled & {STUDENT, MIXTURE} and rolled & {TEACHER, MIXTURE}  # both have acted
    assert run.method.teacher.null is None and run.method.deployment.told and not run.method.deployment.guided
    for steps in run.method.deployment.steps:
        assert export.deliver(run.method, tmp_path / f"{steps}", PROMPTS, steps) < 1e-4
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "4")
    assert type(pipe) is FluxPipeline and type(pipe.scheduler).__name__ == HELD[entry.name.removesuffix("-lora")]
    s = run.method.backbone.shift
    u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    for size in ((16, 16), (16, 24)):
        torch.testing.assert_close(nodes_at(pipe, size, guidance_scale=3.5), s * u / (1 + (s - 1) * u), rtol=0, atol=2e-6)
    about = json.loads((tmp_path / "4" / "ddil.json").read_text())
    assert (about["made_for"], about["guidance_scale"]) == ([4], 3.5) and about["guidance_range"] == list(run.method.guidance)
    card = (tmp_path / "4" / "README.md").read_text()
    assert 'pipe("a prompt", num_inference_steps=4, guidance_scale=3.5, height=16, width=16).images[0]' in card
    student = Pipeline(str(tmp_path / "4"))
    assert student.shift == pytest.approx(s, rel=1e-5) and not student.baked and student.network().w_conditioned


@pytest.mark.slow
def test_the_embedding_of_the_guidance_is_trained_and_heeded(flux: Path) -> None:
    """Of a student that is told a range; one embedding, diffusers' own, so that the student's answers at two guidances differ."""
    method = fit(build(ENTRIES[0], flux, updates=3), captions(flux, MIXED)).method
    student, teacher = (role.network.model.time_text_embed.guidance_embedder for role in (method.student, method.teacher))
    assert not torch.equal(student.linear_1.weight, teacher.linear_1.weight)
    assert type(method.student.network.model).from_config(method.student.network.model.config).config.guidance_embeds is True
    (policy, grid), made = method.deployment.sampler(4), method.backbone
    one, two = (sampling.latents(made, policy, grid, PROMPTS, g) for g in (2.0, 5.0))
    assert float((one - two).abs().max()) > 1e-3


@pytest.mark.slow
def test_the_teacher_is_asked_once(flux: Path, schnell: Path) -> None:
    """Half of what classifier-free guidance takes, on the same draws."""
    asked = {}
    for folder in (flux, schnell):
        method = build(Entry("lcm", LCM, {**EVEN, "w_conditioned": folder == flux, "guidance": 3.5}), folder, updates=4)
        asked[folder] = fit(method, captions(folder, MIXED)).method.evaluations
    assert asked[schnell]["teacher"] == 2 * asked[flux]["teacher"] > 0 and asked[schnell]["student"] == asked[flux]["student"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [Entry("dmd2", DMD2, MATCHING), Entry("ladd", LADD, {"gan": {"features": "teacher"}})],
    ids=["dmd2", "ladd"],
)
def test_a_discriminator_cannot_tell_its_sides_by_the_guidance(entry: Entry, flux: Path) -> None:
    """Every question of the critic and the teacher carries the guidance of its batch, real samples' too."""
    method, told = build(entry, flux, guidance=[2.0, 5.0], updates=2), {"real": [], "fake": []}  # type: ignore[var-annotated]
    view = method.adversary.view

    def listen(x: Any, b: Any, c: Any, purpose: str, *args: Any, **kwargs: Any) -> Any:
        told["real" if purpose == "real" else "fake"].append((c.w, b.c.w))
        return view(x, b, c, purpose, *args, **kwargs)

    method.adversary.view = listen
    fit(method, captions(flux, MIXED))
    assert told["real"] and told["fake"] and all(torch.equal(mine, batch) for pairs in told.values() for mine, batch in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lcm", "pd", "dmd2"])
def test_a_student_of_schnell(kind: str, schnell: Path, tmp_path: Path) -> None:
    """Told nothing: its guidance, CFG's or none, is in its weights, and nothing is asked for by its call."""
    own = {"lcm": (LCM, {**EVEN, "w_conditioned": False}), "pd": (PD, {**HALVING, "w_conditioned": False}), "dmd2": (DMD2, MATCHING)}
    method = fit(build(Entry(kind, *own[kind]), schnell, guidance=3.0, updates=4), captions(schnell, MIXED)).method
    folder = export.export(method, tmp_path / "p", 4)
    assert export.verify(method, folder, PROMPTS, 4) < 1e-4
    pipe = DiffusionPipeline.from_pretrained(folder)
    torch.testing.assert_close(nodes_at(pipe, (16, 24)), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), rtol=0, atol=2e-6)
    assert "num_inference_steps=4, true_cfg_scale=1, height=16, width=16).images[0]" in (folder / "README.md").read_text()
    assert Pipeline(str(folder)).baked


@pytest.mark.slow
def test_a_lora_is_released_in_the_pipelines_own_format(flux: Path, tmp_path: Path) -> None:
    """A student that is told its guidance too: the embedding is the teacher's, below the adapters."""
    method = fit(build(ENTRIES[1], flux, updates=3), captions(flux, MIXED)).method
    made = dict(release(method, Release(tmp_path, ("diffusers", "lora"), "flux", 4, PROMPTS)))
    assert all(difference < 1e-4 for difference in made.values()) and len(made) == 2
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    kinds = {key.split(".")[1] for key in keys}
    assert kinds == {"transformer_blocks", "single_transformer_blocks"} and all(key.startswith("transformer.") for key in keys)
    assert {".".join(key.split(".")[3:-2]) for key in keys if ".single_" in key} == {"attn.to_q", "attn.to_k", "attn.to_v"}
    card = (tmp_path / "README.md").read_text()
    assert "pipe.scheduler = FlowMatchLCMScheduler(shift=1.58" in card and "FluxPipeline" not in card
    assert "*ModelSamplingFlux* with max_shift and base_shift 0.4594" in card and "cfg 1, *FluxGuidance* 3.5, sampler_name lcm" in card
    for kind in ("kohya", "single-file"):
        with pytest.raises(ValueError, match=f"--format {kind} is for U-Nets, and this student is a Flux: choose"):
            list(release(method, Release(tmp_path, (kind,), "flux", 4, PROMPTS)))
    whole = build(Entry("lcm", LCM, {**EVEN, "adapter": {"rank": 4, "full": ("proj_out",)}}), flux)
    with pytest.raises(
        ValueError, match=r"has layers that are trained whole \(.*proj_out, by adapter.full\), which no file of adapters holds"
    ):
        list(release(whole, Release(tmp_path, ("lora",), "flux", 4, PROMPTS)))


@pytest.mark.parametrize(("kind", "own"), [(LCM, {**EVEN, **RANGE}), (PD, {**HALVING, "guidance": 3.5})], ids=["lcm", "pd"])
@pytest.mark.slow
def test_half_precision_samples_alike(kind: Any, own: dict[str, Any], flux: Path, tmp_path: Path) -> None:
    """Adapters on a base in bfloat16, whose pipeline rounds the time too."""
    kwargs = {**own, "adapter": LORA, "memory": {"teacher_dtype": "bfloat16", "gradient_checkpointing": True}}
    method = fit(kind(pipeline=str(flux), **options(kind, {"updates": 2, "log_every": 1}, kwargs)), captions(flux, MIXED)).method
    assert method.backbone.dtype == torch.bfloat16
    assert export.deliver(method, tmp_path / "p", PROMPTS, method.deployment.steps[0], torch.bfloat16) < 1e-5
