"""The command line: options in, one call, results out. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import click

from resafe.cli.audit import audit
from resafe.cli.catalogue import info, list_
from resafe.cli.experiment import bench, demo, lab
from resafe.cli.measure import compare, evaluate, judge_csv
from resafe.cli.run import repair, train
from resafe.cli.weights import diff
from resafe.cli.wrap import env, hook, mix, plan, receipts, run
from resafe.errors import ResafeError

EPILOG = """\b
Examples
  resafe demo
  resafe run --mitigation mix_safety -- accelerate launch train.py
  resafe repair ./tuned --aligned ./llama --mitigation realign_dpo --output fixed
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="resafe")
def cli() -> None:
    """Re-apply safety to language models after fine-tuning, and measure it honestly."""


for command in (demo, run, plan, mix, train, repair, evaluate, judge_csv, compare, audit, diff, bench, env, receipts, hook, list_, info, lab):
    cli.add_command(command)


def main() -> None:
    """Entry point: exit code 0 done, 2 bad input (one line on stderr), 3 a mitigation was not applied, 130 stopped by Ctrl-C.

    `resafe audit`: 0 kept, 1 degraded, 2 could not tell. 70: a fault of resafe itself, which must not pass for an answer.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except ResafeError as error:
        _stop(str(error), error.exit_code)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        _stop("stopped; no half-written output was left. The same command goes on where it can.", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            _stop(f"{error.strerror}: {error.filename or 'while writing'}. No half-written output was left.", 2)
        traceback.print_exc()
        _stop("this is a fault of resafe; please report it with the lines above.", 70)


def _stop(message: str, code: int) -> None:
    from resafe.remote import shown

    click.echo(f"resafe: {shown(message)}", err=True)
    sys.exit(code)
