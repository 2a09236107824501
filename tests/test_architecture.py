"""Imports run down the floors of the house, in functions and in annotations too, and there is no circle."""

import ast
import graphlib
import re
import tomllib
from pathlib import Path

import pytest
from commands import REPOSITORY

PACKAGES = ("guided_diffusion", "evaluations", "scripts")

# From the bottom. A module imports modules of the floors below its own, and of its own floor. A name that ends in
# ".*" means the package and all that is in it.
FLOORS = [
    # guided_diffusion: what one imports
    ["guided_diffusion." + name for name in (
        "allocator", "config_files", "errors", "late", "launchers", "places", "shapes", "version")],
    ["guided_diffusion." + name for name in (
        "options", "files", "foreign", "scratch", "npz", "pixels", "progress", "jobs", "rng", "schedules", "losses",
        "fetch", "pictures", "image_files", "links", "cores", "network_inputs", "torchscript", "functions",
        "steadiness", "tensor_files")],
    ["guided_diffusion.dtypes"],
    ["guided_diffusion." + name for name in ("nn", "winograd", "attention", "unet", "capture", "unfilled")],
    ["guided_diffusion.process"],
    ["guided_diffusion.grids", "guided_diffusion.terms"],
    ["guided_diffusion.steps"],
    ["guided_diffusion.solvers"],
    ["guided_diffusion.sampling"],
    ["guided_diffusion.gaussian_diffusion", "guided_diffusion.respace"],
    ["guided_diffusion.build"],
    ["guided_diffusion.entries", "guided_diffusion.facts"],
    ["guided_diffusion.checkpoint"],
    ["guided_diffusion.execution", "guided_diffusion.stated"],
    ["guided_diffusion.model_folders"],
    ["guided_diffusion.dist_util", "guided_diffusion.presets"],
    ["guided_diffusion." + name for name in ("cli", "exports", "unet2d.*", "zoo")],
    ["guided_diffusion." + name for name in (
        "classes", "digests", "fp16_util", "image_datasets", "log_sinks", "logger", "prepare", "resample", "icons.*")],
    ["guided_diffusion.training.*"],
    ["guided_diffusion.train_util", "guided_diffusion.depth.*"],
    ["guided_diffusion.guidance.*"],
    ["guided_diffusion.runs.*", "guided_diffusion.script_util", "guided_diffusion.loading"],
    ["guided_diffusion.adapters.*"],
    ["guided_diffusion"],
    # evaluations: what measures
    ["evaluations"],
    ["evaluations.metrics.*"],
    ["evaluations." + name for name in (
        "features", "feature_files", "references", "image_sets", "plots", "evaluation_plot", "nearest",
        "training_chart", "memory", "depth_errors", "pages.*")],
    ["evaluations.extractors.*"],
    ["evaluations." + name for name in (
        "evaluation", "evaluation_checks", "evaluation_results", "evaluation_warnings", "evaluator",
        "evaluator_options", "extractor_options", "stored_statistics", "early_fid", "class_accuracy", "make_reference",
        "cascade")],
    ["evaluations.attention.*", "evaluations.depth.*"],
    ["evaluations.benchmarks.*"],
    ["evaluations.reproduction.*"],
    ["evaluations.bench.*", "evaluations.explorer.*"],
    ["evaluations.reports.*"],
    ["evaluations." + name for name in (        # old names of what has moved
        "benchmark", "depth_fid", "depth_metrics", "depth_pictures", "memory_benchmark", "npz", "recognised",
        "train_embedded", "train_scenes_judge")],
    # what users call
    ["scripts.*"],
]


def modules_in(root):
    """Every module below a folder: its dotted name and its file; a package is named like its folder."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def ancestors(name):
    """The packages that hold a module, from the outermost: a.b.c -> a, a.b."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def named_in(node, package):
    """The dotted names that an import statement may load; `package` is the one in which it stands."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, node.module] if node.module else above)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(modules):
    """Of every module: the modules that it imports anywhere in its file, and a line that does so.

    As Python does, `import a.b.c` also loads the packages a and a.b, unless the module lies in them.
    """
    found = {}
    for module, path in modules.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        arrows = found[module] = {}
        for node in ast.walk(ast.parse(path.read_text())):
            for name in named_in(node, package):
                target = next((known for known in (name, *reversed(ancestors(name))) if known in modules), None)
                if target is None or target == module:
                    continue
                loaded = {target} | set(ancestors(target)) - {module, *ancestors(module)}
                for other in loaded & modules.keys():
                    arrows.setdefault(other, node.lineno)
    return found


def floors_of(modules, floors):
    """The number of the floor on which each module stands; none may stand on several, or on none."""
    numbers = {module: [number for number, names in enumerate(floors) for name in names
                        if module == name or (name.endswith(".*") and f"{module}.".startswith(name[:-1]))]
               for module in modules}
    misplaced = {module: on for module, on in numbers.items() if len(on) != 1}
    assert not misplaced, f"each module must stand on one floor of FLOORS: {misplaced}"
    return {module: on for module, (on,) in numbers.items()}


def arrows_up(arrows, floors):
    """Every import of a module that stands above the importing one, as a sentence."""
    numbers = floors_of(arrows, floors)
    return [f"{module} imports {other} (line {line}), which stands above it"
            for module, others in arrows.items() for other, line in others.items() if numbers[other] > numbers[module]]


def circle_in(arrows):
    """The modules of a circle of imports, in order; empty where there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def house():
    return imports(modules_in(REPOSITORY))


def test_no_import_runs_up(house):
    assert arrows_up(house, FLOORS) == []


def test_there_is_no_circle(house):
    assert circle_in(house) == []


def test_every_floor_is_lived_on(house):
    numbers = floors_of(house, FLOORS)
    assert set(numbers.values()) == set(range(len(FLOORS)))
    for names in FLOORS:
        assert all(name.removesuffix(".*") in house for name in names)


# The reader itself


@pytest.fixture
def written(tmp_path):
    """Writes modules, given by path, below the package guided_diffusion, and reads their imports."""
    def write(files):
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "guided_diffusion" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {module.removeprefix("guided_diffusion."): {other.removeprefix("guided_diffusion.") for other in others}
                for module, others in imports(modules_in(Path(tmp_path))).items()}
    return write


@pytest.mark.parametrize("line", [
    "from . import low", "from .low import x", "from guided_diffusion import low", "import guided_diffusion.low as low",
    "def f():\n    from .low import x", "if TYPE_CHECKING:\n    from .low import x", "from .low import (\n    x, y)",
    "class A:\n    def f(self):\n        if True:\n            import guided_diffusion.low"])
def test_imports_are_found_wherever_they_stand(line, written):
    assert written({"low.py": "", "high.py": line})["high"] - {"guided_diffusion"} == {"low"}


def test_imports_between_packages(written):
    arrows = written({
        "low.py": "", "room/__init__.py": "from .door import x", "room/door.py": "from .. import low",
        "other/__init__.py": "",
        "other/window.py": "from ..room import door\nimport numpy.linalg\nfrom ..low import x"})
    assert arrows["room"] == {"room.door"}
    assert arrows["room.door"] == {"low"}
    assert arrows["other.window"] == {"low", "room", "room.door"}       # a package is loaded with its modules


def test_arrows_up_and_circles_are_named(written):
    arrows = {"low": {"high": 3}, "high": {"room.door": 1}, "room": {}, "room.door": {"low": 7}}
    floors = [["low"], ["high"], ["room.*"]]
    assert arrows_up(arrows, floors) == ["low imports high (line 3), which stands above it",
                                         "high imports room.door (line 1), which stands above it"]
    assert set(circle_in(arrows)) == {"low", "high", "room.door"}
    assert circle_in({"high": {"low": 1}, "low": {}}) == []
    with pytest.raises(AssertionError, match="must stand on one floor"):
        floors_of(["attic"], floors)


def test_packages_that_are_missing_are_told_by_a_command_that_works_outside_a_checkout_too():
    """Not `.[eval]`, which pip finds in a checkout alone; and every extra that is named is one."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = {path: path.read_text() for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")}
    named = {(path.name, extra) for path, text in sources.items()
             for extra in re.findall(r"guided-pixels\[([a-z,-]+)\]", text)}
    assert len(named) > 8 and {extra for _, extra in named} <= extras.keys()
    for path, text in sources.items():
        assert "install the extra" not in text and "pip install '." not in text, path
