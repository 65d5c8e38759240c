"""The stages of pretraining as LightningModules, and the streams of fresh data that feed them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

MIDDLE = (0.5, 0.95)  # where a wrong shape in the caption costs most, measured on a trained miniature
# (n, seed) -> (images [n, 3, H, W] in [-1, 1], n captions)
Source = Callable[[int, int], tuple[Tensor, list[str]]]


def stream_seed(seed: int, rank: int, i: int) -> int:
    """Seed of a rank's i-th draw: odd multipliers keep the streams of ranks and runs apart."""
    return (seed * 1_000_003 + rank * 40_503_001 + i * 97) % (1 << 62)


class FreshImages(IterableDataset[tuple[Tensor, list[str]]]):
    """An endless stream of newly drawn batches (images, captions), reproducible from its seed."""

    def __init__(self, *, source: Source, batch_size: int, seed: int) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        i = 0
        while True:
            yield self.source(self.batch_size, stream_seed(self.seed, 0, i))
            i += 1


class FreshLatents(IterableDataset[tuple[Tensor, Tensor]]):
    """An endless stream of (scaled latents [B, 4, h, w], token ids [B, L]) out of a pool that is renewed all the time.

    Before each batch the oldest `batch_size / reuse` entries give way to newly drawn and encoded images, so that an image
    is used `reuse` times on average and encoding costs 1 / `reuse` of an encoder pass per image.
    """

    def __init__(self, *, source: Source, pipeline: Any, batch_size: int, seed: int, pool: int = 2048, reuse: int = 2) -> None:
        self.source, self.batch_size, self.seed, self.pool, self.reuse = source, batch_size, seed, pool, reuse
        self.vae, self.tokenizer = pipeline.vae, pipeline.tokenizer
        self.rank = 0  # known once the processes run

    @torch.no_grad()
    def fresh(self, n: int, i: int) -> tuple[Tensor, Tensor]:
        """The i-th draw of this rank: scaled latents [n, 4, h, w] and token ids [n, L] of newly drawn images."""
        images, captions = self.source(n, stream_seed(self.seed, self.rank + 1, i))
        latents = [self.vae.encode(part).latent_dist.mean for part in images.split(64)]
        return torch.cat(latents) * self.vae.config.scaling_factor, token_ids(self.tokenizer, captions)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        latents, ids = self.fresh(self.pool, 0)
        rng = torch.Generator().manual_seed(stream_seed(self.seed, self.rank + 1, -1))
        n, i = max(1, self.batch_size // self.reuse), 0
        while True:
            i += 1
            at = torch.arange(i * n, (i + 1) * n) % self.pool
            latents[at], ids[at] = self.fresh(n, i)
            rows = torch.randperm(self.pool, generator=rng)[: self.batch_size]
            yield latents[rows], ids[rows]


def token_ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """The token ids [B, L] int64 of captions, padded as the pipeline pads them."""
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def held_then_cosine(step: int, total: int, hold: float, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, held until `hold * total`, then a cosine to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = max(0.0, (step - hold * total) / max(1.0, (1 - hold) * total))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Stage(LightningModule):
    """A stage trains `live` and keeps an exponential moving average of it in `average`, which is what ships."""

    live: Any
    average: Any

    def __init__(
        self, *, live: nn.Module, steps: int, lr: float, hold: float, ema: float, seed: int = 0, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        self.live = live
        self.average = copy.deepcopy(live).requires_grad_(False).eval()
        self.steps, self.lr, self.hold, self.ema, self.weight_decay = steps, lr, hold, ema, weight_decay
        self.seed, self.seen = seed, 0

    def on_train_start(self) -> None:
        """Seed every process differently, and give it one thread where there are several."""
        # Lightning gives every process the same seed, and then both would train on the same noise
        torch.manual_seed(stream_seed(self.seed, self.global_rank + 1, 0))
        if self.trainer.world_size > 1:
            torch.set_num_threads(1)

    def configure_optimizers(self) -> Any:
        """AdamW with a learning rate that is warmed up, held and then decayed (`held_then_cosine`)."""
        trained = [p for p in self.live.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True)
        warmup = min(200, max(1, self.steps // 20))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: held_then_cosine(step, self.steps, self.hold, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()  # else the average would become part of an ever longer graph
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the averaged weights towards the trained ones."""
        self.seen += 1
        decay = min(self.ema, (1 + self.seen) / (10 + self.seen))  # the first average would otherwise be the initial weights
        torch._foreach_lerp_([*self.average.parameters()], [*self.live.parameters()], 1 - decay)


class AutoencoderStage(Stage):
    """Autoencoder: squared error + .05 absolute error + 2e-4 KL per element; `decoder_only` leaves the latents as they are."""

    def __init__(self, *, live: AutoencoderKL, decoder_only: bool = False, **options: Any) -> None:
        super().__init__(live=live.requires_grad_(True), weight_decay=0.0, **options)
        self.decoder_only = decoder_only
        if decoder_only:
            for part in (live.encoder, live.quant_conv):
                part.requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        """The autoencoder's reconstruction and KL loss."""
        images = batch[0]
        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.live.encode(images).latent_dist
        made = self.live.decode(posterior.mean if self.decoder_only else posterior.sample()).sample
        loss = F.mse_loss(made, images) + 0.05 * F.l1_loss(made, images)
        if not self.decoder_only:
            loss = loss + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        if batch_idx % 20 == 0:
            self.log("loss", loss.detach(), prog_bar=True)
        return loss


class Denoiser(nn.Module):
    """U-Net and text encoder, which are trained together."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """v [B, C, H, W] from noised latents, times [B] and token ids [B, L]."""
        v: Tensor = self.unet(x_t, t, self.text_encoder(ids)[0]).sample
        return v


def dropped(ids: Tensor, empty: Tensor, share: float) -> Tensor:
    """The token ids [B, L], of which a share is `empty` [1, L], so that the network can be guided."""
    return torch.where(torch.rand(len(ids), 1, device=ids.device) < share, empty, ids)


def stratified(n: int, middle: tuple[float, float], focus: float, device: torch.device) -> Tensor:
    """[n] shares of the way to noise, even over the batch: the loss varies by orders of magnitude along it, most of its variance.

    `focus`: how many of them lie between the bounds of `middle` alone.
    """
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    inner = middle[0] + u / max(focus, 1e-6) * (middle[1] - middle[0])
    return torch.where(u < focus, inner, (u - focus) / (1 - focus))


class DenoiserStage(Stage):
    """v-prediction with caption dropout; eps would amplify the error of x0 fifteen-fold at t = 999, where layout is decided."""

    alpha: Tensor
    sigma: Tensor
    empty: Tensor

    def __init__(
        self, *, live: Denoiser, scheduler: Any, empty: Tensor, caption_dropout: float = 0.1, focus: float = 0.0, **options: Any
    ) -> None:
        super().__init__(live=live, **options)
        self.focus = focus  # share of the timesteps drawn from `MIDDLE` alone
        alpha_bar = scheduler.alphas_cumprod.float()
        self.register_buffer("alpha", alpha_bar.sqrt()[:, None, None, None])
        self.register_buffer("sigma", (1 - alpha_bar).sqrt()[:, None, None, None])
        self.register_buffer("empty", empty)  # [1, L], the ids of the empty prompt
        self.caption_dropout = caption_dropout

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The v loss on stratified times, with some captions dropped so that the network can be guided."""
        x0, ids = batch
        ids = dropped(ids, self.empty, self.caption_dropout)
        t = (stratified(len(x0), MIDDLE, self.focus, x0.device) * len(self.alpha)).long()
        alpha, sigma, noise = self.alpha[t], self.sigma[t], torch.randn_like(x0)
        v = self.live(alpha * x0 + sigma * noise, t, ids)
        loss = F.mse_loss(v, alpha * noise - sigma * x0)
        if batch_idx % 50 == 0:
            self.log("loss", loss.detach(), prog_bar=True)
        return loss


def loader(dataset: IterableDataset[Any]) -> DataLoader[Any]:
    """A loader that hands on the batches of a stream as they come, in the process itself."""
    return DataLoader(dataset, batch_size=None, num_workers=0)
