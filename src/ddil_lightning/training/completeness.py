"""What a method must have set, and what the names in its options can be."""

from __future__ import annotations

from typing import Any


def check_complete(method: Any) -> None:
    """Raises TypeError, naming it, for what a method has not set that it must."""
    lacking = [f"{name} (cast it in the constructor)" for name in ("student", "teacher") if name not in method.roles]
    lacking += [name for name in ("policies", "grid") if not hasattr(method, name)]
    lacking += ["deploy(student)"] if type(method).deploy.__qualname__ == "Distillation.deploy" else []
    if lacking:
        raise TypeError(f"{type(method).__name__} lacks {', '.join(lacking)}: see Distillation and CONTRIBUTING.md")


def check_names(method: Any) -> None:
    """Raises ValueError for a name, in an option of a method that has cast its roles, that is none of the roles that the option is for."""
    trained = [name for name, role in method.roles.items() if role.weights()]  # a frozen one is a copy of one of them
    networks = getattr(getattr(method.backbone, "source", None), "networks", {})
    for option, names in (("adapter.whole", method.adapter.whole), ("model.pipeline.networks", networks)):
        unknown = [name for name in names if name not in trained]
        if unknown:
            raise ValueError(f"{option} has {unknown[0]!r}: the roles that {type(method).__name__} trains are {', '.join(trained)}")
    method.offload.check(method.roles, method.average is not None)
