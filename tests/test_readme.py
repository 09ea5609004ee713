"""What the README says is what the code does."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import run_sa
from samtune import config, errors
from samtune.adapters import ADAPTERS
from samtune.data.catalog_rows import DATASETS
from samtune.data.catalog_rows import table as table_of_datasets
from samtune.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TORCHRUNS = {"max_restarts", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "help"}
SUITES = {"list", "only", "preset"}  # flags of benchmarks/run.py
OTHERS = {"fuzz", "require", "disable"}  # flags of test.sh and of pip, up to their first hyphen
SLURMS = {"nodes", "gpus"}  # sbatch's flags, up to their first hyphen
# run.sh's variables that are torchrun's
NODES = {"NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS"}
COMPARES = {"adapters"}  # flags of `compare` itself; the others are those of `train`


def table(name: str) -> list[list[str]]:
    """Rows of cells between <!--name--> and <!--/name-->, without the head."""
    text = README.split(f"<!--{name}-->")[1].split(f"<!--/{name}-->")[0]
    lines = [line for line in text.strip().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def flags() -> set[str]:
    groups = [value for value in vars(config).values() if is_dataclass(value)]
    groups += [adapter.options for adapter in ADAPTERS.values()]
    return {f.name for group in groups for f in fields(group) if f.metadata} | {"config"}


def test_every_flag_that_is_named_exists():
    named = set(re.findall(r"(?<![!\w/-])--([a-z][a-z0-9_]+)", README))
    assert len(named) > 20
    unknown = named - flags() - TORCHRUNS - SUITES - SLURMS - COMPARES - OTHERS
    assert unknown - set(config.RETIRED) == set()


def test_every_variable_of_the_launchers_that_is_named_exists():
    launchers = (ROOT / "run.sh").read_text() + (ROOT / "eval.sh").read_text()
    known = set(re.findall(r"^([A-Z_]+)=", launchers, re.M))
    named = set(re.findall(r"\b([A-Z][A-Z_]{2,})=", README))
    assert named and named <= known


def test_every_launcher_flag_exists():
    """eval.sh names them; those of run.sh are its variables, all but that of torchrun."""
    command = (ROOT / "eval.sh").read_text().split("code/run_sa.py")[1]
    named = set(re.findall(r"--([a-z_]+)", command))
    assert named and named <= flags()
    script = (ROOT / "run.sh").read_text()
    variables = re.findall(r"^([A-Z_]+)=\"\$\{", script, re.M)
    passed = re.search(r"for name in (.*?); do", script, re.S).group(1).replace("\\", "").split()
    assert passed == [name for name in variables if name not in NODES]
    assert {name.lower() for name in passed} <= flags()


def test_the_tables_of_adapters_are_what_the_verb_prints(capsys):
    text = README.split("<!--adapters-->\n")[1].split("<!--/adapters-->")[0]
    assert run_sa.main(["adapters"]) == 0
    assert capsys.readouterr().out == text, "put in what `code/run_sa.py adapters` prints"
    assert run_sa.main(["adapters", "--rank", "4"]) == errors.EXIT_USER_ERROR


def test_the_table_of_data_sets_is_that_of_the_code():
    written = README.split("<!--datasets-->\n")[1].split("<!--/datasets-->")[0]
    assert written == table_of_datasets()
    assert len(table("datasets")) == len(DATASETS)


def test_the_table_of_exit_codes_is_that_of_the_code():
    codes = {int(row[0]) for row in table("exit-codes")}
    assert codes == {0, *(v for k, v in vars(errors).items() if k.startswith("EXIT_"))}


def test_the_table_of_files_is_that_of_a_run():
    named = set(re.findall(r"`([a-z_.]+)/?`", " ".join(row[0] for row in table("files"))))
    written = {p.name for p in vars(RunFolder("x")).values() if p != Path("x")}
    assert named == written


def test_the_python_example_loads_a_run(tmp_path):
    """The very lines of the README, on a run that was made here."""
    lines = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert len(lines.strip().splitlines()) == 5
    make_run = (
        "import sys; sys.path.insert(0, 'code'); from run_sa import main; sys.exit(main(['train', "
        "'--epoch', '1', '--batch_size', '8', '--image_size', '64', '--workers', '0', "
        "'--output_dir', 'checkpoints/my_run']))"
    )
    (tmp_path / "code").symlink_to(ROOT / "code")
    for script in (make_run, lines + "\nassert predictor.model.image_encoder.img_size == 64"):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def spelled_out(name: str) -> list[str]:
    """`a-{b,c}` is a-b and a-c, as a shell reads it."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    inside, tail = rest.split("}", 1)
    return [head + part + end for part in inside.split(",") for end in spelled_out(tail)]


def test_the_recipes_are_those_in_their_folder():
    section = README.split("\n## Recipes\n")[1].split("\n## ")[0]
    named = re.findall(r"`([\w{},-]+\.yaml)`", section)
    files = sorted(path.name for path in (ROOT / "configs").iterdir())
    assert sorted(file for name in named for file in spelled_out(name)) == files


def test_nothing_is_left_to_fill_in():
    assert set(re.findall(r"<!--/?([\w-]+)-->", README)) == {
        "adapters", "benchmarks", "datasets", "exit-codes", "faults", "files",
    }  # fmt: skip


def test_every_test_of_a_fault_that_is_named_exists():
    """`file.py`, then a colon and the starts of names of tests in it."""
    rows = table("faults")
    assert len(rows) > 25
    for what, happens, tests in rows:
        assert what and happens
        named = re.findall(r"`([\w/]+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", tests)
        assert named, what
        for file, names in named:
            text = (ROOT / "tests" / file).read_text()
            for name in re.findall(r"`(\w+)`", names):
                assert f"def test_{name}" in text, (what, file, name)
