"""Flags made from EngineConfig and SamplingParams, so that the command line cannot drift from them.

A flag that was not typed is absent from the namespace (argparse.SUPPRESS): what the file given by
`--config` says then holds, and after it the default.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import octavo
from octavo.engine.config import ConfigError, EngineConfig, field_types, flag, read_yaml


def add_config_flags(parser: argparse.ArgumentParser, *, positional_model: bool = True) -> None:
    """One flag per EngineConfig field, `--config FILE.yaml`, and MODEL as the first argument."""
    parser.usage = parser.usage or "%(prog)s [MODEL] [flags]"
    if positional_model:
        parser.add_argument(
            "positional_model", metavar="MODEL", nargs="?", help="the same as --model"
        )
    group = parser.add_argument_group("engine settings, each also a line of --config FILE.yaml")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="file of `name: value` lines; flags win over it"
    )
    types = field_types()
    for f in fields(EngineConfig):
        _add_flag(group, f.name, types[f.name], f.default, f.metadata)


def _add_flag(group: Any, name: str, types: tuple[type, ...], default: Any, meta: Any) -> None:
    shown = "" if default == "" else f" (default: {default})"
    options: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": (meta["help"] + shown).replace("%", "%%"),
    }
    if bool in types:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, **options)
        return
    if meta["choices"]:
        # EngineConfig.validate checks it, in the words that a YAML file gets too.
        options["metavar"] = "{" + ",".join(meta["choices"]) + "}"
    else:
        options["metavar"] = "N" if int in types else "X" if float in types else name.upper()
    group.add_argument(flag(name), type=_reader(types), **options)


def _reader(types: tuple[type, ...]) -> Any:
    """What turns a flag's text into its value; `int | str` is a number where it looks like one."""
    if types == (int, str):
        return lambda text: int(text) if text.lstrip("-").isdecimal() else text
    return types[0]


def config_from_args(args: argparse.Namespace) -> EngineConfig:
    """The settings of a parsed command line: flags, over the --config file, over the defaults."""
    typed = {f.name: getattr(args, f.name) for f in fields(EngineConfig) if hasattr(args, f.name)}
    positional = getattr(args, "positional_model", None)
    if positional is not None:
        if typed.get("model", positional) != positional:
            raise ConfigError(
                f"two models are named: {positional} and --model {typed['model']}", "give one"
            )
        typed["model"] = positional
    path = getattr(args, "config", None)
    if path is None:
        return EngineConfig.from_mapping(typed, origin="the command line")
    from_file = {key.replace("-", "_"): value for key, value in read_yaml(path).items()}
    return EngineConfig.from_mapping({**from_file, **typed}, origin=path)


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """The sampling settings people type; the rest is for the Python API and HTTP."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="tokens to generate at most"
    )
    for name, reader, help in (
        ("temperature", float, "0 is greedy; higher is more varied"),
        ("top-p", float, "sample from the likeliest tokens that sum to this probability"),
        ("top-k", int, "sample from this many likeliest tokens; 0 is all"),
        ("min-p", float, "drop tokens below this share of the likeliest one's probability"),
        ("repetition-penalty", float, "above 1 discourages what was already said"),
    ):
        group.add_argument(
            f"--{name}", type=reader, default=argparse.SUPPRESS, metavar="X", help=help
        )
    group.add_argument(
        "--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help="end here"
    )


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """The form that the text must have: at most one."""
    group = parser.add_argument_group("form of the text (one of them)")
    for name, metavar, help in (
        ("json-schema", "FILE", "JSON that this schema allows"),
        ("grammar", "FILE", "what this grammar allows, in Lark or as `root ::= ...`"),
        ("regex", "TEXT", "what this regular expression matches"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, help=help)
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of these; repeat it")


def form_from_args(args: argparse.Namespace) -> octavo.StructuredOutputsParams | None:
    """The form that a command line asks for. Raises ConfigError."""
    given: dict[str, Any] = {"regex": args.regex, "choice": args.choice}
    for flag_name, path in (("json", args.json_schema), ("grammar", args.grammar)):
        if path is not None:
            try:
                given[flag_name] = Path(path).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from None
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return octavo.StructuredOutputsParams(**given) if given else None
    except ValueError as error:
        raise ConfigError(str(error), "give one form") from None


_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")


def sampling_values(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were typed, by their SamplingParams names."""
    return {name: getattr(args, name) for name in _SAMPLING if hasattr(args, name)}


def sampling_from_args(args: argparse.Namespace, **more: Any) -> octavo.SamplingParams:
    """SamplingParams of a parsed command line; its errors become the command line's."""
    try:
        return octavo.SamplingParams(**{**sampling_values(args), **more})
    except ValueError as error:
        raise ConfigError(str(error), "octavo generate --help lists the sampling flags") from None
