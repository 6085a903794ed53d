"""The command line: arguments in, one sentence or a table out. Every command is a thin face of a public function."""

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take whole transformer layers out of language models, and prove the result.",
)
