"""A miniature Stable Diffusion 3 beside a built-in one: a transformer trained by flow matching on its latents, texts and data.

The autoencoder, tokenizer and text encoder are those of the pipeline that it is made of: the latter twice, as both of its CLIPs. Its T5 has
no layers and says nothing: without one, diffusers reads no such folder by itself. So what differs between the two teachers is the network
and the path it was taught.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_lightning.diffusion.alike import Alike
from ddil_lightning.miniature.settings import HEAD, TransformerTraining
from ddil_lightning.miniature.stages import Stage, dropped, stratified, token_ids

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

T5_ZEROS = 256
"""The tokens of T5 that the pipeline reads (its max_sequence_length), all of them zero here."""
MIDDLE = (0.55, 0.95)
"""The sigmas at which the caption decides about shapes."""


def build_transformer(size: int, text: int, width: int, layers: int) -> SD3Transformer2DModel:
    """A transformer on `size` x `size` latents in patches of two, which reads two text encoders of this width."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=2 * text,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text,
        pos_embed_max_size=size // 2,
        qk_norm="rms_norm",
    )


def with_projection(encoder: Any) -> CLIPTextModelWithProjection:
    """The same text encoder with a projection of its pooled state that leaves it as it is."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = encoder.config.hidden_size
    made = CLIPTextModelWithProjection(CLIPTextConfig(**{**encoder.config.to_dict(), "projection_dim": width}))
    made.text_model.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        made.text_projection.weight.copy_(torch.eye(width))
    return made.eval().requires_grad_(False)


def silent(vocabulary: int, width: int) -> T5EncoderModel:
    """A T5 without layers whose states are zeros, as those of Stable Diffusion 3 without T5 are."""
    from transformers import T5Config, T5EncoderModel

    made = T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1))
    nn.init.zeros_(made.shared.weight)
    return made.eval().requires_grad_(False)


def build_pipeline(source: StableDiffusionPipeline, told: TransformerTraining) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 with a fresh transformer on the frozen parts of `source`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    text = with_projection(source.text_encoder)
    config = source.unet.config
    source.vae.register_to_config(shift_factor=0.0)  # its pipeline subtracts a number in any case
    return StableDiffusion3Pipeline(
        transformer=build_transformer(config.sample_size, config.cross_attention_dim, told.width, told.layers),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=told.shift),
        vae=source.vae.eval().requires_grad_(False),
        text_encoder=text,
        tokenizer=source.tokenizer,
        text_encoder_2=text,
        tokenizer_2=source.tokenizer,
        text_encoder_3=silent(len(source.tokenizer), 2 * config.cross_attention_dim),
        tokenizer_3=source.tokenizer,
    )


class FlowDenoiser(nn.Module):
    """The transformer, and the frozen text encoder whose states it is told, which no optimiser sees."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        transformer.set_attn_processor(Alike())  # type: ignore[operator]
        self._text = [text_encoder]  # no child: it is neither trained, averaged nor saved

    def forward(self, x_t: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """eps - x0 [B, C, H, W] at x_t = (1 - sigma) x0 + sigma eps, sigma [B], of token ids [B, L]."""
        with torch.no_grad():
            text, pooled = read(self._text[0].to(x_t.device), ids)
        out: Tensor = self.transformer(
            x_t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=1000 * sigma,
            joint_attention_kwargs={"alike": T5_ZEROS},
            return_dict=False,
        )[0]
        return out


def read(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The text states [B, L + 1, 2 D] and the pooled ones [B, 2 D] of ids [B, L], as the pipeline has them, with one zero for T5's all."""
    out = encoder(ids, output_hidden_states=True)
    state, pooled = out.hidden_states[-2], out[0]
    return F.pad(torch.cat([state, state], -1), (0, 0, 0, 1)), torch.cat([pooled, pooled], -1)


def called(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> dict[str, Any]:
    """What a call of the pipeline is given for prompts, so that equal zeros are asked once; its images are those of `prompt`."""
    told: dict[str, Any] = {"joint_attention_kwargs": {"alike": T5_ZEROS}}
    for name, texts in (("", prompts), ("negative_", [""] * len(prompts))):
        text, pooled = read(pipeline.text_encoder, token_ids(pipeline.tokenizer, texts))
        told |= {f"{name}prompt_embeds": text, f"{name}pooled_prompt_embeds": pooled}
    return told


class FlowStage(Stage):
    """Flow matching with caption dropout: |v(x_t, sigma) - (eps - x0)|^2 on stratified sigmas."""

    empty: Tensor

    def __init__(self, *, live: FlowDenoiser, empty: Tensor, caption_dropout: float = 0.1, focus: float = 0.0, **options: Any) -> None:
        super().__init__(live=live, **options)
        self.focus = focus  # share of the sigmas drawn from `MIDDLE` alone
        self.register_buffer("empty", empty)  # [1, L], the ids of the empty prompt
        self.caption_dropout = caption_dropout

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch (latents [B, 4, h, w], ids [B, L])."""
        x0, ids = batch
        ids = dropped(ids, self.empty, self.caption_dropout)
        sigma = stratified(len(x0), MIDDLE, self.focus, x0.device)
        eps, s = torch.randn_like(x0), sigma[:, None, None, None]
        loss = F.mse_loss(self.live((1 - s) * x0 + s * eps, sigma, ids), eps - x0)
        if batch_idx % 50 == 0:
            self.log("loss", loss.detach(), prog_bar=True)
        return loss
