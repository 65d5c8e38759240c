"""What methods with an adversary share besides it: its optimiser, its turns in a memory plan, and its place in checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ddil_lightning.backbones.network import Network
from ddil_lightning.training.adversary import Adversary
from ddil_lightning.training.gan import Gan

if TYPE_CHECKING:
    from ddil_lightning.training.method import Distillation as Base
else:
    Base = object  # configs name the classes below Distillation, and this is no method


class Contest(Base):
    """Beside Distillation: holds an `adversary`, which may be one without critic and head, and which learns at the rate `critic_lr`."""

    adversary: Adversary
    critic_lr: float

    @property
    def opposed(self) -> bool:
        """Whether there is somebody to descend beside the student."""
        return self.adversary.critic is not None or self.adversary.head is not None

    def discriminator(self, gan: Gan, head: nn.Module | None = None) -> dict[str, Any]:
        """What is cast for a discriminator, if there is one: its head, and a frozen network whose features it reads where the method has
        none that does (`initial`). `head`: the method's own, by default the backbone's."""
        if not gan.is_on:
            return {}
        network = self.backbone.network()
        if gan.features == "teacher" and getattr(type(network), "with_features", None) is Network.with_features:
            raise ValueError(f"{type(network).__name__}, the teacher's network, gives no features: set gan.features to initial")
        initial = gan.features == "initial"
        read = {"initial": self.role("student").copied("initial")} if initial else {}
        return {**read, "head": self.backbone.head(gan.layers, "student" if initial else gan.features) if head is None else head}

    def both(self) -> tuple[Any, Any]:
        """The optimisers of student and adversary; None for one that is not there."""
        optimizers: Any = self.optimizers()
        return tuple(optimizers) if self.opposed else (optimizers, None)

    def configure_optimizers(self) -> Any:
        """One for the student, and one for critic and head."""
        student = self.optimizer_of(self.student.weights(), self.lr)
        return [student, self.optimizer_of(self.adversary.weights(), self.critic_lr)] if self.opposed else student

    def on_student_turn(self) -> None:
        """The last batch of the critic's cycle."""
        self.adversary.updates += (-self.adversary.updates - 1) % self.adversary.every

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also where the run stands between two student updates."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ddil"] |= self.adversary.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore where the run stood between two student updates."""
        super().on_load_checkpoint(checkpoint)
        self.adversary.restore(checkpoint["ddil"])
