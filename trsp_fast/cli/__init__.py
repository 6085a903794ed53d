"""The command line; see trsp_fast.cli.app."""

import os
import sys

import typer

from trsp_fast.cli.app import app
from trsp_fast.cli.common import quiet_libraries, take_wishes_to_end
from trsp_fast.errors import CheckFailed, Interrupted, Lost, UserError

# Help lists the commands in the order in which they register themselves.
# isort: off
from trsp_fast.cli import prune as _prune  # noqa: F401
from trsp_fast.cli import checkpoints as _checkpoints  # noqa: F401
from trsp_fast.cli import evidence as _evidence  # noqa: F401
from trsp_fast.cli import speed as _speed  # noqa: F401

# isort: on


def main() -> None:
    """Run a command; the user's mistakes end as one sentence on stderr, never as a traceback."""
    quiet_libraries()
    take_wishes_to_end()
    code = 0
    try:
        code = app(standalone_mode=False) or 0  # typer turns Ctrl-C into the code 130
        if code == 130:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; nothing was written.", 130)
    except Interrupted as error:
        code = _fail(f"{error}.", error.code)
    except SystemExit as stop:
        if stop.code != 143:
            raise
        code = _fail("interrupted; nothing was written.", 143)
    except UserError as error:
        code = _fail(str(error), 2)
    except (CheckFailed, Lost) as error:
        code = _fail(str(error), 1)
    except typer.Exit as error:
        code = error.exit_code
    except Exception as error:  # only typer's usage errors, whose class moves between its releases; defects go on
        if not hasattr(error, "format_message"):
            raise
        code = _fail(f"{error.format_message().rstrip('.')}; see trsp-fast --help.", 2)
    sys.exit(code)


def _fail(text: str, code: int) -> int:
    """Say why the run ends; of torchrun's processes the first one does, which hears what the others met."""
    if os.environ.get("RANK", "0") == "0":
        print(f"trsp-fast: {text}", file=sys.stderr)
    return code
