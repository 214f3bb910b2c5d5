"""`gr4ad <command>`: parses, calls, prints. Every command's work is in a module of its own."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from gr4ad_jax.cli import (
  advertiser,
  bench,
  demo,
  learn,
  plan_gpr,
  prepare,
  recommend,
  serve,
  train,
  train_baseline,
  train_gpr,
  use,
)
from gr4ad_jax.cli.options import joined, registry
from gr4ad_jax.gr4ad.config import PRESETS
from gr4ad_jax.machine import storage, terminal

# Each is a function whose parameters are the command's options, and whose docstring is its help.
# It imports what it computes with when it is called, for JAX alone takes a second.
COMMANDS: dict[str, Callable[..., None]] = {
  "prepare": prepare.prepare,
  "market": prepare.market,
  "tokenize": prepare.tokenize,
  "train": train.train,
  "sweep": train.sweep,
  "plan": train.plan,
  "reward": learn.reward,
  "candidates": learn.candidates,
  "online": learn.online,
  "evaluate": use.evaluate,
  "recommend": recommend.recommend,
  "serve": serve.serve,
  "report": use.report,
  "export": use.export,
  "advertiser": advertiser.advertiser,
  "bench": bench.bench,
  "demo": demo.demo,
}
# Commands whose options take their defaults from the preset named on the same line.
_WITH_PRESET = {"train": train.train_defaults, "plan": train.plan_defaults}


def main(argv: list[str] | None = None) -> None:
  """Entry point.

  Exits 0 on success, 2 on bad input (one line), 1 where training diverged or could not be saved,
  143 or 130 where it was asked to stop (SIGTERM, Ctrl-C) and has saved.
  """
  terminal.never_fail()
  try:
    _run(sys.argv[1:] if argv is None else argv)
  except BrokenPipeError:  # `gr4ad ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush
    sys.exit(128 + signal.SIGPIPE)
  except (ValueError, OSError) as error:
    if os.environ.get("GR4AD_DEBUG"):
      raise
    print(f"gr4ad: error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)
  except RuntimeError as error:
    # By name: importing the classes would import JAX for every command.
    codes = {"DivergedError": 1, "CheckpointError": 1}
    code = codes.get(type(error).__name__) or getattr(error, "exit_code", None)
    if os.environ.get("GR4AD_DEBUG") or code is None:
      raise
    print(f"gr4ad: training stopped: {_one_line(error)}", file=sys.stderr)
    sys.exit(code)
  except KeyboardInterrupt:
    print("gr4ad: interrupted", file=sys.stderr)
    sys.exit(130)


def _run(argv: list[str]) -> None:
  if found := own_options(argv):
    run, options = found
    run(options)
    return
  if options := options_with_preset(argv):
    COMMANDS[argv[0]](options)
    return
  tyro.extras.subcommand_cli_from_dict(
    COMMANDS, args=joined(argv), prog="gr4ad", description=__doc__, registry=registry,
    # An option of `prepare` may also stand after the source, as people type it.
    config=(tyro.conf.CascadeSubcommandArgs,),
  )


def own_options(argv: list[str]) -> tuple[Callable[[Any], None], Any] | None:
  """What trains or plans, and with which options, where --system names a system with its own.

  None for other commands and systems. `advertiser train` is such a command, too.
  """
  name, *rest = argv or [""]
  if (name, *rest[:1]) == ("advertiser", "train"):
    default = advertiser.train_defaults(_word_of(rest, "--tuning", "lora") or "")
    return advertiser.Train.run, tyro.cli(
      advertiser.Train, args=rest[1:], prog="gr4ad advertiser train", default=default,
      registry=registry, description=advertiser.Train.__doc__,
    )
  system = _word_of(rest, "--system", "") if name in ("train", "plan") else None
  if system in train_gpr.OF_SYSTEM:
    of_command = train_gpr if name == "train" else plan_gpr
    run = train_gpr.train if name == "train" else plan_gpr.plan
    default = of_command.defaults(system, _word_of(rest, "--preset", ""))
    kind = type(default)
  elif name == "train" and (kind := train_baseline.OF_SYSTEM.get(system)):
    run, default = train_baseline.train, None
  else:
    return None
  return run, tyro.cli(
    kind, args=rest, prog=f"gr4ad {name}", default=default, registry=registry,
    description=run.__doc__,
  )


def options_with_preset(argv: list[str]) -> train.Train | train.Plan | None:
  """The options of `train` and `plan`, whose defaults are those of the preset named with them.

  None for other commands, and where there is no such preset.
  """
  name, *rest = argv or [""]
  if name not in _WITH_PRESET or (preset := _word_of(rest, "--preset", "small")) not in PRESETS:
    return None
  default = _WITH_PRESET[name](preset)
  return tyro.cli(
    type(default), args=rest, prog=f"gr4ad {name}", default=default, registry=registry,
    description=COMMANDS[name].__doc__,
  )


def _word_of(argv: list[str], option: str, default: str) -> str | None:
  """What a command line gives to one option."""
  reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  reader.add_argument(option, nargs="?", default=default, dest="word")
  return reader.parse_known_args(argv)[0].word


def _one_line(text: object) -> str:
  return terminal.one_line(storage.as_named(str(text)))


if __name__ == "__main__":
  main()
