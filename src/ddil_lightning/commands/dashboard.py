"""The command ddil-dashboard: the W&B workspace of this library's runs, made by code and not by hand."""

from __future__ import annotations

import json
import sys
from typing import Any

from ddil_lightning.commands.arguments import Parser, path
from ddil_lightning.errors import Refusal, one_line
from ddil_lightning.files import check_writable, write_text


def dashboard(argv: list[str]) -> int:
    """Make the W&B workspace that shows runs of this library, in sections, over student updates; or print it, without a network."""
    parser = Parser("ddil-dashboard", description=dashboard.__doc__)
    parser.add_argument("--entity", help="the user or team that owns the project (default: yours)")
    parser.add_argument("--project", default="ddil-lightning", help="the W&B project of the runs (default: ddil-lightning)")
    parser.add_argument("--name", default="DDIL", help="of the workspace (default: DDIL)")
    parser.add_argument("--print", action="store_true", help="print the workspace as JSON and send nothing")
    parser.add_argument("--out", type=path, metavar="FILE.json", help="write it to a file and send nothing")
    parser.add_argument("--run", type=path, help="a run folder: say the command that sends what it has written offline")
    args = parser.parse_args(argv)
    sync = _sync(args.run) if args.run else ""
    if args.out:
        check_writable(args.out)
    if sync:  # first, for it needs no package; what --print writes to stdout is JSON alone
        print(f"{args.run} was logged offline, and is sent by: {sync}", file=sys.stderr if args.print else sys.stdout, flush=True)
    from ddil_lightning.runs.workspace import check_workspaces, spec, workspace

    try:
        check_workspaces()
    except ValueError as error:
        if not (sync and args.print) or args.out:
            raise
        print(f"no workspace is printed: {error}", file=sys.stderr)
        return 0
    if args.print or args.out:
        text = json.dumps(spec(workspace(args.entity or "ENTITY", args.project, args.name)), indent=2)
        if args.print:
            print(text)
        if args.out:
            write_text(args.out, text + "\n")
            print(f"written to {args.out}")
    else:
        print(f"workspace {_saved(args.entity, args.project, args.name)}")
    return 0


def _sync(run: Any) -> str:
    """The command that sends what a run has written offline. Raises Refusal where it has written nothing."""
    from ddil_lightning.runs.boards import sync_line

    line = sync_line(run)
    if not line:
        raise Refusal(f"--run {run}: no run that was logged by --wandb offline lies there: give the folder that ddil-fit made")
    return line


def _saved(entity: str | None, project: str, name: str) -> str:
    """Save the workspace -> its address. Raises Refusal where W&B refuses, and ValueError where it cannot be reached."""
    from ddil_lightning.runs.loggers import check_wandb
    from ddil_lightning.runs.workspace import workspace

    check_wandb("a workspace in W&B", "--print or --out FILE.json")
    import wandb

    try:
        address: str = workspace(entity or wandb.Api().default_entity, project, name).save().url
    except Exception as error:  # its client has no base of its errors
        raise Refusal(f"W&B does not take the workspace ({one_line(error)[:300]}): look at --entity and --project") from error
    return address
