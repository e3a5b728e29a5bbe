"""Help and shell completion: every command shows examples that its own parser understands, at any
width.
"""

import os
import re
import subprocess
import sys

import pytest

from compressor.cli import app

COMMANDS = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("command", COMMANDS)
def test_examples_name_options_that_exist(command, width, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    text = cli(command, "--help").stdout
    assert f"compress {command}" in text
    assert max(map(len, text.splitlines())) <= int(width)
    for line in text.splitlines():
        if line.strip().startswith(f"compress {command}"):
            for option in re.findall(r"--[a-z][a-z-]*", line):
                assert len(re.findall(rf"{option}\b", text)) > 1, option


def test_completion_offers_commands_and_options():
    def complete(words, position):
        environment = {
            **os.environ,
            "_COMPRESS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        code = "import sys; sys.argv[0] = 'compress'; from compressor.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        return done.stdout.split()

    assert set(COMMANDS) <= set(complete("compress ", 1))
    assert "--pattern" in complete("compress prune --pat", 2)
