"""Families of diffusers pipelines: the one place that knows what a network of diffusers is called with and made of, a file each."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.network import Network
from ddil_lightning.backbones.weights import Weights
from ddil_lightning.records import Context

WIDTHS = ("cross_attention_dim", "caption_channels", "joint_attention_dim")
"""Where a network's configuration says how wide the states of the texts are that it reads."""


class Family(Network):
    """A component of a diffusers pipeline as a `Network`: what `Pipeline` asks of it besides.

    The t that its `forward` hears is what diffusers' schedulers tell a network: a whole time or, of a flow, sigma T in float32.

    A family is a subclass that writes `forward` and `latent_shape`, and an entry of `families.FAMILIES` under the name of diffusers' class.
    It says besides where its pipelines differ from Stable Diffusion's: `component`, `blocks_of` and `called_with`, `written` and `tokens`,
    `context` where its texts are encoded otherwise than by two answers of `encode_prompt`, `unconditional` where guidance is told another
    thing than the empty prompt. `check` turns away what it cannot do, `spaces` and `sized` students of another architecture that cannot
    take its place. What it leaves out is refused by name where somebody needs it: `with_features` and `head` (a discriminator), `told` (a
    student that is told its guidance).
    """

    component: ClassVar[str] = "transformer"
    """The component of the pipeline that it wraps."""

    blocks_of: ClassVar[tuple[str, ...]] = ()
    """Names of the classes of its blocks, which `blocks` lists."""

    adapts: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """The layers that adapters are put on where nobody says which: names or ends of names."""

    called_with: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What a call of its pipelines is given besides prompts, steps, guidance and latents, so that these are taken as they are."""

    cfg: ClassVar[str] = "guidance_scale"
    """How calls of its pipelines name the scale of classifier-free guidance; under another name they want a negative prompt with it."""

    negative: ClassVar[str] = ""
    """What its users give for no negative prompt, and guidance tells its network in place of a prompt: the empty one."""

    flow: ClassVar[bool] = False
    """Whether its networks are velocities of the linear path, whose pipelines have a scheduler of flow matching."""

    passes_sigmas: ClassVar[bool] = False
    """Of a flow: whether its pipelines hand their scheduler sigmas even from 1 to 1 / N; else it takes its own."""

    called_size: ClassVar[tuple[int, int] | None] = None
    """Height and width in pixels that a plain call of its pipelines makes, whatever the network; None where it is the network's own."""

    in_comfy: ClassVar[bool] = True
    """Whether cards say how ComfyUI loads its networks: not where it does not know them, or nobody has read how."""

    authors: ClassVar[Mapping[str, tuple[str, ...]] | None] = None
    """Layers of its authors' network, which ComfyUI has, and what each is in diffusers, {} being a block's number; several are one there.

    Empty where the names are the same, None where nobody has read them.
    """

    sized: ClassVar[tuple[str, ...]] = ("sample_size",)
    """Settings that say how large the samples are: those of the teacher hold for every network beside it."""

    resizable: ClassVar[bool] = True
    """Whether the same weights with another sample_size are the same network, so that a saved student's plain call makes its own size."""

    typical: str | None = None
    """The name of a parameter whose type all others have but adapters and what is trained whole beside them; None for the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(self.component, model)

    @property
    def model(self) -> Any:
        """The network of diffusers that is wrapped, as its pipeline holds it."""
        return getattr(self, self.component)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in where nothing casts: a teacher may be in half precision, and its answer is upcast by the schedule."""
        return (next(self.model.parameters()) if self.typical is None else self.model.get_parameter(self.typical)).dtype

    @staticmethod
    def scale(g: float) -> float:
        """The guidance_scale that a call of its pipelines is given for guidance g, where 1 is none."""
        return g

    def usual(self, pipe: Any) -> float:
        """The guidance g of a plain call of `pipe`, the default of its class in diffusers: SD 7.5, SDXL 5, SD3 7, SANA 4.5, ..."""
        import diffusers

        kind: Any = getattr(diffusers, str(pipe.config.get("_class_name")), type(pipe))
        told = inspect.signature(kind.__call__).parameters.get(self.asked_by)
        return 7.5 if told is None or not isinstance(told.default, int | float) else float(told.default) + 1 - self.scale(1.0)

    @property
    def asked_by(self) -> str:
        """How a call of its pipelines names the guidance: what its network is told, or the scale of classifier-free guidance."""
        return "guidance_scale" if self.w_conditioned else self.cfg

    def asked(self, g: float, n: int) -> dict[str, Any]:
        """What a call of its pipelines for `n` prompts is given for guidance g; 1 is none."""
        negative = {} if self.asked_by == "guidance_scale" or g <= 1 else {"negative_prompt": [self.negative] * n}
        return {self.asked_by: self.scale(g), **negative}

    @staticmethod
    def packed(x: Tensor) -> Tensor:
        """Latents [B, C, h, w] as its pipelines hold them while they sample."""
        return x

    @staticmethod
    def unpacked(x: Tensor, shape: Sequence[int]) -> Tensor:
        """The latents [B, C, h, w], of a `shape` [C, h, w], that its pipelines hold as `x`."""
        return x

    def in_full(self, told: dict[str, Any]) -> dict[str, Any]:
        """What its `forward` has told its model, as its pipelines tell it: other words where it says the same in fewer."""
        return told

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w] of the samples that it was trained on."""

    @property
    def divisor(self) -> int | None:
        """What the sides of latents of another size than its own are multiples of; None where it is made for its own size alone."""
        return None

    @property
    def largest(self) -> int | None:
        """The largest side of latents that it has positions for; None where there is no such limit."""
        return None

    def positions(self, shape: Sequence[int]) -> int | None:
        """How many places its attention sees of latents [C, h, w]: schedulers of flows may shift their times by it. None where none is."""
        return None

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for a network that does not denoise latents of so many `channels`, or is made for another task."""

    def spaces(self) -> Mapping[str, Any]:
        """What a network of another architecture must have in common with it to take its place, by what it is called: latents, texts."""
        return {"number of latent channels": self.latent_shape[0]}

    def handed(self, weights: Weights, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The `weights` of this network by the `names` that a smaller one has for them; what it has no place for may be left out."""
        return iter(weights)

    def told(self) -> Mapping[str, Any]:
        """The changes of its configuration that give it an embedding of w, whose new weights are zero: a copy then equals its source.

        Raises ValueError in a family that has no place for one.
        """
        raise ValueError(f"{type(self).__name__} cannot be told the guidance: set model.w_conditioned to false")

    def aimed(self, w_conditioned: bool) -> Mapping[str, Any]:
        """Likewise of a network that is told s, the time that is jumped to, and with `w_conditioned` w besides.

        Raises ValueError in a family that has no place for it.
        """
        raise ValueError(f"{type(self).__name__} cannot be told the time that it jumps to: take another method")

    def telling(self, w_conditioned: bool, s_conditioned: bool) -> Mapping[str, Any]:
        """The changes that tell a copy what it is not told yet. Raises ValueError where there is no place for s, w being told already."""
        if not s_conditioned or self.s_conditioned:
            return self.told() if w_conditioned and not self.w_conditioned else {}
        if self.w_conditioned:
            raise ValueError(
                "the teacher's network is told the guidance already, and has no place for the time of a jump: take another one"
            )
        return self.aimed(w_conditioned)

    def recompute(self, on: bool = True) -> None:
        """Switch diffusers' own gradient checkpointing on or off, in place."""
        self.model.enable_gradient_checkpointing() if on else self.model.disable_gradient_checkpointing()

    def blocks(self) -> Sequence[nn.Module]:
        """The modules whose class is named in `blocks_of`."""
        return [m for m in self.modules() if type(m).__name__ in self.blocks_of]

    def idle(self) -> Sequence[nn.Module]:
        """Parts that no answer depends on, such as what a last block makes of the text: they are not trained, for they have no gradient."""
        return ()

    @staticmethod
    def written(pipe: Any, prompts: Sequence[str]) -> list[str]:
        """`prompts` as its pipelines hand them to their tokenizers."""
        return list(prompts)

    @staticmethod
    def instruction(pipe: Any) -> str:
        """What its pipelines write around every prompt, so that its text encoder reads more than the prompt."""
        return ""

    @staticmethod
    def tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """How many tokens each of `prompts` has, and how many of them are read."""
        return [len(ids) for ids in pipe.tokenizer(list(prompts)).input_ids], pipe.tokenizer.model_max_length

    @staticmethod
    def cut_tokens(pipe: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Likewise of an encoder that reads less than that one and cuts the rest, which is told and not refused; none where none is."""
        return [], 0

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """What the network is told of `prompts`, unguided; texts of any batch are of one length.

        `sizes` [B, 6], of the image of each: height and width of the original, top and left of the crop, height and width of the target.
        """
        text, _ = cast(Any, pipe).encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Context(text.float())

    @classmethod
    def unconditional(cls, pipe: Any, device: torch.device, sizes: Tensor) -> Context:
        """What guidance tells it in place of a prompt, one sample: `negative`. Zeros where the pipeline says so (SDXL).

        `sizes` [1, 6]: see `context`.
        """
        c = cls.context(pipe, [cls.negative], device, sizes)
        if not pipe.config.get("force_zeros_for_empty_prompt"):
            return c
        return c._replace(text=torch.zeros_like(c.text), pooled=None if c.pooled is None else torch.zeros_like(c.pooled))

    def blank(self, n: int, tokens: int) -> Context:
        """Zeros of the shapes that `context` answers `n` prompts of so many `tokens` with, by its configuration: for a memory plan."""
        config = self.model.config
        width = next((config[name] for name in WIDTHS if config.get(name)), None)
        if width is None:
            raise ValueError(f"{type(self).__name__} does not say how wide its texts are: write blank()")
        return Context(torch.zeros(n, tokens, width))
