"""The structure of the code, measured from its text: files, packages, imports, circles, floors,
long functions.

    python tests/house.py

prints it. Imports count wherever they stand: at the top, in a function, or for types only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "compressor": ROOT / "compressor",
    "compressor_kernels": ROOT / "kernels" / "compressor_kernels",
}
Graph = Mapping[str, set[str]]

LAYERS = """
compressor_kernels
errors
text free_memory
pattern stats formats checkpoint
methods refine records model
progress calibration runtime quantisation
engine tools publish bench runtime.vllm_plugin
allocation plots evaluation
allocation.sparsity allocation.rank page
config
run doctor
folders
.
cli
__main__
"""
"""The rooms, from the ground up: one imports from the layers below its own, and from no room of its
own layer. The dot is the package `compressor` itself, which exports what its users call.
"""


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package is the module of its __init__.py."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts and parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Names of the modules of ours that the file imports; a name that a package exports is an
    import of that package.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def file_graph() -> dict[str, set[str]]:
    """What each module imports."""
    known = modules()
    return {name: set(imported(path, known)) - {name} for name, path in known.items()}


def package_of(name: str, paths: Mapping[str, Path]) -> str:
    """The innermost package of a module; a file that lies flat in the top package stands for
    itself.
    """
    if paths[name].name == "__init__.py":
        return name
    parent = name.rpartition(".")[0]
    return name if parent in PACKAGES else parent


def package_graph() -> dict[str, set[str]]:
    """What each package imports of the others; a package and those inside it are one as seen from
    outside it.
    """
    paths = modules()
    graph: dict[str, set[str]] = {package_of(name, paths): set() for name in paths}
    for name, targets in file_graph().items():
        own = package_of(name, paths)
        graph[own] |= {package_of(target, paths) for target in targets} - {own}
    return graph


def layer_of(package: str) -> int:
    """The layer of a package or flat file. Raises ValueError for one that LAYERS does not have."""
    name = package.removeprefix("compressor.") if package != "compressor" else "."
    name = name if package.split(".")[0] == "compressor" else package.split(".")[0]
    for layer, line in enumerate(LAYERS.split("\n")):
        if name in line.split():
            return layer
    raise ValueError(f"{package} has no layer: give it one in tests/house.py")


def upward() -> list[str]:
    """Imports of a room from its own layer or one above it, as sentences."""
    return [
        f"{package} imports {target}"
        for package, targets in package_graph().items()
        for target in sorted(targets)
        if layer_of(target) >= layer_of(package)
        and {package.split(".")[0], target.split(".")[0]} != {"compressor_kernels"}
    ]


def circles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other (strongly connected components of two or more)."""
    reach = {node: _reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph
    }
    return sorted([list(group) for group in groups if len(group) > 1])


def floors(graph: Graph) -> dict[str, int]:
    """How many arrows the longest way down from each node has. The graph has no circle."""
    found: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in found:
            found[node] = max((floor(target) + 1 for target in graph[node]), default=0)
        return found[node]

    for node in graph:
        floor(node)
    return found


def function_lengths() -> list[tuple[int, str]]:
    """Lines of code of every function, without docstring, comments and blank lines, longest
    first.
    """
    found = []
    for name, path in modules().items():
        text = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                if body:
                    lines = text[body[0].lineno - 1 : body[-1].end_lineno]
                    code = [
                        line for line in lines if line.strip() and not line.strip().startswith("#")
                    ]
                    found.append((len(code), f"{name}.{node.name}"))
    return sorted(found, reverse=True)


def flat_files() -> list[str]:
    """Names of the files that lie in `compressor/` itself."""
    return sorted(path.name for path in PACKAGES["compressor"].glob("*.py"))


def _reachable(graph: Graph, start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        for target in graph[todo.pop()]:
            if target not in seen:
                seen.add(target)
                todo.append(target)
    return seen


def main() -> None:
    """Print all of it."""
    files, packages = file_graph(), package_graph()
    print(f"{len(files)} files, {sum(map(len, files.values()))} imports between them")
    print(
        f"{len(packages)} packages and flat files, {sum(map(len, packages.values()))} arrows "
        f"between them"
    )
    print(f"{len(flat_files())} files flat in compressor/: {', '.join(flat_files())}")
    for kind, graph in (("files", files), ("packages", packages)):
        found = circles(graph)
        print(f"{len(found)} circles of {kind}")
        for group in found:
            print(f"  {' <-> '.join(group)}")
        if not found:
            print(f"{max(floors(graph).values()) + 1} floors of {kind}")
    print("longest functions (lines of code):")
    for lines, name in function_lengths()[:5]:
        print(f"  {lines:3} {name}")


if __name__ == "__main__":
    main()
