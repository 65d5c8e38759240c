"""Command lines as texts: short options, names of configs, and the config.yaml of runs of older versions. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddil_lightning.errors import Refusal
from ddil_lightning.packaged import check_table, check_text, find_config, inline, table_of, text_of


def expand(argv: Sequence[str], short: dict[str, str]) -> list[str]:
    """The command line in full: `a.b=1` becomes `--a.b=1`, `--updates 5` what `short` says it is, config names become paths.

    The value of an option is the next word as it is, but no option is another's value, and a help word needs none.
    All --config words come first, in their order: the rest of the command line wins over them wherever it stands.
    """
    configs: list[str] = []
    rest: list[str] = []
    words, value_follows, asks = list(argv), False, False
    while words:
        word = words.pop(0)
        if value_follows and not (word.startswith("--") or word in ("-c", "-h") or (asks and OVERRIDE.fullmatch(word))):
            rest.append(word)  # as it is: a value may well look like updates=12.ckpt
            value_follows = False
            continue
        value_follows = False
        if OVERRIDE.fullmatch(word):
            word = f"--{word}"
        key, equals, value = word.partition("=")
        if key in ("-c", "--config"):
            if not equals:
                if not words:
                    raise Refusal("--config needs a name or a file, such as --config lcm_ddil")
                value = words.pop(0)
            configs += ["--config", value if inline(value) else str(find_config(value))]
            continue
        key = short.get(key, key)
        if key in SWITCHES and not equals and words[:1] not in (["true"], ["false"]):
            equals, value = "=", "true"
        rest.append(key + equals + value)
        value_follows, asks = key.startswith("--") and not equals and key not in FLAGS, key.endswith(".help")
    check_yaml([*configs, *rest])
    return configs + _null_in_records(rest)


def _null_in_records(words: Sequence[str]) -> list[str]:
    """`--model.record.field=null` as `--model.record={field: null}`, which says the same and is the one form that jsonargparse takes."""
    made = list(words)
    for i, word in enumerate(made):
        key, equals, value = word.partition("=")
        found = RECORD_FIELD.fullmatch(key)
        following = not equals and i + 1 < len(made)
        if found and (made[i + 1] if following else value) == "null":
            made[i] = f"{found[1]}={{{found[2]}: null}}"
            if following:
                made[i + 1] = ""
    return [word for word, given in zip(made, words, strict=True) if word or not given]


def check_yaml(words: Sequence[str]) -> None:
    """Raises Refusal, naming the file, for a YAML text in an expanded command line that is none, or that its aliases blow up."""
    for key, value in zip(words, words[1:], strict=False):
        if key == "--config":
            check_table(value)
    for word in words:
        if "&" in word and "*" in word:
            check_text(word.partition("=")[2] if word.startswith("--") else word, word[:80])


def read_config(given: Path | str) -> dict[str, Any]:
    """The table that --config names: of a YAML file, or the text `{...}` itself. Raises Refusal, naming it, for anything else.

    The config.yaml of a run of an older version is translated (`MOVED`).
    """
    config = table_of(given)
    return _translated(config) if _is_of_an_older_run(config) else config


def in_present_names(words: Sequence[str]) -> list[str]:
    """An expanded command line in which a config.yaml of an older version's run is given as its text, translated."""
    import yaml

    found = list(words)
    for i, (key, value) in enumerate(zip(words, words[1:], strict=False)):
        if key != "--config":
            continue
        with suppress(yaml.YAMLError):  # the parser says what is wrong with such a text
            config = yaml.safe_load(text_of(value))
            if not isinstance(config, dict) or not _is_of_an_older_run(config):
                continue
            found[i + 1] = yaml.safe_dump(_translated(config), default_flow_style=True, sort_keys=False, width=10**9)
    return found


def _is_of_an_older_run(config: dict[str, Any]) -> bool:
    """Whether a config holds every option, as a run writes it, under the names that were all at one level."""
    model = config.get("model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    return (
        {"name", "run_dir", "ckpt_path"} <= set(config)
        and isinstance(arguments, dict)
        and "lr" in arguments
        and "optimizer" not in arguments
    )


def _translated(config: dict[str, Any]) -> dict[str, Any]:
    model = {**config["model"], "init_args": _grouped(config["model"]["init_args"], MOVED["model"])}
    return {**config, "model": model, "data": _grouped(config.get("data") or {}, MOVED["data"])}


def _grouped(options: dict[str, Any], moved: dict[str, str]) -> dict[str, Any]:
    grouped: dict[str, Any] = {}
    for name, value in options.items():
        record, _, field = moved.get(name, name).partition(".")
        grouped[record] = {**grouped.get(record, {}), field: value} if field else value
    return grouped


OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*\+?=.*", re.DOTALL)

RECORD_FIELD = re.compile(r"(--model(?:\.init_args)?\.(?!init_args\.)\w+)\.(\w+)")

FLAGS = ("--help", "--print_config", "--plan", "--verify")  # options without a value of their own
SWITCHES = ("--tensorboard",)  # those that are true where nothing is said

MOVED = {
    "model": {
        **{name: f"optimizer.{name}" for name in ("lr", "final_lr", "warmup", "betas", "weight_decay", "clip", "accumulate")},
        **{name: f"memory.{name}" for name in ("teacher_dtype", "vae_dtype", "gradient_checkpointing")},
        **{"loss": "distance.kind", "huber": "distance.width", "scaling": "boundary.scaling", "sigma_data": "boundary.sigma_data"},
        **{"critic_steps": "critic.steps", "critic_lr": "critic.lr"},
        **{"gan_weight": "gan.weight", "critic_gan_weight": "gan.critic_weight", "gan_features": "gan.features"},
        **{"real_guidance": "scores.guidance", "normaliser": "scores.normaliser", "tau": "scores.tau"},
        **{f"reflect_{name}": f"reflects.{name}" for name in ("real", "critic", "student")},
    },
    "data": {
        "collect_every": "rollouts.every",
        **{name: f"rollouts.{name}" for name in ("trajectories", "granularity", "pure_noise", "control")},
        **{name: f"buffer.{name}" for name in ("capacity", "max_age", "priority")},
    },
}
"""Options of ddil-fit that were at one level, and where they are now: for a run that goes on, and for who types an old name."""

CACHE_SHORT = {"--pipeline": "--model.init_args.pipeline", "--seed": "--seed_everything"}
"""Options of ddil-cache by the short names that `expand` replaces; those of `data.` need not say so."""

PRETRAIN_MOVED = {
    **{name: f"unet.{name}" for name in ("batch_size", "devices", "lr", "hold", "ema", "focus")},
    **{"autoencoder_steps": "autoencoder.steps", "decoder_steps": "autoencoder.decoder_steps"},
    **{
        "prompts": "measurement.prompts",
        "guidance": "measurement.guidance",
        "interim_every": "interim.every",
        "progress": "interim.progress",
    },
}
"""Options of ddil-pretrain that were at one level, and where they are now."""

FIT_SHORT = {
    "--updates": "--model.init_args.updates",
    "--seed": "--seed_everything",
    "--checkpoint_every": "--checkpoints.every",
    "--profile": "--profile.updates",
    # jsonargparse has no help of a group alone.
    "--trainer.help": "--help",
    "--data.help": "--help",
}
"""Options of ddil-fit by the short names that `expand` replaces."""
