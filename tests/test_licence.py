"""Licences are taken over, never guessed."""

import pytest

from compressor.publish.licence import Licence, from_card, from_file, from_folder


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"license": "apache-2.0"}, Licence("apache-2.0", source="x")),
        ({"license": ["mit", "apache-2.0"]}, Licence("mit", source="x")),
        (
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
            Licence("other", "own", "LICENSE", "x"),
        ),
        ({}, None),
        ({"license": 3}, None),
        ({"license": []}, None),
    ],
)
def test_card(metadata, expected):
    assert from_card(metadata, "x") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "                                 Apache License\n                           Version "
            "2.0, January 2004\n",
            "apache-2.0",
        ),
        ("MIT License\n\nPermission is hereby granted, free of\ncharge, to any person", "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date", "llama3.1"),
        ("All rights reserved.", "other"),
        ("", "other"),
    ],
)
def test_file(tmp_path, text, expected):
    assert from_file(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text(text)
    found = from_file(tmp_path)
    assert found.id == expected
    assert found.link == ("LICENSE.txt" if expected == "other" else "")


def test_the_card_of_a_folder_comes_before_its_file(tmp_path):
    (tmp_path / "LICENSE").write_text("MIT License: permission is hereby granted, free of charge")
    assert from_folder(tmp_path).id == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nText")
    assert from_folder(tmp_path).id == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\nnonsense")
    assert from_folder(tmp_path).id == "mit"
