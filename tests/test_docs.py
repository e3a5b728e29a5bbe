"""The documents: every command line in them parses, every option is one of its command's, every
link leads somewhere.
"""

import re
import shlex

import pytest
from typer.main import get_command

from compressor.cli import app
from compressor.config.bundled_recipes import bundled
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/**/*.md")])
COMMANDS = get_command(app).commands
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def words_of(line):
    """The arguments of one command line as a document shows it: comments, redirections and optional
    parts marked by brackets.
    """
    words = shlex.split(re.sub(r"[][]", "", line), comments=True)
    return words[: words.index(">")] if ">" in words else words


def written_out(text):
    """The arguments of the complete command lines in `text`."""
    lines = re.findall(r"^[ #]*(?:torchrun .* -m compressor|compress) ([a-z][^\n]*)$", text, re.M)
    return [words for line in lines if "…" not in (words := words_of(line))]


def parse(words):
    """As the command line would; raises for what it would refuse."""
    COMMANDS[words[0]].make_context(words[0], list(words[1:]))


@each_page
def test_commands_in_blocks_parse(page):
    fenced = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    indented = re.findall(r"(?:^    [^\n]*\n)+", page.read_text(encoding="utf-8"), re.M)
    for words in written_out("\n".join(fenced + indented)):
        parse(words)


@each_page
def test_commands_in_sentences_have_their_options(page):
    for line in re.findall(r"`compress ([a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
        name, *words = words_of(line)
        options = {
            option
            for part in COMMANDS[name].params
            for option in (*part.opts, *part.secondary_opts)
        } | {"--help"}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_examples_of_the_help_and_of_the_recipes_parse():
    texts = {command.name: command.callback.__doc__ for command in app.registered_commands}
    for name, text in texts.items():
        assert name in {words[0] for words in written_out(text)}, name
    for text in (
        *texts.values(),
        *(path.read_text(encoding="utf-8") for path in bundled().values()),
    ):
        for words in written_out(text):
            parse(words)


@each_page
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }, target
    contained = re.findall(r"^```python\n# (\S+)$", text, re.M)  # files that the page has one write
    for name in re.findall(
        r"(?<![\w/.-])(?:docs|tests|benchmarks|compressor|scripts|demo)/[\w/]+\.(?:py|md|sh|toml)\b",
        text,
    ):
        assert (ROOT / name).is_file() or name in contained, name
