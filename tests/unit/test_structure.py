"""The structure that the documents promise: layers, sizes, the public names, and an import without side effects."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import celery_capacity
from celery_capacity.routing import errors

ROOT = Path(__file__).resolve().parents[2]

#: The one package that is installed, and its parts, the lowest layer first.
PACKAGE = "celery_capacity"
LAYERS = ("routing", "migrations", "workers", "platform")

#: The folders of a layer, the lowest first: a file imports nothing of the folders behind its own. Files beside them are
#: below all.
FOLDERS = {
    "routing": (
        "model", "policy", "simulation", "config", "database", "ledger", "insert", "store", "fallback", "recovery",
        "forecast", "inspect",
    ),
    "workers": (
        "display", "dispatch", "process", "traces", "supervision", "broker", "submit", "results", "logs", "client",
        "membership", "retention", "duties", "learning", "runner", "settle", "execute", "app",
    ),
}  # fmt: skip
#: Imported by nobody but Celery: it hands over to the app that a command names.
ENTRY_POINT = f"{PACKAGE}.workers.plugin"

#: Entries of a folder, its `__init__` left out.
MOST_ENTRIES = 13

#: Tests that mirror the tree: `routing/model/token.py` has its tests in `tests/unit/routing/model/test_token.py`.
MIRRORS = ("tests/unit", "tests/contract")
#: Tests of the ledger's or the stores' behaviour that no single module has. The rest of a name begins with a module's.
OF_NO_MODULE = {
    "unit/test_prose.py": "of all files",
    "unit/test_requirements.py": "of all imports",
    "unit/test_structure.py": "of all files",
    "unit/platform/commands/test_help.py": "of all commands",
    "unit/platform/commands/test_schemas.py": "of all commands",
    "contract/test_authorities.py": "of both stores",
    "contract/test_authorities_attempts.py": "of both stores",
    "contract/test_authorities_reservations.py": "of both stores",
    "contract/test_invariants.py": "of the tests themselves",
    "contract/routing/ledger/test_alone.py": "a rule of placement, in all scripts",
    "contract/routing/ledger/test_books.py": "the book of a worker, in all scripts",
    "contract/routing/ledger/test_books_by_model.py": "all scripts beside a model",
    "contract/routing/ledger/test_concurrency.py": "all scripts at once",
    "contract/routing/ledger/test_full.py": "all scripts on a full server",
    "contract/routing/ledger/test_leases.py": "the right to an attempt, in all scripts",
    "contract/routing/ledger/test_script_bounds.py": "all scripts",
    "contract/routing/ledger/test_script_costs.py": "all scripts",
    "contract/routing/ledger/test_tombstones.py": "an ended job, in all scripts",
    "contract/routing/recovery/test_clocks.py": "a clock that is set, in all of recovery",
    "contract/routing/recovery/test_late_rows.py": "a row read too early, in all of recovery",
    "contract/routing/recovery/test_start_once.py": "a job that may start once, in all of recovery",
    "contract/routing/recovery/test_unknown_claims.py": "a claim that nobody noted, in all of recovery",
    "contract/routing/store/test_locked_rows.py": "a locked row, in all statements",
}

MOST_LINES = 400
MOST_LINES_OF_FUNCTION = 60
MOST_PARAMETERS_OF_CONSTRUCTOR = 6
MOST_LINES_OF_LUA = 120
MOST_CHARACTERS_OF_LUA = 120


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def _fresh(code: str) -> Any:
    """Return the JSON that the code prints in an interpreter that has imported nothing of ours, started elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _loaded_after_importing(*packages: str) -> set[str]:
    names = [
        name
        for package in packages
        for name, path in _modules(package)
        # Alembic's own files run only inside Alembic; plugin.py is an entry point, and imported by nothing of ours.
        if path.name not in ("env.py", "plugin.py") and not path.name[0].isdigit()
    ]
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    return set(_fresh(code))


def _of(package: str, loaded: set[str]) -> set[str]:
    return {name for name in loaded if name == package or name.startswith(f"{package}.")}


@pytest.mark.parametrize(
    "foreign",
    ["celery", "kombu", "tornado", "click", "flower", *(f"{PACKAGE}.{layer}" for layer in LAYERS[1:])],
)
def test_routing_does_not_load(foreign: str, routing_loads: set[str]) -> None:
    assert not _of(foreign, routing_loads)


@pytest.fixture(scope="module")
def routing_loads() -> set[str]:
    return _loaded_after_importing("routing")


def test_routing_and_workers_load_nothing_of_ours_from_platform() -> None:
    assert not _of(f"{PACKAGE}.platform", _loaded_after_importing("routing", "workers"))


def test_the_arrows_go_from_platform_to_workers_to_routing() -> None:
    wrong = []
    for layer, package in enumerate(LAYERS):
        above = [f"{PACKAGE}.{name}" for name in LAYERS[layer + 1 :]]
        for name, path in _modules(package):
            wrong += [
                f"{name} imports {imported}"
                for imported in _imports(name, path)
                if imported.split(".")[0] in ("tests", "benchmarks")
                or any(_of(higher, {imported}) for higher in above)
                # The public names stand above all but the app of `celery -A platform`.
                or (imported == PACKAGE and package != "platform")
            ]
    assert wrong == []


@pytest.mark.parametrize("layer", FOLDERS)
def test_the_arrows_between_folders_go_one_way(layer: str) -> None:
    place = {f"{PACKAGE}.{layer}.{name}": number for number, name in enumerate(FOLDERS[layer], 1)}
    wrong = []
    for name, path in _modules(layer):
        rank = place.get(".".join(name.split(".")[:3]), 0)
        if path.name == "__init__.py" or name == ENTRY_POINT:
            continue
        wrong += [
            f"{name} imports {imported}"
            for imported in _imports(name, path)
            if place.get(".".join(imported.split(".")[:3]), 0) > rank
        ]
    assert wrong == []


@pytest.mark.parametrize("wiring", ["app/signals.py", "execute/consumer.py"])
def test_module_that_wires_celery_imports_no_store_and_no_policy(wiring: str) -> None:
    """The objects behind Celery's signals and classes decide, and are tested without Celery."""
    path = ROOT / "workers" / wiring
    stores = {f"{PACKAGE}.routing.{name}" for name in FOLDERS["routing"]} - {
        f"{PACKAGE}.routing.{name}" for name in ("model", "config")
    }
    name = ".".join((PACKAGE, *path.relative_to(ROOT).with_suffix("").parts))
    imports = _imports(name, path)
    assert [imported for imported in imports for store in stores if _of(store, {imported})] == []


@pytest.mark.parametrize("layer", FOLDERS)
def test_each_folder_is_one_concept_with_a_role(layer: str) -> None:
    folders = {path.name for path in (ROOT / layer).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"lua"} == set(FOLDERS[layer])
    for name in FOLDERS[layer]:
        folder = ROOT / layer / name
        role = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert role and "\n" not in role, f"{name} says in one line what stands in it"
        entries = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert 1 < len(entries) <= MOST_ENTRIES, name


@pytest.mark.parametrize("mirror", MIRRORS)
def test_tests_mirror_the_tree(mirror: str) -> None:
    wrong = []
    for path in sorted((ROOT / mirror).rglob("test_*.py")):
        code = ROOT / path.parent.relative_to(ROOT / mirror)
        modules = {module.stem for module in code.glob("*.py")} if code != ROOT else set()
        subject = path.stem.removeprefix("test_")
        is_of_module = any(subject == module or subject.startswith(f"{module}_") for module in modules)
        if not code.is_dir() or is_of_module == (str(path.relative_to(ROOT / "tests")) in OF_NO_MODULE):
            wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


@pytest.mark.parametrize(
    "group", [*MIRRORS, *(f"tests/{name}" for name in ("integration", "features", "fixtures", "faults"))]
)
def test_folder_of_tests_holds_few_entries(group: str) -> None:
    folders = [ROOT / group, *(path for path in (ROOT / group).rglob("*") if path.is_dir())]
    # Python's own folders hold a file for each module that was imported, and for each program that runs the tests.
    folders = [folder for folder in folders if folder.name != "__pycache__"]
    entries = {folder: [path for path in folder.iterdir() if path.name != "__pycache__"] for folder in folders}
    assert {str(folder): len(names) for folder, names in entries.items() if len(names) > MOST_ENTRIES} == {}


def test_list_of_tests_of_no_module_names_files() -> None:
    assert [path for path in OF_NO_MODULE if not (ROOT / "tests" / path).is_file()] == []


def test_no_modules_import_each_other_in_a_circle_not_even_for_types() -> None:
    paths = {name: path for package in LAYERS for name, path in _modules(package)}
    graph = {
        name: {imported for imported in _imports(name, path) if imported in paths} - {name}
        for name, path in paths.items()
    }
    # A package's own module is loaded before its members whatever they import.
    for name, needs in graph.items():
        graph[name] = {need for need in needs if not name.startswith(f"{need}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def _imports(name: str, path: Path) -> set[str]:
    """Return all that a module imports, at its top, in functions and for types.

    `from a import b` counts as a and a.b.
    """
    modules = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*ancestors, *filter(None, [base])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            submodules = {member for member in members if _is_module(member)}
            modules |= submodules or {base}
    return modules


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("package", LAYERS)
def test_a_part_of_the_package_is_a_link_to_the_folder_beside_it(package: str) -> None:
    assert (ROOT / PACKAGE / package).readlink() == Path("..") / package


def test_nothing_is_imported_past_the_package() -> None:
    """In a checkout the folders can be imported by their own names too, and would be there twice."""
    top = {path.stem for path in ROOT.glob("*.py")} | set(LAYERS)
    wrong = []
    for folder in (*LAYERS, PACKAGE, "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            # `platform` alone is the standard library's.
            names = {name for name in _imports("", path) if name != "platform"}
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in names if name.split(".")[0] in top]
    assert wrong == []


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_is_longer_than_400_lines(package: str) -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in _modules(package)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def _functions(package: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, path in _modules(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{name}:{node.name}", node


@pytest.mark.parametrize("package", LAYERS)
def test_no_function_is_longer_than_60_lines(package: str) -> None:
    lines = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in _functions(package)}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_FUNCTION} == {}


@pytest.mark.parametrize("package", LAYERS)
def test_no_constructor_takes_more_than_six_parameters(package: str) -> None:
    counts = {}
    for name, node in _functions(package):
        if node.name == "__init__":
            arguments = node.args
            counts[name] = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - 1
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS_OF_CONSTRUCTOR} == {}


def test_no_shared_lua_is_longer_than_120_lines() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "routing" / "lua" / "lib").iterdir()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_LUA} == {}


def test_no_line_of_lua_is_longer_than_120_characters() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "routing" / "lua").rglob("*.lua")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MOST_CHARACTERS_OF_LUA
    ]
    assert lines == []


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_is_a_drawer(package: str) -> None:
    drawers = {"utils", "util", "helpers", "common", "compat", "manager", "misc"}
    assert [name for name, _ in _modules(package) if name.rpartition(".")[2] in drawers] == []


def test_platform_has_no_init_since_the_standard_library_has_the_name() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_all_is_sorted() -> None:
    assert celery_capacity.__all__ == sorted(celery_capacity.__all__)


def test_all_and_the_public_names_are_the_same() -> None:
    for name in celery_capacity.__all__:
        assert getattr(celery_capacity, name) is not None
    public = {name for name in vars(celery_capacity) if not name.startswith("_")}
    assert public - {"annotations", "TYPE_CHECKING", *LAYERS} == set(celery_capacity.__all__)


def test_all_errors_are_public() -> None:
    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PlatformError)
    }
    assert names <= set(celery_capacity.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'create_apps'"):
        celery_capacity.create_apps  # noqa: B018


def test_importing_the_public_module_opens_nothing_and_starts_nothing() -> None:
    seen = _fresh(
        "import json, sys, threading\n"
        "events = []\n"
        "def hook(event, arguments):\n"
        "    if event.startswith(('socket.', 'subprocess.', 'os.fork', 'os.posix_spawn')):\n"
        "        events.append(event)\n"
        "    if event == 'open' and str(arguments[0]).endswith(('.json', '.lock')):\n"
        "        events.append(str(arguments[0]))\n"
        "sys.addaudithook(hook)\n"
        "import celery_capacity\n"
        "loaded = sorted({name.split('.')[0] for name in sys.modules})\n"
        "print(json.dumps([events, threading.active_count(), loaded]))"
    )
    events, threads, loaded = seen
    assert events == []
    assert threads == 1
    assert not {"celery", "kombu", "redis", "sqlalchemy", "click"} & set(loaded)


def test_using_the_public_names_opens_nothing_and_starts_nothing() -> None:
    seen = _fresh(
        "import json, sys, threading\n"
        "events = []\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'subprocess.Popen', 'os.fork', 'os.posix_spawn'):\n"
        "        events.append(event)\n"
        "    if event == 'open' and str(arguments[0]).endswith(('servers.json', 'servers.lock')):\n"
        "        events.append(str(arguments[0]))\n"
        "sys.addaudithook(hook)\n"
        "import celery_capacity\n"
        "for name in celery_capacity.__all__: getattr(celery_capacity, name)\n"
        "print(json.dumps([events, threading.active_count()]))"
    )
    assert seen == [[], 1]


@pytest.mark.parametrize("folder", ["policy", "fallback", "simulation"])
def test_property_of_the_policy_draws_all_its_books_at_night(folder: str) -> None:
    for path in sorted((ROOT / "tests" / "contract" / "routing" / folder).glob("test_*.py")):
        for function in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)):
            decorators = " ".join(map(ast.unparse, function.decorator_list))
            assert "given(" not in decorators or "max_examples=examples(" in decorators, function.name
