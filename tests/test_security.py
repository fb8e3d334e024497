"""What someone else's files, names, answers and servers must not be able to do here.

Tested beside what they are about: a grader cannot hurt the run (tests/train/test_grading.py), a page shows hostile text
as text (tests/pipeline/test_report.py, tests/pipeline/signoff/test_markdown.py), and a real server's key is on no
command line and in no log (tests/integration/test_served_eval.py).
"""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from eval.client import Server
from eval.source import KEY_VARIABLE, ModelSource, SourceError
from eval.suite import SuiteTask, load_suite
from eval.weights import weights
from pipeline.config import ConfigError, RunConfig, load_config
from pipeline.models import load_module
from pipeline.preflight import preflight
from pipeline.provenance import provenance
from pipeline.run_dir import RunDir
from pipeline.signoff.markdown import write_summary
from pipeline.signoff.report import write_report
from pipeline.signoff.verdict import write_signoff
from quant.config import TargetSpec
from quant.hardware import detect_device
from quant.server_process import server_environment
from quant.verify import file_fingerprint
from tests.pipeline.conftest import SyntheticRun, make_comparison, make_run
from tests.tiny import tiny_folder, tiny_model
from train.checkpoint import CheckpointError, LoopState, damage, load_checkpoint, save_checkpoint
from train.config import ConstraintConfig, RolloutConfig, TaskConfig, TrainConfig
from train.multiplier import initial_multiplier
from train.policy import Policy

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "quant", "train", "eval")
DEMO = ROOT / "configs" / "demo-int4.toml"

# What runs code that is in data. The reason beside each exception is why it cannot here.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLES = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
RUNS = {"eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
ALLOWED = {
    # The trainer sends a worker its own config and samples as pickles, over a pipe that only the two of them hold; the
    # worker answers in JSON lines. So a grader, the user's code, can make the trainer parse nothing but JSON.
    "train/grading_pool.py: import pickle",
    "train/grading_pool.py: pickle.dumps",
    "train/grading_worker.py: import pickle",
    "train/grading_worker.py: pickle.load",
}


def dangerous(source: str, name: str) -> Iterator[str]:
    """Every import and call of a file that could run code which is in data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{name}: import {module}" for module in modules if module.partition(".")[0] in PICKLES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNPICKLES | RUNS or called.partition(".")[0] in PICKLES:
                yield f"{name}: {called}"
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            for setting, value in (("shell", "True"), ("trust_remote_code", "True"), ("weights_only", "False")):
                if settings.get(setting) == value:
                    yield f"{name}: {setting}={value}"


def test_nothing_unpickles_or_runs_what_is_in_a_file() -> None:
    """In all four packages: pickles only from the trainer to its own grading workers, and no eval, exec, shell,
    torch.load, yaml.load or trust_remote_code=True at all."""
    found = {
        each
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for each in dangerous(path.read_text(), str(path.relative_to(ROOT)))
    }
    assert found == ALLOWED


def test_the_pickles_go_one_way() -> None:
    """The pool, in the trainer's process, never calls load; the worker never calls dump."""
    assert "pickle.load" not in (ROOT / "train/grading_pool.py").read_text()
    assert "pickle.dump" not in (ROOT / "train/grading_worker.py").read_text()


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from dill import loads", "torch.load(p)", "eval('1')", "subprocess.run('x', shell=True)",
     "f(trust_remote_code=True)", "torch.load(p, weights_only=False)", "yaml.load(t)", "import numpy; numpy.load(p)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    """Each of these lines is found."""
    assert list(dangerous(line, "x.py"))


class Exploit:
    """What unpickling runs: it leaves a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def exploit(tmp_path: Path) -> bytes:
    """A pickle that makes `executed` when it is loaded; proven on a copy that is."""
    pickle.loads(pickle.dumps(Exploit(tmp_path / "works")))
    assert (tmp_path / "works").is_dir()
    return pickle.dumps({"model.embed_tokens.weight": Exploit(tmp_path / "executed")})


def test_a_pickle_under_a_safetensors_name_is_refused(tmp_path: Path, exploit: bytes) -> None:
    """By the trainer, with one error that names the folder, and by the sign-off's integrity check; nothing runs."""
    folder = tiny_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(exploit)
    with pytest.raises(ConfigError, match=r"model\.path: .*model: the model cannot be loaded"):
        load_module(folder, load_config(DEMO))
    assert weights(folder).problems[0].startswith("model.safetensors: cannot be read")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_beside_the_weights_is_never_read(tmp_path: Path, exploit: bytes, name: str) -> None:
    """The model that loads is the safetensors', bit for bit; without them there is no model to load."""
    folder = tiny_folder(tmp_path / "model")
    expected = load_module(folder, load_config(DEMO)).state_dict()
    (folder / name).write_bytes(exploit)
    found = load_module(folder, load_config(DEMO)).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_module(folder, load_config(DEMO))
    with pytest.raises(SourceError, match=r"no \*\.safetensors"):
        ModelSource.parse(str(folder)).folder()
    with pytest.raises(ConfigError, match="no safetensors weights"):
        preflight(load_config(DEMO, ("signoff.baseline_arm=null", "model.make=null", f"model.path={folder}")))
    assert not (tmp_path / "executed").exists()


def test_a_weight_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    """transformers would draw it at random and say so in a log; here it is an error that names it."""
    folder = tiny_folder(tmp_path / "model")
    model = tiny_model()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing .*layers\.1\.mlp\.up_proj\.weight"):
        load_module(folder, load_config(DEMO))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """A model whose head is its embedding has one tensor for both, and loads."""
    folder = tiny_folder(tmp_path / "model", tied=True)
    assert "lm_head.weight" not in weights(folder).files
    module = load_module(folder, load_config(DEMO))
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_a_checkpoint_that_is_a_pickle_is_refused(tmp_path: Path, exploit: bytes) -> None:
    """Even when whoever put it there has made the manifest agree: the file is not safetensors, and nothing runs."""
    config = TrainConfig(
        task=TaskConfig(source="jsonl", name="x"),
        rollout=RolloutConfig(prompts=2, group_size=2, max_tokens=8, max_model_len=64),
        steps=1,
    )
    policy = Policy(tiny_model(), config)
    state = LoopState(1, initial_multiplier(ConstraintConfig()), None, None)
    folder = save_checkpoint(tmp_path / "train", policy, state)
    for name in ("masters", "optimizer", "random", "scales", "critic", "held"):
        path = folder / f"{name}.safetensors"
        whole, manifest = path.read_bytes(), (folder / "manifest.json").read_text()
        path.write_bytes(exploit)
        assert damage(folder) is not None
        agreeing = json.loads(manifest) | {path.name: file_fingerprint(path)}
        (folder / "manifest.json").write_text(json.dumps(agreeing))
        assert damage(folder) is None
        with pytest.raises(CheckpointError, match=r"checkpoint-000001"):
            load_checkpoint(folder, policy)
        path.write_bytes(whole)
        (folder / "manifest.json").write_text(manifest)
    assert not (tmp_path / "executed").exists()


def test_remote_code_is_off_unless_asked_and_then_recorded(tmp_path: Path) -> None:
    """False in every shipped config; a model's own code is not run; the provenance says which it was."""
    for path in (ROOT / "configs").rglob("*.toml"):
        if path.parent.name not in ("targets", "suites"):
            assert load_config(path).model.trust_remote_code is False
    folder = tiny_folder(tmp_path / "model")
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*trust_remote_code"):
        load_module(folder, load_config(DEMO))
    assert not (tmp_path / "executed").exists()
    for trust in (False, True):
        assert provenance("{}", detect_device(), trust_remote_code=trust)["trust_remote_code"] is trust


@pytest.mark.parametrize("make", [make_run, make_comparison])
def test_no_key_is_in_what_a_run_leaves(tmp_path: Path, monkeypatch, make) -> None:
    """The endpoint's key and the hub's token, in the environment while the artifacts are written, are in no file."""
    secrets = {KEY_VARIABLE: "sk-endpoint-0123456789", "HF_TOKEN": "hf_0123456789abcdef", "VLLM_API_KEY": "served-0123"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run: SyntheticRun = make(tmp_path / "run")
    origin = provenance("{}", detect_device(), trust_remote_code=False)
    RunDir(run.path).provenance.write_text(json.dumps(origin))
    write_summary(run.path, write_signoff(run.path))
    write_report(run.path)
    written = {path.name: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {"signoff.json", "summary.md", "report.html", "provenance.json"} <= written.keys()
    assert [name for name, content in written.items() for value in secrets.values() if value.encode() in content] == []


def test_a_servers_key_is_shown_by_nothing_that_prints_it(monkeypatch) -> None:
    """Not by its record; a server that we start gets its own key and not the endpoint's; a key in a URL is refused
    without being repeated."""
    assert "s3cret" not in repr(Server("http://127.0.0.1:1/v1", "s3cret", "m", None, 0.0))
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    environment = server_environment("own", on_cpu=True)
    assert environment["VLLM_API_KEY"] == "own"
    assert "s3cret" not in environment.values()
    with pytest.raises(SourceError) as refused:
        ModelSource.parse("http://user:s3cret@127.0.0.1/v1")
    assert "s3cret" not in str(refused.value)


BAD_NAMES = ("../x", "..", ".", "", "/x", "a/b", "a\\b", "-x", ".x", "x.", " x", "x ", "x\n", "a\0b", "x" * 101, "CON",
             "nul",
             "com1.txt", "~", "é", "a:b", "%2e%2e")  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_cannot_lead_out_of_its_folder(name: str) -> None:
    """A run's, a suite's and a suite's task's name become folders': each refuses what is no plain name everywhere."""
    demo = json.loads(load_config(DEMO).to_json())
    with pytest.raises(ValidationError, match="name"):
        RunConfig.model_validate(demo | {"name": name})
    with pytest.raises(ValidationError, match="name"):
        SuiteTask(name=name, lm_eval="gsm8k")
    with pytest.raises(ValidationError, match="lm_eval"):  # with data, a file is written under it
        SuiteTask(name="x", lm_eval=f"../{name}", data="rows.jsonl")


@pytest.mark.parametrize("name", ["demo", "a", "Run_1.2-x", "x" * 100, "console", "com"])
def test_a_plain_name_is_taken(name: str) -> None:
    """Letters, digits, dot, underscore and dash, up to 100 of them."""
    assert SuiteTask(name=name, lm_eval="gsm8k").name == name


def test_a_shipped_name_is_not_a_path() -> None:
    """A target or suite that is named, not given as a .toml file, is one of those that ship."""
    with pytest.raises(ValueError, match=r"no quantization target '\.\./suites/smoke'"):
        TargetSpec.load("../suites/smoke")
    with pytest.raises(ValueError, match=r"no such file"):
        load_suite("../targets/int8")


def test_samples_are_read_from_their_own_folder(tmp_path: Path) -> None:
    """A result whose `samples` points elsewhere is not followed: it is not measured."""
    run = make_run(tmp_path / "run")
    samples = run.path / "evaluate/tasks/heldout/samples_candidate.jsonl"
    (tmp_path / "elsewhere.jsonl").write_bytes(samples.read_bytes())
    run.edit("evaluate/tasks/heldout/candidate.json", samples="../../../../elsewhere.jsonl")
    checks = {check.name: check for check in write_signoff(run.path).checks}
    assert any("elsewhere.jsonl" in check.why and check.state != "pass" for check in checks.values())


def test_a_linked_run_folder_is_the_run(tmp_path: Path) -> None:
    """A folder that a user linked to a larger disk is judged like any other."""
    run = make_run(tmp_path / "disk")
    (tmp_path / "link").symlink_to(run.path, target_is_directory=True)
    assert write_signoff(tmp_path / "link").exit_code == write_signoff(run.path).exit_code == 0
