"""The tables and the page of benchmarks/zoo.py: a method a row, its variants as paired differences to the published loss."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import ANEW
from tables import Part, Report, mean_se
from toy2d_table import paired

from ddil_lightning.evaluation.registry import column

VARIANTS = {"base": "as published", "reflected": "+ Reflected", "ddil": "+ DDIL", "both": "+ both"}
REMEDIED = "remedied"
"""The variant that is the published student, sampled with each of REMEDIES."""
REMEDIES = ("es0.99", "es1.01", "es1.02", "es1.05", "ts20", "ts50")
"""Shifted times (ts) are told the variance of a sample (`-tv`), which their authors leave "
        "out: without it all times are moved upwards here, and that was not measured. The control has data at the times of the roll-outs, "
        "UFOGen's labels too, so that what DDIL adds to it is of the latents alone. What the tables show stands in "
        "[results](results.md#every-method).\n\n"
        "```bash\npython benchmarks/zoo.py --page docs/zoo.md\n```\n\n"
        "Seeds from 2000 on, which no setting was chosen on, in groups of three, which are trained in one process and share the plans of "
        "their roll-outs: they are not independent, and t says less than it seems; "
        f"{machines}; a cell's date and versions stand in its "
        "file, `benchmarks/zoo/`.\n\n"
    )
    return head + markdown({**told, "rows": []}) + "\n"
