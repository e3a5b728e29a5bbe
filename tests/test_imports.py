"""Imports run one way between the rooms, and the command line starts without torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BASE = {"compressor.errors"}
LEAVES = BASE | {"compressor.pattern", "compressor.stats"}
PACKING = {"compressor_kernels.packing"}
FORMATS = {"compressor.formats"} | {f"compressor.formats.{name}" for name in ("dense", "sparse24", "armor", "lowrank")}
ALLOWED = {
    "compressor/errors.py": set(),
    "compressor/pattern.py": BASE,
    "compressor/stats.py": BASE,
    "compressor/formats/": FORMATS | PACKING | BASE,
    "compressor/methods/": LEAVES | FORMATS,
    "compressor/refine/": LEAVES | FORMATS,
    "compressor/layout.py": BASE,
    "compressor/checkpoint.py": BASE,
    "compressor/recipe.py": BASE | {"compressor.bundled"},
    "compressor/report.py": BASE,
    "compressor/text.py": set(),
    "compressor/bundled.py": BASE,
    "compressor/page/": BASE
    | {f"compressor.{name}" for name in ("checkpoint", "digest", "drawing", "methods", "scores")}
    | {"compressor"},
    "compressor/data.py": BASE,
    "compressor/conversion.py": BASE,
    "compressor/experts.py": BASE,
    "compressor/packed_experts.py": BASE | {"compressor", "compressor.experts"},
    "compressor/model.py": BASE | {"compressor", "compressor.checkpoint", "compressor.experts"},
    "compressor/cache.py": set(),
    "compressor/digest.py": {"compressor", "compressor.checkpoint", "compressor.durable"},
    "compressor/scores.py": BASE | {"compressor.checkpoint"},
    "compressor/licence.py": set(),
    "compressor/doctor.py": {"compressor.cache", "compressor_kernels.linear", "compressor_kernels.packing"},
    "compressor/card.py": {"compressor.licence", "compressor.methods", "compressor.scores"},
    "compressor/publication.py": BASE
    | {f"compressor.{name}" for name in ("card", "checkpoint", "digest", "layout", "licence", "page.record", "scores", "writer")},
    "compressor/hub.py": BASE | {"compressor.digest", "compressor.licence", "compressor.publication"},
    "compressor/durable.py": set(),
    "compressor/manifest.py": {"compressor.durable"},
    "compressor/drawing.py": BASE,
    "compressor/heatmap.py": BASE | {"compressor.drawing", "compressor.job", "compressor.text"},
    "compressor/hidden.py": BASE | {"compressor.durable"},
    "compressor/memory.py": BASE | {"compressor.job", "compressor.stats"},
    "compressor/fingerprint.py": {f"compressor.{name}" for name in ("checkpoint", "durable", "recipe", "report")},
    "compressor/journal.py": BASE | {"compressor.durable", "compressor.fingerprint"},
    "compressor/writer.py": BASE
    | {f"compressor.{name}" for name in ("checkpoint", "durable", "journal", "manifest")}
    | {"compressor"},
    "compressor/distributed.py": BASE | {"compressor.formats", "compressor.stats"},
    "compressor/verify.py": LEAVES
    | FORMATS
    | PACKING
    | {f"compressor.{name}" for name in ("checkpoint", "layout", "manifest", "model")}
    | {"compressor"},
    "compressor/calibration.py": BASE | {"compressor.hidden", "compressor.model"},
    "compressor/head.py": BASE | {"compressor.calibration", "compressor.model"},
    "compressor/gradients.py": BASE | {"compressor", "compressor.calibration", "compressor.head", "compressor.model"},
    "compressor/plan.py": {
        "compressor.errors",
        "compressor.pattern",
        "compressor.ranks",
        "compressor.job",
        "compressor.model",
    },  # the last for types
    "compressor/rehearsal.py": LEAVES | {"compressor.ranks"},
    "compressor/job.py": LEAVES
    | {
        f"compressor.{name}"
        for name in (
            "checkpoint",
            "curvature",
            "experts",
            "methods",
            "model",
            "ranks",
            "ratios",
            "ratios.dense",
            "ratios.options",
            "recipe",
            "refine",
            "rehearsal",
            "report",
            "writer",
        )  # curvature for a type
    }
    | {"compressor"},
    "compressor/blocks.py": LEAVES
    | FORMATS
    | {
        f"compressor.{name}"
        for name in ("calibration", "distributed", "experts", "hidden", "job", "memory", "refine.tune", "report")
    }
    | {"compressor"},
    "compressor/trial.py": {f"compressor.{name}" for name in ("blocks", "calibration", "head", "job")} | {"compressor"},
    "compressor/ratios/": LEAVES
    | {f"compressor.{name}" for name in ("blocks", "calibration", "gradients", "head", "job", "model")}
    | {"compressor"},
    "compressor/curvature.py": {
        f"compressor.{name}"
        for name in ("blocks", "calibration", "errors", "formats.lowrank", "gradients", "job", "ranks", "ratios.precise")
    },
    "compressor/ranks/": LEAVES
    | {f"compressor.{name}" for name in ("allocation", "blocks", "calibration", "curvature", "job", "trial")}
    | {"compressor"},
    "compressor/allocation.py": LEAVES | {f"compressor.{name}" for name in ("blocks", "calibration", "job", "ratios", "trial")},
    "compressor/arrange.py": BASE | {"compressor_kernels"} | {f"compressor_kernels.{name}" for name in ("linear", "siblings")},
    "compressor/bench/": BASE
    | {"compressor_kernels"}
    | {f"compressor_kernels.{name}" for name in ("armor", "fragments", "linear", "lowrank", "packing")},
    "compressor/runtime.py": FORMATS
    | BASE
    | {f"compressor.{name}" for name in ("checkpoint", "conversion", "layout", "packed_experts")}
    | {"compressor", "compressor_kernels.linear"},
    "compressor/unpack.py": FORMATS | BASE | {"compressor.checkpoint", "compressor.layout", "compressor.writer"},
    "compressor/pack.py": FORMATS
    | BASE
    | {f"compressor.{name}" for name in ("checkpoint", "experts", "layout", "model", "report", "writer")},
    "compressor/legacy.py": FORMATS | BASE | {"compressor.checkpoint", "compressor.layout", "compressor.writer"},
    "compressor/evaluate/": BASE
    | {f"compressor.{name}" for name in ("cache", "checkpoint", "data", "digest", "drawing", "report", "runtime", "scores")}
    | {"compressor"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def ours(name):
    return name.split(".")[0] in ("compressor", "compressor_kernels")


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_one_way(room):
    files = sorted((ROOT / room).rglob("*.py")) if room.endswith("/") else [ROOT / room]
    for path in files:
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts[:2]) if room.endswith("/") else "-"
        foreign = {name for name in imported(path) if ours(name) and not name.startswith(own)} - ALLOWED[room]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_kernels_know_tensors_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"compressor", "transformers", "safetensors"}, path


@pytest.mark.parametrize(
    "command",
    [
        "['--help']",
        "['prune', '--help']",
        "['eval', '--help']",
        "['push', '--help']",
        "['bench', '--help']",
        "['doctor', '--help']",
        "['recipes']",
        "['resume', '--help']",
        "['lowrank', '--help']",
        "['export', '--help']",
        "['verify', '--help']",
        "['inspect', 'demo/books-1m', '--json']",
    ],
)
def test_starts_without_the_heavy_libraries(command):
    code = (
        f"import sys; sys.argv[1:] = {command}\n"
        "from compressor.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lm_eval', 'datasets', 'accelerate', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_compressor_is_light_and_exports_what_it_says():
    code = "import sys, compressor; assert 'torch' not in sys.modules; assert compressor.__all__ == ['load', 'prune']"
    subprocess.run([sys.executable, "-c", code], check=True)
