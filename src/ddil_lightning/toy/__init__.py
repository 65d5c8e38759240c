"""The analytic toy: a Gaussian mixture in the plane as an exact teacher with guidance, and small MLPs as its students.

It stands behind the interface of `Backbone`, so methods, DataModule, callbacks and commands run on it unchanged. Many seeds are trained at
once: the last dimension of a latent [2, S] is the member, and member s is an experiment of its own, with its own data, noise and weights;
nothing that a network computes crosses members. What one process draws per row of a batch is shared by its members: time, class, guidance,
source and the plan of a roll-out. So several processes with other seeds belong to a result (benchmarks/toy2d.py).
"""

from ddil_lightning.toy.backbone import Toy

__all__ = ["Toy"]
