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
    """Raises ValueError for the name of a role, in an option of a method that has cast its roles, that is none of them."""
    unknown = [name for name in method.adapter.whole if name not in method.roles]
    if unknown:
        raise ValueError(f"adapter.whole has {unknown[0]!r}: the roles of {type(method).__name__} are {', '.join(method.roles)}")
    method.offload.check(method.roles, method.average is not None)
