"""The W&B workspace of runs of this library as code: panels in sections, over student updates."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.table import CLOCK
from ddil_lightning.runs.boards import PROJECT

NAME = "DDIL"


class Lines(NamedTuple):
    """A panel of curves: its title, its names (or `regex`, which finds them), and whether its axis is logarithmic or stacked to 100 %."""

    title: str
    names: Sequence[str] = ()
    regex: str | None = None
    log: bool = False
    stacked: bool = False


ACTORS = ("forward", "student", "teacher")
CURVES = {
    "Training": (
        Lines("Loss", ("train/loss",), log=True),
        Lines("Loss by the source of latents", regex="^loss/.+", log=True),
        Lines("Learning rate", ("train/lr",)),
        Lines("Critic and GAN", ("train/critic_loss", "train/denoising", "train/gan")),
        Lines("Estimates on the edge of the box", ("reflect/saturated",)),
    ),
    "Covariate shift": (
        Lines("Distance to the teacher's latents, by node", regex="^shift/teacher@.+"),
        Lines("Distance to noised data, by node", regex="^shift/forward@.+"),
        Lines("Distances, mean over nodes", ("shift/teacher", "shift/forward")),
        Lines("Coverage of the teacher's latents at the last node", ("shift/coverage",)),
        Lines("Loss on own latents over loss on the teacher's", regex="^shift/loss_ratio.*"),
    ),
    "Prior and buffer": (
        Lines("Prior", tuple(f"prior/{name}" for name in ACTORS), stacked=True),
        Lines("Drawn", tuple(f"drawn/share_{name}" for name in (*ACTORS, "mixed")), stacked=True),
        Lines("Buffer, by source", tuple(f"buffer/share_{name}" for name in (*ACTORS, "mixed")), stacked=True),
        Lines("Buffer: states", ("buffer/size", "buffer/ess", "buffer/rejected")),
        Lines("Buffer: age in updates", ("buffer/age",)),
    ),
}
"""The curves of every section, in order, by the names that boards show them under."""


def check_workspaces() -> None:
    """Raises ValueError where the package that makes workspaces is not installed."""
    if find_spec("wandb_workspaces") is None:
        raise ValueError("a workspace needs wandb-workspaces, which is not installed: pip install 'ddil-lightning[dashboard]'")


def workspace(entity: str, project: str = PROJECT, name: str = NAME) -> Any:
    """The workspace as an object of wandb-workspaces; nothing is sent. Raises ValueError where that package is not installed."""
    check_workspaces()
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    previews = [
        wr.MediaBrowser(title="Teacher and student", media_keys=["previews/sheet"], num_columns=1, mode="gallery", gallery_axis="step"),
        wr.MediaBrowser(title="The student's pictures", media_keys=[f"previews/student_{n}" for n in (8, 4, 2, 1)], num_columns=8),
    ]
    shown = [column for column in columns() if column.shown]
    bars = [wr.BarPlot(title=c.heading, metrics=[wr.SummaryMetric(f"eval/{c.key}_student_{n}") for n in (4, 2, 1)]) for c in shown]
    measured = tuple(Lines(c.heading, regex=rf"^validation/{c.key}_\d+$") for c in shown)
    sections = [
        ws.Section("Previews", previews, is_open=True),
        *(
            ws.Section(title, [_panel(wr, lines) for lines in found], is_open=True)
            for title, found in {**CURVES, "Validation": measured}.items()
        ),
        ws.Section("Results", [wr.WeavePanelSummaryTable(table_name="eval/rows"), *bars], is_open=True),
    ]
    settings = ws.WorkspaceSettings(x_axis=CLOCK, group_by_prefix="first", max_runs=20)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panel(wr: Any, lines: Lines) -> Any:
    stacked = {"plot_type": "pct-area"} if lines.stacked else {}
    found = {"metric_regex": lines.regex} if lines.regex else {"y": list(lines.names)}
    return wr.LinePlot(title=lines.title, x=CLOCK, title_x=CLOCK.replace("_", " "), log_y=lines.log or None, **found, **stacked)


def spec(made: Any) -> dict[str, Any]:
    """A workspace as the table that W&B stores, which `save` would send."""
    found: dict[str, Any] = made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return found
