"""A frozen network in fewer bits: its values, what trains on it and what leaves it, and where it cannot be had."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import checkpoints
import commandline
from ddil_lightning.backbones import lora, quantising
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.loading import load_pipeline
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Lora, Source
from ddil_lightning.backbones.weights import stored_weights
from ddil_lightning.commands.restore import restore
from ddil_lightning.methods import LCM
from ddil_lightning.training.footprint import parts
from ddil_lightning.training.options import Memory
from suite import BY_NAME, Gradients, build, captions, equal, fit, state

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def small(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny), HALF, quantize="int8")


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in name and "cond_proj" not in name}


def bits(network: nn.Module) -> list[Tensor]:
    """All that is in memory of the frozen parameters."""
    found = []
    for p in network.parameters():
        found += [p.qdata, p.scale, p.zero_point] if hasattr(p, "qdata") else [p]
    return [x.detach() for x in found]


def exact(folder: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stored_weights(sorted((folder / "unet").glob("*.safetensors")))}


@needs_torchao
def test_a_row_has_a_scale_and_eight_bits(small: Pipeline, tiny: Path) -> None:
    given, model = exact(tiny), small.network().model
    layers = linears(model)
    assert len(layers) == 50
    for name, layer in layers.items():
        weight, stored = layer.weight, given[f"{name}.weight"].to(HALF).float()
        assert weight.qdata.dtype == torch.int8 and weight.scale.shape == (len(stored), 1)
        scale = stored.abs().amax(1, keepdim=True) / 127.5
        torch.testing.assert_close(weight.dequantize().float(), stored, rtol=0, atol=float(1.02 * scale.max()))
    assert {p.dtype for name, p in model.named_parameters() if name.startswith("conv")} == {HALF}


@needs_torchao
def test_it_answers_as_the_network_that_it_stands_for(small: Pipeline, tiny: Path) -> None:
    whole = Pipeline(str(tiny))
    x = torch.randn(4, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    t, c = torch.tensor([1, 200, 600, 999]), whole.encode_text(["a handwritten one"] * 4)
    answers = [p.role("teacher")(x, t, c.guided(2.0)).x0 for p in (whole, Pipeline(str(tiny), HALF), small)]
    half, quantised = (float((answer - answers[0]).norm() / answers[0].norm()) for answer in answers[1:])
    assert half < 0.03 and half / 2 < quantised < 0.1


@needs_torchao
def test_students_are_made_of_the_weights_as_they_are_stored(small: Pipeline, tiny: Path) -> None:
    whole, merged = small.trainable().model, small.merged(small.adapted(Adapter(4))).model
    for network in (whole, merged):
        assert equal(dict(network.state_dict()), exact(tiny))
        assert "quantization_config" not in network.config and not hasattr(network, "hf_quantizer")


@needs_torchao
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_a_network_of_its_values(recompute: bool, small: Pipeline, tiny: Path) -> None:
    """The adapters' on 8 bits, against the same adapters on a plain network whose weights have been rounded so."""
    plain = Pipeline(str(tiny), HALF)
    for name, layer in linears(small.network().model).items():
        plain.network().model.get_submodule(name).weight.data = layer.weight.dequantize()
    x = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    t, c = torch.tensor([10, 900]), plain.encode_text(["a handwritten one", ""])
    grads = []
    for backbone in (small, plain):
        torch.manual_seed(1)
        role = backbone.role("student", adapter=Adapter(4), recompute=recompute)
        with torch.no_grad():
            for p in role.weights():
                p.add_(0.1 * torch.randn(p.shape))
        role(x, t, c).x0.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in role.weights()]))
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.05  # both compute in bfloat16
    assert all(p.grad is None for p in small.network().parameters())


@needs_torchao
def test_its_digest_is_of_the_numbers_that_it_holds(small: Pipeline) -> None:
    before = small.fingerprint()
    codes = next(p for p in small.network().parameters() if hasattr(p, "qdata")).qdata
    codes[0, 0] ^= 1
    changed = small.fingerprint()
    codes[0, 0] ^= 1
    assert changed != before == small.fingerprint()


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lcm-lora", "lcm", "pd-lora", "dmd2-lora", "dmd2"])
def test_methods_train_on_it_and_change_none_of_it(name: str, small: Pipeline, tiny: Path) -> None:
    before = [x.clone() for x in bits(small.network())]
    methods = [build(BY_NAME[name], tiny, pipeline=small) for _ in range(2)]
    seen = Gradients()
    one, two = fit(methods[0], captions(tiny), seen), fit(methods[1], captions(tiny))
    assert equal(state(one), state(two)) and all(bool(g.isfinite().all()) for step in seen.steps for g in step.values())
    assert equal(bits(small.network()), before)
    assert all(p.dtype == torch.float32 for p in one.method.parameters() if p.requires_grad)
    assert not any("quant" in key or value.dtype == torch.int8 for key, value in one.method.state_dict().items())


@pytest.mark.slow
@needs_torchao
def test_a_run_goes_out_without_a_trace_of_it(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["model.adapter.rank=4", "model.memory.quantize=int8", "model.memory.teacher_dtype=bfloat16", "model.updates=2"]
    words += ["data.captions=Digits", "previews.every=0", "checkpoints.every=2", "test.n=0"]
    code, _, err = commandline.fit(capsys, "--config", str(tiny_config), *words)
    assert code == 0, err
    run = next(tmp_path.glob("runs/*/2*"))
    assert "quantization_config" not in json.loads((run / "pipeline/unet/config.json").read_text())
    method = restore(run)
    teacher, student = method.backbone.network().model, method.backbone.merged(method.outgoing.network).model.to(HALF)
    assert not any(hasattr(p, "qdata") for p in teacher.parameters())  # a teacher is tested as it is
    assert equal(dict(Pipeline(str(run / "pipeline"), HALF).network().model.state_dict()), dict(student.state_dict()))


@needs_torchao
def test_what_is_not_read_from_a_folder_as_it_lies_is_quantised_when_it_is_whole(small: Pipeline, tiny: Path, tmp_path: Path) -> None:
    file = checkpoints.single_file(load_pipeline(tiny), tmp_path / "one.safetensors")
    single = Pipeline(Source(str(file), config=str(tiny)), HALF, quantize="int8")
    assert equal(bits(single.network()), bits(small.network()))
    role = small.role("student", adapter=Adapter(4))
    with torch.no_grad():
        for p in role.weights():
            p.add_(0.1)
    lora.write(type(small.pipe), tmp_path / "lora.safetensors", role.network, torch.float32)
    fused = Source(str(tiny), lora=(Lora(str(tmp_path / "lora.safetensors")),))
    whole = Pipeline(fused, HALF).network().model
    for name, layer in linears(Pipeline(fused, HALF, quantize="int8").network().model).items():
        weight = whole.get_submodule(name).weight
        torch.testing.assert_close(layer.weight.dequantize(), weight, rtol=0, atol=float(weight.abs().max() / 100))


@needs_torchao
def test_a_plan_counts_the_bytes_that_are_there(small: Pipeline, tiny: Path) -> None:
    there = sum(x.nbytes for x in bits(small.network()))
    outline = Outline(Source(str(tiny)), HALF, bare=True, quantize="int8")
    for backbone in (small, outline):
        counted = next(parts(LCM(pipeline=backbone, guidance=2.0))).weights
        assert counted == there


@needs_torchao
def test_no_student_is_made_of_a_network_that_is_stored_quantised(tiny: Path, tmp_path: Path) -> None:
    """It can be tested as it is; a copy of it would have been made of its bits."""
    shutil.copytree(tiny, tmp_path / "p")
    quantising.read(UNet2DConditionModel, tiny / "unet", None, HALF, "int8").save_pretrained(tmp_path / "p/unet")
    stored = Pipeline(str(tmp_path / "p"), HALF)
    x, t = torch.zeros(1, *stored.latent_shape), torch.tensor([9])
    assert stored.role("teacher")(x, t, stored.null()).x0.isfinite().all()
    for make in (stored.trainable, lambda: stored.adapted(Adapter(4)), lambda: Pipeline(str(tmp_path / "p"), HALF, quantize="int8")):
        with pytest.raises(ValueError, match=r"is stored quantised, .* give the pipeline that it was made of, and model.memory.quantize"):
            make()


@pytest.mark.parametrize(
    ("given", "lacks", "words"),
    [
        ({"quantize": "int8"}, "", "memory.quantize=int8 computes in half precision: set memory.teacher_dtype=bfloat16"),
        ({"quantize": "int8", "teacher_dtype": "bfloat16"}, "torchao", "needs torchao, which is not installed: pip install"),
        ({"quantize": "nf4", "teacher_dtype": "bfloat16"}, "bitsandbytes", "needs bitsandbytes, which is not installed"),
        ({"quantize": "nf4", "teacher_dtype": "bfloat16"}, "", "memory.quantize=nf4 needs a GPU, and there is none here: int8"),
        ({"quantize": "int3", "teacher_dtype": "bfloat16"}, "", "memory.quantize is 'int3': give one of int8, nf4, or null"),
    ],
)
def test_what_cannot_be_is_one_line(given: Any, lacks: str, words: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "find_spec", lambda name: None if name == lacks else True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words) as error:
        Pipeline(str(tiny), **Memory(**given).stored)
    assert "\n" not in str(error.value)
