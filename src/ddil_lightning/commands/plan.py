"""ddil-fit --plan: the memory of a run in advance, from configurations alone, and what would make it smaller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from ddil_lightning import plugins
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.source import Source
from ddil_lightning.commands.assembly import Assembly
from ddil_lightning.commands.checks import check_exports
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.data.preparation import encodes, memory_of, own_captions
from ddil_lightning.imitation.buffer import FINE
from ddil_lightning.runs.memory import gib, room
from ddil_lightning.texts import by
from ddil_lightning.training.footprint import Footprint, Setting, bytes_of, footprint
from ddil_lightning.training.frugality import smaller
from ddil_lightning.training.options import Memory


class PlanCLI(Assembly):
    """Makes method and data of a config, the pipeline of its configurations alone; no trainer."""

    def before_instantiate_classes(self) -> None:
        """What a plan has no use for is not made: weights, and data that stay where they are."""
        model, data = self.config.model.init_args, self.config.data
        if isinstance(model.pipeline, str) or not hasattr(model.pipeline, "class_path"):
            model.pipeline = Outline(Source.of(model.pipeline), **Memory(**vars(model.memory)).stored, bare=True)
        if data.cache is not True:
            data.captions = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """None, after what the parts ask of each other was checked."""
        self.check_parts()
        check_exports(self.model, self.config_init.export_steps)
        return None  # type: ignore[return-value]


class Held(NamedTuple):
    """What a process has in the memory of its host, in bytes."""

    cached: int
    buffer: int


def plan(words: Sequence[str]) -> int:
    """Print the plan of a command line; 0."""
    plugins.load()
    cli = PlanCLI(words)
    encoded = not encodes(cli.datamodule.captions, cli.datamodule.cache)
    setting = setting_of(cli.config.trainer, cli.datamodule.batch_size)._replace(encoded=encoded)
    made, host = footprint(cli.model, setting), held(cli.model, cli.datamodule)
    on = bool(cli.model.gradient_checkpointing)
    other = recomputing(cli.model, setting, not on)
    print("\n".join(table(cli.model, setting, made, other, host)))
    print("\n".join(advice(cli.model, setting, made, other, host)))
    return 0


def expected(method: Any, data: Any, trainer: Any) -> int:
    """The bytes that a plan says of the run of a `trainer`: on its device, or, where that is the CPU, with what the host keeps."""
    cuda = trainer.strategy.root_device.type == "cuda"
    name = type(trainer.strategy).__name__
    strategy = "fsdp2" if name == "Sharded" else "ddp" if name.startswith("DDP") else ""
    made = footprint(method, Setting(data.batch_size, str(trainer.precision), trainer.world_size, strategy, cuda, not data.encodes))
    return made.total + (0 if cuda else sum(held(method, data)))


def recomputing(method: Any, setting: Setting, on: bool) -> Footprint:
    """The footprint with gradient checkpointing on or off; the method is left so."""
    for role in method.roles.values():  # the frozen ones too: gradients may pass through them
        role.network.recompute(on)
    return footprint(method, setting)


def setting_of(trainer: Any, batch: int) -> Setting:
    """Where the config's trainer would work, on the present machine."""
    wanted = str(trainer.accelerator or "auto")
    there = torch.cuda.device_count()
    cuda = wanted in ("gpu", "cuda") or (wanted == "auto" and there > 0)
    nodes = int(trainer.num_nodes or 1)
    devices = _count(trainer.devices, max(there, 1) if cuda else 1) * nodes
    strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
    name = "fsdp2" if "fsdp2" in str(strategy) or "Sharded" in str(strategy) else "ddp" if "ddp" in str(strategy).lower() else ""
    return Setting(batch, str(trainer.precision or "32-true"), devices, name or ("ddp" if devices > 1 else ""), cuda, nodes=nodes)


def _count(devices: Any, present: int) -> int:
    """How many devices `trainer.devices` stands for."""
    if isinstance(devices, list):
        return max(len(devices), 1)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() and int(text) > 0 else present


def held(method: Any, data: Any) -> Held:
    """What one process keeps of encoded data and of roll-outs on the host."""
    latent = torch.Size(method.backbone.latent_shape).numel()
    text = sum(bytes_of(x.float()) for x in method.backbone.null() if x is not None)
    captions, buffer = data.captions, _buffer(method, data, latent, text)
    if data.cache is not True or (isinstance(captions, Encoded) and captions.file):
        return Held(0, buffer)
    if captions is None:
        captions = method.backbone.captions or own_captions(method.backbone)
    return Held(memory_of(captions, method.backbone), buffer)


def _buffer(method: Any, data: Any, latent: int, text: int) -> int:
    """A full buffer: states in half precision unless late ones are among them, an answer to each, and a text for every roll-out."""
    if data.buffer is None or not data.prior.rollouts:
        return 0
    walks = [walk.nodes.tolist() for walk in method.walks()] or [[FINE]]
    width = 4 if min(map(min, walks)) < FINE else 2
    if hasattr(method, "answer"):  # what its frozen teacher is asked at a state (feed.Feed.answered)
        width += {"float32": 4, "float16": 2, "none": 0}[data.buffer.answers.storage]
    return data.buffer.capacity * width * latent + data.buffer.capacity // min(map(len, walks)) * text


def table(method: Any, setting: Setting, made: Footprint, other: Footprint, host: Held) -> list[str]:
    """The plan, a line each."""
    where = "GPU" if setting.cuda else "CPU"
    many = f"each of {setting.devices} {where}s" if setting.devices > 1 else f"one {where}"
    how = ", ".join(filter(None, [setting.strategy, setting.precision, f"batches of {setting.batch}"]))
    side = "" if method.backbone.size is None else f" at {by(method.backbone.size)} px"
    found = [f"memory plan: {type(method).__name__} of {method.backbone.path}{side}, on {many}, {how}; in GiB", ""]
    found.append(f"{'':<12}{'weights':>11}{'gradients':>11}{'optimiser':>11}")
    shown = [part for part in made.parts if part.gradients or 1000 * part.weights >= made.of("weights")]
    rows = [(part.name, part.weights, part.gradients, part.optimizer) for part in shown]
    rows.append(("together", made.of("weights"), made.of("gradients"), made.of("optimizer")))
    found += [f"{name:<12}{_shown(w):>11}{_shown(g):>11}{_shown(o):>11}" for name, w, g, o in rows]
    plain, frugal = (other, made) if method.gradient_checkpointing else (made, other)
    words = [_shown(plain.activations), _shown(frugal.activations) + " with gradient checkpointing"]
    words[method.gradient_checkpointing] += " (as it is set)"
    found += ["", f"activations {', '.join(words)}; {_shown(made.encoding)} pass while a batch of images is encoded"]
    if made.buckets:
        found.append(f"ddp's buckets, in which the gradients are all the time {_shown(made.buckets)}")
    if made.gathered:
        found.append(f"gathered by fsdp2 {_shown(made.gathered)}")
    if made.whole:
        found.append(f"the student whole, where it is exported {_shown(made.whole)}")
    cached, buffer = (_shown(setting.here * size) for size in host)
    whose = f" of a machine, whose {setting.here} processes have one each" if setting.here > 1 else ""
    found.append(f"encoded data in memory {cached}, a full buffer of roll-outs {buffer}, on the host{whose}")
    if setting.here > 1 and host.cached:
        found.append("(one for all processes: data.cache=FILE, which they make and map together, or the folder of ddil-cache)")
    together = f" of {setting.here} processes" if setting.here > 1 and not setting.cuda else ""
    most = total(made, setting, host)
    return [*found, "", f"most at a time{together} {_shown(most)}: {_verdict(most, setting)}"]


def total(made: Footprint, setting: Setting, host: Held) -> int:
    """What counts against the device; a CPU is the host as well, and that of all processes of its machine."""
    return made.total if setting.cuda else setting.here * (made.total + sum(host))


def _shown(size: int) -> str:
    """GiB, with two decimals of what is small."""
    value = gib(size)
    return "-" if size == 0 else f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 0.01 else "< 0.01"


CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)
"""The memory of GPUs that there are, GB."""
SPARED = 0.95
"""The share of it that is left by driver and allocator."""


def _verdict(size: int, setting: Setting) -> str:
    """Whether it fits the present device."""
    there = room(setting.cuda)
    if there is None:
        card = next((card for card in CARDS if size <= SPARED * card * 10**9), None)
        return "there is no GPU here; " + ("more than any card has" if card is None else f"a card of {card} GB would hold it")
    memory, name = there
    return f"{name} has {gib(memory):.1f}, {'it fits' if size <= memory else 'it does not fit'}"


def advice(method: Any, setting: Setting, made: Footprint, other: Footprint, host: Held) -> list[str]:
    """What would make it smaller, each by itself, what changes the result least first; what saves nothing is left out."""
    now = total(made, setting, host)
    found = [(words, total(changed, setting, host)) for words, changed in smaller(method, setting, made, other)]
    width = max((len(words) for words, _ in found), default=0)
    told = [f"  {words:<{width}}  {_shown(size)}" for words, size in found if size < 0.99 * now]
    return ["it would be, with", *told] if told else []
