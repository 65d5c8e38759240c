"""Every method of the suite on transformers in miniature: trained on roll-outs too and exported, or refused in a line.

All are flows but PixArt's; Flux is told its guidance, and CFG on Qwen-Image keeps a norm.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import sanas
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import NoiseCorrected, ddim
from ddil_lightning.methods import CTM, DMD2, EMD, LCM, PD, TCD, ImagineFlash, MomentMatching, SnapFusion
from ddil_lightning.records import MIXED as MIXTURE
from ddil_lightning.records import STUDENT, TEACHER
from ddil_lightning.runs import export
from ddil_lightning.training.plan import Stage
from suite import METHODS, MIXED, Entry, build, captions, fit

PROMPTS = ["a handwritten one", "a small red circle"]
MORE = [Entry("diff-instruct", DMD2, {"guidance": 2.0, "scores": {"normaliser": "none"}, "gan": {"weight": 0.0, "critic_weight": 0.0}})]
EVERY = [pytest.param(entry, id=entry.name) for entry in (*METHODS, *MORE)]
BUILT: dict[tuple[str, type], str] = {
    **{
        (family, CTM): f"{name} cannot be told the time that it jumps to: take another method"
        for family, name in (("sd3", "SD3"), ("pixart", "PixArt"), ("sana", "Sana"), ("zimage", "ZImage"), ("qwen", "QwenImage"))
    },
    ("flux", CTM): "is told the guidance already, and has no place for the time of a jump: take another one",
    ("flux", SnapFusion): "is told its guidance, and is not guided by the empty prompt besides: take another method",
}
"""By what is said of methods that a family has no place for, when they are built."""
REFUSED: dict[type, str] = {
    TCD: r"no scheduler of diffusers steps by TCD\(gamma=0.3\) on a flow: known are Renoise\(\) and DDIM\(\)",
    MomentMatching: r"no scheduler of diffusers steps by Posterior\(eta=1.0\) on a flow: known are Renoise\(\) and DDIM\(\)",
}
"""Of the methods that a flow trains by, those whose steps no pipeline of one takes: by what fit says of it before its first update."""


def settings(entry: Entry, family: str) -> dict[str, Any]:
    """What a family asks for that the suite's U-Net does not: only Flux is told the guidance, LCM walks even nodes of a flow, and PD begins
    at PixArt's eps."""
    told = "w_conditioned" in inspect.signature(entry.method).parameters
    even = {"solver_steps": 40, "rollouts": (2, 4)} if entry.method is LCM and family != "pixart" else {}
    first = {"stages": [Stage(kind="eps_to_v", updates=1), *entry.kwargs["stages"]]} if entry.method is PD and family == "pixart" else {}
    return {**first, **({"w_conditioned": family == "flux", "guidance": 3.0} if told else {}), **even}


@pytest.mark.slow
@pytest.mark.parametrize("entry", EVERY)
@pytest.mark.parametrize("family", ["sd3", "flux", "pixart", "sana", "zimage", "qwen"])
def test_a_method_trains_and_its_pipeline_samples_as_the_trainer_does(
    entry: Entry, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With roll-outs of student and teacher, at every step count that the student is made for."""
    folder: Path = request.getfixturevalue(family)
    if why := BUILT.get((family, entry.method)):
        with pytest.raises(ValueError, match=why):
            build(entry, folder)
        return
    data = sanas.captions(folder, rollouts={"every": 1}) if family == "sana" else captions(folder, MIXED, rollouts={"every": 1})
    run = fit(build(entry, folder, updates=3, **settings(entry, family)), data)
    rolled = {source for chunk in run.data.buffer._chunks for source in chunk.states.source.tolist()}
    assert rolled & {TEACHER, MIXTURE}
    assert rolled & {STUDENT, MIXTURE} or family == "pixart"  # both have acted; on PixArt's few draws it may be the teacher alone
    assert run.method.student_updates == 3 and all(torch.isfinite(p).all() for p in run.method.student.parameters())
    if family != "pixart" and (why := REFUSED.get(entry.method)):
        with pytest.raises(ValueError, match=why):
            export.rehearse(run.method, tmp_path / "p", PROMPTS, None)
        return
    for steps in run.method.deployment.steps:
        assert export.deliver(run.method, tmp_path / f"{steps}", PROMPTS, steps) < 1e-4


# Where a flow begins in noise alone ------------------------------------------------------------------------------------------------------


def test_ddim_from_noise_alone_is_corrected_as_it_is(sd3: Path) -> None:
    """At sigma = 1 the velocity's eps is x_t whatever the network says: there is nothing to correct, nor to tell of on a card."""
    schedule = NoiseSchedule.flow(1000, 3.0)
    x, out = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
    t, s = torch.full((3,), 999), torch.tensor([749, 499, 249])
    p = schedule.prediction("flow", x, t, out)
    torch.testing.assert_close(NoiseCorrected(999)(schedule, x, p, t, s), ddim(schedule, x, p, t, s), rtol=0, atol=0)
    method = build(Entry("imagine-flash", ImagineFlash, {"guidance": 3.0}), sd3)
    assert method.policies.student.transition == method.deployment.policy.transition == ddim and not method.deployment.remark


def test_a_chain_begins_where_there_is_something_of_the_sample(sd3: Path) -> None:
    with pytest.raises(ValueError, match=r"scores.tau = \[0.02, 1.0\] has chains at t = 999, which is noise alone and says nothing of a"):
        build(Entry("emd", EMD, {"guidance": 3.0, "scores": {"tau": (0.02, 1.0)}}), sd3)


@pytest.mark.slow
def test_a_student_that_starts_below_pure_noise_is_refused(sd3: Path, tmp_path: Path) -> None:
    """No flow scheduler begins at a sigma below 1 by itself."""
    method = build(Entry("emd", EMD, {"guidance": 3.0, "steps": 1, "start": 499, "rollouts": (1,)}), sd3)
    with pytest.raises(ValueError, match="no flow scheduler of diffusers walks the nodes sigma = 0.75 by itself: take trailing nodes from"):
        export.rehearse(method, tmp_path / "p", PROMPTS, None)
