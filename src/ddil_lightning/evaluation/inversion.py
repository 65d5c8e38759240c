"""Prompt inversion: the words under which a teacher denoises a given image best, by PH2P (Mahajan et al., CVPR 2024; METHODS 7.1).

    E <- embeddings of K random words
    until U updates are done:
        `period` times, or as often as is left of U:                             projection is delayed
            t ~ late timesteps, eps ~ N(0, I)
            E <- Adam on | net(alpha_t z + sigma_t eps, t, text encoder(E)) - its target |^2
        E <- embeddings of the words nearest to E, by cosine                     projection
        prompt <- these words, if they denoise z better than any before

Late timesteps are those of high noise, where an image is its content and not yet its texture. Then, which PH2P has not, single words are
exchanged (`Search.passes`; the candidates of AutoPrompt and GCG, Shin et al. 2020, Zou et al. 2023):

    for every place k of the prompt, in random order:
        the `candidates` words with the least E_k' . dLoss/dE_k                  first order in the change of word
        the one of them that denoises z best takes the place, if it is better than the word that is there
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.vocabulary import Vocabulary
from ddil_lightning.bounds import at_least
from ddil_lightning.records import Context, take
from ddil_lightning.streams import Streams


@dataclass(frozen=True)
class Search:
    """How a prompt is searched.

    Args:
        tokens: words of a prompt, K; at most what the text encoder reads.
        updates: steps of Adam, U.
        period: steps between two projections; the last one comes after the rest of `updates`.
        lr: step size of Adam, in the units of the embeddings.
        timesteps: the first and the last training timestep that the loss is taken at.
        samples: pairs of timestep and noise in a loss, timesteps evenly spread.
        passes: rounds over the places of the prompt in which words are exchanged; 0 leaves it at PH2P as it is done here.
        candidates: words that are tried at a place.
    """

    tokens: int = 10
    updates: int = 40
    period: int = 10
    lr: float = 0.1
    timesteps: tuple[int, int] = (700, 999)
    samples: int = 8
    passes: int = 2
    candidates: int = 12

    @property
    def periods(self) -> list[int]:
        """The steps before each projection: `period`, and what is left of `updates`."""
        whole, rest = divmod(self.updates, self.period)
        return [self.period] * whole + [rest] * (rest > 0)

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, period=self.period, samples=self.samples, candidates=self.candidates)
        at_least(0, updates=self.updates, passes=self.passes)
        if not 0 <= self.timesteps[0] <= self.timesteps[1]:
            raise ValueError(f"timesteps {self.timesteps[0]} {self.timesteps[1]}: give the smaller one first, from 0 on")


class Noise(NamedTuple):
    """What a loss is taken at: M timesteps, and a noise for each."""

    t: Tensor  # [M]
    eps: Tensor  # [M, C, h, w]

    def split(self, chunk: int) -> list[Noise]:
        """At most `chunk` of them at a time."""
        return [Noise(t, eps) for t, eps in zip(self.t.split(chunk), self.eps.split(chunk), strict=True)]


class Objective(Protocol):
    """What the search minimises: of an image, or of anything else that texts can be judged by. `chunk`: how many
    samples its gradient is taken of at a time."""

    chunk: int

    def __call__(self, embeddings: Tensor, noise: Noise) -> Tensor:
        """The loss [B] of prompts whose words are `embeddings` [B, K, D]."""
        ...

    def draw(self, search: Search, generator: torch.Generator) -> Noise:
        """What one loss is taken at."""
        ...


class Denoising:
    """The teacher's own loss of an image, in the space of its network, as a function of the words.

    `latent` [C, h, w] of the image. The network is asked without guidance, as it is trained.
    """

    def __init__(self, vocabulary: Vocabulary, latent: Tensor) -> None:
        self.vocabulary, self.backbone = vocabulary, vocabulary.backbone
        self.latent = latent.to(self.backbone.device)
        self.chunk = sampling.batch(self.backbone.latent_shape)

    def draw(self, search: Search, generator: torch.Generator) -> Noise:
        """`search.samples` timesteps, one in each of as many equal parts of the range, and as many noises."""
        n, (low, high) = search.samples, search.timesteps
        u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
        t = low + (u * (high - low + 1)).long().clamp(max=high - low)
        return Noise(t, torch.randn(n, *self.latent.shape, generator=generator))

    def __call__(self, embeddings: Tensor, noise: Noise) -> Tensor:
        """The mean [B] over the noise of the mean squared error of the network's answer."""
        return self.told(self.vocabulary.encode(embeddings), noise)

    def told(self, c: Context, noise: Noise) -> Tensor:
        """The loss [B] under contexts `c` of B prompts, however they were made."""
        b, m = len(c.text), len(noise.t)
        index = torch.arange(b).repeat_interleave(m)
        parts = [self._errors(take(c, i), Noise(noise.t[k], noise.eps[k])) for i, k in _pairs(index, m, self.chunk)]
        return torch.cat(parts).view(b, m).mean(1)

    def _errors(self, c: Context, noise: Noise) -> Tensor:
        schedule, kind, device = self.backbone.schedule, self.backbone.predicts, self.latent.device
        t, eps = noise.t.to(device), noise.eps.to(device)
        z = self.latent.expand_as(eps)
        out = self.backbone.network()(schedule.add_noise(z, eps, t), schedule.time(t), c)
        return (out.float() - schedule.target(kind, z, eps, t)).square().flatten(1).mean(1)


def _pairs(index: Tensor, m: int, chunk: int) -> list[tuple[Tensor, Tensor]]:
    """All pairs of a prompt and a noise, `chunk` at a time: indices of the one and of the other."""
    other = torch.arange(m).repeat(len(index) // m)
    return list(zip(index.split(chunk), other.split(chunk), strict=True))


class Found(NamedTuple):
    """A prompt, its rows of the vocabulary, its loss, and the losses of the kept prompt after every projection and every pass."""

    prompt: str
    rows: Tensor  # [K]
    loss: float
    trace: list[float]


def invert(objective: Objective, vocabulary: Vocabulary, search: Search = Search(), seed: int = 0) -> Found:
    """The prompt that minimises `objective`, an image's `Denoising` loss. It follows from the arguments alone: no image knows another.

    Prompts are compared on one draw of noise, which the updates do not see. Raises ValueError for more tokens than the encoder reads, and
    where no prompt has a finite loss.
    """
    vocabulary.check_tokens(search.tokens)
    streams, held = Streams(seed, 0), held_noise(objective, search, seed)
    best = Found("", torch.empty(0), math.inf, [])
    for rows in _delayed_projection(objective, vocabulary, search, streams):
        best = _better(best, rows, objective, vocabulary, held)
    if not math.isfinite(best.loss):
        raise ValueError("no prompt has a finite denoising loss: the latent or the teacher holds NaN or infinity")
    generator = streams.local("places")
    for _ in range(search.passes):
        best = _exchange(best, objective, vocabulary, search, held, generator)
    return best


def held_noise(objective: Objective, search: Search, seed: int) -> Noise:
    """The noise on which `invert` compares prompts, for who compares others with them."""
    return objective.draw(search, Streams(seed, 0).local("held noise"))


def _delayed_projection(objective: Objective, vocabulary: Vocabulary, search: Search, streams: Streams) -> Iterator[Tensor]:
    """PH2P: rows [K] of the words at the start and after every projection."""
    generator = streams.local("updates")
    rows = torch.randint(len(vocabulary), (search.tokens,), generator=generator).to(vocabulary.table.device)
    yield rows
    for steps in search.periods:
        embeddings = vocabulary.table[rows]
        adam = torch.optim.Adam([embeddings], lr=search.lr)  # anew: moments from before a projection belong to other embeddings
        for _ in range(steps):
            embeddings.grad = _slope(objective, embeddings, objective.draw(search, generator))
            adam.step()
        rows = vocabulary.nearest(embeddings)
        yield rows


def _exchange(best: Found, objective: Objective, vocabulary: Vocabulary, search: Search, held: Noise, generator: torch.Generator) -> Found:
    """One round over the places of the prompt, in each of which a word may give way to a better one."""
    table, loss = vocabulary.table, best.loss
    for k in torch.randperm(search.tokens, generator=generator).tolist():
        slope = _slope(objective, table[best.rows], held)
        tried = (table @ slope[k]).topk(min(search.candidates, len(table)), largest=False).indices
        prompts = best.rows.repeat(len(tried), 1)
        prompts[:, k] = tried
        losses = _losses(prompts, objective, vocabulary, held)
        if losses.min() < loss:
            loss = float(losses.min())
            best = best._replace(rows=prompts[losses.argmin()])
    return best._replace(prompt=vocabulary.text(best.rows), loss=loss, trace=[*best.trace, loss])


def _better(best: Found, rows: Tensor, objective: Objective, vocabulary: Vocabulary, held: Noise) -> Found:
    """The better of the kept prompt and of `rows`, which joins the trace."""
    loss = float(_losses(rows[None], objective, vocabulary, held))
    if loss < best.loss:
        best = Found(vocabulary.text(rows), rows, loss, best.trace)
    return best._replace(trace=[*best.trace, best.loss])


def _slope(objective: Objective, embeddings: Tensor, noise: Noise) -> Tensor:
    """The gradient [K, D] of the loss of one prompt; memory holds the graph of `objective.chunk` samples at most."""
    total = torch.zeros_like(embeddings)
    for part in noise.split(objective.chunk):
        leaf = embeddings.detach().clone().requires_grad_()
        total += torch.autograd.grad(objective(leaf[None], part).sum(), leaf)[0] * len(part.t) / len(noise.t)
    return total


@torch.no_grad()
def _losses(rows: Tensor, objective: Objective, vocabulary: Vocabulary, noise: Noise) -> Tensor:
    """The losses [B] of prompts of words, rows [B, K]."""
    return objective(vocabulary.table[rows], noise)
