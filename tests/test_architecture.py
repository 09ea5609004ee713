"""The house's import laws, as data: what each room may know."""

import ast
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parents[1] / "code"
PACKAGE = CODE / "samtune"
GROUND = {"errors", "structures", "config", "flags", "run_folder", "tensor_files", "threads"}
WINGS = {"models", "data", "metrics", "losses", "engine"}
VERBS = {
    "train", "evaluate", "importing", "merging", "compare", "benchmark", "adapter_table",
    "sharding",
}  # fmt: skip
# Composition that verbs share. It imports the wings and is imported by verbs only.
COMPOSED = {
    "pipeline", "trained", "pictures", "gallery", "complexity", "sources", "answers", "judging",
    "machine", "random_data", "probe", "caching", "slow_data",
}  # fmt: skip

# room -> the rooms it may import beside itself
MAY_IMPORT = {
    **{name: set() for name in GROUND},
    "run_folder": {"errors"},
    "flags": {"errors", "config"},
    "tensor_files": {"errors"},
    **dict.fromkeys(WINGS, GROUND),
    "adapters": GROUND | {"models"},
    "pictures": GROUND,
    **{name: GROUND | WINGS | {"adapters"} | COMPOSED for name in COMPOSED - {"pictures"} | VERBS},
    "run_sa": GROUND | VERBS | {"adapters", "models", "engine"},
    "torchrun": {"errors"},
}
# module -> the only places that may import it
ONLY_IN = {
    "torch.distributed": {"engine/distributed.py", "../torchrun.py"},
    "torch.nn.parallel": {"engine/distributed.py"},
    "segment_anything": {"models/"},
    "timm": {"models/tiny_vit.py"},
}
TORCH_FREE = ["errors", "config", "flags", "run_folder", "adapters", "models", "metrics.protocols"]


def modules():
    return [*sorted(PACKAGE.rglob("*.py")), CODE / "run_sa.py", CODE / "torchrun.py"]


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE) if PACKAGE in path.parents else Path(path.name)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path):
    """(line number, dotted module) of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(CODE)))
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    if room == "__init__":
        room = "errors"  # the package's own front door imports nothing
    assert room in MAY_IMPORT, f"{path}: a room without a law; add it to MAY_IMPORT"
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "samtune" and len(parts) > 1 and parts[1] != "__version__":
            other = parts[1]
            assert other == room or other in MAY_IMPORT[room], f"{path}:{line}: {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(CODE)))
def test_one_door_for_distribution_and_for_sam(path):
    for line, module in imports(path):
        for guarded, places in ONLY_IN.items():
            if module == guarded or module.startswith(guarded + "."):
                here = path.resolve().as_posix()
                allowed = [(PACKAGE / place).resolve().as_posix() for place in places]
                assert any(here == a or here.startswith(a + "/") for a in allowed), (
                    f"{path}:{line}: {module} belongs to {sorted(places)}"
                )


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(CODE)))
def test_importing_has_no_effects(path):
    """A module's top level only defines: no call stands alone there.

    But one that says how an operator, defined above it, is differentiated: that is its definition.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            if getattr(getattr(node.value, "func", None), "attr", "") == "register_autograd":
                continue
            raise AssertionError(f"{path}:{node.lineno}: a bare expression at import")


def test_code_never_shadows_the_standard_library():
    assert not (CODE / "__init__.py").exists()


def test_the_command_line_is_torch_free():
    import subprocess
    import sys

    script = f"import sys; sys.path.insert(0, {str(CODE)!r}); import run_sa; " + "; ".join(
        f"import samtune.{name}" for name in TORCH_FREE
    )
    script += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_no_module_is_a_junk_drawer():
    names = {path.stem for path in modules()}
    assert not names & {"utils", "util", "common", "misc", "helpers", "helper"}
