"""Every method of the suite on a flow, Stable Diffusion 3's in miniature: trained on roll-outs too and exported, or refused in a line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import NoiseCorrected, ddim
from ddil_lightning.methods import CTM, DMD2, EMD, LCM, TCD, ImagineFlash, MomentMatching
from ddil_lightning.records import MIXED as MIXTURE
from ddil_lightning.records import STUDENT, TEACHER
from ddil_lightning.runs import export
from suite import METHODS, MIXED, Entry, build, captions, fit

PROMPTS = ["a handwritten one", "a small red circle"]
MORE = [Entry("diff-instruct", DMD2, {"guidance": 2.0, "scores": {"normaliser": "none"}, "gan": {"weight": 0.0, "critic_weight": 0.0}})]
EVERY = [pytest.param(entry, id=entry.name) for entry in (*METHODS, *MORE)]
REFUSED: dict[type, str] = {
    TCD: r"no scheduler of diffusers steps by TCD\(gamma=0.3\) on a flow: known are Renoise\(\) and DDIM\(\)",
    MomentMatching: r"no scheduler of diffusers steps by Posterior\(eta=1.0\) on a flow: known are Renoise\(\) and DDIM\(\)",
}
"""Of the methods that a flow trains by, those whose steps no pipeline of one takes: by what fit says of it before its first update."""


def settings(entry: Entry) -> dict[str, Any]:
    """What a flow asks for that the suite's U-Net does not: SD3 is told no guidance, and LCM walks even nodes."""
    told = "w_conditioned" in inspect.signature(entry.method).parameters
    even = {"solver_steps": 40, "rollouts": (2, 4)} if entry.method is LCM else {}
    return {**({"w_conditioned": False, "guidance": 3.0} if told else {}), **even}


@pytest.mark.slow
@pytest.mark.parametrize("entry", EVERY)
def test_a_method_trains_and_its_pipeline_samples_as_the_trainer_does(entry: Entry, sd3: Path, tmp_path: Path) -> None:
    """With roll-outs of student and teacher, at every step count that the student is made for."""
    if entry.method is CTM:
        with pytest.raises(ValueError, match="SD3 cannot be told the time that it jumps to: take another method"):
            build(entry, sd3)
        return
    run = fit(build(entry, sd3, updates=3, **settings(entry)), captions(sd3, MIXED))
    rolled = {source for chunk in run.data.buffer._chunks for source in chunk.states.source.tolist()}
    assert rolled & {STUDENT, MIXTURE} and rolled & {TEACHER, MIXTURE}  # both have acted
    assert run.method.student_updates == 3 and all(torch.isfinite(p).all() for p in run.method.student.parameters())
    if why := REFUSED.get(entry.method):
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
