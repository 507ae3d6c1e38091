"""The rules of the house, read off the files: who may import whom, how long things grow, what may not be named."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from nanochat.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("nanochat/**/*.py"), *ROOT.glob("kernels/nanochat_kernels/**/*.py")])

# A module may import its own layer and those below it. The longest matching prefix counts.
LAYERS = {
    "nanochat_kernels": 0,
    "nanochat": 1,  # the bare package: its version
    "nanochat.errors": 1,
    "nanochat.runtime": 1,
    "nanochat.tokenizer": 2,
    "nanochat.chat_format": 2,
    "nanochat.data": 2,
    "nanochat.model": 3,
    "nanochat.inference": 4,
    "nanochat.training": 5,
    "nanochat.evaluation": 5,
    "nanochat.serving": 5,
    "nanochat.exchange": 5,
    "nanochat.tok_commands": 6,
    "nanochat.doctor": 6,
    "nanochat.measure": 6,
    "nanochat.report": 6,
    "nanochat.status": 6,
    "nanochat.cli": 7,
    "nanochat.__main__": 8,
}


def tracked(*patterns: str) -> list[Path]:
    """The files that git knows, or a skip where this is no checkout."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.decode().split("\0") if name and (path := ROOT / name).is_file()]


def module_name(path: Path) -> str:
    parts = (
        path.relative_to(ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[0] else ROOT)
        .with_suffix("")
        .parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int | None:
    prefixes = [
        prefix for prefix in LAYERS if module == prefix or (prefix != "nanochat" and module.startswith(prefix + "."))
    ]
    return LAYERS[max(prefixes, key=len)] if prefixes else None


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of ours, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            # `from nanochat import status` imports a module, `from nanochat.errors import UsageError` a name
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [
                (
                    node.lineno,
                    name if layer(name) != layer(str(node.module)) and layer(name) is not None else str(node.module),
                )
                for name in inner
            ]
    return [(line, module) for line, module in found if module.partition(".")[0] in ("nanochat", "nanochat_kernels")]


def test_every_module_has_a_layer():
    homeless = [module_name(path) for path in SOURCES if layer(module_name(path)) is None]
    assert not homeless, f"give these a line in LAYERS: {homeless}"


def test_layers_point_down_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module_name(path)} imports {imported}, which lies above it"
        for path in SOURCES
        for line, imported in imports(path)
        if (layer(imported) or 0) > (layer(module_name(path)) or 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_layer_test_sees_a_forbidden_import(tmp_path):
    """The rule above must be able to fail: lazily, as a module and as a name."""
    bad = tmp_path / "bad.py"
    for text in (
        "def f():\n    import nanochat.training.pretrain",
        "from nanochat import status",
        "from nanochat.model.gpt import GPT",
    ):
        bad.write_text(text)
        assert [layer(module) for _, module in imports(bad)][0] > LAYERS["nanochat.data"]


def test_kernels_import_nothing_of_nanochat():
    wrong = [
        path for path in SOURCES if "kernels" in path.parts for _, name in imports(path) if name.startswith("nanochat.")
    ]
    assert not wrong


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"no docstring: {silent}"


def test_files_and_functions_stay_short():
    code = tracked("*.py", "*.rs", "*.cpp", "*.cu", "*.h", "*.cuh", "*.sh")
    long_files = [
        f"{path.relative_to(ROOT)}: {count} lines" for path in code if (count := path.read_text().count("\n")) > 600
    ]
    long_functions = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 90
    ]
    assert not long_files + long_functions, "\n".join(long_files + long_functions)


def test_no_large_files():
    large = [
        f"{path.relative_to(ROOT)}: {size} bytes" for path in tracked() if (size := path.stat().st_size) > 1_000_000
    ]
    assert not large, "\n".join(large)


def test_no_lock_files():
    locks = [path.name for path in tracked("*.lock", "**/*.lock", "package-lock.json", "**/package-lock.json")]
    assert not locks, f"lock files name download hosts: {locks}"


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        # each spelled so that this file does not match itself
        ("a package registry", r"pypi[.]org|python" r"hosted[.]org|crates[.]io|npmjs[.]org|deb[.]debian[.]org"),
        ("a path of one machine", r"(?<![\w.])/(?:work|root|Users)/" r"\w|(?<![\w.])/home/" r"\w"),
        ("a neighbor folder outside tests", r"\.\./" r"shared"),
    ],
)
def test_nothing_names(what, pattern):
    hits = []
    for path in tracked():
        if what.endswith("outside tests") and path.relative_to(ROOT).parts[0] == "tests":
            continue
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        hits += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}"
            for n, line in enumerate(lines, 1)
            if re.search(pattern, line)
        ]
    assert not hits, f"{what} is named:\n" + "\n".join(hits)


def test_every_package_is_installed():
    """setup.py finds packages by __init__.py: a folder without one would be missing in an installed copy only."""
    folders = {path.parent for path in SOURCES}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_constraints_agree_with_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = (ROOT / "constraints.txt").read_text()
    assert "torch>=2.11" in project["dependencies"] and "torch==2.11.0" in pins
    assert (
        any(re.fullmatch(r"numpy.*<2\.4", requirement) for requirement in project["dependencies"])
        and "numpy<2.4" in pins
    )


def test_readme_names_only_what_exists():
    text = (
        (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "docs/tour.md").read_text()
    )
    commands = set(
        re.findall(
            r"(?:^|[`\s])(?:python -m )?nanochat ([a-z][a-z-]+)(?=[ `\n])",
            "\n".join(re.findall(r"`[^`]*`|```[^`]*```", text)),
        )
    )
    assert commands, "the command table has gone"
    assert not commands - set(COMMANDS), f"not commands: {commands - set(COMMANDS)}"
    paths = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", (ROOT / "README.md").read_text()) + re.findall(
        r"bash (runs/\S+\.sh)", text
    )
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in COMMANDS if f"`nanochat {name}`" not in readme]
