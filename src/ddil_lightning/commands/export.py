"""The command ddil-export: the student of a checkpoint as a pipeline folder."""

from __future__ import annotations

from ddil_lightning.commands.arguments import STEPS, Parser, device, path, place
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable


def export(argv: list[str]) -> int:
    """The student of a checkpoint as a diffusers pipeline folder, reloaded and compared."""
    parser = Parser("ddil-export", description=export.__doc__)
    parser.add_argument("--ckpt_path", type=place, required=True, help="a checkpoint file or a run folder")
    parser.add_argument("--out", type=path, required=True, help="the folder to write: a new or an empty one")
    parser.add_argument("--steps", type=STEPS, help="the step count that the folder recommends (default: what the student is made for)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of all components")
    parser.add_argument("--safety_checker", action="store_true", help="with the teacher's safety checker and its feature extractor")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Refusal(f"{args.out} is there and not an empty folder: choose another --out")
    check_writable(args.out / "model_index.json")
    import torch

    from ddil_lightning.commands.restore import restore
    from ddil_lightning.runs.export import check_prompts, deliver

    method = restore(args.ckpt_path).to(device())
    if not method.backbone.holds_students:
        raise Refusal(f"no pipeline can hold the student of {args.ckpt_path}: its weights are in the checkpoint")
    prompts, steps, dtype = check_prompts(method, []), args.steps or method.deployment.steps[0], getattr(torch, args.dtype)
    difference = deliver(method, args.out, prompts, steps, dtype, args.safety_checker)
    print(f"pipeline written and checked: {args.out} (latents differ by {difference:.1e})")
    return 0
