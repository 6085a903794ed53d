"""The command line, run in the tests' own process."""

import sys

import pytest

from trsp_fast import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trsp-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call
