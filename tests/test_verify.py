"""`compress verify` finds what does not belong in a finished folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.manifest import NAME, manifest
from compressor.config.recipe import Recipe
from compressor.run import pipeline
from compressor.tools.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, rows):
    """A function: options -> finished folder, made once."""
    folders = {}

    def make(**options):
        key = str(options)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("made") / "out"
            pipeline.prune(
                Recipe(
                    model=str(tiny("llama")),
                    dataset=str(rows),
                    num_samples=8,
                    seq_len=32,
                    **options,
                ),
                folders[key],
            )
        return folders[key]

    return make


@pytest.fixture
def copy(made, tmp_path):
    def make(**options):
        shutil.copytree(made(**options), tmp_path / "out")
        return tmp_path / "out"

    return make


def change(folder, name, edit, *, seal=True):
    """Edit one tensor; with `seal` the manifest is made anew, so that only the deeper checks can
    tell.
    """
    from compressor.checkpoint.atomic import sha256

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = edit(tensors[name].clone())
            save_file(tensors, path, metadata={"format": "pt"})
    if seal:
        hashes = {path.name: sha256(path) for path in folder.iterdir() if path.name != NAME}
        (folder / NAME).write_text(manifest(hashes))


def setting(value, *place):
    def edit(tensor):
        tensor[place] = value
        return tensor

    return edit


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "wanda", "pattern": "4:8"},
        {"method": "wanda", "format": "dense", "ignore": ["*q_proj"]},
        {"method": "armor", "options": {"iterations": 1, "finish": 0, "overhead": 0.3}},
    ],
    ids=["packed", "4:8", "dense", "armor"],
)
def test_what_prune_makes_is_sound(made, options, cli):
    found = verify(made(**options))
    assert found["problems"] == []
    assert found["linears"] == (18 if "ignore" in options else 21)
    assert "is sound" in cli("verify", made(**options)).stdout


def test_files_are_checked(copy, cli):
    folder = copy(method="wanda")
    (folder / "generation_config.json").unlink()
    (folder / "recipe.toml").write_text("other")
    (folder / "evil.py").touch()
    (folder / "README.md").touch()  # nothing reads it
    done = cli("verify", folder, code=1)
    assert done.stdout.splitlines() == [
        "generation_config.json is missing",
        "recipe.toml has changed: its sha256 is not that in SHA256SUMS",
        "evil.py is not in SHA256SUMS: it was added later",
    ]
    assert (
        json.loads(cli("verify", folder, "--json", code=1).stdout)["problems"]
        == done.stdout.splitlines()
    )


@pytest.mark.parametrize(
    "text", ["", "nonsense\n", f"{'0' * 64}  ../../etc/passwd\n", f"{'0' * 64}  ..\n"]
)
def test_a_manifest_is_not_trusted(copy, text):
    folder = copy(method="wanda")
    (folder / NAME).write_text(text)
    problems = verify(folder)["problems"]
    assert any("is not in SHA256SUMS" in problem for problem in problems)
    assert bool(text) == any(
        "line 1 is no checksum and file name" in problem for problem in problems
    )


@pytest.mark.parametrize(
    ("name", "edit", "match"),
    [
        (f"{Q}.weight_metadata", setting(0, 0, 0), "does not name two columns in ascending order"),
        (f"{Q}.weight_metadata", lambda tensor: tensor[:, :1].contiguous(), "need metadata int16"),
        (f"{Q}.weight_values", setting(torch.nan, 0, 0), f"{Q}.weight_values holds NaN"),
        (
            f"{Q}.weight_values",
            setting(0, slice(4)),
            "does not name the columns that the format prescribes",
        ),
        ("model.norm.weight", setting(torch.inf, 0), "model.norm.weight holds Inf"),
    ],
)
def test_packed_tensors_are_checked(copy, name, edit, match):
    folder = copy(method="wanda")
    change(folder, name, edit)
    assert any(match in problem for problem in verify(folder)["problems"])


def test_the_pattern_is_checked(copy):
    folder = copy(method="wanda", pattern="4:8")
    change(folder, f"{Q}.weight", setting(1, 3, slice(8)))
    problems = verify(folder)["problems"]
    assert f"{Q} has a group with more non-zeros than the pattern 4:8 allows" in problems
    assert any(
        f"{Q} has 49." in problem and "report.json says 50.0000%" in problem for problem in problems
    )


def test_wrappers_of_armor_are_checked(copy):
    folder = copy(method="armor", options={"iterations": 1, "finish": 0, "overhead": 0.3})
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(name for name in modules if modules[name]["format"] == "armor")
    change(folder, f"{name}.weight_a", lambda tensor: tensor[1:].contiguous())
    assert any(f"{name} is damaged: weight_a" in problem for problem in verify(folder)["problems"])


def test_headers_are_checked(copy):
    folder = copy(method="wanda")
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    problems = verify(folder)["problems"]
    assert len(problems) == 2
    assert "truncated" in problems[1]


def test_a_folder_that_is_none(cli, tmp_path):
    assert "is not a folder" in cli("verify", tmp_path / "nothing", code=1).stderr
