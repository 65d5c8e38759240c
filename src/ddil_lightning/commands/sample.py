"""The command ddil-sample: a picture of prompts, drawn by any pipeline as its users call it."""

from __future__ import annotations

from ddil_lightning.commands import generating
from ddil_lightning.commands.arguments import SCALE, SEED, STEPS, Parser, advising, check_steps, device, guidance_scale, number, path, place
from ddil_lightning.errors import Refusal
from ddil_lightning.files import check_writable, replacing


def sample(argv: list[str]) -> int:
    """Images of prompts from a pipeline folder."""
    parser = Parser("ddil-sample", description=sample.__doc__)
    parser.add_argument("--pipeline", type=place, required=True, help="a folder, a hub id, builtin, builtin/digits or builtin/flow")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    parser.add_argument("--truncate", action="store_true", help="cut prompts that are too long for the text encoder")
    parser.add_argument("--steps", type=STEPS, help="default: what the pipeline recommends, else 32")
    parser.add_argument("--guidance", type=SCALE, help="default: what the pipeline recommends")
    parser.add_argument("--size", type=number(1, 16384), nargs="+", help="height and width in pixels, or one number (default: its own)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--n", type=number(1, 1000), default=1, help="images per prompt")
    parser.add_argument("--scale", type=number(1, 64), help="enlarge every pixel (default: to at least 256)")
    generating.add_dtype(parser)
    parser.add_argument("--out", type=path, required=True, help="the PNG; several images make a sheet")
    args = parser.parse_args(argv)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(args.out.suffix.lower())
    if kind is None and not args.out.exists():
        raise Refusal(f"--out {args.out}: give a picture's name, such as x.png")
    check_writable(args.out)
    if args.size and len(args.size) > 2:
        raise Refusal(f"--size {' '.join(map(str, args.size))}: give height and width, or one number for both")
    from ddil_lightning.backbones import sampling
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.backbones.source import Source

    source = Source(args.pipeline, size=(args.size[0], args.size[-1]) if args.size else None)
    backbone = Pipeline(source, **generating.precision(args)).to(device())
    prompts = [p for p in args.prompt for _ in range(args.n)]
    if not args.truncate:
        with advising("--truncate"):
            backbone.check_length(args.prompt)
    steps = args.steps or int(backbone.about.get("steps", 32))
    g = guidance_scale(backbone, args.guidance)
    check_steps(backbone, [steps])
    latents = sampling.check_finite(backbone, sampling.pipeline_latents(backbone, prompts, steps, g, args.seed), steps)
    made = sampling.decoded(backbone, latents)
    scale = args.scale or max(1, 256 // max(made.shape[-2:]))
    picture = sampling.tiles(made, scale, columns=args.n if args.n > 1 else len(made))
    with replacing(args.out) as temporary:
        picture.save(temporary, format=kind or "PNG")
    print(f"{len(made)} image(s), {steps} steps: {args.out}")
    return 0
