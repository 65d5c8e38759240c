"""What every method has to keep, as functions that a test of one's own calls: `check_method(Mine, tmp_path, guidance=2.0)`.

The behaviour suite of the built-in methods calls the same. Nothing else of the package needs this one, and it needs no test runner.
"""

from ddil_lightning.testing.checks import (
    CHECKS,
    check_method,
    exports,
    fits,
    follows_its_seed,
    is_itself_without_rollouts,
    refuses_other_sources,
    resumes,
)
from ddil_lightning.testing.subject import Subject, make_pipeline
from ddil_lightning.testing.witness import Broken

__all__ = [
    "CHECKS",
    "Broken",
    "Subject",
    "check_method",
    "exports",
    "fits",
    "follows_its_seed",
    "is_itself_without_rollouts",
    "make_pipeline",
    "refuses_other_sources",
    "resumes",
]
