"""How a released student is called, as its card says it: in diffusers, in code that runs as it stands, and in ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ddil_lightning.backbones.repositories import BUILTIN, is_pipeline, part_folder, single_file
from ddil_lightning.backbones.source import Source
from ddil_lightning.texts import place

SAMPLERS = {"LCMScheduler": "lcm", "DDPMScheduler": "ddpm", "FlowMatchLCMScheduler": "lcm", "FlowMatchEulerDiscreteScheduler": "euler"}
"""ComfyUI's sampler by the scheduler of diffusers."""
PACKAGED = 'files("ddil_lightning")'
"""Where the code of a card finds what is built in."""


@dataclass(frozen=True)
class Called:
    """A released student, with all that its calls depend on, and what its card says of them.

    `about`: the student's ddil.json. `scheduler`: the student's, of diffusers. `kind`: the class of its pipeline. `size`: of its images in
    pixels, (height, width). `files`: where each format lies, seen from the card. `told`: whether it is told its guidance. `adapter`: (rank,
    alpha) of one. `called_with`: what calls of its family are given besides; `asked_by`: how they name the guidance, `unguided`: what they
    are given for none, `negative`: for no negative prompt. `in_comfy`: whether ComfyUI is known to load its family. `times`: T of the
    teacher's schedule, of which a student that starts below the last has the first alone. `source`: where the teacher comes from, all of
    it; `vae`: the class of its autoencoder. `dtype`: of pipeline and single file; `base`: of the teacher that adapters were trained on,
    whatever their file has. `hub`: the repository that it goes to.
    """

    about: Mapping[str, Any]
    scheduler: Any
    kind: str
    size: tuple[int, int]
    files: Mapping[str, str] = field(default_factory=lambda: {"diffusers": "."})
    told: bool = False
    adapter: tuple[int, float] | None = None
    called_with: Mapping[str, Any] = field(default_factory=dict)
    asked_by: str = "guidance_scale"
    in_comfy: bool = True
    times: int = 1000
    unguided: float = 1.0
    negative: str = ""
    source: Source | None = None
    vae: str = "AutoencoderKL"
    dtype: torch.dtype = torch.float32
    base: torch.dtype = torch.float32
    hub: str | None = None

    @property
    def nodes(self) -> str:
        """The times of its steps, or of a flow the sigmas, in words."""
        if "sigmas" in self.about:
            return "sigma " + ", ".join(f"{sigma:g}" for sigma in self.about["sigmas"])
        return ", ".join(map(str, self.about["timesteps"]))

    @property
    def scale(self) -> float:
        """What a call is told, in the units of its pipeline."""
        return float(self.about["guidance_scale"]) - 1 + self.unguided

    def of_diffusers(self) -> Iterator[str]:
        """The paragraphs of diffusers, each format with code of its own; none where ComfyUI's is the only one."""
        if [*self.files] == ["comfy"]:  # diffusers does not read it of every family
            return
        steps, call = self.about["steps"], self._call("size" in self.about)
        yield "## In diffusers"
        if "diffusers" in self.files:
            where = self.hub or self.files["diffusers"]
            yield _code(
                "from diffusers import DiffusionPipeline", f'pipe = DiffusionPipeline.from_pretrained("{where}"{_typed(self.dtype)})', call
            )
            yield (
                f"The scheduler holds the timesteps it was trained for ({self.nodes} at {steps} steps); another scheduler or a "
                '"leading" spacing\nfails in silence.'
            )
        if type(self.scheduler).__name__ == "FlowMatchLCMScheduler":
            yield (
                "The scheduler draws new noise at every step, for which some pipelines, as Stable Diffusion 3's, hand it no generator: an "
                "image comes\nout again after the same `torch.manual_seed`."
            )
        if "sigmas" in self.about and (steps == 1 or self.scheduler.config.get("shift_terminal")):
            yield (
                "The scheduler holds the nodes of this one step count; in any other it walks nodes that the student was not trained at, "
                "without a word."
            )
        for name in self.files:
            if name in ("lora", "kohya"):
                yield f"The adapters `{self.files[name]}` on their teacher, with the scheduler that they were trained for:"
                yield _code(*self._adapters(name), call)
            if name == "single-file" and self._settings is None:
                yield (
                    f"diffusers reads `{self.files[name]}` with the settings of a pipeline of its architecture, and none is known here but "
                    "the one that\n`ddil-export --format diffusers` writes."
                )
            elif name == "single-file":
                yield f"The single file `{self.files[name]}`, with the scheduler that it was trained for:"
                yield _code(*self._single_file(name), self._call(sized=True))  # it does not hold what its network was made for

    def _call(self, sized: bool) -> str:
        """The call that makes an image; `sized`: with its height and width, else a pipeline's own makes what its network was made for."""
        g = self.scale
        noise = f", eta={self.about['eta']:g}" if "eta" in self.about else ""  # of a scheduler that cannot keep it
        size = f", height={self.size[0]}, width={self.size[1]}" if sized else ""
        more = "".join(f", {name}={value!r}" for name, value in self.called_with.items())
        negative = f', negative_prompt="{self.negative}"' if g > 1 and self.asked_by != "guidance_scale" else ""
        steps = self.about["steps"]
        return f'image = pipe("a prompt", num_inference_steps={steps}, {self.asked_by}={g:g}{negative}{noise}{size}{more}).images[0]'

    def _adapters(self, name: str) -> Iterator[str]:
        yield f"from diffusers import DiffusionPipeline, {type(self.scheduler).__name__}"
        yield from self._teacher()
        yield f'pipe.load_lora_weights("{self.hub or "."}", weight_name="{self.files[name]}")'
        yield self._scheduled

    def _teacher(self) -> Iterator[str]:
        """The teacher as it was in training: with its own autoencoder, and with the LoRAs that were fused into it."""
        source, typed = self._source, _typed(self.base)
        given = f', variant="{source.variant}"' if source.variant else ""
        if source.vae:
            yield from self._autoencoder(typed)
            given += ", vae=vae"
        path = self._named(str(self.about["teacher"]))
        if single_file(str(self.about["teacher"])) is None:
            yield f"pipe = DiffusionPipeline.from_pretrained({path}{given}{typed})"
        else:
            config = f", config={self._named(source.config)}" if source.config else ""
            yield f"from diffusers import {self.kind}"
            yield f"pipe = {self.kind}.from_single_file({path}{config}{given}{typed})"
        for one in source.lora:
            file = f', weight_name="{one.weight_name}"' if one.weight_name else ""
            yield f"pipe.load_lora_weights({self._named(one.path)}{file})"
            yield f"pipe.fuse_lora(lora_scale={one.scale:g})"
            yield "pipe.unload_lora_weights()"

    def _autoencoder(self, typed: str) -> Iterator[str]:
        """The source's own, as `vae`."""
        path = str(self._source.vae)
        folder = ', subfolder="vae"' if part_folder(path, "vae").name == "vae" else ""
        yield f"from diffusers import {self.vae}"
        yield f"vae = {self.vae}.from_pretrained({self._named(path)}{folder}{typed})"

    @property
    def _source(self) -> Source:
        return self.source or Source("builtin")

    def _named(self, path: str) -> str:
        """A path as an expression of the code: on the hub nobody is told where it lay, and a built-in pipeline is in the package."""
        if path in BUILTIN:
            return f'str({PACKAGED} / "miniature" / "weights" / "{BUILTIN[path]}")'
        return f'"{anonymous(path) if self.hub else path}"'

    def _single_file(self, name: str) -> Iterator[str]:
        yield f"from diffusers import {self.kind}, {type(self.scheduler).__name__}"
        url, typed = f"https://huggingface.co/{self.hub}/blob/main/" if self.hub else "", _typed(self.dtype)
        given = f", config={settings}" if (settings := self._settings) else ""
        if self._source.vae and "diffusers" not in self.files:  # whose settings are not the teacher's
            yield from self._autoencoder(typed)
            given += ", vae=vae"
        yield f'pipe = {self.kind}.from_single_file("{url}{self.files[name]}"{given}{typed})'
        yield self._scheduled

    @property
    def _settings(self) -> str | None:
        """The pipeline of the student's architecture that a single file is read with, as an expression; None where none is known.

        Without one diffusers takes the original Stable Diffusion's that some shapes in the file are of: "" where it did so in training.
        """
        student, teacher = self._source.networks.get("student"), str(self.about["teacher"])
        if "diffusers" in self.files:
            return f'"{self.hub or self.files["diffusers"]}"'
        if student is not None:
            return self._named(student) if isinstance(student, str) and is_pipeline(student) else None
        path = self._source.config if single_file(teacher) else teacher
        return self._named(path) if path else ""

    @property
    def _scheduled(self) -> str:
        """The scheduler in full: every option that is not its class's own, so that nothing of the teacher's is left."""
        kind, config = type(self.scheduler), self.scheduler.config
        defaults = kind().config
        own = {key: repr(value) for key, value in config.items() if not key.startswith("_") and value != defaults.get(key)}
        if "trained_betas" in own:  # as many numbers as the schedule has times, all of which the teacher's own scheduler has
            own["trained_betas"] = "pipe.scheduler.config.trained_betas"
            if self._begins_later:
                own["trained_betas"] = f"pipe.scheduler.betas[:{config.num_train_timesteps}].tolist()"
        return f"pipe.scheduler = {kind.__name__}({', '.join(f'{key}={value}' for key, value in own.items())})"

    @property
    def _begins_later(self) -> bool:
        """Whether the student takes pure noise for a time below the teacher's last."""
        return int(self.scheduler.config.num_train_timesteps) < self.times

    def of_comfy(self) -> Iterator[str]:
        """The paragraphs of ComfyUI: which file, which nodes, which numbers, or why none; nothing for what it is not known to load."""
        loadable = [name for name in ("single-file", "kohya", "comfy", "lora") if name in self.files]
        if not loadable or not self.in_comfy:
            return
        yield "## In ComfyUI"
        about, n = self.about, self.about["steps"]
        if self._begins_later:
            yield (
                f"The student begins at t = {about['timesteps'][0]}, and ComfyUI's samplers at the last of the teacher's {self.times} "
                "times, at which it was never\ntrained: they make no images of it."
            )
            return
        sampler = SAMPLERS.get(type(self.scheduler).__name__, "ddim")
        last = self.scheduler.config.num_train_timesteps - 1
        apart = max(abs(t - last * (1 - i / n)) for i, t in enumerate(about["timesteps"]))
        loader = "*Load Checkpoint*" if "single-file" in loadable else "*Load LoRA* on the teacher, strength 1"
        model = ""
        if "shift" in about:
            model = f", {self._comfy_shift}"
        elif self.scheduler.config.prediction_type == "v_prediction":
            zsnr = "on" if self.scheduler.config.get("rescale_betas_zero_snr") else "off"
            model = f", *ModelSamplingDiscrete* with v_prediction and zsnr {zsnr}"
        file = self.files[loadable[0]]
        told = self.told and "shift" in about  # a flow by an embedding of its own, as Flux
        cfg = "1, *FluxGuidance* {g:g}" if told else "{g:g}"
        yield (
            f"`{file}` by {loader}{model}, *KSampler* with steps {n}, cfg {cfg.format(g=about['guidance_scale'])}, sampler_name {sampler}, "
            f"scheduler sgm_uniform, denoise 1.\nThat scheduler's times differ from the trained ones by at most {apart:.0f} of {last + 1}. "
            "This is read from ComfyUI's sources, and was not tried there."
        )
        if about.get("eta", 0) > 0:
            yield (
                f"It has no sampler that steps as the student was trained and measured, with new noise of strength {about['eta']:g} "
                f"({type(self.scheduler).__name__}):\n{sampler} takes the same steps without any, and its images are others."
            )
        if "lora" in loadable and self.adapter and self.adapter[0] != self.adapter[1]:
            scale = self.adapter[1] / self.adapter[0]
            other = "comfy" if "shift" in about else "kohya"  # which is for U-Nets
            yield f"ComfyUI does not read the alpha of `{self.files['lora']}`: take the {other} file, or strength {scale:g}."

    @property
    def _comfy_shift(self) -> str:
        """ComfyUI's node for a flow's shift s; Flux's is told ln s, between two sizes of images. Others count times to 1, not to 1000."""
        shift = float(self.about["shift"])
        if self.kind.startswith(("QwenImage", "ZImage")):
            return f"*ModelSamplingAuraFlow* with shift {shift:g}"
        if not self.kind.startswith("Flux"):
            return f"*ModelSamplingSD3* with shift {shift:g}"
        return f"*ModelSamplingFlux* with max_shift and base_shift {math.log(shift):.4g}"


def anonymous(path: str) -> str:
    """A hub id as it is; of what is on this machine the last name."""
    return place(path).resolve().name if place(path).exists() else path


def _typed(dtype: torch.dtype) -> str:
    """The argument that loads everything in a type, which diffusers does not read off its files."""
    return "" if dtype == torch.float32 else f", dtype={dtype}"


def _code(*lines: str) -> str:
    """Code that makes `pipe` and, in its last line, calls it."""
    imports = ["from importlib.resources import files"] if any(PACKAGED in line for line in lines) else []
    imports += [line for line in lines if line.startswith("from ")]
    imports += ["import torch"] if any("dtype=torch." in line for line in lines) else []
    *rest, call = (line for line in lines if not line.startswith("from "))
    return "\n".join(("```python", *imports, "", *rest, '# pipe.to("cuda")  # or pipe.enable_model_cpu_offload()', call, "```"))
