"""The tree is the architecture: dependencies point one way, and heavy libraries stay in the files they belong to."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "quant": set(),
    "train": {"quant"},
    "eval": {"quant"},
    "pipeline": {"quant", "train", "eval"},
}
HOME_OF = {
    "vllm": {
        "train/vllm_engine.py", "train/vllm_worker.py", "train/vllm_shards.py", "train/vllm_experts.py",
        "eval/kernel_report.py",
    },
    "llmcompressor": {"quant/calibrate.py"},
    "lm_eval": {"eval/lm_tasks.py", "eval/answers.py"},
    "matplotlib": {"pipeline/plots.py"},
    "httpx": {"eval/client.py", "train/server_client.py"},
    "peft": {"train/lora.py"},
    "accelerate": {"pipeline/trackers.py"},
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Top-level names a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependencies_point_one_way(package) -> None:
    """quant knows nobody; train and eval know quant and not each other; only pipeline knows all."""
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package}
    wrong = [(f.name, name) for f in (ROOT / package).rglob("*.py") for name in imports(f) if name in forbidden]
    assert wrong == []


@pytest.mark.parametrize("library", HOME_OF)
def test_heavy_libraries_have_one_home(library) -> None:
    """Each is imported only where it is wrapped, so that replacing it means one file."""
    files = [f for package in MAY_IMPORT for f in (ROOT / package).rglob("*.py")]
    users = {str(f.relative_to(ROOT)) for f in files if library in set(imports(f))}
    assert users == HOME_OF[library]


def test_parsing_a_config_imports_no_torch() -> None:
    """`boresight check` and `--help` answer before torch could even be loaded."""
    code = (
        "import sys; from pathlib import Path; from pipeline.config import load_config;"
        "from pipeline.preflight import preflight; import pipeline.cli; from quant.hardware import Device;"
        "device = Device('cpu', 'a CPU', (0, 0), frozenset({'avx512f'}));"
        f"config = load_config(Path({str(ROOT / 'configs/demo-int4.toml')!r}), ('signoff.baseline_arm=null',));"
        "preflight(config, device); pipeline.cli.targets();"
        "print(sorted({'torch', 'vllm', 'transformers', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_grab_bag_modules() -> None:
    """A stranger guesses each file from its name."""
    names = {f.stem for package in MAY_IMPORT for f in (ROOT / package).rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_durations_come_from_clocks_that_do_not_jump() -> None:
    """No wall clock in the packages but for the date in provenance.json: a clock set back or forth in the middle of a
    run changes no duration, rate or time limit, and an ETA is never negative."""
    wall = {"time", "now", "utcnow", "today"}
    found = {
        f"{file.relative_to(ROOT)}: {ast.unparse(node.func)}"
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in wall
        if ast.unparse(node.func.value) in {"time", "datetime", "datetime.datetime", "date", "datetime.date"}
    }
    assert {call for call in found if not call.startswith("pipeline/provenance.py: ")} == set()
